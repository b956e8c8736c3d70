"""From the student's patch to the teacher's input: against normalising raw intensities by both plans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnunet_kd.errors import TeacherError
from nnunet_kd.teachers.geometry import ChannelMap, InputMap, input_map

WIDE = {"mean": 40.0, "std": 120.0, "percentile_00_5": -900.0, "percentile_99_5": 800.0}
NARROW = {"mean": 90.0, "std": 60.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0}


def plans(*statistics: dict[str, float], transpose: tuple[int, ...] = (0, 1, 2)) -> Any:
    properties = {str(index): own for index, own in enumerate(statistics)}
    return SimpleNamespace(transpose_forward=list(transpose), foreground_intensity_properties_per_channel=properties)


def configuration(
    *schemes: str, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), use_mask: tuple[bool, ...] | None = None
) -> Any:
    return SimpleNamespace(
        normalization_schemes=list(schemes),
        spacing=list(spacing),
        patch_size=[8] * len(spacing),
        use_mask_for_norm=list(use_mask or (False,) * len(schemes)),
    )


CT = configuration("CTNormalization")


def normalised(units: np.ndarray, statistics: dict[str, float]) -> torch.Tensor:
    scheme = CTNormalization(use_mask_for_norm=False, intensityproperties=statistics)
    return torch.from_numpy(scheme.run(units.astype(np.float32)))


def test_ct_equals_normalising_raw_units_by_the_teachers_plans() -> None:
    units = np.random.default_rng(0).uniform(-1500, 1500, (1, 1, 6, 6, 6))
    mapping = input_map(plans(WIDE), CT, ["CT"], plans(NARROW), CT, ["CT"])
    mapped = mapping(normalised(units, WIDE))
    torch.testing.assert_close(mapped, normalised(units, NARROW), rtol=1e-5, atol=1e-5)


def test_ct_clipped_by_the_student_stays_clipped() -> None:
    units = np.random.default_rng(0).uniform(-1500, 1500, (1, 1, 6, 6, 6))
    mapping = input_map(plans(NARROW), CT, ["CT"], plans(WIDE), CT, ["CT"])
    clipped = units.clip(NARROW["percentile_00_5"], NARROW["percentile_99_5"])
    torch.testing.assert_close(mapping(normalised(units, NARROW)), normalised(clipped, WIDE), rtol=1e-5, atol=1e-5)


def test_ct_of_equal_statistics_needs_no_map() -> None:
    mapping = input_map(plans(WIDE), CT, ["CT"], plans(dict(WIDE)), CT, ["CT"])
    assert mapping.channels[0].is_identity
    image = torch.randn(1, 1, 4, 4, 4)
    assert mapping(image) is image


def test_ct_statistics_of_the_right_channels() -> None:
    student = configuration("ZScoreNormalization", "CTNormalization")
    teacher = configuration("CTNormalization")
    mapping = input_map(plans(NARROW, WIDE), student, ["PET", "CT"], plans(NARROW), teacher, ["CT"])
    units = np.random.default_rng(0).uniform(-1500, 1500, (1, 1, 4, 4, 4))
    image = torch.cat([torch.randn(1, 1, 4, 4, 4), normalised(units, WIDE)], 1)
    torch.testing.assert_close(mapping(image), normalised(units, NARROW), rtol=1e-5, atol=1e-5)


def test_channels_are_matched_by_name() -> None:
    student = configuration(*["ZScoreNormalization"] * 3)
    teacher = configuration(*["ZScoreNormalization"] * 2)
    names = ["T1", "T2", "FLAIR"]
    mapping = input_map(plans(WIDE, WIDE, WIDE), student, names, plans(NARROW, NARROW), teacher, ["FLAIR", "T1"])
    image = torch.randn(2, 3, 4, 4, 4)
    assert torch.equal(mapping(image), image[:, [2, 0]])


def test_channels_of_one_name_are_matched_in_their_order() -> None:
    plan, three = plans(WIDE, WIDE, WIDE), configuration(*["RGBTo01Normalization"] * 3)
    names = ["rgb_to_0_1"] * 3
    image = torch.randn(1, 3, 4, 4, 4)
    assert torch.equal(input_map(plan, three, names, plan, three, names)(image), image)
    with pytest.raises(TeacherError, match="'rgb_to_0_1' 3 times"):
        input_map(plan, configuration(*["RGBTo01Normalization"] * 2), names[:2], plan, three, names)


# --- spacing ----------------------------------------------------------------------------------------------------------
def test_coarser_teacher_sees_the_patch_on_its_own_grid() -> None:
    student, teacher = (configuration("ZScoreNormalization", spacing=own) for own in ((1.0, 1.0, 1.0), (1.0, 2.0, 4.0)))
    mapping = input_map(plans(WIDE), student, ["T1"], plans(WIDE), teacher, ["T1"])
    assert mapping.zoom == (1.0, 0.5, 0.25)
    # voxel centres of a linear ramp stay a linear ramp
    ramp = torch.arange(16.0).view(1, 1, 1, 1, 16).expand(1, 1, 4, 8, 16)
    mapped = mapping(ramp)
    assert mapped.shape == (1, 1, 4, 4, 4)
    torch.testing.assert_close(mapped[0, 0, 0, 0], torch.tensor([1.5, 5.5, 9.5, 13.5]))


def test_finer_teacher_and_back() -> None:
    student, teacher = (configuration("ZScoreNormalization", spacing=own) for own in ((2.0, 2.0), (1.0, 0.5)))
    mapping = input_map(plans(WIDE), student, ["T1"], plans(WIDE), teacher, ["T1"])
    assert mapping.zoom == (2.0, 4.0)
    image = torch.full((1, 1, 6, 6), 3.0)
    mapped = mapping(image)
    assert mapped.shape == (1, 1, 12, 24)
    assert (mapped == 3).all()
    assert mapping.restore(torch.zeros(1, 2, 12, 24), (6, 6)).shape == (1, 2, 6, 6)


def test_a_thin_patch_keeps_a_voxel() -> None:
    mapping = InputMap((ChannelMap(0),), (0.1, 1.0, 1.0))
    assert mapping(torch.randn(1, 1, 2, 4, 4)).shape == (1, 1, 1, 4, 4)


def test_rounding_of_spacing_is_no_zoom() -> None:
    student = configuration("ZScoreNormalization", spacing=(1.0, 1.0, 1.0))
    teacher = configuration("ZScoreNormalization", spacing=(1.0, 1.0000001, 0.9999999))
    mapping = input_map(plans(WIDE), student, ["T1"], plans(WIDE), teacher, ["T1"])
    assert mapping.zoom == (1.0, 1.0, 1.0)
    image = torch.randn(1, 1, 4, 4, 4)
    assert mapping(image) is image
    logits = torch.randn(1, 2, 4, 4, 4)
    assert mapping.restore(logits, (4, 4, 4)) is logits


# --- what cannot be mapped --------------------------------------------------------------------------------------------
Z = configuration("ZScoreNormalization")


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        ((plans(WIDE), Z, ["T1"]), (plans(WIDE), Z, ["T2"]), "channel 'T2'"),
        ((plans(WIDE), CT, ["CT"]), (plans(WIDE), Z, ["CT"]), "CTNormalization.*ZScoreNormalization"),
        ((plans(WIDE), Z, ["T1"]), (plans(WIDE), configuration("ZScoreNormalization", spacing=(1, 1)), ["T1"]), "2D"),
        ((plans(WIDE), Z, ["T1"]), (plans(WIDE, transpose=(2, 0, 1)), Z, ["T1"]), "order the axes"),
        (
            (plans(WIDE), Z, ["T1"]),
            (plans(WIDE), configuration("ZScoreNormalization", use_mask=(True,)), ["T1"]),
            "mask",
        ),
    ],
)
def test_what_has_no_exact_map_is_refused(student: tuple[Any, ...], teacher: tuple[Any, ...], named: str) -> None:
    with pytest.raises(TeacherError, match=named):
        input_map(*student, *teacher)


def test_unknown_normalisation_is_refused() -> None:
    own = configuration("SomebodysNormalization")
    with pytest.raises(NotImplementedError, match="SomebodysNormalization"):
        input_map(plans(WIDE), own, ["T1"], plans(NARROW), own, ["T1"])
