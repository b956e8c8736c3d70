from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import LabelMap, LabelSpace


def softmax_space(num_channels: int, prefix: str = "class", ignore: int | None = None) -> LabelSpace:
    names = ("background", *(f"{prefix} {index}" for index in range(1, num_channels)))
    return LabelSpace(names, tuple((index,) for index in range(num_channels)), False, ignore)


def region_space(num_channels: int) -> LabelSpace:
    return LabelSpace(
        tuple(f"region {index}" for index in range(num_channels)),
        tuple(tuple(range(index + 1, num_channels + 2)) for index in range(num_channels)),
        True,
    )


def summed_probabilities(logits: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Brute force: voxel by voxel, in Python floats."""
    result = torch.zeros(logits.shape[0], len(groups), *logits.shape[2:], dtype=torch.float64)
    for sample in range(logits.shape[0]):
        for voxel in range(logits.shape[2]):
            exponentials = [math.exp(value) for value in logits[sample, :, voxel].tolist()]
            for target, group in enumerate(groups):
                share = sum(exponentials[channel] for channel in group) / sum(exponentials)
                result[sample, target, voxel] = share
    return result


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Number of source channels, and their partition into target channels, some of which may be empty."""
    num_source, num_target = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(0, num_target - 1), min_size=num_source, max_size=num_source))
    return num_source, tuple(tuple(c for c in range(num_source) if owner[c] == target) for target in range(num_target))


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(0, 2**31 - 1))
def test_softmax_of_mapped_logits_is_the_sum_of_probabilities(
    partition: tuple[int, tuple[tuple[int, ...], ...]], seed: int
) -> None:
    num_source, groups = partition
    logits = torch.randn(2, num_source, 3, generator=torch.Generator().manual_seed(seed)) * 5
    label_map = LabelMap(softmax_space(num_source), softmax_space(len(groups), "target"), groups)

    mapped = label_map(logits)

    assert mapped.shape == (2, len(groups), 3)
    assert torch.isfinite(mapped).all()
    torch.testing.assert_close(mapped.softmax(1).double(), summed_probabilities(logits, groups), atol=1e-5, rtol=1e-4)
    for target, group in enumerate(groups):
        if not group:
            assert (mapped.softmax(1)[:, target] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 6), st.integers(0, 2**31 - 1))
def test_sigmoid_of_mapped_logits_is_the_sum_of_probabilities(data: st.DataObject, num_source: int, seed: int) -> None:
    group = st.sets(st.integers(1, num_source - 1), min_size=1).map(lambda channels: tuple(sorted(channels)))
    groups = tuple(data.draw(st.lists(group, min_size=1, max_size=4)))
    logits = torch.randn(2, num_source, 3, generator=torch.Generator().manual_seed(seed)) * 5
    label_map = LabelMap(softmax_space(num_source), region_space(len(groups)), groups)

    mapped = label_map(logits)

    torch.testing.assert_close(mapped.sigmoid().double(), summed_probabilities(logits, groups), atol=1e-5, rtol=1e-4)


def test_log_odds_stay_exact_where_the_probability_rounds_to_one() -> None:
    logits = torch.tensor([0.0, 60.0, 50.0]).reshape(1, 3, 1)
    mapped = LabelMap(softmax_space(3), region_space(2), ((1, 2), (2,)))(logits)
    expected = [math.log(math.exp(60) + math.exp(50)), 50 - math.log(1 + math.exp(60))]
    assert mapped.flatten().tolist() == pytest.approx(expected)


def test_regions_are_selected() -> None:
    logits = torch.randn(2, 3, 4, 5)
    source = region_space(3)
    target = LabelSpace((source.names[2], source.names[0]), (source.values[2], source.values[0]), True)
    mapped = LabelMap(source, target, ((2,), (0,)))(logits)
    assert torch.equal(mapped, logits[:, [2, 0]])


