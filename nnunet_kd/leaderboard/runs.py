"""The trainings of a recipe, where they are, and what is evaluated of them.

Variants must not overwrite each other, and nnU-Net names a model folder by trainer, plans and configuration alone. So
every dataset (or joint dataset), method and seed has an nnUNet_results of its own, ``OUT/results/DATASET/METHOD/
seed_S``, with nnU-Net's own folders in it: a stock command finds its model where that variable points, and a student is
told its teacher's folder in its settings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_kd.leaderboard.definitions import Dataset, Method, Recipe, Test
from nnunet_kd.leaderboard.recipe import configurations_of, datasets_of, methods_in_order, settings_of
from nnunet_kd.settings import merge

MEMBER_PLANS = "nnUNetKDPlans"  # what nnUNetKD_plan_and_preprocess writes for datasets with classes or boxes


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        group: Key of the dataset or joint dataset in the recipe.
        folder_name: nnU-Net's name of it.
        method: Key of the method.
        trainer: Its trainer.
        plans: Name of the plans.
        configuration: nnU-Net's.
        fold: nnU-Net's.
        seed: Of weights and batches.
        results: The folder that nnUNet_results names.
        settings: Without the models of the teachers.
        teachers: Name in the settings to the run that is the teacher.
        origin: How the data and the plans were made; part of the hash.
        validates: Whether nnU-Net's final validation belongs to a finished run.
    """

    group: str
    folder_name: str
    method: str
    trainer: str
    plans: str
    configuration: str
    fold: int
    seed: int
    results: Path
    settings: dict[str, Any]
    teachers: dict[str, Run]
    origin: dict[str, Any]
    validates: bool

    @property
    def name(self) -> str:
        """For jobs and messages."""
        return f"{self.group}_{self.method}_{self.configuration}_f{self.fold}_s{self.seed}"

    @property
    def model_folder(self) -> Path:
        """nnU-Net's model folder."""
        return self.results / self.folder_name / f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def fold_folder(self) -> Path:
        """nnU-Net's folder of the fold."""
        return self.model_folder / f"fold_{self.fold}"

    @property
    def full_settings(self) -> dict[str, Any]:
        """What the trainer is told: the settings with the folders of the teachers."""
        if not self.teachers:
            return self.settings
        models = {name: {"model": str(run.model_folder)} for name, run in self.teachers.items()}
        return merge(self.settings, {"teachers": models})

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on but the machine and where the files are, in JSON types."""
        content = {
            "dataset": self.folder_name,
            "trainer": self.trainer,
            "plans": self.plans,
            "configuration": self.configuration,
            "fold": self.fold,
            "settings": self.settings,
            "teachers": {name: run.hash for name, run in self.teachers.items()},
            "origin": self.origin,
        }
        return json.loads(json.dumps(content))

    @cached_property
    def hash(self) -> str:
        """Of the identity."""
        return hash_of(self.identity)


@dataclass(frozen=True)
class Evaluation:
    """What one run predicted for one line of the table.

    Attributes:
        run: The run.
        dataset: Key of the dataset whose line it is.
        test: Key of the test set; "" is the validation of the fold.
        predictions: Folder of the predictions.
        definition: Of the test set, in JSON types.
    """

    run: Run
    dataset: str
    test: str
    predictions: Path
    definition: dict[str, Any]

    @cached_property
    def hash(self) -> str:
        """Of the run and the test set."""
        return hash_of([self.run.hash, self.definition])

    @property
    def scores_file(self) -> Path:
        """The cached scores, beside the predictions."""
        return self.predictions.parent / f"leaderboard_{self.predictions.name}.csv"


def hash_of(content: Any) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def runs_of(recipe: Recipe, out: Path) -> list[Run]:
    """All trainings, teachers before their students."""
    made: dict[tuple[str, str, str, int, int], Run] = {}
    for name in methods_in_order(recipe):
        method = recipe.methods[name]
        for group in method.on_joints or datasets_of(recipe, method):
            for configuration in configurations_of(recipe, group):
                for fold in recipe.folds:
                    for seed in recipe.seeds:
                        place = (configuration, fold, seed)
                        teachers = {
                            teacher: made[(_group_of_teacher(recipe, other, group), other, *place)]
                            for teacher, other in method.teachers.items()
                        }
                        made[(group, name, *place)] = _run(recipe, out, group, name, *place, teachers)
    return list(made.values())


def evaluations_of(recipe: Recipe, runs: list[Run]) -> list[Evaluation]:
    """What the table is made of, a joint teacher's heads included."""
    result = []
    for run in runs:
        method = recipe.methods[run.method]
        if not method.in_table:
            continue
        for name in trained_datasets(recipe, run):
            dataset = recipe.datasets[name]
            folder = run.fold_folder / dataset.folder if method.on_joints else run.fold_folder
            if dataset.validation:
                result.append(Evaluation(run, name, "", folder / "validation", {}))
            for key, test in dataset.tests.items():
                other = dataset if test.dataset is None else recipe.datasets[test.dataset]
                definition = {**asdict(test), "dataset": other.folder}
                result.append(Evaluation(run, name, key, folder / f"test_{key}", definition))
    return result


