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
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_kd.data.member import Member, read_json
from nnunet_kd.environment import environment
from nnunet_kd.errors import JointDatasetError

# stock nnU-Net's defaults of nnUNetv2_plan_and_preprocess
NUM_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
NUM_PROCESSES_OTHERS = 4
STOCK_PLANNERS = ("ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL", "nnUNetPlannerResEncXL")


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
    if not (isinstance(planner, type) and issubclass(planner, ExperimentPlanner)):
        raise JointDatasetError(
            f"nnU-Net has no planner '{name}'. Name one with -pl, usually one of: {', '.join(STOCK_PLANNERS)}."
        )
    return planner


def default_plans_name(planner: type[ExperimentPlanner]) -> str:
    """The name under which the planner class writes its plans."""
    return inspect.signature(planner.__init__).parameters["plans_name"].default


def check_planner(name: str, plans_name: str, planner: str | None) -> None:
    """Refuse to plan ``name`` under a plans name that belongs to another planner than the one that would run.

    Args:
        name: The member; nothing is checked if it has these plans.
        plans_name: The members' plans.
        planner: What the user gave with -pl; None runs the default planner.

    Raises:
        JointDatasetError: Says which member lacks which plans, and the commands that make them.
    """
    if (Path(str(nnUNet_preprocessed)) / name / f"{plans_name}.json").is_file():
        return
    owner = {default_plans_name(find_planner(stock)): stock for stock in STOCK_PLANNERS}.get(plans_name)
    if owner is not None and owner != (planner or STOCK_PLANNERS[0]):
        raise JointDatasetError(
            f"{name} has no {plans_name}, which is what nnU-Net's {owner} writes. Give -pl {owner}, or run: "
            f"nnUNetv2_plan_experiment -d {name[7:10]} -pl {owner}"
        )
    if owner is None and planner is None:
        raise JointDatasetError(
            f"{name} has no {plans_name}. Name the planner that makes these plans with -pl, or run: "
            f"nnUNetv2_plan_experiment -d {name[7:10]} -pl PLANNER -overwrite_plans_name {plans_name}"
        )


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


def member_cases(member: Member) -> tuple[str, ...]:
    """All cases of ``member``, sorted: the preprocessed ones, or those in nnUNet_raw if none is preprocessed yet.

    Raises:
        JointDatasetError: Only a part of the cases is preprocessed, or there are neither preprocessed nor raw ones.
    """
    raw = _raw_cases(member.name)
    if raw and not is_preprocessed(member):
        return raw
    cases = _finished_cases(member)
    expected = len(raw) or int(member.dataset_json.get("numTraining", 0))
    missing = set(raw) - set(cases) if raw else range(len(cases), expected)
    if missing:
        raise JointDatasetError(
            f"{member.name} has only {expected - len(missing)} of its {expected} cases in {member.data_folder}, so its "
            f"preprocessing is not complete. Run: {preprocess_command(member)}\nIf cases are left out on purpose, take "
            f"them out of {Path('nnUNet_raw') / member.name} and correct numTraining in "
            f"{member.base_folder / 'dataset.json'}."
        )
    return member.identifiers


def is_preprocessed(member: Member) -> bool:
    """Whether there are preprocessed images of the member's configuration."""
    return member.data_folder.is_dir() and any(member.data_folder.iterdir())


def preprocess_command(member: Member) -> str:
    """The stock command that preprocesses the member's configuration."""
    configuration = _preprocessing_configuration(member)
    return f"nnUNetv2_preprocess -d {member.name[7:10]} -plans_name {member.plans_name} -c {configuration}"


def _preprocess(name: str, steps: StockSteps, configurations: Sequence[str]) -> None:
    members = [Member(name, steps.plans_name, configuration) for configuration in configurations]
    for configuration in dict.fromkeys(_preprocessing_configuration(member) for member in members):
        member = Member(name, steps.plans_name, configuration)
        folder = member.data_folder
        # The marker tells our own unfinished run, which may be redone, from a folder of the user, which may not.
        marker = folder.parent / f".{folder.name}.nnunet_kd_unfinished"
        if is_preprocessed(member) and (not marker.exists() or _is_finished(member)):
            marker.unlink(missing_ok=True)
            continue
        unfinished = f"{marker} says that an earlier run did not finish {folder}"
        _need_raw(name, f"preprocess {configuration} ({unfinished if marker.exists() else f'no images in {folder}'})")
        marker.touch()
        processes = steps.num_processes or NUM_PROCESSES.get(configuration, NUM_PROCESSES_OTHERS)
        preprocess_dataset(int(name[7:10]), steps.plans_name, [configuration], [processes])
        marker.unlink()


def _preprocessing_configuration(member: Member) -> str:
    """The configuration that makes the data of ``member``: a cascade uses those of 3d_fullres."""
    own = member.configuration_manager.data_identifier
    for configuration in member.plans["configurations"]:
        manager = member.plans_manager.get_configuration(configuration)
        if manager.configuration.get("data_identifier") == own and manager.previous_stage_name is None:
            return configuration
    return member.configuration


def _is_finished(member: Member) -> bool:
    """Whether every case is preprocessed and has its segmentation for the validation."""
    cases = _finished_cases(member)
    segmentations = member.base_folder / "gt_segmentations"
    copied = all((segmentations / f"{case}{member.dataset_json['file_ending']}").is_file() for case in cases)
    return len(cases) >= int(member.dataset_json.get("numTraining", 0)) and copied


def _finished_cases(member: Member) -> list[str]:
    """The preprocessed cases; nnU-Net writes the properties of a case last."""
    finished = {file.stem for file in member.data_folder.glob("*.pkl")}
    return [case for case in member.identifiers if case in finished]


def _raw_cases(name: str) -> tuple[str, ...]:
    """The training cases in nnUNet_raw as nnU-Net finds them, sorted; none if the raw images are not there."""
    if not nnUNet_raw.is_set():
        return ()
    folder = Path(str(nnUNet_raw)) / name
    if not (folder / "dataset.json").is_file():
        return ()
    dataset_json = read_json(folder / "dataset.json", "Correct the file.")
    if "dataset" in dataset_json:
        return tuple(sorted(dataset_json["dataset"]))
    if not (folder / "imagesTr").is_dir():
        return ()
    found = get_identifiers_from_splitted_dataset_folder(str(folder / "imagesTr"), dataset_json["file_ending"])
    return tuple(sorted(str(case) for case in found))


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
