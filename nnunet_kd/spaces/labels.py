"""Label spaces, and maps between them that aggregate probabilities exactly (our design).

A label space lists the classes of a segmentation in the order of nnU-Net's output channels. A label map takes logits of
one space to logits of another such that softmax or sigmoid of the result is the sum of the probabilities of the source
classes that belong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnunet_kd.errors import LabelSpaceError

BACKGROUND = "background"
IGNORE = "ignore"
# A label without a voice of its own is this far below the background: never chosen, and small enough for nnU-Net, which
# adds up ten times the logits of overlapping patches in float16.
EXCLUDED_MARGIN = 20.0
ABSENT_LOGIT = -1e4  # relative to the logsumexp of all classes; its probability is exactly 0 in float32


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a segmentation in the order of nnU-Net's output channels.

    Args:
        names: Class of each channel. Softmax: background first, then by label value. Regions: in the order of their
            declaration, without background.
        values: Label values of each channel; exactly one for softmax.
        regions: True for overlapping regions (sigmoid outputs), False for exclusive labels (softmax outputs).
        ignore: Label value of voxels without annotation; None if there are none. It has no channel.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: bool
    ignore: int | None = None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> LabelSpace:
        """Read ``labels`` and ``regions_class_order`` of a dataset.json as nnU-Net's LabelManager reads them.

        Where two labels without regions have one value, which nnU-Net allows, the first name stands for both.

        Raises:
            LabelSpaceError: nnU-Net would refuse these labels.
        """
        labels = dataset_json.get("labels")
        if not isinstance(labels, Mapping) or not _is_background(labels.get(BACKGROUND)):
            raise LabelSpaceError(
                f"'labels' in dataset.json must declare \"background\": 0, but it is {labels!r}. Correct dataset.json."
            )
        ignore = labels.get(IGNORE)
        declared = {str(name): _label_values(value) for name, value in labels.items() if name != IGNORE}
        highest = max(value for own in declared.values() for value in own)
        if ignore is not None and (not isinstance(ignore, int) or ignore != highest + 1):
            raise LabelSpaceError(
                f"The ignore label in dataset.json must be one integer above all others, here {highest + 1}, but it is "
                f"{ignore!r}. Correct dataset.json and the segmentations."
            )
        if any(len(own) > 1 for own in declared.values()):
            inside = {name: own for name, own in declared.items() if set(own) != {0}}
            order = dataset_json.get("regions_class_order")
            if order is None or len(order) != len(inside):
                raise LabelSpaceError(
                    f"dataset.json declares the regions {_quoted(inside)}, so 'regions_class_order' must have "
                    f"{len(inside)} entries, but it is {order!r}. Correct dataset.json."
                )
            return cls(tuple(inside), tuple(inside.values()), True, ignore)
        name_of: dict[int, str] = {}
        for name, own in declared.items():
            for value in own:
                name_of.setdefault(value, name)
        values = sorted(name_of)
        return cls(tuple(name_of[value] for value in values), tuple((value,) for value in values), False, ignore)

    @property
    def num_channels(self) -> int:
        """Number of output channels, nnU-Net's ``num_segmentation_heads``."""
        return len(self.names)

    @property
    def foreground_names(self) -> tuple[str, ...]:
        """All names but background, in the order of the channels."""
        return self.names if self.regions else self.names[1:]

    @property
    def label_values(self) -> tuple[int, ...]:
        """All label values that occur in segmentations, sorted, with 0, without the ignore label."""
        return tuple(sorted({0, *(value for own in self.values for value in own)}))


