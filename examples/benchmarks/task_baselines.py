"""What a user would take instead of nnU-Net with heads: ResNet-18, RetinaNet, and components of a segmentation.

The networks for whole images see the preprocessed cases of nnU-Net, resized to the patch size of the control, drawn as
the control draws them (balanced over classes and groups), with random flips as augmentation. They train with AdamW and
a cosine from ``LEARNING_RATE`` to 0, which suits them better from random weights than nnU-Net's SGD.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from nnunet_kd.data.box_geometry import clip, to_preprocessed
from nnunet_kd.data.class_sampling import case_probabilities
from nnunet_kd.data.convert_boxes import connected_components
from nnunet_kd.data.member import Member
from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.data.task_data import TaskData
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.evaluation.prediction_files import write_box_predictions, write_classification_predictions
from nnunet_kd.inference.plain_model import build_stock_network
from nnunet_kd.inference.task_files import boxes_in_stored_image
from nnunet_kd.tasks.classification import ClassificationLoss, probabilities
from nnunet_kd.tasks.detection_plan import neighbour_overlaps, planned_nms_threshold

LEARNING_RATE, WEIGHT_DECAY, MAX_GRADIENT_NORM = 1e-3, 1e-2, 12
PYRAMID_CHANNELS = 64  # 256 would cost a CPU ten times as much
SMALLEST_BOXES = 0.05  # quantile of the boxes' size that the finest anchors are made for
ANCHOR_SCALES, ANCHOR_RATIOS = (1, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)  # of RetinaNet


class WholeImages:
    """Preprocessed cases of a dataset, resized to its patch size, with its labels and boxes.

    Args:
        member: The dataset, with the plans of the control.
        cases: To load.
    """

    def __init__(self, member: Member, cases: Sequence[str]) -> None:
        self.member = member
        self.tasks = Tasks.from_dataset_json(member.dataset_json)
        self.shape = tuple(member.configuration_manager.patch_size)
        self.dimension = len(self.shape)
        self.side = TaskData.read(member.name, self.tasks, self.dimension)
        self.transpose = member.plans_manager.transpose_forward
        self.images: dict[str, Tensor] = {}
        self.before: dict[str, tuple[dict, tuple[int, ...]]] = {}
        data = member.dataset_class(str(member.data_folder), list(cases))
        for case in cases:
            image, _, _, properties = data.load_case(case)
            array = torch.from_numpy(np.asarray(image[:], dtype=np.float32))  # [C, z, y, x], 2D images too
            self.before[case] = properties, tuple(array.shape[1:])
            array = array[:, 0] if self.dimension == 2 else array
            mode = "bilinear" if self.dimension == 2 else "trilinear"
            self.images[case] = nn.functional.interpolate(array[None], size=self.shape, mode=mode)[0]

    def sampling(self, cases: Sequence[str]) -> NDArray[np.float64]:
        """Probability of each case, as the control draws them."""
        if not self.tasks.classification:
            return np.full(len(cases), 1 / len(cases))
        target = self.tasks.classification[0]
        return case_probabilities(cases, self.side.class_labels[target.name], target.multilabel, self.side.groups)

    def boxes(self, case: str) -> tuple[Tensor, Tensor]:
        """Boxes [N, 2 * dimension] in array order in the resized image, and their labels [N]."""
        nothing = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 2 * self.dimension)))
        own = (self.side.boxes or {}).get(case, nothing)
        properties, shape = self.before[case]
        boxes = to_preprocessed(own.boxes, properties, self.transpose, shape) * self._scale(shape)
        boxes = clip(boxes, self.shape)
        kept = (boxes[:, self.dimension :] > boxes[:, : self.dimension]).all(1)
        return torch.from_numpy(boxes[kept]).float(), torch.from_numpy(own.labels[kept])

    def to_stored(self, case: str, found: PredictedBoxes) -> PredictedBoxes:
        """Boxes of the resized image in the stored image."""
        labels, boxes, scores = found
        properties, shape = self.before[case]
        return boxes_in_stored_image((labels, boxes / self._scale(shape), scores), properties, self.transpose, shape)

    def _scale(self, preprocessed_shape: Sequence[int]) -> NDArray[np.float64]:
        return np.tile(np.array(self.shape) / np.array(preprocessed_shape[-self.dimension :]), 2)


@dataclass(frozen=True)
class Budget:
    """Number of batches, cases per batch, and the seed of weights and batches."""

    steps: int
    batch_size: int
    seed: int


def fit(
    network: nn.Module,
    loss_of: Callable[[list[str], list[list[int]]], Tensor],
    cases: Sequence[str],
    sampling: NDArray[np.float64],
    dimension: int,
    budget: Budget,
) -> float:
    """Train ``network``; return the seconds.

    Args:
        network: Its parameters are trained.
        loss_of: The loss of a batch, given its cases and the axes along which each image is to be flipped.
        cases: The training cases.
        sampling: Probability of each.
        dimension: Number of axes.
        budget: Of the training.
    """
    start = time.process_time()
    random = np.random.default_rng(budget.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    network.train()
    for _ in range(budget.steps):
        batch = [cases[index] for index in random.choice(len(cases), budget.batch_size, p=sampling)]
        flips = [np.flatnonzero(random.random(dimension) < 0.5).tolist() for _ in batch]
        optimizer.zero_grad()
        loss_of(batch, flips).backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    network.eval()
    return time.process_time() - start


def run_resnet(
    images: WholeImages, split: Mapping[str, Sequence[str]], budget: Budget, folder: Path, **options: Any
) -> float:
    """Train timm's ResNet-18 (MONAI's for volumes) and write ``classification.csv``; return the training's seconds."""
    torch.manual_seed(budget.seed)
    target = images.tasks.classification[0]
    channels, num_classes = len(images.images[split["train"][0]]), len(target.classes)
    network: nn.Module
    if images.dimension == 2:
        import timm

        network = timm.create_model("resnet18", in_chans=channels, num_classes=num_classes, **options)
    else:
        from monai.networks.nets import resnet18

        network = resnet18(spatial_dims=3, n_input_channels=channels, num_classes=num_classes)
    return _run_classifier(network, images, split, budget, folder)


