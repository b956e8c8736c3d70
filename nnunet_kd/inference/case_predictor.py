"""Stock nnU-Net's sliding window that also collects classes and boxes, in the same pass over the tiles.

Host behaviour relied on (nnunetv2 2.8):

* ``predict_logits_from_preprocessed_data`` calls ``predict_sliding_window_return_logits`` once for each fold, with that
  fold's weights in ``self.network``. That pads the image (half below, the odd voxel above) and calls
  ``_internal_predict_sliding_window_return_logits``, a second time from the start if the device's memory was too small.
* That one calls ``_internal_maybe_mirror_and_predict`` once for each tile in the order of its ``slicers``, and
  allocates as many channels as ``self.label_manager.num_segmentation_heads``.
* ``_internal_maybe_mirror_and_predict`` calls ``self.network`` once for each view: unmirrored first, then all
  combinations of one axis, of two, of three, as ``itertools.combinations`` orders them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray
from torch import Tensor

from nnunet_kd.data.tasks import ClassificationTarget, Tasks
from nnunet_kd.environment import replaced
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.inference.case_collector import BoxMerging, FoldCollector, FoldFindings, case_boxes, case_probabilities
from nnunet_kd.networks.multitask import planned_heads, unwrapped
from nnunet_kd.tasks.detection import DetectionTask
from nnunet_kd.tasks.detection_plan import DetectionPlan


class CasePrediction(NamedTuple):
    """All that is said of one case."""

    segmentation: Tensor | None
    """Logits [heads, *S] on the CPU, as nnU-Net exports them; None where it is not predicted."""
    probabilities: dict[str, NDArray[np.float32]]
    """Target name to [classes]; empty without classification."""
    boxes: PredictedBoxes | None
    """Labels [N], boxes [N, 2 * dim] in the preprocessed array, scores [N] by falling score; None without detection."""


class CasePredictor(nnUNetPredictor):
    """Predicts all tasks of a network that gives ``TaskOutputs`` when it is called with ``tasks=True``.

    It is the stock predictor until :meth:`choose_tasks` is called, after either of nnU-Net's initialisations.
    Segmentations are stock nnU-Net's, bit for bit. Where no segmentation is predicted, the network is called with
    ``segmentation=False`` and no logits are collected.

    Args:
        *args: As in the stock predictor.
        box_merging: How boxes of tiles, views and folds become one: weighted clustering, whose scores are comparable
            between ensembles of different size, or suppression.
        **kwargs: As in the stock predictor.
    """

    def __init__(self, *args: Any, box_merging: BoxMerging = "cluster", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.box_merging = box_merging
        self.segments = True
        self.targets: tuple[ClassificationTarget, ...] = ()
        self.detection: DetectionTask | None = None
        self._preprocessed_shape: tuple[int, ...] = ()
        self._folds: list[FoldFindings] = []

    # ---- choice of tasks --------------------------------------------------------------------------------------------

    def choose_tasks(self, wanted: Collection[str] | None = None) -> None:
        """Predict these tasks; None means all that the plans have heads for and the dataset declares.

        Raises:
            NnUNetKDError: The model does not predict one of them, or its plans and dataset.json contradict each other.
        """
        tasks = Tasks.from_dataset_json(self.dataset_json)
        classification, plan = planned_heads(self.configuration_manager.configuration["architecture"]) or (None, None)
        targets = planned_targets(classification, tasks)
        available = {"segmentation": tasks.segmentation, "classification": bool(targets), "detection": plan is not None}
        known = [name for name, is_there in available.items() if is_there]
        missing = sorted(set(known if wanted is None else wanted) - set(known))
        if missing:
            raise NnUNetKDError(f"This model does not predict {', '.join(missing)}, only {', '.join(known)}.")
        chosen = known if wanted is None else wanted
        self.segments = "segmentation" in chosen
        self.targets = targets if "classification" in chosen else ()
        self.detection = DetectionTask(DetectionPlan.from_dict(plan)) if plan and "detection" in chosen else None

    @property
    def task_heads(self) -> Any:
        """The object with the heads ``classification`` and ``detection`` that speak for this dataset."""
        return unwrapped(self.network).speaking_heads

    @property
    def _is_stock(self) -> bool:
        return not self.targets and self.detection is None

    # ---- one case ---------------------------------------------------------------------------------------------------

    def predict_case(self, data: Tensor) -> CasePrediction:
        """Predict a preprocessed case with all folds, or with the network as it is where no weights were given.

        Args:
            data: [C, *S], a 2D image [C, 1, H, W].

        Raises:
            NotImplementedError: Boxes of a volume with a 2D network.
        """
        logits = self.predict_logits_from_preprocessed_data(data)
        return CasePrediction(logits if self.segments else None, *self._take_findings())

    @torch.inference_mode()
    def _take_findings(self) -> tuple[dict[str, NDArray[np.float32]], PredictedBoxes | None]:
        """Probabilities and boxes of the case whose logits were predicted last."""
        folds, self._folds = self._folds, []
        boxes = None if self.detection is None else case_boxes(folds, self.detection, self.box_merging)
        return case_probabilities(folds, self.targets), boxes

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Stock logits [heads, *S] (no heads where no segmentation is predicted); the rest is kept."""
        if self.detection is not None and self.detection.plan.dimension == 2 and data.shape[1] > 1:
            raise NotImplementedError(
                f"Detection with a 2d configuration finds boxes in 2D images only, and this one has {data.shape[1]} "
                f"slices. Train and predict with a 3d configuration, or leave detection out with --tasks."
            )
        self._preprocessed_shape = tuple(data.shape[1:])
        self._folds = []
        if self.list_of_parameters is None:
            return self.predict_sliding_window_return_logits(data).to("cpu")
        return super().predict_logits_from_preprocessed_data(data)

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Stock logits of one fold; what its tiles add up to is kept."""
        logits = super().predict_sliding_window_return_logits(input_image)
        if not self._is_stock:
            self._folds.append(self._collector.finish())  # here, because autocast ends with the stock method
        return logits

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple[Any, ...]], do_on_device: bool = True
    ) -> Tensor:
        """Stock pass over the tiles; begins to collect, also where stock nnU-Net begins again."""
        if self._is_stock:
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        dimension = len(self.configuration_manager.patch_size)
        image_shape = self._preprocessed_shape[-dimension:]
        padding = [(size - own) // 2 for size, own in zip(data.shape[-dimension:], image_shape, strict=True)]
        self._collector = FoldCollector(
            self.task_heads.classification if self.targets else None, self.detection, image_shape
        )
        self._tiles = iter(
            [first.start - pad for first, pad in zip(slicer[-dimension:], padding, strict=True)] for slicer in slicers
        )
        no_heads = SimpleNamespace(num_segmentation_heads=0)
        with replaced(self, label_manager=self.label_manager if self.segments else no_heads):
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        """Stock mean over mirrored views; each view's classes and boxes are collected."""
        if self._is_stock:
            return super()._internal_maybe_mirror_and_predict(x)
        network: Any = self.network
        lower = next(self._tiles)
        views = iter(self._mirrored_axes())

        def collecting(image: Tensor) -> Tensor:
            if self.segments:
                outputs = network(image, tasks=True)
                logits: Tensor = outputs.segmentation[0]
            else:
                outputs = network(image, tasks=True, segmentation=False)
                logits = image.new_empty((len(image), 0, *image.shape[2:]))
            self._collector.add(outputs, lower, image.shape[2:], next(views))
            return logits

        with replaced(self, network=collecting):
            return super()._internal_maybe_mirror_and_predict(x)

    def _mirrored_axes(self) -> list[tuple[int, ...]]:
        """Flipped spatial axes of each view, in the order of the stock method."""
        axes = (self.allowed_mirroring_axes if self.use_mirroring else None) or ()
        return [chosen for number in range(len(axes) + 1) for chosen in itertools.combinations(axes, number)]


def planned_targets(head: dict[str, Any] | None, tasks: Tasks) -> tuple[ClassificationTarget, ...]:
    """The targets of a planned classification head, in the order of its outputs, as the dataset declares them.

    Raises:
        NnUNetKDError: The dataset does not declare one of them so.
    """
    declared = {target.name: target for target in tasks.classification}
    planned = {} if head is None else dict(head["targets"])
    for name, num_classes in planned.items():
        if name not in declared or len(declared[name].classes) != num_classes:
            raise NnUNetKDError(
                f"The plans have a classification head for '{name}' with {num_classes} classes, which the model's "
                f"dataset.json does not declare so. Put back the dataset.json of the training."
            )
    return tuple(declared[name] for name in planned)
