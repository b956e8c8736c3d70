"""Image-level classification: head, loss, probabilities and the metric that is watched while training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_kd.tasks.pooling import build_pooling


class Pooled(NamedTuple):
    """What the head keeps of a batch of patches; it adds up over patches (see ``ClassificationHead.combine``)."""

    values: tuple[Tensor, ...]
    """One per stage, [B, C_stage]."""
    log_weights: tuple[Tensor, ...]
    """One per stage, [B]."""

    def split(self) -> list[Pooled]:
        """One for each sample of the batch, B = 1."""
        size = len(self.log_weights[0])
        return [Pooled(*(tuple(part[index : index + 1] for part in parts) for parts in self)) for index in range(size)]


class ClassificationHead(nn.Module):
    """Pools several encoder stages and classifies what they say together.

    The bottleneck alone is the known failure (macro-F1 0.40 against 0.59 with an earlier stage), and heads with more
    than 1e5 weights overfit small datasets; so there is one linear layer per target on normalised pooled features.

    These have length 1. nnU-Net's momentum of 0.99 makes its learning rate of 0.01 act like 1, and a case moves its own
    logit by that times the squared length: with the length that normalisation gives, the root of several hundred, the
    few cases of a batch would throw the logits about.

    Args:
        stage_channels: Width of each pooled stage; the last one is the bottleneck.
        dimension: 2 or 3 spatial axes.
        targets: Name and number of classes of each target.
        pooling: "mean", "lse" or "attention". The mean of an instance-normalised map says little, since its mean
            before the nonlinearity is the same in every image.
        dropout: Probability of dropping a pooled feature, in [0, 1).

    Source: our design.
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        dimension: int,
        targets: Sequence[tuple[str, int]],
        pooling: str = "lse",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in targets)
        self.pools: Any = nn.ModuleList(build_pooling(pooling, channels, dimension) for channels in stage_channels)
        self.normalise = nn.Sequential(nn.LayerNorm(sum(stage_channels)), nn.Dropout(dropout))
        # a list, because a target may have any name, also that of an attribute of a ModuleDict
        self.classifiers = nn.ModuleList(nn.Linear(sum(stage_channels), classes) for _, classes in targets)

    def reset_parameters(self) -> None:
        """Undo nnU-Net's initialisation of all convolutions: attention starts as mean pooling."""
        for pool in self.pools:
            if hasattr(pool, "reset_parameters"):
                pool.reset_parameters()

    def forward(self, skips: Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits [B, classes] of each target, from the encoder's features, each [B, C, *S], finest first."""
        return self.classify(self.pooled(skips))

    def pooled(self, skips: Sequence[Tensor]) -> Pooled:
        """Pool the deepest stages of the encoder's features ``skips``, each [B, C, *S], finest first."""
        deepest = skips[-len(self.pools) :]
        parts = [pool(features) for pool, features in zip(self.pools, deepest, strict=True)]
        return Pooled(tuple(value for value, _ in parts), tuple(weight for _, weight in parts))

    def combine(self, parts: Sequence[Pooled]) -> Pooled:
        """Pool the positions of several patches of the same B cases as if they were one."""
        stages = [
            pool.combine(
                torch.stack([part.values[stage] for part in parts]),
                torch.stack([part.log_weights[stage] for part in parts]),
            )
            for stage, pool in enumerate(self.pools)
        ]
        return Pooled(tuple(value for value, _ in stages), tuple(weight for _, weight in stages))

    def classify(self, pooled: Pooled) -> dict[str, Tensor]:
        """Logits [B, classes] of each target."""
        features = self.normalise(torch.cat(pooled.values, 1))
        features = features / math.sqrt(features.shape[1])
        return {name: layer(features) for name, layer in zip(self.names, self.classifiers, strict=True)}


class ClassificationLoss(nn.Module):
    """Cross-entropy of a multi-class target or binary cross-entropy of a multi-label one, where labels are known.

    The mean over the labelled cases (multi-label: over the labelled findings) of the batch; 0 with a gradient of zeros
    where nothing is labelled. It is not divided by the batch's weights: in a batch of one they would cancel.

    Args:
        multilabel: Whether classes are findings, each present or not, of which a case may have several.
        weights: From :func:`class_weights`; None weighs all alike.
        label_smoothing: In [0, 1). Moves this share of each label to the uniform distribution.
    """

    weights: Tensor | None

    def __init__(self, *, multilabel: bool, weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.multilabel = multilabel
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of ``logits`` [B, C] for ``labels`` [B, C]: 0 or 1 (one-hot if multi-class), NaN unknown."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        known = ~labels.isnan() if self.multilabel else ~labels.isnan().any(1)
        labels = labels.nan_to_num().to(logits)
        loss = self._each_finding(logits, labels) if self.multilabel else self._each_case(logits, labels)
        return loss.where(known, 0.0).sum() / known.sum().clamp(min=1)

    def _each_case(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return loss if self.weights is None else loss * (labels @ self.weights.to(logits))

    def _each_finding(self, logits: Tensor, labels: Tensor) -> Tensor:
        smooth = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss = binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        if self.weights is None:
            return loss
        absent, present = self.weights.to(logits)
        return loss * (labels * present + (1 - labels) * absent)


def class_weights(labels: Tensor, *, multilabel: bool = False) -> Tensor:
    """Weights inverse to class frequency, whose mean over the labelled cases is 1.

    Args:
        labels: [N, C], 0 or 1 (one-hot if multi-class), NaN where not labelled.
        multilabel: Whether classes are findings.

    Returns:
        float32 [C]; of findings [2, C], the weights of absent and of present. What never occurs has weight 1.

    Source: the "balanced" weights of scikit-learn, cases / (classes that occur * cases of the class).
    """
    labels = labels.to(torch.float64)
    counts = torch.stack(((1 - labels).nansum(0), labels.nansum(0))) if multilabel else labels.nansum(0)[:, None]
    occurs = counts > 0
    weights = counts.sum(0) / (occurs.sum(0).clamp(min=1) * counts)
    weights = weights.where(occurs, 1.0).to(torch.float32)
    return weights if multilabel else weights[:, 0]


def probabilities(logits: Tensor, *, multilabel: bool) -> Tensor:
    """Probabilities of ``logits`` [B, C] in float32: softmax over classes, or one sigmoid per finding."""
    logits = logits.float()
    return logits.sigmoid() if multilabel else logits.softmax(1)


def macro_auroc(scores: NDArray[np.floating], labels: NDArray[np.floating]) -> float:
    """Mean over classes of the area under the ROC curve, each class against the rest.

    Args:
        scores: [N, C], higher where the class is likelier.
        labels: [N, C], 0 or 1, NaN where not labelled.

    Returns:
        In [0, 1]; classes without a positive or without a negative case are left out, NaN if none remains.
    """
    areas = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = ~np.isnan(label) & ~np.isnan(score)
        if len(np.unique(label[known])) == 2:
            areas.append(roc_auc_score(label[known], score[known]))
    return float(np.mean(areas)) if areas else float("nan")
