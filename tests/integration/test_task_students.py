"""Students of classification and detection through the real commands: all terms, other teachers, default terms."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import TeacherError
from nnunet_kd.networks.multitask import planned_heads
from nnunet_kd.settings import Teacher
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.base import HiddenCases, Student
from nnunet_kd.teachers.nnunet import NNUNetTeacher

pytestmark = pytest.mark.integration

EVERYTHING, CLASSES, MASKS = "Dataset021_Everything", "Dataset022_Classes", "Dataset023_Masks"
SMALL = "nnUNetKDPlansSmall"
BUDGET = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
SIZES = {"file": "classification.csv", "column": "size", "classes": ["small", "large"]}
FINDINGS = {"file": "classification.csv", "columns": ["dark", "bright"]}
CONSTANT = {"schedule": {"kind": "constant"}}
TERMS = [
    {"on": "logits", "loss": "kl"},
    {"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"]},
    {"on": "classification", "loss": "kl", "temperature": 2.0},
    {"on": "classification", "loss": "cosine"},
    {"on": "boxes", "loss": "kl"},
    {"on": "boxes", "loss": "giou", "options": {"threshold": 0.0}},
    {"on": "boxes", "loss": "imitation"},
]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def logs(fold: Path) -> str:
    return "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))


@pytest.fixture(scope="module")
def planned(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path], write_side_files: Callable[[Path], None]
) -> Any:
    """2D with all tasks, with classes alone, and with masks alone."""
    world = make_world()
    lesions = {"file": "boxes.json", "classes": ["lesion"]}
    tasks = {"segmentation": True, "classification": [SIZES, FINDINGS], "detection": lesions}
    block = {"nnunet_kd": {"tasks": tasks}}
    write_side_files(make_dataset(world.raw, 21, "Everything", num_cases=10, dimension=2, extra=block))
    block = {"nnunet_kd": {"tasks": {"segmentation": False, "classification": SIZES}}}
    classes = make_dataset(world.raw, 22, "Classes", num_cases=10, dimension=2, extra=block)
    write_side_files(classes)
    shutil.rmtree(classes / "labelsTr")
    make_dataset(world.raw, 23, "Masks", dimension=2)
    world.plan("-d", "21", "22", "23", "--joint", "920", "-c", "2d", "--width", "0.25")
    for dataset in ("21", "22", "23"):
        world.run("nnUNetKD_plan_student", "-d", dataset, "--width", "0.25", "-plans_name", SMALL)
    return world


@pytest.fixture(scope="module")
def taught(planned: Any) -> Any:
    """The controls of the dataset with all tasks and of that with masks alone."""
    for dataset in (21, 23):
        planned.train(dataset, "Control", "-p", SMALL, configuration="2d", settings={"training": BUDGET})
    return planned


def student_settings(world: Any, teacher: str, terms: list[dict[str, Any]] | None = None, **budget: Any) -> Any:
    model = world.model(teacher, "Control", SMALL, "2d")
    settings: dict[str, Any] = {"teachers": {"x": {"model": str(model)}}, "training": {**BUDGET, **budget}}
    if terms is not None:
        settings["terms"] = [{"teacher": "x", **CONSTANT, **term} for term in terms]
    return settings


def test_control_with_heads_teaches_all_terms_also_after_a_kill(taught: Any) -> None:
    settings = student_settings(taught, EVERYTHING, TERMS, num_epochs=3, save_every=1)
    fold = taught.model(EVERYTHING, "Student", SMALL, "2d") / "fold_0"
    command = taught.train_command(21, "Student", "-p", SMALL, configuration="2d")
    started = taught.start(*command, settings=settings)
    deadline = time.monotonic() + 100
    while not (fold / "checkpoint_latest.pth").is_file():
        assert started.poll() is None, started.output.read_text()
        assert time.monotonic() < deadline, started.output.read_text()
        time.sleep(0.01)
    started.kill()
    assert not (fold / "checkpoint_final.pth").exists()
    taught.run(*command, "--c", settings=settings)
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 3
    control = taught.model(EVERYTHING, "Control", SMALL, "2d") / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(control, weights_only=False)["network_weights"]
    assert list(checkpoint["network_weights"]) == list(weights)
    for term in TERMS:
        for key in (f"x.{term['on']}.{term['loss']}", f"x.{term['on']}.{term['loss']} weighted"):
            values = checkpoint["logging"][key]
            assert len(values) == 3
            assert np.isfinite(values).all(), key
            assert "weighted" in key or min(values) > 0, key
    extra = checkpoint["nnunet_kd"]
    assert {task: tuple(counts.shape) for task, counts in extra["competence"]["x"].items()} == {
        "segmentation": (2, 3, 1), "classification": (2, 4, 4), "detection": (2, 3),
    }  # fmt: skip
    strides = read(fold.parent / "plans.json")["configurations"]["2d"]["architecture"]["arch_kwargs"]["detection"]
    levels = {"bottleneck", "decoder@1/2", *(f"decoder@1/{stride[-1]}" for stride in strides["strides"])}
    assert set(extra["projector_shapes"]) == {"x pooled", *(f"x {level}" for level in levels)}
    for measure in ("Dice", "Youden's J", "soft Dice of boxes"):
        assert f"{measure} on training batches: student" in logs(fold)
    summary = read(fold / "validation" / "summary.json")
    assert set(summary["nnunet_kd"]) >= {"classification", "detection"}
    assert {"classification.csv", "boxes.json"} <= {file.name for file in (fold / "validation").iterdir()}


def test_classes_learn_from_features_of_a_segmentation_network(taught: Any) -> None:
    settings = student_settings(taught, MASKS)
    output = taught.train(22, "Student", "-p", SMALL, configuration="2d", settings=settings)
    assert f"cannot teach {CLASSES} classification. It has no classification head" in output
    assert "The default terms on it are left out." in output
    assert "are not guarded" in output
    fold = taught.model(CLASSES, "Student", SMALL, "2d") / "fold_0"
    assert [term["on"] for term in read(fold / "nnunet_kd_settings.json")["terms"]] == ["features"]
    assert {file.name for file in (fold / "validation").iterdir()} == {"classification.csv", "summary.json"}
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert min(checkpoint["logging"]["x.features.mse"]) > 0
    # the terms that were left out are no other settings
    again = taught.train(22, "Student", "-p", SMALL, "--c", configuration="2d", settings=settings)
    assert "Epoch 0" not in again


@pytest.fixture(scope="module")
def joint(planned: Any) -> Any:
    """The joint teacher of the three datasets."""
    settings = {"training": {**BUDGET, "num_epochs": 1}, "budget": "total"}
    planned.train(920, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=settings)
    return planned


def test_joint_teacher_teaches_its_members_by_default(joint: Any) -> None:
    settings = {"training": {**BUDGET, "num_epochs": 1}}
    terms = {
        21: ["logits.kl", "features.mse", "classification.kl", "boxes.kl", "boxes.giou"],
        22: ["features.mse", "classification.kl"],
    }
    for dataset, name in ((21, EVERYTHING), (22, CLASSES)):
        joint.train(dataset, "Student", "-p", "nnUNetKDPlans", configuration="2d", settings=settings)
        fold = joint.model(name, "Student", "nnUNetKDPlans", "2d") / "fold_0"
        assert re.findall(r"joint\.(\S+): [\d.]+, weighted", logs(fold)) == terms[dataset]
        assert "left out" not in logs(fold)


def test_joint_teacher_of_strangers_speaks_as_the_member_that_is_named(
    joint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in joint.environment.items():
        monkeypatch.setenv(name, value)
    folder = joint.preprocessed / CLASSES
    plans, own = PlansManager(read(folder / f"{SMALL}.json")), read(folder / "dataset.json")
    configuration = plans.get_configuration("2d")
    tasks = Tasks.from_dataset_json(own)
    student = Student("Dataset099_Stranger", plans, "2d", configuration, own, ("T1",), 0, tasks, None)
    model = str(joint.model("Dataset920_Joint", "Teacher", "nnUNetKDPlans", "2d"))
    taught = {}
    image = torch.randn(2, 1, *configuration.patch_size)
    for head in (MASKS, CLASSES):
        teacher = NNUNetTeacher("joint", Teacher(model=model, head=head, precision="float32"), student)
        teacher.load(torch.device("cpu"), ["bottleneck"], teacher.taught.tasks, False, HiddenCases())
        output = teacher({"data": image}, teacher.taught.tasks)
        assert output.features["bottleneck"].shape[:2] == (2, teacher.stages["bottleneck"].channels)
        taught[head] = teacher.taught.tasks, {name: logits.shape for name, logits in output.classification.items()}
    assert taught == {MASKS: ((), {}), CLASSES: (("classification",), {"size": (2, 2)})}
    with pytest.raises(TeacherError, match="has no head 'Dataset099_Stranger'"):
        NNUNetTeacher("joint", Teacher(model=model), student)


@pytest.mark.parametrize(
    ("dataset", "teacher", "term", "named"),
    [
        (21, MASKS, {"on": "boxes", "loss": "kl"}, "It has no detection head"),
        (22, EVERYTHING, {"on": "logits"}, f"{CLASSES} has no segmentations"),
    ],
)
def test_term_that_cannot_be_taught_is_an_error(
    taught: Any, dataset: int, teacher: str, term: dict[str, Any], named: str
) -> None:
    settings = student_settings(taught, teacher, [term])
    output = taught.train(dataset, "Student", "-p", SMALL, configuration="2d", settings=settings, check=False)
    assert "terms[0]" in output
    assert named in output


def test_teacher_speaks_in_the_students_order_and_averages_its_folds(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in taught.environment.items():
        monkeypatch.setenv(name, value)
    model = taught.model(EVERYTHING, "Control", SMALL, "2d")
    folder = Path(shutil.copytree(model, tmp_path / model.name))
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    weights = [checkpoint["network_weights"]]
    torch.manual_seed(0)
    weights.append({key: value + 0.01 * torch.randn_like(value) for key, value in weights[0].items()})
    (folder / "fold_1").mkdir()
    torch.save({**checkpoint, "network_weights": weights[1]}, folder / "fold_1" / "checkpoint_final.pth")

    plans = PlansManager(read(folder / "plans.json"))
    configuration = plans.get_configuration("2d")
    own = read(folder / "dataset.json")
    own["nnunet_kd"]["tasks"]["classification"] = [FINDINGS, {**SIZES, "classes": ["large", "small"]}]
    heads = planned_heads(configuration.configuration["architecture"])
    assert heads is not None
    detection = DetectionPlan.from_dict(heads[1])
    student = Student(EVERYTHING, plans, "2d", configuration, own, ("T1",), 0, Tasks.from_dataset_json(own), detection)
    settings = Teacher(model=str(folder), fold=[0, 1], precision="float32")
    teacher = NNUNetTeacher("x", settings, student)
    assert teacher.taught.tasks == ("segmentation", "classification", "detection")
    teacher.load(torch.device("cpu"), ["bottleneck"], teacher.taught.tasks, False, HiddenCases())

    image = torch.randn(2, 1, *configuration.patch_size)
    output = teacher({"data": image}, teacher.taught.tasks)
    each = []
    for state in weights:
        network = teacher.build_network()
        network.load_state_dict(state)
        with torch.no_grad():
            each.append(network(image, tasks=True))
    sizes, findings = (
        (each[0].classification[name] + each[1].classification[name]) / 2 for name in ("size", "findings")
    )
    torch.testing.assert_close(output.classification, {"findings": findings, "size": sizes.flip(1)})
    torch.testing.assert_close(output.pooled, torch.cat(each[0].pooled.values, 1))
    torch.testing.assert_close(output.logits, (each[0].segmentation[0] + each[1].segmentation[0]) / 2)
    for part, first, second in zip(output.boxes, each[0].detection, each[1].detection, strict=True):
        for level, a, b in zip(part, first, second, strict=True):
            torch.testing.assert_close(level, (a + b) / 2)
    assert teacher({"data": image}, {"detection"}).logits is None
