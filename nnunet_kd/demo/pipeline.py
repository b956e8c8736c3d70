"""The whole way through the real commands: plan, teacher, student and control, predict. All tasks go this one way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.demo.domains import DOMAINS, JOINT_ID, write_domains
from nnunet_kd.demo.runner import NUM_AT_A_TIME, Command, Step, progress, run_steps
from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import write_json
from nnunet_kd.settings import ENVIRONMENT_VARIABLE, merge, read_user_settings

TEACHER, CONTROL, STUDENT = "teacher head", "control", "student"
METHODS = (TEACHER, CONTROL, STUDENT)
TRAINERS = {
    TEACHER: "nnUNetTrainerKDTeacher",
    CONTROL: "nnUNetTrainerKDControl",
    STUDENT: "nnUNetTrainerKDStudent",
}
TEACHER_PLANS = "nnUNetKDPlans"
STUDENT_PLANS = "nnUNetKDPlansDemo"
# What two CPU cores can train in a minute. A demo is about the way, not about the best network.
GPU_MEMORY_TARGET_GB = "0.5"
WIDTH = "0.25"
# Twice stock nnU-Net's: with a few hundred steps, lesions would be found late or never.
INITIAL_LR = 0.02
# Starting worker processes takes longer than the few small cases that they would share.
NO_WORKERS = ("-npp", "0", "-nps", "0")


@dataclass(frozen=True)
class DemoSettings:
    """What the user asked for. Without ``raw``, synthetic domains are written and used.

    ``num_epochs`` and ``num_iterations`` (per epoch) are the budget of a student and of its control.
    """

    output: Path
    raw: Path | None
    dataset_ids: tuple[int, ...]
    num_epochs: int
    num_iterations: int
    configuration: str
    fold: int
    device: str


@dataclass(frozen=True)
class DemoDataset:
    """One dataset of the demo and where its files are; ``predictions`` and ``fold_folders`` are keyed by method.

    ``reference_folder`` holds the true segmentations and ``side_folder`` the true classes and boxes. ``dimension`` is
    the network's, and of its boxes. ``cases`` are training cases to test on; None tests on the held-out cases.
    """

    name: str
    raw_folder: Path
    reference_folder: Path
    side_folder: Path
    dimension: int
    predictions: Mapping[str, Path]
    fold_folders: Mapping[str, Path]
    cases: tuple[str, ...] | None

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The dataset.json of the raw dataset."""
        return json.loads((self.raw_folder / "dataset.json").read_text())

    @property
    def tasks(self) -> Tasks:
        """What the dataset declares."""
        return Tasks.from_dataset_json(self.dataset_json)