def trained_datasets(recipe: Recipe, run: Run) -> list[str]:
    """The datasets whose lines a run has."""
    method = recipe.methods[run.method]
    if not method.on_joints:
        return [run.group]
    members = recipe.joints[run.group].members
    return [name for name in datasets_of(recipe, method) if name in members]


def test_of(recipe: Recipe, evaluation: Evaluation) -> Test | None:
    """The test set; None for a validation."""
    return recipe.datasets[evaluation.dataset].tests.get(evaluation.test)


def plans_of(recipe: Recipe, group: str, method: Method) -> str:
    """The plans that a method is trained with."""
    if method.plans is not None:
        return method.plans
    if group in recipe.joints:
        return recipe.joints[group].plans
    if recipe.plans.student is not None:
        return recipe.plans.student.name
    if recipe.datasets[group].is_segmentation_only:
        return recipe.plans.base
    joint = next((joint for joint in recipe.joints.values() if group in joint.members), None)
    return MEMBER_PLANS if joint is None else joint.plans


def _group_of_teacher(recipe: Recipe, method: str, dataset: str) -> str:
    joints = recipe.methods[method].on_joints
    return next((joint for joint in joints if dataset in recipe.joints[joint].members), dataset)


def _run(
    recipe: Recipe,
    out: Path,
    group: str,
    name: str,
    configuration: str,
    fold: int,
    seed: int,
    teachers: dict[str, Run],
) -> Run:
    method = recipe.methods[name]
    joint, dataset = recipe.joints.get(group), recipe.datasets.get(group)
    members = [recipe.datasets[member] for member in joint.members] if joint is not None else []
    described = [dataset] if dataset is not None else members
    origin: dict[str, Any] = {"plans": asdict(recipe.plans), "data": [data_of(own) for own in described]}
    if joint is not None:
        origin["joint"] = {"width": joint.width, "heads": joint.heads}
    folder_name = joint.folder if joint is not None else described[0].folder
    return Run(
        group=group,
        folder_name=folder_name,
        method=name,
        trainer=method.trainer,
        plans=plans_of(recipe, group, method),
        configuration=configuration,
        fold=fold,
        seed=seed,
        results=out / "results" / group / name / f"seed_{seed}",
        settings=settings_of(recipe, dataset, method, seed),
        teachers=teachers,
        origin=origin,
        validates=method.in_table,
    )


def data_of(dataset: Dataset) -> dict[str, Any]:
    """What a dataset's plans and preprocessed data depend on, in JSON types."""
    content = asdict(dataset)
    return {key: content[key] for key in ("id", "name", "tasks", "splits", "preparation")}
