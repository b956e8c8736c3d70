"""Stock fingerprint, planning and preprocessing for members that lack them; complete members are left as they are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_kd.data.member import Member, read_json
from nnunet_kd.environment import environment
from nnunet_kd.errors import JointDatasetError

# stock nnU-Net's defaults of nnUNetv2_plan_and_preprocess
NUM_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}


@dataclass(frozen=True)
class StockSteps:
    """How the stock steps are run where a member lacks their result."""

    planner: type[ExperimentPlanner]
    plans_name: str
    gpu_memory_target: float | None = None
    num_processes: int | None = None
    num_processes_fingerprint: int = 8
    preprocess: bool = True
    verify_dataset_integrity: bool = False


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Find a stock planner class by name.

    Raises:
        JointDatasetError: nnU-Net has no such planner.
    """
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    planner = recursive_find_python_class(folder, name, current_module="nnunetv2.experiment_planning")
    if planner is None:
        raise JointDatasetError(
            f"nnU-Net has no planner '{name}'. Usual ones: ExperimentPlanner, nnUNetPlannerResEncM, "
            f"nnUNetPlannerResEncL."
        )
    return planner


def default_plans_name(planner: type[ExperimentPlanner]) -> str:
    """The name under which the planner class writes its plans."""
    return inspect.signature(planner.__init__).parameters["plans_name"].default


def planning_threads() -> dict[str, str]:
    """Stock planning takes nnUNet_n_proc_DA as a number of threads and fails with 0, which training allows."""
    return {"nnUNet_n_proc_DA": str(max(1, get_allowed_n_proc_DA()))}


def prepare_member(name: str, steps: StockSteps, configurations: Sequence[str]) -> None:
    """Run the stock steps that ``name`` lacks under ``steps.plans_name`` for the data of ``configurations``.

    Raises:
        JointDatasetError: A step is missing and the raw images that it needs are gone.
    """
    base = Path(str(nnUNet_preprocessed)) / name
    dataset_id = int(name[7:10])
    if steps.verify_dataset_integrity:
        _need_raw(name, "verify the dataset")
        verify_dataset_integrity(str(Path(str(nnUNet_raw)) / name), steps.num_processes_fingerprint)
    if not (base / f"{steps.plans_name}.json").is_file():
        _need_raw(name, f"plan ({steps.plans_name}.json is missing in {base})")
        extract_fingerprint_dataset(dataset_id, num_processes=steps.num_processes_fingerprint, clean=False)
        with environment(planning_threads()):
            plan_experiment_dataset(
                dataset_id,
                steps.planner,
                gpu_memory_target_in_gb=steps.gpu_memory_target,
                overwrite_plans_name=steps.plans_name,
            )
    if steps.preprocess:
        _preprocess(name, steps, configurations)


def _preprocess(name: str, steps: StockSteps, configurations: Sequence[str]) -> None:
    plans = Member(name, steps.plans_name, "").plans
    for configuration in configurations:
        if configuration not in plans["configurations"] or configuration not in NUM_PROCESSES:
            continue  # a cascade uses the data of 3d_fullres
        folder = Member(name, steps.plans_name, configuration).data_folder
        # The marker tells our own unfinished run, which may be redone, from a folder of the user, which may not.
        marker = folder.parent / f".{folder.name}.nnunet_kd_unfinished"
        if folder.is_dir() and any(folder.iterdir()) and not marker.exists():
            continue
        _need_raw(name, f"preprocess {configuration} (no images in {folder})")
        marker.touch()
        processes = steps.num_processes or NUM_PROCESSES[configuration]
        preprocess_dataset(int(name[7:10]), steps.plans_name, [configuration], [processes])
        marker.unlink()


def _need_raw(name: str, purpose: str) -> None:
    folder = Path(str(nnUNet_raw)) / name
    dataset_json = read_json(
        folder / "dataset.json", f"It is needed to {purpose}. Put the dataset back, or preprocess it elsewhere."
    )
    images = folder / "imagesTr"
    if "dataset" not in dataset_json and (not images.is_dir() or not any(images.iterdir())):
        raise JointDatasetError(
            f"{name} has no training images in {images}. They are needed to {purpose}. Put the images there, or "
            f"leave this dataset out."
        )
