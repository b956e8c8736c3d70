"""What a dataset's side files say of its images, for the heads that its plans have, and loaders that carry it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from numpy.typing import NDArray

from nnunet_kd.data.class_sampling import case_probabilities
from nnunet_kd.data.folds import Presence
from nnunet_kd.data.side_files import CaseBoxes, Problem, SideFileError, read_boxes, read_labels, side_file
from nnunet_kd.data.splits import read_groups
from nnunet_kd.data.task_loader import TaskDataset, TaskLoader
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.settings import TaskSettings


@dataclass(frozen=True)
class TaskData:
    """Labels and boxes of all cases of a dataset.

    Attributes:
        tasks: What the dataset declares, without the tasks that its plans have no head for.
        class_labels: Target to case to [classes], NaN where not labelled.
        boxes: Case to boxes in the stored image; None where they are not learned.
        groups: Case to group; None where the dataset is not split by groups.
    """

    tasks: Tasks
    class_labels: dict[str, dict[str, NDArray[np.float32]]]
    boxes: dict[str, CaseBoxes] | None
    groups: dict[str, str] | None

    @classmethod
    def read(cls, dataset: str, tasks: Tasks, dimension: int) -> TaskData:
        """Read the side files.

        Args:
            dataset: Full dataset name.
            tasks: The tasks to read.
            dimension: Of the boxes, 2 or 3.

        Raises:
            SideFileError: A file is missing, or lists all that is wrong in labels and boxes.
        """
        problems: list[Problem] = []
        targets = tasks.classification
        labels = {target.name: read_labels(side_file(dataset, target.file), target, problems) for target in targets}
        boxes = groups = None
        if tasks.detection is not None:
            boxes = read_boxes(side_file(dataset, tasks.detection.file), tasks.detection, dimension, problems)
        if problems:
            raise SideFileError.listing(problems)
        if tasks.split_by is not None:
            groups = read_groups(side_file(dataset, tasks.groups_file), tasks.split_by)
        return cls(tasks, labels, boxes, groups)

    def labels_of(self, cases: list[str], target: str) -> NDArray[np.float32]:
        """Labels [N, classes] of ``cases``, NaN where not labelled."""
        classes = next(own.classes for own in self.tasks.classification if own.name == target)
        unknown = np.full(len(classes), np.nan, dtype=np.float32)
        return np.stack([self.class_labels[target].get(case, unknown) for case in cases])

    def presences(self, cases: Collection[str]) -> list[Presence]:
        """Which classes of each target these cases have."""
        own: list[Presence] = []
        for target in self.tasks.classification:
            labels = self.class_labels[target.name]
            known = {case: labels[case] for case in cases if case in labels and not np.isnan(labels[case]).all()}
            own.append(Presence(f"{target.file}, {target.name}", target.classes, known, target.multilabel))
        if self.tasks.detection is not None:
            detection = self.tasks.detection
            own.append(Presence.of_boxes(detection.file, detection.classes, self.boxes or {}, cases))
        return own

    def loader(
        self,
        stock: nnUNetDataLoader,
        labels: Mapping[str, Any],
        transpose_forward: list[int],
        settings: TaskSettings,
        *,
        training: bool,
    ) -> TaskLoader:
        """The loader that also carries the tasks' labels.

        Args:
            stock: A loader over the stock dataset; it is left unusable.
            labels: ``labels`` of dataset.json.
            transpose_forward: From the plans.
            settings: Whether classes are balanced, and how much of an object must be visible.
            training: Draw classes in balance, if the settings say so.
        """
        dataset = stock._data
        stock._data = TaskDataset(dataset, self.tasks, labels, transpose_forward, self.class_labels, self.boxes)
        probabilities = None
        if training and settings.balance == "sampling" and self.tasks.classification:
            first = self.tasks.classification[0]
            probabilities = case_probabilities(
                dataset.identifiers, self.class_labels[first.name], first.multilabel, self.groups
            )
        return TaskLoader.from_stock(stock, probabilities, settings.minimum_visible)
