"""The joint network: one U-Net, one channel space, one slice of output channels (head) per label space.

Our design (architecture.md, section 1). Weights of the input and output convolutions are sliced to what a member uses,
which equals zero-filled channels and unused heads exactly but costs nothing for them. Members with classes or boxes
have heads of their own for these. ``state_dict`` has the keys of the stock U-Net and, for those heads, keys under
``task_heads.MEMBER``, so a member's single-dataset network is this one with both convolutions sliced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nnunet_kd.networks.multitask import HEADS, MEMBER_HEADS, TaskHeads, TaskOutputs, forward_tasks
from nnunet_kd.networks.taps import Stage, UNet, check_unet, encoder_strides


@dataclass(frozen=True)
class Route:
    """Where a member enters and leaves the network: its input channels and its output slice [start, stop).

    The slice is empty where the member has no segmentation.
    """

    channels: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Head:
    """Output channels [start, stop) of one label space. ``regions``: sigmoid outputs without background."""

    start: int
    stop: int
    regions: bool


class InputChannelsMixin:
    """A convolution that may be given only some of its input channels (``channels``; None means all)."""

    channels: tuple[int, ...] | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Convolve ``image`` [B, len(channels), *S] with the weights of these channels."""
        weight = self.weight  # type: ignore[attr-defined]
        if self.channels is not None:
            first, stop = self.channels[0], self.channels[-1] + 1
            # neighbours are a view; other channels have to be gathered
            adjacent = self.channels == tuple(range(first, stop))
            weight = weight[:, first:stop] if adjacent else weight[:, list(self.channels)]
        return self._conv_forward(image, weight, self.bias)  # type: ignore[attr-defined]


class JointUNet(nn.Module):
    """A stock U-Net that speaks for one member at a time.

    ``select(member)`` chooses the member; then the input is that member's channels [B, C_member, *S] and the output its
    head's logits; of a member with classes or boxes, while training or with ``tasks``, :class:`TaskOutputs`. Any patch
    size is accepted: the image is padded with zeros at its end to a multiple of the strides and the outputs are cropped
    back.

    With no member selected the input has all channels of the channel space, and the output is the joint label map:
    channel 0 is zero (background) and each foreground class of each head has its log-odds against its own background,
    so that the argmax within one head equals that head's own decision.

    Args:
        unet: PlainConvUNet or ResidualEncoderUNet with all input and output channels.
        routes: Member name to :class:`Route`.
        heads: All heads in the order of their channels.
        task_heads: Member name to its settings for classification and detection, see :class:`TaskHeads`; members that
            only segment are not named.
    """

    def __init__(
        self,
        unet: UNet,
        routes: Mapping[str, Route],
        heads: Sequence[Head],
        task_heads: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        check_unet(unet)
        self.encoder: Any = unet.encoder
        self.decoder: Any = unet.decoder
        self.routes = dict(routes)
        self.heads = tuple(heads)
        self.multiple = encoder_strides(unet)[-1]
        self.tapped_stages: tuple[Stage, ...] = ()
        self.uses_all_parameters = False
        self.member: str | None = None
        self._head: slice | None = None
        self._input_convolution = [input_convolution(unet)]  # in a list: not to be registered (and saved) twice
        convolution = self._input_convolution[0]
        convolution.__class__ = type("InputConvolution", (InputChannelsMixin, type(convolution)), {})
        self.task_heads = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):  # the U-Net's weights must not depend on the heads
            for member, settings in (task_heads or {}).items():
                own = TaskHeads(unet, settings.get("classification"), settings.get("detection"))
                own.apply(unet.initialize)
                own.reset_parameters()
                self.task_heads[module_name(member)] = own

    def select(self, member: str | None) -> None:
        """Speak for ``member`` from now on; None speaks for all."""
        if member == self.member:
            return
        route = None if member is None else self.routes[member]
        self.member = member
        self._head = None if route is None else slice(route.start, route.stop)
        self._input_convolution[0].channels = None if route is None else route.channels

    @property
    def speaking_heads(self) -> TaskHeads | None:
        """The selected member's heads for classification and detection; None where it has none."""
        name = None if self.member is None else module_name(self.member)
        heads: Any = self.task_heads[name] if name is not None and name in self.task_heads else None
        return heads

    def forward(self, image: Tensor, tasks: bool = False, segmentation: bool = True) -> Any:
        """Return what the stock U-Net returns, for the selected member; while training also the tapped features.

        Of a member with classes or boxes: :class:`TaskOutputs` while training, or with ``tasks``.
        """
        stages = self.tapped_stages if self.training else ()
        if self.speaking_heads is not None and (tasks or self.training):
            found = self.run(image, stages, tasks=True, segmentation=segmentation)
            return self._with_all_parameters(found) if self.training else found
        found = self.run(image, stages)
        if self.training:
            found = self._with_all_parameters(found)
        if stages:
            return found.segmentation, found.features
        return found.segmentation if self.decoder.deep_supervision else found.segmentation[0]

    def run(
        self, image: Tensor, stages: Sequence[Stage] = (), *, tasks: bool = False, segmentation: bool = True
    ) -> TaskOutputs:
        """Everything that the selected member has, for a patch of any size.

        Args:
            image: [B, C_member, *S].
            stages: Whose features are wanted.
            tasks: Whether classes and boxes are wanted, where the member has heads for them. Maps of boxes stay on the
                grid of the padded image.
            segmentation: False leaves the segmentation out; it is always left out where the member has none.
        """
        shape = image.shape[2:]
        padded = pad_to_multiple(image, self.multiple)
        heads = self.speaking_heads if tasks else None
        segments = self._head is None or self._head.stop > self._head.start
        found = forward_tasks(self, padded, heads, stages, segmentation and segments, self._head)
        outputs, features = found.segmentation, found.features
        if self.member is None:
            outputs = [self.joint_logits(output) for output in outputs]
        if padded.shape != image.shape:
            if self.decoder.deep_supervision:
                raise ValueError(f"A training patch must be a multiple of {self.multiple}, not {tuple(shape)}.")
            outputs = [crop(output, shape) for output in outputs]
            features = crop_features(features, stages, shape)
        return found._replace(segmentation=outputs, features=features)

    def _with_all_parameters(self, found: TaskOutputs) -> TaskOutputs:
        """Under DDP every parameter must get a gradient, also those that only another rank's member uses: zero.

        So under DDP the optimizer's momentum moves heads of members that were not drawn, as it moves output channels;
        on one device it leaves them alone.
        """
        if not self.uses_all_parameters:
            return found
        nothing = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad) * 0
        if found.segmentation:
            return found._replace(segmentation=[found.segmentation[0] + nothing, *found.segmentation[1:]])
        if found.classification is not None:
            return found._replace(classification={name: own + nothing for name, own in found.classification.items()})
        assert found.detection is not None  # a member has one task at least
        first, *others = found.detection.class_logits
        return found._replace(detection=found.detection._replace(class_logits=(first + nothing, *others)))

    def joint_logits(self, logits: Tensor) -> Tensor:
        """All heads' raw logits [B, sum of heads, *S] as joint logits [B, 1 + all foreground classes, *S]."""
        parts = [torch.zeros_like(logits[:, :1])]
        for head in self.heads:
            own = logits[:, head.start : head.stop]
            parts.append(own if head.regions else own[:, 1:] - own[:, :1])
        return torch.cat(parts, 1)


