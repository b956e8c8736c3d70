"""Networks of segmentation and translation: what each code does, how plans name them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.conditional_unet import stock_backbone, stock_one_step_weights
from nnunet_kd.networks.star_generator import SELF
from nnunet_kd.networks.styles import training_parts
from nnunet_kd.networks.task_codes import NETWORKS, STYLE_DIM, planned_network, task_code_architecture
from nnunet_kd.networks.width import scale_width

DIMENSIONS = (2, 3)
every_network = pytest.mark.parametrize("name", NETWORKS)
dimensions = pytest.mark.parametrize("dimension", DIMENSIONS)


def stock_plans(dimension: int, residual: bool = False) -> dict[str, Any]:
    """The architecture block of a planner; in 3D with anisotropic kernels and strides."""
    flat = [[1, 3, 3], [3, 3, 3], [3, 3, 3]] if dimension == 3 else [[3, 3]] * 3
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]] if dimension == 3 else [[1, 1], [2, 2], [2, 2]]
    arguments: dict[str, Any] = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": flat,
        "strides": strides,
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    arguments |= {"n_blocks_per_stage": [1, 2, 2]} if residual else {"n_conv_per_stage": [2, 2, 2]}
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def build(architecture: dict[str, Any], channels: int = 2, classes: int = 3, deep_supervision: bool = False) -> Any:
    """As stock nnU-Net builds it."""
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=deep_supervision,
    )


def made(name: str, dimension: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    return build(task_code_architecture(stock_plans(dimension), name), **options)


def image_of(dimension: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *(16,) * dimension, generator=torch.Generator().manual_seed(1))


def codes(network: Any, name: str, batch: int = 2) -> Tensor:
    return torch.arange(batch) % 2 if name == "conditional_unet" else torch.randn(batch, STYLE_DIM)


@every_network
@dimensions
def test_stock_nnunet_builds_it_from_plans(name: str, dimension: int) -> None:
    network = made(name, dimension)
    image = image_of(dimension)
    for task in ("self", "seg", "two_step"):
        assert network(image, task).shape == (2, 3, *image.shape[2:])
    for task in ("source", "target"):
        assert network(image, task).shape == image.shape
    assert network(image, "translate", codes(network, name)).shape == image.shape
    assert network.compute_conv_feature_map_size(image.shape[2:]) > 0
    assert planned_network(task_code_architecture(stock_plans(dimension), name)) == name


@every_network
def test_what_it_predicts_is_the_self_code_until_told_otherwise(name: str) -> None:
    network, image = made(name), image_of(2)
    assert torch.equal(network(image), network(image, "self"))
    for task in ("seg", "two_step", "source", "target"):
        network.predicts = task
        assert torch.equal(network(image), network(image, task))


@every_network
def test_two_steps_are_a_translation_and_a_segmentation(name: str) -> None:
    network, image = made(name), image_of(2)
    if name == "stargan":
        network.codes.normal_()
    expected = network(network(image, "source"), "seg")
    assert torch.equal(network(image, "two_step"), expected)
    assert not torch.equal(network(image, "seg"), expected)


@every_network
def test_samples_are_translated_each_by_its_own_code(name: str) -> None:
    network, image = made(name), image_of(2, batch=3)
    if name == "conditional_unet":
        with torch.no_grad():
            for norm in network._norms:
                norm.weight += torch.randn_like(norm.weight)
    chosen = codes(network, name, 3)
    together = network(image, "translate", chosen)
    for sample in range(3):
        alone = network(image[sample : sample + 1], "translate", chosen[sample : sample + 1])
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(image, "translate", chosen.roll(1, 0)), together)


@every_network
def test_the_self_code_starts_as_the_segmentation_without_a_code_and_then_learns(name: str) -> None:
    network, image = made(name), image_of(2)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    assert not torch.allclose(network(image, "self"), network(image, "seg"), atol=1e-3)
    network.start_self_code()
    if name == "stargan":
        network.codes.normal_()  # whatever the code
    torch.testing.assert_close(network(image, "self"), network(image, "seg"), rtol=1e-4, atol=1e-4)
    network(image, "self").square().mean().backward()
    own = [block.norm1.scale_and_shift.bias for block in network.encoder] if name == "stargan" else [
        norm.weight for norm in network._norms
    ]  # fmt: skip
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in own)


def test_codes_of_the_generator_go_where_the_paper_says() -> None:
    """Translation: into the decoder; one-step segmentation: into the encoder; segmentation: nowhere."""
    network, image = made("stargan"), image_of(2)

    def touched(task: str, code: Tensor | None) -> set[str]:
        network.zero_grad()
        network(image, task, code).square().mean().backward()
        named = network.named_parameters()
        return {
            key.split(".")[0]
            for key, weight in named
            if "scale_and_shift" in key and weight.grad is not None and weight.grad.abs().max() > 0
        }

    assert touched("translate", torch.randn(2, STYLE_DIM)) == {"decoder"}
    assert touched("self", torch.randn(2, STYLE_DIM)) == {"encoder"}
    assert touched("seg", None) == set()
    network.codes[SELF].normal_()
    expected = network(image, "self", network.codes[SELF].expand(2, -1))
    assert torch.equal(network(image, "self"), expected)


def test_the_generator_has_no_skip_connections() -> None:
    """Everything passes the coarsest grid: a pattern that averages to nothing there leaves no trace."""
    network = made("stargan").eval()
    network.stem.weight.data.fill_(0.01)
    assert [tuple(block.stride) for block in network.encoder] == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert [tuple(block.stride) for block in network.decoder] == [(1, 1), (1, 1), (2, 2), (2, 2)]
    seen = []
    network.encoder[-1].register_forward_hook(lambda *_: torch.zeros(2, 8, 4, 4))
    for seed in range(2):
        seen.append(network(torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(seed)), "seg"))
    assert torch.equal(*seen)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual encoder"])
def test_the_one_step_segmentation_of_a_conditional_unet_is_a_stock_network(residual: bool) -> None:
    torch.manual_seed(0)
    architecture = task_code_architecture(stock_plans(2, residual), "conditional_unet")
    network = build(architecture)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    assert stock_backbone(architecture) == stock_plans(2, residual)
    stock = build(stock_backbone(architecture))
    stock.load_state_dict(stock_one_step_weights(network.state_dict()))
    image = image_of(2)
    assert torch.equal(stock(image), network(image))


def test_deep_supervision_of_the_conditional_unet() -> None:
    network, image = made("conditional_unet", deep_supervision=True), image_of(2)
    assert [output.shape[-1] for output in network(image, "seg")] == [16, 8]
    assert network(image, "source").shape == image.shape
    network.decoder.deep_supervision = False
    assert network(image, "self").shape == (2, 3, 16, 16)


@every_network
def test_a_copy_is_independent(name: str) -> None:
    """The moving average is a copy; codes are chosen in each by itself."""
    network, image = made(name), image_of(2)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1.0)
    before = other(image, "self")
    network(image, "seg")
    assert torch.equal(other(image, "self"), before)


def test_widths_can_be_scaled_and_parts_follow_the_plans() -> None:
    narrow = scale_width(task_code_architecture(stock_plans(3), "stargan"), 0.5, 2)
    assert narrow["arch_kwargs"]["features_per_stage"] == [2, 3, 4]
    parts = training_parts(narrow, 2)
    image, domain = image_of(3), torch.tensor([1, 0])
    assert parts["discriminator"](image, domain).shape == (2,)
    code = parts["style"](image, domain)
    assert code.shape == (2, STYLE_DIM)
    assert torch.equal(code[1], parts["style"](image, torch.tensor([0, 0]))[1])
    assert not torch.equal(code[0], parts["style"](image, torch.tensor([0, 0]))[0])
    latent = torch.randn(2, 4)
    mapped = parts["mapping"](latent, torch.tensor([2, 0]))
    assert mapped.shape == (2, STYLE_DIM)
    assert not torch.equal(mapped[0], parts["mapping"](latent, torch.tensor([1, 0]))[0])
    assert set(training_parts(task_code_architecture(stock_plans(2), "conditional_unet"), 1)) == {"discriminator"}


def test_a_network_cannot_be_made_of_anything() -> None:
    star = task_code_architecture(stock_plans(2), "stargan")
    assert task_code_architecture(star, "stargan") == star
    with pytest.raises(SettingsError, match=r"cannot be made of .*StarGenerator.*-p nnUNetPlans"):
        task_code_architecture(star, "conditional_unet")
    with pytest.raises(SettingsError, match=r"cannot be made of mine\.Network"):
        task_code_architecture({"network_class_name": "mine.Network", "arch_kwargs": {}}, "stargan")
