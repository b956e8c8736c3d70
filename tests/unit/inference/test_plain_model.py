"""A member's stock network gives the joint network's logits; heads are found by name; patches fit the strides."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_kd.data.joint import HeadEntry, JointDataset, MemberEntry
from nnunet_kd.data.joint_network import build_joint_network
from nnunet_kd.errors import NnUNetKDError, TeacherError
from nnunet_kd.inference.export import export_model, largest_difference
from nnunet_kd.inference.plain_model import choose_member, plain_member_model, slice_weights
from nnunet_kd.inference.trained_model import open_model
from nnunet_kd.networks.joint import Head, JointUNet, Route
from nnunet_kd.spaces.channels import ChannelSpace

NUM_CHANNELS, NUM_HEAD_CHANNELS = 4, 6
ROUTES = {"a": Route((2, 0), 0, 2), "b": Route((1,), 2, 5), "c": Route((3, 1, 2), 5, 6)}
HEADS = [Head(0, 2, False), Head(2, 5, False), Head(5, 6, True)]


def unet(residual: bool, dimension: int, num_inputs: int, num_outputs: int) -> nn.Module:
    convolution, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimension == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    blocks = {"n_blocks_per_stage": 1} if residual else {"n_conv_per_stage": 1}
    return (ResidualEncoderUNet if residual else PlainConvUNet)(
        num_inputs,
        n_stages=3,
        features_per_stage=(4, 6, 8),
        conv_op=convolution,
        kernel_sizes=3,
        strides=(1, 2, 2),
        num_classes=num_outputs,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=False,
        **blocks,
    )


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("member", list(ROUTES))
def test_sliced_network_gives_the_logits_of_the_member(residual: bool, dimension: int, member: str) -> None:
    torch.manual_seed(0)
    joint = JointUNet(unet(residual, dimension, NUM_CHANNELS, NUM_HEAD_CHANNELS), ROUTES, HEADS).eval()
    route = ROUTES[member]
    stock = unet(residual, dimension, len(route.channels), route.stop - route.start).eval()
    before = {key: value.clone() for key, value in joint.state_dict().items()}

    stock.load_state_dict(slice_weights(joint.state_dict(), stock, route))  # strict: every duplicate key has its shape

    image = torch.randn(2, len(route.channels), *(8, 12, 8)[:dimension])
    joint.select(member)
    with torch.no_grad():
        torch.testing.assert_close(stock(image), joint(image), rtol=0, atol=1e-6)
        # the long way round: all channels, absent ones zero, and all heads
        placed = torch.zeros(2, NUM_CHANNELS, *image.shape[2:])
        placed[:, list(route.channels)] = image
        joint._input_convolution[0].channels = None
        joint._head = None
        torch.testing.assert_close(stock(image), joint(placed)[:, route.start : route.stop], rtol=1e-5, atol=1e-5)
    for key, value in joint.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_difference_is_the_largest_and_nan_is_infinite() -> None:
    shape = (1, 4, 4)
    assert largest_difference(torch.sin, torch.sin, shape) == 0
    assert largest_difference(lambda x: x, lambda x: x + 0.5, shape) == pytest.approx(0.5, abs=1e-6)
    assert largest_difference(lambda x: x, lambda x: x * float("nan"), shape) == float("inf")
    assert largest_difference(lambda x: x, lambda x: x[..., 1:], shape) == float("inf")


# ---- heads and members ---------------------------------------------------------------------------------------------

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 4, 4],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [1, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def plans_of(dataset: str, patch_size: list[int], features: int) -> dict[str, Any]:
    architecture = copy.deepcopy(ARCHITECTURE)
    architecture["arch_kwargs"]["features_per_stage"] = [features] * 3
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {
            "2d": {"batch_size": 2, "patch_size": patch_size, "spacing": [1.0, 2.0], "architecture": architecture}
        },
    }


MEMBERS: dict[str, tuple[list[str], dict[str, Any], list[int]]] = {
    "Dataset001_Own": (["T2", "T1"], {"background": 0, "x": 1, "y": 2}, [8, 8]),
    "Dataset002_First": (["T1"], {"background": 0, "lesion": 1}, [9, 6]),
    "Dataset003_Second": (["T2"], {"background": 0, "tumor": 1}, [8, 16]),
}
SHARED = {"background": 0, "mass": 1}


@pytest.fixture
def teacher_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A joint teacher with random weights: Own has a head of its own, First and Second share 'mass'."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    entries = {}
    for name, (channels, labels, patch_size) in MEMBERS.items():
        folder = tmp_path / "preprocessed" / name
        folder.mkdir(parents=True)
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans_of(name, patch_size, 4)))
        channel_names = {str(index): channel for index, channel in enumerate(channels)}
        dataset_json = {"channel_names": channel_names, "labels": labels, "numTraining": 1, "file_ending": ".png"}
        (folder / "dataset.json").write_text(json.dumps({**dataset_json, "nnunet_kd": {"tasks": {}}}))
        own = name == "Dataset001_Own"
        entries[name] = MemberEntry(
            plans="nnUNetPlans",
            description={
                "plans": plans_of(name, patch_size, 4),
                "dataset_json": json.loads((folder / "dataset.json").read_text()),
            },
            channel_names=channels,
            head=name if own else "mass",
            previous_stage_labels=[],
            label_map=None if own else {next(label for label, value in labels.items() if value == 1): "mass"},
        )
    heads = {"mass": HeadEntry(SHARED), "Dataset001_Own": HeadEntry(MEMBERS["Dataset001_Own"][1])}
    joint = JointDataset("Dataset900_Joint", ChannelSpace(("T1", "T2")), entries, heads)
    plans = {**plans_of(joint.name, [16, 16], 6), "plans_name": "nnUNetKDPlans", "nnunet_kd": joint.to_block()}
    folder = tmp_path / "results" / joint.name / "nnUNetTrainerKDTeacher__nnUNetKDPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": SHARED}))
    manager = PlansManager(plans)
    torch.manual_seed(0)
    checkpoint = {
        "network_weights": build_joint_network(manager, manager.get_configuration("2d"), False).state_dict(),
        "trainer_name": "nnUNetTrainerKDTeacher",
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_heads_are_found_by_name_member_and_id(teacher_folder: Path) -> None:
    joint = open_model(teacher_folder).joint
    assert joint is not None
    assert choose_member(joint, "Dataset001_Own") == "Dataset001_Own"
    assert choose_member(joint, "2") == "Dataset002_First"
    assert choose_member(joint, "Dataset003_Second") == "Dataset003_Second"
    assert choose_member(joint, "mass", "3") == "Dataset003_Second"
    with pytest.raises(NnUNetKDError, match="Dataset002_First, Dataset003_Second"):
        choose_member(joint, "mass")
    with pytest.raises(NnUNetKDError, match="does not belong"):
        choose_member(joint, "mass", "Dataset001_Own")
    with pytest.raises(NnUNetKDError, match=r"no head 'liver'\. Heads: mass, Dataset001_Own"):
        choose_member(joint, "liver")
    with pytest.raises(NnUNetKDError, match="--head"):
        choose_member(joint, None)
    with pytest.raises(NnUNetKDError, match=r"what to predict\. Members: Dataset001_Own, Dataset002_First"):
        choose_member(dataclasses.replace(joint, heads={}), None)


@pytest.mark.parametrize(
    ("member", "labels", "patch_size"),
    [
        ("Dataset001_Own", {"background": 0, "x": 1, "y": 2}, [8, 8]),
        ("Dataset002_First", SHARED, [10, 8]),  # 9 x 6, strides 2 x 4
        ("Dataset003_Second", SHARED, [8, 16]),
    ],
)
def test_member_model_has_the_member_s_plans_and_the_teacher_s_network(
    teacher_folder: Path, tmp_path: Path, member: str, labels: dict[str, int], patch_size: list[int]
) -> None:
    plain = plain_member_model(open_model(teacher_folder), member, own_labels=False)
    configuration = plain.plans["configurations"]["2d"]
    assert plain.plans["dataset_name"] == member
    assert configuration["spacing"] == [1.0, 2.0]
    assert configuration["patch_size"] == patch_size
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [6, 6, 6]
    assert plain.dataset_json["labels"] == labels
    assert plain.dataset_json["channel_names"] == {str(i): name for i, name in enumerate(MEMBERS[member][0])}
    assert "nnunet_kd" not in plain.plans
    assert "nnunet_kd" not in plain.dataset_json

    head = "mass" if labels == SHARED else member
    verification = export_model(open_model(teacher_folder), tmp_path / "out", head, member)
    assert verification.patch_shape == (len(MEMBERS[member][0]), *patch_size)
    assert verification.differences[0] <= 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"out", "preprocessed", "results"}


def test_member_of_a_shared_head_speaks_in_its_own_labels(teacher_folder: Path, tmp_path: Path) -> None:
    """The head's logits by the joint network itself, expanded by hand: tumor = mass; cyst never wins."""
    plans = json.loads((teacher_folder / "plans.json").read_text())
    entry = plans["nnunet_kd"]["members"]["Dataset003_Second"]
    entry["description"]["dataset_json"]["labels"] = {"background": 0, "cyst": 1, "tumor": 2}
    entry["label_map"] = {"tumor": "mass", "cyst": "mass"}
    (teacher_folder / "plans.json").write_text(json.dumps(plans))
    plain = plain_member_model(open_model(teacher_folder), "Dataset003_Second", own_labels=True)
    assert plain.dataset_json["labels"] == {"background": 0, "cyst": 1, "tumor": 2}
    stock = plain.build_network()
    stock.load_state_dict(plain.weights[0])
    manager = PlansManager(plans)
    joint = build_joint_network(manager, manager.get_configuration("2d"), False)
    joint.load_state_dict(torch.load(teacher_folder / "fold_0" / "checkpoint_final.pth")["network_weights"])
    joint.select("Dataset003_Second")
    image = torch.randn(2, 1, 8, 16)
    with torch.no_grad():
        own, head = stock.eval()(image), joint.eval()(image)
    torch.testing.assert_close(own[:, :2], head)  # background and cyst, which comes first and speaks for both
    torch.testing.assert_close(own[:, 2], head[:, 0] - 20)
    assert export_model(open_model(teacher_folder), tmp_path / "out", "3").differences[0] <= 1e-5