def member_head_weights(state_dict: Mapping[str, Tensor], member: str) -> dict[str, Tensor]:
    """The weights of a member's heads for classes and boxes under the keys that ``MultiTaskUNet`` gives them."""
    prefix = f"{MEMBER_HEADS}{module_name(member)}."
    return {HEADS + key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def module_name(member: str) -> str:
    """Key of a member's heads in the network; nn.ModuleDict allows no dots."""
    return member.replace(".", "_")


def input_convolution(unet: UNet) -> Any:
    """The convolution that sees the image."""
    first = unet.encoder.stem if getattr(unet.encoder, "stem", None) is not None else unet.encoder.stages[0]
    return next(module for module in first.modules() if isinstance(module, nn.modules.conv._ConvNd))


def pad_to_multiple(image: Tensor, multiple: Sequence[int]) -> Tensor:
    """Pad [B, C, *S] with zeros at the end of each axis to a multiple; returns ``image`` itself if it fits."""
    missing = [-size % step for size, step in zip(image.shape[2:], multiple, strict=True)]
    if not any(missing):
        return image
    return pad(image, [amount for axis in reversed(missing) for amount in (0, axis)])


def crop(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Keep the first ``shape`` voxels of [B, C, *S]."""
    kept: tuple[Any, ...] = (..., *(slice(0, size) for size in shape))
    return image[kept]


def crop_features(features: Sequence[Tensor], stages: Sequence[Stage], shape: Sequence[int]) -> list[Tensor]:
    """Keep of each stage's features [B, C, *S / stride] what covers an unpadded image of ``shape``."""
    return [
        crop(feature, [-(-size // step) for size, step in zip(shape, stage.stride, strict=True)])
        for feature, stage in zip(features, stages, strict=True)
    ]
