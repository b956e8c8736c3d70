"""DINO-Mix: semi-supervised segmentation with a foundation teacher and imbalance-aware CutMix.

nnUNetv2_train 301 3d_fullres 0 -tr nnUNetTrainerDINOMix
"""

from nnunet_kd.training.dino_mix import nnUNetTrainerDINOMix

__all__ = ["nnUNetTrainerDINOMix"]