class Demo:
    """Knows the folders and the steps of one demo.

    Raises:
        NnUNetKDError: A dataset does not exist, or the output folder holds a demo with other settings.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.output = settings.output
        self.raw = self.output / "nnUNet_raw" if settings.raw is None else settings.raw
        self.preprocessed = self.output / "nnUNet_preprocessed"
        self.results = self.output / "nnUNet_results"
        self.logs = self.output / "logs"
        if settings.raw is None:
            self.names = [domain.folder_name for domain in DOMAINS]
        else:
            self.names = [find_dataset(self.raw, dataset_id) for dataset_id in settings.dataset_ids]
        taken = {folder.name[7:10] for folder in self.raw.glob("Dataset*")}
        self.joint_id = next(number for number in range(JOINT_ID, 1000) if f"{number:03d}" not in taken)
        self.kd_settings = merge(
            read_user_settings(),
            {
                "training": {
                    "num_epochs": settings.num_epochs,
                    "num_iterations_per_epoch": settings.num_iterations,
                    "num_val_iterations_per_epoch": 2,
                    "initial_lr": INITIAL_LR,
                    "seed": 0,
                }
            },
        )

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self, num_after: int) -> None:
        """Run all steps; ``num_after`` more will follow, for the count in the progress lines."""
        self._remember_settings()
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        steps = self.steps()
        num_before = 0
        if self.settings.raw is None:
            num_before = 1
            with progress(1, len(steps) + 1 + num_after, f"write {len(self.names)} synthetic domains"):
                write_domains(self.raw)
        run_steps(
            steps, self.environment(), self.logs, num_before=num_before, num_all=len(steps) + num_before + num_after
        )

    def _remember_settings(self) -> None:
        """Refuse an output folder of a demo with other settings: its finished steps would be taken for this one's."""
        file = self.output / "demo.json"
        asked = {**asdict(self.settings), "nnunet_kd": self.kd_settings}
        asked = json.loads(json.dumps({key: value for key, value in asked.items() if key != "output"}, default=str))
        if file.is_file():
            before = json.loads(file.read_text())
            changed = [key for key in asked if before.get(key) != asked[key]]
            if changed:
                msg = (
                    f"{self.output} holds a demo with another {', '.join(changed)} ({before.get(changed[0])!r}, now "
                    f"{asked[changed[0]]!r}). Give another folder with -o, or delete this one."
                )
                raise NnUNetKDError(msg)
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)

    def environment(self) -> dict[str, str]:
        """The present environment with nnU-Net's folders under the output, and settings for a small machine."""
        share = str(self._share_of_cores())
        training = {"num_threads": int(share)}
        return {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            TRAINERS_VARIABLE: add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, "")),
            ENVIRONMENT_VARIABLE: json.dumps(merge(self.kd_settings, {"training": training})),
            "nnUNet_compile": "f",
            # Handing batches over takes longer than making such small ones, and without workers the seed fixes them.
            "nnUNet_n_proc_DA": "0" if self.settings.raw is None else share,
            "nnUNet_def_n_proc": share,
            "OMP_NUM_THREADS": share,
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait make both trainings several times slower
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
        }

    def _share_of_cores(self) -> int:
        """Threads and worker processes of each of the commands that run side by side.

        On images as small as the synthetic ones a second thread costs more than it brings, as does a second worker,
        which imports nnU-Net first; and one thread computes the same numbers on every machine.
        """
        return 1 if self.settings.raw is None else max(1, (os.cpu_count() or 1) // NUM_AT_A_TIME)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All steps that are console commands, in order."""
        steps = [self._plan(), self._plan_students(), self._train_teacher_and_controls(), self._train_students()]
        if self.settings.raw is None:
            steps.append(self._predict_with_students())
        return steps

    def datasets(self) -> list[DemoDataset]:
        """The datasets with their references and, once all steps have run, predictions."""
        return [self._dataset(name) for name in self.names]

    def _plan(self) -> Step:
        arguments = (
            "nnUNetKD_plan_and_preprocess",
            *("-d", *(_id(name) for name in self.names)),
            *("--joint", str(self.joint_id), "--joint_name", "DemoJoint", "-c", self.settings.configuration),
            *("-plans_name", TEACHER_PLANS, "-gpu_memory_target", GPU_MEMORY_TARGET_GB, "--width", WIDTH),
            *("-np", str(self._share_of_cores()), "-npfp", str(self._share_of_cores())),
        )
        outputs = tuple(self.preprocessed / name / f"{TEACHER_PLANS}.json" for name in [self.joint_name, *self.names])
        command = Command("plan_and_preprocess", arguments, outputs)
        return Step("plan and preprocess, join the datasets", (command,))

    def _plan_students(self) -> Step:
        commands = tuple(
            Command(
                f"plan_student_{_id(name)}",
                ("nnUNetKD_plan_student", "-d", _id(name), "--width", WIDTH, "-plans_name", STUDENT_PLANS),
                (self.preprocessed / name / f"{STUDENT_PLANS}.json",),
            )
            for name in self.names
        )
        return Step("plan narrow students", commands)

    def _train_teacher_and_controls(self) -> Step:
        """The controls need no teacher; they use the core that its training leaves idle."""
        commands = [self._train(self.joint_name, TEACHER), *(self._train(name, CONTROL) for name in self.names)]
        return Step("train the joint teacher and, beside it, the controls", tuple(commands))

    def _train_students(self) -> Step:
        commands = [self._train(name, STUDENT) for name in self.names]
        if self.settings.raw is not None:
            return Step("train the students", tuple(commands))
        # What can be predicted already is predicted beside the last student.
        commands += [self._predict(name, method) for method in (TEACHER, CONTROL) for name in self.names]
        return Step("train the students and, beside them, predict with teacher and controls", tuple(commands))

    def _predict_with_students(self) -> Step:
        return Step("predict with the students", tuple(self._predict(name, STUDENT) for name in self.names))

    def _train(self, name: str, method: str) -> Command:
        plans = TEACHER_PLANS if method == TEACHER else STUDENT_PLANS
        return Command(
            f"train_{method.replace(' ', '_')}_{_id(name)}",
            (
                *("nnUNetv2_train", _id(name), self.settings.configuration, str(self.settings.fold)),
                # --c starts from the beginning where there is no checkpoint
                *("-tr", TRAINERS[method], "-p", plans, "-device", self.settings.device, "--c"),
            ),
            (self.fold_folder(name, method) / "validation" / "summary.json",),
        )

    def _predict(self, name: str, method: str) -> Command:
        dataset = self._dataset(name)
        output = dataset.predictions[method]
        if method == TEACHER:
            teacher = self.fold_folder(self.joint_name, TEACHER).parent
            model: tuple[str, ...] = ("nnUNetKD_predict", "-m", str(teacher), "--head", name)
        elif next(domain for domain in DOMAINS if domain.folder_name == name).tasks.is_segmentation_only:
            model = (
                *("nnUNetv2_predict", "-d", _id(name), "-c", self.settings.configuration),
                *("-tr", TRAINERS[method], "-p", STUDENT_PLANS),
            )
        else:  # stock nnU-Net would give the segmentation alone
            model = ("nnUNetKD_predict", "-m", str(self.fold_folder(name, method).parent))
        return Command(
            f"predict_{method.replace(' ', '_')}_{_id(name)}",
            (
                *(*model, "-f", str(self.settings.fold), "-device", self.settings.device),
                *("-i", str(dataset.raw_folder / "imagesTs"), "-o", str(output), *NO_WORKERS),
            ),
            (output,),
        )

    # ---- folders -----------------------------------------------------------------------------------------------------

    @property
    def joint_name(self) -> str:
        """The joint dataset."""
        return f"Dataset{self.joint_id:03d}_DemoJoint"

    def fold_folder(self, dataset: str, method: str) -> Path:
        """Where nnU-Net writes the trained fold."""
        plans = TEACHER_PLANS if method == TEACHER else STUDENT_PLANS
        model = f"{TRAINERS[method]}__{plans}__{self.settings.configuration}"
        return self.results / dataset / model / f"fold_{self.settings.fold}"

    def _dataset(self, name: str) -> DemoDataset:
        raw_folder = self.raw / name
        folds = {method: self.fold_folder(self.joint_name if method == TEACHER else name, method) for method in METHODS}
        dimension = 2 if self.settings.configuration == "2d" else 3
        if self.settings.raw is None:
            predictions = {method: self.output / "predictions" / name / method.replace(" ", "_") for method in METHODS}
            references = raw_folder / "labelsTs"
            return DemoDataset(name, raw_folder, references, references, dimension, predictions, folds, None)
        predictions = {method: fold / "validation" for method, fold in folds.items()}
        predictions[TEACHER] = folds[TEACHER] / name / "validation"
        references = self.preprocessed / name / "gt_segmentations"  # nnU-Net's copy of the training labels
        splits_file = self.preprocessed / name / "splits_final.json"
        cases: tuple[str, ...] = ()
        if splits_file.is_file():
            cases = tuple(json.loads(splits_file.read_text())[self.settings.fold]["val"])
        return DemoDataset(name, raw_folder, references, raw_folder, dimension, predictions, folds, cases)


def find_dataset(raw_folder: Path, dataset_id: int) -> str:
    """The full name of the raw dataset with this id.

    Raises:
        NnUNetKDError: There is none, or more than one.
    """
    found = sorted(folder.name for folder in raw_folder.glob(f"Dataset{dataset_id:03d}_*") if folder.is_dir())
    if len(found) != 1:
        what = f"no dataset with id {dataset_id}" if not found else f"several with id {dataset_id}: {', '.join(found)}"
        msg = f"In {raw_folder} there is {what}. Check --raw (the folder that holds Dataset...) and -d."
        raise NnUNetKDError(msg)
    return found[0]


def _id(name: str) -> str:
    return name[7:10]
