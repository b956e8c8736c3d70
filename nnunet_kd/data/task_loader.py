"""nnU-Net's dataset and loader, whose batches also carry boxes and class labels (our design).

Stock nnU-Net draws the cases, crops and transforms; nothing of that is repeated here. A dataset without boxes and class
labels gives the stock batch, bit by bit.

Host behaviour relied on (nnunetv2 2.8): for each sample in turn ``generate_train_batch`` calls ``load_case`` of its
dataset, reads the crop from what that returned and calls its ``transforms``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from numpy.typing import NDArray

from nnunet_kd.data.box_geometry import to_preprocessed
from nnunet_kd.data.instances import MINIMUM_VISIBLE, InstanceMap, with_boxes
from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.data.tasks import Tasks

Case = tuple[Any, Any, Any, dict[str, Any]]
NO_BOXES = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 6)))  # of either dimension
LOCATIONS_PER_BOX = 100  # places for a crop's centre; equal for all boxes, so that a small one is found as often


class TaskDataset:
    """A stock dataset whose cases also have boxes and class labels.

    Args:
        dataset: The stock dataset.
        tasks: What the dataset declares.
        labels: ``labels`` of its dataset.json.
        transpose_forward: From its plans.
        class_labels: Target's name to case to [classes], as ``read_labels`` gives it, for each target to learn; a case
            that is missing is not labelled.
        boxes: Case to boxes in the stored image, as ``read_boxes`` gives it; a case that is missing has no box. None:
            boxes are not learned.
    """

    def __init__(
        self,
        dataset: nnUNetBaseDataset,
        tasks: Tasks,
        labels: Mapping[str, int | Sequence[int]],
        transpose_forward: Sequence[int],
        class_labels: Mapping[str, Mapping[str, NDArray[np.float32]]] | None = None,
        boxes: Mapping[str, CaseBoxes] | None = None,
    ) -> None:
        self.dataset = dataset
        self.tasks = tasks
        self.transpose_forward = tuple(transpose_forward)
        self.class_labels = dict(class_labels or {})
        self.boxes = boxes
        detected = () if tasks.detection is None else tasks.detection.classes
        self.mask_values = [_values(labels[name]) if tasks.segmentation and name in labels else () for name in detected]
        self._boxed = [set(values) for values in self.mask_values]

    @property
    def identifiers(self) -> list[str]:
        """The cases, as the stock dataset has them."""
        identifiers: list[str] = self.dataset.identifiers
        return identifiers

    @property
    def source_folder(self) -> str:
        """The folder of the preprocessed cases."""
        return str(self.dataset.source_folder)

    @property
    def box_dimension(self) -> int | None:
        """2 or 3; None where nothing tells it."""
        return next((boxes.boxes.shape[1] // 2 for boxes in (self.boxes or {}).values()), None)

    def __getitem__(self, identifier: str) -> Case:
        return self.load_case(identifier)

    def load_case(self, identifier: str) -> Case:
        """The stock case; with boxes its segmentation is an :class:`InstanceMap`.

        ``class_locations``, around which nnU-Net crops where a sample must have foreground: where the case has boxes,
        places in the boxes of each class take the place of the voxels of that class in the segmentation; those of
        other labels stay. None but boxes where the segmentation is a dummy.
        """
        image, segmentation, previous, properties = self.dataset.load_case(identifier)
        locations = properties["class_locations"]
        if not self.tasks.segmentation:
            locations = _annotated(locations)
        if self.boxes is not None:
            case_boxes = self.boxes.get(identifier, NO_BOXES)
            boxes = to_preprocessed(case_boxes.boxes, properties, self.transpose_forward, segmentation.shape[1:])
            segmentation = InstanceMap(segmentation, boxes, case_boxes.labels, self.mask_values)
            if len(segmentation) > 0:
                others = {key: voxels for key, voxels in locations.items() if set(_values(key)) not in self._boxed}
                locations = others | _places(segmentation)
        return image, segmentation, previous, {**properties, "class_locations": locations}

    def batch_labels(self, identifiers: Iterable[str]) -> dict[str, torch.Tensor]:
        """Target to float32 [B, classes] of these cases, NaN where not labelled."""
        cases = list(identifiers)
        batch = {}
        for target in self.tasks.classification:
            if target.name in self.class_labels:
                known, unknown = self.class_labels[target.name], np.full(len(target.classes), np.nan)
                rows = [known.get(case, unknown) for case in cases]
                batch[target.name] = torch.from_numpy(np.stack(rows).astype(np.float32))
        return batch


class TaskLoader(nnUNetDataLoader):
    """nnU-Net's loader over a :class:`TaskDataset`.

    A batch is the stock batch and, where the dataset has them,
    ``boxes``: list of B float32 tensors [N, 2 * dim], voxel edges in the patch, array order;
    ``box_labels``: list of B int64 tensors [N];
    ``class_labels``: target to float32 [B, classes], NaN where not labelled.

    Args:
        data: The dataset.
        args: As nnUNetDataLoader's.
        minimum_visible: Fraction of an instance that must be in the patch for its box to be there.
        kwargs: As nnUNetDataLoader's.

    Raises:
        NotImplementedError: The boxes are not of the configuration's dimension.
    """

    transforms: Any

    def __init__(self, data: TaskDataset, *args: Any, minimum_visible: float = MINIMUM_VISIBLE, **kwargs: Any) -> None:
        super().__init__(data, *args, **kwargs)
        self._follow(data, minimum_visible)

    @classmethod
    def from_stock(
        cls,
        loader: nnUNetDataLoader,
        sampling_probabilities: NDArray[np.float64] | None = None,
        minimum_visible: float = MINIMUM_VISIBLE,
    ) -> TaskLoader:
        """The loader that stock ``get_dataloaders`` built over a TaskDataset, with tasks.

        Args:
            loader: The stock loader; it is left as it is.
            sampling_probabilities: [cases] in the order of the dataset's identifiers; None draws cases equally.
            minimum_visible: As the constructor's.
        """
        own = cls.__new__(cls)
        own.__dict__.update(loader.__dict__)
        own.sampling_probabilities = sampling_probabilities
        own._follow(loader._data, minimum_visible)
        return own

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw a batch."""
        batch: dict[str, Any] = super().generate_train_batch()
        if isinstance(self._data, _Following):
            batch.update(self._data.take())
        class_labels = self.dataset.batch_labels(batch["keys"])
        if class_labels:
            batch["class_labels"] = class_labels
        return batch

    def _follow(self, dataset: TaskDataset, minimum_visible: float) -> None:
        self.dataset = dataset
        if dataset.boxes is None:
            return
        dimension = 2 if self.patch_size_was_2d else 3
        if dataset.box_dimension not in (None, dimension):
            raise NotImplementedError(
                f"The boxes of {dataset.source_folder} are {dataset.box_dimension}D and its patches are {dimension}D. "
                f"Boxes cannot be learned in a configuration of another dimension; choose a {dataset.box_dimension}D "
                f"configuration (2d for 2D images, 3d_fullres for 3D images)."
            )
        following = _Following(dataset, with_boxes(self.transforms, minimum_visible))
        self._data, self.transforms = following, following


