"""Instance normalisation whose scale and shift depend on a code: adaptive (AdaIN) and conditional."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class AdaptiveInstanceNorm(nn.Module):
    """(1 + gamma(s)) IN(x) + beta(s) for a code s, (gamma, beta) = Linear(s); without a code an instance norm.

    Shapes: x [B, C, *S], s [B, style_dim] -> [B, C, *S].

    Args:
        num_features: C.
        style_dim: Length of a code.
        dimension: 2 or 3, the number of axes of S.
        affine: Whether the norm without a code has a scale and a shift of its own, which learn.

    Source: Huang and Belongie, ICCV 2017 (AdaIN); both uses in one block: Oh and Ye, ECCV 2022 (arXiv 2104.05892).
    """

    def __init__(self, num_features: int, style_dim: int, dimension: int, affine: bool) -> None:
        super().__init__()
        self.norm = INSTANCE_NORM[dimension](num_features, affine=affine)
        self.scale_and_shift = nn.Linear(style_dim, 2 * num_features)

    def forward(self, feature: Tensor, code: Tensor | None = None) -> Tensor:
        """Normalise ``feature``; ``code`` None means plain instance normalisation."""
        if code is None:
            return self.norm(feature)
        ones = [1] * (feature.ndim - 2)
        scale, shift = self.scale_and_shift(code).reshape(len(code), -1, *ones).chunk(2, 1)
        return (1 + scale) * F.instance_norm(feature, eps=self.norm.eps) + shift


class ConditionalInstanceNorm(nn.Module):
    """A learned instance norm with one scale and shift per code, which start as those of the norm that it replaces.

    ``code`` says which: a number for the whole batch, or a tensor [B] with one for each sample. It is an attribute and
    no argument, because it stands inside nnU-Net's blocks, which hand on nothing but features.

    Args:
        norm: InstanceNorm2d or InstanceNorm3d with scale and shift.
        num_codes: How many.

    Source: Dumoulin et al., ICLR 2017 (conditional instance normalisation).
    """

    def __init__(self, norm: Any, num_codes: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach().repeat(num_codes, 1))
        self.bias = nn.Parameter(norm.bias.detach().repeat(num_codes, 1))
        self.code: int | Tensor = 0

    def forward(self, feature: Tensor) -> Tensor:
        """Normalise ``feature`` [B, C, *S]."""
        if not isinstance(self.code, Tensor):
            return F.instance_norm(feature, weight=self.weight[self.code], bias=self.bias[self.code], eps=self.eps)
        ones = [1] * (feature.ndim - 2)
        scale, shift = (values[self.code].reshape(len(self.code), -1, *ones) for values in (self.weight, self.bias))
        return F.instance_norm(feature, eps=self.eps) * scale + shift


def make_conditional(network: nn.Module, num_codes: int) -> list[ConditionalInstanceNorm]:
    """Replace every instance norm of ``network`` in place and return the new ones.

    nnU-Net's blocks name a layer several times (``norm`` and in ``all_modules``), so each is replaced wherever it is.

    Raises:
        NotImplementedError: There is another normalisation, or an instance norm without scale and shift.
    """
    replaced: dict[nn.Module, ConditionalInstanceNorm] = {}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, tuple(INSTANCE_NORM.values())) and child.affine:
                if child not in replaced:
                    replaced[child] = ConditionalInstanceNorm(child, num_codes)
                setattr(module, name, replaced[child])
            elif isinstance(child, OTHER_NORMS):
                raise NotImplementedError(
                    f"The planned network normalises with {type(child).__name__}; codes need nnU-Net's instance "
                    f"normalisation with scale and shift. Use plans of ExperimentPlanner or a ResEnc planner."
                )
    return list(replaced.values())


def select_code(norms: list[ConditionalInstanceNorm], code: int | Tensor) -> None:
    """From now on all ``norms`` use the scale and shift of ``code``."""
    for norm in norms:
        norm.code = code