@dataclass(frozen=True)
class LabelMap:
    """Logits of a source space -> logits of a target space, by exact aggregation of probabilities.

    - softmax -> softmax: the target's logit is the logsumexp of the source's logits in the group; its softmax is the
      sum of their probabilities. A target class without source class gets probability 0.
    - softmax -> regions: logsumexp(inside) - logsumexp(outside), the log odds of the summed probability.
    - regions -> regions: the same regions selected, in the target's order.

    Args:
        source: Space of the input.
        target: Space of the output.
        groups: For each target channel, the source channels that belong to it.

    Raises:
        LabelSpaceError: Regions cannot be brought to softmax (overlapping probabilities have no sum), or the groups do
            not fit the two spaces.
    """

    source: LabelSpace
    target: LabelSpace
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.source.regions and not self.target.regions:
            raise LabelSpaceError(
                f"Regions ({_quoted(self.source.names)}) overlap, so they cannot be mapped to exclusive labels "
                f"({_quoted(self.target.names)}). Map the labels to the regions, or declare regions on both sides."
            )
        problem = self._problem()
        if problem:
            raise LabelSpaceError(f"The groups {self.groups} are no label map: {problem}.")

    def _problem(self) -> str | None:
        channels = [channel for group in self.groups for channel in group]
        if len(self.groups) != self.target.num_channels:
            return f"the target has {self.target.num_channels} channels"
        if not set(channels) <= set(range(self.source.num_channels)):
            return f"the source has {self.source.num_channels} channels"
        if self.source.regions and any(len(group) != 1 for group in self.groups):
            return "each target region needs exactly one source region"
        if not self.target.regions and sorted(channels) != list(range(self.source.num_channels)):
            return "each source class must be in exactly one group"
        if self.target.regions and not all(self.groups):
            return "a target region has no source class"
        if not self.source.regions and self.target.regions and 0 in channels:
            return "background cannot be part of a region"
        return None

    @cached_property
    def is_identity(self) -> bool:
        """Whether logits stay what they are."""
        same = tuple((channel,) for channel in range(self.source.num_channels))
        return self.source.regions == self.target.regions and self.groups == same

    def __call__(self, logits: Tensor) -> Tensor:
        """Map ``logits`` [B, source channels, *S] to [B, target channels, *S].

        The identity returns ``logits`` itself and a selection keeps the type; sums are taken in float32 at least.
        """
        if self.is_identity:
            return logits
        sums = self.source.regions != self.target.regions or any(len(group) != 1 for group in self.groups)
        if sums and logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        channels = logits.unbind(1)  # not one slice per channel: the gradient is then put together once
        if not sums:
            return torch.stack([channels[group[0]] for group in self.groups], dim=1)
        if self.target.regions:
            return torch.stack([_log_odds(channels, group) for group in self.groups], dim=1)
        absent = None if all(self.groups) else torch.logsumexp(logits, dim=1) + ABSENT_LOGIT
        return torch.stack([_log_sum(channels, group, absent) for group in self.groups], dim=1)

    def expand(self, values: Tensor, *, lower: bool, axis: int) -> Tensor:
        """The outputs of a shared head (target) as those of a member's labels (source), both exclusive labels.

        Args:
            values: Weights, biases or logits with the target's channels along ``axis``.
            lower: Lower the labels that do not speak, which is due to biases and logits but not to weights.
            axis: The axis of the channels.

        Returns:
            The same with the source's labels along ``axis``. The first label of each target class gets its values; any
            other label those of the background less a margin, so that it is never the most probable one.
        """
        speaking = {group[0]: channel for channel, group in enumerate(self.groups) if group}
        labels = range(self.source.num_channels)
        expanded = values[(slice(None),) * axis + ([speaking.get(label, 0) for label in labels],)]
        silent = [label for label in labels if label not in speaking]
        if lower and silent:
            expanded[(slice(None),) * axis + (silent,)] -= EXCLUDED_MARGIN
        return expanded

    def lookup_table(self) -> Tensor:
        """Label values: ``table[source value] = target value``, the ignore label included. Unused values become 0.

        Returns:
            [highest source value + 1], int64.

        Raises:
            LabelSpaceError: One of the spaces has regions, or the source has an ignore label and the target has none.
        """
        if self.source.regions or self.target.regions:
            raise LabelSpaceError("Label values can be replaced only between spaces of exclusive labels, not regions.")
        pairs = {
            self.source.values[channel][0]: self.target.values[index][0]
            for index, group in enumerate(self.groups)
            for channel in group
        }
        if self.source.ignore is not None:
            if self.target.ignore is None:
                raise LabelSpaceError(
                    'The source has an ignore label and the target has none. Add "ignore" to the target\'s labels, '
                    "one above its highest value."
                )
            pairs[self.source.ignore] = self.target.ignore
        table = torch.zeros(max(pairs) + 1, dtype=torch.int64)
        for source_value, target_value in pairs.items():
            table[source_value] = target_value
        return table


def match_label_spaces(
    student: LabelSpace, teacher: LabelSpace, mapping: Mapping[str, str] | None = None
) -> tuple[LabelMap, LabelMap]:
    """Bring student and teacher into one space in which they are compared (our design).

    - Both softmax: the student's classes; where several of them share one teacher class, or go to background, the
      teacher's names. Teacher classes that nobody names belong to background.
    - Both regions: the student's regions, one teacher region each.
    - One has regions: the regions. Map a label to the smallest region that it lies in; it then belongs to every region
      that contains that one. A region that nothing is mapped to is left out unless others fill it.

    Args:
        student: The student's classes.
        teacher: The teacher's classes.
        mapping: Student name to teacher name, for every student class but background; several may share one teacher
            class, and exclusive labels may go to "background". None matches equal names.

    Returns:
        (student's map, teacher's map). Their ``target`` is the same object; its ignore label is the student's.

    Raises:
        LabelSpaceError: A class is not mapped, a name is unknown, or regions cannot be formed; says which.
    """
    pairs = _checked_mapping(student, teacher, mapping)
    if student.regions and teacher.regions:
        return _match_regions(student, teacher, pairs)
    if student.regions:
        return _match_student_regions(student, teacher, pairs)
    if teacher.regions:
        return _match_teacher_regions(student, teacher, pairs)
    return _match_labels(student, teacher, pairs)