def run_instance_norm(images: WholeImages, split: Mapping[str, Sequence[str]], budget: Budget, folder: Path) -> float:
    """The same, in 2D, with nnU-Net's normalisation, which takes the contrast out of every image."""
    return run_resnet(images, split, budget, folder, norm_layer=partial(nn.InstanceNorm2d, affine=True))


def run_own_network(images: WholeImages, split: Mapping[str, Sequence[str]], budget: Budget, folder: Path) -> float:
    """The same for the network that the control trains, with its class head."""
    torch.manual_seed(budget.seed)
    member = images.member
    unet = build_stock_network(member.plans_manager, member.configuration, member.dataset_json)
    return _run_classifier(_ClassesOnly(unet, images.tasks.classification[0].name), images, split, budget, folder)


def use_adamw(trainer: nnUNetTrainer) -> None:
    """Let nnU-Net's trainer train with the optimizer of the networks for whole images; its schedule goes by epochs."""
    trainer.initialize()
    trainer.optimizer = torch.optim.AdamW(trainer.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trainer.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, trainer.num_epochs)


class _ClassesOnly(nn.Module):
    """Class logits of one target of a network with heads."""

    def __init__(self, network: nn.Module, target: str) -> None:
        super().__init__()
        self.network = network
        self.target = target

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image, tasks=True).classification[self.target]
        return logits


def _run_classifier(
    network: nn.Module, images: WholeImages, split: Mapping[str, Sequence[str]], budget: Budget, folder: Path
) -> float:
    target = images.tasks.classification[0]
    criterion = ClassificationLoss(multilabel=target.multilabel)
    labels = images.side.class_labels[target.name]

    def loss_of(batch: list[str], flips: list[list[int]]) -> Tensor:
        inputs = torch.stack([flipped(images.images[case], axes) for case, axes in zip(batch, flips, strict=True)])
        return criterion(network(inputs), torch.from_numpy(np.stack([labels[case] for case in batch])))

    labelled = [case for case in split["train"] if case in labels and not np.isnan(labels[case]).all()]
    seconds = fit(network, loss_of, labelled, images.sampling(labelled), images.dimension, budget)
    predictions = {}
    with torch.inference_mode():
        for case in split["val"]:
            (values,) = probabilities(network(images.images[case][None]), multilabel=target.multilabel)
            predictions[case] = {target.name: values.numpy().astype(np.float64)}
    write_classification_predictions(folder / "classification.csv", predictions, [target])
    return seconds


