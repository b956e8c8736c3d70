"""The control: stock nnU-Net with the student's budget, fold and seed, without a teacher.

nnUNetv2_train 301 3d_fullres 0 -tr nnUNetTrainerKDControl
"""

from nnunet_kd.training.control import nnUNetTrainerKDControl

__all__ = ["nnUNetTrainerKDControl"]
