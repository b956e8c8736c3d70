"""nnunet_kd: knowledge distillation across datasets for nnU-Net v2."""

__version__ = "0.1.0"
