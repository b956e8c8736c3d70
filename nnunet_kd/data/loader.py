"""The joint loader owns one stock loader per member and draws the member of each batch (our design).

The rule p ~ n^1/2 per member (each case ~ n^-1/2) is MultiTalent's (Ulrich et al., MICCAI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch.nn.functional import pad


def member_probabilities(num_cases: Mapping[str, int], exponent: float) -> dict[str, float]:
    """Probability of drawing each member: n^exponent, normalised. Exponent 0 draws members equally, 1 cases equally."""
    weights = {member: float(count) ** exponent for member, count in num_cases.items()}
    total = sum(weights.values())
    return {member: weight / total for member, weight in weights.items()}


class JointLoader(SlimDataLoaderBase):
    """Draws a member, then a batch from that member's own stock loader.

    A batch is the stock batch plus ``member``, its name.

    Args:
        loaders: Member to stock loader.
        probabilities: Member to probability; None visits the members in turn, which validation uses so that every
            member is seen in few iterations.
    """

    def __init__(self, loaders: Mapping[str, nnUNetDataLoader], probabilities: Mapping[str, float] | None) -> None:
        super().__init__(None, max(loader.batch_size for loader in loaders.values()), 1)
        self.loaders = dict(loaders)
        self.members = tuple(loaders)
        self.probabilities = None if probabilities is None else [probabilities[member] for member in self.members]
        self.num_drawn = 0

    def generate_train_batch(self) -> dict[str, Any]:
        """Return one member's batch."""
        if self.probabilities is None:
            index = (self.num_drawn + self.thread_id) % len(self.members)
        else:
            index = int(np.random.choice(len(self.members), p=self.probabilities))  # noqa: NPY002 (seeded per worker)
        self.num_drawn += 1
        member = self.members[index]
        return {**self.loaders[member].generate_train_batch(), "member": member}


class PadToMultipleTransform(BasicTransform):
    """Pad a sample at its end to a multiple of the joint network's strides.

    The image [C, *S] is padded with 0 and the segmentation with -1, as nnU-Net pads at the image border.
    """

    def __init__(self, multiple: tuple[int, ...]) -> None:
        super().__init__()
        self.multiple = multiple

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Pad ``image`` and ``segmentation``."""
        del params
        for key, value in (("image", 0), ("segmentation", -1)):
            tensor = data_dict[key]
            missing = [-size % step for size, step in zip(tensor.shape[1:], self.multiple, strict=True)]
            if any(missing):
                amounts = [amount for axis in reversed(missing) for amount in (0, axis)]
                data_dict[key] = pad(tensor, amounts, value=value)
        return data_dict


class MapLabelsTransform(BasicTransform):
    """Replace label values of the first segmentation channel by a table; -1 (outside) stays."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Map ``segmentation`` [C, *S], int16."""
        del params
        labels = data_dict["segmentation"][0].long()
        mapped = torch.where(labels >= 0, self.table[labels.clamp(min=0)], labels)
        data_dict["segmentation"][0] = mapped.to(data_dict["segmentation"].dtype)
        return data_dict
