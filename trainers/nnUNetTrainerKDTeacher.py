"""The joint teacher: one network trained on all members of a joint dataset, one member per batch.

nnUNetv2_train 900 3d_fullres 0 -tr nnUNetTrainerKDTeacher -p nnUNetKDPlans
"""

from nnunet_kd.training.teacher import nnUNetTrainerKDTeacher

__all__ = ["nnUNetTrainerKDTeacher"]
