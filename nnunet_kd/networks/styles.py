"""Where the codes of the generator come from, and who judges its translations: training only.

Source: Choi et al., StarGAN v2 (arXiv 1912.01865), as Oh and Ye use it (ECCV 2022, arXiv 2104.05892). They end in a
convolution of the whole 4 x 4 map; here it is averaged, so that patches of any size fit (our design).
"""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_kd.networks.residual_blocks import SLOPE, ResidualBlock, initialize_he
from nnunet_kd.networks.task_codes import DOMAINS, STYLE_DIM, planned_network

LATENT_DIM, HIDDEN = 4, 512
NUM_SHARED, NUM_OWN = 4, 4  # layers


class MappingNetwork(nn.Module):
    """Code [B, style_dim] of latent vectors [B, 4] for the chosen branches [B]: shared layers, then one branch each.

    Args:
        num_branches: One per domain, and one for the self code.
    """

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        self.shared = _layers([LATENT_DIM, *[HIDDEN] * NUM_SHARED], last_activation=True)
        own = [*[HIDDEN] * NUM_OWN, STYLE_DIM]
        self.branches = nn.ModuleList([_layers(own, last_activation=False) for _ in range(num_branches)])

    def forward(self, latent: Tensor, branch: Tensor) -> Tensor:
        """Run all branches and choose."""
        hidden = self.shared(latent)
        return _choose(torch.stack([own(hidden) for own in self.branches], 1), branch)


def _layers(widths: Sequence[int], last_activation: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]))


class _Trunk(nn.Module):
    """Residual blocks without normalisation from an image to one vector [B, widths[-1]]."""

    def __init__(
        self,
        input_channels: int,
        widths: Sequence[int],
        conv_op: Any,
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        padding = [size // 2 for size in kernel_sizes[0]]
        self.stem = conv_op(input_channels, widths[0], kernel_sizes[0], padding=padding)
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[stage - 1], widths[stage], conv_op, kernel_sizes[stage], strides[stage])
            for stage in range(1, len(widths))
        )
        self.last = conv_op(widths[-1], widths[-1], kernel_sizes[-1], padding=[size // 2 for size in kernel_sizes[-1]])

    def forward(self, image: Tensor) -> Tensor:
        feature = self.stem(image)
        for block in self.blocks:
            feature = block(feature)
        feature = self.last(F.leaky_relu(feature, SLOPE))
        return F.leaky_relu(feature.flatten(2).mean(2), SLOPE)


class StyleEncoder(nn.Module):
    """Code [B, style_dim] of images [B, C, *S] as those of the domains [B]."""

    def __init__(self, num_domains: int, input_channels: int, **trunk: Any) -> None:
        super().__init__()
        self.trunk = _Trunk(input_channels, **trunk)
        self.heads = nn.Linear(trunk["widths"][-1], num_domains * STYLE_DIM)

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        """Run the trunk and choose the domains' heads."""
        return _choose(self.heads(self.trunk(image)).reshape(len(image), -1, STYLE_DIM), domain)


class Discriminator(nn.Module):
    """Logits [B]: is each image [B, C, *S] a real one of its domain [B]?"""

    def __init__(self, num_domains: int, input_channels: int, **trunk: Any) -> None:
        super().__init__()
        self.trunk = _Trunk(input_channels, **trunk)
        self.heads = nn.Linear(trunk["widths"][-1], num_domains)

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        """Run the trunk and choose the domains' logits."""
        return _choose(self.heads(self.trunk(image)), domain)


def _choose(values: Tensor, index: Tensor) -> Tensor:
    """Row ``index[b]`` of ``values[b]``."""
    return values[torch.arange(len(values), device=values.device), index]


def training_parts(architecture: Mapping[str, Any], input_channels: int) -> nn.ModuleDict:
    """What trains beside a task-code network: "discriminator", and for the generator "style" and "mapping".

    Args:
        architecture: The block of the plans, whose widths, strides and kernels the trunks take over.
        input_channels: Of the image.
    """
    arguments = architecture["arch_kwargs"]
    trunk = {
        "widths": list(arguments["features_per_stage"]),
        "conv_op": pydoc.locate(arguments["conv_op"]),
        "kernel_sizes": arguments["kernel_sizes"],
        "strides": arguments["strides"],
    }
    parts: dict[str, nn.Module] = {"discriminator": Discriminator(len(DOMAINS), input_channels, **trunk)}
    if planned_network(architecture) == "stargan":
        parts["style"] = StyleEncoder(len(DOMAINS), input_channels, **trunk)
        parts["mapping"] = MappingNetwork(len(DOMAINS) + 1)
    return nn.ModuleDict(parts).apply(initialize_he)