def test_fold_of_other_joint_plans_is_refused(teacher_folder: Path) -> None:
    file = teacher_folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file)
    plans = json.loads((teacher_folder / "plans.json").read_text())
    checkpoint["init_args"]["plans"] = copy.deepcopy(plans)
    torch.save(checkpoint, file)
    open_model(teacher_folder).load(0)
    heads = plans["nnunet_kd"]["heads"]
    plans["nnunet_kd"]["heads"] = {name: heads[name] for name in reversed(heads)}
    (teacher_folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(TeacherError, match=r"checkpoint_final.pth was trained under other joint plans .*heads changed"):
        open_model(teacher_folder).load(0)


def test_wrong_weights_are_noticed_and_nothing_is_left(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input channels T2, T1 taken in the wrong order have the right shape."""

    def slice_in_wrong_order(weights: Any, network: nn.Module, route: Route, label_map: Any) -> Any:
        return slice_weights(weights, network, Route(route.channels[::-1], route.start, route.stop), label_map)

    monkeypatch.setattr("nnunet_kd.inference.plain_model.slice_weights", slice_in_wrong_order)
    with pytest.raises(NnUNetKDError, match="largest differences fold 0"):
        export_model(open_model(teacher_folder), tmp_path / "out", "Dataset001_Own")
    assert {path.name for path in tmp_path.iterdir()} == {"preprocessed", "results"}


def test_a_teacher_needs_nothing_of_its_members_folders(teacher_folder: Path, tmp_path: Path) -> None:
    model = open_model(teacher_folder)
    plans_file = tmp_path / "preprocessed" / "Dataset001_Own" / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["2d"]["spacing"] = [1.0, 1.0]  # planned again after the teacher was trained
    plans_file.write_text(json.dumps(plans))
    before = plain_member_model(model, "Dataset001_Own", own_labels=True)
    assert before.plans["configurations"]["2d"]["spacing"] == [1.0, 2.0]
    shutil.rmtree(tmp_path / "preprocessed")
    after = plain_member_model(model, "Dataset001_Own", own_labels=True)
    assert (after.plans, after.dataset_json) == (before.plans, before.dataset_json)


def test_networks_that_stock_nnunet_does_not_build_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    plans = json.loads((teacher_folder / "plans.json").read_text())
    del plans["nnunet_kd"]
    plans["configurations"]["2d"]["architecture"]["network_class_name"] = "my_package.MyNetwork"
    (teacher_folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(NnUNetKDError, match=r"my_package\.MyNetwork"):
        export_model(open_model(teacher_folder), tmp_path / "out")


def test_missing_folds_are_listed(teacher_folder: Path) -> None:
    with pytest.raises(NnUNetKDError, match=r"fold_1, fold_all\. Folds that have it: 0"):
        open_model(teacher_folder, [0, 1, "all"])
    with pytest.raises(NnUNetKDError, match=r"checkpoints in this model: checkpoint_final\.pth"):
        open_model(teacher_folder, None, "checkpoint_best.pth")
    relative = teacher_folder.relative_to(teacher_folder.parents[1])
    assert list(open_model(relative).files) == [0]
