"""Training in two processes (gloo, CPU) that torchrun starts, or that are given its variables.

All but one of the trainings are forked: a fresh process would import for longer than it trains here.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nnunet_kd.teachers.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration

ALPHA, BETA, JOINT = "Dataset001_Alpha", "Dataset002_Beta", "Dataset900_Joint"
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
TERMS = [
    {"on": "logits", "loss": "kl", "temperature": 2.0, "schedule": {"kind": "constant"}},
    {"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "schedule": {"kind": "constant"}},
]
STUDENT = {"training": SHORT, "terms": TERMS, "guard": {"margin": 0.1, "exponent": 1.0}}

# Trainers of a user's own. The first draws nothing: every process takes its rows of the same batches.
FIXED_BATCHES = """
import torch
from nnunet_kd.training.student import nnUNetTrainerKDStudent

class FixedBatches(nnUNetTrainerKDStudent):
    def configure_optimizers(self):
        self.network.double()  # else rounding, which depends on the processor, adds up over the steps
        self.network.register_forward_pre_hook(lambda _, images: (images[0].double(),))
        optimizer, scheduler = super().configure_optimizers()
        self.auxiliary.double()
        return optimizer, scheduler

    def get_dataloaders(self):
        super().get_dataloaders()
        return self.batches(1), self.batches(2)

    def batches(self, seed):
        random = torch.Generator().manual_seed(seed)
        size, patch = self.configuration_manager.batch_size, self.configuration_manager.patch_size
        rows = slice(self.local_rank * self.batch_size, (self.local_rank + 1) * self.batch_size)
        while True:
            labels = (torch.rand(size, 1, *patch, generator=random) < 0.3).float()
            images = labels + torch.randn(size, self.num_input_channels, *patch, generator=random)
            steps = [[round(1 / axis) for axis in scale] for scale in self._get_deep_supervision_scales()]
            yield {"data": images[rows], "target": [labels[rows, :, ::y, ::x] for y, x in steps]}
"""
# Workers of torchrun are fresh processes, whose own workers need not be that as well.
FORK = """
import multiprocessing

fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method=None: fork
"""
RECORDER = """
import json
from pathlib import Path
from nnunet_kd.training.teacher import nnUNetTrainerKDTeacher

class Recorder(nnUNetTrainerKDTeacher):
    drawn = []

    def train_step(self, batch):
        self.drawn.append([batch["member"], *map(str, batch["keys"])])
        Path(self.output_folder, f"rank{self.local_rank}.json").write_text(json.dumps(self.drawn))
        return super().train_step(batch)
"""

AVERAGES = """
import json
from pathlib import Path
from nnunet_kd.training.dino_mix import nnUNetTrainerDINOMix

class Averages(nnUNetTrainerDINOMix):
    def train_step(self, batch):
        result = super().train_step(batch)
        weights = [float(value.double().sum()) for value in self.average.network.state_dict().values()]
        found = {"shape": list(batch["data"].shape), "weights": weights}
        Path(self.output_folder, f"rank{self.local_rank}.json").write_text(json.dumps(found))
        return result
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def arguments(dataset: int, trainer: str, *args: str) -> list[str]:
    return [str(dataset), "2d", "0", "-tr", trainer, "-device", "cpu", *args]


def start(world: Any, *args: str, settings: Mapping[str, Any], number: int = 2, **variables: str) -> list[Any]:
    """Start processes with the variables that torchrun would give them."""
    size = str(number)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        world.start("nnunet_kd.train", *args, settings=settings, RANK=rank, LOCAL_RANK=rank, **common, **variables)
        for rank in map(str, range(number))
    ]


def train(world: Any, *args: str, settings: Mapping[str, Any], check: bool = True, **options: Any) -> list[str]:
    """Train in several processes, and return what each printed."""
    return [world.finish(own, check=check) for own in start(world, *args, settings=settings, **options)]


def fold_of(world: Any, dataset: str, trainer: str, plans: str = "nnUNetPlans") -> Path:
    folder: Path = world.results / dataset / f"{trainer}__{plans}__2d" / "fold_0"
    return folder


def log_of(fold: Path) -> str:
    """The only log, which only rank 0 has written."""
    (log,) = fold.glob("training_log_*.txt")
    return log.read_text()