def member_to_head_map(member: LabelSpace, head: LabelSpace, mapping: Mapping[str, str]) -> LabelMap:
    """A member's labels -> the labels of a head that it shares with other members.

    Args:
        member: The member's labels.
        head: The head's labels; classes that this member lacks get probability 0.
        mapping: Member label to head label, for every label but background and ignore.

    Raises:
        LabelSpaceError: Regions; a label is not mapped; a name is unknown; only the member has an ignore label.
    """
    if member.regions or head.regions:
        raise LabelSpaceError(
            "A head that is shared must have exclusive labels; regions cannot share a head yet. Leave the member out "
            "of the shared head, and it gets a head of its own."
        )
    if member.ignore is not None and head.ignore is None:
        raise LabelSpaceError(
            f'The member has an ignore label and the shared head has none. Add "ignore": {head.label_values[-1] + 1} '
            f"to the head's labels."
        )
    where = "'members' of the head in the --heads file"
    pairs = {BACKGROUND: BACKGROUND, **_checked_mapping(member, head, mapping, "member", "shared head", where)}
    return LabelMap(member, head, _groups_by_name(member, pairs, head.names))


def _match_labels(student: LabelSpace, teacher: LabelSpace, pairs: Mapping[str, str]) -> tuple[LabelMap, LabelMap]:
    used = [name for name in dict.fromkeys(pairs.values()) if name != BACKGROUND]
    if len(used) == len(student.foreground_names):
        common = student
    else:
        ignore = None if student.ignore is None else len(used) + 1
        common = LabelSpace((BACKGROUND, *used), tuple((value,) for value in range(len(used) + 1)), False, ignore)
    teacher_pairs = {name: name if name in used else BACKGROUND for name in teacher.names}
    order = (BACKGROUND, *used)
    return (
        LabelMap(student, common, _groups_by_name(student, {BACKGROUND: BACKGROUND, **pairs}, order)),
        LabelMap(teacher, common, _groups_by_name(teacher, teacher_pairs, order)),
    )


def _match_regions(student: LabelSpace, teacher: LabelSpace, pairs: Mapping[str, str]) -> tuple[LabelMap, LabelMap]:
    _refuse_shared(pairs)
    groups = tuple((teacher.names.index(pairs[name]),) for name in student.names)
    return LabelMap(student, student, _identity_groups(student)), LabelMap(teacher, student, groups)


def _match_teacher_regions(
    student: LabelSpace, teacher: LabelSpace, pairs: Mapping[str, str]
) -> tuple[LabelMap, LabelMap]:
    region_of = {label: region for label, region in pairs.items() if region != BACKGROUND}
    formed = _labels_in_regions(teacher, region_of)
    groups = tuple(tuple(sorted(student.names.index(label) for label in labels)) for labels in formed.values())
    values = tuple(tuple(student.values[channel][0] for channel in group) for group in groups)
    common = LabelSpace(tuple(formed), values, True, student.ignore)
    teacher_groups = tuple((teacher.names.index(region),) for region in formed)
    return LabelMap(student, common, groups), LabelMap(teacher, common, teacher_groups)


def _match_student_regions(
    student: LabelSpace, teacher: LabelSpace, pairs: Mapping[str, str]
) -> tuple[LabelMap, LabelMap]:
    _refuse_shared(pairs)
    formed = _labels_in_regions(student, {label: region for region, label in pairs.items()})
    groups = tuple(tuple(sorted(teacher.names.index(label) for label in formed[name])) for name in student.names)
    return LabelMap(student, student, _identity_groups(student)), LabelMap(teacher, student, groups)


