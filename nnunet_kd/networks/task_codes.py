"""One network for segmentation and translation, whose task is chosen by codes; how plans name it.

Source: Oh and Ye, ECCV 2022 (arXiv 2104.05892). There are two such networks, see ``star_generator.py`` (the paper's)
and ``conditional_unet.py`` (the planned U-Net).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnunet_kd.errors import SettingsError

DOMAINS = ("source", "target")
SOURCE, TARGET = 0, 1
PREDICTIONS = ("self", "seg", "two_step", *DOMAINS)
STYLE_DIM = 16
NETWORKS = {
    "stargan": "nnunet_kd.networks.star_generator.StarGenerator",
    "conditional_unet": "nnunet_kd.networks.conditional_unet.ConditionalUNet",
}
STAR_ARGUMENTS = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides")


class TaskCodeNetwork(nn.Module):
    """What both networks offer.

    ``predicts`` says what ``network(image)`` gives: "self" the one-step segmentation by the self code, "seg" that
    without a code (for the source), "two_step" that of the image translated to the source, or the image translated to
    the domain "source" or "target".
    """

    predicts: str = "self"

    def forward(self, image: Tensor, task: str | None = None, code: Tensor | None = None) -> Any:
        """Run one task on ``image`` [B, C, *S].

        Args:
            image: Normalised as nnU-Net normalises it.
            task: One of those of ``predicts``, or "translate"; None means ``predicts``.
            code: Of "translate" and "self", where it is not the stored one.

        Returns:
            Logits [B, classes, *S], with deep supervision (conditional U-Net) a list, highest resolution first; or of a
            translation the image [B, C, *S].
        """
        task = self.predicts if task is None else task
        if task == "two_step":
            return self.segment(self.translate(image, self.stored_code(SOURCE, image)))
        if task == "seg":
            return self.segment(image)
        if task == "self":
            return self.segment_in_one_step(image, code)
        return self.translate(image, self.stored_code(DOMAINS.index(task), image) if code is None else code)

    def segment(self, image: Tensor) -> Any:
        """Segmentation of an image of the source, without a code."""
        raise NotImplementedError

    def segment_in_one_step(self, image: Tensor, code: Tensor | None) -> Any:
        """Segmentation of an image of any domain by the self code; None takes the stored one."""
        raise NotImplementedError

    def translate(self, image: Tensor, code: Tensor) -> Tensor:
        """The image in another domain."""
        raise NotImplementedError

    def stored_code(self, domain: int, image: Tensor) -> Tensor:
        """The code of a domain for a batch of images."""
        raise NotImplementedError

    def start_self_code(self) -> None:
        """Make the one-step segmentation equal to that without a code, from which it then learns (our choice)."""
        raise NotImplementedError


def planned_network(architecture: Mapping[str, Any]) -> str | None:
    """Which of ``NETWORKS`` a plans' ``architecture`` block names; None for any other network."""
    names = {network_class: name for name, network_class in NETWORKS.items()}
    return names.get(architecture["network_class_name"])


def task_code_architecture(architecture: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The ``architecture`` block of stock plans turned into that of a task-code network of the same widths and strides.

    Args:
        architecture: ``network_class_name``, ``arch_kwargs``, ``_kw_requires_import``.
        network: One of ``NETWORKS``.

    Raises:
        SettingsError: The block is another task-code network's, which does not know the planned one any more, or its
            network has no stages.
    """
    if planned_network(architecture) == network:
        return copy.deepcopy(dict(architecture))
    arguments = copy.deepcopy(architecture["arch_kwargs"])
    missing = [name for name in STAR_ARGUMENTS if name not in arguments]
    if planned_network(architecture) is not None or missing:
        raise SettingsError(
            f"A network '{network}' cannot be made of {architecture['network_class_name']}. Start from plans of "
            f"ExperimentPlanner or a ResEnc planner: nnUNetKD_plan_adaptation -p nnUNetPlans --network {network}."
        )
    if network == "stargan":
        arguments = {name: arguments[name] for name in STAR_ARGUMENTS}
        imports = ["conv_op"]
    else:
        arguments["backbone"] = architecture["network_class_name"]
        imports = list(architecture["_kw_requires_import"])
    return {"network_class_name": NETWORKS[network], "arch_kwargs": arguments, "_kw_requires_import": imports}
