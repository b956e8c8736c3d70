"""Width scaling changes the features and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.width import scale_width


def architecture(features: list[int]) -> dict[str, Any]:
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {"n_stages": len(features), "features_per_stage": features, "strides": [[1, 1], [2, 2]]},
        "_kw_requires_import": ["conv_op"],
    }


@pytest.mark.parametrize(
    ("features", "width", "floor", "expected"),
    [
        ([32, 64, 128, 320], 0.5, 8, [16, 32, 64, 160]),
        ([32, 64, 128, 320], 0.25, 8, [8, 16, 32, 80]),
        ([32, 64, 128, 320], 0.1, 8, [8, 8, 13, 32]),
        ([32, 64], 0.1, 16, [16, 16]),
        ([4, 64], 0.5, 8, [4, 32]),  # planned narrower than the floor: stays
        ([32, 64], 1.0, 8, [32, 64]),
        ([4, 8], 1.0, 8, [4, 8]),
        ([32, 64], 1.5, 8, [48, 96]),
    ],
)
def test_features(features: list[int], width: float, floor: int, expected: list[int]) -> None:
    assert scale_width(architecture(features), width, floor)["arch_kwargs"]["features_per_stage"] == expected


def test_everything_else_stays_and_the_input_is_not_changed() -> None:
    original = architecture([32, 64])
    before = copy.deepcopy(original)
    scaled = scale_width(original, 0.5)
    assert original == before
    scaled["arch_kwargs"]["features_per_stage"] = [32, 64]
    assert scaled == original


@pytest.mark.parametrize(("width", "floor"), [(0, 8), (-0.5, 8), (0.5, 0), (0.5, -1), (float("nan"), 8)])
def test_width_and_floor_must_be_positive(width: float, floor: int) -> None:
    with pytest.raises(SettingsError, match="must be positive"):
        scale_width(architecture([32]), width, floor)


def test_architecture_without_stage_widths_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"Primus.*features_per_stage"):
        scale_width({"network_class_name": "Primus", "arch_kwargs": {}, "_kw_requires_import": []}, 0.5)
