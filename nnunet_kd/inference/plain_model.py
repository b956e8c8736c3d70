"""A trained model as a plain single-dataset nnU-Net: stock classes, no key of ours in plans or weights.

A student is one already. Of a joint teacher one member's view is taken: the member's own stock plans with the teacher's
architecture, the first convolution sliced to the member's channels and the output convolutions to its head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_kd.data.joint import JointDataset
from nnunet_kd.data.member import Member
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.inference.trained_model import Fold, TrainedModel
from nnunet_kd.networks.conditional_unet import stock_backbone, stock_one_step_weights
from nnunet_kd.networks.joint import Route, input_convolution, member_head_weights
from nnunet_kd.networks.multitask import Heads, multitask_architecture, stock_architecture, stock_weights
from nnunet_kd.networks.task_codes import planned_network
from nnunet_kd.settings import BLOCK
from nnunet_kd.spaces.labels import LabelMap

STOCK_NETWORKS = "dynamic_network_architectures."
SEEN = ("training_cases", "unlabeled_cases")  # what a checkpoint of ours records of the cases that it has seen


@dataclass(frozen=True)
class PlainModel:
    """What stock nnU-Net needs to predict.

    Args:
        plans: Stock plans, without our block.
        dataset_json: Stock dataset.json, without our block.
        configuration: Name of the configuration.
        weights: ``state_dict`` of the stock network per fold.
        mirroring_axes: Axes that test-time mirroring may flip; None if there are none.
        member: The joint teacher's member whose view this is; None for a model of one dataset.
        label_map: From the member's labels to its shared head's, where the outputs are the member's labels.
        seen_cases: What each fold recorded of the cases that it has seen (``SEEN``), so that it cannot teach across a
            leak.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    weights: dict[Fold, dict[str, Tensor]]
    mirroring_axes: tuple[int, ...] | None
    member: str | None = None
    label_map: LabelMap | None = None
    seen_cases: dict[Fold, dict[str, Any]] = field(default_factory=dict)

    @property
    def plans_manager(self) -> PlansManager:
        """Stock view of the plans."""
        return PlansManager(self.plans)

    @property
    def configuration_manager(self) -> ConfigurationManager:
        """Stock view of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @property
    def num_input_channels(self) -> int:
        """Image channels, and in a cascade the labels of the previous stage."""
        return int(determine_num_input_channels(self.plans_manager, self.configuration, self.dataset_json))

    def build_network(self) -> nn.Module:
        """The stock network without weights, deep supervision off."""
        return build_stock_network(self.plans_manager, self.configuration, self.dataset_json)


def build_stock_network(plans_manager: PlansManager, configuration: str, dataset_json: dict[str, Any]) -> nn.Module:
    """The network that ``nnUNetTrainer`` builds for prediction."""
    return nnUNetTrainer.build_network_architecture(
        plans_manager,
        plans_manager.get_configuration(configuration),
        determine_num_input_channels(plans_manager, configuration, dataset_json),
        plans_manager.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )


def choose_member(joint: JointDataset, head: str | None, member: str | None = None) -> str:
    """The member whose images are meant.

    Args:
        joint: The joint dataset.
        head: A member or a head, by name, or a member by its dataset id.
        member: Needed where several members share the head.

    Raises:
        NnUNetKDError: No or an unknown name, or several members fit; lists the choice.
    """
    members = ", ".join(joint.members)
    choice = f"Heads: {', '.join(joint.heads)}; members: {members}" if joint.heads else f"Members: {members}"
    if head is None:
        raise NnUNetKDError(f"{joint.name} is a joint teacher: say with --head what to predict. {choice}.")
    head, member = _full_name(joint, head), None if member is None else _full_name(joint, member)
    if head not in joint.heads and head not in joint.members:
        raise NnUNetKDError(f"The joint teacher of {joint.name} has no head '{head}'. {choice}.")
    fitting = [head] if head in joint.members else [m for m, entry in joint.members.items() if entry.head == head]
    if member is not None and member not in fitting:
        raise NnUNetKDError(f"--member {member} does not belong to --head {head}, but {', '.join(fitting)} does.")
    if member is None and len(fitting) > 1:
        raise NnUNetKDError(
            f"Several members share the head '{head}', with plans and image channels of their own. Say with --member "
            f"which one the images are like: {', '.join(fitting)}."
        )
    return member or fitting[0]


def in_own_labels(joint: JointDataset, head: str | None) -> bool:
    """Whether ``head`` names a member, which speaks in its own labels, and not a head that several share."""
    return head is not None and _full_name(joint, head) in joint.members


def _full_name(joint: JointDataset, name: str) -> str:
    """A member's full name where ``name`` is its dataset id."""
    return next((m for m in joint.members if name.isdigit() and m.startswith(f"Dataset{int(name):03d}_")), name)


