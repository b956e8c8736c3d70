"""The control of every claim: stock nnU-Net with the same budget, without a teacher."""

from __future__ import annotations

from nnunet_kd.settings import BLOCK, Settings, read_user_settings, resolve_settings
from nnunet_kd.training.base import KDTrainer


class nnUNetTrainerKDControl(KDTrainer):
    """Stock nnU-Net driven by the ``training`` settings. Everything about teachers and terms is ignored."""

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Keep only the budget."""
        del configuration, fold
        layers = (plans.get(BLOCK, {}), read_user_settings())
        return resolve_settings(*({"training": layer.get("training", {})} for layer in layers))
