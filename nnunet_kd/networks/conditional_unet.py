"""The planned U-Net, with its skip connections, as a network of segmentation and translation (our design).

The lighter variant of ``star_generator.py``: every instance norm gets one scale and shift per task, and one more 1x1
convolution makes images. The one-step segmentation is the stock network with the self code's scales and shifts.
"""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.adaptive_norm import make_conditional, select_code
from nnunet_kd.networks.taps import check_unet, encode_and_decode
from nnunet_kd.networks.task_codes import DOMAINS, TaskCodeNetwork

CODES = (*DOMAINS, "seg", "self")  # the first ones translate


class ConditionalUNet(TaskCodeNetwork):
    """A stock U-Net whose instance norms have a scale and a shift per code, with a head for images.

    Args:
        input_channels: Of the image.
        num_classes: Segmentation outputs.
        backbone: Class of the planned network, PlainConvUNet or ResidualEncoderUNet.
        deep_supervision: As in the backbone.
        **backbone_kwargs: Further arguments of the backbone, imported already (nnU-Net does so).

    Raises:
        SettingsError: The backbone cannot be found.
        NotImplementedError: The backbone is no such U-Net, or has other norms.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        backbone: str,
        deep_supervision: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        network_class: Any = pydoc.locate(backbone)
        if network_class is None:
            raise SettingsError(f"The network '{backbone}', which the plans name as backbone, cannot be imported.")
        unet = network_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **backbone_kwargs
        )
        check_unet(unet)
        self._norms = make_conditional(unet, len(CODES))
        self.encoder: Any = unet.encoder
        self.decoder: Any = unet.decoder
        self.image_head = self.encoder.conv_op(self.encoder.output_channels[0], input_channels, 1)
        self.initialize = network_class.initialize

    def segment(self, image: Tensor) -> Any:
        """Logits [B, classes, *S] of ``image`` [B, C, *S], with deep supervision of all levels."""
        return self._segment(image, "seg")

    def segment_in_one_step(self, image: Tensor, code: Tensor | None) -> Any:
        """As :meth:`segment`; the code is a part of the weights, so that ``code`` must be None."""
        assert code is None
        return self._segment(image, "self")

    def _segment(self, image: Tensor, code: str) -> Any:
        self._select(CODES.index(code))
        return self.decoder(self.encoder(image))

    def translate(self, image: Tensor, code: Tensor) -> Tensor:
        """The images [B, C, *S] in the domains ``code`` [B] (0 source, 1 target)."""
        self._select(code)
        return self.image_head(encode_and_decode(self, image)[1][-1])

    def stored_code(self, domain: int, image: Tensor) -> Tensor:
        """The number of the domain for each image."""
        return torch.full((len(image),), domain, device=image.device)

    @torch.no_grad()
    def start_self_code(self) -> None:
        """Copy the scales and shifts of the segmentation without a code."""
        for norm in self._norms:
            for values in (norm.weight, norm.bias):
                values[CODES.index("self")] = values[CODES.index("seg")]

    def _select(self, code: int | Tensor) -> None:
        select_code(self._norms, code)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """nnU-Net's measure of memory: values in the feature maps of one patch of ``input_size``."""
        backbone = self.encoder.compute_conv_feature_map_size(input_size)
        return int(backbone + self.decoder.compute_conv_feature_map_size(input_size))


def stock_one_step_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the stock network that gives the one-step segmentation."""
    own = {key: value for key, value in weights.items() if not key.startswith("image_head.")}
    return {key: value[CODES.index("self")] if _is_conditional(key, own) else value for key, value in own.items()}


def stock_backbone(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The stock ``architecture`` block that a conditional U-Net's was made of."""
    arguments = {key: value for key, value in architecture["arch_kwargs"].items() if key != "backbone"}
    return {
        "network_class_name": architecture["arch_kwargs"]["backbone"],
        "arch_kwargs": arguments,
        "_kw_requires_import": list(architecture["_kw_requires_import"]),
    }


def _is_conditional(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Scales and shifts per code are the only weights with two axes beside biases with two axes."""
    bias = weights.get(key.rsplit(".", 1)[0] + ".bias")
    return bias is not None and bias.ndim == 2
