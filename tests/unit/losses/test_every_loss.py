"""What must hold for every loss, on logits and on features, in two and three dimensions.

Those on classification are among them; those on boxes have other inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_kd.losses import LOSSES, build_loss
from nnunet_kd.losses.wavelet import _analysis

GRIDS = {2: (6, 5), 3: (4, 3, 5)}
# every loss by its defaults, and the options that take another path
CASES = [(on, name, {}) for on in ("logits", "features") for name in LOSSES[on]] + [
    ("logits", "kl", {"balance": "class"}),
    ("logits", "kl", {"nonlinearity": "sigmoid"}),
    ("logits", "kl", {"nonlinearity": "sigmoid", "balance": "class"}),
    ("logits", "dist", {"nonlinearity": "sigmoid"}),
    ("logits", "cwd", {"nonlinearity": "sigmoid"}),
    ("logits", "l1", {"of": "probabilities"}),
    ("logits", "l1", {"of": "probabilities", "nonlinearity": "sigmoid"}),
    ("logits", "pseudo_label", {"nonlinearity": "sigmoid"}),
    ("features", "mse", {"standardise": False}),
    ("features", "wavelet", {"wavelet": "haar"}),
    ("features", "affinity", {"tokens_per_axis": 2}),
]
every_loss = pytest.mark.parametrize(
    ("on", "name", "options"),
    CASES,
    ids=["-".join([on, name, *map(str, options.values())]) for on, name, options in CASES],
)
# a teacher that is not certain gives pseudo labels that differ from its own probabilities
DISTANCES = [(on, name, options) for on, name, options in CASES if name != "pseudo_label"]
every_distance = pytest.mark.parametrize(
    ("on", "name", "options"),
    DISTANCES,
    ids=["-".join([on, name, *map(str, options.values())]) for on, name, options in DISTANCES],
)
dimensions = pytest.mark.parametrize("dimension", [2, 3])


class Batch:
    """Random student, teacher, target and valid. The last sample has no valid voxel at all."""

    def __init__(self, options: dict[str, object], dimension: int, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(dimension)
        grid = GRIDS[dimension]
        self.student = 2 * torch.randn(3, 4, *grid, generator=random, dtype=torch.float64).to(dtype)
        self.teacher = 2 * torch.randn(3, 4, *grid, generator=random, dtype=torch.float64).to(dtype)
        self.valid = torch.rand(3, 1, *grid, generator=random) < 0.7
        self.valid[2] = False
        if options.get("nonlinearity") == "sigmoid":
            self.target = torch.rand(3, 4, *grid, generator=random) < 0.4
        else:
            self.target = torch.randint(0, 4, (3, 1, *grid), generator=random)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {"target": self.target, "valid": self.valid}


@every_distance
@dimensions
def test_equal_inputs_are_the_minimum_of_zero(on: str, name: str, options: dict, dimension: int) -> None:
    batch, loss = Batch(options, dimension, torch.float64), build_loss(on, name, **options)
    assert loss(batch.teacher, batch.teacher, **batch.masks).item() == pytest.approx(0, abs=1e-12)
    assert loss(batch.teacher, batch.teacher, target=batch.target).item() == pytest.approx(0, abs=1e-12)
    at_minimum = batch.teacher.clone().requires_grad_()
    loss(at_minimum, batch.teacher, **batch.masks).backward()
    assert at_minimum.grad.abs().max() < 1e-6  # not 1e-12: small constants in denominators
    assert loss(batch.student, batch.teacher, **batch.masks).item() > 1e-3


@every_loss
@dimensions
def test_a_step_along_the_gradient_brings_the_student_closer(on: str, name: str, options: dict, dimension: int) -> None:
    batch, loss = Batch(options, dimension, torch.float64), build_loss(on, name, **options)
    student = batch.student.clone().requires_grad_()
    before = loss(student, batch.teacher, **batch.masks)
    before.backward()
    step = 1e-3 / student.grad.norm()
    assert loss(student - step * student.grad, batch.teacher, **batch.masks) < before


@every_loss
@dimensions
def test_gradient_is_that_of_finite_differences(on: str, name: str, options: dict, dimension: int) -> None:
    batch, loss = Batch(options, dimension, torch.float64), build_loss(on, name, **options)
    student = batch.student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss(values, batch.teacher, **batch.masks), (student,), eps=1e-6)


@every_loss
def test_gradient_reaches_the_student_and_not_the_teacher(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    student, teacher = batch.student.requires_grad_(), batch.teacher.requires_grad_()
    loss(student, teacher, target=batch.target).backward()
    assert teacher.grad is None
    assert student.grad.flatten(2).abs().sum(dim=2).min() > 0  # every sample and channel


@every_loss
@dimensions
def test_voxels_that_are_not_valid_have_no_influence(on: str, name: str, options: dict, dimension: int) -> None:
    batch, loss = Batch(options, dimension), build_loss(on, name, **options)

    def value_and_gradient(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        student = student.clone().requires_grad_()
        value = loss(student, teacher, target=target, valid=batch.valid)
        value.backward()
        return value, student.grad

    value, gradient = value_and_gradient(batch.student, batch.teacher, batch.target)
    other_student = torch.where(batch.valid, batch.student, 50 * batch.student.flip(0) - 3)
    other_teacher = torch.where(batch.valid, batch.teacher, -30 * batch.teacher.flip(1) + 2)
    other_target = torch.where(batch.valid, batch.target, torch.ones_like(batch.target))
    if batch.target.dtype != torch.bool:
        other_target = torch.where(batch.valid, batch.target, -1)  # as nnU-Net marks voxels outside
    other_value, other_gradient = value_and_gradient(other_student, other_teacher, other_target)
    assert torch.equal(value, other_value)
    assert torch.equal(gradient, other_gradient)
    assert gradient.masked_select(~batch.valid).count_nonzero() == 0


@every_loss
def test_all_valid_is_the_same_as_no_mask(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    everything = torch.ones_like(batch.valid)
    masked = loss(batch.student, batch.teacher, target=batch.target, valid=everything)
    torch.testing.assert_close(masked, loss(batch.student, batch.teacher, target=batch.target))
    torch.testing.assert_close(
        masked, loss(batch.student, batch.teacher, target=batch.target.float(), valid=everything.float())
    )


@every_loss
@dimensions
def test_an_empty_mask_gives_zero_and_a_zero_gradient(on: str, name: str, options: dict, dimension: int) -> None:
    batch, loss = Batch(options, dimension), build_loss(on, name, **options)
    student = batch.student.requires_grad_()
    value = loss(student, batch.teacher, target=batch.target, valid=torch.zeros_like(batch.valid))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(on: str, name: str, options: dict, dtype: torch.dtype) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    student = (100 * batch.student).to(dtype).requires_grad_()
    teacher = (100 * batch.teacher).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, **batch.masks)
    value.backward()
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert torch.equal(value, loss(student.float(), teacher.float(), **batch.masks))
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_a_device_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mps in older torch: autocast cannot even be switched off there."""

    def refuse(device_type: str, **_: object) -> None:
        raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")

    monkeypatch.setattr(torch, "autocast", refuse)
    student, teacher = (torch.randn(1, 2, 4, 4, device="meta", dtype=torch.float16) for _ in range(2))
    value = build_loss("logits", "kl")(student, teacher)
    assert (value.shape, value.dtype) == ((), torch.float32)


