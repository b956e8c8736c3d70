"""The batch of a semi-supervised step: which sample is what, and what is known of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from nnunet_kd.settings import DinoMix
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.teachers.ema import LOGITS
from nnunet_kd.teachers.foundation import SEEN
from nnunet_kd.training.semi_batch import SemiSupervisedBatch, SupervisedPart, strong_views

LABELS = LabelSpace.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
REGIONS = LabelSpace.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
)


def make_batch(regions: bool, shape: tuple[int, ...] = (8, 12)) -> dict[str, Any]:
    """Two labelled and three unlabelled samples, two levels of targets."""
    torch.manual_seed(0)
    if regions:
        full = (torch.rand(5, 3, *shape) < 0.3).to(torch.int16)
    else:
        full = torch.randint(0, 3, (5, 1, *shape), dtype=torch.int16)
    half = interpolate(full.float(), scale_factor=0.5, mode="nearest-exact").to(torch.int16)
    return {"data": torch.randn(5, 2, *shape), "target": [full, half], "keys": list("abcde")}


@pytest.mark.parametrize("regions", [False, True])
def test_samples_targets_and_logits(regions: bool) -> None:
    space = REGIONS if regions else LABELS
    batch = make_batch(regions)
    logits = 10 * torch.randn(3, 2 if regions else 3, 8, 12)
    made, groups = SemiSupervisedBatch(space, 2, DinoMix())(batch, logits, 4, 0.5)
    assert groups == {"labeled": slice(0, 2), "unlabeled": slice(2, 5), "mixed": slice(5, 9)}
    assert made["data"].shape == (9, 2, 8, 12)
    assert made[SEEN] == 5
    assert torch.equal(made["data"][:2], batch["data"][:2])
    assert torch.equal(made[LOGITS][2:5], logits)
    for level, stock in zip(made["target"], batch["target"], strict=True):
        assert level.dtype == stock.dtype
        assert torch.equal(level[:2], stock[:2])
        assert level.shape == (9, *stock.shape[1:])
    decided = (logits > 0) if regions else logits.argmax(1, keepdim=True)
    assert torch.equal(made["target"][0][2:5, : decided.shape[1]], decided.to(torch.int16))
    if regions:
        assert not made["target"][0][2:5, 2].any()  # nothing is to be ignored where nothing is known
    for place in range(2, 9):  # the coarse target is the nearest voxel of the fine one
        fine = made["target"][0][place : place + 1].float()
        assert torch.equal(
            made["target"][1][place : place + 1].float(), interpolate(fine, (4, 6), mode="nearest-exact")
        )
    known = made[LOGITS][:2]
    if regions:
        sure = batch["target"][0][:2, 2:] == 0
        assert torch.equal((known > 0) & sure, batch["target"][0][:2, :2].bool() & sure)
    else:
        assert torch.equal(known.argmax(1, keepdim=True), batch["target"][0][:2].long())


def test_mixed_images_are_made_of_clean_ones() -> None:
    batch = make_batch(False)
    made, _ = SemiSupervisedBatch(LABELS, 2, DinoMix())(batch, 10 * torch.randn(3, 3, 8, 12), 6, 0.5)
    known = {float(value) for value in batch["data"].flatten()}
    assert {float(value) for value in made["data"][5:].flatten()} <= known
    assert not {float(value) for value in made["data"][2:5].flatten()} & known  # strong views


def test_classes_are_counted_in_labels_and_confident_pseudo_labels() -> None:
    batch = make_batch(False)
    logits = torch.zeros(3, 3, 8, 12)
    logits[0, 1, :2] = 5  # probability 0.987
    logits[1, 2, 0, :7] = 5
    logits[2, 1] = 1  # 0.576: not sure
    maker = SemiSupervisedBatch(LABELS, 2, DinoMix(curriculum="tail"))
    maker(batch, logits, 1, 0.0)
    known = [float((batch["target"][0][:2] == label).sum()) / 2 for label in (1, 2)]
    counts = [known[0] + 24 / 3, known[1] + 7 / 3]
    assert maker.frequencies.total.tolist() == pytest.approx(counts)
    weights = [math.log(1 + max(counts) / count) for count in counts]
    assert maker.probabilities is not None
    assert maker.probabilities.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def test_without_a_teacher_nothing_is_mixed() -> None:
    batch = make_batch(False)
    made, groups = SemiSupervisedBatch(LABELS, 2, DinoMix())(batch, None, 4, 0.5)
    assert set(groups) == {"labeled", "unlabeled"}
    assert len(made["data"]) == 5
    assert LOGITS not in made


def test_one_level_without_deep_supervision() -> None:
    batch = make_batch(False)
    batch["target"] = batch["target"][0]
    made, _ = SemiSupervisedBatch(LABELS, 2, DinoMix())(batch, torch.randn(3, 3, 8, 12), 1, 0.0)
    assert made["target"].shape == (6, 1, 8, 12)


def test_strong_views_keep_what_is_where() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 2, 40, 40).repeat_interleave(4, -1)
    views = strong_views(images)
    for image, view in zip(images.flatten(0, 1), views.flatten(0, 1), strict=True):
        correlation = torch.corrcoef(torch.stack((image.flatten(), view.flatten())))[0, 1]
        assert 0.8 < correlation < 0.9999
    scales = views.flatten(2).std(2) / images.flatten(2).std(2)
    assert scales.flatten().unique().numel() == 6


@pytest.mark.parametrize("scale", [0.05, 1.0, 80.0])
def test_noise_goes_with_the_scale_of_an_image(scale: float) -> None:
    images = torch.randn(400, 1, 32, 32)
    torch.manual_seed(1)
    views = strong_views(scale * images)
    torch.manual_seed(1)
    torch.testing.assert_close(views, scale * strong_views(images), rtol=1e-3, atol=1e-3 * scale)
    flat = torch.rand(400, 1, 1, 1).expand(400, 1, 32, 32)  # nothing to see, nothing added
    assert torch.equal(strong_views(flat).flatten(1).std(1) > 1e-5, torch.zeros(400, dtype=torch.bool))


def test_drawn_classes_are_counted_and_taken() -> None:
    maker = SemiSupervisedBatch(LABELS, 2, DinoMix())
    assert maker.take_drawn() == []
    for _ in range(3):
        maker(make_batch(False), 10 * torch.randn(3, 3, 8, 12), 5, 0.5)
    drawn = maker.take_drawn()
    assert sum(drawn) == 15
    assert min(drawn) > 0
    assert maker.take_drawn() == []


def test_what_lies_outside_an_image_stays_empty() -> None:
    images = torch.randn(2, 1, 10, 10)
    images[:, :, :3] = 0
    views = strong_views(images)
    assert not views[:, :, :3].any()
    assert (views[:, :, 3:] != images[:, :, 3:]).all()


def test_the_supervised_loss_sees_the_labelled_samples_only() -> None:
    class Mean(nn.Module):
        def forward(self, output: Any, target: Any) -> torch.Tensor:
            parts = zip(output, target, strict=True) if isinstance(output, list) else [(output, target)]
            return torch.stack([(own - other).mean() for own, other in parts]).sum()

    part, output, target = SupervisedPart(Mean()), torch.arange(6.0).view(6, 1), torch.zeros(6, 1)
    assert part(output, target) == 2.5
    part.num_labeled = 2
    assert part(output, target) == 0.5
    assert part([output, 2 * output], [target, target]) == 1.5
