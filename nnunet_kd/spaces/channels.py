"""The channel space: the union of the members' image channels, in which every member's image has its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_kd.errors import JointDatasetError


@dataclass(frozen=True)
class ChannelSpace:
    """Named image channels in the order of a network's input."""

    names: tuple[str, ...]

    def indices(self, names: Sequence[str]) -> tuple[int, ...]:
        """Positions of ``names`` in this space, in the order of ``names``.

        Raises:
            JointDatasetError: A name is not in this space.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise JointDatasetError(
                f"Channel {_quoted(missing)} is not among the joint channels {_quoted(self.names)}. Plan the joint "
                f"dataset again with every member that has this channel."
            )
        return tuple(self.names.index(name) for name in names)


def union(members: Mapping[str, Sequence[str]]) -> ChannelSpace:
    """All channel names of ``members`` (member to its channel names) in the order of their first appearance.

    Raises:
        JointDatasetError: A member has two channels of one name, so that names do not tell them apart.
    """
    names: dict[str, None] = {}
    for member, own in members.items():
        repeated = sorted({name for name in own if list(own).count(name) > 1})
        if repeated:
            raise JointDatasetError(
                f"{member} has more than one channel named {_quoted(repeated)}. A joint teacher tells channels apart "
                f"by name, and nnU-Net takes the normalisation from these names (CT, noNorm, zscore, rescale_to_0_1, "
                f"rgb_to_0_1), so renaming them could change it. Such a dataset cannot join yet: leave {member} out."
            )
        names.update(dict.fromkeys(own))
    return ChannelSpace(tuple(names))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def channel_names(dataset_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the image channels in their order, from ``channel_names`` (or its old name ``modality``)."""
    channels = dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]
    numbered = all(str(key).isdigit() for key in channels)  # else nnU-Net takes them as they stand
    return tuple(channels[key] for key in (sorted(channels, key=int) if numbered else channels))
