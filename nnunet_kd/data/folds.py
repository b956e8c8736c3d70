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
    """Which classes of a target each case has.

    Attributes:
        title: Of the target, for messages.
        classes: Of the target.
        cases: Case to [classes] of 0 and 1, NaN where not labelled; of boxes, never NaN.
        needs_negatives: Several classes may be present at once, so that a class is learned from cases without it.
        is_detection: Boxes: a score needs boxes, but no case without any.
    """

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
        total = np.nansum(self._labels(cases), axis=0)
        return {name: int(number) for name, number in zip(self.classes, total, strict=True)}

    def lacks(self, split: Split) -> list[str]:
        """What a fold can neither teach nor score although the dataset can."""
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
        labels = self._labels(validation)
        if self._can_score(labels) or not self._can_score(self._labels(self.cases)):
            return []
        present = [name for name, own in zip(self.classes, (labels == 1).any(0), strict=True) if own]
        if not len(labels):
            why = f"no validation case of {self.title} is labelled"
        elif not present:
            why = f"no validation case of {self.title} has {some(self.classes)}"
        else:
            why = f"every labelled validation case of {self.title} has {some(present)}"
        score = "AP" if self.is_detection else "AUROC"
        return [f"{why}, so that the {score} is not defined and has no part in choosing checkpoint_best"]

    def _can_score(self, labels: NDArray[np.float32]) -> bool:
        """A ranking needs cases [N, classes] with and without a class; that of boxes needs boxes."""
        has, has_not = (labels == 1).any(0), (labels == 0).any(0)
        return bool((has & (has_not | self.is_detection)).any())

    def _labels(self, cases: Iterable[str]) -> NDArray[np.float32]:
        own = [self.cases[case] for case in cases if case in self.cases]
        return np.array(own, dtype=np.float32).reshape(-1, len(self.classes))


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
