"""What is wrong with the folds of a dataset with tasks or groups: for verification, planning and training alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.data.member import Member
from nnunet_kd.data.side_files import CaseBoxes, side_file
from nnunet_kd.data.splits import Split, member_splits, read_groups, read_splits, some
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.files import write_json


@dataclass(frozen=True)
class Presence:
    """Which classes of a target each case has: [classes] of 0 and 1, NaN where not labelled; of boxes, never NaN."""

    title: str
    classes: tuple[str, ...]
    cases: dict[str, NDArray[np.float32]]
    needs_negatives: bool = False
    is_detection: bool = False

    @classmethod
    def of_boxes(
        cls, title: str, classes: tuple[str, ...], boxes: Mapping[str, CaseBoxes], cases: Iterable[str]
    ) -> Presence:
        """Of detection; a case without entry has no boxes, so that every case is labelled."""
        present = {case: np.zeros(len(classes), dtype=np.float32) for case in cases}
        for case in present:
            if case in boxes:
                present[case][boxes[case].labels] = 1
        return cls(title, classes, present, is_detection=True)

    def counts(self, cases: Iterable[str]) -> dict[str, int]:
        """Class to the number of ``cases`` that have it."""
        rows = [self.cases[case] for case in cases if case in self.cases]
        total = np.nansum(np.array(rows).reshape(-1, len(self.classes)), axis=0)
        return {name: int(number) for name, number in zip(self.classes, total, strict=True)}

    def lacks(self, split: Split) -> list[str]:
        """What a fold cannot teach although the dataset has it, and that its validation gives no score at all."""
        return [*self._unlearned(split["train"]), *self._unscored(split["val"])]

    def _unlearned(self, training: Collection[str]) -> list[str]:
        found, everywhere = self.counts(training), self.counts(self.cases)
        missing = [name for name in self.classes if everywhere[name] and not found[name]]
        wrong = [f"no training case of {self.title} has {some(missing)}"] if missing else []
        if self.needs_negatives:
            for index, name in enumerate(self.classes):
                values = [self.cases[case][index] for case in training if case in self.cases]
                if found[name] and found[name] == np.count_nonzero(~np.isnan(values)):
                    wrong.append(f"every labelled training case of {self.title} has {name}")
        return wrong

    def _unscored(self, validation: Collection[str]) -> list[str]:
        """A ranking needs cases with and without a class; a score of boxes needs boxes."""
        labelled = [self.cases[case] for case in validation if case in self.cases]
        rows = np.array(labelled, dtype=np.float32).reshape(-1, len(self.classes))
        has, has_not = (rows == 1).any(0), (rows == 0).any(0)
        if not any(self.counts(self.cases).values()) or (has & (has_not | self.is_detection)).any():
            return []
        if not labelled:
            why = f"no validation case of {self.title} is labelled"
        elif not has.any():
            why = f"no validation case of {self.title} has {some(self.classes)}"
        else:
            classes = [name for name, own in zip(self.classes, has, strict=True) if own]
            why = f"every labelled validation case of {self.title} has {some(classes)}"
        return [f"{why}: it is trained, but not scored, and checkpoint_best does not look at it"]


def shared_groups(groups: Mapping[str, str], split: Split) -> list[str]:
    """Groups that have cases on both sides of a fold."""
    training, validation = ({groups[case] for case in split[side] if case in groups} for side in ("train", "val"))
    return sorted(training & validation)


def planned_splits(member: Member, cases: Sequence[str]) -> list[Split]:
    """The member's splits_final.json, or what stock training would write there, grouped by ``split_by``.

    Raises:
        JointDatasetError: The file is broken, or there are too few cases or groups.
    """
    if member.splits_file.is_file():
        return read_splits(member.splits_file)
    tasks = Tasks.from_dataset_json(member.dataset_json)
    groups = None
    if tasks.split_by is not None:
        groups = read_groups(side_file(member.name, tasks.groups_file), tasks.split_by)
    try:
        return member_splits(cases, None, groups)
    except JointDatasetError as error:
        raise JointDatasetError(f"{member.name}: {error}") from error


def keep_groups_together(member: Member, fold: int | str) -> None:
    """Make sure, before nnU-Net looks for folds, that a fold does not divide a group of ``split_by``.

    Where there are no folds yet, grouped ones are written; nnU-Net would write some that divide groups.

    Args:
        member: The dataset; nothing is done if it does not declare ``split_by``.
        fold: Of the training; "all" has no validation cases of its own.

    Raises:
        JointDatasetError: The fold divides a group, or would be nnU-Net's random one, as it is not in the file.
    """
    tasks = Tasks.from_dataset_json(member.dataset_json)
    if tasks.split_by is None or fold == "all":
        return
    splits = planned_splits(member, member.identifiers)
    if not member.splits_file.is_file():
        write_json(member.splits_file, splits)
    if int(fold) >= len(splits):
        raise JointDatasetError(
            f"{member.splits_file} has no fold {fold}, only 0 to {len(splits) - 1}, and nnU-Net's random one would "
            f"divide values of '{tasks.split_by}'. Train one of them, or add the fold to the file."
        )
    shared = divided_groups(member, splits[int(fold)])
    if shared:
        raise JointDatasetError(
            f"Fold {fold} of {member.splits_file} has {len(shared)} value(s) of '{tasks.split_by}' both in training "
            f"and in validation: {some(shared)}. Move the file away and train again, which makes folds by group; or "
            f"remove 'split_by' from dataset.json."
        )


def divided_groups(member: Member, split: Split) -> list[str]:
    """Values of the member's ``split_by`` on both sides of a fold; none where it declares none."""
    tasks = Tasks.from_dataset_json(member.dataset_json)
    if tasks.split_by is None:
        return []
    return shared_groups(read_groups(side_file(member.name, tasks.groups_file), tasks.split_by), split)
