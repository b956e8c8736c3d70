"""Read a recipe; every mistake is an error that names the line."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from nnunet_kd.errors import SettingsError
from nnunet_kd.leaderboard.definitions import Dataset, Method, Recipe
from nnunet_kd.leaderboard.metrics import METRICS, task_of
from nnunet_kd.leaderboard.trainers import known_trainers
from nnunet_kd.leaderboard.yaml_lines import RecipeError, YamlFile
from nnunet_kd.settings import merge, parse_as, parse_settings

NAME = re.compile(r"[A-Za-z0-9_-]+")
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
SEED = "$seed"
NUM_FOLDS = 5  # of the splits that nnU-Net makes


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.

    Raises:
        RecipeError: Unknown key, dataset, method, trainer or metric, a setting out of range, a row without source and
            the like; names the line.
    """
    file = YamlFile(path)
    try:
        recipe: Recipe = parse_as(Recipe, file.values, "")
    except SettingsError as error:
        raise file.located(str(error).replace("Unknown setting", "Unknown key")) from error
    _check_names(recipe, file)
    _check_datasets(recipe, file)
    _check_joints(recipe, file)
    _check_methods(recipe, file)
    _check_run_names(recipe, file)
    _check_settings(recipe, file)
    _check_metrics(recipe, file)
    _check_reference(recipe, file)
    return recipe


