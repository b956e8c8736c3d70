"""The control of every claim: stock nnU-Net with the same budget, without a teacher."""

from __future__ import annotations

from nnunet_kd.settings import BLOCK, Settings, read_user_settings, resolve_settings, without_terms
from nnunet_kd.training.task_trainer import TaskTrainer


class nnUNetTrainerKDControl(TaskTrainer):
    """Stock nnU-Net driven by the settings ``training`` and ``labeled``. All about teachers and terms is ignored."""

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Keep only the budget and the labelled cases, but refuse keys that no trainer knows."""
        del configuration, fold
        known = resolve_settings(*(without_terms(layer) for layer in (plans.get(BLOCK, {}), read_user_settings())))
        return Settings(training=known.training, tasks=known.tasks, labeled=known.labeled)
