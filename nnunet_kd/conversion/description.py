"""dataset.json and the side files of a converted dataset."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from nnunet_kd.conversion.base import Box, Case, Converter
from nnunet_kd.data.side_files import CaseBoxes, flip_axes, write_boxes
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE
from nnunet_kd.files import replacing, write_json
from nnunet_kd.settings import BLOCK

NO_LABELS = {"background": 0, "whole_image": 1}  # nnU-Net needs some; without segmentations nothing reads them


def write_description(
    converter: Converter, folder: Path, cases: Sequence[Case], boxes: Mapping[str, Sequence[Box]]
) -> None:
    """Write classification.csv and boxes.json, and dataset.json last.

    Labels of test cases go into ``labelsTs``, with a dataset.json of its own, so that ``nnUNetKD_evaluate -ref`` takes
    that folder.

    Args:
        converter: The dataset.
        folder: Where the cases were written.
        cases: All that were written.
        boxes: Case to its boxes.
    """
    training = [case for case in cases if case.training]
    content = _dataset_json(converter, folder.name, len(training))
    _write_side_files(converter, folder, training, boxes)
    labelled = [case for case in cases if not case.training and case.labelled]
    if labelled and (converter.table_columns or converter.box_classes):
        (folder / "labelsTs").mkdir(exist_ok=True)
        _write_side_files(converter, folder / "labelsTs", labelled, boxes)
        write_json(folder / "labelsTs" / "dataset.json", content)
    write_json(folder / "dataset.json", content)


def _dataset_json(converter: Converter, name: str, num_training: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        generate_dataset_json(
            temporary,
            channel_names=dict(enumerate(converter.channels)),
            labels=dict(NO_LABELS if converter.labels is None else converter.labels),
            num_training_cases=num_training,
            file_ending=converter.file_ending,
            regions_class_order=converter.regions_class_order,
            dataset_name=name,
            reference=converter.url,
            description=converter.title,
            license=converter.licence,
            converted_by="nnUNetKD_convert",
        )
        content = json.loads((Path(temporary) / "dataset.json").read_text())
    content["citation"] = converter.citation  # nnU-Net writes the release in its place
    block = _block(converter)
    return {**content, BLOCK: block} if block else content


def _block(converter: Converter) -> dict[str, Any]:
    tasks: dict[str, Any] = {"segmentation": converter.labels is not None}
    if converter.classification:
        targets = [dict(target) for target in converter.classification]
        tasks["classification"] = targets[0] if len(targets) == 1 else targets
    if converter.box_classes:
        tasks["detection"] = {"file": DETECTION_FILE, "classes": list(converter.box_classes)}
    block: dict[str, Any] = {"tasks": tasks} if len(tasks) > 1 else {}
    return {**block, "split_by": converter.split_by} if converter.split_by is not None else block


def _write_side_files(
    converter: Converter, folder: Path, cases: Sequence[Case], boxes: Mapping[str, Sequence[Box]]
) -> None:
    if converter.table_columns:
        columns = converter.table_columns
        rows = [[case.name, *(case.values.get(column, "") for column in columns)] for case in cases]
        with replacing(folder / CLASSIFICATION_FILE) as temporary, temporary.open("w", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([["case", *columns], *rows])
    if converter.box_classes:
        own = {case.name: _case_boxes(boxes[case.name], converter.box_classes) for case in cases}
        write_boxes(folder / DETECTION_FILE, own, converter.box_classes)


def _case_boxes(boxes: Sequence[Box], classes: Sequence[str]) -> CaseBoxes:
    num_edges = len(boxes[0].edges) if boxes else 4
    corners = np.array([box.edges for box in boxes], dtype=np.float64).reshape(-1, num_edges)
    labels = np.array([classes.index(box.label) for box in boxes], dtype=np.int64)
    return CaseBoxes(labels, flip_axes(corners))
