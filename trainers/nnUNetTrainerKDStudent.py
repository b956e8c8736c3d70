"""The student: stock nnU-Net on its dataset's own plans, plus the distillation terms of its settings.

nnUNetv2_train 301 3d_fullres 0 -tr nnUNetTrainerKDStudent
"""

from nnunet_kd.training.student import nnUNetTrainerKDStudent

__all__ = ["nnUNetTrainerKDStudent"]
