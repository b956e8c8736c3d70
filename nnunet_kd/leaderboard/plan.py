"""A recipe as jobs: commands, what they need, and what says that they are finished."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnunet_kd.leaderboard.definitions import Dataset, Recipe
from nnunet_kd.leaderboard.metrics import METRICS
from nnunet_kd.leaderboard.recipe import configurations_of
from nnunet_kd.leaderboard.runs import Evaluation, Run, data_of, evaluations_of, hash_of, runs_of, test_of
from nnunet_kd.settings import ENVIRONMENT_VARIABLE, merge

TOOL = "nnUNetKD_leaderboard"
PORTS = (29500, 500)  # of the rendezvous of several nodes: the first, and how many; each training has its own
MACHINE_FLAGS = ("-np", "-npfp", "-npp", "-nps", "-device")  # with one value each


@dataclass(frozen=True)
class Machine:
    """Where and how commands run; nothing here changes what they are asked for.

    ``num_gpus``: of one training on one node. ``nodes``: more than one starts trainings with torchrun.
    ``num_processes``: of preprocessing, and worker processes. ``num_threads``: of a training on a CPU.
    """

    device: Literal["cuda", "cpu", "mps"] = "cuda"
    num_gpus: int = 1
    nodes: int = 1
    num_processes: int = 4
    num_threads: int = 1


TASK_FILES = {"classification": "classification.csv", "detection": "boxes.json"}  # of a validation


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: Unique; names log and record.
        command: Words.
        needs: Names of the jobs that must be finished before.
        environment: Variables beside the user's.
        run: The training that it is; None for other commands.
        evaluation: The prediction of a test set that it is.
        outputs: Files and folders that exist when it is finished.
        content: What else its result depends on, in JSON types.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    run: Run | None = None
    evaluation: Evaluation | None = None
    outputs: tuple[Path, ...] = ()
    content: tuple[Any, ...] = ()

    @property
    def hash(self) -> str:
        """Of what is asked for: that of the training or the test, else the command without what this machine needs."""
        own = self.run or self.evaluation
        return hash_of([_without(self.command, MACHINE_FLAGS), self.content]) if own is None else own.hash

    def shell(self, exported: Mapping[str, str] | None = None) -> str:
        """The command line; ``exported`` are variables that the shell has already."""
        known = {} if exported is None else exported
        own = {name: value for name, value in self.environment.items() if known.get(name) != value}
        variables = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
        # variables such as that of the rendezvous are for the shell
        words = [word if "$" in word else shlex.quote(word) for word in self.command]
        return " ".join([*variables, *words])


@dataclass(frozen=True)
class Plan:
    """All jobs of a recipe in an order in which they can run, its trainings, and what is evaluated."""

    recipe: Recipe
    out: Path
    jobs: list[Job]
    runs: list[Run]
    evaluations: list[Evaluation]

    def has_segmentation(self, evaluation: Evaluation) -> bool:
        """Whether segmentations are scored case by case."""
        kinds = {METRICS[name].kind for name in self.recipe.metrics}
        dataset = self.recipe.datasets[evaluation.dataset]
        on_grid = "resized_grid" in kinds and bool(dataset.grid)
        return "segmentation" in dataset.tasks and ("segmentation" in kinds or on_grid)


def make_plan(recipe: Recipe, recipe_file: Path, out: Path, machine: Machine) -> Plan:
    """Lay out the jobs of a recipe; nothing is read or written.

    Args:
        recipe: The recipe.
        recipe_file: Its file, for commands that read it again.
        out: The output folder, absolute.
        machine: Where the commands will run.
    """
    runs = runs_of(recipe, out)
    evaluations = evaluations_of(recipe, runs)
    builder = _Builder(recipe, recipe_file, out, machine)
    builder.prepare({name for run in runs for name in _trained(recipe, run)}, evaluations)
    for run in runs:
        builder.train(run)
    for evaluation in evaluations:
        if evaluation.test:
            builder.predict(evaluation)
    return Plan(recipe, out, list(builder.jobs.values()), runs, evaluations)


def _trained(recipe: Recipe, run: Run) -> list[str]:
    return recipe.joints[run.group].members if run.group in recipe.joints else [run.group]


class _Builder:
    def __init__(self, recipe: Recipe, recipe_file: Path, out: Path, machine: Machine) -> None:
        self.recipe, self.recipe_file, self.out, self.machine = recipe, recipe_file, out, machine
        self.jobs: dict[str, Job] = {}
        self.folders = folders_environment(recipe, out)
        self.ready: dict[str, list[str]] = {}  # nnU-Net's dataset folder -> the jobs that make its plans and data

    def add(self, job: Job) -> str:
        self.jobs.setdefault(job.name, job)
        return job.name

    # ---- data and plans ----

    def prepare(self, trained: set[str], evaluations: Sequence[Evaluation]) -> None:
        tests = [test_of(self.recipe, evaluation) for evaluation in evaluations]
        used = trained | {test.dataset for test in tests if test is not None and test.dataset is not None}
        for name, dataset in self.recipe.datasets.items():
            needs_files = self.recipe.raw is not None or (dataset.splits is not None and name in trained)
            if name in used and needs_files:
                command = (TOOL, "prepare", str(self.recipe_file), "-o", str(self.out), "--dataset", name)
                own = self.ready.setdefault(dataset.folder, [])
                content = (os.path.expandvars(self.recipe.raw or ""), data_of(dataset))
                job = Job(f"prepare_{dataset.folder}", command, environment=self.folders, content=content)
                own[:] = dict.fromkeys([*own, self.add(job)])
        for name, joint in self.recipe.joints.items():
            members = [self.recipe.datasets[member] for member in joint.members]
            more: tuple[str, ...] = (
                "--joint",
                str(joint.id),
                "--joint_name",
                joint.name,
                "--width",
                f"{joint.width:g}",
            )
            more += ("-plans_name", joint.plans, *(("--heads", joint.heads) if joint.heads else ()))
            self._plan(f"plan_joint_{name}", members, more, configurations_of(self.recipe, name))
            self.ready[joint.folder] = [f"plan_joint_{name}"]
        joined = {member for joint in self.recipe.joints.values() for member in joint.members}
        folders = dict.fromkeys(self.recipe.datasets[name].folder for name in self.recipe.datasets if name in trained)
        joined_folders = {self.recipe.datasets[name].folder for name in joined}
        for folder in folders:
            entries = [name for name, dataset in self.recipe.datasets.items() if dataset.folder == folder]
            dataset = self.recipe.datasets[entries[0]]
            if folder not in joined_folders:
                needed = [own for name in entries for own in configurations_of(self.recipe, name)]
                self._plan(f"plan_{folder}", [dataset], (), list(dict.fromkeys(needed)))
            self._plan_student(dataset)
        lines = [(own.folder, line) for own in self.recipe.datasets.values() for line in own.preparation]
        for number, (folder, line) in enumerate(dict.fromkeys(lines)):
            name, needs = f"preparation_{number}_{folder}", tuple(self.ready.get(folder, ()))
            self.add(Job(name, tuple(shlex.split(line)), needs, self.folders))
            self.ready[folder] = [*needs, name]

    def _plan(self, name: str, datasets: list[Dataset], more: tuple[str, ...], configurations: list[str]) -> None:
        plans = self.recipe.plans
        ids = list(dict.fromkeys(str(dataset.id) for dataset in datasets))
        command: tuple[str, ...] = (
            "nnUNetKD_plan_and_preprocess",
            "-d",
            *ids,
            *more,
            "-c",
            *configurations,
        )
        command += ("-p", plans.base, "-pl", plans.planner)
        if plans.gpu_memory_target is not None:
            command += ("-gpu_memory_target", f"{plans.gpu_memory_target:g}")
        processes = str(self.machine.num_processes)
        command += ("-np", processes, "-npfp", processes)
        folders = [dataset.folder for dataset in datasets]
        needs = dict.fromkeys(job for folder in folders for job in self.ready.get(folder, []))
        content = (os.path.expandvars(self.recipe.raw or ""), *map(data_of, datasets))
        self.add(Job(name, command, tuple(needs), self.folders, content=content))
        for folder in folders:  # the next job that touches one of them waits for this one
            self.ready[folder] = [*self.ready.get(folder, []), name]

    def _plan_student(self, dataset: Dataset) -> None:
        student = self.recipe.plans.student
        if student is None:
            return
        command: tuple[str, ...] = ("nnUNetKD_plan_student", "-d", str(dataset.id), "-p", self.recipe.plans.base)
        command += ("--width", f"{student.width:g}", "--min_features", str(student.min_features))
        name = f"plan_student_{dataset.folder}"
        needs = tuple(self.ready[dataset.folder])
        self.add(Job(name, (*command, "-plans_name", student.name), needs, self.folders))
        self.ready[dataset.folder] = [*needs, name]

    # ---- runs ----

    def train(self, run: Run) -> None:
        machine = self.machine
        arguments = [
            str(int(run.folder_name[7:10])),
            run.configuration,
            str(run.fold),
            "-tr",
            run.trainer,
            "-p",
            run.plans,
        ]
        arguments += ["-device", machine.device, "--c"]  # --c starts from the beginning where there is no checkpoint
        if machine.nodes > 1:
            command = ["torchrun", "--nnodes", str(machine.nodes), "--nproc_per_node", str(machine.num_gpus)]
            port = PORTS[0] + int(run.hash, 16) % PORTS[1]
            command += ["--rdzv_backend", "c10d", "--rdzv_id", run.hash, "--rdzv_endpoint", f"$MASTER_ADDR:{port}"]
            command += ["-m", "nnunet_kd.train", *arguments]
        else:
            command = ["nnUNetv2_train", *arguments]
            command += ["-num_gpus", str(machine.num_gpus)] if machine.num_gpus > 1 else []
        settings = run.full_settings
        if machine.device == "cpu":
            settings = merge(settings, {"training": {"num_threads": machine.num_threads}})
        environment = {
            **self.folders,
            "nnUNet_results": str(run.results),
            ENVIRONMENT_VARIABLE: json.dumps(settings, sort_keys=True),
        }
        needs = (*self.ready[run.folder_name], *(f"train_{teacher.name}" for teacher in run.teachers.values()))
        outputs = [run.fold_folder / "checkpoint_final.pth"]
        validated = ["summary.json"] if run.validates else []
        if validated and run.group in self.recipe.datasets:  # stock nnU-Net writes its summary before the other tasks
            tasks = self.recipe.datasets[run.group].tasks
            validated += [file for task, file in TASK_FILES.items() if task in tasks]
        outputs += [run.fold_folder / "validation" / file for file in validated]
        self.add(Job(f"train_{run.name}", tuple(command), needs, environment, run, outputs=tuple(outputs)))

    def predict(self, evaluation: Evaluation) -> None:
        run, dataset = evaluation.run, self.recipe.datasets[evaluation.dataset]
        needs = [f"train_{run.name}"]
        test = dataset.tests[evaluation.test]
        if test.dataset is None:
            images = nnunet_folder(self.recipe, self.out, "nnUNet_raw") + f"/{dataset.folder}/{test.images}"
        else:
            images, job = self._inputs(evaluation.dataset, evaluation.test, run.fold)
            needs.append(job)
        model: tuple[str, ...] = ("nnUNetKD_predict", "-m", str(run.model_folder))
        if run.group in self.recipe.joints:
            model += ("--head", dataset.folder)
        elif dataset.is_segmentation_only:
            model = (
                "nnUNetv2_predict",
                "-d",
                str(dataset.id),
                "-c",
                run.configuration,
                "-tr",
                run.trainer,
                "-p",
                run.plans,
            )
        command: tuple[str, ...] = (*model, "-f", str(run.fold), "-i", images, "-o", str(evaluation.predictions))
        command += ("-device", self.machine.device)
        if self.machine.device == "cpu":
            command += ("-npp", "0", "-nps", "0")
        environment = {**self.folders, "nnUNet_results": str(run.results)}
        name = f"predict_{evaluation.test}_with_{run.name}"
        if run.group in self.recipe.joints:
            name += f"_{evaluation.dataset}"
        self.add(
            Job(name, command, tuple(needs), environment, evaluation=evaluation, outputs=(evaluation.predictions,))
        )

    def _inputs(self, dataset: str, name: str, fold: int) -> tuple[str, str]:
        """The folder with the images of another dataset, and the job that links them there."""
        test = self.recipe.datasets[dataset].tests[name]
        other = self.recipe.datasets[str(test.dataset)]
        folder = inputs_folder(self.out, other, None if test.cases == "all" else fold)
        job = f"inputs_{folder.parent.name}_{folder.name}"
        command: tuple[str, ...] = (TOOL, "prepare", str(self.recipe_file), "-o", str(self.out))
        command += ("--dataset", str(test.dataset), "--inputs", folder.name)
        self.add(Job(job, command, tuple(self.ready.get(other.folder, ())), self.folders))
        return str(folder), job


def inputs_folder(out: Path, dataset: Dataset, fold: int | None) -> Path:
    """Where the images of a test set are linked: all cases, or the validation cases of a fold."""
    return out / "inputs" / dataset.folder / ("all" if fold is None else f"fold_{fold}")


def folders_environment(recipe: Recipe, out: Path) -> dict[str, str]:
    """nnU-Net's folders of data and plans, where the recipe brings its own."""
    if recipe.raw is None:
        return {}
    return {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed")}


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words without some flags and their values."""
    return [word for before, word in zip(("", *words), words) if word not in flags and before not in flags]  # noqa: B905


def nnunet_folder(recipe: Recipe, out: Path, name: str) -> str:
    """What the commands see as nnUNet_raw or nnUNet_preprocessed; the variable itself where it is not set."""
    return folders_environment(recipe, out).get(name) or os.environ.get(name, f"${name}")
