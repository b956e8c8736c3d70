"""A shared head seen in a member's own labels, for stock validation and prediction."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_kd.networks.multitask import TaskHeads, TaskOutputs, unwrapped
from nnunet_kd.spaces.labels import LabelMap


class MemberView(nn.Module):
    """The joint network with its shared head's logits expanded to the member's labels.

    Where several of the member's labels went to one class of the head, the first of them speaks for all.
    """

    def __init__(self, network: nn.Module, decoder: nn.Module, label_map: LabelMap) -> None:
        super().__init__()
        self.network = network
        self.decoder = decoder  # nnU-Net switches deep supervision here
        self.label_map = label_map

    @property
    def module(self) -> MemberView:
        """Under DDP nnU-Net looks for the decoder behind ``module``."""
        return self

    @property
    def speaking_heads(self) -> TaskHeads | None:
        """The member's heads for classification and detection."""
        return unwrapped(self.network).speaking_heads

    def forward(self, image: Tensor, **wanted: bool) -> Any:
        """Logits [B, labels of the member, *S], or :class:`TaskOutputs` with such logits."""
        output = self.network(image, **wanted)
        if not isinstance(output, TaskOutputs):
            return self.label_map.expand(output, lower=True, axis=1)
        expanded = [self.label_map.expand(logits, lower=True, axis=1) for logits in output.segmentation]
        return output._replace(segmentation=expanded)


def evaluation_labels(label_manager: LabelManager, label_map: LabelMap) -> Any:
    """The member's label manager, evaluating labels that share a class of the head as one region."""
    values = label_map.source.values
    # in the order of the member's labels, in which a cascade lists the channels of the previous stage
    groups = sorted(tuple(values[channel][0] for channel in group) for group in label_map.groups[1:] if group)
    foreground = [group[0] if len(group) == 1 else group for group in groups]
    view = type("MemberLabels", (type(label_manager),), {"foreground_labels": property(lambda self: foreground)})
    changed: Any = object.__new__(view)
    changed.__dict__.update(label_manager.__dict__)
    return changed