@pytest.fixture(scope="module")
def world(make_world: Callable[[], Any], make_dataset: Callable[..., Path]) -> Any:
    """Two 2D members and their joint teacher, trained in two processes. Beta has one validation case for both."""
    world = make_world()
    make_dataset(world.raw, 1, "Alpha", dimension=2, num_cases=7, num_test_cases=1, shape=(36, 40))
    make_dataset(world.raw, 2, "Beta", dimension=2, shape=(36, 40), channels=("T2",))
    world.plan("-d", "1", "2", "--joint", "900", "-c", "2d", "--width", "0.25")
    train(world, *arguments(900, "nnUNetTrainerKDTeacher", "-p", "nnUNetKDPlans"),
          settings={"training": SHORT, "budget": "total"})  # fmt: skip
    return world


def test_joint_teacher(world: Any) -> None:
    fold = fold_of(world, JOINT, "nnUNetTrainerKDTeacher", "nnUNetKDPlans")
    assert re.findall(r": Epoch (\d+)", log_of(fold)) == ["0", "1"]
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    cases = [case["member"] for case in summary["metric_per_case"]]
    assert cases == [ALPHA, ALPHA, BETA]
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert not any(name.startswith("module.") for name in checkpoint["network_weights"])
    assert sum(checkpoint["nnunet_kd"]["steps"].values()) == 8  # of both processes


