"""One pass of a teacher's network over an image of any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_kd.networks.joint import JointUNet, crop, crop_features, pad_to_multiple
from nnunet_kd.networks.multitask import TaskHeads, TaskOutputs, forward_tasks
from nnunet_kd.networks.taps import Stage, encoder_strides
from nnunet_kd.tasks.detection_head import BoxMaps


class TeacherForward(nn.Module):
    """One compilable forward: image -> outputs on its grid. The image is padded at its end to the network's strides.

    Args:
        network: A stock network, :class:`MultiTaskUNet` or :class:`JointUNet` whose member is selected.
        stages: Whose features are wanted.
    """

    def __init__(self, network: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.network = network
        self.stages = tuple(stages)

    def forward(self, image: Tensor, segmentation: bool = True, heads: bool = False) -> TaskOutputs:
        """Run what is wanted: the segmentation, the heads for classes and boxes; the features always."""
        if isinstance(self.network, JointUNet):
            found = self.network.run(image, self.stages, tasks=heads, segmentation=segmentation)
        elif not hasattr(self.network, "encoder") or not hasattr(self.network.decoder, "transpconvs"):
            return TaskOutputs([self.network(image)], [])
        else:
            padded = pad_to_multiple(image, encoder_strides(self.network)[-1])
            own = speaking_heads(self.network) if heads else None
            found = forward_tasks(self.network, padded, own, self.stages, segmentation)
            found = found._replace(
                segmentation=[crop(output, image.shape[2:]) for output in found.segmentation[:1]],
                features=crop_features(found.features, self.stages, image.shape[2:]),
            )
        if found.detection is None:
            return found
        levels = detection_stages(speaking_heads(self.network))
        maps = (tuple(crop_features(part, levels, image.shape[2:])) for part in found.detection)
        return found._replace(detection=BoxMaps(*maps))


def speaking_heads(network: nn.Module) -> TaskHeads | None:
    """The heads that a network has for classes and boxes of its dataset or selected member."""
    heads: TaskHeads | None = getattr(network, "speaking_heads", None)
    return heads


def detection_stages(heads: TaskHeads | None) -> list[Stage]:
    """The decoder stages that a detection head looks at, finest first."""
    return [] if heads is None else [stage for stage in heads.stages if stage.part == "decoder"]


def pooled_channels(heads: TaskHeads | None) -> int:
    """Number of pooled features that a classification head looks at."""
    return 0 if heads is None else sum(stage.channels for stage in heads.stages if stage.part == "encoder")


def drop_detection(heads: TaskHeads) -> None:
    """Leave out a detection head that nobody asks, and with it the decoder where nothing else needs it."""
    heads.detection = None
    heads.stages = tuple(stage for stage in heads.stages if stage.part == "encoder")
