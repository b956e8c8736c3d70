"""A member: one nnU-Net dataset, one plans file, one configuration, as stock nnU-Net sees them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.spaces.channels import channel_names
from nnunet_kd.spaces.labels import LabelSpace


def dataset_name(name_or_id: str | int) -> str:
    """Full dataset name of an id or name.

    Raises:
        JointDatasetError: No dataset, or more than one, has this id.
    """
    text = str(name_or_id)
    if re.fullmatch(r"Dataset\d{3}_.+", text):
        return text
    if not re.fullmatch(r"\d{1,3}", text):
        raise JointDatasetError(f"'{text}' is neither a dataset id (301) nor a dataset name (Dataset301_Name).")
    candidates = [str(candidate) for candidate in find_candidate_datasets(int(text))]
    if not candidates:
        unset = [name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results") if name not in os.environ]
        hint = f" (not set: {', '.join(unset)})" if unset else ""
        raise JointDatasetError(
            f"There is no dataset with id {text} in nnUNet_raw, nnUNet_preprocessed or nnUNet_results. Check the id "
            f"and the three environment variables{hint}."
        )
    if len(candidates) > 1:
        raise JointDatasetError(f"Several datasets have the id {text}: {', '.join(candidates)}. Rename all but one.")
    return candidates[0]


def read_json(path: Path, what_to_do: str) -> Any:
    """Read a JSON file; a missing or broken file is a JointDatasetError that says what to do."""
    if not path.is_file():
        raise JointDatasetError(f"{path} does not exist. {what_to_do}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise JointDatasetError(f"{path} is not UTF-8 ({error}). Save it with the encoding UTF-8.") from error
    except json.JSONDecodeError as error:
        raise JointDatasetError(f"{path} is not valid JSON ({error}). {what_to_do}") from error


@dataclass(frozen=True)
class Member:
    """One dataset under one plans file and one configuration. Everything is read when first asked for.

    ``description`` holds ``plans`` and ``dataset_json`` as recorded; None reads them from the dataset's folder.
    """

    name: str
    plans_name: str
    configuration: str
    description: Mapping[str, Any] | None = None

    @property
    def base_folder(self) -> Path:
        """The dataset's folder in nnUNet_preprocessed."""
        return Path(str(nnUNet_preprocessed)) / self.name

    @cached_property
    def plans(self) -> dict[str, Any]:
        """The plans as plain JSON types."""
        if self.description is not None:
            return self.description["plans"]
        command = f"Run: nnUNetv2_plan_and_preprocess -d {self.name[7:10]}"
        return read_json(self.base_folder / f"{self.plans_name}.json", command)

    @cached_property
    def plans_manager(self) -> PlansManager:
        """Stock view of the plans."""
        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> ConfigurationManager:
        """Stock view of the configuration.

        Raises:
            JointDatasetError: The plans have no such configuration.
        """
        if self.configuration not in self.plans["configurations"]:
            available = ", ".join(self.plans["configurations"])
            raise JointDatasetError(
                f"{self.name} has no configuration {self.configuration} in {self.plans_name} (it has {available}). "
                f"Choose another configuration, or leave this member out."
            )
        return self.plans_manager.get_configuration(self.configuration)

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """The dataset.json beside the plans."""
        if self.description is not None:
            return self.description["dataset_json"]
        command = f"Run: nnUNetv2_plan_and_preprocess -d {self.name[7:10]}"
        return read_json(self.base_folder / "dataset.json", command)

    @cached_property
    def label_manager(self) -> LabelManager:
        """Stock view of the labels."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    @cached_property
    def label_space(self) -> LabelSpace:
        """The classes in the order of the output channels."""
        return LabelSpace.from_dataset_json(self.dataset_json)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the image channels in their order."""
        return channel_names(self.dataset_json)

    @property
    def data_folder(self) -> Path:
        """The folder of the preprocessed cases."""
        return self.base_folder / self.configuration_manager.data_identifier

    @cached_property
    def dataset_class(self) -> type[nnUNetBaseDataset]:
        """Stock dataset class of the preprocessed cases.

        Raises:
            JointDatasetError: The folder is missing or empty.
        """
        if not self.data_folder.is_dir() or not any(self.data_folder.iterdir()):
            raise JointDatasetError(
                f"{self.name} has no preprocessed images for {self.configuration} in {self.data_folder}. Run: "
                f"nnUNetv2_preprocess -d {self.name[7:10]} -plans_name {self.plans_name} -c {self.configuration}"
            )
        return infer_dataset_class(str(self.data_folder))

    @cached_property
    def identifiers(self) -> tuple[str, ...]:
        """All preprocessed cases, sorted."""
        return tuple(sorted(self.dataset_class.get_identifiers(str(self.data_folder))))

    @property
    def splits_file(self) -> Path:
        """The dataset's own splits_final.json."""
        return self.base_folder / "splits_final.json"

    def state(self, cases: Sequence[str] | None = None) -> dict[str, str]:
        """Short hashes of everything that joint plans depend on: plans, dataset.json, cases, splits.

        Args:
            cases: All cases, where they are not preprocessed yet.
        """
        splits = json.loads(self.splits_file.read_text()) if self.splits_file.is_file() else None
        return {
            **self.planned_state(),
            "cases": _hash(sorted(self.identifiers if cases is None else cases)),
            "splits": _hash(splits),
        }

    def planned_state(self) -> dict[str, str]:
        """The part of the state that a network's meaning depends on: plans and dataset.json."""
        plans = {key: value for key, value in self.plans.items() if key != "configurations"}
        tasks = Tasks.from_dataset_json(self.dataset_json)
        meaning = [] if tasks.is_segmentation_only else [tasks.meaning]
        return {
            "plans": _hash([plans, self.configuration_manager.configuration]),
            "dataset.json": _hash([self.dataset_json["labels"], list(self.channel_names), *meaning]),
        }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
