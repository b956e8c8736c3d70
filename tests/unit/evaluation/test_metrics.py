"""Segmentation metrics against numbers worked out on paper and against brute force over all pairs of voxels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nnunet_kd.evaluation.metrics import (
    class_masks,
    dice,
    evaluate_case,
    hd95,
    nsd,
    surface_distances,
    volume_error,
)


def two_cubes() -> tuple[np.ndarray, np.ndarray]:
    """Two 4 x 4 x 4 cubes, the second moved by 2 voxels along the last axis."""
    reference, prediction = np.zeros((8, 8, 12), int), np.zeros((8, 8, 12), int)
    reference[2:6, 2:6, 2:6] = 1
    prediction[2:6, 2:6, 4:8] = 1
    return reference, prediction


def brute_force_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of the mask that miss a face neighbour, looking at every neighbour of every voxel."""
    found = []
    for voxel in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = list(voxel)
            neighbour[axis] += step
            outside = not 0 <= neighbour[axis] < mask.shape[axis]
            if outside or not mask[tuple(neighbour)]:
                found.append(voxel)
                break
    return found


def brute_force_distances(source: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    targets = np.array(brute_force_surface(target)) * spacing
    return [
        min(math.dist(point, other) for other in targets) for point in np.array(brute_force_surface(source)) * spacing
    ]


class TestDice:
    def test_overlapping_cubes(self) -> None:
        reference, prediction = two_cubes()
        # half of each cube is shared: 2 * 32 / (64 + 64)
        assert dice(reference, prediction, [1]) == pytest.approx([0.5])

    def test_absent_in_both_is_nan_and_in_one_is_zero(self) -> None:
        reference = np.array([[0, 1], [0, 1]])
        prediction = np.array([[0, 2], [0, 1]])
        values = dice(reference, prediction, [1, 2, 3])
        assert values[0] == pytest.approx(2 / 3)
        assert values[1] == 0
        assert np.isnan(values[2])

    def test_region_is_the_union_of_its_labels(self) -> None:
        reference = np.array([1, 1, 2, 2, 0, 0])
        prediction = np.array([2, 1, 1, 0, 0, 0])
        # region: reference 4 voxels, prediction 3, shared 3; label 1 alone: 2 and 2, shared 1
        assert dice(reference, prediction, [(1, 2), 1]) == pytest.approx([6 / 7, 0.5])

    def test_ignored_voxels_do_not_count(self) -> None:
        reference = np.array([1, 1, 9, 9, 0])
        prediction = np.array([1, 0, 1, 1, 0])
        assert dice(reference, prediction, [1], ignore_label=9) == pytest.approx([2 / 3])
        assert dice(reference, prediction, [1]) == pytest.approx([2 / 5])

    def test_is_symmetric(self) -> None:
        random = np.random.default_rng(0)
        reference, prediction = random.integers(0, 3, (2, 5, 6, 7))
        assert dice(reference, prediction, [1, 2]) == pytest.approx(dice(prediction, reference, [1, 2]))

    def test_different_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 4\)"):
            dice(np.zeros((3, 3)), np.zeros((3, 4)), [1])


