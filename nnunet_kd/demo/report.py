"""What came out of a demo: the table of all methods and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_kd.demo.curves import read_curve
from nnunet_kd.demo.figure import Row, draw
from nnunet_kd.demo.pipeline import CONTROL, METHODS, STUDENT, TEACHER, DemoDataset
from nnunet_kd.evaluation.folder import evaluate_folder, foreground_classes
from nnunet_kd.evaluation.table import summarize, to_markdown, write_table

TOLERANCE_MM = 2.0


def report(datasets: Sequence[DemoDataset], output: Path) -> str:
    """Evaluate all predictions and write ``cases.csv``, ``table.md``, ``table.csv`` and ``figure.png`` into ``output``.

    Returns:
        The table as Markdown.

    Raises:
        NnUNetKDError: A prediction is missing.
    """
    rows = evaluate(datasets)
    rows.to_csv(output / "cases.csv", index=False)
    table = summarize(rows, CONTROL)
    write_table(table, output)
    draw([_figure_row(dataset, rows[rows["dataset"] == dataset.name]) for dataset in datasets], output / "figure.png")
    return to_markdown(table)


def evaluate(datasets: Sequence[DemoDataset]) -> pd.DataFrame:
    """Rows of ``evaluate_folder`` for every dataset and method, with columns ``dataset`` and ``method``."""
    parts = []
    for dataset in datasets:
        for method in METHODS:
            own = evaluate_folder(
                dataset.reference_folder,
                dataset.predictions[method],
                dataset.dataset_json,
                cases=dataset.cases,
                tolerance_mm=TOLERANCE_MM,
                show_progress=False,
            )
            parts.append(own.assign(dataset=dataset.name, method=method))
    return pd.concat(parts, ignore_index=True)


def typical_case(rows: pd.DataFrame) -> str:
    """The case in the middle when the cases are sorted by the student's Dice, so that nobody picked it."""
    per_case = rows[rows["method"] == STUDENT].groupby("case")["dice"].mean().dropna().sort_values(kind="stable")
    return str(per_case.index[len(per_case) // 2]) if len(per_case) else str(rows["case"].iloc[0])


def _figure_row(dataset: DemoDataset, rows: pd.DataFrame) -> Row:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    case = typical_case(rows)
    dataset_json = dataset.dataset_json
    file_ending = dataset_json["file_ending"]
    images = image_files(dataset, case)
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), images[0], verbose=False)()
    image, properties = reader.read_images(images)

    def read(folder: Path) -> np.ndarray:
        return np.asarray(reader.read_seg(str(folder / f"{case}{file_ending}"))[0][0])

    return Row(
        dataset=dataset.name,
        case=case,
        image=image[-1],
        reference=read(dataset.reference_folder),
        predictions={method: read(folder) for method, folder in dataset.predictions.items()},
        spacing_mm=[float(step) for step in properties["spacing"]],
        classes=foreground_classes(dataset_json),
        ignore_label=dataset_json["labels"].get("ignore"),
        curves={
            method: read_curve(folder, dataset.name if method == TEACHER else None)
            for method, folder in dataset.fold_folders.items()
        },
    )


def image_files(dataset: DemoDataset, case: str) -> list[str]:
    """All channels of one case: of a held-out test case, or of a training case wherever dataset.json says it is."""
    if dataset.cases is None:
        pattern = f"{case}_[0-9][0-9][0-9][0-9]{dataset.dataset_json['file_ending']}"
        return [str(file) for file in sorted((dataset.raw_folder / "imagesTs").glob(pattern))]
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    return list(
        get_filenames_of_train_images_and_targets(str(dataset.raw_folder), dataset.dataset_json)[case]["images"]
    )
