"""A shared head seen in a member's own labels."""

from __future__ import annotations

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_kd.spaces.labels import LabelSpace, member_to_head_map
from nnunet_kd.training.member_view import MemberView, evaluation_labels

LABELS = {"background": 0, "core": 1, "edema": 2, "cyst": 3}
MEMBER = LabelSpace.from_dataset_json({"labels": LABELS})
HEAD = LabelSpace.from_dataset_json({"labels": {"background": 0, "cyst": 1, "lesion": 2, "stone": 3}})
MAP = member_to_head_map(MEMBER, HEAD, {"core": "lesion", "edema": "lesion", "cyst": "cyst"})


def test_view_decides_like_the_head_in_the_members_labels() -> None:
    view = MemberView(nn.Identity(), nn.Identity(), MAP)
    logits = torch.randn(2, 4, 6, 6)
    predicted = view(logits).argmax(1)
    of_head = logits[:, [0, 1, 2]].argmax(1)  # this member has no stone
    assert view(logits).shape == (2, 4, 6, 6)
    expected = torch.tensor([0, 3, 1])[of_head]  # the first of the labels that share a class speaks for both
    assert torch.equal(predicted, expected)


def test_logits_fit_into_nnunets_half_precision_sum_over_patches() -> None:
    view = MemberView(nn.Identity(), nn.Identity(), MAP)
    logits = 10 * torch.randn(2, 4, 3, 3)
    collected = torch.zeros(2, 4, 3, 3, dtype=torch.half)
    for _ in range(8):  # patches that overlap, each with the largest weight of stock nnU-Net's Gaussian
        collected += view(logits.half()) * 10
    assert torch.isfinite(collected).all()
    assert torch.equal(collected.argmax(1), view(logits.half()).argmax(1))
    assert (view(logits).softmax(1)[:, 2] < 1e-8).all()


def test_labels_that_share_a_class_are_evaluated_together() -> None:
    manager = LabelManager(LABELS, None)
    view = evaluation_labels(manager, MAP)
    assert view.foreground_labels == [(1, 2), 3]
    assert manager.foreground_labels == [1, 2, 3]
    assert isinstance(view, LabelManager)
    assert view.num_segmentation_heads == manager.num_segmentation_heads


def test_labels_in_another_order_keep_the_members_order() -> None:
    labels = {"background": 0, "core": 1, "cyst": 2}
    member = LabelSpace.from_dataset_json({"labels": labels})
    label_map = member_to_head_map(member, HEAD, {"core": "lesion", "cyst": "cyst"})
    assert evaluation_labels(LabelManager(labels, None), label_map).foreground_labels == [1, 2]