class _Following:
    """Stands in for a loader's dataset and its transforms, to hand a case's instances on and to collect its boxes."""

    def __init__(self, dataset: TaskDataset, transforms: ComposeTransforms) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.instances: InstanceMap | None = None
        self.boxes: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def load_case(self, identifier: str) -> Case:
        case = self.dataset.load_case(identifier)
        self.instances = case[1]
        return case

    def __call__(self, **sample: torch.Tensor) -> dict[str, Any]:
        transformed: dict[str, Any] = self.transforms(**sample, instances=self.instances)
        self.boxes.append(transformed["boxes"])
        self.labels.append(transformed["box_labels"])
        return transformed

    def take(self) -> dict[str, list[torch.Tensor]]:
        """The boxes and labels collected since the last call."""
        batch: dict[str, list[torch.Tensor]] = {"boxes": _SmallTensors(self.boxes)}
        batch["box_labels"] = _SmallTensors(self.labels)
        self.instances, self.boxes, self.labels = None, [], []
        return batch


class _SmallTensors(list[torch.Tensor]):
    """A list of tensors that goes to another process by value and arrives as a plain list.

    torch would share the memory of each tensor, at the price of a file descriptor per tensor and a batch that waits; a
    worker's queue of 2D batches would run out of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _tensors, ([tensor.numpy() for tensor in self],)


def _tensors(arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _values(label: int | Sequence[int]) -> tuple[int, ...]:
    return (label,) if isinstance(label, int) else tuple(label)


def _annotated(locations: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entry that nnU-Net needs with an ignore label: all annotated voxels. Its key is a tuple with -1 first."""
    return {key: voxels for key, voxels in locations.items() if isinstance(key, tuple) and key[0] == -1}


def _places(instances: InstanceMap) -> dict[str, NDArray[np.int64]]:
    """Random voxels in the boxes of each class, [places, 4] (0, z, y, x) as nnU-Net stores them; always the same."""
    random = np.random.default_rng(0)
    places: dict[str, list[NDArray[np.int64]]] = {}
    for label, first, end in zip(instances.labels, instances.first, instances.end, strict=True):
        voxels = random.integers(first, end, size=(LOCATIONS_PER_BOX, len(first)))
        places.setdefault(f"boxes of class {label}", []).append(np.insert(voxels, 0, 0, axis=1))
    return {name: np.concatenate(voxels) for name, voxels in places.items()}
