"""The command nnUNetKD_evaluate: metrics, tables and figures of a prediction folder, for all tasks of a dataset."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_kd.cli.errors import clear_errors, need_folder
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import write_json

if TYPE_CHECKING:
    from nnunet_kd.evaluation.tasks import Evaluation

TASKS = ("segmentation", "classification", "detection")
# a folder of their own: in 2D datasets segmentations are PNGs too
FIGURES = "figures"


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_evaluate."""
    args = _parser().parse_args(arguments)
    if not args.pred.is_dir():
        raise NnUNetKDError(f"The prediction folder {args.pred} does not exist. Give with -pred a folder.")
    output = args.pred if args.o is None else args.o
    need_folder("-o", output)
    if args.tolerance_mm < 0:
        raise NnUNetKDError(f"--tolerance_mm {args.tolerance_mm} must not be negative.")
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunet_kd.evaluation.reference import ReferenceDataset
    from nnunet_kd.evaluation.tasks import evaluate_tasks

    reference = ReferenceDataset.open(args.ref)
    cases: list[str] | None = None
    if args.fold is not None:
        cases = reference.validation_cases(args.fold)
    elif args.cases is not None:
        cases = _read_cases(args.cases)
    evaluation = evaluate_tasks(
        reference, args.pred, tasks=args.tasks, cases=cases, tolerance_mm=args.tolerance_mm, seed=args.seed
    )
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "reference": str(reference.folders[0]),
        "predictions": str(args.pred.resolve()),
        "fold": args.fold,
        "tolerance_mm": args.tolerance_mm,
    }
    written = _write(evaluation, settings, output)
    if not args.no_figures:
        written += _draw(evaluation, output / FIGURES)
    for title, rows in _tables(evaluation):
        print(f"\n{title}\n{table(rows)}")
    print("\nIn brackets: 95% bootstrap intervals over groups (split_by), or cases.")
    if evaluation.classification:
        print(
            "permuted_...: the same predictions against labels dealt at random to cases or whole groups, with the "
            "central 95% in brackets; a score in there is not shown to be better than chance."
        )
    for note in evaluation.notes:
        print(f"Note: {note}.")
    print(f"Written to {output}: {', '.join(str(file.relative_to(output)) for file in written)}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``class``, ``metric``, ``value``, ``low``, ``high`` as text: a line per metric, a column per class."""
    classes = list(dict.fromkeys(row["class"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["metric"], {})[row["class"]] = _cell(row["value"], row.get("low"), row.get("high"))
    lines = [["", *(name or "all" for name in classes)]]
    lines += [[metric, *(own.get(name, "") for name in classes)] for metric, own in cells.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_evaluate",
        description="Evaluate a folder of predictions (segmentations, classification.csv, boxes.json) against the "
        "references of a dataset. Writes evaluation.json, a CSV per task and figures.",
    )
    parser.add_argument("-ref", required=True, help="Raw or preprocessed dataset folder, or a dataset id or name")
    parser.add_argument("-pred", required=True, type=Path, help="Folder with the predictions")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=None,
        help="Default: the tasks that both the dataset and the predictions have",
    )
    parser.add_argument("-o", type=Path, default=None, help="Output folder. Default: the prediction folder")
    parser.add_argument("--tolerance_mm", type=float, default=2.0, help="Of the surface Dice (NSD). Default: 2.0")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cases", type=Path, default=None, help="File with the cases to evaluate, one per line")
    which.add_argument(
        "--fold", type=int, default=None, help="The validation cases of this fold; all of them must be predicted"
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the bootstrap. Default: 0")
    parser.add_argument("--no_figures", action="store_true", help="Write no figures")
    return parser


def _read_cases(file: Path) -> list[str]:
    try:
        cases = file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise NnUNetKDError(f"--cases {file} cannot be read ({error}). Give a text file, one case per line.") from error
    if not cases:
        raise NnUNetKDError(f"--cases {file} names no case. Give a text file, one case per line.")
    return list(dict.fromkeys(cases))


def _tables(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each table."""
    tables = []
    if evaluation.segmentation is not None:
        num_cases = evaluation.segmentation["case"].nunique()
        tables.append((f"Segmentation ({num_cases} cases)", evaluation.segmentation_rows))
    for own in evaluation.classification:
        kind = "multi-label" if own.target.multilabel else "multi-class"
        counted = f"{own.scores.num_cases} cases, {own.scores.num_groups} groups"
        tables.append((f"Classification: {own.target.name} ({kind}, {counted})", own.scores.rows()))
    if evaluation.detection is not None:
        scores = evaluation.detection
        counted = f"{scores.num_images} images, {scores.num_images_without_boxes} of them without boxes"
        tables.append((f"Detection ({counted}; sensitivity@false positives per image at IoU 0.1)", scores.rows()))
    return tables


def _write(evaluation: Evaluation, settings: dict[str, Any], output: Path) -> list[Path]:
    import pandas as pd

    from nnunet_kd.files import replacing

    written = [output / "evaluation.json"]
    write_json(written[0], {**settings, **evaluation.to_json()})
    tables = {"segmentation_cases.csv": evaluation.segmentation}
    if evaluation.segmentation is not None:
        tables["segmentation_metrics.csv"] = pd.DataFrame(evaluation.segmentation_rows)
    if evaluation.classification:
        own = [
            pd.DataFrame(target.scores.rows()).assign(target=target.target.name) for target in evaluation.classification
        ]
        joined = pd.concat(own, ignore_index=True)
        tables["classification_metrics.csv"] = joined[["target", *joined.columns.drop("target")]]
    if evaluation.detection is not None:
        tables["detection_metrics.csv"] = pd.DataFrame(evaluation.detection.rows())
    for name, frame in tables.items():
        if frame is not None:
            with replacing(output / name) as temporary:
                frame.to_csv(temporary, index=False)
            written.append(output / name)
    return written


def _draw(evaluation: Evaluation, folder: Path) -> list[Path]:
    from nnunet_kd.evaluation import task_figures
    from nnunet_kd.evaluation.classification import calibration_pairs

    drawn: list[Path] = []

    def new(name: str) -> Path:
        folder.mkdir(exist_ok=True)
        drawn.append(folder / f"{name}.png")
        return drawn[-1]

    for own in evaluation.classification:
        if not own.scores.num_cases:
            continue
        name = re.sub(r"[^\w.-]+", "_", own.target.name)
        task_figures.draw_roc(own.reference, own.probabilities, own.scores, new(f"{name}_roc"))
        task_figures.draw_precision_recall(
            own.reference, own.probabilities, own.scores, new(f"{name}_precision_recall")
        )
        pairs = calibration_pairs(own.reference, own.probabilities, multilabel=own.target.multilabel)
        task_figures.draw_reliability(*pairs, own.scores, new(f"{name}_reliability"))
        if own.scores.confusion is not None:
            task_figures.draw_confusion(own.scores.confusion, own.target.classes, new(f"{name}_confusion"))
    if evaluation.detection is not None:
        task_figures.draw_froc(evaluation.detection, new("detection_froc"))
    return drawn


def _cell(value: float, low: float | None, high: float | None) -> str:
    if value != value:  # NaN
        return "n/a"
    if isinstance(value, int):
        return str(value)
    has_interval = low is not None and low == low
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if has_interval else f"{value:.3f}"


if __name__ == "__main__":
    main()
