"""What a student restores from its checkpoint, also from those of earlier versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import Settings, parse_settings
from nnunet_kd.training.student import nnUNetTrainerKDStudent

TERMS = [
    {"on": "features", "loss": "mse", "levels": ["bottleneck"]},
    {"on": "classification", "loss": "kl"},
]
SETTINGS = parse_settings({"teachers": {"joint": {}}, "terms": TERMS})


def student(settings: Settings, has_default_terms: bool) -> nnUNetTrainerKDStudent:
    trainer = nnUNetTrainerKDStudent.__new__(nnUNetTrainerKDStudent)
    trainer.settings, trainer.has_default_terms, trainer.output_folder = settings, has_default_terms, "fold_0"
    return trainer


def extra_of(settings: Settings, competence: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings.to_dict(),
        "projector_shapes": {"joint bottleneck": [2, 3, 4]},
        "competence": competence,
    }


def test_counts_of_earlier_versions_are_of_the_segmentation() -> None:
    counts = torch.rand(2, 3, 1)
    trainer = student(SETTINGS, False)
    trainer.load_checkpoint_extra(extra_of(SETTINGS, {"joint": counts, "other": None}))
    assert trainer.restored_competence == {"joint": {"segmentation": counts}, "other": {"segmentation": None}}
    assert trainer.projector_shapes == {"joint bottleneck": (2, 3, 4)}


def test_counts_of_every_task_come_back() -> None:
    competence = {"joint": {"segmentation": torch.rand(2, 3, 1), "detection": None}}
    trainer = student(SETTINGS, False)
    trainer.load_checkpoint_extra(extra_of(SETTINGS, competence))
    assert trainer.restored_competence == competence


def test_default_terms_that_were_left_out_stay_so() -> None:
    trained = replace(SETTINGS, terms=SETTINGS.terms[:1])
    trainer = student(SETTINGS, True)
    trainer.load_checkpoint_extra(extra_of(trained, {}))
    assert trainer.settings == trained
    with pytest.raises(SettingsError, match="trained with other settings"):
        student(SETTINGS, False).load_checkpoint_extra(extra_of(trained, {}))
