"""Two processes (gloo, CPU) train a student and a joint teacher as the trainers do under DDP.

This file is also the program of each process: ``python test_distributed.py RANK STORE``.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_kd.networks.adapters import Projector
from nnunet_kd.networks.joint import Head, JointUNet, Route
from nnunet_kd.networks.taps import Stage, find_stage, tap
from nnunet_kd.settings import Guard, parse_settings
from nnunet_kd.spaces.labels import LabelSpace, match_label_spaces
from nnunet_kd.teachers.output import Taught, TeacherOutput
from nnunet_kd.training.base import KDTrainer
from nnunet_kd.training.distillation import DistillationLoss, build_terms, projector_name

WORLD_SIZE = 2
LEVELS = ("bottleneck", "decoder@1/2")
LEVEL_WEIGHTS = (2 / 3, 1 / 3, 1e-6)  # as nnU-Net's under DDP: no level has exactly 0
TEACHER_WIDTH = 5
SPACE = LabelSpace.from_dataset_json({"labels": {"background": 0, "organ": 1, "lesion": 2}})
TERMS = [
    {"on": "logits", "loss": "kl", "temperature": 4.0},
    {"on": "features", "loss": "mse", "levels": list(LEVELS), "weight": 0.5},
]
PLANS = {
    "dataset_name": "Dataset001_A",
    "plans_name": "nnUNetPlans",
    "configurations": {"2d": {"architecture": {}, "batch_size": 2}},
    "continue_training": False,
}


# ---- the test --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("distributed")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "store")],
            env={**os.environ, "nnUNet_results": str(folder / "results")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_every_parameter_gets_the_mean_gradient_of_all_processes(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["without_gradient"] == [[], [], []]
        assert answer["distance_to_first_process"] == [0.0, 0.0, 0.0]
        assert max(answer["distance_to_mean"]) < 1e-5
        assert min(answer["distance_to_own"]) > 1e-3  # else averaging would not show


def test_teacher_learns_from_the_member_of_every_process(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["teacher_without_gradient"] == []
        assert answer["teacher_distance_to_first_process"] == 0.0
        assert answer["heads_with_gradient"] == [True, True]


def test_processes_whose_members_have_different_tasks_wait_for_no_gradient(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["tasks_without_gradient"] == []
        assert answer["tasks_distance_to_first_process"] == 0.0
        assert answer["tasks_parts_with_gradient"] == [True, True]  # the decoder of one, the class head of the other


def test_only_the_first_process_starts_a_wandb_run(answers: list[dict[str, Any]]) -> None:
    assert [answer["wandb_runs"] for answer in answers] == [1, 0]
    assert [answer["wandb_enabled_afterwards"] for answer in answers] == ["1", "1"]


def test_a_device_that_is_named_is_taken(answers: list[dict[str, Any]]) -> None:
    assert [answer["devices"] for answer in answers] == [["cuda:0", "cuda:5", "cpu"], ["cuda:1", "cuda:5", "cpu"]]
    assert not any(answer["scales"] for answer in answers)  # a CPU has no gradient scaler


# ---- one process -----------------------------------------------------------------------------------------------------
def work(rank: int, store: str) -> dict[str, Any]:
    """Three steps: before the terms' warm-up, in its middle and after it."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # other weights and other batches on each rank; DDP brings the weights together
    network, stages = make_student()
    wrapped = DistributedDataParallel(network)
    projectors = {
        projector_name("joint", level): Projector(2, stages[level].channels, TEACHER_WIDTH) for level in LEVELS
    }
    wrapped_projectors = {name: DistributedDataParallel(module) for name, module in projectors.items()}
    modules = [network, *projectors.values()]
    optimizer = torch.optim.SGD([parameter for module in modules for parameter in module.parameters()], lr=0.01)
    loss, unwrapped_loss = make_loss(wrapped_projectors), make_loss(projectors)
    answer: dict[str, Any] = {
        "without_gradient": [],
        "distance_to_first_process": [],
        "distance_to_mean": [],
        "distance_to_own": [],
    }
    for progress in (0.0, 0.05, 0.5):
        batch = make_batch(stages)
        own = gradients(network, modules, unwrapped_loss, batch, progress)
        mean = own.clone()
        dist.all_reduce(mean)
        found = gradients(wrapped, modules, loss, batch, progress)
        first = found.clone()
        dist.broadcast(first, 0)
        answer["without_gradient"].append(
            [name for name, parameter in network.named_parameters() if parameter.grad is None]
            + [name for name, module in projectors.items() if progress > 0 and module.convolution.weight.grad is None]
        )
        answer["distance_to_first_process"].append(float((found - first).norm()))
        answer["distance_to_mean"].append(float((found - mean / WORLD_SIZE).norm() / found.norm()))
        answer["distance_to_own"].append(float((found - own).norm() / found.norm()))
        optimizer.step()
    answer |= teach(rank) | teach_tasks(rank) | take_devices() | start_wandb()
    dist.destroy_process_group()
    return answer