def run_retinanet(images: WholeImages, split: Mapping[str, Sequence[str]], budget: Budget, folder: Path) -> float:
    """Train torchvision's RetinaNet on 2D images and write ``boxes.json``; return the training's seconds."""
    torch.manual_seed(budget.seed)
    detection = images.tasks.detection
    assert detection is not None
    truth = {case: images.boxes(case) for case in split["train"]}
    network = retinanet(images.shape, list(truth.values()), len(detection.classes))

    def loss_of(batch: list[str], flips: list[list[int]]) -> Tensor:
        inputs, targets = [], []
        for case, axes in zip(batch, flips, strict=True):
            boxes, labels = truth[case]
            inputs.append(as_rgb(flipped(images.images[case], axes)))
            targets.append({"boxes": exchanged(flipped_boxes(boxes, axes, images.shape)), "labels": labels})
        return sum(network(inputs, targets).values())

    training = split["train"]
    seconds = fit(network, loss_of, training, images.sampling(training), images.dimension, budget)
    predictions = {}
    with torch.inference_mode():
        for case in split["val"]:
            (found,) = network([as_rgb(images.images[case])])
            boxes = exchanged(found["boxes"]).numpy().astype(np.float64)
            scores = found["scores"].numpy().astype(np.float64)
            predictions[case] = images.to_stored(case, (found["labels"].numpy(), boxes, scores))
    write_box_predictions(folder / "boxes.json", predictions, detection.classes)
    return seconds


def retinanet(shape: Sequence[int], truth: Sequence[tuple[Tensor, Tensor]], num_classes: int) -> nn.Module:
    """RetinaNet with five pyramid levels from stride 4 on, whose finest anchors fit the smallest boxes.

    Its anchors of 32 pixels and more at stride 8 would miss most lesions; the ratios and the doubling per level stay.
    Boxes are taken for one object above the IoU that our plans have, too.
    """
    from torchvision.models import resnet18
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    layers = {f"layer{level}": str(level - 1) for level in range(1, 5)}
    backbone = BackboneWithFPN(
        resnet18(weights=None), layers, [64, 128, 256, 512], PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool()
    )
    sizes = torch.cat([(own[:, 2:] - own[:, :2]).prod(1).sqrt() for own, _ in truth]).numpy()
    overlaps = [neighbour_overlaps(own.numpy(), labels.numpy()) for own, labels in truth]
    finest = max(4.0, float(np.quantile(sizes, SMALLEST_BOXES)))
    anchors = AnchorGenerator(
        tuple(tuple(finest * 2**level * scale for scale in ANCHOR_SCALES) for level in range(5)), (ANCHOR_RATIOS,) * 5
    )
    return RetinaNet(
        backbone,
        num_classes,
        min_size=min(shape),
        max_size=max(shape),
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=anchors,
        score_thresh=0.001,  # average precision and FROC choose their thresholds themselves
        nms_thresh=planned_nms_threshold(np.concatenate(overlaps)),
        detections_per_img=100,
    )


def write_component_boxes(folder: Path, dataset_json: dict) -> None:
    """Write ``boxes.json`` from the probabilities that nnU-Net's validation left in ``folder``.

    A box is the extent of a connected component of its class; its score is the component's mean probability.
    """
    detection = Tasks.from_dataset_json(dataset_json).detection
    assert detection is not None
    predictions = {}
    for file in sorted(folder.glob("*.npz")):
        probability = np.load(file)["probabilities"]
        chosen = probability.argmax(0)
        labels, boxes, scores = [], [], []
        for index, name in enumerate(detection.classes):
            value = dataset_json["labels"][name]
            numbered = connected_components(chosen == value)
            for number, extent in enumerate(ndimage.find_objects(numbered), start=1):
                labels.append(index)
                boxes.append([axis.start for axis in extent] + [axis.stop for axis in extent])
                scores.append(probability[value][numbered == number].mean())
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 2 * chosen.ndim)
        predictions[file.stem] = (np.array(labels, dtype=np.int64), corners, np.array(scores, dtype=np.float64))
        file.unlink()
    write_box_predictions(folder / "boxes.json", predictions, detection.classes)


def flipped(image: Tensor, axes: Sequence[int]) -> Tensor:
    """``image`` [C, *S] flipped along spatial axes."""
    return image.flip([axis + 1 for axis in axes])


def flipped_boxes(boxes: Tensor, axes: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``boxes`` [N, 2 * dimension] in array order after the image of this shape was flipped along ``axes``."""
    result = boxes.clone()
    dimension = len(shape)
    for axis in axes:
        result[:, axis] = shape[axis] - boxes[:, axis + dimension]
        result[:, axis + dimension] = shape[axis] - boxes[:, axis]
    return result


def exchanged(boxes: Tensor) -> Tensor:
    """2D boxes [N, 4] with y and x exchanged: torchvision's order from the array's, and back."""
    return boxes[:, [1, 0, 3, 2]]


def as_rgb(image: Tensor) -> Tensor:
    """``image`` [1, *S] with the three channels that torchvision's networks have."""
    return image.expand(3, *image.shape[1:])
