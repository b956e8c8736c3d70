"""Smaller students: scale the width of a planned architecture and nothing else."""

from __future__ import annotations

import copy
from typing import Any

from nnunet_kd.errors import SettingsError


def scale_width(architecture: dict[str, Any], width: float, min_features: int = 8) -> dict[str, Any]:
    """Return the plans' ``architecture`` block with every stage's features multiplied by ``width``.

    Depth, strides and kernels stay, so the preprocessed data, patch size and deep supervision levels stay too.

    Args:
        architecture: The whole block (``network_class_name``, ``arch_kwargs``, ``_kw_requires_import``).
        width: Factor greater than 0, for example 0.5.
        min_features: No stage is made narrower than this; one that was planned narrower keeps its width.

    Raises:
        SettingsError: ``width`` or ``min_features`` is not positive, or the architecture has no stage widths.

    Source: width reduction with a floor as in DCD (max(f // r, 8)) and ReCo-KD.
    """
    if not (width > 0 and min_features > 0):
        raise SettingsError(f"The width ({width}) and the least number of features ({min_features}) must be positive.")
    scaled = copy.deepcopy(architecture)
    arguments = scaled["arch_kwargs"]
    if "features_per_stage" not in arguments:
        raise SettingsError(
            f"{architecture['network_class_name']} has no 'features_per_stage', so its width cannot be scaled. "
            f"Use plans of ExperimentPlanner or a ResEnc planner."
        )
    arguments["features_per_stage"] = [
        min(features, max(min_features, round(features * width))) if width < 1 else round(features * width)
        for features in arguments["features_per_stage"]
    ]
    return scaled