def make_unet(num_input_channels: int, num_classes: int) -> nn.Module:
    """A small stock network in 2D."""
    return PlainConvUNet(
        input_channels=num_input_channels,
        n_stages=4,
        features_per_stage=(4, 8, 8, 8),
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2),
        n_conv_per_stage=1,
        num_classes=num_classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )


def make_student() -> tuple[nn.Module, dict[str, Stage]]:
    """A tapped stock network and its stages."""
    network = make_unet(1, SPACE.num_channels)
    stages = {level: find_stage(network, level) for level in LEVELS}
    tap(network, list(stages.values()))
    return network, stages


def teach(rank: int) -> dict[str, Any]:
    """One step of a joint teacher of two members, one member per process, as each draws its own."""
    routes = {"a": Route((0,), 0, 2), "b": Route((0, 1), 2, 5)}
    joint = JointUNet(make_unet(2, 5), routes, [Head(0, 2, False), Head(2, 5, False)])
    wrapped = DistributedDataParallel(joint)
    joint.select("ab"[rank])
    outputs = wrapped(torch.randn(2, 1 + rank, 32, 32))
    sum(weight * output.square().mean() for weight, output in zip(LEVEL_WEIGHTS, outputs, strict=True)).backward()
    gradients = [parameter.grad for parameter in joint.parameters() if parameter.grad is not None]
    own = torch.cat([gradient.flatten() for gradient in gradients])
    first = own.clone()
    dist.broadcast(first, 0)
    of_heads = joint.decoder.seg_layers[-1].bias.grad.split([2, 3])
    return {
        "teacher_without_gradient": [name for name, value in joint.named_parameters() if value.grad is None],
        "teacher_distance_to_first_process": float((own - first).norm()),
        "heads_with_gradient": [bool(gradient.any()) for gradient in of_heads],
    }


def teach_tasks(rank: int) -> dict[str, Any]:
    """One step of a joint teacher of a member that segments and one that has classes and no segmentation."""
    routes = {"a": Route((0,), 0, 2), "b": Route((0,), 0, 0)}
    task_heads = {"b": {"classification": {"targets": [["grade", 3]]}, "detection": None}}
    joint = JointUNet(make_unet(1, 2), routes, [Head(0, 2, False)], task_heads)
    joint.uses_all_parameters = True
    wrapped = DistributedDataParallel(joint)
    joint.select("ab"[rank])
    output = wrapped(torch.randn(2, 1, 32, 32))
    outputs = [output.classification["grade"]] if rank else output
    sum(own.square().mean() for own in outputs).backward()
    found = torch.cat([p.grad.flatten() for p in joint.parameters() if p.grad is not None])
    first = found.clone()
    dist.broadcast(first, 0)
    parts = (joint.decoder.stages[0], joint.task_heads["b"])
    return {
        "tasks_without_gradient": [name for name, value in joint.named_parameters() if value.grad is None],
        "tasks_distance_to_first_process": float((found - first).norm()),
        "tasks_parts_with_gradient": [any(bool(p.grad.any()) for p in part.parameters()) for part in parts],
    }