def plain_member_model(model: TrainedModel, member_name: str, own_labels: bool, task_heads: bool = False) -> PlainModel:
    """A joint teacher's member as a plain model; with ``task_heads`` also what it has for classes and boxes.

    Its labels are the member's own, or with ``own_labels`` false those of its head; they differ where members share a
    head. Of the member's labels that share one of the head's, the first speaks for all.

    The joint network pads the member's patch with zeros to a multiple of its strides; a stock network cannot, so the
    patch itself becomes that large and is filled with image instead.

    Raises:
        NnUNetKDError: The member has no segmentation, and classes and boxes are not wanted.
        NotImplementedError: A cascade in the labels of a shared head.
    """
    joint = model.joint
    assert joint is not None
    weights, configuration, _, mirroring_axes, seen_cases = _load(model)
    member = joint.recorded_member(member_name, configuration)
    teacher = PlansManager(model.plans).get_configuration(configuration)
    cascaded = teacher.previous_stage_name is not None
    heads = joint.member_heads(member_name, configuration) if task_heads else (None, None)
    if joint.members[member_name].head is None and not any(heads):
        raise NnUNetKDError(
            f"{member_name} has no segmentation, and a plain nnU-Net predicts nothing else. Use nnUNetKD_predict "
            f"--head {member_name} where nnunet_kd is installed."
        )
    plans = _member_plans(member, teacher, heads)
    plans["plans_name"] = model.plans["plans_name"]
    label_map = joint.head_map(member_name)
    if own_labels or label_map is None:
        dataset_json = without_block(member.dataset_json)
    else:
        dataset_json, label_map = _head_dataset_json(joint, member, cascaded), None
    if any(heads):
        dataset_json[BLOCK] = copy.deepcopy(member.dataset_json[BLOCK])  # declares the tasks
    plain = PlainModel(plans, dataset_json, configuration, {}, mirroring_axes, member_name, label_map, seen_cases)
    route = joint.routes(cascaded)[member_name]
    network = plain.build_network()
    for fold in list(weights):
        own = weights.pop(fold)
        plain.weights[fold] = {
            **slice_weights(stock_weights(own), network, route, label_map),
            **(member_head_weights(own, member_name) if any(heads) else {}),
        }
    return plain


def plain_single_model(model: TrainedModel) -> PlainModel:
    """A student, a control or any stock model without anything of ours: of several tasks, the segmentation.

    Of a conditional U-Net it is the one-step segmentation: the planned U-Net with the self code's scales and shifts.

    Raises:
        NnUNetKDError: It has no segmentation, or its trainer is not installed or builds a network that stock nnU-Net
            does not.
    """
    if not Tasks.from_dataset_json(model.dataset_json).segmentation:
        raise NnUNetKDError(
            f"{model.folder} predicts no segmentation, and a plain nnU-Net predicts nothing else. Use "
            f"nnUNetKD_predict where nnunet_kd is installed."
        )
    plans, dataset_json = without_block(model.plans), without_block(model.dataset_json)
    weights, configuration, trainer_name, mirroring_axes, seen_cases = _load(model)
    trained = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    only_stock = stock_one_step_weights if planned_network(trained) == "conditional_unet" else stock_weights
    weights = {fold: only_stock(own) for fold, own in weights.items()}
    for content in plans["configurations"].values():
        if "architecture" in content:
            own = content["architecture"]
            to_stock = stock_backbone if planned_network(own) == "conditional_unet" else stock_architecture
            content["architecture"] = to_stock(own)
    check_stock_network(plans, configuration, trainer_name)
    return PlainModel(plans, dataset_json, configuration, weights, mirroring_axes, seen_cases=seen_cases)


def _load(
    model: TrainedModel,
) -> tuple[dict[Fold, dict[str, Tensor]], str, str, tuple[int, ...] | None, dict[Fold, dict[str, Any]]]:
    """Weights per fold; configuration, trainer name and mirroring axes of the first fold, as stock prediction does.

    Last what the folds recorded of the cases that they have seen.
    """
    checkpoints = {fold: model.load(fold) for fold in model.files}
    first = next(iter(checkpoints.values()))
    return (
        {fold: checkpoint["network_weights"] for fold, checkpoint in checkpoints.items()},
        first["init_args"]["configuration"],
        first["trainer_name"],
        first.get("inference_allowed_mirroring_axes"),
        {
            fold: {key: checkpoint[BLOCK][key] for key in SEEN if key in checkpoint[BLOCK]}
            for fold, checkpoint in checkpoints.items()
            if "training_cases" in checkpoint.get(BLOCK, {})
        },
    )


