"""What the commands of nnU-Net do not do: link raw datasets, write the splits of a protocol, link test images."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_kd.data.splits import member_splits
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.files import write_json
from nnunet_kd.leaderboard.definitions import Dataset, Recipe, Splits
from nnunet_kd.leaderboard.plan import folders_environment, inputs_folder, nnunet_folder
from nnunet_kd.leaderboard.recipe import raw_source
from nnunet_kd.leaderboard.yaml_lines import RecipeError
from nnunet_kd.settings import BLOCK

SPLITS_FILE = "splits_final.json"


def prepare(recipe: Recipe, name: str, out: Path, inputs: str | None) -> None:
    """The command ``prepare`` of a plan.

    Args:
        recipe: The recipe.
        name: Key of the dataset.
        out: The output folder.
        inputs: None prepares the dataset, "all" or "fold_F" links the images of a test set.

    Raises:
        NnUNetKDError: The dataset is unknown, or see :func:`prepare_dataset` and :func:`link_inputs`.
    """
    if name not in recipe.datasets:
        raise RecipeError(f"The recipe has no dataset '{name}'. It has: {', '.join(recipe.datasets)}.")
    if inputs is None:
        prepare_dataset(recipe, name, out)
        return
    fold = inputs.removeprefix("fold_")
    if inputs != "all" and not fold.isdigit():
        raise RecipeError(f"--inputs {inputs} is not possible. Give all, or fold_F.")
    number = None if inputs == "all" else int(fold)
    link_inputs(recipe, name, number, inputs_folder(out, recipe.datasets[name], number))


def prepare_dataset(recipe: Recipe, name: str, out: Path) -> None:
    """Link the raw dataset into the output folder, where the recipe has ``raw``, and write the splits of a protocol.

    Raises:
        RecipeError: The dataset does not exist, or has other splits already.
    """
    dataset = recipe.datasets[name]
    if recipe.raw is not None:
        raw = Path(nnunet_folder(recipe, out, "nnUNet_raw"))
        _link_raw(dataset, raw_source(recipe) / dataset.folder, raw / dataset.folder)
    if dataset.splits is not None:
        _write_splits(dataset, recipe, out)


def link_inputs(recipe: Recipe, name: str, fold: int | None, folder: Path) -> None:
    """Link the images of a test set: all training cases of a dataset, or the validation cases of a fold.

    Raises:
        NnUNetKDError: The images or the fold do not exist.
    """
    dataset = recipe.datasets[name]
    reference = ReferenceDataset.open(dataset.folder)
    raw = Path(nnunet_folder(recipe, folder.parents[2], "nnUNet_raw")) / dataset.folder
    if not raw.is_dir():
        raise RecipeError(f"{raw} does not exist. Its images are a test set of the recipe.")
    images = {case: files["images"] for case, files in get_filenames_of_train_images_and_targets(str(raw)).items()}
    cases = sorted(images)
    if fold is not None:
        _write_missing_splits(dataset, reference, cases)
        cases = reference.validation_cases(fold)
    folder.mkdir(parents=True, exist_ok=True)
    ending = reference.dataset_json["file_ending"]
    for case in cases:
        for channel, image in enumerate(images[case]):
            _link(Path(image).resolve(), folder / f"{case}_{channel:04d}{ending}")


def _link_raw(dataset: Dataset, source: Path, target: Path) -> None:
    """A raw folder that shares the files, and declares the tasks of the recipe alone."""
    if not (source / "dataset.json").is_file():
        raise RecipeError(
            f"{source / 'dataset.json'} does not exist. Put {dataset.folder} there, or correct the recipe."
        )
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.name != "dataset.json":
            _link(entry.resolve(), target / entry.name)
    description = json.loads((source / "dataset.json").read_text())
    declared = description.get(BLOCK, {}).get("tasks", {"segmentation": True})
    missing = [task for task in dataset.tasks if not declared.get(task)]
    if missing:
        raise RecipeError(f"{source / 'dataset.json'} declares no {missing[0]}, which the recipe asks for.")
    if BLOCK in description:
        tasks = {task: value for task, value in declared.items() if task in dataset.tasks}
        description[BLOCK]["tasks"] = {"segmentation": False, **tasks}
    write_json(target / "dataset.json", description)


def _link(source: Path, target: Path) -> None:
    if target.is_symlink() and target.resolve() != source:
        raise RecipeError(
            f"{target} is linked to {target.resolve()}, and the recipe's 'raw' is {source.parent.parent} now. Results "
            f"of two sources must not meet: choose another -o."
        )
    if not target.exists():
        target.symlink_to(source, target_is_directory=source.is_dir())


def _write_splits(dataset: Dataset, recipe: Recipe, out: Path) -> None:
    """The protocol's only fold."""
    variable = folders_environment(recipe, out).get("nnUNet_preprocessed") or os.environ["nnUNet_preprocessed"]
    file = Path(variable) / dataset.folder / SPLITS_FILE
    if not isinstance(dataset.splits, Splits):
        if not file.is_file():
            raise RecipeError(
                f"{file} does not exist. The recipe has no lists of cases for {dataset.folder}: make the file from "
                f"those of the protocol's authors."
            )
        return
    reference = ReferenceDataset.open(dataset.folder)
    cases, left_out = reference.segmented_cases(), {*dataset.splits.validation, *dataset.splits.left_out}
    unknown = [case for case in dataset.splits.validation if case not in cases]
    if unknown:
        raise RecipeError(
            f"{dataset.folder} has no case {', '.join(unknown)}. Rename its cases as the recipe has them."
        )
    split = {"train": [case for case in cases if case not in left_out], "val": list(dataset.splits.validation)}
    if file.is_file() and json.loads(file.read_text()) != [split]:
        raise RecipeError(
            f"{file} exists and differs from the protocol. Move it away, or copy the dataset to another id."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [split])


def _write_missing_splits(dataset: Dataset, reference: ReferenceDataset, cases: list[str]) -> None:
    """The folds that stock training would make, where there are none yet."""
    file = Path(os.environ["nnUNet_preprocessed"]) / dataset.folder / SPLITS_FILE
    if not file.is_file():
        write_json(file, member_splits(cases, None, reference.groups() or None))