def make_loss(projectors: Mapping[str, nn.Module]) -> DistillationLoss:
    """Stock nnU-Net's loss under DDP, plus a term on logits and one on features, guarded."""
    supervised = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    return DistillationLoss(
        DeepSupervisionWrapper(supervised, LEVEL_WEIGHTS),
        LEVEL_WEIGHTS,
        build_terms(parse_settings({"teachers": {"joint": {}}, "terms": TERMS}), {"joint": False}),
        {"joint": Taught(("segmentation",), match_label_spaces(SPACE, SPACE)[0])},
        projectors,
        LEVELS,
        Guard(margin=0.1, exponent=4.0),
    )


def make_batch(stages: Mapping[str, Stage]) -> tuple[Tensor, list[Tensor], TeacherOutput]:
    """An image, its targets at the three levels of deep supervision, and a teacher that knows them."""
    image, labels = torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 1, 32, 32))
    logits = 4 * nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1) + torch.randn(2, 3, 32, 32)
    features = {
        level: torch.randn(2, TEACHER_WIDTH, *(32 // stride for stride in stage.stride))
        for level, stage in stages.items()
    }
    return image, [labels[..., ::step, ::step] for step in (1, 2, 4)], TeacherOutput(logits, features)


def gradients(
    network: nn.Module,
    modules: list[nn.Module],
    loss: DistillationLoss,
    batch: tuple[Tensor, list[Tensor], TeacherOutput],
    progress: float,
) -> Tensor:
    """All gradients of one step as one vector; 0 where there is none. As in the student's ``train_step``."""
    image, targets, teacher = batch
    for module in modules:
        module.zero_grad()
    loss.progress = progress
    if any(term.weight(progress) for term in loss.terms):
        loss.teacher_outputs["joint"] = teacher
    loss(network(image), targets).backward()
    loss.teacher_outputs.clear()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def make_trainer(*device: torch.device) -> KDTrainer:
    dataset_json = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    return KDTrainer(copy.deepcopy(PLANS), "2d", 0, dataset_json, *device)


def take_devices() -> dict[str, Any]:
    """Make trainers as nnU-Net does on one machine, on a GPU that is not that of the rank, and on the CPU."""
    trainers = [make_trainer(), make_trainer(torch.device("cuda", 5)), make_trainer(torch.device("cpu"))]
    return {"devices": [str(trainer.device) for trainer in trainers], "scales": trainers[-1].grad_scaler is not None}


def start_wandb() -> dict[str, Any]:
    """Make a trainer with W&B on; it is replaced by something that counts its runs."""
    os.environ["nnUNet_wandb_enabled"] = "1"
    runs = []

    def init(**arguments: Any) -> SimpleNamespace:
        runs.append(arguments)
        return SimpleNamespace(step=0, config=SimpleNamespace(update=lambda *_, **__: None))

    nnunet_logger.wandb = SimpleNamespace(init=init)
    make_trainer()
    return {"wandb_runs": len(runs), "wandb_enabled_afterwards": os.environ["nnUNet_wandb_enabled"]}


if __name__ == "__main__":
    print("\n" + json.dumps(work(int(sys.argv[1]), sys.argv[2])))


def test_network_is_found_before_it_is_wrapped() -> None:
    """nnU-Net asks for the optimizer, for which students tap their network, before it wraps the network for DDP."""
    trainer = KDTrainer.__new__(KDTrainer)
    trainer.is_ddp = True
    trainer.network = nn.Linear(2, 2)
    assert trainer.unwrapped_network() is trainer.network
