"""What came out of a demo: the table of all tasks and methods, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.demo.curves import read_curve
from nnunet_kd.demo.figure import MAX_PREDICTED_BOXES, REFERENCE, Array, Row, draw
from nnunet_kd.demo.findings import Findings, read_findings
from nnunet_kd.demo.pipeline import STUDENT, TEACHER, DemoDataset
from nnunet_kd.demo.scores import as_text, evaluate_segmentations, score_table
from nnunet_kd.evaluation.classification import THRESHOLD
from nnunet_kd.evaluation.folder import foreground_classes


def report(datasets: Sequence[DemoDataset], output: Path) -> str:
    """Evaluate all predictions and write ``cases.csv``, ``table.md``, ``table.csv`` and ``figure.png`` into ``output``.

    Returns:
        The table as Markdown.

    Raises:
        NnUNetKDError: A prediction is missing.
    """
    rows = evaluate_segmentations(datasets)
    rows.to_csv(output / "cases.csv", index=False)
    findings = {dataset.name: read_findings(dataset) for dataset in datasets}
    table = score_table(datasets, rows, findings)
    table.to_csv(output / "table.csv", index=False)
    text = as_text(table)
    (output / "table.md").write_text(f"{text}\n")
    figure_rows = [
        _figure_row(dataset, rows[rows["dataset"] == dataset.name], findings[dataset.name]) for dataset in datasets
    ]
    draw(figure_rows, output / "figure.png")
    return text


def typical_case(rows: pd.DataFrame, cases: Sequence[str]) -> str:
    """The case in the middle when ``cases`` are sorted by the student's Dice, so that nobody picked it."""
    student = rows[(rows["method"] == STUDENT) & rows["case"].isin(cases)]
    per_case = student.groupby("case")["dice"].mean().dropna().sort_values(kind="stable")
    return str(per_case.index[len(per_case) // 2]) if len(per_case) else cases[len(cases) // 2]


def class_text(target: ClassificationTarget, values: NDArray[Any]) -> str:
    """The likeliest class with its probability, or of several findings those from 0.5 on; empty without a label.

    Args:
        target: What is classified.
        values: [classes], probabilities, or 0 and 1 of the truth, which get no number.
    """
    if np.isnan(values).any():
        return ""
    chosen = np.flatnonzero(values >= THRESHOLD) if target.multilabel else [int(values.argmax())]
    texts = [target.classes[i] if values[i] == 1 else f"{target.classes[i]} {values[i]:.2f}" for i in chosen]
    return ", ".join(texts) or "no finding"


def _figure_row(dataset: DemoDataset, rows: pd.DataFrame, findings: Findings) -> Row:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    with_boxes = [case for case, own in findings.boxes.items() if len(own.boxes)]
    case = typical_case(rows, with_boxes or findings.cases)
    dataset_json = dataset.dataset_json
    file_ending = dataset_json["file_ending"]
    images = image_files(dataset, case)
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), images[0], verbose=False)()
    image, properties = reader.read_images(images)

    def read(folder: Path) -> np.ndarray:
        if not dataset.tasks.segmentation:
            return np.zeros(image.shape[1:], np.uint8)
        return np.asarray(reader.read_seg(str(folder / f"{case}{file_ending}"))[0][0])

    predicted_boxes = {}
    for method, detected in findings.detections.items():
        _, boxes, scores = detected[case]
        predicted_boxes[method] = _in_volume(boxes[:MAX_PREDICTED_BOXES]), scores[:MAX_PREDICTED_BOXES]
    return Row(
        dataset=dataset.name,
        case=case,
        image=image[-1],
        reference=read(dataset.reference_folder),
        predictions={method: read(folder) for method, folder in dataset.predictions.items()},
        spacing_mm=[float(step) for step in properties["spacing"]],
        classes=foreground_classes(dataset_json) if dataset.tasks.segmentation else {},
        ignore_label=dataset_json.get("labels", {}).get("ignore"),
        curves={
            method: read_curve(folder, dataset.name if method == TEACHER else None)
            for method, folder in dataset.fold_folders.items()
        },
        boxes=_in_volume(findings.boxes[case].boxes) if findings.boxes else np.zeros((0, 6)),
        predicted_boxes=predicted_boxes,
        image_classes=_image_classes(findings, case),
    )


def _image_classes(findings: Findings, case: str) -> dict[str, str]:
    """Of the reference and of every method, what it says of the image; empty without classification."""
    values = {REFERENCE: {target.name: findings.labels[target.name][case] for target in findings.targets}}
    values |= {method: findings.probabilities[method][case] for method in findings.probabilities}
    texts = {who: [class_text(target, own[target.name]) for target in findings.targets] for who, own in values.items()}
    return {who: "; ".join(filter(None, parts)) for who, parts in texts.items()}


def _in_volume(boxes: Array) -> Array:
    """Boxes [N, 4] of a 2D image as boxes [N, 6] of its one slice; others as they are."""
    if boxes.shape[1] == 6:
        return boxes
    return np.insert(boxes, [0, 2], [0.0, 1.0], axis=1)


def image_files(dataset: DemoDataset, case: str) -> list[str]:
    """All channels of one case: of a held-out test case, or of a training case wherever dataset.json says it is."""
    if dataset.cases is None:
        pattern = f"{case}_[0-9][0-9][0-9][0-9]{dataset.dataset_json['file_ending']}"
        return [str(file) for file in sorted((dataset.raw_folder / "imagesTs").glob(pattern))]
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    return list(
        get_filenames_of_train_images_and_targets(str(dataset.raw_folder), dataset.dataset_json)[case]["images"]
    )
