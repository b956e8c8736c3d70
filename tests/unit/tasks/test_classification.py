"""The classification head, its loss and its metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from nnunet_kd.tasks.classification import (
    ClassificationHead,
    ClassificationLoss,
    Pooled,
    class_weights,
    macro_auroc,
    probabilities,
)

NAN = float("nan")
TARGETS = [("type", 3), ("a name. with dots", 2)]


def one_hot(classes: list[int], number: int) -> torch.Tensor:
    """-1 is not labelled."""
    rows = [[NAN] * number if label < 0 else [float(label == other) for other in range(number)] for label in classes]
    return torch.tensor(rows)


def make_head(pooling: str = "attention") -> ClassificationHead:
    torch.manual_seed(0)
    head = ClassificationHead([4, 6], 2, TARGETS, pooling=pooling).eval()
    for pool in head.pools:
        for weight in pool.parameters():
            nn.init.normal_(weight)
    return head


@pytest.mark.parametrize("pooling", ["mean", "lse", "attention"])
def test_a_case_in_tiles_has_the_logits_of_the_case_in_one_piece(pooling: str) -> None:
    head = make_head(pooling)
    skips = [torch.randn(1, 99, 16, 16), torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]  # the first is not pooled
    upper, lower = zip(*(skip.split([skip.shape[2] // 4, 3 * skip.shape[2] // 4], 2) for skip in skips), strict=True)
    tiled = head.classify(head.combine([head.pooled(upper), head.pooled(lower)]))
    whole = head(skips)
    assert list(whole) == [name for name, _ in TARGETS]
    for name, classes in TARGETS:
        assert whole[name].shape == (1, classes)
        torch.testing.assert_close(tiled[name], whole[name])


def test_split_gives_each_sample_of_a_batch_its_own_statistics() -> None:
    head = make_head()
    skips = [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)]
    parts = head.pooled(skips).split()
    assert len(parts) == 3
    assert isinstance(parts[1], Pooled)
    alone = head([skip[1:2] for skip in skips])
    torch.testing.assert_close(head.classify(parts[1])["type"], alone["type"])


def test_small_batches_do_not_throw_the_logits_about() -> None:
    """nnU-Net's SGD on labels without any signal: probabilities must stay near 1/2, not swing from class to class."""
    torch.manual_seed(0)
    head = ClassificationHead([256, 256], 2, [("label", 2)])
    optimizer = torch.optim.SGD(head.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    losses = []
    for _ in range(200):
        pooled = Pooled((torch.randn(2, 256) + 1, torch.randn(2, 256) + 1), (torch.zeros(2), torch.zeros(2)))
        labels = torch.nn.functional.one_hot(torch.randint(0, 2, (2,)), 2).float()
        loss = ClassificationLoss(multilabel=False)(head.classify(pooled)["label"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[100:]) < 1.3 * math.log(2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multi_class_loss_by_hand_with_an_unlabelled_case(smoothing: float) -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [9.0, -9.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.0])
    loss = ClassificationLoss(multilabel=False, weights=weights, label_smoothing=smoothing)
    expected = 0.0
    for row, label in ((0, 0), (1, 1)):
        log_probability = logits[row] - math.log(sum(math.exp(value) for value in logits[row].tolist()))
        target = [(1 - smoothing) * (other == label) + smoothing / 3 for other in range(3)]
        expected -= (
            weights[label].item() * sum(t * p for t, p in zip(target, log_probability.tolist(), strict=True)) / 2
        )
    assert loss(logits, one_hot([0, 1, -1], 3)).item() == pytest.approx(expected)


def test_multi_label_loss_by_hand_with_unlabelled_findings() -> None:
    logits = torch.tensor([[1.5, -0.5], [0.0, 7.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, NAN]])
    weights = torch.tensor([[0.7, 0.6], [1.9, 3.0]])
    loss = ClassificationLoss(multilabel=True, weights=weights, label_smoothing=0.2)

    def bce(logit: float, target: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    expected = (1.9 * bce(1.5, 0.9) + 0.6 * bce(-0.5, 0.1) + 0.7 * bce(0.0, 0.1)) / 3
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
def test_unlabelled_batch_gives_zero_and_reaches_every_weight_with_zero_gradient(multilabel: bool) -> None:
    head = make_head()
    logits = head([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)])
    loss = ClassificationLoss(multilabel=multilabel, label_smoothing=0.1)
    total = sum(loss(logits[name], torch.full((2, classes), NAN)) for name, classes in TARGETS)
    assert total.item() == 0
    total.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in head.parameters())


def test_class_weights_are_scikit_learns_balanced_ones_and_average_to_one_over_cases() -> None:
    classes = [0, 0, 0, 0, 0, 2, 2, -1]
    weights = class_weights(one_hot(classes, 3))
    known = np.array(classes)[:-1]
    balanced = compute_class_weight("balanced", classes=np.array([0, 2]), y=known)
    np.testing.assert_allclose(weights.numpy(), [balanced[0], 1.0, balanced[1]], rtol=1e-6)
    assert weights[known].mean().item() == pytest.approx(1)


def test_weights_of_findings_balance_presence_and_absence() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, NAN], [0.0, 0.0]])
    absent, present = class_weights(labels, multilabel=True)
    torch.testing.assert_close(absent, torch.tensor([4 / (2 * 3), 1.0]))
    torch.testing.assert_close(present, torch.tensor([4 / 2, 1.0]))


def test_probabilities_of_both_kinds() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(probabilities(logits, multilabel=False), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(probabilities(logits, multilabel=True), torch.tensor([[0.5, 0.75]]))


def test_macro_auroc_counts_ordered_pairs_and_leaves_out_what_is_undefined() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(30, 3)).round(1)
    labels = np.stack([random.integers(0, 2, 30), np.ones(30), random.integers(0, 2, 30)], 1).astype(float)
    labels[:4, 0] = np.nan
    areas = []
    for column in (0, 2):
        positive, negative = (scores[labels[:, column] == value, column] for value in (1, 0))
        pairs = np.sign(positive[:, None] - negative[None]) / 2 + 0.5
        areas.append(pairs.mean())
    assert macro_auroc(scores, labels) == pytest.approx(np.mean(areas))
    assert math.isnan(macro_auroc(scores, np.ones((30, 3))))
    assert math.isnan(macro_auroc(np.zeros((0, 3)), np.zeros((0, 3))))
