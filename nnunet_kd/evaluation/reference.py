"""A dataset with references, wherever its files are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunet_kd.data.member import dataset_name, read_json
from nnunet_kd.data.splits import Split, read_groups, read_splits
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import NnUNetKDError


@dataclass(frozen=True)
class ReferenceDataset:
    """A dataset with references.

    Attributes:
        name: Name of its folder.
        folders: Where its files are looked for, in this order: the given folder, and the dataset's folders in
            nnUNet_preprocessed and nnUNet_raw.
        dataset_json: Its dataset.json.
        tasks: What it has labels for.
    """

    name: str
    folders: tuple[Path, ...]
    dataset_json: Mapping[str, Any]
    tasks: Tasks

    @classmethod
    def open(cls, reference: str) -> ReferenceDataset:
        """Open a raw or preprocessed dataset folder, or a dataset id or name that nnU-Net's folders have.

        Raises:
            NnUNetKDError: There is no such dataset, or its dataset.json is missing or broken or lacks ``file_ending``.
        """
        given = [Path(reference).resolve()] if Path(reference).is_dir() else []
        name = given[0].name if given else dataset_name(reference)
        roots = [Path(str(root)) for root in (nnUNet_preprocessed, nnUNet_raw) if root.is_set()]
        known = [folder.resolve() for folder in (root / name for root in roots) if folder.is_dir()]
        folders = tuple(dict.fromkeys([*given, *known]))
        if not folders:
            raise NnUNetKDError(
                f"{reference} is neither a folder nor a dataset in nnUNet_preprocessed or nnUNet_raw. Give with -ref a "
                f"raw or preprocessed dataset folder, or a dataset id."
            )
        file = _find(folders, ("dataset.json",)) or folders[0] / "dataset.json"
        dataset_json = read_json(file, "Give with -ref a raw or preprocessed dataset folder, or a dataset id.")
        ending = dataset_json.get("file_ending") if isinstance(dataset_json, dict) else None
        if not isinstance(ending, str) or not ending:
            raise NnUNetKDError(
                f"{file} has no 'file_ending', so that references cannot be found. Add the one of the images and "
                f'segmentations, for example "file_ending": ".nii.gz".'
            )
        return cls(name, folders, dataset_json, Tasks.from_dataset_json(dataset_json))

    def file(self, name: str) -> Path:
        """A file of the dataset.

        Raises:
            NnUNetKDError: No folder has it.
        """
        found = _find(self.folders, (name,))
        if found is None:
            searched = " nor in ".join(str(folder) for folder in self.folders)
            raise NnUNetKDError(f"{name} of {self.name} is not in {searched}. Put it there, or give another -ref.")
        return found

    @property
    def segmentation_folder(self) -> Path | None:
        """``gt_segmentations`` or ``labelsTr``; None if there is neither."""
        return _find(self.folders, ("gt_segmentations", "labelsTr"))

    def segmented_cases(self) -> list[str]:
        """Cases with a reference segmentation, sorted."""
        return _stems(self.segmentation_folder, self.dataset_json["file_ending"])

    def cases(self) -> set[str]:
        """All training cases, also those without any label."""
        images = _stems(_find(self.folders, ("imagesTr",)), self.dataset_json["file_ending"])
        with_image = {image.rpartition("_")[0] for image in images}  # without the channel number
        return with_image | set(self.segmented_cases()) | set(self.dataset_json.get("dataset", {}))

    def groups(self) -> dict[str, str]:
        """Case to group by ``split_by``; empty without it.

        Raises:
            NnUNetKDError: The file or the column is missing, or the file cannot be read.
        """
        if self.tasks.split_by is None:
            return {}
        return read_groups(self.file(self.tasks.groups_file), self.tasks.split_by)

    def validation_cases(self, fold: int) -> list[str]:
        """Validation cases of a fold of splits_final.json.

        Raises:
            NnUNetKDError: There is no such file or fold.
        """
        return sorted(self._split(fold)["val"])

    def training_cases(self, fold: int) -> list[str]:
        """Training cases of a fold of splits_final.json; raises as :meth:`validation_cases`."""
        return sorted(self._split(fold)["train"])

    def _split(self, fold: int) -> Split:
        file = self.file("splits_final.json")
        splits = read_splits(file)
        if not 0 <= fold < len(splits):
            raise NnUNetKDError(f"{file} has no fold {fold}. Its folds are 0 to {len(splits) - 1}.")
        return splits[fold]


def _find(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def _stems(folder: Path | None, file_ending: str) -> list[str]:
    files = [] if folder is None else folder.glob(f"*{file_ending}")
    return sorted(file.name[: -len(file_ending)] for file in files)
