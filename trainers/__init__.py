"""The trainers that nnU-Net finds by name: one re-export per file, the code is in ``nnunet_kd.training``."""
