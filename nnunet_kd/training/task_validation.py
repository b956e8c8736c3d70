"""The final validation of classification and detection: whole cases, predicted as nnUNetKD_predict does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import distributed

from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.evaluation.prediction_files import write_box_predictions, write_classification_predictions
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.evaluation.tasks import evaluate_tasks
from nnunet_kd.files import write_json
from nnunet_kd.inference.task_files import boxes_in_stored_image
from nnunet_kd.inference.task_predictor import TaskPredictor
from nnunet_kd.settings import BLOCK
from nnunet_kd.training.member_view import MemberView


def validate_tasks(
    trainer: Any, wanted: Sequence[str], cases: Sequence[str], folder: Path, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Predict ``cases`` and write ``classification.csv``, ``boxes.json`` and all metrics into summary.json.

    Those of the segmentations, which stock nnU-Net has written, are added; but not where a shared head has merged
    labels, since they take each label for itself.

    Args:
        trainer: Its network, plans and preprocessed dataset are used.
        wanted: "classification", "detection" or both.
        cases: Validation cases.
        folder: The fold's validation folder.
        notes: To put before those of the metrics.

    Returns:
        The metrics as they are in summary.json.
    """
    predictor = TaskPredictor(
        use_mirroring=True, perform_everything_on_device=True, device=trainer.device, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        trainer.__class__.__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    predictor.choose_tasks(wanted)
    own = list(cases)[trainer.local_rank :: distributed.get_world_size()] if trainer.is_ddp else list(cases)
    previous = trainer.folder_with_segs_from_previous_stage
    data = trainer.dataset_class(
        trainer.preprocessed_dataset_folder, own, folder_with_segs_from_previous_stage=previous
    )
    probabilities, boxes = {}, {}
    for case in own:
        if not trainer.tasks.segmentation:  # else stock nnU-Net has said so, and its times are those of a case
            trainer.print_to_log_file(f"predicting {case}")
        image, _, before, properties = data.load_case(case)
        array = np.array(image[:])
        if trainer.is_cascaded:
            labels = trainer.label_manager.foreground_labels
            array = np.vstack((array, convert_labelmap_to_one_hot(before[:], labels, output_dtype=array.dtype)))
        prediction = predictor.predict_case(torch.from_numpy(array))
        probabilities[case] = prediction.probabilities
        if prediction.boxes is not None:
            boxes[case] = _in_stored_image(prediction.boxes, properties, trainer, image.shape[1:])
    if not trainer.tasks.segmentation:
        trainer.print_to_log_file("Validation complete")
    if trainer.is_ddp:
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, (probabilities, boxes))
        for other_probabilities, other_boxes in gathered:
            probabilities.update(other_probabilities)
            boxes.update(other_boxes)
    if trainer.local_rank != 0:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    if predictor.targets:
        write_classification_predictions(folder / "classification.csv", probabilities, predictor.targets)
    if predictor.detection is not None:
        write_box_predictions(folder / "boxes.json", boxes, predictor.detection.plan.classes)
    reference = ReferenceDataset.open(trainer.preprocessed_dataset_folder_base)
    evaluated = [*wanted]
    if trainer.tasks.segmentation and not isinstance(trainer.network, MemberView):
        evaluated.insert(0, "segmentation")
    metrics = evaluate_tasks(reference, folder, tasks=evaluated, cases=list(cases), show_progress=False).to_json()
    metrics["notes"] = [*notes, *metrics.get("notes", [])]
    summary = folder / "summary.json"
    content = json.loads(summary.read_text()) if trainer.tasks.segmentation and summary.is_file() else {}
    write_json(summary, {**content, BLOCK: {**content.get(BLOCK, {}), **metrics}})
    return metrics


def _in_stored_image(boxes: PredictedBoxes, properties: Any, trainer: Any, shape: Sequence[int]) -> PredictedBoxes:
    return boxes_in_stored_image(boxes, properties, trainer.plans_manager.transpose_forward, shape)
