"""Batches with boxes and class labels against nnU-Net's own loader, on preprocessed cases on disk."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
    NonDetMultiThreadedAugmenter,
    pin_memory_of_all_eligible_items_in_dict,
)
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_kd.data.instances import InstanceMap
from nnunet_kd.data.loader import JointLoader
from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.data.task_loader import TaskDataset, TaskLoader
from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget, Tasks

LABELS = {"background": 0, "lesion": 1, "organ": 2}
GRADE = ClassificationTarget("grade", "classification.csv", ("grade",), ("II", "III"), multilabel=False)
DETECTION = DetectionTarget("boxes.json", ("lesion", "cyst"))
ALL_TASKS = Tasks(classification=(GRADE,), detection=DETECTION)
NO_MASKS = Tasks(segmentation=False, classification=(GRADE,), detection=DETECTION)
PATCH = {2: (24, 20), 3: (12, 16, 14)}
SHAPE = {2: (1, 44, 38), 3: (18, 26, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Preprocessed cases a to d of each dimension, resampled by 2 along the last axis and cropped by 3 along it."""
    folders = {}
    for dimension, shape in SHAPE.items():
        folders[dimension] = tmp_path_factory.mktemp(f"preprocessed_{dimension}d")
        for number, case in enumerate("abcd"):
            random = np.random.default_rng(number)
            image = random.normal(size=(1, *shape)).astype(np.float32)
            segmentation = (random.random((1, *shape)) > 0.9).astype(np.int16) * 2
            segmentation[(0, *(slice(size // 3, size // 2 + 1) for size in shape))] = 1
            properties = {
                "bbox_used_for_cropping": [[0, shape[0]], [0, shape[1]], [3, 3 + shape[2] // 2]],
                "class_locations": {label: np.argwhere(segmentation == label) for label in (1, 2)},
            }
            nnUNetDatasetBlosc2.save_case(
                image, segmentation, properties, str(folders[dimension] / case), (1, 8, 8, 8), (1, 4, 4, 4)
            )
    return lambda dimension: folders[dimension]


def case_boxes(dimension: int) -> dict[str, CaseBoxes]:
    """Of the stored image; case c has an empty list and case d no entry."""
    size = np.array(SHAPE[dimension][-dimension:]) / [*[1] * (dimension - 1), 2]
    boxes = {}
    for case, fractions in (("a", [(0.1, 0.6), (0.3, 0.7), (0.8, 0.9)]), ("b", [(0.3, 0.5)])):
        edges = np.array([[*(low * size), *(high * size)] for low, high in fractions])
        edges[:, [dimension - 1, 2 * dimension - 1]] += 3
        boxes[case] = CaseBoxes(np.arange(len(edges)) % 2, edges)
    boxes["c"] = CaseBoxes(np.zeros(0, np.int64), np.zeros((0, 2 * dimension)))
    return boxes


def task_dataset(folder: Path, dimension: int, tasks: Tasks = ALL_TASKS, **kwargs: Any) -> TaskDataset:
    if not kwargs:
        labels = {case: np.array(row, np.float32) for case, row in (("a", [1, 0]), ("b", [0, 1]), ("c", [np.nan] * 2))}
        kwargs = {"boxes": case_boxes(dimension), "class_labels": {"grade": labels}}
    return TaskDataset(nnUNetDatasetBlosc2(str(folder)), tasks, LABELS, (0, 1, 2), **kwargs)


def training_transforms(dimension: int) -> Any:
    """All of nnU-Net's, with its choice of the faster blur switched off: that depends on the clock."""
    transforms = nnUNetTrainer.get_training_transforms(
        PATCH[dimension], (-np.pi, np.pi), None, tuple(range(dimension)), False, use_mask_for_norm=[True]
    )
    for step in transforms.transforms:
        if isinstance(step, RandomTransform):
            step.apply_probability = 0.5
            if isinstance(step.transform, GaussianBlurTransform):
                step.transform.benchmark = False
    return transforms


def arguments(dataset: Any, dimension: int, oversample: float = 0.5, batch_size: int = 3) -> dict[str, Any]:
    return {
        "data": dataset,
        "batch_size": batch_size,
        "patch_size": tuple(size + 6 for size in PATCH[dimension]),
        "final_patch_size": PATCH[dimension],
        "label_manager": LabelManager(LABELS, None),
        "oversample_foreground_percent": oversample,
        "transforms": training_transforms(dimension),
    }


def batches(loader: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws from the global state)
    torch.manual_seed(seed)
    return [next(loader) for _ in range(count)]


class WithSegmentation:
    """The cases of a TaskDataset with another segmentation, for the stock loader."""

    def __init__(self, dataset: TaskDataset, replace: Callable[[InstanceMap], Any]) -> None:
        self.dataset = dataset
        self.identifiers = dataset.identifiers
        self.replace = replace

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        image, segmentation, previous, properties = self.dataset.load_case(identifier)
        return image, self.replace(segmentation), previous, properties


def assert_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second) or isinstance(first, list)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        np.testing.assert_array_equal(first, second)


# --- equal to nnU-Net -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dimension", [2, 3])
def test_a_segmentation_dataset_gives_the_stock_batch(folder: Callable[[int], Path], dimension: int) -> None:
    stock = nnUNetDataLoader(**arguments(nnUNetDatasetBlosc2(str(folder(dimension))), dimension))
    dataset = task_dataset(folder(dimension), dimension, Tasks(), boxes=None)
    assert_equal(batches(TaskLoader(**arguments(dataset, dimension)), 4), batches(stock, 4))


@pytest.mark.parametrize("dimension", [2, 3])
def test_image_and_segmentation_are_those_of_the_stock_loader(folder: Callable[[int], Path], dimension: int) -> None:
    dataset = task_dataset(folder(dimension), dimension)
    stock = nnUNetDataLoader(**arguments(WithSegmentation(dataset, lambda map_: map_.segmentation), dimension))
    for own, plain in zip(batches(TaskLoader(**arguments(dataset, dimension)), 6), batches(stock, 6), strict=True):
        assert set(own) == {"data", "target", "keys", "boxes", "box_labels", "class_labels"}
        assert_equal({key: own[key] for key in plain}, plain)


@pytest.mark.parametrize("dimension", [2, 3])
def test_boxes_are_those_of_each_instance_alone_in_the_stock_loader(
    folder: Callable[[int], Path], dimension: int
) -> None:
    dataset = task_dataset(folder(dimension), dimension)

    def alone(index: int) -> Callable[[InstanceMap], np.ndarray]:
        def draw(instances: InstanceMap) -> np.ndarray:
            segmentation = np.zeros((1, *instances.shape[1:]), dtype=np.int16)
            if index < len(instances):
                region = zip(instances.first[index], instances.end[index], strict=True)
                segmentation[(0, *(slice(*edges) for edges in region))] = instances.mask(index)
            return segmentation

        return draw

    own = batches(TaskLoader(**arguments(dataset, dimension), minimum_visible=0), 8)
    expected: list[list[tuple[list[int], int]]] = [[] for _ in range(8 * 3)]
    for index in range(3):  # no case has more
        stock = nnUNetDataLoader(**arguments(WithSegmentation(dataset, alone(index)), dimension))
        for number, batch in enumerate(batches(stock, 8)):
            for row, mask in enumerate(batch["target"][:, 0].numpy() == 1):
                if mask.any():
                    where = np.argwhere(mask)
                    box = [*where.min(axis=0).tolist(), *(where.max(axis=0) + 1).tolist()]
                    expected[number * 3 + row].append((box, index % 2))
    rows = [row for batch in own for row in zip(batch["boxes"], batch["box_labels"], strict=True)]
    got = [list(zip(boxes.tolist(), labels.tolist(), strict=True)) for boxes, labels in rows]
    assert got == expected
    assert max(len(row) for row in got) >= 2
    assert [] in got
    assert all(boxes.shape == (len(labels), 2 * dimension) for boxes, labels in rows)


def test_boxes_of_the_stored_image_arrive_in_the_patch(folder: Callable[[int], Path]) -> None:
    """By hand: a patch as large as the image, so only nnU-Net's centring padding moves the box."""
    boxes = {"a": CaseBoxes(np.array([1]), np.array([[4.0, 10.0, 20.0, 15.0]]))}
    dataset = task_dataset(folder(2), 2, boxes=boxes)
    values = arguments(dataset, 2, oversample=0.0, batch_size=1) | {
        "patch_size": (48, 40),
        "final_patch_size": (48, 40),
    }
    values["transforms"] = nnUNetTrainer.get_validation_transforms(None)
    batch = next(sample for sample in batches(TaskLoader(**values), 20) if sample["keys"][0] == "a")
    # x: minus the 3 cropped columns, times 2; then 48 - 44 and 40 - 38 rows and columns of padding, half before
    assert batch["boxes"][0].tolist() == [[4 + 2, 14 + 1, 20 + 2, 24 + 1]]
    assert batch["box_labels"][0].tolist() == [1]


# --- what a batch carries ---------------------------------------------------------------------------------------------
def test_class_labels_are_rows_of_the_cases_and_nan_where_unknown(folder: Callable[[int], Path]) -> None:
    known = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    for batch in batches(TaskLoader(**arguments(task_dataset(folder(2), 2), 2)), 5):
        labels = batch["class_labels"]["grade"]
        assert labels.dtype == torch.float32
        expected = torch.tensor([known.get(case, [float("nan")] * 2) for case in batch["keys"]])
        torch.testing.assert_close(labels, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("kwargs", "keys"),
    [
        ({"boxes": {}}, {"boxes", "box_labels"}),
        ({"class_labels": {"grade": {}}}, {"class_labels"}),
        ({"boxes": None}, set()),
    ],
)
def test_a_batch_carries_only_what_there_is(
    folder: Callable[[int], Path], kwargs: dict[str, Any], keys: set[str]
) -> None:
    (batch,) = batches(TaskLoader(**arguments(task_dataset(folder(2), 2, **kwargs), 2)), 1)
    assert set(batch) == {"data", "target", "keys"} | keys
    if "boxes" in keys:
        assert [boxes.shape for boxes in batch["boxes"]] == [(0, 4)] * 3
    if "class_labels" in keys:
        assert batch["class_labels"]["grade"].shape == (3, 2)


# --- where crops are --------------------------------------------------------------------------------------------------
BOTH_BOXED = Tasks(detection=DetectionTarget("boxes.json", ("lesion", "organ")))


@pytest.mark.parametrize("tasks", [NO_MASKS, BOTH_BOXED])
@pytest.mark.parametrize("dimension", [2, 3])
def test_crops_with_foreground_have_a_box(folder: Callable[[int], Path], dimension: int, tasks: Tasks) -> None:
    """Also a small box in a large case, which random crops miss."""
    boxes = {"a": case_boxes(dimension)["b"]}
    dataset = task_dataset(folder(dimension), dimension, tasks, boxes=boxes)
    dataset.dataset.identifiers = ["a"]
    values = arguments(dataset, dimension, oversample=1.0)
    values["patch_size"] = values["final_patch_size"] = (8,) * dimension
    values["transforms"] = nnUNetTrainer.get_validation_transforms(None)
    for batch in batches(TaskLoader(**values, minimum_visible=0), 10):
        assert all(len(row) == 1 for row in batch["boxes"])
    values["oversample_foreground_percent"] = 0.0
    random = batches(TaskLoader(**values, minimum_visible=0), 10)
    assert not all(len(row) == 1 for batch in random for row in batch["boxes"])


def test_places_are_in_the_boxes_and_equally_many_per_box(folder: Callable[[int], Path]) -> None:
    dataset = task_dataset(folder(3), 3, NO_MASKS)
    _, instances, _, properties = dataset.load_case("a")
    locations = properties["class_locations"]
    assert list(locations) == ["boxes of class 0", "boxes of class 1"]
    for label, places in enumerate(locations.values()):
        owners = np.flatnonzero(instances.labels == label)
        inside = ((places[:, None, 1:] >= instances.first[owners]) & (places[:, None, 1:] < instances.end[owners])).all(
            -1
        )
        assert inside.any(axis=1).all()
        assert (inside.sum(axis=0) >= 100).all()
        assert len(places) == 100 * len(owners)
        assert (places[:, 0] == 0).all()
    assert_equal(dataset.load_case("a")[3]["class_locations"], locations)


def test_without_a_box_the_stock_places_are_used_and_none_of_a_dummy(folder: Callable[[int], Path]) -> None:
    stock = nnUNetDatasetBlosc2(str(folder(3))).load_case("d")[3]["class_locations"]
    assert_equal(task_dataset(folder(3), 3).load_case("d")[3]["class_locations"], stock)
    assert task_dataset(folder(3), 3, NO_MASKS).load_case("d")[3]["class_locations"] == {}


def test_labels_that_are_not_boxed_keep_their_places(folder: Callable[[int], Path]) -> None:
    stock = nnUNetDatasetBlosc2(str(folder(3))).load_case("a")[3]["class_locations"]
    locations = task_dataset(folder(3), 3).load_case("a")[3]["class_locations"]
    assert list(locations) == [2, "boxes of class 0", "boxes of class 1"]  # label 1, the lesion, is boxed
    assert_equal(locations[2], stock[2])


def test_nested_regions_that_are_not_boxed_keep_their_places(folder: Callable[[int], Path]) -> None:
    regions = {"background": 0, "whole": (1, 2), "core": (2,)}
    tasks = Tasks(detection=DetectionTarget("boxes.json", ("whole", "cyst")))
    dataset = TaskDataset(nnUNetDatasetBlosc2(str(folder(3))), tasks, regions, (0, 1, 2), boxes=case_boxes(3))
    load = dataset.dataset.load_case

    def with_regions(case: str) -> tuple[Any, ...]:
        *arrays, properties = load(case)
        places = {(1, 2): np.zeros((1, 4), int), (2,): np.ones((1, 4), int)}
        return *arrays, {**properties, "class_locations": places}

    dataset.dataset.load_case = with_regions
    locations = dataset.load_case("a")[3]["class_locations"]
    assert list(locations) == [(2,), "boxes of class 0", "boxes of class 1"]


def test_an_ignore_label_keeps_its_places(folder: Callable[[int], Path]) -> None:
    dataset = task_dataset(folder(3), 3)
    key = (-1, 0, 1, 2)
    load = dataset.dataset.load_case

    def with_ignore(case: str) -> tuple[Any, ...]:
        *arrays, properties = load(case)
        return *arrays, {**properties, "class_locations": properties["class_locations"] | {key: np.zeros((1, 4), int)}}

    dataset.dataset.load_case = with_ignore
    assert list(dataset.load_case("a")[3]["class_locations"]) == [2, key, "boxes of class 0", "boxes of class 1"]
    values = arguments(dataset, 3) | {"label_manager": LabelManager({**LABELS, "ignore": 3}, None)}
    assert len(batches(TaskLoader(**values), 3)) == 3


# --- construction -----------------------------------------------------------------------------------------------------
def test_the_mask_of_the_class_is_the_instance_only_where_masks_are_real(folder: Callable[[int], Path]) -> None:
    real = task_dataset(folder(3), 3).load_case("a")[1]
    assert real.mask(0).sum() == (np.asarray(real.segmentation[:]) == 1).sum() < real.mask(0).size  # class lesion
    assert real.mask(1).all()  # there is no label cyst
    dummy = task_dataset(folder(3), 3, Tasks(segmentation=False, detection=DETECTION)).load_case("a")[1]
    assert dummy.mask(0).all()


def test_boxes_of_another_dimension_are_refused(folder: Callable[[int], Path]) -> None:
    dataset = task_dataset(folder(3), 3)
    with pytest.raises(NotImplementedError, match=r"boxes of .* are 3D and its patches are 2D"):
        TaskLoader(**arguments(dataset, 2))
    stock = nnUNetDataLoader(**arguments(dataset, 2))
    with pytest.raises(NotImplementedError, match="3d_fullres"):
        TaskLoader.from_stock(stock)


def test_from_a_stock_loader(folder: Callable[[int], Path]) -> None:
    dataset = task_dataset(folder(3), 3)
    stock = nnUNetDataLoader(**arguments(dataset, 3))
    state = dict(vars(stock))
    assert_equal(batches(TaskLoader.from_stock(stock), 3), batches(TaskLoader(**arguments(dataset, 3)), 3))
    assert vars(stock) == state
    only_b = TaskLoader.from_stock(stock, np.array([0.0, 1.0, 0.0, 0.0]))
    assert {case for batch in batches(only_b, 3) for case in batch["keys"]} == {"b"}


# --- other processes --------------------------------------------------------------------------------------------------
def test_a_loader_goes_on_after_pickling_and_is_deterministic(folder: Callable[[int], Path]) -> None:
    loader = TaskLoader(**arguments(task_dataset(folder(3), 3), 3))
    first = batches(loader, 2, seed=5)
    again = pickle.loads(pickle.dumps(loader))  # as spawn sends it, also in the middle of training
    assert_equal(batches(again, 2, seed=5), first)
    assert_equal(batches(loader, 2, seed=5), first)


def test_a_batch_in_a_queue_costs_no_file_per_box_and_can_be_pinned(folder: Callable[[int], Path]) -> None:
    (batch,) = batches(TaskLoader(**arguments(task_dataset(folder(3), 3), 3)), 1)
    boxes = {key: batch[key] for key in ("boxes", "box_labels")}
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sent = bytes(ForkingPickler.dumps(boxes))
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
    received = pickle.loads(sent)
    assert type(received["boxes"]) is list
    assert_equal(received, {key: list(value) for key, value in boxes.items()})
    if torch.cuda.is_available():
        pinned = pin_memory_of_all_eligible_items_in_dict(received)
        assert all(tensor.is_pinned() for tensor in pinned["boxes"] if tensor.numel())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_all_keys_survive_the_augmenter(
    folder: Callable[[int], Path], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context(start)
    module = "batchgenerators.dataloading.nondet_multi_threaded_augmenter"
    for name in ("Process", "Queue", "Event"):  # the augmenter has no argument for the start method
        monkeypatch.setattr(f"{module}.{name}", getattr(context, name))
    detection = TaskLoader(**arguments(task_dataset(folder(3), 3), 3))
    plain = TaskLoader(**arguments(task_dataset(folder(2), 2, Tasks(), boxes=None), 2))
    joint = JointLoader({"detection": detection, "plain": plain}, None)
    augmenter = NonDetMultiThreadedAugmenter(joint, None, 1, 2, seeds=[7], pin_memory=True, wait_time=0.01)
    try:
        received = [next(augmenter) for _ in range(4)]
    finally:
        augmenter._finish()
    expected = batches(joint, 4, seed=7)
    assert [batch["member"] for batch in received] == ["detection", "plain"] * 2
    assert_equal(received, expected)
