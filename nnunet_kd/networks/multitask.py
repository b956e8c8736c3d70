"""The planned segmentation network plus heads for classification and detection.

Stock nnU-Net builds it from plans. Its keyword arguments are those of the planned network plus four of ours
(``backbone``, ``classification``, ``detection``, ``segmentation``), because nnU-Net and our planners read ``strides``
and ``features_per_stage`` of that block. Our design.
"""

from __future__ import annotations

import copy
import pydoc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.taps import (
    Stage,
    UNet,
    check_unet,
    encode_and_decode,
    encoder_strides,
    segment,
    select_features,
)
from nnunet_kd.tasks.classification import ClassificationHead, Pooled
from nnunet_kd.tasks.detection_head import BoxMaps, DetectionHead
from nnunet_kd.tasks.detection_plan import DetectionPlan

Heads = tuple[dict[str, Any] | None, dict[str, Any] | None]  # settings for classification and detection
HEADS = "heads."  # weights under this prefix are ours, all others the stock network's
MEMBER_HEADS = "task_heads."  # the same in a joint network, followed by the member
NETWORK_CLASS = "nnunet_kd.networks.multitask.MultiTaskUNet"
NUM_POOLED_STAGES = 4
UNTRAINED = (
    "The dataset of this model has no segmentations, so the masks that are predicted now come from layers that were "
    "never trained, and mean nothing. nnUNetKD_predict gives the classes and boxes."
)
_ADDED = ("backbone", "classification", "detection", "segmentation")


class TaskOutputs(NamedTuple):
    """Everything that a network says of a batch of patches; None for tasks that it has not."""

    segmentation: list[Tensor]
    """Logits, highest resolution first: all deep supervision levels, or one."""
    features: list[Tensor]
    """Of the stages that were asked for."""
    pooled: Pooled | None = None
    """What classification adds up over patches."""
    classification: dict[str, Tensor] | None = None
    """Logits [B, classes] of each target, for these patches alone."""
    detection: BoxMaps | None = None