class TestSurfaceDistance:
    def test_two_points_two_voxels_apart_with_two_millimetres(self) -> None:
        reference, prediction = np.zeros((5, 5, 5), int), np.zeros((5, 5, 5), int)
        reference[2, 2, 1] = prediction[2, 2, 3] = 1
        spacing = (1.0, 1.0, 2.0)
        assert hd95(reference, prediction, [1], spacing) == pytest.approx([4.0])
        assert nsd(reference, prediction, [1], spacing, 3.9) == pytest.approx([0.0])
        assert nsd(reference, prediction, [1], spacing, 4.0) == pytest.approx([1.0])

    def test_moved_cube(self) -> None:
        reference, prediction = two_cubes()
        spacing = (1.0, 1.0, 2.0)
        # The surface of a cube of 4 is 64 - 8 = 56 voxels. The reference covers x = 2..5, the prediction x = 4..7.
        # Reference at x = 2: the prediction's nearest plane x = 4 is solid, so 4 mm (16 voxels); at x = 3: the 12 rim
        # voxels are 2 mm off; at x = 4: rim 0 (12); at x = 5: full plane of 16, of which the rim (12) meets the
        # prediction's rim (0 mm) and the inner 4 voxels are 1 mm from it or 2 mm from plane x = 4.
        expected = sorted([4.0] * 16 + [2.0] * 12 + [0.0] * 12 + [0.0] * 12 + [1.0] * 4)
        forward, backward = surface_distances(reference == 1, prediction == 1, spacing)
        assert sorted(forward) == pytest.approx(expected)
        assert sorted(backward) == pytest.approx(expected)
        assert hd95(reference, prediction, [1], spacing) == pytest.approx([4.0])
        assert nsd(reference, prediction, [1], spacing, 1.0) == pytest.approx([28 / 56])
        assert nsd(reference, prediction, [1], spacing, 2.0) == pytest.approx([40 / 56])

    def test_identical_masks(self) -> None:
        reference, _ = two_cubes()
        assert hd95(reference, reference, [1], (3.0, 1.0, 1.0)) == pytest.approx([0.0])
        assert nsd(reference, reference, [1], (3.0, 1.0, 1.0), 0.0) == pytest.approx([1.0])

    @pytest.mark.parametrize("shape", [(9, 11), (5, 6, 7)])
    def test_equals_brute_force_over_all_pairs(self, shape: tuple[int, ...]) -> None:
        random = np.random.default_rng(7)
        spacing = (2.5, 1.2, 0.7)[: len(shape)]
        for _ in range(5):
            reference, prediction = random.random((2, *shape)) < 0.3
            forward, backward = surface_distances(reference, prediction, spacing)
            expected_forward = brute_force_distances(reference, prediction, spacing)
            expected_backward = brute_force_distances(prediction, reference, spacing)
            assert sorted(forward) == pytest.approx(sorted(expected_forward))
            assert sorted(backward) == pytest.approx(sorted(expected_backward))
            expected = max(np.percentile(expected_forward, 95), np.percentile(expected_backward, 95))
            assert hd95(reference, prediction, [1], spacing) == pytest.approx([expected])
            within = [distance <= 1.3 for distance in expected_forward + expected_backward]
            assert nsd(reference, prediction, [1], spacing, 1.3) == pytest.approx([np.mean(within)])

    def test_worst_direction_decides(self) -> None:
        reference, prediction = np.zeros((1, 40), int), np.zeros((1, 40), int)
        reference[0, :20] = 1
        prediction[0, :20] = prediction[0, 39] = 1  # one voxel far away: invisible from the reference
        forward, backward = surface_distances(reference == 1, prediction == 1, (1.0, 1.0))
        assert max(forward) == 0
        assert max(backward) == 20
        # backward: the surface of a row is its two ends and the single voxel: 0, 0, 20
        assert hd95(reference, prediction, [1], (1.0, 1.0)) == pytest.approx([np.percentile([0, 0, 20], 95)])

    def test_single_slice_is_measured_in_the_plane(self) -> None:
        random = np.random.default_rng(3)
        reference, prediction = random.integers(0, 2, (2, 9, 9))
        flat = hd95(reference, prediction, [1], (1.5, 0.5))
        assert hd95(reference[None], prediction[None], [1], (999.0, 1.5, 0.5)) == pytest.approx(flat)
        assert nsd(reference[None], prediction[None], [1], (999.0, 1.5, 0.5), 0.5) == pytest.approx(
            nsd(reference, prediction, [1], (1.5, 0.5), 0.5)
        )

    def test_single_voxel_image(self) -> None:
        assert hd95(np.ones((1, 1, 1), int), np.ones((1, 1, 1), int), [1], (1.0, 1.0, 1.0)) == pytest.approx([0.0])

    def test_empty_masks(self) -> None:
        empty, full = np.zeros((4, 5, 6), int), np.zeros((4, 5, 6), int)
        full[1, 1, 1] = 1
        spacing = (2.0, 1.0, 1.0)
        diagonal = math.sqrt(8**2 + 5**2 + 6**2)
        assert np.isnan(hd95(empty, empty, [1], spacing)).all()
        assert np.isnan(nsd(empty, empty, [1], spacing, 1.0)).all()
        for reference, prediction in ((empty, full), (full, empty)):
            assert hd95(reference, prediction, [1], spacing) == pytest.approx([diagonal])
            assert nsd(reference, prediction, [1], spacing, 1000.0) == pytest.approx([0.0])

    def test_spacing_and_tolerance_are_checked(self) -> None:
        mask = np.ones((3, 3), int)
        with pytest.raises(ValueError, match="2 positive numbers"):
            hd95(mask, mask, [1], (1.0, 1.0, 1.0))
        with pytest.raises(ValueError, match="positive numbers"):
            volume_error(mask, mask, [1], (1.0, 0.0))
        with pytest.raises(ValueError, match="tolerance_mm"):
            nsd(mask, mask, [1], (1.0, 1.0), -1.0)


class TestVolumeError:
    def test_millilitres_with_sign(self) -> None:
        reference, prediction = np.zeros((10, 10, 10), int), np.zeros((10, 10, 10), int)
        reference[:5] = 1  # 500 voxels of 8 mm^3 = 4 ml
        prediction[:4] = 1  # 400 voxels = 3.2 ml
        assert volume_error(reference, prediction, [1, 2], (2.0, 2.0, 2.0)) == pytest.approx([-0.8, 0.0])


class TestEvaluateCase:
    def test_agrees_with_the_single_metrics(self) -> None:
        random = np.random.default_rng(11)
        reference, prediction = random.integers(0, 4, (2, 6, 7, 8))
        labels, spacing = [1, (1, 2), 3, 8], (3.0, 1.0, 1.0)
        scores = evaluate_case(reference, prediction, labels, spacing, 1.0, ignore_label=2)
        for name, expected in {
            "dice": dice(reference, prediction, labels, 2),
            "hd95_mm": hd95(reference, prediction, labels, spacing, 2),
            "nsd": nsd(reference, prediction, labels, spacing, 1.0, 2),
            "volume_error_ml": volume_error(reference, prediction, labels, spacing, 2),
        }.items():
            assert [getattr(score, name) for score in scores] == pytest.approx(list(expected), nan_ok=True)

    def test_ignored_part_leaves_both_masks(self) -> None:
        reference = np.array([[1, 1, 9], [0, 0, 9]])
        prediction = np.array([[1, 1, 1], [0, 0, 1]])
        masks = class_masks(reference, prediction, 1, ignore_label=9)
        assert masks[0].tolist() == masks[1].tolist() == [[True, True, False], [False, False, False]]
        (score,) = evaluate_case(reference, prediction, [1], (1.0, 1.0), 0.0, ignore_label=9)
        assert (score.dice, score.hd95_mm, score.nsd, score.volume_error_ml) == (1.0, 0.0, 1.0, 0.0)
