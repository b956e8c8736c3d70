"""Distillation losses in pure torch. A new loss is one class and one line in ``LOSSES``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.boxes import BoxClassLoss, BoxRegressionLoss
from nnunet_kd.losses.channel_wise import ChannelWiseFeatureLoss, ChannelWiseLogitsLoss
from nnunet_kd.losses.class_masked import ClassMaskedLoss
from nnunet_kd.losses.features import AttentionLoss, CosineLoss, MeanSquaredErrorLoss
from nnunet_kd.losses.imitation import ImitationLoss
from nnunet_kd.losses.logits import AbsoluteErrorLoss, CorrelationLoss, DecoupledLoss, KullbackLeiblerLoss
from nnunet_kd.losses.pseudo_labels import PseudoLabelLoss
from nnunet_kd.losses.relations import AffinityLoss, IntraClassLoss
from nnunet_kd.losses.wavelet import WaveletDetailLoss

__all__ = ["LOSSES", "NEED_TARGET", "build_loss"]

NEED_TARGET = ("class_masked", "intra_class")  # losses on features that ask which voxels form a class
LOSSES: dict[str, dict[str, type[nn.Module]]] = {
    "logits": {
        "kl": KullbackLeiblerLoss,
        "dkd": DecoupledLoss,
        "dist": CorrelationLoss,
        "cwd": ChannelWiseLogitsLoss,
        "l1": AbsoluteErrorLoss,
        "pseudo_label": PseudoLabelLoss,
    },
    "features": {
        "mse": MeanSquaredErrorLoss,
        "cosine": CosineLoss,
        "attention": AttentionLoss,
        "cwd": ChannelWiseFeatureLoss,
        "class_masked": ClassMaskedLoss,
        "wavelet": WaveletDetailLoss,
        "affinity": AffinityLoss,
        "intra_class": IntraClassLoss,
    },
    # [B, C, 1, 1]: the logits of an image (kl, dkd) or its pooled features (cosine)
    "classification": {
        "kl": KullbackLeiblerLoss,
        "dkd": DecoupledLoss,
        "cosine": CosineLoss,
    },
    # each has a signature of its own, see its class
    "boxes": {
        "kl": BoxClassLoss,
        "giou": BoxRegressionLoss,
        "imitation": ImitationLoss,
    },
}


def build_loss(on: str, name: str, **options: Any) -> nn.Module:
    """Return the loss that settings name.

    Args:
        on: What is compared, a key of ``LOSSES``.
        name: The loss, a key of ``LOSSES[on]``.
        **options: Of that loss, see its class.

    Raises:
        SettingsError: If a name or option is unknown, or a value is out of range.
    """
    if on not in LOSSES:
        raise SettingsError(f"Nothing to compare is called '{on}'; allowed are: {', '.join(LOSSES)}.")
    if name not in LOSSES[on]:
        raise SettingsError(f"Unknown loss '{name}' on {on}; allowed are: {', '.join(LOSSES[on])}.")
    loss = LOSSES[on][name]
    allowed = _options(loss)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise SettingsError(
            f"The loss '{name}' on {on} has no option '{unknown[0]}'; it has: {', '.join(allowed) or 'none'}."
        )
    return loss(**options)


def _options(loss: type[nn.Module]) -> list[str]:
    """The names that the constructor takes, ``self`` aside; none where nn.Module's own constructor serves."""
    parameters = inspect.signature(loss).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