class TaskHeads(nn.Module):
    """The heads of one dataset on one U-Net.

    Args:
        unet: A network with nnU-Net's encoder and decoder; it is read, not kept.
        classification: ``{"targets": [[name, number of classes], ...]}`` and, where not the default, ``"pooling"``,
            ``"dropout"`` and ``"stages"`` (how many encoder stages are pooled, the deepest ones; default 4).
        detection: A :class:`DetectionPlan` as its ``to_dict`` gives it.

    Raises:
        SettingsError: A key is unknown, or a planned level is none of the decoder's.
    """

    def __init__(
        self, unet: UNet, classification: Mapping[str, Any] | None, detection: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        strides = encoder_strides(unet)
        channels = list(unet.encoder.output_channels)
        dimension = len(strides[0])
        deepest: list[int] = []
        self.classification: ClassificationHead | None = None
        if classification is not None:
            options = _classification_options(classification)
            deepest = list(range(len(channels)))[-options.pop("stages", NUM_POOLED_STAGES) :]
            self.classification = ClassificationHead([channels[stage] for stage in deepest], dimension, **options)
        levels: list[int] = []
        self.detection: DetectionHead | None = None
        if detection is not None:
            plan = DetectionPlan.from_dict(detection)
            levels = [_decoder_level(strides, stride) for stride in plan.strides]
            widths = [channels[level] for level in levels]
            self.detection = DetectionHead(widths, dimension, len(plan.classes), plan.num_anchors)
        self._num_pooled = len(deepest)
        self.stages = tuple(
            [Stage("encoder", stage, channels[stage], strides[stage]) for stage in deepest]
            + [Stage("decoder", len(strides) - 2 - level, channels[level], strides[level]) for level in levels]
        )
        """The stages whose features ``forward`` takes."""

    def reset_parameters(self) -> None:
        """Undo what nnU-Net's initialisation of all convolutions did to the heads' own."""
        for head in (self.classification, self.detection):
            if head is not None:
                head.reset_parameters()

    def forward(self, features: Sequence[Tensor]) -> TaskOutputs:
        """Run the heads on the features of ``stages``."""
        pooled = logits = boxes = None
        if self.classification is not None:
            pooled = self.classification.pooled(features[: self._num_pooled])
            logits = self.classification.classify(pooled)
        if self.detection is not None:
            boxes = self.detection(features[self._num_pooled :])
        return TaskOutputs([], [], pooled, logits, boxes)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Values in the feature maps of the heads for one patch of ``input_size``, as nnU-Net's networks count."""
        if self.detection is None:
            return 0  # what classification keeps is pooled
        levels = self.stages[self._num_pooled :]
        return self.detection.feature_map_size(
            [[size // step for size, step in zip(input_size, level.stride, strict=True)] for level in levels]
        )


class MultiTaskUNet(nn.Module):
    """A stock U-Net with heads that cost nothing where they are not asked for.

    ``network(image)`` is the stock network, in outputs and cost. ``network(image, tasks=True)`` gives
    :class:`TaskOutputs`; call it so, not through ``forward_tasks``, where the network is compiled or wrapped by DDP.
    ``state_dict`` without the keys that start with ``heads.`` is the stock network's, and the same seed gives both the
    same initial weights.

    Args:
        input_channels: Of the image.
        num_classes: Segmentation outputs.
        backbone: Class of the planned network, PlainConvUNet or ResidualEncoderUNet.
        classification: See :class:`TaskHeads`; None builds no such head.
        detection: See :class:`TaskHeads`; None builds no such head.
        segmentation: Whether the dataset has segmentations; without them a prediction of one alone warns.
        deep_supervision: As in the backbone.
        **backbone_kwargs: Further arguments of the backbone, imported already (nnU-Net does so).

    Raises:
        SettingsError: The backbone cannot be found, or the heads' settings are wrong.
        NotImplementedError: The backbone has not nnU-Net's encoder and decoder.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        backbone: str,
        classification: Mapping[str, Any] | None = None,
        detection: Mapping[str, Any] | None = None,
        segmentation: bool = True,
        deep_supervision: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        network_class: Any = pydoc.locate(backbone)
        if network_class is None:
            raise SettingsError(f"The network '{backbone}', which the plans name as backbone, cannot be imported.")
        unet = network_class(
            input_channels=input_channels,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
            **backbone_kwargs,
        )
        check_unet(unet)
        self.encoder: Any = unet.encoder
        self.decoder: Any = unet.decoder
        self.tapped_stages: tuple[Stage, ...] = ()
        self.trains_tasks = False
        self.segments = True
        self._warns_of_segmentation = not segmentation
        self._initialize_backbone = network_class.initialize
        with torch.random.fork_rng(devices=[]):  # the backbone's weights must not depend on the heads
            self.heads = TaskHeads(unet, classification, detection)

    def forward(self, image: Tensor, tasks: bool = False, segmentation: bool = True) -> Any:
        """Stock output for ``image`` [B, C, *S]; with ``tasks`` everything, see :meth:`forward_tasks`."""
        if tasks or (self.training and self.trains_tasks):
            return self.forward_tasks(image, segmentation=segmentation and self.segments)
        if self._warns_of_segmentation and not self.training:
            print(f"\nWARNING: {UNTRAINED}")
            self._warns_of_segmentation = False
        return self.decoder(self.encoder(image))

    def forward_tasks(
        self, image: Tensor, stages: Sequence[Stage] | None = None, segmentation: bool = True
    ) -> TaskOutputs:
        """All tasks in one pass of encoder and decoder.

        Args:
            image: [B, C, *S], S a multiple of the strides.
            stages: Whose features are wanted too; None means ``tapped_stages``.
            segmentation: False leaves the decoder out where nothing else needs it (about half of the time).
        """
        stages = tuple(self.tapped_stages if stages is None else stages)
        return forward_tasks(self, image, self.heads, stages, segmentation)

    @property
    def speaking_heads(self) -> TaskHeads:
        """The heads of the dataset; a joint network has several and lets one speak."""
        return self.heads

    def train_tasks(self, segments: bool) -> None:
        """From now on give all tasks while training, and freeze what they do not use (DDP waits for all others).

        Args:
            segments: Whether segmentation is one of them.
        """
        self.trains_tasks, self.segments = True, segments
        if segments:
            return
        self.decoder.seg_layers.requires_grad_(False)
        wanted = (*self.heads.stages, *self.tapped_stages)
        finest = max((stage.index for stage in wanted if stage.part == "decoder"), default=-1)
        for part in (self.decoder.stages, self.decoder.transpconvs):  # the decoder itself holds the encoder too
            part[finest + 1 :].requires_grad_(False)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """nnU-Net's measure of memory: values in all feature maps of one patch of ``input_size``, heads included."""
        backbone = self.encoder.compute_conv_feature_map_size(input_size)
        backbone += self.decoder.compute_conv_feature_map_size(input_size)
        return int(backbone) + self.heads.compute_conv_feature_map_size(input_size)

    def initialize(self, module: nn.Module) -> None:
        """What nnU-Net applies to every module, children first: the backbone's initialisation, except in the heads."""
        self._initialize_backbone(module)
        if isinstance(module, TaskHeads):
            module.reset_parameters()


def forward_tasks(
    network: UNet,
    image: Tensor,
    heads: TaskHeads | None,
    stages: Sequence[Stage] = (),
    segmentation: bool = True,
    channels: slice | None = None,
) -> TaskOutputs:
    """One pass of encoder and decoder for everything that is wanted.

    Args:
        network: A U-Net with nnU-Net's encoder and decoder.
        image: [B, C, *S], S a multiple of the strides.
        heads: Of the tasks; None leaves them out.
        stages: Whose features are wanted too.
        segmentation: False leaves the decoder out where nothing else needs it.
        channels: Slice of the segmentation's output channels; None computes all.
    """
    own = () if heads is None else heads.stages
    wanted = (*own, *stages)
    decode = segmentation or any(stage.part == "decoder" for stage in wanted)
    skips, decoded = encode_and_decode(network, image, decode)
    outputs = segment(network.decoder, decoded, channels) if segmentation else []
    features = select_features(wanted, skips, decoded)
    found = TaskOutputs([], []) if heads is None else heads(features[: len(own)])
    return found._replace(segmentation=outputs, features=features[len(own) :])


def unwrapped(network: Any) -> Any:
    """The network without DDP and ``torch.compile`` wrappers."""
    for wrapper in ("module", "_orig_mod"):
        network = getattr(network, wrapper, network)
    return network


def multitask_architecture(
    architecture: Mapping[str, Any],
    classification: Mapping[str, Any] | None,
    detection: Mapping[str, Any] | None,
    segmentation: bool = True,
) -> dict[str, Any]:
    """Return the ``architecture`` block of stock plans with these heads; heads that it has already are replaced.

    Args:
        architecture: ``network_class_name``, ``arch_kwargs``, ``_kw_requires_import``.
        classification: See :class:`TaskHeads`.
        detection: See :class:`TaskHeads`.
        segmentation: Whether the dataset has segmentations.
    """
    wrapped = stock_architecture(architecture)
    settings: dict[str, Any] = {
        "backbone": wrapped["network_class_name"],
        "classification": None if classification is None else dict(classification),
        "detection": None if detection is None else dict(detection),
    }
    if not segmentation:
        settings["segmentation"] = False
    wrapped["network_class_name"] = NETWORK_CLASS
    wrapped["arch_kwargs"].update(copy.deepcopy(settings))
    return wrapped


def stock_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a plans' ``architecture`` block without our heads: the stock block."""
    stock = copy.deepcopy(dict(architecture))
    if stock["network_class_name"] == NETWORK_CLASS:
        stock["network_class_name"] = stock["arch_kwargs"]["backbone"]
        for name in _ADDED:
            stock["arch_kwargs"].pop(name, None)
    return stock


def planned_heads(architecture: Mapping[str, Any]) -> Heads | None:
    """Return (classification, detection) as a plans' ``architecture`` block sets them; None for a stock network."""
    if architecture["network_class_name"] != NETWORK_CLASS:
        return None
    arguments = architecture["arch_kwargs"]
    return arguments.get("classification"), arguments.get("detection")


def stock_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the stock network alone."""
    return {key: value for key, value in state_dict.items() if not key.startswith((HEADS, MEMBER_HEADS))}


def _classification_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    allowed = ("targets", "pooling", "dropout", "stages")
    if unknown := sorted(set(settings) - set(allowed)):
        raise SettingsError(f"The classification head has no option '{unknown[0]}'; it has: {', '.join(allowed)}.")
    if not settings.get("targets"):
        raise SettingsError("The classification head needs 'targets': [[name, number of classes], ...].")
    return dict(settings)


def _decoder_level(strides: Sequence[tuple[int, ...]], stride: tuple[int, ...]) -> int:
    """The encoder stage whose resolution the decoder's level has."""
    if stride not in strides[:-1]:
        raise SettingsError(
            f"Detection is planned for a level of stride {list(stride)}, but the decoder has the strides "
            f"{[list(own) for own in strides[:-1]]}. Plan the detection head again for this network."
        )
    return list(strides).index(stride)