@every_loss
def test_half_precision_inputs_are_near_float32(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    exact = loss(batch.student, batch.teacher, **batch.masks)
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        near = loss(batch.student.to(dtype), batch.teacher.to(dtype), **batch.masks)
        torch.testing.assert_close(near, exact, rtol=tolerance, atol=0)


@every_loss
def test_constant_and_huge_inputs_stay_finite(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    extremes = [torch.zeros_like(batch.student), 3e4 * batch.student.sign(), torch.full_like(batch.student, 7.0)]
    for start in extremes:
        for teacher in extremes:
            student = start.clone().requires_grad_()
            value = loss(student, teacher, **batch.masks)
            value.backward()
            assert value.isfinite()
            assert value > -1e-5
            assert student.grad.isfinite().all()


@every_distance
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 1, 1), (1, 1, 1), (1, 9, 17)])
def test_grids_as_small_as_one_voxel(on: str, name: str, options: dict, grid: tuple[int, ...]) -> None:
    loss = build_loss(on, name, **options)
    student, teacher = torch.randn(2, 2, 4, *grid).requires_grad_().unbind(0)
    num_maps = 4 if options.get("nonlinearity") == "sigmoid" else 1
    value = loss(student, teacher, target=torch.ones(2, num_maps, *grid))
    assert value.isfinite()
    assert loss(teacher, teacher, target=torch.ones(2, num_maps, *grid)).item() == pytest.approx(0, abs=1e-5)


