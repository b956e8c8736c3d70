"""The teacher of SIKD: the planned network without skip connections, on class-wise averaged images.

nnUNetv2_train 306 2d 0 -tr nnUNetTrainerSIKDTeacher
"""

from nnunet_kd.training.shape_intensity import nnUNetTrainerSIKDTeacher

__all__ = ["nnUNetTrainerSIKDTeacher"]