def test_ranks_draw_independently(world: Any, tmp_path: Path) -> None:
    (tmp_path / "Recorder.py").write_text(RECORDER)
    settings = {"training": {**SHORT, "num_epochs": 1, "num_iterations_per_epoch": 8}, "budget": "total"}
    train(world, *arguments(900, "Recorder", "-p", "nnUNetKDPlans"), settings=settings, nnUNet_extTrainer=str(tmp_path))
    fold = fold_of(world, JOINT, "Recorder", "nnUNetKDPlans")
    drawn = [json.loads((fold / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [len(steps) for steps in drawn] == [8, 8]
    assert all(len(cases) == 1 for steps in drawn for _, *cases in steps)  # half of the batch of 2
    assert {member for steps in drawn for member, *_ in steps} == {ALPHA, BETA}
    assert [step[0] for step in drawn[0]] != [step[0] for step in drawn[1]]
    steps = load_checkpoint(fold / "checkpoint_final.pth")["nnunet_kd"]["steps"]
    assert steps == Counter(member for steps in drawn for member, *_ in steps)


def test_student_on_two_nodes(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two torchrun with one process each: local rank 0 twice."""
    endpoint = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1")
    command = ("torchrun", "--nnodes", "2", "--nproc_per_node", "1", *endpoint, "-m", "nnunet_kd.train")
    command += tuple(arguments(1, "nnUNetTrainerKDStudent"))
    (tmp_path / "sitecustomize.py").write_text(FORK)
    monkeypatch.chdir(tmp_path)  # torchrun -m looks for modules here first, where a checkout would hide the package
    settings = {**STUDENT, "training": {**SHORT, "num_epochs": 1}}
    nodes = [world.start(*command, settings=settings, PYTHONPATH=str(tmp_path)) for _ in range(2)]
    for node in nodes:
        world.finish(node)
    fold = fold_of(world, ALPHA, "nnUNetTrainerKDStudent")
    assert re.findall(r": Epoch (\d+)", log_of(fold)) == ["0"]
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 2
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert sorted(checkpoint["nnunet_kd"]["projector_shapes"]) == ["joint bottleneck", "joint decoder@1/2"]
    world.run(
        "nnUNetv2_predict", "-d", "1", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerKDStudent",
        "-i", world.raw / ALPHA / "imagesTs", "-o", tmp_path / "out", "-device", "cpu", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    (file,) = (tmp_path / "out").glob("*.png")
    assert np.asarray(Image.open(file)).shape == (36, 40)


def test_semi_supervised_training(world: Any, tmp_path: Path) -> None:
    """Every process has labelled and unlabelled patches of its own; their moving averages are the same."""
    (tmp_path / "Averages.py").write_text(AVERAGES)
    file = world.preprocessed / ALPHA / "nnUNetPlans.json"
    plans = {**json.loads(file.read_text()), "plans_name": "Four"}
    plans["configurations"]["2d"]["batch_size"] = 4
    file.with_name("Four.json").write_text(json.dumps(plans))
    vit = {"model": "test_vit", "foundation": {"pretrained": False, "size": 32}}
    settings = {"training": SHORT, "labeled": {"fraction": 0.5}, "teachers": {"foundation": vit}}
    settings["dino_mix"] = {"predict_with": "ema"}
    outputs = train(world, *arguments(1, "Averages", "-p", "Four"), settings=settings, nnUNet_extTrainer=str(tmp_path))
    assert "2 labelled and 3 unlabelled images; 1 + 1 patches and 1 mixed ones per step" in outputs[0]
    fold = fold_of(world, ALPHA, "Averages", "Four")
    first, second = (json.loads((fold / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["shape"][0] == 2
    assert first["weights"] == pytest.approx(second["weights"], rel=1e-6, abs=1e-6)
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert checkpoint["nnunet_kd"]["teacher_states"]["ema"]["step"] == 4
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 2


def test_control_continues(world: Any) -> None:
    settings = {"training": {**SHORT, "num_epochs": 6, "save_every": 1}}
    fold = fold_of(world, ALPHA, "nnUNetTrainerKDControl")
    started = start(world, *arguments(1, "nnUNetTrainerKDControl"), settings=settings)
    deadline = time.monotonic() + 200
    while not (fold / "checkpoint_latest.pth").is_file():
        assert started[0].poll() is None, started[0].output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in started:
        process.kill()
    assert not (fold / "checkpoint_final.pth").exists()
    before = load_checkpoint(fold / "checkpoint_latest.pth")
    outputs = train(world, *arguments(1, "nnUNetTrainerKDControl", "--c"), settings=settings)
    for output in outputs:
        assert re.findall(r"\bEpoch (\d+)", output) == [str(epoch) for epoch in range(before["current_epoch"], 6)]
    after = load_checkpoint(fold / "checkpoint_final.pth")
    assert after["current_epoch"] == 6
    assert after["logging"]["train_losses"][: before["current_epoch"]] == before["logging"]["train_losses"]
    assert len(after["logging"]["train_losses"]) == 6


def test_losses_and_weights_are_those_of_one_process(world: Any, tmp_path: Path) -> None:
    """Of the same batches: batch Dice, gradients of network and projectors, the guard's counts, all that is logged."""
    (tmp_path / "FixedBatches.py").write_text(FIXED_BATCHES)
    settings = {**STUDENT, "teachers": {"joint": {"precision": "float32"}}}
    command, options = arguments(1, "FixedBatches"), {"settings": settings, "nnUNet_extTrainer": str(tmp_path)}
    plans = json.loads((world.preprocessed / ALPHA / "nnUNetPlans.json").read_text())
    assert plans["configurations"]["2d"]["batch_dice"]
    fold, found = fold_of(world, ALPHA, "FixedBatches"), []
    world.run("nnunet_kd.train", *command, **options)  # without torchrun's variables
    found.append(load_checkpoint(fold / "checkpoint_final.pth"))
    train(world, *command, **options)
    found.append(load_checkpoint(fold / "checkpoint_final.pth"))
    one, two = found
    terms = [f"joint.{on}{more}" for on in ("logits.kl", "features.mse") for more in ("", " weighted")]
    for key in ("train_losses", "val_losses", "mean_fg_dice", *terms):
        assert two["logging"][key] == pytest.approx(one["logging"][key], rel=1e-5, abs=1e-6), key
    assert min(one["logging"]["joint.features.mse weighted"]) > 0
    for part in (lambda c: c["network_weights"], lambda c: c["nnunet_kd"]["auxiliary"]):
        for key, value in part(one).items():
            np.testing.assert_allclose(part(two)[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    counts = [checkpoint["nnunet_kd"]["competence"]["joint"]["segmentation"] for checkpoint in found]
    np.testing.assert_allclose(*counts, rtol=1e-4)


def test_batch_that_cannot_be_divided(world: Any) -> None:
    for output in train(world, *arguments(1, "nnUNetTrainerKDControl"), settings={}, number=3, check=False):
        assert f"ERROR: The plans give {ALPHA} batches of 2, which cannot be divided among 3 processes" in output
    for output in train(world, *arguments(900, "nnUNetTrainerKDTeacher", "-p", "nnUNetKDPlans"), settings={}, number=3,
                        check=False):  # fmt: skip
        assert "Start at most 2 processes in all" in output


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (arguments(1, "nnUNetTrainer"), "nnUNetTrainer is not a trainer of nnunet_kd"),
        (arguments(1, "nnUNetTrainerKDControl", "-num_gpus", "2"), "torchrun --nproc_per_node 2"),
        ([*arguments(1, "nnUNetTrainerKDControl")[:-1], "mps"], "-device mps cannot be used by several processes"),
        (arguments(1, "nnUNetTrainerKDControl", "--epochs", "3"), "unrecognized arguments: --epochs 3"),
    ],
)
def test_arguments_that_do_not_fit(world: Any, args: list[str], named: str) -> None:
    for output in train(world, *args, settings={}, number=1, check=False):
        assert named in output
        assert "Traceback" not in output


def test_variables_that_are_missing(world: Any) -> None:
    output = world.run("nnunet_kd.train", *arguments(1, "nnUNetTrainerKDControl"), check=False, RANK="0")
    assert "RANK is set, but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in output