def test_identity_returns_its_input_and_a_permutation_keeps_the_type() -> None:
    logits = torch.randn(1, 3, 4, dtype=torch.float16)
    same = LabelMap(softmax_space(3), softmax_space(3), ((0,), (1,), (2,)))
    assert same.is_identity
    assert same(logits) is logits

    swapped = LabelMap(softmax_space(3), softmax_space(3), ((0,), (2,), (1,)))
    assert not swapped.is_identity
    assert swapped(logits).dtype == torch.float16
    assert torch.equal(swapped(logits), logits[:, [0, 2, 1]])


def test_two_channels_of_softmax_onto_two_regions_are_no_identity() -> None:
    label_map = LabelMap(softmax_space(3), region_space(2), ((1,), (2,)))
    logits = torch.randn(1, 3, 4)
    assert not label_map.is_identity
    torch.testing.assert_close(label_map(logits).sigmoid(), logits.softmax(1)[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_logits_are_taken_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(1, 4, 50) * 10).to(dtype)
    for target in (softmax_space(2), region_space(2)):
        groups = ((0, 1), (2, 3)) if not target.regions else ((1, 2), (3,))
        mapped = LabelMap(softmax_space(4), target, groups)(logits)
        assert mapped.dtype == torch.float32
        probability = mapped.sigmoid() if target.regions else mapped.softmax(1)
        torch.testing.assert_close(
            probability.double(), summed_probabilities(logits.float(), groups), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        (softmax_space(3), ((0, 2), (), (1, 3))),
        (softmax_space(4), ((0,), (3,), (1,), (2,))),
        (region_space(1), ((2,),)),
    ],
)
def test_gradients(target: LabelSpace, groups: tuple[tuple[int, ...], ...]) -> None:
    logits = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LabelMap(softmax_space(4), target, groups), (logits,))


@pytest.mark.parametrize(
    ("source", "target", "groups", "message"),
    [
        (region_space(2), softmax_space(2), ((0,), (1,)), "regions on both sides"),
        (softmax_space(3), softmax_space(2), ((0, 1, 2),), "2 channels"),
        (softmax_space(3), softmax_space(2), ((0,), (1,)), "exactly one group"),
        (softmax_space(3), softmax_space(2), ((0, 1), (1, 2)), "exactly one group"),
        (softmax_space(3), softmax_space(2), ((0, 1), (3,)), "3 channels"),
        (softmax_space(3), region_space(1), ((),), "no source class"),
        (softmax_space(3), region_space(1), ((0, 1),), "background"),
        (region_space(3), region_space(1), ((0, 1),), "exactly one source region"),
    ],
)
def test_groups_that_fit_no_two_spaces_are_refused(
    source: LabelSpace, target: LabelSpace, groups: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(LabelSpaceError, match=message):
        LabelMap(source, target, groups)


@settings(deadline=None)
@given(partitions())
def test_lookup_table_takes_every_label_value_to_its_class(partition: tuple[int, tuple[tuple[int, ...], ...]]) -> None:
    num_source, groups = partition
    source = softmax_space(num_source, ignore=num_source)
    target = softmax_space(len(groups), "target", ignore=len(groups))
    label_map = LabelMap(source, target, groups)
    table = label_map.lookup_table()
    assert table.dtype == torch.int64
    assert len(table) == num_source + 1
    assert table[num_source] == len(groups)
    # the class of a one-hot prediction is the class that the table gives to its label
    certain = torch.eye(num_source)[:, :, None] * 30
    assert label_map(certain).argmax(1)[:, 0].tolist() == table[:-1].tolist()


def test_lookup_table_needs_labels_and_a_place_for_the_ignore_label() -> None:
    with pytest.raises(LabelSpaceError, match="regions"):
        LabelMap(softmax_space(3), region_space(1), ((1, 2),)).lookup_table()
    with pytest.raises(LabelSpaceError, match="ignore"):
        LabelMap(softmax_space(2, ignore=2), softmax_space(2), ((0,), (1,))).lookup_table()


def test_label_maps_go_to_worker_processes() -> None:
    label_map = LabelMap(softmax_space(3), softmax_space(2), ((0, 1), (2,)))
    logits = torch.randn(1, 3, 4)
    assert torch.equal(pickle.loads(pickle.dumps(label_map))(logits), label_map(logits))
