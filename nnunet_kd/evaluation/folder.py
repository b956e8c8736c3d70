"""Evaluate a folder of predicted segmentations against a folder of references, both as nnU-Net writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from tqdm import tqdm

from nnunet_kd.data.image_headers import num_axes_of
from nnunet_kd.data.verify import image_reader
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.metrics import Label, Segmentation, evaluate_case

MADE_UP_SPACING_MM = 999  # across a slice: what nnU-Net's conversion of 2D images to volumes writes


def foreground_classes(dataset_json: Mapping[str, Any]) -> dict[str, Label]:
    """Class names and labels (tuples for regions) of a dataset.json, without background and ignore label."""
    classes: dict[str, Label] = {}
    for name, value in dataset_json["labels"].items():
        label: Label = tuple(int(entry) for entry in value) if isinstance(value, (list, tuple)) else int(value)
        if name != "ignore" and label != 0:
            classes[name] = label
    return classes


def evaluate_folder(
    reference_folder: Path,
    prediction_folder: Path,
    dataset_json: Mapping[str, Any] | None = None,
    *,
    cases: Sequence[str] | None = None,
    classes: Mapping[str, Label] | None = None,
    tolerance_mm: float = 2.0,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Compare every reference with the prediction of the same file name.

    Args:
        reference_folder: Label files, ``<case><file ending>``.
        prediction_folder: Predicted label files of the same names. Other files in it are not looked at.
        dataset_json: Content of the dataset.json that names the labels and the file ending. Default: read from the
            prediction folder, where nnUNetv2_predict puts it.
        cases: Only these cases. Default: all files of ``reference_folder`` with the dataset's file ending.
        classes: Class names and labels to evaluate. Default: all foreground classes of ``dataset_json``.
        tolerance_mm: Tolerance of the normalised surface Dice.
        show_progress: Show a progress bar on stderr.

    Returns:
        One row per case and class with columns ``case``, ``class``, ``dice``, ``hd95_mm``, ``nsd``,
        ``volume_error_ml`` (see ``metrics.py``; NaN for 2D images, which have no volume).

    Raises:
        NnUNetKDError: A folder has no references, a prediction is missing, or a pair differs in shape.
    """
    if dataset_json is None:
        dataset_json = _read_dataset_json(prediction_folder)
    file_ending = dataset_json["file_ending"]
    if cases is None:
        cases = sorted(file.name[: -len(file_ending)] for file in reference_folder.glob(f"*{file_ending}"))
    classes = foreground_classes(dataset_json) if classes is None else classes
    ignore_label = dataset_json["labels"].get("ignore")
    pairs = read_pairs(reference_folder, prediction_folder, dataset_json, cases)
    progress = tqdm(pairs, f"evaluating {prediction_folder.name}", len(cases), disable=not show_progress)
    rows = []
    for case, reference, prediction, spacing_mm, is_2d in progress:
        scores = evaluate_case(
            reference, prediction, list(classes.values()), spacing_mm, tolerance_mm, ignore_label=ignore_label
        )
        if is_2d:
            scores = [replace(score, volume_error_ml=float("nan")) for score in scores]
        rows += [{"case": case, "class": name, **vars(score)} for name, score in zip(classes, scores, strict=True)]
    return pd.DataFrame(rows)


def read_pairs(
    reference_folder: Path, prediction_folder: Path, dataset_json: Mapping[str, Any], cases: Sequence[str]
) -> Iterator[tuple[str, Segmentation, Segmentation, Sequence[float], bool]]:
    """Case, reference [Z, Y, X], prediction [Z, Y, X], spacing in mm of every case, and whether its image is 2D.

    Of an image that is stored as 2D Z is 1, and the spacing across it is made up by nnU-Net's readers; a single slice
    that is stored with such a spacing is 2D as well.

    Args:
        reference_folder: Label files, ``<case><file ending>``.
        prediction_folder: Predicted label files of the same names.
        dataset_json: Content of the dataset.json that names the file ending.
        cases: Which.

    Raises:
        NnUNetKDError: A reference or a prediction is missing or cannot be read, or a pair differs in shape.
    """
    file_ending = dataset_json["file_ending"]
    missing = [case for case in cases if not (reference_folder / f"{case}{file_ending}").is_file()]
    if missing or not cases:
        what = f"of {', '.join(missing[:5])}" if missing else f"({file_ending})"
        msg = f"There is no reference {what} in {reference_folder}. Give the folder with the label files."
        raise NnUNetKDError(msg)
    missing = [case for case in cases if not (prediction_folder / f"{case}{file_ending}").is_file()]
    if missing:
        msg = (
            f"{len(missing)} of {len(cases)} cases have no prediction in {prediction_folder}, among them "
            f"{', '.join(missing[:5])}. Predict them, or name the cases to evaluate."
        )
        raise NnUNetKDError(msg)
    first = reference_folder / f"{cases[0]}{file_ending}"
    reader = image_reader(dataset_json, first)()
    for case in cases:
        reference, properties = _read(reader, reference_folder / f"{case}{file_ending}")
        prediction, _ = _read(reader, prediction_folder / f"{case}{file_ending}")
        spacing_mm = [float(step) for step in properties["spacing"]]
        is_2d = isinstance(reader, NaturalImage2DIO) or num_axes_of(properties) == 2
        is_2d |= len(reference) == 1 and spacing_mm[0] >= MADE_UP_SPACING_MM
        if reference.shape != prediction.shape:
            msg = (
                f"{case}: the prediction in {prediction_folder} has shape {prediction.shape}, the reference "
                f"{reference.shape}. Predict from the images that belong to {reference_folder}."
            )
            raise NnUNetKDError(msg)
        yield case, reference, prediction, spacing_mm, is_2d


def _read(reader: BaseReaderWriter, file: Path) -> tuple[Segmentation, dict[str, Any]]:
    """A label map [Z, Y, X] and nnU-Net's properties of it."""
    try:
        segmentation, properties = reader.read_seg(str(file))
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken file makes its library raise
        reason = " ".join(str(error).split()) or repr(error)
        msg = f"{file} cannot be read ({reason}). Replace it, or evaluate without this case."
        raise NnUNetKDError(msg) from error
    return np.asarray(segmentation[0]), properties


def _read_dataset_json(folder: Path) -> dict[str, Any]:
    file = folder / "dataset.json"
    if not file.is_file():
        msg = f"{file} does not exist, so the labels are not known. Give the dataset.json of the dataset."
        raise NnUNetKDError(msg)
    return json.loads(file.read_text())
