"""Terms on classification and boxes through the student's loss, against numbers worked out case by case."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.imitation import ImitationLoss
from nnunet_kd.networks.adapters import Projector
from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.settings import Guard, TaskSettings, parse_settings
from nnunet_kd.tasks.classification import ClassificationLoss, Pooled
from nnunet_kd.tasks.detection import BoxMaps, DetectionPlan, DetectionTask
from nnunet_kd.teachers.output import Taught, TeacherOutput, task_names
from nnunet_kd.training.distillation import POOLED, DistillationLoss, build_terms, projector_name
from nnunet_kd.training.guard import DetectionCompetence
from nnunet_kd.training.task_loss import TaskLoss
from nnunet_kd.training.task_terms import box_regression_term

PLAN = DetectionPlan(strides=((4, 4), (8, 8)), anchors=(((6.0, 6.0),), ((10.0, 10.0),)), classes=("a", "b"))
NAN = float("nan")
LABELS = {"grade": torch.tensor([[0.0, 1.0, 0.0], [NAN, NAN, NAN]]), "findings": torch.tensor([[1.0, NAN], [0.0, 1.0]])}
TASKS = Tasks.from_dataset_json(
    {
        "nnunet_kd": {
            "tasks": {
                "segmentation": False,
                "classification": [{"column": "grade", "classes": ["I", "II", "III"]}, {"columns": ["dark", "bright"]}],
                "detection": {"classes": ["a", "b"]},
            }
        }
    }
)
BOXES = [torch.tensor([[2.0, 2.0, 9.0, 9.0], [5.0, 1.0, 15.0, 12.0]]), torch.zeros(0, 4)]
CONSTANT = {"kind": "constant"}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_logits(seed: int) -> dict[str, Tensor]:
    return {"grade": random(seed, 2, 3).requires_grad_(), "findings": random(seed + 1, 2, 2).requires_grad_()}


def box_maps(seed: int) -> BoxMaps:
    """Two images of 16 x 16: 16 anchors of stride 4 and 4 of stride 8."""
    logits = tuple(random(seed + i, 2, 2, s, s).requires_grad_() for i, s in enumerate((4, 2)))
    codes = tuple((0.3 * random(seed + 2 + i, 2, 4, s, s)).requires_grad_() for i, s in enumerate((4, 2)))
    return BoxMaps(logits, codes)


def student_outputs() -> TaskOutputs:
    pooled = Pooled((random(5, 2, 3).requires_grad_(), random(6, 2, 4).requires_grad_()), (random(7, 2), random(8, 2)))
    features = [random(9, 2, 4, 4, 4).requires_grad_()]
    return TaskOutputs([], features, pooled, class_logits(10), box_maps(20))


def teacher_output() -> TeacherOutput:
    classification = {name: logits.detach() for name, logits in class_logits(30).items()}
    maps = BoxMaps(*(tuple(level.detach() for level in part) for part in box_maps(40)))
    return TeacherOutput(None, {"decoder@1/4": random(50, 2, 5, 4, 4)}, classification, random(51, 2, 6), maps)


def make_loss(term: dict[str, Any], guard: Guard | None = None, taught: Taught | None = None) -> DistillationLoss:
    classification = {target.name: ClassificationLoss(multilabel=target.multilabel) for target in TASKS.classification}
    supervised = TaskLoss(None, classification, DetectionTask(PLAN), TaskSettings())
    batch = {
        "class_labels": LABELS,
        "boxes": BOXES,
        "box_labels": [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.long)],
    }
    supervised.set_batch(batch, torch.device("cpu"))
    settings = parse_settings({"teachers": {"joint": {}}, "terms": [{"schedule": CONSTANT, **term}]})
    projectors = {
        projector_name("joint", POOLED): Projector(2, 7, 6),
        projector_name("joint", "decoder@1/4"): Projector(2, 4, 5),
    }
    taught = Taught(task_names(TASKS)) if taught is None else taught
    levels = ("decoder@1/4",)
    terms = build_terms(settings, {}, TASKS.classification)
    return DistillationLoss(supervised, (1.0,), terms, {"joint": taught}, projectors, levels, guard or Guard())


def raw_value(loss: DistillationLoss, student: TaskOutputs, teacher: TeacherOutput) -> Tensor:
    """The term, as what it adds to the supervised loss and as it is logged."""
    target = torch.zeros(2, 1, 16, 16)
    torch.manual_seed(0)  # the supervised loss draws negatives
    alone = loss(student, target)
    loss.teacher_outputs = {"joint": teacher}
    torch.manual_seed(0)
    total = loss(student, target)
    raw, weighted = loss.logged[loss.terms[0].name]
    torch.testing.assert_close(total - alone, weighted, rtol=1e-4, atol=1e-5)
    total.backward()
    return raw


def distribution(logits: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


def divergence(teacher: list[float], student: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


def bernoulli(logit: Tensor, temperature: float) -> list[float]:
    return distribution(torch.tensor([logit.item(), 0.0]), temperature)


# --- classification ---------------------------------------------------------------------------------------------------
def test_kl_is_the_mean_over_targets_by_softmax_or_sigmoid() -> None:
    student, teacher, t = student_outputs(), teacher_output(), 2.0
    assert student.classification is not None
    own, other = student.classification, teacher.classification
    grade = sum(divergence(distribution(other["grade"][b], t), distribution(own["grade"][b], t)) for b in (0, 1)) / 2
    findings = (
        sum(
            divergence(bernoulli(other["findings"][b, c], t), bernoulli(own["findings"][b, c], t))
            for b in (0, 1)
            for c in (0, 1)
        )
        / 2
    )
    loss = make_loss({"on": "classification", "loss": "kl", "temperature": t})
    assert float(raw_value(loss, student, teacher)) == pytest.approx(t**2 * (grade + findings) / 2, rel=1e-5)


def test_agreement_is_with_the_label_or_else_with_the_teachers_decision() -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.classification is not None
    expected = []
    for name, own in student.classification.items():
        other, cases = teacher.classification[name], []
        for b in (0, 1):
            if name == "grade":
                known = bool(LABELS[name][b].isfinite().all())
                label = int(LABELS[name][b].argmax()) if known else int(other[b].argmax())
                p = distribution(other[b], 1.0)
                cases.append(p[label] * divergence(p, distribution(own[b], 1.0)))
            else:
                value = 0.0
                for c in (0, 1):
                    label = LABELS[name][b, c]
                    present = bool(label) if label.isfinite() else bool(other[b, c] > 0)
                    p = bernoulli(other[b, c], 1.0)
                    value += (p[0] if present else p[1]) * divergence(p, bernoulli(own[b, c], 1.0))
                cases.append(value)
        expected.append(sum(cases) / 2)
    term = {"on": "classification", "loss": "kl", "temperature": 1.0, "options": {"agreement": True}}
    assert float(raw_value(make_loss(term), student, teacher)) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_dkd_cannot_do_several_classes_at_once() -> None:
    with pytest.raises(SettingsError, match=r"terms\[0\].*'findings'.*dkd"):
        make_loss({"on": "classification", "loss": "dkd"})


def test_cosine_compares_projected_pooled_features() -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.pooled is not None
    assert teacher.pooled is not None
    loss = make_loss({"on": "classification", "loss": "cosine"})
    projector = loss._projectors[projector_name("joint", POOLED)]
    joined = torch.cat(student.pooled.values, 1)
    own = joined @ projector.convolution.weight[:, :, 0, 0].T + projector.convolution.bias
    expected = 1 - torch.cosine_similarity(own, teacher.pooled).mean()
    torch.testing.assert_close(raw_value(loss, student, teacher), expected.detach())
    assert student.pooled.values[0].grad is not None
    assert projector.convolution.weight.grad is not None


# --- boxes ------------------------------------------------------------------------------------------------------------
def by_anchor(maps: BoxMaps) -> list[tuple[int, list[float], Tensor, Tensor]]:
    """(image, centre and size of the anchor, class logits, codes), position by position."""
    found = []
    for image in (0, 1):
        for level, (stride, size) in enumerate(((4, 6.0), (8, 10.0))):
            logits, codes = maps.class_logits[level].detach(), maps.box_regression[level].detach()
            for y in range(logits.shape[2]):
                for x in range(logits.shape[3]):
                    anchor = [(y + 0.5) * stride, (x + 0.5) * stride, size]
                    found.append((image, anchor, logits[image, :, y, x], codes[image, :, y, x]))
    return found


def decoded(anchor: list[float], codes: Tensor) -> list[float]:
    """Corners from codes: shift of the centre in sizes, logarithm of the sizes."""
    centre = [anchor[axis] + float(codes[axis]) * anchor[2] for axis in (0, 1)]
    half = [math.exp(float(codes[2 + axis])) * anchor[2] / 2 for axis in (0, 1)]
    return [c - h for c, h in zip(centre, half, strict=True)] + [c + h for c, h in zip(centre, half, strict=True)]


def giou(a: list[float], b: list[float]) -> float:
    def area(box: list[float]) -> float:
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    inner = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - inner
    return inner / union - (hull - union) / hull


def test_box_classes_are_compared_at_every_anchor() -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.detection is not None
    assert teacher.boxes is not None
    total = weights = 0.0
    for own, other in zip(by_anchor(student.detection), by_anchor(teacher.boxes), strict=True):
        p, q = [[float(logit.sigmoid()) for logit in side[2]] for side in (other, own)]
        weight = max(*p, *q) ** 2
        total += weight * sum(divergence([a, 1 - a], [b, 1 - b]) for a, b in zip(p, q, strict=True))
        weights += weight
    value = raw_value(make_loss({"on": "boxes", "loss": "kl"}), student, teacher)
    assert float(value) == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_boxes_are_compared_where_the_teacher_is_sure(threshold: float) -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.detection is not None
    assert teacher.boxes is not None
    total = weights = 0.0
    for own, other in zip(by_anchor(student.detection), by_anchor(teacher.boxes), strict=True):
        score = float(other[2].sigmoid().max())
        if score > threshold:
            total += score * (1 - giou(decoded(own[1], own[3]), decoded(other[1], other[3])))
            weights += score
    loss = make_loss({"on": "boxes", "loss": "giou", "options": {"threshold": threshold}})
    expected = total / weights if weights else 0.0
    assert (expected == 0) == (threshold == 1)
    assert float(raw_value(loss, student, teacher)) == pytest.approx(expected, rel=1e-4)
    assert student.detection.box_regression[0].grad is not None


def test_an_overflow_of_the_student_is_seen_and_one_of_the_teacher_is_left_out() -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.detection is not None
    assert teacher.boxes is not None
    term = {"on": "boxes", "loss": "giou", "options": {"threshold": 0.0}}
    built = make_loss(term)
    finite = float(raw_value(built, student, teacher))
    with torch.no_grad():
        teacher.boxes.box_regression[0][0, 0, 0, 0] = torch.inf
    left_out = float(raw_value(make_loss(term), student, teacher))
    assert np.isfinite(left_out)
    assert left_out != finite
    with torch.no_grad():
        student.detection.box_regression[0][0, 0, -1, -1] = torch.nan
    task = DetectionTask(PLAN)
    maps = (task.flatten(own) for own in (student.detection, teacher.boxes))
    value = box_regression_term(built.terms[0].loss, task.coder, task.anchors(student.detection), *maps)
    assert np.isnan(float(value))


def test_imitation_sees_the_boxes_of_the_batch() -> None:
    student, teacher = student_outputs(), teacher_output()
    loss = make_loss({"on": "boxes", "loss": "imitation", "levels": ["decoder@1/4"]})
    convolution = loss._projectors[projector_name("joint", "decoder@1/4")].convolution
    own = torch.einsum("oc,bcyx->boyx", convolution.weight[:, :, 0, 0], student.features[0])
    own = own + convolution.bias[:, None, None]
    expected = ImitationLoss()(own, teacher.features["decoder@1/4"], BOXES, (16, 16)).detach()
    torch.testing.assert_close(raw_value(loss, student, teacher), expected)
    assert student.features[0].grad is not None


# --- without a segmentation -------------------------------------------------------------------------------------------
def test_features_need_no_labels() -> None:
    student, teacher = student_outputs(), teacher_output()
    term = {"on": "features", "loss": "mse", "levels": ["decoder@1/4"], "options": {"standardise": False}}
    loss = make_loss(term)
    projected = loss._projectors[projector_name("joint", "decoder@1/4")].convolution(student.features[0])
    expected = (projected - teacher.features["decoder@1/4"]).square().mean().detach()
    torch.testing.assert_close(raw_value(loss, student, teacher), expected)


# --- the guard --------------------------------------------------------------------------------------------------------
def test_every_term_is_judged_by_its_task() -> None:
    student, teacher = student_outputs(), teacher_output()
    guard = Guard(margin=None, exponent=2.0)
    for term, task in (
        ({"on": "classification", "loss": "kl"}, "classification"),
        ({"on": "boxes", "loss": "kl"}, "detection"),
        ({"on": "features", "loss": "mse", "levels": ["decoder@1/4"]}, "classification"),
    ):
        loss = make_loss(term, guard)
        loss.supervised.class_labels = {"grade": torch.eye(3)[:2], "findings": torch.eye(2)}
        assert loss.asked() == {"joint": {task}}
        raw = raw_value(loss, student, teacher)
        (competence,) = loss.competence["joint"].values()
        score = competence.scores()[1]
        assert 0 < float(score) < 1
        torch.testing.assert_close(loss.logged[loss.terms[0].name][1], raw * score**0.5)  # exponent 2, a quarter of it


def test_detection_is_judged_at_the_anchors_that_the_supervised_loss_matched() -> None:
    student, teacher = student_outputs(), teacher_output()
    assert student.detection is not None
    assert teacher.boxes is not None
    loss = make_loss({"on": "boxes", "loss": "kl"}, Guard(margin=0.1))
    raw_value(loss, student, teacher)
    task = DetectionTask(PLAN)
    matches = task.matches(student.detection, loss.supervised.boxes)
    expected = DetectionCompetence()
    logits = (task.flatten(maps)[0] for maps in (student.detection, teacher.boxes))
    supervised = loss.supervised
    expected.update(*logits, task.anchors(student.detection), matches, supervised.boxes, supervised.box_labels)
    found = loss.competence["joint"]["detection"].scores()
    assert 0 < float(found[1]) < 1
    assert [float(score) for score in found] == [float(score) for score in expected.scores()]


def test_teacher_without_a_common_task_is_not_judged() -> None:
    student, teacher = student_outputs(), TeacherOutput(None, {"decoder@1/4": random(50, 2, 5, 4, 4)})
    term = {"on": "features", "loss": "mse", "levels": ["decoder@1/4"], "weight": 3.0}
    loss = make_loss(term, Guard(margin=0.1, exponent=4.0), Taught())
    assert loss.asked() == {"joint": set()}
    raw = raw_value(loss, student, teacher)
    torch.testing.assert_close(loss.logged["joint.features.mse"][1], 3 * raw)


def test_what_is_asked_follows_the_schedules() -> None:
    late = {"kind": "linear", "start": 0.5, "warmup": 0.6}
    loss = make_loss({"on": "boxes", "loss": "kl", "schedule": late})
    assert loss.asked(0.2) == {}
    assert loss.asked(0.7) == loss.asked() == {"joint": {"detection"}}


def test_features_of_a_term_without_weight_yet_get_a_gradient_of_zeros() -> None:
    """DDP waits for the gradient of every parameter, also of a decoder that only a term on features uses."""
    student = student_outputs()
    loss = make_loss({"on": "features", "loss": "mse", "levels": ["decoder@1/4"]})
    loss(student, [torch.zeros(2, 1, 16, 16)]).backward()
    assert student.features[0].grad is not None
    assert not student.features[0].grad.any()
