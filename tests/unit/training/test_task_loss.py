"""The sum of the tasks' losses against the losses alone, and what happens where labels are missing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.settings import TaskSettings
from nnunet_kd.tasks.classification import ClassificationLoss
from nnunet_kd.tasks.detection import BoxMaps, DetectionPlan, DetectionTask
from nnunet_kd.training.task_loss import TaskLoss

PLAN = DetectionPlan(strides=((4, 4),), anchors=(((6.0, 6.0),),), classes=("lesion",))


def outputs(segmentation: bool = True) -> TaskOutputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    maps = BoxMaps((random(2, 1, 4, 4),), (random(2, 4, 4, 4),))
    return TaskOutputs([random(2, 2, 16, 16)] if segmentation else [], [], None, {"grade": random(2, 3)}, maps)


def batch(labels: Tensor) -> dict[str, object]:
    return {
        "class_labels": {"grade": labels},
        "boxes": [torch.tensor([[2.0, 2.0, 9.0, 9.0]]), torch.zeros(0, 4)],
        "box_labels": [torch.tensor([0]), torch.zeros(0, dtype=torch.long)],
    }


def make_loss(weights: TaskSettings, segmentation: nn.Module | None) -> tuple[TaskLoss, ClassificationLoss]:
    classification = ClassificationLoss(multilabel=False)
    return TaskLoss(segmentation, {"grade": classification}, DetectionTask(PLAN), weights), classification


def test_tasks_are_weighed_and_added() -> None:
    weights = TaskSettings(segmentation=0.5, classification=2.0, detection=3.0)
    segmentation = nn.CrossEntropyLoss()
    loss, classification = make_loss(weights, segmentation)
    labels = torch.eye(3)[:2]
    target = torch.zeros(2, 16, 16, dtype=torch.long)
    output = outputs()
    loss.set_batch(batch(labels), torch.device("cpu"))
    torch.manual_seed(3)  # the sampler draws negatives
    total = loss(output, target)
    torch.manual_seed(3)
    content = batch(labels)
    assert output.detection is not None
    assert output.classification is not None
    boxes = DetectionTask(PLAN).loss(output.detection, content["boxes"], content["box_labels"])
    expected = 0.5 * segmentation(output.segmentation[0], target)
    expected = expected + 2 * classification(output.classification["grade"], labels)
    expected = expected + 3 * (boxes["classification"] + boxes["box_regression"])
    torch.testing.assert_close(total, expected)


def test_segmentation_alone_has_its_own_loss() -> None:
    segmentation = nn.CrossEntropyLoss()
    loss, _ = make_loss(TaskSettings(segmentation=0.5), segmentation)
    logits, target = torch.randn(2, 2, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    assert loss(logits, target) == segmentation(logits, target)


def test_batch_without_labels_and_boxes_gives_finite_gradients() -> None:
    loss, _ = make_loss(TaskSettings(), None)
    content = batch(torch.full((2, 3), float("nan")))
    content["boxes"], content["box_labels"] = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    loss.set_batch(content, torch.device("cpu"))
    output = outputs(segmentation=False)
    loss(output, None).backward()
    assert output.classification is not None
    assert output.detection is not None
    assert (output.classification["grade"].grad == 0).all()
    assert (output.detection.box_regression[0].grad == 0).all()
    assert output.detection.class_logits[0].grad is not None
    assert output.detection.class_logits[0].grad.isfinite().all()
