"""The control of every claim: stock nnU-Net with the same budget, without a teacher."""

from __future__ import annotations

from nnunet_kd.settings import BLOCK, Settings, read_user_settings, resolve_settings
from nnunet_kd.training.base import KDTrainer


class nnUNetTrainerKDControl(KDTrainer):
    """Stock nnU-Net driven by the ``training`` settings. Everything about teachers and terms is ignored."""

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Keep only the budget, but refuse keys that no trainer knows."""
        del configuration, fold
        layers = (plans.get(BLOCK, {}), read_user_settings())
        of_students = ("teachers", "terms")
        known = resolve_settings(*({k: v for k, v in layer.items() if k not in of_students} for layer in layers))
        return Settings(training=known.training)