@every_loss
def test_shapes_that_do_not_fit_are_refused_with_both_shapes(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    for teacher in (batch.teacher[:, :1], batch.teacher[..., :1], batch.teacher[0]):
        with pytest.raises(ValueError, match="student has") as error:
            loss(batch.student, teacher, **batch.masks)
        assert str(tuple(batch.student.shape)) in str(error.value)
        assert str(tuple(teacher.shape)) in str(error.value)
    with pytest.raises(ValueError, match="2 or 3 spatial axes"):
        loss(batch.student.flatten(2), batch.teacher.flatten(2))
    for masks in ({"valid": batch.valid[0]}, {"target": batch.target[0]}, {"valid": batch.valid.repeat(1, 2, 1, 1, 1)}):
        with pytest.raises(ValueError, match=f"{next(iter(masks))} has shape"):
            loss(batch.student, batch.teacher, **{**batch.masks, **masks})


@pytest.fixture
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors without values: whatever would make a GPU wait for a value raises."""
    _analysis.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    _analysis.cache_clear()


@every_loss
def test_nothing_waits_for_the_device(fake_tensors: FakeTensorMode, on: str, name: str, options: dict) -> None:
    loss = build_loss(on, name, **options)
    student = torch.empty(2, 4, 4, 3, 5, requires_grad=True)
    target = torch.empty(2, 4 if options.get("nonlinearity") == "sigmoid" else 1, 4, 3, 5, dtype=torch.long)
    valid = torch.empty(2, 1, 4, 3, 5, dtype=torch.bool)
    loss(student, torch.empty(2, 4, 4, 3, 5), target=target, valid=valid).backward()
    assert student.grad is not None
    with pytest.raises(RuntimeError):  # the check itself works
        student.masked_select(valid).sum().item()


@pytest.mark.gpu
@every_loss
def test_cuda_equals_cpu_and_never_waits(on: str, name: str, options: dict) -> None:
    batch, loss = Batch(options, 3), build_loss(on, name, **options)
    expected = loss(batch.student, batch.teacher, **batch.masks)
    student, teacher = batch.student.cuda().requires_grad_(), batch.teacher.cuda()
    masks = {key: mask.cuda() for key, mask in batch.masks.items()}
    loss(student, teacher, **masks)  # the wavelet's matrices are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(student, teacher, **masks)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)


@pytest.mark.parametrize("name", ["mse", "intra_class", "class_masked"])
def test_masks_of_any_resolution_serve_features(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    loss = build_loss("features", name)
    student, teacher = torch.randn(2, 1, 4, 3, 5, generator=random).unbind(0)
    target = torch.randint(0, 3, (1, 1, 3, 5), generator=random)
    valid = torch.rand(1, 1, 3, 5, generator=random) < 0.7
    expected = loss(student, teacher, target=target, valid=valid)
    fine = {
        key: mask.repeat_interleave(4, dim=2).repeat_interleave(2, dim=3)
        for key, mask in {"target": target, "valid": valid}.items()
    }
    assert torch.equal(expected, loss(student, teacher, **fine))


@every_loss
def test_losses_keep_nothing_that_a_checkpoint_would_hold(on: str, name: str, options: dict) -> None:
    assert not build_loss(on, name, **options).state_dict()