def check_stock_network(plans: dict[str, Any], configuration: str, trainer_name: str) -> None:
    """Raise NnUNetKDError unless ``nnUNetTrainer`` builds the network of this trainer from these plans."""
    network = PlansManager(plans).get_configuration(configuration).network_arch_class_name
    if not network.startswith(STOCK_NETWORKS):
        raise NnUNetKDError(
            f"The network class {network} of configuration {configuration} does not come with nnU-Net, so a plain "
            f"model folder cannot hold it. Only networks of dynamic_network_architectures can be exported."
        )
    try:
        trainer = recursive_find_trainer_class_by_name(trainer_name)
    except RuntimeError as error:
        raise NnUNetKDError(
            f"The trainer {trainer_name} of this model is not installed, so it is unknown whether its network is a "
            f"stock one. Put the folder that holds it into nnUNet_extTrainer."
        ) from error
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise NnUNetKDError(
            f"The trainer {trainer_name} builds a network of its own, which nnUNetTrainer cannot build from the plans. "
            f"Such a model cannot become a plain model folder."
        )


def slice_weights(
    weights: Mapping[str, Tensor], network: nn.Module, route: Route, label_map: LabelMap | None = None
) -> dict[str, Tensor]:
    """The joint network's weights as those of a member's stock network.

    Args:
        weights: ``state_dict`` of the joint network.
        network: The member's stock network; shows under which names the first convolution is stored.
        route: The member's input channels and output slice.
        label_map: From the member's labels to the head's, if the outputs shall be the member's labels.

    Returns:
        ``state_dict`` of ``network``; tensors that are not sliced are shared with ``weights``.
    """
    first = input_convolution(network)
    inputs = {f"{name}.weight" for name, module in network.named_modules(remove_duplicate=False) if module is first}
    sliced, own = {}, network.state_dict()
    for key, value in weights.items():
        if key in inputs:
            sliced[key] = value[:, list(route.channels)].clone()
        elif key.startswith("decoder.seg_layers.") and route.stop == route.start:
            sliced[key] = torch.zeros_like(own[key])  # the member has no segmentation, and nobody asks for one
        elif key.startswith("decoder.seg_layers."):
            head = value[route.start : route.stop].clone()
            sliced[key] = head if label_map is None else label_map.expand(head, lower=key.endswith(".bias"), axis=0)
        else:
            sliced[key] = value
    return sliced


def without_block(description: Mapping[str, Any]) -> dict[str, Any]:
    """Plans or dataset.json without our block."""
    return {key: copy.deepcopy(value) for key, value in description.items() if key != BLOCK}


def _member_plans(member: Member, teacher: ConfigurationManager, heads: Heads) -> dict[str, Any]:
    """The member's plans with one configuration, whose network is the teacher's, with ``heads`` if it has any."""
    plans = without_block(member.plans)
    configuration = copy.deepcopy(member.configuration_manager.configuration)
    configuration.pop("inherits_from", None)
    configuration["architecture"] = copy.deepcopy(teacher.configuration["architecture"])
    if any(heads):
        configuration["architecture"] = multitask_architecture(configuration["architecture"], *heads)
    multiple = np.prod(np.vstack(teacher.pool_op_kernel_sizes), axis=0)
    configuration["patch_size"] = [
        math.ceil(size / step) * int(step) for size, step in zip(configuration["patch_size"], multiple, strict=True)
    ]
    plans["configurations"] = {member.configuration: configuration}
    return plans


def _head_dataset_json(joint: JointDataset, member: Member, cascaded: bool) -> dict[str, Any]:
    """The member's dataset.json with the labels of its head."""
    entry = joint.members[member.name]
    dataset_json = without_block(member.dataset_json)
    if entry.label_map is None or entry.head is None:
        return dataset_json
    if cascaded:
        raise NotImplementedError(
            f"{member.name} shares the head '{entry.head}'. In a cascade the network also sees the member's own "
            f"labels, which a plain nnU-Net of the shared labels cannot express. Use 3d_fullres, or a member with a "
            f"head of its own."
        )
    dataset_json.pop("regions_class_order", None)
    return {**dataset_json, **copy.deepcopy(joint.heads[entry.head].dataset_json)}
