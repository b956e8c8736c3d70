"""The student of SIKD: stock nnU-Net that also imitates the last features of its class-average teacher.

nnUNetv2_train 306 2d 0 -tr nnUNetTrainerSIKDStudent
"""

from nnunet_kd.training.shape_intensity import nnUNetTrainerSIKDStudent

__all__ = ["nnUNetTrainerSIKDStudent"]
