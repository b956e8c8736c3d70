"""The student's loss with fake outputs: weights, schedule, levels, masks, label maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.adapters import Projector
from nnunet_kd.settings import Guard, Settings, parse_settings
from nnunet_kd.spaces.labels import LabelMap, LabelSpace, match_label_spaces
from nnunet_kd.teachers.output import Taught, TeacherOutput
from nnunet_kd.training.distillation import DistillationLoss, build_terms, common_target, projector_name

LABELS = LabelSpace.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
IGNORING = LabelSpace.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}})
REGIONS = LabelSpace.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
)
LEVEL_WEIGHTS = (0.75, 0.25, 0.0)


class Supervised(nn.Module):
    """Mean of the finest output: easy to know."""

    def forward(self, outputs: Any, target: Any) -> Tensor:
        assert isinstance(outputs, (list, tuple)) == isinstance(target, list)
        return (outputs[0] if isinstance(outputs, (list, tuple)) else outputs).mean()


def identity(space: LabelSpace) -> LabelMap:
    return match_label_spaces(space, space)[0]


def make_loss(
    terms: list[dict[str, Any]],
    label_map: LabelMap | None = None,
    *,
    guard: Guard | None = None,
    projectors: dict[str, nn.Module] | None = None,
    levels: tuple[str, ...] = (),
    level_weights: tuple[float, ...] = LEVEL_WEIGHTS,
    teachers: tuple[str, ...] = ("joint",),
) -> DistillationLoss:
    label_map = identity(LABELS) if label_map is None else label_map
    settings = parse_settings({"teachers": {name: {} for name in teachers}, "terms": terms})
    built = build_terms(settings, dict.fromkeys(teachers, label_map.target.regions))
    return DistillationLoss(
        Supervised(),
        level_weights,
        built,
        dict.fromkeys(teachers, Taught(("segmentation",), label_map)),
        projectors or {},
        levels,
        guard or Guard(),
    )


def term(**changes: Any) -> dict[str, Any]:
    return {"on": "logits", "loss": "kl", "temperature": 2.0, "schedule": {"kind": "constant"}, **changes}


def make_outputs(channels: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, size, size, requires_grad=True) for size in (8, 4, 2)]


def make_targets(highest: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, highest + 1, (2, 1, size, size)).float() for size in (8, 4, 2)]


def kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """By the definition, voxel by voxel."""
    total, count = torch.zeros(()), 0
    for b in range(student.shape[0]):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                if valid is not None and not valid[b, 0, y, x]:
                    continue
                p = torch.softmax(teacher[b, :, y, x] / temperature, 0)
                q = torch.softmax(student[b, :, y, x] / temperature, 0)
                total = total + (p * (p.log() - q.log())).sum()
                count += 1
    return temperature**2 * total / count


def coarsened(teacher: Tensor, size: int) -> Tensor:
    factor = teacher.shape[-1] // size
    return teacher.view(*teacher.shape[:2], size, factor, size, factor).mean((3, 5))


def test_without_teacher_outputs_only_the_supervised_loss_remains() -> None:
    loss, outputs, targets = make_loss([term()]), make_outputs(), make_targets()
    assert loss(outputs, targets) == outputs[0].mean()
    assert loss((outputs, []), targets) == outputs[0].mean()
    assert loss.logged == {}


def test_logit_term_is_the_weighted_sum_over_the_levels() -> None:
    loss, outputs, targets = make_loss([term(weight=3.0)]), make_outputs(), make_targets()
    teacher = torch.randn(2, 3, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    expected = 0.75 * kl(outputs[0], teacher, 2.0) + 0.25 * kl(outputs[1], coarsened(teacher, 4), 2.0)
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean() + 3 * expected)
    raw, weighted = loss.logged["joint.logits.kl"]
    torch.testing.assert_close(raw, expected.detach())
    torch.testing.assert_close(weighted, 3 * expected.detach())
    assert not raw.requires_grad


def test_term_without_deep_supervision_uses_the_finest_level_whole() -> None:
    loss, outputs, targets = make_loss([term(deep_supervision=False)]), make_outputs(), make_targets()
    teacher = torch.randn(2, 3, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean() + kl(outputs[0], teacher, 2.0))


def test_student_without_deep_supervision() -> None:
    loss = make_loss([term()], level_weights=(1.0,))
    output, target, teacher = make_outputs()[0], make_targets()[0], torch.randn(2, 3, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    torch.testing.assert_close(loss(output, target), output.mean() + kl(output, teacher, 2.0))


GROUPS = {"labeled": slice(0, 2), "unlabeled": slice(2, 3), "mixed": slice(3, 5)}


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        (["labeled"], (0, 1)),
        (["unlabeled"], (2,)),
        (["mixed"], (3, 4)),
        (["unlabeled", "labeled"], (0, 1, 2)),
        (["mixed", "unlabeled"], (2, 3, 4)),
        ([], (0, 1, 2, 3, 4)),
    ],
)
def test_a_term_compares_the_samples_that_it_names(samples: list[str], rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features = {"on": "features", "loss": "mse", "levels": ["bottleneck"], "schedule": {"kind": "constant"}}
    options = {"options": {"standardise": False}, "samples": samples}
    loss = make_loss([term(samples=samples), {**features, **options}], levels=("bottleneck",))
    outputs = [torch.randn(5, 3, size, size, requires_grad=True) for size in (8, 4, 2)]
    targets = [torch.zeros(5, 1, size, size) for size in (8, 4, 2)]
    own, other = torch.randn(5, 6, 2, 2, requires_grad=True), torch.randn(5, 6, 2, 2)
    teacher = torch.randn(5, 3, 8, 8)
    loss.supervised = Nothing()
    loss.groups = GROUPS
    loss.teacher_outputs["joint"] = TeacherOutput(teacher, {"bottleneck": other})
    total = loss((outputs, [own]), targets)
    chosen = list(rows)
    expected = 0.75 * kl(outputs[0][chosen], teacher[chosen], 2.0)
    expected = expected + 0.25 * kl(outputs[1][chosen], coarsened(teacher, 4)[chosen], 2.0)
    torch.testing.assert_close(total, expected + (own[chosen] - other[chosen]).square().mean())
    total.backward()
    for moved in (outputs[0].grad, outputs[1].grad, own.grad):
        assert moved is not None
        assert moved.flatten(1).any(1).nonzero().flatten().tolist() == chosen


class Nothing(nn.Module):
    """No supervised loss."""

    def forward(self, outputs: Any, target: Any) -> Tensor:
        del outputs, target
        return torch.zeros(())


def test_a_batch_without_the_samples_of_a_term_leaves_it_out() -> None:
    loss, outputs, targets = make_loss([term(samples=["mixed"])]), make_outputs(), make_targets()
    loss.groups = {"labeled": slice(0, 1), "unlabeled": slice(1, 2)}
    loss.teacher_outputs["joint"] = TeacherOutput(torch.randn(2, 3, 8, 8))
    assert loss(outputs, targets) == outputs[0].mean()


def test_gradient_reaches_every_level_that_has_a_weight() -> None:
    loss, outputs, targets = make_loss([term()]), make_outputs(), make_targets()
    loss.teacher_outputs["joint"] = TeacherOutput(torch.randn(2, 3, 8, 8))
    loss(outputs, targets).backward()
    assert outputs[1].grad is not None
    assert outputs[1].grad.abs().sum() > 0
    assert outputs[2].grad is None or not outputs[2].grad.any()


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 0.0), (0.05, 0.0), (0.1, 0.0), (0.15, 0.25), (0.2, 0.5), (0.3, 1.0), (0.9, 1.0)]
)
def test_schedule(progress: float, factor: float) -> None:
    loss = make_loss([term(weight=2.0, schedule={"kind": "linear", "start": 0.1, "warmup": 0.3})])
    outputs, targets, teacher = make_outputs(), make_targets(), torch.randn(2, 3, 8, 8)
    loss.progress = progress
    assert loss.terms[0].weight(progress) == pytest.approx(2 * factor)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    expected = 0.75 * kl(outputs[0], teacher, 2.0) + 0.25 * kl(outputs[1], coarsened(teacher, 4), 2.0)
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean() + 2 * factor * expected)
    assert bool(loss.logged) == (factor > 0)


def test_ignored_voxels_do_not_count() -> None:
    loss = make_loss([term(deep_supervision=False)], identity(IGNORING))
    outputs, targets, teacher = make_outputs(), make_targets(3), torch.randn(2, 3, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    valid = targets[0] != 3
    assert not valid.all()
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean() + kl(outputs[0], teacher, 2.0, valid))


def test_regions_are_compared_by_sigmoid() -> None:
    loss = make_loss([term(deep_supervision=False, temperature=1.0)], identity(REGIONS))
    output = make_outputs(2)
    labels = make_targets(3)[0]
    target = torch.cat([(labels == 1) | (labels == 2), labels == 2, labels == 3], 1)
    targets = [target, target[..., ::2, ::2], target[..., ::4, ::4]]
    teacher = torch.randn(2, 2, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    total, count = 0.0, 0
    for b, y, x in ((labels != 3)[:, 0]).nonzero().tolist():
        for region in range(2):
            p, q = teacher[b, region, y, x].sigmoid(), output[0][b, region, y, x].sigmoid()
            total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        count += 1
    torch.testing.assert_close(loss(output, targets), output[0].mean() + total / count)


def test_merged_classes_are_compared_in_the_common_space() -> None:
    teacher_space = LabelSpace.from_dataset_json({"labels": {"background": 0, "lesion": 1}})
    student_map, _ = match_label_spaces(LABELS, teacher_space, {"a": "lesion", "b": "lesion"})
    loss = make_loss([term(deep_supervision=False, temperature=1.0)], student_map)
    outputs, targets, teacher = make_outputs(), make_targets(), torch.randn(2, 2, 8, 8)
    loss.teacher_outputs["joint"] = TeacherOutput(teacher)
    merged = torch.stack([outputs[0][:, 0], outputs[0][:, 1:].logsumexp(1)], 1)
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean() + kl(merged, teacher, 1.0))


def test_feature_term_is_the_mean_over_its_levels() -> None:
    projectors = {projector_name("joint", level): Projector(2, 4, 5) for level in ("bottleneck", "decoder@1/2")}
    levels = ("bottleneck", "decoder@1/2")
    settings = {"on": "features", "levels": list(levels), "schedule": {"kind": "constant"}, "weight": 0.5}
    loss = make_loss([{**settings, "loss": "cosine"}], projectors=projectors, levels=levels)
    outputs, targets = make_outputs(), make_targets()
    student = [torch.randn(2, 4, 2, 2, requires_grad=True), torch.randn(2, 4, 4, 4, requires_grad=True)]
    teacher = {"bottleneck": torch.randn(2, 5, 2, 2), "decoder@1/2": torch.randn(2, 5, 4, 4)}
    loss.teacher_outputs["joint"] = TeacherOutput(None, teacher)
    value = loss((outputs, student), targets)
    each = []
    for level, own in zip(levels, student, strict=True):
        projected = projectors[projector_name("joint", level)].convolution(own)
        each.append((1 - torch.cosine_similarity(projected, teacher[level], dim=1)).mean())
    torch.testing.assert_close(value, outputs[0].mean() + 0.5 * torch.stack(each).mean(), rtol=1e-4, atol=1e-5)
    value.backward()
    assert student[0].grad is not None
    assert projectors[projector_name("joint", "bottleneck")].convolution.weight.grad is not None


@pytest.mark.parametrize("space", [LABELS, IGNORING, REGIONS])
def test_patches_of_nothing_but_background_can_be_left_out(space: LabelSpace) -> None:
    features, taught = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    target = torch.zeros(3, 3 if space.regions else 1, 8, 8)
    target[1, 0, 2:4, 2:4] = 1  # a foreground class; sample 0 has none
    target[2, -1] = 1 if space.regions else (3 if space.ignore else 0)  # sample 2 is not annotated, or background
    changes = {"on": "features", "loss": "mse", "levels": ["bottleneck"], "temperature": None}

    def value(samples: list[int], **more: Any) -> float:
        loss = make_loss(
            [term(**changes, options={"standardise": False}, **more)],
            identity(space),
            levels=("bottleneck",),
            level_weights=(1.0,),
        )
        loss.teacher_outputs["joint"] = TeacherOutput(features={"bottleneck": taught[samples]})
        outputs = [torch.zeros(len(samples), space.num_channels, 8, 8)]
        return float(loss((outputs, [features[samples]]), [target[samples]]))

    expected = float((features[1] - taught[1]).square().mean())
    assert value([0, 1, 2], foreground_only=True) == pytest.approx(expected, rel=1e-5)
    assert value([0], foreground_only=True) == 0
    assert value([0, 1]) == pytest.approx(float((features[:2] - taught[:2]).square().mean()), rel=1e-5)


def test_terms_of_one_kind_are_logged_apart() -> None:
    loss = make_loss([term(temperature=1.0), term(temperature=4.0)])
    loss.teacher_outputs["joint"] = TeacherOutput(torch.randn(2, 3, 8, 8))
    loss(make_outputs(), make_targets())
    assert len({built.name for built in loss.terms}) == 2
    assert len(loss.logged) == 2


def test_two_teachers_add_up() -> None:
    two = [term(teacher="x", weight=1.0), term(teacher="y", weight=2.0)]
    loss = make_loss([{**one, "deep_supervision": False} for one in two], teachers=("x", "y"))
    outputs, targets = make_outputs(), make_targets()
    first, second = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss.teacher_outputs = {"x": TeacherOutput(first), "y": TeacherOutput(second)}
    expected = outputs[0].mean() + kl(outputs[0], first, 2.0) + 2 * kl(outputs[0], second, 2.0)
    torch.testing.assert_close(loss(outputs, targets), expected)


def test_perfect_teacher_of_a_student_that_agrees_adds_nothing() -> None:
    loss, outputs, targets = make_loss([term(deep_supervision=False)]), make_outputs(), make_targets()
    loss.teacher_outputs["joint"] = TeacherOutput(outputs[0].detach().clone())
    torch.testing.assert_close(loss(outputs, targets), outputs[0].mean())


# --- targets ----------------------------------------------------------------------------------------------------------
def test_common_target_of_merged_labels() -> None:
    teacher_space = LabelSpace.from_dataset_json({"labels": {"background": 0, "lesion": 1}})
    student_map, _ = match_label_spaces(IGNORING, teacher_space, {"a": "background", "b": "lesion"})
    labels, valid = common_target(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), student_map)
    assert labels.tolist() == [[[[0, 0], [1, 0]]]]
    assert valid is not None
    assert valid.tolist() == [[[[True, True], [True, False]]]]


def test_common_target_of_labels_in_regions() -> None:
    regions = LabelSpace.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    )
    student_map, _ = match_label_spaces(LABELS, regions, {"a": "whole", "b": "core"})
    inside, valid = common_target(torch.tensor([[[[0.0, 1.0, 2.0]]]]), student_map)
    assert valid is None
    assert inside.tolist() == [[[[False, True, True]], [[False, False, True]]]]


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "named"),
    [({"loss": "hinton"}, "hinton"), ({"options": {"balanse": "class"}}, "balanse"), ({"loss": "mse"}, "mse")],
)
def test_unknown_loss_or_option_names_the_term(changes: dict[str, Any], named: str) -> None:
    settings = parse_settings({"teachers": {"joint": {}}, "terms": [term(), term(**changes)]})
    with pytest.raises(SettingsError, match=r"terms\[1\]") as error:
        build_terms(settings, {"joint": False})
    assert named in str(error.value)


def test_loss_that_cannot_do_regions_says_so() -> None:
    settings: Settings = parse_settings({"teachers": {"joint": {}}, "terms": [term(loss="dkd")]})
    with pytest.raises(SettingsError, match=r"terms\[0\].*regions"):
        build_terms(settings, {"joint": True})


# --- the guard --------------------------------------------------------------------------------------------------------
def stock_loss() -> DeepSupervisionWrapper:
    loss = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    return DeepSupervisionWrapper(loss, LEVEL_WEIGHTS)


def test_guarded_gradient_is_the_supervised_one_and_the_trusted_part_of_the_terms() -> None:
    outputs, targets = make_outputs(), make_targets()
    loss = make_loss([term(weight=3.0)], guard=Guard(margin=None, exponent=2.0))
    loss.supervised = stock_loss()
    teacher = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    loss.teacher_outputs = {"joint": TeacherOutput(teacher)}
    loss(outputs, targets).backward()
    of_supervised = torch.autograd.grad(stock_loss()(outputs, targets), outputs[:2])
    raw = loss._logit_term(loss.terms[0], outputs, targets, loss.teacher_outputs["joint"])
    of_term = torch.autograd.grad(raw, outputs[:2])
    predicted, labels = teacher.argmax(1), targets[0][:, 0]
    dice = [
        2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum()) for c in (1, 2)
    ]
    trust = 3.0 * (sum(dice) / 2) ** 2
    for output, first, second in zip(outputs, of_supervised, of_term, strict=False):
        torch.testing.assert_close(output.grad, first + trust * second)
    torch.testing.assert_close(loss.logged["joint.logits.kl"][1], trust * raw.detach())


class InSinglePrecision(nn.Module):
    """nnU-Net's loss as it is under CUDA's autocast, which computes softmax and cross entropy in float32."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = stock_loss().loss(output.float(), target)
        return loss


def test_half_precision_outputs_get_the_gradients_of_single_precision() -> None:
    """A student that is sure, on a large patch: its gradients are below what float16 can hold before it is scaled."""
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 256, 256)
    target[..., 100:120, 100:120] = 1
    sure = torch.cat([8 - 16 * target, 16 * target - 8], 1)
    scale, gradients = 2.0**16, {}
    for dtype in (torch.float32, torch.float16):
        output = sure.to(dtype, copy=True).requires_grad_()
        loss = make_loss([term()], identity(LabelSpace.from_dataset_json({"labels": {"background": 0, "a": 1}})),
                         guard=Guard(margin=None, exponent=4.0), level_weights=(1.0,))  # fmt: skip
        loss.supervised = InSinglePrecision()
        loss.teacher_outputs = {"joint": TeacherOutput(0.5 * sure)}
        (scale * loss(output, target)).backward()
        assert output.grad is not None
        gradients[dtype] = output.grad.float()
    assert gradients[torch.float32].norm() > 0
    error = (gradients[torch.float16] - gradients[torch.float32]).norm() / gradients[torch.float32].norm()
    assert error < 1e-2