def _labels_in_regions(regions: LabelSpace, region_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Labels inside each region that can be formed, in the order of the regions.

    Args:
        regions: The space of the regions.
        region_of: Label to the smallest region that it lies in.
    """
    values = {name: set(own) for name, own in zip(regions.names, regions.values, strict=True)}
    named = [name for name in regions.names if name in region_of.values()]
    for index, first in enumerate(named):
        for second in named[index + 1 :]:
            shared = values[first] & values[second]
            if shared and shared not in (values[first], values[second]):
                raise LabelSpaceError(
                    f"The regions '{first}' and '{second}' overlap (label {_listed(sorted(shared))}) and neither "
                    f"contains the other, so exclusive labels cannot form both. Declare the same regions for student "
                    f"and teacher, or leave one of the two out of the label map."
                )
    formed: dict[str, list[str]] = {}
    for name in regions.names:
        inner = [other for other in named if values[other] <= values[name]]
        if name in named or (inner and set().union(*(values[other] for other in inner)) == values[name]):
            formed[name] = [label for label, region in region_of.items() if region in inner]
    return formed


def _checked_mapping(
    source: LabelSpace,
    target: LabelSpace,
    mapping: Mapping[str, str] | None,
    source_word: str = "student",
    target_word: str = "teacher",
    where: str = "'labels' of the teacher in the settings",
) -> dict[str, str]:
    """Source foreground name -> target name, complete, in the order of the source's channels."""
    implied = {BACKGROUND: BACKGROUND, IGNORE: IGNORE}
    given = None if mapping is None else {a: b for a, b in mapping.items() if implied.get(a) != b}
    allowed = target.foreground_names if source.regions else (BACKGROUND, *target.foreground_names)
    needed = [name for name in source.foreground_names if not _is_filled(source, name, given, target)]
    if given is None:
        pairs = {name: name for name in source.foreground_names if name in target.foreground_names}
    else:
        unknown = [name for name in given if name not in source.foreground_names]
        if unknown:
            raise LabelSpaceError(
                f"The label map names {_quoted(unknown)}, which the {source_word} does not have or which cannot be "
                f"mapped. Its labels: {_quoted(source.foreground_names)}."
            )
        unknown = [name for name in given.values() if name not in allowed]
        if unknown:
            raise LabelSpaceError(
                f"The label map names {_quoted(unknown)}, which the {target_word} does not have. Its labels: "
                f"{_quoted(allowed)}."
            )
        pairs = {name: given[name] for name in source.foreground_names if name in given}
    missing = [name for name in needed if name not in pairs]
    if missing:
        example = {name: pairs.get(name, "?") for name in source.foreground_names if name in pairs or name in missing}
        raise LabelSpaceError(
            f"{_quoted(missing)} of the {source_word} has no counterpart in the {target_word}, whose labels are "
            f"{_quoted(allowed)}. Write the label map ({source_word} label: {target_word} label) into {where}, with a "
            f'{target_word} label for every "?": {json.dumps(example, ensure_ascii=False)}'
        )
    if set(pairs.values()) <= {BACKGROUND}:
        raise LabelSpaceError(
            f"No label of the {source_word} is mapped to anything but background, so nothing is left to learn. Map at "
            f"least one to one of {_quoted(target.foreground_names)}."
        )
    return pairs


def _is_filled(space: LabelSpace, name: str, mapping: Mapping[str, str] | None, target: LabelSpace) -> bool:
    """Whether a region of the student follows from smaller ones that exclusive labels of the teacher stand for."""
    if not space.regions or target.regions:
        return False
    mapped = set(target.foreground_names) if mapping is None else set(mapping)
    values = {other: set(own) for other, own in zip(space.names, space.values, strict=True)}
    inner = [values[other] for other in space.names if other in mapped and values[other] < values[name]]
    return bool(inner) and set().union(*inner) == values[name]


def _refuse_shared(pairs: Mapping[str, str]) -> None:
    """Two regions of the student that are one class of the teacher would be taught to be equal."""
    for name in pairs.values():
        sharing = [region for region, other in pairs.items() if other == name]
        if len(sharing) > 1:
            raise LabelSpaceError(
                f"The regions {_quoted(sharing)} of the student are mapped to '{name}' of the teacher. Each region "
                f"needs a foreground class of its own: map it to another one, or choose a teacher that has it."
            )


def _groups_by_name(
    source: LabelSpace, pairs: Mapping[str, str], target_names: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(channel for channel, name in enumerate(source.names) if pairs[name] == target_name)
        for target_name in target_names
    )


def _identity_groups(space: LabelSpace) -> tuple[tuple[int, ...], ...]:
    return tuple((channel,) for channel in range(space.num_channels))


def _log_sum(channels: Sequence[Tensor], group: Sequence[int], absent: Tensor | None = None) -> Tensor:
    if not group:
        assert absent is not None
        return absent
    if len(group) == 1:
        return channels[group[0]]
    return torch.logsumexp(torch.stack([channels[channel] for channel in group]), dim=0)


def _log_odds(channels: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    outside = [channel for channel in range(len(channels)) if channel not in group]
    return _log_sum(channels, group) - _log_sum(channels, outside)


def _is_background(value: object) -> bool:
    return isinstance(value, (int, str)) and str(value) == "0"


def _label_values(value: Any) -> tuple[int, ...]:
    try:
        return tuple(int(own) for own in value) if isinstance(value, (list, tuple)) else (int(value),)
    except (TypeError, ValueError) as error:
        raise LabelSpaceError(
            f"A label in dataset.json must be an integer or a list of integers, but it is {value!r}. Correct "
            f"dataset.json."
        ) from error


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
