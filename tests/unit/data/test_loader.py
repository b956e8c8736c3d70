"""Drawing members, padding samples, mapping labels."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

from nnunet_kd.data.loader import JointLoader, MapLabelsTransform, PadToMultipleTransform, member_probabilities


class FakeLoader:
    """Counts its batches, as a stock loader would give them."""

    def __init__(self, name: str, batch_size: int) -> None:
        self.name = name
        self.batch_size = batch_size
        self.drawn = 0

    def generate_train_batch(self) -> dict[str, object]:
        self.drawn += 1
        return {"data": torch.full((self.batch_size, 1, 2, 2), float(self.drawn)), "keys": [self.name]}


# --- probabilities ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("exponent", "expected"), [(0.5, [1 / 6, 2 / 6, 3 / 6]), (0.0, [1 / 3] * 3), (1.0, [1 / 14, 4 / 14, 9 / 14])]
)
def test_member_probabilities(exponent: float, expected: list[float]) -> None:
    probabilities = member_probabilities({"a": 1, "b": 4, "c": 9}, exponent)
    assert list(probabilities) == ["a", "b", "c"]
    assert list(probabilities.values()) == pytest.approx(expected)


def test_each_case_is_drawn_with_one_over_root_n() -> None:
    counts = {"a": 16, "b": 100}
    probabilities = member_probabilities(counts, 0.5)
    ratio = (probabilities["a"] / counts["a"]) / (probabilities["b"] / counts["b"])
    assert ratio == pytest.approx((100 / 16) ** 0.5)


# --- the joint loader -------------------------------------------------------------------------------------------------
def test_members_are_drawn_as_often_as_their_probability() -> None:
    loaders = {"a": FakeLoader("a", 2), "b": FakeLoader("b", 3), "c": FakeLoader("c", 1)}
    joint = JointLoader(loaders, {"c": 0.0, "a": 0.25, "b": 0.75})
    np.random.seed(0)  # noqa: NPY002
    names = [joint.generate_train_batch()["member"] for _ in range(2000)]
    assert names.count("c") == 0
    assert names.count("a") / 2000 == pytest.approx(0.25, abs=0.03)
    assert loaders["a"].drawn == names.count("a")


def test_a_batch_holds_one_member_and_its_name() -> None:
    loaders = {"a": FakeLoader("a", 2), "b": FakeLoader("b", 3)}
    joint = JointLoader(loaders, {"a": 0.5, "b": 0.5})
    for _ in range(20):
        batch = next(joint)
        assert batch["keys"] == [batch["member"]]
        assert len(batch["data"]) == loaders[batch["member"]].batch_size


def test_validation_visits_members_in_turn() -> None:
    joint = JointLoader({name: FakeLoader(name, 1) for name in "abc"}, None)
    assert [next(joint)["member"] for _ in range(7)] == list("abcabca")


def test_validation_workers_begin_with_different_members() -> None:
    first = []
    for thread in range(3):
        joint = JointLoader({name: FakeLoader(name, 1) for name in "abc"}, None)
        joint.set_thread_id(thread)
        first.append(next(joint)["member"])
    assert sorted(first) == list("abc")


# --- transforms -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "multiple"), [((5, 7), (4, 4)), ((3, 8, 9), (1, 4, 2)), ((4, 8), (4, 8))])
def test_padding_is_at_the_end_with_zero_and_minus_one(shape: tuple[int, ...], multiple: tuple[int, ...]) -> None:
    image, segmentation = torch.randn(2, *shape), torch.ones(1, *shape, dtype=torch.int16)
    sample = PadToMultipleTransform(multiple)(image=image, segmentation=segmentation)
    inside = tuple(slice(0, size) for size in shape)
    for key, original, value in (("image", image, 0), ("segmentation", segmentation, -1)):
        padded = sample[key]
        assert all(size % step == 0 for size, step in zip(padded.shape[1:], multiple, strict=True))
        assert all(padded.shape[i + 1] - size < multiple[i] for i, size in enumerate(shape))
        assert padded.dtype == original.dtype
        assert torch.equal(padded[(..., *inside)], original)
        outside = torch.ones(padded.shape, dtype=torch.bool)
        outside[(..., *inside)] = False
        assert (padded[outside] == value).all()


def test_labels_are_replaced_and_outside_stays() -> None:
    table = torch.tensor([0, 2, 1, 5])
    segmentation = torch.tensor([[[-1, 0, 1], [2, 3, -1]], [[1, 1, 1], [-1, 2, 3]]], dtype=torch.int16)
    second = segmentation[1].clone()
    sample = MapLabelsTransform(table)(image=torch.zeros(1, 2, 3), segmentation=segmentation)
    assert sample["segmentation"].dtype == torch.int16
    assert sample["segmentation"][0].tolist() == [[-1, 0, 2], [1, 5, -1]]
    assert torch.equal(sample["segmentation"][1], second)  # the previous stage of a cascade speaks the member's labels


# --- other processes --------------------------------------------------------------------------------------------------
def reload_pickle(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def reload_torch(value: object) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("reload", [reload_pickle, reload_torch])
@pytest.mark.parametrize(
    "transform", [PadToMultipleTransform((4, 4)), MapLabelsTransform(torch.tensor([0, 2, 1]))], ids=["pad", "map"]
)
def test_a_transform_survives_the_way_to_a_worker(transform: object, reload: object) -> None:
    image, segmentation = torch.randn(1, 5, 6), torch.randint(-1, 3, (1, 5, 6)).to(torch.int16)
    before, after = (
        own(image=image.clone(), segmentation=segmentation.clone()) for own in (transform, reload(transform))
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("reload", [reload_pickle, reload_torch])
def test_a_joint_loader_goes_on_in_a_worker_where_it_was(reload: object) -> None:
    joint = JointLoader({name: FakeLoader(name, 1) for name in "abc"}, None)
    next(joint)
    again = reload(joint)
    assert [next(again)["member"] for _ in range(3)] == [next(joint)["member"] for _ in range(3)] == list("bca")
