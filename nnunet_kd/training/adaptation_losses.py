"""The losses of one iteration of AdaIN-based domain adaptation and self-distillation, in pure torch.

Source: Oh and Ye, ECCV 2022 (arXiv 2104.05892); the guard is our design.

L_discriminator = BCE(D(x), 1) + BCE(D(x'), 0) + w R1;
L_translation = L_adversarial + w |E(x') - s| + w |G(x' to its own domain) - x| - w |x' - x''|;
L_self = w |G(x, self code) - teacher|.

The teacher of the target translates and then segments, and its errors cannot be seen there. On the labelled source they
can: the guard compares what it says of translated source images with the segmentation of the images themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_kd.losses import build_loss
from nnunet_kd.losses.adversarial import fake_loss, r1_penalty, real_loss
from nnunet_kd.networks.styles import LATENT_DIM
from nnunet_kd.networks.task_codes import SOURCE, TARGET
from nnunet_kd.settings import Adaptation, Guard
from nnunet_kd.spaces.labels import LabelSpace, match_label_spaces
from nnunet_kd.training.distillation import common_target
from nnunet_kd.training.guard import SegmentationCompetence

SELF_BRANCH = 2  # of the mapping network, after those of the domains
STYLE_MOMENTUM = 0.99  # of the stored mean styles


class Pair(NamedTuple):
    """Images of both domains in one batch [N + M, C, *S], the source first; each is to be translated into the other."""

    images: Tensor
    own: Tensor
    """Domain of each image [N + M]."""
    other: Tensor
    """The domain that it is translated into."""
    references: Tensor
    """An image of that domain for each."""
    second_references: Tensor
    """And another one: of the iteration before."""


def make_pair(source: Tensor, target: Tensor, before: tuple[Tensor, Tensor] | None) -> Pair:
    """Join source images [N, C, *S] (domain 0) and target images [M, C, *S] (domain 1).

    Args:
        source: Of this iteration.
        target: Of this iteration.
        before: Source and target of the iteration before, of the same shapes; None takes the present ones.
    """
    own = (torch.arange(len(source) + len(target), device=source.device) >= len(source)).long()

    def of_other_domain(sources: Tensor, targets: Tensor) -> Tensor:
        for_sources = targets[torch.arange(len(source), device=source.device) % len(targets)]
        return torch.cat((for_sources, sources[torch.arange(len(target), device=source.device) % len(sources)]))

    second = (source, target) if before is None else before
    images = torch.cat((source, target))
    return Pair(images, own, 1 - own, of_other_domain(source, target), of_other_domain(*second))


class AdaptationLosses:
    """Losses of a task-code network and the parts that train beside it.

    Args:
        network: A TaskCodeNetwork.
        parts: See ``training_parts``; without "style" and "mapping" the codes are the numbers of the domains.
        settings: Weights.
        guard: What a poor teacher of the target is allowed.
        space: Labels of the source.
    """

    def __init__(
        self, network: Any, parts: nn.ModuleDict, settings: Adaptation, guard: Guard, space: LabelSpace
    ) -> None:
        self.network, self.parts, self.settings, self.guard = network, parts, settings, guard
        self.has_styles = "style" in parts
        self.competence = SegmentationCompetence()
        self.label_map, _ = match_label_spaces(space, space)
        nonlinearity = "sigmoid" if space.regions else "softmax"
        self.difference = build_loss("logits", "l1", nonlinearity=nonlinearity, of=settings.self_on)

    def latent_codes(self, domain: Tensor) -> Tensor:
        """Codes of random latent vectors for the domains [B]."""
        if not self.has_styles:
            return domain
        return self.parts["mapping"](torch.randn(len(domain), LATENT_DIM, device=domain.device), domain)

    def reference_codes(self, images: Tensor, domain: Tensor) -> Tensor:
        """Codes of images [B, C, *S] of the domains [B]."""
        return self.parts["style"](images, domain) if self.has_styles else domain

    def self_code(self) -> Tensor | None:
        """The code of the one-step segmentation [1, style_dim]; None where it is a part of the network."""
        return self.self_code_of(self.parts)

    def self_code_of(self, parts: Any) -> Tensor | None:
        """The same of other parts; its latent vector is all ones, as in the source."""
        if "mapping" not in parts:
            return None
        device = next(parts.parameters()).device
        return parts["mapping"](
            torch.ones(1, LATENT_DIM, device=device), torch.full((1,), SELF_BRANCH, device=device)
        )

    def discriminator_loss(self, pair: Pair, codes: Tensor) -> Tensor:
        """Real images against translations by ``codes``; gradients reach the discriminator alone."""
        with torch.no_grad():
            fake = self.network(pair.images, "translate", codes)
        discriminator = self.parts["discriminator"]
        penalised = self.settings.r1 > 0
        with _full_precision(pair.images):  # the penalty's second derivative overflows in half precision
            real = pair.images.detach().float().requires_grad_(penalised)  # the flag is not to spread to the images
            logits = discriminator(real, pair.own)
            loss = real_loss(logits)
            if penalised:
                loss = loss + self.settings.r1 * r1_penalty(logits, real)
        return loss + fake_loss(discriminator(fake, pair.other))

    def translation_losses(
        self, pair: Pair, codes: Tensor, second_codes: Tensor, diversity: float
    ) -> dict[str, Tensor]:
        """The weighted losses of translations by ``codes``; gradients do not reach the discriminator.

        Args:
            pair: The images.
            codes: Of the domains that they are translated into.
            second_codes: Others of the same domains.
            diversity: Weight of the difference of translations by the two, which is to be large.
        """
        settings, losses = self.settings, {}
        fake = self.network(pair.images, "translate", codes)
        with frozen(self.parts["discriminator"]):
            logits = self.parts["discriminator"](fake, pair.other)
        losses["adversarial"] = settings.adversarial * real_loss(logits)
        if self.has_styles:
            losses["style"] = settings.style * _distance(self.parts["style"](fake, pair.other), codes)
            if diversity > 0:
                with torch.no_grad():
                    second = self.network(pair.images, "translate", second_codes)
                losses["diversity"] = -diversity * _distance(fake, second)
        back = self.network(fake, "translate", self.reference_codes(pair.images, pair.own))
        losses["cycle"] = settings.cycle * _distance(back, pair.images)
        return losses

    @torch.no_grad()
    def self_targets(
        self, source: Tensor, target: Tensor, teacher: Any, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """What the teacher says of both domains, and how far the guard trusts it.

        Not to be called within the autocast of :meth:`self_loss`: some versions of torch would go on there with copies
        of the weights that have no gradient.

        Args:
            source: Images [N, C, *S]; the teacher segments them as they are.
            target: Images [M, C, *S]; the teacher translates them to the source first, if translation is trained.
            teacher: A TaskCodeNetwork: the present network, or its moving average.
            labels: nnU-Net's target of the source images, [N, 1 (or regions), *S].

        Returns:
            Logits of source and target, and the trust in those of the target, in [0, 1].
        """
        translates = self.settings.adversarial > 0
        of_source = _finest(teacher(source, "seg"))
        of_target = _finest(teacher(target, "two_step" if translates else "seg"))
        if translates and self.guard.watches:
            known, valid = common_target(labels, self.label_map)
            in_two_steps = _finest(teacher(source, "two_step"))
            self.competence.update(of_source, in_two_steps, known, valid, self.label_map.target.regions)
        return of_source, of_target, self.competence.factor(self.guard.margin, self.guard.exponent)

    def self_loss(
        self, source: Tensor, target: Tensor, of_source: Tensor, of_target: Tensor, trust: Tensor | float
    ) -> Tensor:
        """The one-step segmentation of both domains against :meth:`self_targets`, weighted."""
        code, images = self.self_code(), torch.cat((source, target))
        student = _finest(self.network(images, "self", None if code is None else code.expand(len(images), -1)))
        on_source = self.difference(student[: len(source)], of_source)
        on_target = self.difference(student[len(source) :], of_target)
        return self.settings.self_source * on_source + trust * self.settings.self_target * on_target

    @torch.no_grad()
    def store_styles(self, codes: Tensor, pair: Pair, step: int) -> None:
        """Keep the mean style of each domain in the network: prediction and the teacher translate with it.

        The source has the style of one fixed image of the source; the moving mean over all of them is our choice.

        Args:
            codes: Of the references of ``pair``.
            pair: The images.
            step: Iterations before this one, so that the first mean is that of the first images.
        """
        if not self.has_styles:
            return
        weight = 1 - min(1 - 1 / (step + 1), STYLE_MOMENTUM)
        for domain in (SOURCE, TARGET):
            chosen = (pair.other == domain)[:, None]
            mean = (torch.where(chosen, codes, 0).sum(0) / chosen.sum()).float()
            stored = self.network.codes[domain]
            stored.copy_(torch.where(mean.isfinite().all(), stored.lerp(mean, weight), stored))


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within the block the modules' weights get no gradients, which also saves computing them."""
    for module in modules:
        module.requires_grad_(False)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(True)


def _finest(output: Any) -> Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() - second.float()).abs().mean()


def _full_precision(like: Tensor) -> Any:
    return torch.autocast(like.device.type, enabled=False) if like.device.type in ("cuda", "cpu") else nullcontext()
