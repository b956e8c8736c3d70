"""The joint network against the stock U-Net that it promises to equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_kd.networks.joint import Head, JointUNet, Route, crop, member_head_weights, pad_to_multiple
from nnunet_kd.networks.multitask import MultiTaskUNet, TaskOutputs
from nnunet_kd.tasks.detection_plan import plan_detection

NUM_CHANNELS = 3
NUM_OUTPUTS = 7  # head a: 3 softmax outputs, head b: 2 regions, head c: 2 softmax outputs
HEADS = (Head(0, 3, False), Head(3, 5, True), Head(5, 7, False))
ROUTES = {"a": Route((0,), 0, 3), "b": Route((2, 1), 3, 5), "c": Route((0, 1, 2), 5, 7)}


def make_unet(kind: str, dimension: int, *, deep_supervision: bool = True) -> nn.Module:
    torch.manual_seed(0)
    convolution, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimension]
    shared = {
        "input_channels": NUM_CHANNELS,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": convolution,
        "kernel_sizes": 3,
        "strides": [1, 2, [1, *[2] * (dimension - 1)]],
        "num_classes": NUM_OUTPUTS,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "deep_supervision": deep_supervision,
    }
    if kind == "plain":
        return PlainConvUNet(n_conv_per_stage=1, **shared)
    return ResidualEncoderUNet(n_blocks_per_stage=[1, 1, 1], **shared)


@pytest.fixture(params=[("plain", 2), ("plain", 3), ("residual", 2), ("residual", 3)], ids=str)
def kind(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


def patch(dimension: int, size: int = 8) -> tuple[int, ...]:
    return (size,) * dimension


@pytest.mark.parametrize("member", list(ROUTES))
def test_member_equals_stock_unet_with_zero_filled_channels_and_all_heads(kind: tuple[str, int], member: str) -> None:
    stock = make_unet(*kind)
    joint = JointUNet(make_unet(*kind), ROUTES, HEADS)
    joint.load_state_dict(stock.state_dict())
    route = ROUTES[member]
    image = torch.randn(2, len(route.channels), *patch(kind[1]))
    filled = torch.zeros(2, NUM_CHANNELS, *patch(kind[1]))
    for position, channel in enumerate(route.channels):
        filled[:, channel] = image[:, position]
    joint.select(member)
    outputs = joint(image)
    expected = stock(filled)
    assert len(outputs) == len(expected) == 2
    for output, whole in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, whole[:, route.start : route.stop], rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_stock_unet(kind: tuple[str, int]) -> None:
    stock = make_unet(*kind)
    joint = JointUNet(make_unet(*kind), ROUTES, HEADS)
    image = torch.randn(1, 1, *patch(kind[1]))
    filled = torch.cat([image, torch.zeros(1, 2, *patch(kind[1]))], 1)
    joint.select("a")
    joint(image)[0].square().mean().backward()
    stock(filled)[0][:, :3].square().mean().backward()
    mine, theirs = dict(joint.named_parameters()), dict(stock.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        gradient = mine[name].grad
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            torch.zeros_like(expected) if gradient is None else gradient, expected, rtol=1e-3, atol=1e-6
        )


def test_state_dict_has_the_keys_of_the_stock_unet(kind: tuple[str, int]) -> None:
    stock = make_unet(*kind)
    joint = JointUNet(make_unet(*kind), ROUTES, HEADS)
    assert list(joint.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("member", list(ROUTES))
def test_odd_patch_equals_the_padded_patch_cropped(kind: tuple[str, int], member: str) -> None:
    joint = JointUNet(make_unet(*kind), ROUTES, HEADS).eval()
    joint.decoder.deep_supervision = False
    joint.select(member)
    shape = (7, 9, 10)[: kind[1]]
    image = torch.randn(1, len(ROUTES[member].channels), *shape)
    whole = tuple(-(-size // step) * step for size, step in zip(shape, joint.multiple, strict=True))
    padded = torch.zeros(1, image.shape[1], *whole)
    padded[(..., *(slice(0, size) for size in shape))] = image
    output = joint(image)
    assert output.shape == (1, ROUTES[member].stop - ROUTES[member].start, *shape)
    expected = joint(padded)[(..., *(slice(0, size) for size in shape))]
    torch.testing.assert_close(output, expected)


def test_odd_patch_with_deep_supervision_is_refused() -> None:
    joint = JointUNet(make_unet("plain", 2), ROUTES, HEADS)
    joint.select("a")
    with pytest.raises(ValueError, match="multiple"):
        joint(torch.zeros(1, 1, 7, 8))


def test_argmax_of_joint_logits_is_each_heads_own_decision() -> None:
    joint = JointUNet(make_unet("plain", 2), ROUTES, HEADS).eval()
    joint.decoder.deep_supervision = False
    image = torch.randn(2, NUM_CHANNELS, 8, 8)
    output = joint(image)
    with torch.no_grad():
        raw = make_unet("plain", 2, deep_supervision=False).eval()
        raw.load_state_dict(joint.state_dict())
        logits = raw(image)
    assert output.shape == (2, 1 + 2 + 2 + 1, 8, 8)
    assert (output[:, 0] == 0).all()
    assert torch.equal(output[:, [0, 1, 2]].argmax(1), logits[:, 0:3].argmax(1))
    assert torch.equal(output[:, [0, 5]].argmax(1), logits[:, 5:7].argmax(1))
    assert torch.equal(output[:, 3:5] > 0, logits[:, 3:5].sigmoid() > 0.5)


def test_log_odds_of_a_head_are_exact() -> None:
    joint = JointUNet(make_unet("plain", 2), ROUTES, HEADS)
    logits = torch.randn(1, NUM_OUTPUTS, 2, 2)
    joint_logits = joint.joint_logits(logits)
    probabilities = logits[:, 0:3].softmax(1)
    torch.testing.assert_close(joint_logits[:, 1:3], (probabilities[:, 1:] / probabilities[:, :1]).log())


def test_select_switches_back_and_forth() -> None:
    joint = JointUNet(make_unet("plain", 2), ROUTES, HEADS).eval()
    joint.decoder.deep_supervision = False
    image = torch.randn(1, 1, 8, 8)
    joint.select("a")
    first = joint(image)
    joint.select("c")
    assert joint(torch.randn(1, 3, 8, 8)).shape[1] == 2
    joint.select("a")
    assert torch.equal(joint(image), first)
    joint.select(None)
    assert joint(torch.randn(1, 3, 8, 8)).shape[1] == 6
    with pytest.raises(KeyError):
        joint.select("nobody")
    assert joint.member is None


def brute_force_padding(image: Tensor, multiple: tuple[int, ...]) -> Tensor:
    while any(size % step for size, step in zip(image.shape[2:], multiple, strict=True)):
        for axis, step in enumerate(multiple, start=2):
            if image.shape[axis] % step:
                border = image.select(axis, 0).unsqueeze(axis) * 0
                image = torch.cat([image, border], axis)
    return image


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (1, 4, 9)])
def test_pad_and_crop(shape: tuple[int, ...]) -> None:
    image = torch.randn(2, 3, *shape)
    padded = pad_to_multiple(image, (2, 4, 8))
    assert torch.equal(padded, brute_force_padding(image, (2, 4, 8)))
    assert torch.equal(crop(padded, shape), image)


def test_fitting_image_is_not_copied() -> None:
    image = torch.randn(1, 1, 4, 4)
    assert pad_to_multiple(image, (2, 4)) is image


@pytest.mark.parametrize("training", [True, False])
def test_features_come_only_while_training(training: bool) -> None:
    from nnunet_kd.networks.taps import find_stage

    joint = JointUNet(make_unet("plain", 3), ROUTES, HEADS).train(training)
    joint.tapped_stages = (find_stage(joint, "bottleneck"), find_stage(joint, "decoder@1/1"))
    joint.select("a")
    result = joint(torch.randn(1, 1, 8, 8, 8))
    assert isinstance(result, tuple) == training
    if training:
        outputs, features = result
        assert len(outputs) == 2
        assert [tuple(feature.shape) for feature in features] == [(1, 12, 4, 2, 2), (1, 4, 8, 8, 8)]


def test_features_of_an_odd_patch_cover_it(kind: tuple[str, int]) -> None:
    from nnunet_kd.networks.taps import find_stage

    joint = JointUNet(make_unet(*kind), ROUTES, HEADS).eval()
    joint.decoder.deep_supervision = False
    joint.select("a")
    shape = (5, 5, 9)[-kind[1] :]
    stages = [find_stage(joint, "bottleneck"), find_stage(joint, "encoder@1/2")]
    features = joint.run(torch.randn(1, 1, *shape), stages).features
    for feature, stage in zip(features, stages, strict=True):
        assert tuple(feature.shape[2:]) == tuple(-(-s // step) for s, step in zip(shape, stage.stride, strict=True))


def test_network_without_unet_decoder_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Sequential is not a U-Net"):
        JointUNet(nn.Sequential(nn.Conv2d(1, 2, 1)), ROUTES, HEADS)


def test_routes_are_a_copy() -> None:
    routes: dict[str, Route] = dict(ROUTES)
    joint = JointUNet(make_unet("plain", 2), routes, HEADS)
    routes.clear()
    joint.select("a")
    assert joint.member == "a"


@pytest.fixture
def compiled() -> Callable[[nn.Module], nn.Module]:
    def compile_eagerly(network: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(network, backend="eager")

    return compile_eagerly


def test_compiled_network_follows_the_selected_member(compiled: Callable[[nn.Module], nn.Module]) -> None:
    joint = JointUNet(make_unet("plain", 2), ROUTES, HEADS).eval()
    joint.decoder.deep_supervision = False
    fast = compiled(joint)
    for member in ("a", "b", "c", "a"):
        joint.select(member)
        image = torch.randn(1, len(ROUTES[member].channels), 8, 8)
        torch.testing.assert_close(fast(image), joint(image))


def heads_of(dimension: int) -> dict[str, dict[str, object]]:
    """Members a (classes and boxes) and d (classes alone, no segmentation) have heads for them."""
    stride = (2,) * dimension
    plan = plan_detection([[3.0] * dimension] * 4, [(1,) * dimension, stride], (8,) * dimension, ("lesion",))
    return {
        "a": {"classification": {"targets": [["grade", 3]]}, "detection": plan.to_dict()},
        "d": {"classification": {"targets": [["site", 2]]}, "detection": None},
    }


def test_heads_leave_the_weights_and_the_other_members_as_they_are(kind: tuple[str, int]) -> None:
    plain = JointUNet(make_unet(*kind), ROUTES, HEADS)
    routes = {**ROUTES, "d": Route((0,), 0, 0)}
    joint = JointUNet(make_unet(*kind), routes, HEADS, heads_of(kind[1]))
    weights = joint.state_dict()
    own = {key: value for key, value in weights.items() if not key.startswith("task_heads.")}
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    image = torch.randn(1, 2, *patch(kind[1]))
    for network in (plain, joint):
        network.select("b")
    for output, expected in zip(joint(image), plain(image), strict=True):
        assert torch.equal(output, expected)


def test_member_with_tasks_equals_the_network_of_one_dataset(kind: tuple[str, int]) -> None:
    settings = heads_of(kind[1])
    joint = JointUNet(make_unet(*kind), {**ROUTES, "d": Route((0,), 0, 0)}, HEADS, settings).eval()
    for name, classification in (("a", "grade"), ("d", "site")):
        unet = make_unet(*kind)
        single = MultiTaskUNet.__new__(MultiTaskUNet)
        nn.Module.__init__(single)
        joint.select(name)
        image = torch.randn(2, 1, *patch(kind[1]))
        found = joint(image, tasks=True)
        assert isinstance(found, TaskOutputs)
        assert bool(found.segmentation) == (name == "a")
        single.encoder, single.decoder, single.tapped_stages = unet.encoder, unet.decoder, ()
        single.heads = type(joint.speaking_heads)(unet, **settings[name])
        filled = torch.cat([image, torch.zeros(2, NUM_CHANNELS - 1, *patch(kind[1]))], 1)
        stock = {key: value for key, value in joint.state_dict().items() if not key.startswith("task_heads.")}
        single.load_state_dict({**stock, **member_head_weights(joint.state_dict(), name)})
        expected = single.eval().forward_tasks(filled)
        torch.testing.assert_close(found.classification[classification], expected.classification[classification])
        if name == "a":
            for own, other in zip(found.detection.class_logits, expected.detection.class_logits, strict=True):
                torch.testing.assert_close(own, other)
            torch.testing.assert_close(found.segmentation[0], expected.segmentation[0][:, :3], rtol=1e-4, atol=1e-5)
        assert isinstance(joint.train()(image), TaskOutputs)
        joint.eval()


def test_a_member_without_segmentation_and_boxes_needs_no_decoder() -> None:
    joint = JointUNet(make_unet("plain", 2), {"d": Route((0,), 0, 0)}, HEADS, {"d": heads_of(2)["d"]})
    joint.select("d")
    joint(torch.randn(2, 1, 8, 8)).classification["site"].sum().backward()
    parts = (joint.decoder.stages, joint.decoder.transpconvs, joint.decoder.seg_layers)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())
    assert all(parameter.grad is not None for parameter in joint.encoder.parameters())
    assert all(parameter.grad is not None for parameter in joint.task_heads.parameters())
