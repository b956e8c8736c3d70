"""The command nnUNetKD_verify: everything that is wrong with the side files of datasets, at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.errors import NnUNetKDError

if TYPE_CHECKING:
    from nnunet_kd.data.tasks import Tasks
    from nnunet_kd.data.verify import Contents, Report


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_verify; exit status 1 if there are problems, 2 if a dataset is not there."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_verify",
        description="Check dataset.json, classification.csv, boxes.json and the splits of datasets, and print all "
        "problems. Exit status 1 if there are any.",
    )
    parser.add_argument("-d", nargs="+", required=True, help="Dataset ids or names")
    parser.add_argument("--disable_progress_bar", action="store_true", help="No progress bar")
    args = parser.parse_args(arguments)
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunet_kd.data.member import dataset_name
    from nnunet_kd.data.verify import verify_dataset

    found, errors = False, []
    for entry in args.d:
        try:
            report = verify_dataset(dataset_name(entry), show_progress=not args.disable_progress_bar)
        except NnUNetKDError as error:
            errors.append(str(error))
            continue
        print("\n".join(_lines(report)))
        found = found or bool(report.problems)
    if errors:
        raise NnUNetKDError("\n".join(errors))
    if found:
        sys.exit(1)


def _lines(report: Report) -> Iterator[str]:
    dimension = f"{report.dimension}D, " if report.dimension else ""
    counted = f"{dimension}{report.num_cases} cases" if report.tasks is not None else "nothing but dataset.json read"
    yield f"{report.dataset} in {report.folder.parent}: {counted}"
    if report.tasks is not None:
        yield f"  tasks: {'; '.join(_task_names(report.tasks))}"
        for contents in report.contents:
            yield f"  {_summary(contents)}"
        if report.num_groups is not None:
            yield f"  split by {report.tasks.split_by}: {report.num_groups} groups"
        for note in report.notes:
            yield f"  note: {note}"
    number = len(report.problems)
    yield f"  {number} problem{'s' if number > 1 else ''}:" if number else "  no problems"
    for problem in report.problems:
        yield f"    {problem}"


def _task_names(tasks: Tasks) -> Iterator[str]:
    yield "segmentation" if tasks.segmentation else "no segmentation"
    for target in tasks.classification:
        kind = "several at once" if target.multilabel else "one of"
        yield f"classification of {target.name} ({kind} {', '.join(target.classes)})"
    if tasks.detection is not None:
        yield f"detection of {', '.join(tasks.detection.classes)}"


def _summary(contents: Contents) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in contents.counts.items())
    if contents.num_empty is None:
        without = f"{contents.num_without} images without a label"
        return f"{contents.title}: {contents.num_cases} labelled ({counts}), {without}"
    boxes = f"{sum(contents.counts.values())} boxes ({counts})"
    without = f"{contents.num_empty} entries without boxes, {contents.num_without} images without an entry"
    return f"{contents.title}: {contents.num_cases} entries, {boxes}, {without}"


if __name__ == "__main__":
    main()