def check_data(recipe: Recipe, path: Path) -> None:
    """Require that the datasets exist: in the recipe's raw folder, else raw or preprocessed.

    Args:
        recipe: The recipe.
        path: Its file, whose line an error names.

    Raises:
        RecipeError: One does not exist.
    """
    file = YamlFile(path)
    if recipe.raw is None:
        roots = [Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed") if name in os.environ]
    else:
        try:
            roots = [raw_source(recipe)]
        except RecipeError as error:
            raise file.error_at("raw", str(error)) from error
    for name, dataset in recipe.datasets.items():
        if not any((root / dataset.folder).is_dir() for root in roots):
            searched = " nor in ".join(map(str, roots)) or "nnUNet_raw, which is not set"
            raise file.error_at(
                f"datasets.{name}",
                f"{dataset.folder} is not in {searched}. Convert or link it there, or correct the recipe.",
            )
        own = [root / dataset.folder / "splits_final.json" for root in roots]
        splits = next((json.loads(path.read_text()) for path in own if path.is_file()), None)
        number = NUM_FOLDS if splits is None or dataset.splits is not None else len(splits)
        for index, fold in enumerate(recipe.folds):
            if fold >= number:  # nnU-Net would divide the cases at random
                raise file.error_at(
                    f"folds[{index}]", f"{dataset.folder} has the folds 0 to {number - 1}, not {fold}. Correct 'folds'."
                )


def raw_source(recipe: Recipe) -> Path:
    """The folder that ``raw`` means.

    Raises:
        RecipeError: It names a variable that is not set, or no folder.
    """
    path = os.path.expandvars(str(recipe.raw))
    if "$" in path:
        raise RecipeError(f"'raw' of the recipe is {recipe.raw}, and that variable is not set. Export it.")
    if not Path(path).expanduser().is_dir():
        raise RecipeError(f"'raw' of the recipe is {path}, which is no folder. Name the folder of the raw datasets.")
    return Path(path).expanduser()


def methods_in_order(recipe: Recipe) -> list[str]:
    """The methods, teachers before their students.

    Raises:
        CycleError: Two methods teach each other.
    """
    graph = {name: list(method.teachers.values()) for name, method in recipe.methods.items()}
    return list(TopologicalSorter(graph).static_order())


def datasets_of(recipe: Recipe, method: Method) -> list[str]:
    """The datasets for which a method has lines: those that it names, else all, of a joint teacher all members."""
    available = list(recipe.datasets)
    if method.on_joints:
        members = {member for joint in method.on_joints for member in recipe.joints[joint].members}
        available = [name for name in available if name in members]
    return [name for name in available if method.datasets is None or name in method.datasets]


def configurations_of(recipe: Recipe, group: str) -> list[str]:
    """Configurations of a dataset, or of a joint dataset, whose members agree."""
    joint = recipe.joints.get(group)
    own = recipe.datasets[group if joint is None else joint.members[0]].configurations
    return recipe.configurations if own is None else own


def settings_of(recipe: Recipe, dataset: Dataset | None, method: Method, seed: int) -> dict[str, Any]:
    """Settings of a run without its teachers: recipe, budget, dataset (None: a joint dataset), method, seed."""
    layers = [recipe.settings, {"training": recipe.budget}, {} if dataset is None else dataset.settings]
    merged: dict[str, Any] = {}
    for layer in (*layers, method.settings, {"training": {"seed": seed}}):
        merged = merge(merged, layer)
    return _with_seed(merged, seed)


def _with_seed(value: Any, seed: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_seed(own, seed) for key, own in value.items()}
    if isinstance(value, list):
        return [_with_seed(own, seed) for own in value]
    return seed if value == SEED else value


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_names(recipe: Recipe, file: YamlFile) -> None:
    """Names become folders; lists must name something."""
    for kind, entries in (("datasets", recipe.datasets), ("methods", recipe.methods), ("joints", recipe.joints)):
        for name in entries:
            _check_name(name, f"{kind}.{name}", file)
    for name, dataset in recipe.datasets.items():
        for test in dataset.tests:
            _check_name(test, f"datasets.{name}.tests.{test}", file)
    _check_name(recipe.name, "name", file)
    for kind, titled in (("datasets", recipe.datasets), ("methods", recipe.methods)):
        shown: dict[str, str] = {}
        for name, entry in titled.items():  # tables are made by what is shown
            other = shown.setdefault(entry.title or name, name)
            if other != name:
                message = f"'{kind}.{name}' is shown as '{entry.title or name}', as '{other}' is"
                raise file.error_at(f"{kind}.{name}", f"{message}. Give it a 'title' of its own.")
    both = sorted(set(recipe.datasets) & set(recipe.joints))
    if both:
        raise file.error_at(f"joints.{both[0]}", f"'{both[0]}' is a dataset and a joint dataset. Rename one.")
    _check_lists(recipe, file)
    for key in ("folds", "seeds"):
        for index, value in enumerate(getattr(recipe, key)):
            if value < 0:
                raise file.error_at(f"{key}[{index}]", f"'{key}' has {value}; it must not be negative.")
    lists = {"": recipe.configurations}
    lists |= {f"datasets.{name}.": own.configurations or [] for name, own in recipe.datasets.items()}
    for where, configurations in lists.items():
        for index, configuration in enumerate(configurations):
            _known(configuration, CONFIGURATIONS, "configuration", f"{where}configurations[{index}]", file)


def _check_lists(recipe: Recipe, file: YamlFile) -> None:
    """Lists name something, and nothing twice; a list that may be left out is null then."""
    keys = ("datasets", "methods", "configurations", "metrics", "folds", "seeds")
    lists: dict[str, list[Any] | None] = {key: list(getattr(recipe, key)) for key in keys}
    for name, dataset in recipe.datasets.items():
        lists |= {f"datasets.{name}.tasks": [*dataset.tasks], f"datasets.{name}.configurations": dataset.configurations}
    lists |= {f"joints.{name}.members": joint.members for name, joint in recipe.joints.items()}
    for name, method in recipe.methods.items():
        lists |= {f"methods.{name}.datasets": method.datasets, f"methods.{name}.on_joints": method.on_joints or None}
    for index, reference in enumerate(recipe.reference):
        where = f"reference[{index}]"
        lists |= {f"{where}.datasets": reference.datasets, f"{where}.metrics": reference.metrics}
        lists |= {f"{where}.rows": list(reference.rows)}
    for where, values in lists.items():
        if values is None:
            continue
        if not values:
            raise file.error_at(where, f"'{where}' is empty. Name at least one.")
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            raise file.error_at(where, f"'{where}' names {repeated[0]} twice. Leave one.")


def _check_run_names(recipe: Recipe, file: YamlFile) -> None:
    """Jobs, logs and records are named DATASET_METHOD, which 'a' and 'b_c', 'a_b' and 'c' share."""
    first: dict[str, tuple[str, str]] = {}
    for method, own in recipe.methods.items():
        for group in own.on_joints or datasets_of(recipe, own):
            name = f"{group}_{method}"
            other = first.setdefault(name, (group, method))
            if other != (group, method):
                raise file.error_at(
                    f"methods.{method}",
                    f"'{method}' on '{group}' and '{other[1]}' on '{other[0]}' are both called '{name}'. Rename one.",
                )


def _check_name(name: str, where: str, file: YamlFile) -> None:
    if not NAME.fullmatch(name) or "__" in name:
        raise file.error_at(where, f"'{name}' becomes a folder: use letters, digits, '-' and '_' (no '__').")


def _check_datasets(recipe: Recipe, file: YamlFile) -> None:
    first: dict[int, Dataset] = {}
    for name, dataset in recipe.datasets.items():
        where = f"datasets.{name}"
        for key in ("name", "tasks", "splits"):
            if getattr(first.setdefault(dataset.id, dataset), key) != getattr(dataset, key):
                raise file.error_at(f"{where}.{key}", f"The dataset {dataset.id} has another '{key}' elsewhere.")
        if not 1 <= dataset.id <= 999:
            raise file.error_at(f"{where}.id", f"{dataset.id} is no dataset id: nnU-Net's have three digits.")
        if dataset.splits is not None and recipe.folds != [0]:
            raise file.error_at(f"{where}.splits", "'splits' make one fold: the recipe's 'folds' must be [0].")
        if not dataset.validation and not dataset.tests:
            raise file.error_at(f"{where}.validation", f"Without validation and tests, '{name}' has nothing to show.")
        if dataset.grid and (len(dataset.grid) != 3 or min(dataset.grid) < 1):
            raise file.error_at(f"{where}.grid", "'grid' must be three sizes in voxels, [z, y, x].")
        if dataset.tolerance_mm < 0:
            raise file.error_at(f"{where}.tolerance_mm", "'tolerance_mm' must not be negative.")
        for index, command in enumerate(dataset.preparation):
            if not command.startswith("nnUNet"):
                message = f"'{command}' is no command of nnU-Net or nnunet_kd."
                raise file.error_at(f"{where}.preparation[{index}]", message)
        for test_name, test in dataset.tests.items():
            here = f"{where}.tests.{test_name}"
            if (test.dataset is None) == (test.images is None) or (test.images is None) != (test.labels is None):
                raise file.error_at(here, "A test names either a 'dataset' or folders of 'images' and 'labels'.")
            if test.dataset is not None:
                _known(test.dataset, recipe.datasets, "dataset", f"{here}.dataset", file)


def _check_joints(recipe: Recipe, file: YamlFile) -> None:
    taken = {dataset.id: name for name, dataset in recipe.datasets.items()}
    for name, joint in recipe.joints.items():
        where = f"joints.{name}"
        if not 1 <= joint.id <= 999 or joint.id in taken:
            other = f", which is {taken[joint.id]}" if joint.id in taken else ""
            raise file.error_at(
                f"{where}.id", f"The joint dataset needs a free id from 1 to 999, not {joint.id}{other}."
            )
        taken[joint.id] = name
        if len(joint.members) < 2:
            raise file.error_at(f"{where}.members", "A joint dataset has at least two members.")
        for index, member in enumerate(joint.members):
            _known(member, recipe.datasets, "dataset", f"{where}.members[{index}]", file)
        if len({tuple(configurations_of(recipe, member)) for member in joint.members}) > 1:
            raise file.error_at(f"{where}.members", f"The members of '{name}' have different 'configurations'.")


def _check_methods(recipe: Recipe, file: YamlFile) -> None:
    trainers = known_trainers()
    _known(recipe.control, recipe.methods, "method", "control", file)
    for name, method in recipe.methods.items():
        where = f"methods.{name}"
        _known(method.trainer, trainers, "trainer", f"{where}.trainer", file)
        if method.plans is not None and "__" in method.plans:
            raise file.error_at(f"{where}.plans", f"'{method.plans}' is no plans name: nnU-Net's have no '__'.")
        for index, joint in enumerate(method.on_joints):
            _known(joint, recipe.joints, "joint dataset", f"{where}.on_joints[{index}]", file)
        for index, dataset in enumerate(method.datasets or ()):
            _known(dataset, recipe.datasets, "dataset", f"{where}.datasets[{index}]", file)
        for teacher, other in method.teachers.items():
            _known(other, recipe.methods, "method", f"{where}.teachers.{teacher}", file)
    try:
        methods_in_order(recipe)
    except CycleError as error:
        message = f"These methods teach each other in a circle: {' -> '.join(error.args[1])}."
        raise file.error_at(f"methods.{error.args[1][0]}.teachers", message) from error
    control = recipe.methods[recipe.control]
    if control.on_joints or not control.in_table:
        raise file.error_at("control", f"'{recipe.control}' cannot be the control: it must be in the table by itself.")
    for name, method in recipe.methods.items():
        for teacher, other in method.teachers.items():
            for dataset in datasets_of(recipe, method):
                _check_teacher(recipe, name, teacher, other, dataset, file)


def _check_teacher(recipe: Recipe, name: str, teacher: str, other: str, dataset: str, file: YamlFile) -> None:
    """Every student has one run of its teacher."""
    where, method = f"methods.{name}.teachers.{teacher}", recipe.methods[other]
    joints = [joint for joint in method.on_joints if dataset in recipe.joints[joint].members]
    if method.on_joints and len(joints) != 1:
        which = "none" if not joints else "several"
        message = (
            f"Of the joint datasets of '{other}', {which} has '{dataset}' as a member. Restrict 'datasets' of '{name}'."
        )
        raise file.error_at(where, message)
    if not method.on_joints and dataset not in datasets_of(recipe, method):
        raise file.error_at(where, f"'{other}' is not trained on '{dataset}'. Restrict 'datasets' of '{name}'.")


def _check_settings(recipe: Recipe, file: YamlFile) -> None:
    for name, method in recipe.methods.items():
        for dataset in [None] if method.on_joints else datasets_of(recipe, method):
            own = None if dataset is None else recipe.datasets[dataset]
            teachers = {"teachers": {teacher: {"model": "known later"} for teacher in method.teachers}}
            try:
                parse_settings(merge(settings_of(recipe, own, method, recipe.seeds[0]), teachers))
            except SettingsError as error:
                raise _located_setting(str(error), name, dataset, file) from error


def _located_setting(message: str, method: str, dataset: str | None, file: YamlFile) -> RecipeError:
    """The error at the last of the layers that has the key."""
    key = message.split("'")[1] if message.count("'") > 1 else ""
    layers = [f"methods.{method}.settings", f"datasets.{dataset}.settings", "settings"]
    places = [f"{layer}.{key}" for layer in layers] + [key.replace("training.", "budget.", 1)]
    where = next((place for place in places if file.has(place)), f"methods.{method}")
    return file.error_at(where, message)


def _check_metrics(recipe: Recipe, file: YamlFile) -> None:
    for index, name in enumerate(recipe.metrics):
        where = f"metrics[{index}]"
        _known(name, METRICS, "metric", where, file)
        able = [key for key, dataset in recipe.datasets.items() if task_of(METRICS[name]) in dataset.tasks]
        if not able:
            raise file.error_at(where, f"No dataset has the task of '{name}', {task_of(METRICS[name])}.")
        for key in able:
            if METRICS[name].kind == "resized_grid" and not recipe.datasets[key].grid:
                raise file.error_at(
                    f"datasets.{key}", f"'{name}' needs the 'grid' of the protocol, which '{key}' lacks."
                )


def _check_reference(recipe: Recipe, file: YamlFile) -> None:
    for index, reference in enumerate(recipe.reference):
        where = f"reference[{index}]"
        if not reference.source.strip():
            raise file.error_at(f"{where}.source", "'source' is empty. Say where these numbers were read.")
        for position, dataset in enumerate(reference.datasets):
            _known(dataset, recipe.datasets, "dataset", f"{where}.datasets[{position}]", file)
        for position, metric in enumerate(reference.metrics):
            _known(metric, METRICS, "metric", f"{where}.metrics[{position}]", file)
        for method, row in reference.rows.items():
            fits = len(row) == len(reference.datasets)
            if not fits or any(cell is not None and len(cell) != len(reference.metrics) for cell in row):
                raise file.error_at(
                    f"{where}.rows.{method}",
                    f"'{method}' must have a list of {len(reference.metrics)} numbers (null: not known) for each of "
                    f"{', '.join(reference.datasets)}.",
                )


def _known(name: str, known: Iterable[str], kind: str, where: str, file: YamlFile) -> None:
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names[:30])}."
    raise file.error_at(where, f"Unknown {kind} '{name}'. {hint}")
