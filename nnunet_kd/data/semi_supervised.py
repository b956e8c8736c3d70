"""Batches of labelled and unlabelled samples, each from its own stock loader (our design)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray
from torch import Tensor

from nnunet_kd.data.patch_places import PatchPlaces

OUTSIDE = -1  # nnU-Net's label of voxels that are not part of the image


class _Outside:
    """Of a segmentation [1, *S] only where the image ends; what nnU-Net cuts out of it is read, and nothing else."""

    dtype = np.dtype(np.int16)

    def __init__(self, segmentation: Any) -> None:
        self.shape = segmentation.shape
        self._segmentation = segmentation

    def __getitem__(self, place: Any) -> NDArray[np.int16]:
        return np.where(self._segmentation[place] < 0, np.int16(OUTSIDE), np.int16(0))


class UnlabeledImages:
    """The images of preprocessed cases, as a dataset of nnU-Net without any labels.

    Args:
        folders: Folder to its cases.
    """

    def __init__(self, folders: Mapping[Path, Sequence[str]]) -> None:
        self._source: dict[str, Any] = {}
        self.folder_of: dict[str, Path] = {}
        for folder, cases in folders.items():
            if not cases:
                continue
            self._source |= dict.fromkeys(cases, infer_dataset_class(str(folder))(str(folder), list(cases)))
            self.folder_of |= dict.fromkeys(cases, folder)
        self.identifiers = list(self._source)

    def load_case(self, case: str) -> tuple[Any, Any, None, dict[str, Any]]:
        """Image [C, *S]; of the segmentation [1, *S] only where the image ends; nothing else.

        Stock transforms need to know where the image ends if it was normalised inside that mask.
        """
        image, segmentation, _, _ = self._source[case].load_case(case)
        return image, _Outside(segmentation), None, {"class_locations": {}}


class SemiSupervisedLoader(SlimDataLoaderBase):
    """Joins the batches of a labelled and an unlabelled loader; the labelled samples come first.

    Args:
        labeled: Stock loader of the labelled cases; its batch size becomes ``num_labeled``.
        images: Of the unlabelled ones, which get the same patches and augmentation.
        num_labeled: Labelled samples per batch.
        num_unlabeled: Unlabelled ones.
        label_manager: Stock nnU-Net's.
        look_up: What else the batch holds: cases, places of their patches (see ``patch_places.py``) and the patch's
            shape to named tensors. None: nothing.
    """

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        images: UnlabeledImages,
        num_labeled: int,
        num_unlabeled: int,
        label_manager: LabelManager,
        look_up: Callable[[Sequence[str], Tensor, Sequence[int]], dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(None, num_labeled + num_unlabeled, 1)
        first = 1 if labeled.patch_size_was_2d else 0
        self.labeled = labeled
        # stock nnU-Net oversamples the foreground in the last third of a batch, rounded; half of a batch gets the same
        # share, by chance
        if labeled.get_do_oversample != labeled._probabilistic_oversampling:
            forced = sum(labeled.get_do_oversample(sample) for sample in range(labeled.batch_size))
            labeled.oversample_foreground_percent = forced / labeled.batch_size
        labeled.get_do_oversample = labeled._probabilistic_oversampling
        labeled.batch_size = num_labeled
        self.unlabeled = nnUNetDataLoader(
            images,
            num_unlabeled,
            labeled.patch_size[first:],
            labeled.final_patch_size[first:],
            label_manager,
            transforms=labeled.transforms,
        )
        self.unlabeled.has_ignore = False  # else patches would be drawn where there are labels
        self.look_up = look_up
        if look_up is not None:
            self.places = [PatchPlaces(loader) for loader in (self.labeled, self.unlabeled)]

    def generate_train_batch(self) -> dict[str, Any]:
        """A batch; the targets of unlabelled samples are nnU-Net's background and mean nothing."""
        parts = [loader.generate_train_batch() for loader in (self.labeled, self.unlabeled)]
        targets = [part["target"] for part in parts]
        several = isinstance(targets[0], list)
        batch: dict[str, Any] = {
            "data": torch.cat([part["data"] for part in parts]),
            "target": [torch.cat(level) for level in zip(*targets, strict=True)] if several else torch.cat(targets),
            "keys": [key for part in parts for key in part["keys"]],
        }
        if self.look_up is not None:
            places = torch.cat([own.take() for own in self.places])
            batch |= self.look_up(batch["keys"], places, batch["data"].shape[2:])
        return batch
