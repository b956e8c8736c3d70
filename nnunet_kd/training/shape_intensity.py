"""Shape-intensity distillation (SIKD): a teacher that sees class-wise averaged images, and its student.

Source: Dong, Du and Xu, Front. Comput. Sci. 2025 (arXiv 2409.17503). Host behaviour relied on (nnunetv2 2.8):
``train_step`` and ``validation_step`` read ``data`` and ``target`` from the batch, which names its cases in ``keys``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_kd.data.labeled_cases import classes_of, foreground
from nnunet_kd.data.member import Member
from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.skip_free import remove_skips
from nnunet_kd.settings import (
    BLOCK,
    Settings,
    check_types,
    merge,
    read_user_settings,
    resolve_settings,
    without_terms,
)
from nnunet_kd.teachers.class_average import ClassAverage
from nnunet_kd.teachers.nnunet import AVERAGES
from nnunet_kd.training.base import KDTrainer
from nnunet_kd.training.student import nnUNetTrainerKDStudent
from nnunet_kd.training.task_trainer import need_plain_plans

LAST_FEATURES = {"teacher": "shape", "on": "features", "loss": "mse", "levels": ["decoder@1"], "weight": 2.0}
RECIPES: dict[str, dict[str, Any]] = {
    "nnunet": {"terms": [LAST_FEATURES]},  # our choice: nnU-Net's loss, standardised features, our ramp
    "paper": {
        "training": {"loss": "ce"},
        "terms": [{**LAST_FEATURES, "schedule": {"kind": "constant"}, "options": {"standardise": False}}],
    },
}


class nnUNetTrainerSIKDTeacher(KDTrainer):
    """The planned network without skip connections, trained on class-wise averaged images of the stock batches."""

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """The recipe's loss; terms and teachers are for students."""
        del fold
        layers = [without_terms(layer) for layer in (plans.get(BLOCK, {}), read_user_settings())]
        recipe = without_terms(RECIPES[resolve_settings(*layers).sikd.recipe])
        need_plain_plans(plans, configuration, "SIKD", "its input is half a segmentation already")
        return resolve_settings(recipe, *layers)

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The stock network of the plans, then without skip connections."""
        network: nn.Module = KDTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return remove_skips(network)

    def on_train_start(self) -> None:
        """Require that each class occurs and can be averaged, then start as stock nnU-Net does."""
        member = self.own_dataset()
        self._require_all_classes(member, self.do_split()[0])
        self.average = ClassAverage(member, self.settings.sikd.scope)
        super().on_train_start()
        self.print_to_log_file(
            "Losses and pseudo Dice are those of class-wise averaged images, which show the labels.",
            add_timestamp=False,
        )

    def _require_all_classes(self, member: Member, training_cases: list[str]) -> None:
        """Raise SettingsError where averaged images of a class could never be made in this fold."""
        missing = set(foreground(member)) - classes_of(member, training_cases)
        if not missing:
            return
        raise SettingsError(
            f"The labels {sorted(map(str, missing))} of {member.name} occur in no training case of fold {self.fold}, "
            f"so the SIKD teacher cannot learn them. Choose another fold, correct splits_final.json, or take the label "
            f"out of dataset.json and plan again."
        )

    def train_step(self, batch: dict) -> dict:
        """Stock training step on averaged images."""
        return super().train_step(self._averaged(batch))

    def validation_step(self, batch: dict) -> dict:
        """Stock validation step on averaged images, as the paper selects its teacher."""
        return super().validation_step(self._averaged(batch))

    def _averaged(self, batch: dict) -> dict:
        self.move_to_device(batch)
        return {**batch, "data": self.average(batch)}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Say why there is none: prediction has no labels to average with."""
        del save_probabilities
        self.print_to_log_file(
            "No final validation: this teacher sees images averaged by their labels, which prediction does not have. "
            "Its pseudo Dice above is that of averaged images. Train its student with -tr nnUNetTrainerSIKDStudent."
        )

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also that it saw averaged images, and of which scope."""
        return {**super().checkpoint_extra(), AVERAGES: {"scope": self.settings.sikd.scope}}


class nnUNetTrainerSIKDStudent(nnUNetTrainerKDStudent):
    """The student of a class-average teacher: the student trainer with another list of terms."""

    # no guard: how well its teacher segments images that show the labels says nothing about what its features are worth
    preset: ClassVar[dict[str, Any]] = {"teachers": {"shape": {"kind": "class_average"}}}

    def method_preset(self, given: dict[str, Any]) -> dict[str, Any]:
        """The terms of the recipe."""
        recipe = check_types({"sikd": given.get("sikd", {})}).sikd.recipe
        return merge(self.preset, RECIPES[recipe])
