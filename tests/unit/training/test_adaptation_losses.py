"""The losses of an iteration: which images meet which codes, what gets gradients, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_kd.networks.styles import training_parts
from nnunet_kd.networks.task_codes import NETWORKS, SOURCE, TARGET, task_code_architecture
from nnunet_kd.settings import Adaptation, Guard
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.training.adaptation_losses import AdaptationLosses, frozen, make_pair

every_network = pytest.mark.parametrize("name", NETWORKS)
ARCHITECTURE: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
}


def losses_of(name: str, guard: Guard | None = None, **settings: Any) -> AdaptationLosses:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(0)
    architecture = task_code_architecture(ARCHITECTURE, name)
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 1, 2
    )
    space = LabelSpace.from_dataset_json({"labels": {"background": 0, "lung": 1}})
    return AdaptationLosses(network, training_parts(architecture, 1), Adaptation(**settings), guard or Guard(), space)


def self_losses(
    losses: AdaptationLosses, source: Tensor, target: Tensor, teacher: Any, labels: Tensor
) -> tuple[Tensor, Any]:
    taught = losses.self_targets(source, target, teacher, labels)
    return losses.self_loss(source, target, *taught), taught[-1]


def no_labels(number: int) -> Tensor:
    return torch.zeros(number, 1, 16, 16)


def images(number: int, seed: int) -> Tensor:
    return torch.randn(number, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def touched(module: nn.Module) -> bool:
    return any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in module.parameters())


def test_every_image_goes_to_the_other_domain_with_references_from_there() -> None:
    source, target, before = images(2, 0), images(1, 1), (images(2, 2), images(1, 3))
    pair = make_pair(source, target, before)
    assert pair.own.tolist() == [SOURCE, SOURCE, TARGET]
    assert pair.other.tolist() == [TARGET, TARGET, SOURCE]
    assert torch.equal(pair.images, torch.cat((source, target)))
    assert torch.equal(pair.references, torch.cat((target, target, source[:1])))
    assert torch.equal(pair.second_references, torch.cat((before[1], before[1], before[0][:1])))
    assert torch.equal(make_pair(source, target, None).second_references, pair.references)


@every_network
def test_the_discriminator_loss_is_its_formula_and_trains_the_discriminator_alone(name: str) -> None:
    losses = losses_of(name, r1=0.5)
    pair = make_pair(images(1, 0), images(1, 1), None)
    codes = losses.latent_codes(pair.other)
    value = losses.discriminator_loss(pair, codes.detach())
    value.backward()
    assert touched(losses.parts["discriminator"])
    assert not touched(losses.network)
    discriminator = losses.parts["discriminator"]
    real = pair.images.clone().requires_grad_()
    with torch.no_grad():
        fake = losses.network(pair.images, "translate", codes)
        on_fake = F.softplus(discriminator(fake, pair.other)).mean()
    logits = discriminator(real, pair.own)
    gradient = torch.autograd.grad(logits.sum(), real)[0]
    penalty = sum(float(gradient[sample].square().sum()) for sample in range(2)) / 4
    expected = F.softplus(-logits).mean().item() + on_fake.item() + 0.5 * penalty
    assert value.item() == pytest.approx(expected, rel=1e-4)


@every_network
def test_the_translation_losses_are_their_formulas(name: str) -> None:
    losses = losses_of(name, adversarial=0.5, style=2.0, cycle=3.0)
    pair = make_pair(images(1, 0), images(1, 1), (images(1, 2), images(1, 3)))
    codes, others = losses.latent_codes(pair.other), losses.latent_codes(pair.other)
    terms = losses.translation_losses(pair, codes, others, 0.7)
    with torch.no_grad():
        fake = losses.network(pair.images, "translate", codes)
        back = losses.network(fake, "translate", losses.reference_codes(pair.images, pair.own))
        expected = {
            "adversarial": 0.5 * F.softplus(-losses.parts["discriminator"](fake, pair.other)).mean(),
            "cycle": 3.0 * (back - pair.images).abs().mean(),
        }
        if losses.has_styles:
            second = losses.network(pair.images, "translate", others)
            expected["style"] = 2.0 * (losses.parts["style"](fake, pair.other) - codes).abs().mean()
            expected["diversity"] = -0.7 * (fake - second).abs().mean()
    assert {key: pytest.approx(value.item(), rel=1e-4) for key, value in expected.items()} == {
        key: value.item() for key, value in terms.items()
    }
    assert ("diversity" in losses.translation_losses(pair, codes, others, 0.0)) is False
    torch.stack(list(terms.values())).sum().backward()
    assert touched(losses.network)
    assert not touched(losses.parts["discriminator"])
    if losses.has_styles:
        assert touched(losses.parts["mapping"])
        assert touched(losses.parts["style"])


@every_network
def test_self_distillation_compares_one_step_with_two(name: str) -> None:
    losses = losses_of(name, self_target=10.0, self_source=2.0)
    network, source, target = losses.network, images(2, 0), images(1, 1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    value, trust = self_losses(losses, source, target, network, no_labels(2))
    assert trust == 1  # there is no guard
    code = losses.self_code()
    with torch.no_grad():

        def one_step(batch: Tensor) -> Tensor:
            return network(batch, "self", None if code is None else code.expand(len(batch), -1))

        on_source = (one_step(source) - network(source, "seg")).abs().mean()
        on_target = (one_step(target) - network(network(target, "source"), "seg")).abs().mean()
    assert value.item() == pytest.approx((2 * on_source + 10 * on_target).item(), rel=1e-4)
    value.backward()
    assert touched(network)
    if losses.has_styles:
        assert touched(losses.parts["mapping"])
        assert not touched(losses.parts["style"])


def test_the_teacher_of_self_distillation_gets_no_gradient() -> None:
    losses, teacher = losses_of("stargan"), losses_of("stargan").network
    self_losses(losses, images(1, 0), images(1, 1), teacher, no_labels(1))[0].backward()
    assert not touched(teacher)


def test_without_translation_the_teacher_segments_the_target_as_it_is() -> None:
    losses = losses_of("conditional_unet", adversarial=0.0, self_source=0.0, self_target=1.0)
    source, target = images(1, 0), images(1, 1)
    with torch.no_grad():
        for weight in losses.network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        expected = (losses.network(target, "self") - losses.network(target, "seg")).abs().mean()
    value, _ = self_losses(losses, source, target, losses.network, no_labels(1))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


class Teacher(nn.Module):
    """Segments as it is told: by task."""

    def __init__(self, **logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor, task: str) -> Tensor:
        return self.logits[task].expand(len(image), -1, -1, -1)


def logits_of(mask: Tensor) -> Tensor:
    return torch.stack((1 - mask, mask))[None] * 5


def test_the_guard_trusts_two_steps_as_far_as_they_are_right_on_the_source() -> None:
    """Dice of the direct segmentation 1, of that in two steps 2/3 or 1: its power times what the margin leaves."""
    mask = torch.zeros(16, 16)
    mask[:4] = 1
    half = torch.zeros(16, 16)
    half[:2] = 1  # Dice 2 * 32 / (32 + 64) = 2/3
    labels = mask[None, None]
    source, target = images(1, 0), images(1, 1)
    for two_steps, guard, expected in (
        (half, Guard(margin=0.5, exponent=2.0), (2 / 3) ** 2 * (1 - (1 / 3) / 0.5)),
        (half, Guard(margin=0.1, exponent=4.0), 0.0),
        (mask, Guard(margin=0.1, exponent=4.0), 1.0),
        (half, Guard(margin=None, exponent=0.0), 1.0),
    ):
        losses = losses_of("stargan", guard, self_source=0.0, self_target=3.0)
        teacher = Teacher(seg=logits_of(mask), two_step=logits_of(two_steps))
        value, trust = self_losses(losses, source, target, teacher, labels)
        assert float(trust) == pytest.approx(expected, abs=1e-6)
        with torch.no_grad():
            one_step = losses.network(target, "self", losses.self_code())
            on_target = (one_step - logits_of(two_steps)).abs().mean()
        assert value.item() == pytest.approx(3 * expected * on_target.item(), rel=1e-4, abs=1e-6)


def test_stored_styles_are_the_moving_means_of_their_domains() -> None:
    losses = losses_of("stargan")
    pair = make_pair(images(2, 0), images(2, 1), None)
    codes = torch.randn(4, 16)
    losses.store_styles(codes, pair, 0)
    torch.testing.assert_close(losses.network.codes[TARGET], codes[:2].mean(0))
    torch.testing.assert_close(losses.network.codes[SOURCE], codes[2:].mean(0))
    losses.store_styles(torch.zeros(4, 16), pair, 10_000)
    torch.testing.assert_close(losses.network.codes[TARGET], 0.99 * codes[:2].mean(0))


def test_a_style_that_is_not_finite_is_not_stored() -> None:
    losses = losses_of("stargan")
    pair = make_pair(images(1, 0), images(1, 1), None)
    codes = torch.randn(2, 16)
    codes[0, 3] = float("nan")  # of a reference of the target
    losses.network.codes.fill_(0.5)
    losses.store_styles(codes, pair, 0)
    assert torch.equal(losses.network.codes[TARGET], torch.full((16,), 0.5))
    torch.testing.assert_close(losses.network.codes[SOURCE], codes[1])


@every_network
def test_everything_that_segments_learns_under_autocast(name: str) -> None:
    """Also the weights that the teacher, which is the same network, has used without a gradient just before."""
    losses, source, target = losses_of(name), images(1, 0), images(1, 1)
    losses.network.start_self_code()
    with torch.no_grad():
        for weight in losses.network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taught = losses.self_targets(source, target, losses.network, no_labels(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.self_loss(source, target, *taught)
    loss.backward()
    for key, weight in losses.network.named_parameters():
        if key.endswith(("conv1.weight", "conv2.weight", "conv.weight")):
            assert weight.grad is not None, key
            assert weight.grad.abs().max() > 0, key


def test_images_need_no_gradient_after_the_discriminators_step() -> None:
    losses = losses_of("stargan")
    pair = make_pair(images(1, 0), images(1, 1), None)
    losses.discriminator_loss(pair, losses.latent_codes(pair.other).detach()).backward()
    assert not pair.images.requires_grad


def test_frozen_modules_get_no_gradient_and_thaw_again() -> None:
    layer, feature = nn.Linear(2, 2), torch.randn(1, 2, requires_grad=True)
    with frozen(layer):
        value = layer(feature).sum()
    value.backward()
    assert feature.grad is not None
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
