"""Progressive imbalance-aware CutMix: where every voxel comes from, and how often each class is drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_kd.settings import DinoMix
from nnunet_kd.training import cutmix
from nnunet_kd.training.cutmix import (
    COUNT_MOMENTUM,
    ClassFrequencies,
    Pair,
    class_members,
    class_probabilities,
    known_logits,
    mix,
)

COUNTS = torch.tensor([1000.0, 100.0, 10.0])


# --- the curriculum ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4, 0.79, 0.8, 1.0])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_probabilities_follow_the_closed_form(progress: float, power: float) -> None:
    weights = [math.log(1000 / count + 1) for count in (1000, 100, 10)]
    tail = [weight / sum(weights) for weight in weights]
    uniform = min(1, progress / 0.8) ** power
    expected = [(1 - uniform) * own + uniform / 3 for own in tail]
    found = class_probabilities(COUNTS, progress, DinoMix(curriculum_power=power))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(found.sum()) == pytest.approx(1)


def test_fixed_curricula_do_not_move() -> None:
    roots = np.sqrt([1, 10, 100])
    for progress in (0.0, 0.5, 1.0):
        tail = class_probabilities(COUNTS, progress, DinoMix(curriculum="tail", imbalance="sqrt"))
        assert tail.tolist() == pytest.approx(list(roots / roots.sum()), rel=1e-5)
        assert class_probabilities(COUNTS, progress, DinoMix(curriculum="uniform")).tolist() == pytest.approx(
            [1 / 3] * 3
        )


def test_a_class_that_was_never_seen_is_the_rarest_and_finite() -> None:
    found = class_probabilities(torch.tensor([1000.0, 10.0, 0.0]), 0.0, DinoMix())
    assert found.isfinite().all()
    assert found[2] > found[1] > found[0]
    assert class_probabilities(torch.zeros(3), 0.0, DinoMix()).isfinite().all()


def test_frequencies_are_a_mean_at_first_and_a_moving_one_then() -> None:
    frequencies = ClassFrequencies()
    random = np.random.default_rng(0)
    batches = [(random.integers(0, 50, (2, 3)), random.integers(0, 50, (1, 3))) for _ in range(150)]
    expected = np.zeros((2, 3))
    for number, (labeled, unlabeled) in enumerate(batches, start=1):
        frequencies.update(torch.from_numpy(labeled), torch.from_numpy(unlabeled))
        share = max(1 / number, 1 - COUNT_MOMENTUM)
        expected = (1 - share) * expected + share * np.stack([labeled.mean(0), unlabeled.mean(0)])
        if number in (1, 2, 150):
            np.testing.assert_allclose(frequencies.total, expected.sum(0), rtol=1e-4)
    restored = ClassFrequencies()
    restored.load_state(frequencies.state(), torch.device("cpu"))
    frequencies.update(*map(torch.from_numpy, batches[0]))
    restored.update(*map(torch.from_numpy, batches[0]))
    assert torch.equal(restored.total, frequencies.total)


# --- what is known of a voxel -----------------------------------------------------------------------------------------
def test_known_labels_are_certain_and_ignored_ones_are_not() -> None:
    target = torch.tensor([[0, 1], [2, 3]]).view(1, 1, 2, 2)  # 3 is to be ignored
    logits = known_logits(target, 3, regions=False, ignore=3)
    assert logits.softmax(1).max(1)[0].flatten().tolist() == pytest.approx([1, 1, 1, 1 / 3], abs=1e-6)
    assert logits.argmax(1).flatten()[:3].tolist() == [0, 1, 2]
    members = class_members(logits, 0.8, regions=False)
    assert members.int().flatten(2)[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_known_regions() -> None:
    target = torch.tensor([[[1, 1], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [0, 1]]])[None]  # the last one: ignored
    logits = known_logits(target, 2, regions=True, ignore=3)
    likely = logits.sigmoid()
    assert likely[0, 0].flatten().tolist() == pytest.approx([1, 1, 0, 0.5], abs=1e-6)
    assert likely[0, 1].flatten().tolist() == pytest.approx([0, 1, 0, 0.5], abs=1e-6)
    assert class_members(logits, 0.8, regions=True).flatten(2)[0].int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]


# --- provenance -------------------------------------------------------------------------------------------------------
class Patches:
    """Four patches, two of them labelled; every voxel's intensity tells its patch and place."""

    def __init__(self, shape: tuple[int, ...], num_labeled: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape, self.num_labeled = shape, num_labeled
        num_voxels = math.prod(shape)
        self.image = torch.arange(4.0 * num_voxels).view(4, 1, *shape)
        self.target = torch.zeros(4, 1, *shape, dtype=torch.long)
        for patch in range(4):
            self.target[patch].flatten()[patch * 7 : patch * 7 + 5] = 1 + patch % 3
        self.logits = known_logits(self.target, 4, regions=False, ignore=None)
        self.members = class_members(self.logits, 0.8, regions=False)

    def mix(
        self, count: int, probabilities: tuple[float, ...] = (0.2, 0.3, 0.5), sides: tuple[float, float] = (0.25, 0.5)
    ):
        return mix(
            self.image,
            self.logits,
            self.target,
            self.members,
            self.num_labeled,
            torch.tensor(probabilities),
            count,
            sides,
        )

    def origin(self, voxels: torch.Tensor) -> torch.Tensor:
        """The patch that intensities come from."""
        return voxels.long() // math.prod(self.shape)


@pytest.mark.parametrize("shape", [(17, 12), (9, 14, 11)])
def test_every_voxel_keeps_its_place_and_comes_from_one_of_two_patches(shape: tuple[int, ...]) -> None:
    patches = Patches(shape)
    mixed = patches.mix(200)
    seen = set()
    for image, logits, target, inside, _ in zip(*mixed, strict=True):
        places = image.long() % math.prod(shape)
        assert torch.equal(places.flatten(), torch.arange(math.prod(shape)))
        donors, recipients = (patches.origin(image[part]).unique() for part in (inside, ~inside))
        assert len(donors) == len(recipients) == 1
        donor, recipient = int(donors), int(recipients)
        seen.add((donor, recipient))
        for mixed_part, parts in ((logits, patches.logits), (target, patches.target)):
            assert torch.equal(mixed_part, torch.where(inside, parts[donor], parts[recipient]))
    labeled, unlabeled = (0, 1), (2, 3)
    expected = {(a, b) for a in labeled for b in unlabeled} | {(b, a) for a in labeled for b in unlabeled}
    assert seen == expected | {(0, 1), (1, 0)}  # never from an unlabelled to an unlabelled one, never to itself


@pytest.mark.parametrize("shape", [(20, 32), (12, 20, 16)])
def test_boxes_have_sides_within_the_range_and_hold_a_voxel_of_a_class(shape: tuple[int, ...]) -> None:
    patches = Patches(shape)
    mixed = patches.mix(300)
    sizes = []
    for inside, target in zip(mixed.inside[:, 0], mixed.target[:, 0], strict=True):
        places = inside.nonzero()
        size = (places.amax(0) - places.amin(0) + 1).tolist()
        assert int(inside.sum()) == math.prod(size)  # a full box, also at the border
        sizes.append(size)
        assert (target[inside] > 0).any()
    for axis, length in enumerate(shape):
        found = [size[axis] for size in sizes]
        assert min(found) >= round(0.25 * length) - 1
        assert max(found) <= round(0.5 * length) + 1
        assert np.mean(found) == pytest.approx(0.375 * length, rel=0.06)
    exact = patches.mix(5, sides=(0.5, 0.5))
    assert exact.inside.flatten(1).sum(1).tolist() == [math.prod(length // 2 for length in shape)] * 5


def test_classes_are_drawn_with_their_probabilities_among_those_that_a_donor_has() -> None:
    patches = Patches((10, 10), num_labeled=1)
    patches.members[:] = False
    patches.members[0, :, 2:8, 5] = True  # the labelled patch has all classes, in different rows
    for label in range(3):
        patches.members[0, label] &= (torch.arange(10) // 2 == label + 1)[:, None]
    patches.members[1:, 2] = True  # unlabelled ones have the last class only
    mixed = patches.mix(3000, probabilities=(0.6, 0.3, 0.1), sides=(0.1, 0.1))  # one voxel
    from_labeled = [image[inside] for image, inside in zip(mixed.image, mixed.inside, strict=True)]
    from_labeled = [int(value) for value in torch.cat(from_labeled) if value < 100]
    counts = np.bincount([value // 10 // 2 - 1 for value in from_labeled], minlength=3)
    assert 1300 < counts.sum() < 1700  # half of the mixes
    np.testing.assert_allclose(counts / counts.sum(), (0.6, 0.3, 0.1), atol=0.04)
    told = mixed.classes[(mixed.image * mixed.inside).flatten(1).sum(1) < 100].sum(0)
    assert told.tolist() == counts.tolist()


def test_a_class_that_one_of_many_labelled_patches_has_is_drawn_from_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cutmix, "PAIRS", (Pair("labeled", "labeled"),))
    torch.manual_seed(0)
    image = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous()
    members = torch.zeros(6, 2, 8, 8, dtype=torch.bool)
    members[:, 0, 0, 0] = True
    members[4, 1, 4, 4] = True  # the only one with the rare class
    mixed = mix(image, image, image, members, 6, torch.tensor([0.1, 0.9]), 3000, (0.125, 0.125))
    recipients = mixed.image[:, 0, 7, 7] != 4  # a corner where no box lies tells who got it
    rare = mixed.inside[:, 0, 4, 4]
    assert float(rare[recipients].float().mean()) == pytest.approx(0.9, abs=0.02)
    assert not rare[~recipients].any()  # never from itself
    assert torch.equal(mixed.classes[:, 1], rare)
    assert torch.equal(mixed.classes.sum(1), torch.ones(3000, dtype=torch.long))


def test_without_any_class_the_box_lies_anywhere() -> None:
    patches = Patches((16, 16))
    patches.members[:] = False
    mixed = patches.mix(400)
    assert not mixed.classes.any()
    inside = mixed.inside.float()
    middle = inside.mean(0)[0, 4:12, 4:12]
    assert inside.flatten(1).sum(1).min() >= 16
    assert middle.min() > 0.05


def test_same_seed_same_mixes() -> None:
    first, second = (Patches((12, 12), seed=3).mix(10) for _ in range(2))
    assert all(torch.equal(own, other) for own, other in zip(first, second, strict=True))


def test_settings_reach_the_curriculum() -> None:
    settings = replace(DinoMix(), curriculum_end=0.5)
    assert class_probabilities(COUNTS, 0.5, settings).tolist() == pytest.approx([1 / 3] * 3)
