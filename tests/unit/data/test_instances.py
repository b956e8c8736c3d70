"""Boxes against transforming each instance alone, as a segmentation of its own, under the same random state."""

from __future__ import annotations

from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.data.instances import InstanceMap, with_boxes

FILLED: tuple[tuple[int, ...], ...] = ((), ())


def random_boxes(random: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Some reach over the border, some overlap."""
    first = random.uniform(-2, np.array(shape) - 1, (count, len(shape)))
    return np.concatenate([first, first + random.uniform(1, np.array(shape) / 2 + 1, (count, len(shape)))], axis=1)


def drawn(instances: InstanceMap, index: int) -> np.ndarray:
    """One instance in the whole case, [Z, Y, X] bool."""
    full = np.zeros(instances.shape[1:], dtype=bool)
    region = zip(instances.first[index], instances.end[index], strict=True)
    full[tuple(slice(*edges) for edges in region)] = instances.mask(index)
    return full


# --- the map ----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(9, 12, 10), (1, 14, 11)]), st.integers(0, 7))
def test_a_crop_is_the_crop_of_all_channels_drawn_at_once(seed: int, shape: tuple[int, ...], count: int) -> None:
    random = np.random.default_rng(seed)
    segmentation = random.integers(-1, 3, (1, *shape)).astype(np.int8)
    boxes = random_boxes(random, shape if shape[0] > 1 else shape[1:], count)
    instances = InstanceMap(segmentation, boxes, np.zeros(count, np.int64), FILLED)
    full = np.zeros((instances.num_channels, *shape), dtype=np.int16)
    for index in range(len(instances)):
        channel = full[instances.channels[index]]
        assert not channel[drawn(instances, index)].any()  # overlapping instances are in different channels
        channel[drawn(instances, index)] = index + 1

    low = [int(random.integers(-4, size)) for size in shape]
    crop = [
        [start, start + int(random.integers(max(1, 1 - start), size + 6))]
        for start, size in zip(low, shape, strict=True)
    ]
    got = crop_and_pad_nd(instances, crop, -1, cast_cropped_to=np.int16)
    expected = crop_and_pad_nd(np.concatenate([segmentation.astype(np.int16), full]), crop, -1)
    np.testing.assert_array_equal(got, expected)


def test_neighbours_get_channels_of_their_own_and_distant_instances_share_one() -> None:
    boxes = np.array([[0, 0, 4, 4], [3, 3, 6, 6], [0, 4, 3, 7], [8, 0, 10, 3], [0, 8, 2, 9.0]])
    instances = InstanceMap(np.zeros((1, 1, 12, 12)), boxes, np.zeros(5, np.int64), FILLED)
    # 1 overlaps 0; 2 touches 0 and 1; 3 and 4 are apart from those before them by more than a voxel
    assert instances.channels.tolist() == [0, 1, 2, 0, 0]
    assert instances.shape == (1 + 3, 1, 12, 12)


def test_a_box_outside_the_array_is_left_out() -> None:
    boxes = np.array([[-5, -5, 0, 4], [2, 2, 4, 4], [12, 0, 14, 3.0]])
    instances = InstanceMap(np.zeros((1, 1, 12, 12)), boxes, np.array([0, 1, 0]), FILLED)
    assert instances.labels.tolist() == [1]
    assert instances.first.tolist() == [[0, 2, 2]]


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_instance_is_its_class_mask_where_there_is_one(on_disk: bool) -> None:
    segmentation = np.zeros((1, 10, 12, 12), dtype=np.int16)
    segmentation[0, 2:5, 3, 3:6] = 2
    segmentation[0, 4, 2:7, 4] = 3
    segmentation[0, 8, 8, 8] = 1
    stored = blosc2.asarray(segmentation, chunks=(1, 5, 6, 12)) if on_disk else segmentation
    boxes = np.array([[1, 2, 2, 6, 7, 7], [7, 7, 7, 10, 10, 10], [7, 7, 7, 10, 10, 10.0]])
    # class 0 is the region of labels 2 and 3, class 1 has no mask
    instances = InstanceMap(stored, boxes, np.array([0, 0, 1]), ((2, 3), ()))
    np.testing.assert_array_equal(drawn(instances, 0), np.isin(segmentation[0], (2, 3)))
    assert drawn(instances, 1).sum() == drawn(instances, 2).sum() == 27  # the mask of class 0 is not in this box
    crop = instances[:, 4:9, 0:12, 3:9]
    np.testing.assert_array_equal(crop[0], segmentation[0, 4:9, :, 3:9])
    np.testing.assert_array_equal(crop[1] == 1, np.isin(segmentation[0, 4:9, :, 3:9], (2, 3)))


def test_only_a_crop_of_all_channels_can_be_read() -> None:
    instances = InstanceMap(np.zeros((1, 4, 4, 4)), np.zeros((0, 6)), np.zeros(0, np.int64), FILLED)
    for wrong in (0, slice(None), (slice(0, 1), *[slice(None)] * 3), (slice(None), slice(0, 4, 2), *[slice(None)] * 2)):
        with pytest.raises(TypeError, match="read by"):
            instances[wrong]


# --- boxes after transforms -------------------------------------------------------------------------------------------
def spatial_transforms(patch: tuple[int, ...], kind: str) -> ComposeTransforms:
    """nnU-Net's spatial transforms, with rotation and scaling always on."""
    is_dummy_2d = kind == "dummy 2D"
    spatial = SpatialTransform(
        patch[1:] if is_dummy_2d else patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=float(kind != "none"),
        rotation=(-np.pi, np.pi),
        p_scaling=float(kind != "none"),
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    steps = [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if is_dummy_2d else [spatial]
    mirror = MirrorTransform(tuple(range(len(patch))))
    return ComposeTransforms([*steps, mirror, RemoveLabelTansform(-1, 0)])


def transformed(transforms: ComposeTransforms, segmentation: torch.Tensor, seed: int, **extra: Any) -> dict[str, Any]:
    np.random.seed(seed)  # noqa: NPY002 (the transforms draw from the global state)
    torch.manual_seed(seed)
    result: dict[str, Any] = transforms(
        image=torch.zeros(segmentation.shape)[:1], segmentation=segmentation.clone(), **extra
    )
    return result


def bounding_box(mask: np.ndarray) -> list[float]:
    where = np.argwhere(mask)
    return [*where.min(axis=0).tolist(), *(where.max(axis=0) + 1).tolist()]


def crop_of(array: Any, patch: tuple[int, ...], low: list[int]) -> torch.Tensor:
    """What nnU-Net's loader reads: a crop, padded with -1, without the slice axis in 2D."""
    is_2d = len(patch) == 2
    size = (1, *patch) if is_2d else patch
    crop = [[start, start + extent] for start, extent in zip([0, *low] if is_2d else low, size, strict=True)]
    read = torch.from_numpy(crop_and_pad_nd(array, crop, -1, cast_cropped_to=np.int16))
    return read[:, 0] if is_2d else read


@pytest.mark.parametrize(
    ("shape", "initial", "patch", "kind"),
    [
        ((1, 40, 36), (34, 34), (24, 20), "none"),
        ((1, 40, 36), (34, 34), (24, 20), "full"),
        ((1, 15, 12), (34, 34), (24, 20), "full"),  # much padding
        ((18, 26, 22), (22, 22, 22), (14, 16, 12), "none"),
        ((18, 26, 22), (22, 22, 22), (14, 16, 12), "full"),
        ((9, 26, 22), (10, 22, 22), (10, 16, 12), "dummy 2D"),
    ],
)
def test_each_box_is_that_of_the_instance_transformed_alone(
    shape: tuple[int, ...], initial: tuple[int, ...], patch: tuple[int, ...], kind: str
) -> None:
    random = np.random.default_rng(3)
    stock = spatial_transforms(patch, kind)
    ours = with_boxes(stock, minimum_visible=0)
    total = invisible = shared = 0
    for seed in range(25):
        count = int(random.integers(0, 6))
        segmentation = random.integers(0, 3, (1, *shape)).astype(np.int16)
        boxes = random_boxes(random, shape[-len(patch) :], count)
        classes = random.integers(0, 2, count)
        instances = InstanceMap(segmentation, boxes, classes, ((), (1, 2)))
        low = [
            int(random.integers(-3, max(0, size - extent) + 4))
            for size, extent in zip(shape[-len(patch) :], initial, strict=True)
        ]
        sample = transformed(ours, crop_of(instances, initial, low), seed, instances=instances)

        expected_boxes, expected_labels = [], []
        for index in range(len(instances)):
            alone = crop_of(drawn(instances, index)[None].astype(np.int16), initial, low)
            mask = transformed(stock, alone, seed)["segmentation"][0].numpy() == 1
            if mask.any():
                expected_boxes.append(bounding_box(mask))
                expected_labels.append(int(instances.labels[index]))
            else:
                invisible += 1
        assert sample["boxes"].tolist() == expected_boxes
        assert sample["box_labels"].tolist() == expected_labels
        assert sample["boxes"].dtype == torch.float32
        assert sample["boxes"].shape == (len(expected_boxes), 2 * len(patch))
        assert sample["box_labels"].dtype == torch.int64
        # and the segmentation is the one that nnU-Net gives without us
        own = transformed(stock, crop_of(segmentation, initial, low), seed)
        assert torch.equal(sample["segmentation"], own["segmentation"])
        assert set(sample) == {*own, "boxes", "box_labels"}
        total += len(expected_boxes)
        shared += len(instances) - instances.num_channels
    assert total > 20
    assert invisible > 0
    assert shared > 0


def test_instances_one_voxel_apart_are_not_blended() -> None:
    """Numbers 1 and 3 with a voxel between them: no voxel becomes 2, and none goes to the wrong one."""
    boxes = np.array([[8, 8, 16, 16], [0, 0, 3, 3], [17, 8, 25, 16.0]])
    instances = InstanceMap(np.zeros((1, 1, 32, 32), np.int16), boxes, np.arange(3), ((), (), ()))
    assert instances.num_channels == 1
    ours = with_boxes(spatial_transforms((32, 32), "full"), 0.9)
    for seed in range(20):
        labels = transformed(ours, crop_of(instances, (32, 32), [0, 0]), seed, instances=instances)["box_labels"]
        assert {0, 2} <= set(labels.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("scaling", [0.7, 1.0, 1.4])
def test_the_visible_fraction_counts_voxels_at_the_transforms_scale(scaling: float) -> None:
    """A box of which 60% lie in the crop, and one that is whole, at each scale (larger is smaller)."""
    boxes = np.array([[0, 30, 30, 60], [50, 50, 92, 92.0]])  # the crop begins at y = 12
    instances = InstanceMap(np.zeros((1, 1, 128, 128), np.int16), boxes, np.array([0, 1]), FILLED)
    visible = {}
    for minimum in (0.55, 0.65, 0.95, 1.05):
        transforms = with_boxes(spatial_transforms((180, 180), "none"), minimum)  # a patch that holds all of the crop
        spatial = transforms.transforms[0].transform
        spatial.p_scaling, spatial.scaling = 1.0, (scaling, scaling)
        crop = crop_of(instances, (120, 120), [12, 4])
        visible[minimum] = transformed(transforms, crop, 0, instances=instances)["box_labels"].tolist()
    assert visible == {0.55: [0, 1], 0.65: [1], 0.95: [1], 1.05: []}


@pytest.mark.parametrize(("values", "fraction"), [((1,), 2 / 8), ((), 4 / 800)], ids=["mask", "filled"])
def test_the_visible_fraction_is_of_the_instance_not_of_its_box(values: tuple[int, ...], fraction: float) -> None:
    segmentation = np.zeros((1, 1, 40, 40), dtype=np.int16)
    segmentation[0, 0, 10:14, 10:12] = 1
    instances = InstanceMap(segmentation, np.array([[0, 10, 40, 30.0]]), np.array([0]), (values,))
    crop = crop_of(instances, (4, 11), [8, 0])  # 2 x 1 voxels of the mask, 4 x 1 of the box
    for minimum, num_kept in ((fraction, 1), (fraction + 1e-3, 0)):
        ours = with_boxes(ComposeTransforms([RemoveLabelTansform(-1, 0)]), minimum)
        assert len(transformed(ours, crop, 0, instances=instances)["boxes"]) == num_kept


def test_the_previous_stage_of_a_cascade_stays() -> None:
    boxes = np.array([[1, 1, 4, 4], [2, 2, 6, 6.0]])
    segmentation = np.arange(64, dtype=np.int16).reshape(1, 1, 8, 8)
    instances = InstanceMap(segmentation, boxes, np.array([1, 0]), FILLED)
    previous = torch.randint(0, 3, (1, 8, 8), dtype=torch.int16)
    crop = torch.cat((crop_of(instances, (8, 8), [0, 0]), previous))  # as nnU-Net's loader appends it
    ours = with_boxes(ComposeTransforms([RemoveLabelTansform(-1, 0)]))
    sample = transformed(ours, crop, 0, instances=instances)
    assert torch.equal(sample["segmentation"], torch.cat((torch.from_numpy(segmentation[:, 0]), previous)))
    assert sample["boxes"].tolist() == boxes.tolist()
    assert sample["box_labels"].tolist() == [1, 0]


def test_transforms_without_the_place_for_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="RemoveLabelTansform"):
        with_boxes(ComposeTransforms([MirrorTransform((0,))]))
