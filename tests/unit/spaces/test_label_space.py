from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import LabelSpace


@st.composite
def dataset_jsons(draw: st.DrawFn) -> dict:
    """Valid labels of 1 to 6 values, as labels or regions, declared in any order, with or without ignore label."""
    num_values = draw(st.integers(1, 6))
    values = list(range(1, num_values + 1))
    labels: dict = {"background": 0}
    description: dict = {}
    if draw(st.booleans()) and num_values > 1:
        regions = [values] + [draw(st.lists(st.sampled_from(values), min_size=1, unique=True)) for _ in range(2)]
        labels |= {f"region {index}": region if len(region) > 1 else region[0] for index, region in enumerate(regions)}
        description["regions_class_order"] = [1] * len(regions)
    else:
        labels |= {f"label {value}": value for value in values}
    if draw(st.booleans()):
        labels["ignore"] = num_values + 1
    items = draw(st.permutations(list(labels.items())))
    return {"labels": dict(items), **description}


@given(dataset_jsons())
def test_agrees_with_nnunets_label_manager(description: dict) -> None:
    space = LabelSpace.from_dataset_json(description)
    stock = LabelManager(description["labels"], description.get("regions_class_order"))

    assert space.regions == stock.has_regions
    assert space.num_channels == stock.num_segmentation_heads
    assert space.ignore == stock.ignore_label
    assert list(space.label_values) == stock.all_labels
    declared = description["labels"]
    if stock.has_regions:
        expected = [tuple(r) if isinstance(r, tuple) else (r,) for r in stock.foreground_regions]
        assert space.foreground_names == space.names
    else:
        expected = [(int(label),) for label in stock.all_labels]
        assert space.names[0] == "background"
        assert space.foreground_names == space.names[1:]
    assert list(space.values) == expected
    for name, values in zip(space.names, space.values, strict=True):
        assert values == (tuple(declared[name]) if isinstance(declared[name], list) else (declared[name],))


def test_labels_come_by_value_and_regions_as_declared() -> None:
    labels = LabelSpace.from_dataset_json({"labels": {"tumor": 2, "background": 0, "liver": 1, "ignore": 3}})
    assert labels == LabelSpace(("background", "liver", "tumor"), ((0,), (1,), (2,)), False, 3)

    regions = LabelSpace.from_dataset_json(
        {"labels": {"core": [2, 3], "background": 0, "whole": [1, 2, 3]}, "regions_class_order": [1, 2]}
    )
    assert regions == LabelSpace(("core", "whole"), ((2, 3), (1, 2, 3)), True, None)
    assert regions.label_values == (0, 1, 2, 3)


def test_two_names_of_one_value_share_a_channel_as_in_nnunet() -> None:
    description = {"labels": {"background": 0, "left": 1, "also left": 1, "right": 2}}
    space = LabelSpace.from_dataset_json(description)
    assert space.names == ("background", "left", "right")
    assert space.num_channels == LabelManager(description["labels"], None).num_segmentation_heads


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "background"),
        ({"labels": {"lesion": 1}}, "background"),
        ({"labels": {"background": 1, "lesion": 0}}, "background"),
        ({"labels": {"0": "background", "1": "lesion"}}, "background"),
        ({"labels": {"background": [0], "lesion": 1}}, "background"),
        ({"labels": {"background": 0, "lesion": "one"}}, "'one'"),
        ({"labels": {"background": 0, "lesion": 1, "ignore": 1}}, "here 2"),
        ({"labels": {"background": 0, "lesion": 1, "ignore": 7}}, "here 2"),
        ({"labels": {"background": 0, "lesion": 1, "ignore": [2]}}, r"\[2\]"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions_class_order.* 2 entries"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]}, r"\[1\]"),
    ],
)
def test_labels_that_nnunet_refuses_are_refused(description: dict, message: str) -> None:
    with pytest.raises(LabelSpaceError, match=message):
        LabelSpace.from_dataset_json(description)
