"""The terms on classification and boxes: from what student and teacher say of a batch to a scalar (our design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.apps.detection.utils.box_coder import BoxCoder
from torch import Tensor, nn

from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import build_loss


class ClassLogitsLoss(nn.Module):
    """A loss on logits for each classification target; their mean counts.

    Args:
        name: "kl" or "dkd".
        targets: Of the student. Those with several classes at once are compared by sigmoid.
        **options: Of the loss.

    Raises:
        SettingsError: The loss or an option is unknown, or the loss cannot do a target; names the target.
    """

    def __init__(self, name: str, targets: Sequence[ClassificationTarget], **options: Any) -> None:
        super().__init__()
        self.multilabel = {target.name: target.multilabel for target in targets}
        losses = []
        for target in targets:
            nonlinearity = "sigmoid" if target.multilabel else "softmax"
            try:
                losses.append(build_loss("classification", name, nonlinearity=nonlinearity, **options))
            except SettingsError as error:
                raise SettingsError(f"On the classification target '{target.name}': {error}") from error
        self.losses = nn.ModuleList(losses)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the mean over the targets.

        Args:
            student: Target to logits [B, C], which receive the gradient.
            teacher: The same of the teacher.
            labels: Target to [B, C], 0 or 1, NaN where unknown; there the teacher's decision stands in.
        """
        values = []
        for (name, multilabel), loss in zip(self.multilabel.items(), self.losses, strict=True):
            target = _decisions(teacher[name], labels[name], multilabel)
            values.append(loss(as_map(student[name]), as_map(teacher[name]), target=as_map(target)))
        return torch.stack(values).mean()


def as_map(values: Tensor) -> Tensor:
    """[B, C] as the image of one voxel [B, C, 1, 1] that losses and projectors take."""
    return values[:, :, None, None]


AnchorMaps = tuple[Tensor, Tensor]  # class logits [B, N, classes] and box codes [B, N, 2 * dim] of all anchors


def box_regression_term(
    loss: Any, coder: BoxCoder, anchors: Tensor, student: AnchorMaps, teacher: AnchorMaps
) -> Tensor:
    """``loss`` between the boxes at the anchors where the teacher's highest class probability exceeds its threshold."""
    logits, teacher_codes = teacher
    scores = logits.sigmoid().amax(2)  # [B, N]
    image, anchor = ((scores > loss.threshold) & teacher_codes.isfinite().all(2)).nonzero(as_tuple=True)
    own = student[1][image, anchor]
    # MONAI raises on NaN, but under AMP an overflow must reach the gradient scaler, which skips the step
    student_boxes = coder.decode_single(own.nan_to_num(0.0, 0.0, 0.0), anchors[anchor])
    teacher_boxes = coder.decode_single(teacher_codes[image, anchor], anchors[anchor])
    value: Tensor = loss(student_boxes, teacher_boxes, scores[image, anchor])
    return value + own.sum() * 0


def _decisions(teacher: Tensor, labels: Tensor, multilabel: bool) -> Tensor:
    """Labels as a loss on logits takes them: the class [B, 1], or 0 and 1 of each class [B, C]."""
    if multilabel:
        return torch.where(labels.isnan(), (teacher > 0).to(labels), labels)
    known = ~labels.isnan().any(1)
    return torch.where(known, labels.nan_to_num().argmax(1), teacher.argmax(1))[:, None]
