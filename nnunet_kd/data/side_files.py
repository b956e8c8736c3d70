"""Side files of a dataset: ``classification.csv`` and ``boxes.json`` beside its dataset.json.

Whatever is wrong in a file is collected as problems, so that a user sees all of it at once.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from numpy.typing import NDArray

from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import replacing

AXES = "xyz"
BOX_FORMS = {2: "[x0, y0, x1, y1]", 3: "[x0, y0, z0, x1, y1, z1]"}
MAX_LISTED_PROBLEMS = 20
OUTSIDE_TOLERANCE = 1e-3  # voxels; what rounding leaves when boxes were scaled with their image


class SideFileError(NnUNetKDError):
    """A side file is missing or has problems; the message lists them.

    Attributes:
        problems: All of them, in order; empty where it does not come from :meth:`listing`.
    """

    problems: tuple[Problem, ...] = ()

    @classmethod
    def listing(cls, problems: Sequence[Problem]) -> SideFileError:
        """An error that lists the first problems of each file and counts the rest."""
        lines: list[str] = []
        for file in dict.fromkeys(problem.file for problem in problems):
            own = [str(problem) for problem in problems if problem.file == file]
            lines += own[:MAX_LISTED_PROBLEMS]
            if len(own) > MAX_LISTED_PROBLEMS:
                more = len(own) - MAX_LISTED_PROBLEMS
                lines.append(f"... and {more} more in {file}. nnUNetKD_verify lists all of a dataset.")
        error = cls("\n".join(lines))
        error.problems = tuple(problems)
        return error


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a file.

    Attributes:
        file: Path of the file.
        where: Row, case or key in it; empty for the whole file.
        what: What is wrong.
        remedy: What to do, as a sentence.
        is_unread: The file could not be read because of it, or not from there on, so that what it lacks is no news.
    """

    file: str
    where: str
    what: str
    remedy: str
    is_unread: bool = False

    def __str__(self) -> str:
        return " ".join(f"{self.without_remedy}. {self.remedy}".split())  # one line, whatever a file contained

    @property
    def without_remedy(self) -> str:
        """Place and what is wrong, in one line whatever a file contained."""
        place = f"{self.file}, {self.where}" if self.where else self.file
        return " ".join(f"{place}: {self.what}".split())


@dataclass(frozen=True)
class CaseBoxes:
    """The boxes of one case.

    Attributes:
        labels: [N], index into the target's classes.
        boxes: [N, 2 * dimension] voxel-edge coordinates in array order, [z0, y0, x0, z1, y1, x1] or [y0, x0, y1, x1].
    """

    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A row of a side file in CSV format: its line number (the header is line 1), its case and the asked columns."""

    line: int
    case: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"line {self.line}, case {self.case}"


def side_file(dataset: str, file: str) -> Path:
    """The side file that training reads: the copy in nnUNet_preprocessed, else the one in nnUNet_raw.

    Args:
        dataset: Full dataset name.
        file: Name of the file.

    Raises:
        SideFileError: It is in neither folder.
    """
    folders = [Path(str(root)) / dataset for root in (nnUNet_preprocessed, nnUNet_raw) if root.is_set()]
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    searched = (
        " nor in ".join(str(folder) for folder in folders) or "nnUNet_preprocessed or nnUNet_raw, which are unset"
    )
    raise SideFileError(
        f"dataset.json of {dataset} names {file}, which is not in {searched}. Put it there, or correct dataset.json."
    )


def read_labels(
    path: Path, target: ClassificationTarget, problems: list[Problem] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Read the image-level labels of a target from a CSV file with the header ``case,...``.

    Args:
        path: The file.
        target: Which columns to read and which classes they have.
        problems: Collects what is wrong, and the rest is returned; None raises instead.

    Returns:
        Case to [classes] of 0 and 1, NaN where not labelled. Of a multi-class target all are NaN or exactly one is 1.

    Raises:
        SideFileError: Something is wrong and ``problems`` is None.
    """
    labels: dict[str, NDArray[np.float32]] = {}
    with _collecting(problems) as found:
        for row in read_rows(path, target.columns, found):
            values = _findings(path, row, target, found) if target.multilabel else _one_hot(path, row, target, found)
            if not np.array_equal(labels.setdefault(row.case, values), values, equal_nan=True):
                what = f"this case has another row with other values of {', '.join(target.columns)}"
                found.append(Problem(str(path), str(row), what, "Leave one row per case."))
    return labels


def read_boxes(
    path: Path,
    target: DetectionTarget,
    dimension: int,
    problems: list[Problem] | None = None,
    image_sizes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, CaseBoxes]:
    """Read the boxes of a dataset from a JSON file, case -> list of ``{"label": CLASS, "box": [x0, y0, (z0,) ...]}``.

    Args:
        path: The file.
        target: Its classes.
        dimension: 2 or 3, the axes of the stored images.
        problems: Collects what is wrong, and the rest is returned; None raises instead.
        image_sizes: Case to voxels per axis in array order; boxes of these cases must lie inside.

    Returns:
        Case to its boxes in array order; a case with an empty list has none, a case that the file leaves out is left
        out.

    Raises:
        SideFileError: Something is wrong and ``problems`` is None.
    """
    cases: dict[str, CaseBoxes] = {}
    with _collecting(problems) as found:
        for case, entries in _read_box_lists(path, found).items():
            size = None if image_sizes is None else image_sizes.get(case)
            labels, boxes = [], []
            for index, entry in enumerate(entries):
                wrong = _entry_problem(entry, target.classes, dimension, size)
                if wrong is None:
                    labels.append(target.classes.index(entry["label"]))
                    boxes.append(entry["box"])
                else:
                    found.append(Problem(str(path), f"case {case}, box {index}", *wrong))
            corners = np.array(boxes, dtype=np.float64).reshape(-1, 2 * dimension)
            cases[case] = CaseBoxes(np.array(labels, dtype=np.int64), flip_axes(corners))
    return cases


def write_boxes(path: Path, boxes: Mapping[str, CaseBoxes], classes: Sequence[str]) -> None:
    """Write boxes as ``read_boxes`` reads them, one case per line; whole numbers are written as integers.

    Args:
        path: The file; replaced if it exists.
        boxes: Case to its boxes in array order.
        classes: Names of the labels.
    """
    lines = []
    for case, own in boxes.items():
        entries = [
            {"label": classes[label], "box": [int(edge) if edge == int(edge) else edge for edge in corners]}
            for label, corners in zip(own.labels.tolist(), flip_axes(own.boxes).tolist(), strict=True)
        ]
        lines.append(f"{json.dumps(case)}: {json.dumps(entries)}")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def flip_axes(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exchange the axis order of boxes between side files (x, y, z) and arrays (z, y, x); its own inverse.

    Args:
        boxes: [N, 2 * dimension], lower corners first.
    """
    lower, upper = np.split(boxes, 2, axis=1)
    return np.concatenate([lower[:, ::-1], upper[:, ::-1]], axis=1)


def read_rows(path: Path, columns: Sequence[str], problems: list[Problem]) -> list[Row]:
    """Read the column ``case`` and ``columns`` of a CSV file in UTF-8; what cannot be read is left out or empty.

    Args:
        path: The file.
        columns: Further columns; their values are stripped of white space.
        problems: Collects what is wrong.
    """
    text = _read_text(path, problems)
    if text is None:
        return []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        wrong = _header_problem(header, ("case", *columns))
        if wrong is not None:
            problems.append(Problem(str(path), "header", *wrong, is_unread=True))
        if header.count("case") != 1:
            return []
        # where another column is missing, the rows have no value of it and the rest of them is checked
        positions = [header.index(name) if header.count(name) == 1 else None for name in ("case", *columns)]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            line = f"line {reader.line_num}"
            if len(cells) != len(header):
                what = f"{len(cells)} values, but the header has {len(header)} columns"
                remedy = "Correct the row; put values that contain a comma into double quotes."
                problems.append(Problem(str(path), line, what, remedy))
                continue
            case, *values = ("" if position is None else cells[position].strip() for position in positions)
            if case:
                rows.append(Row(reader.line_num, case, tuple(values)))
            else:
                problems.append(Problem(str(path), line, "the case is empty", "Name the case, or remove the row."))
    except csv.Error as error:
        what = f"malformed CSV ({error})"
        remedy = "Save it as comma-separated UTF-8 again."
        problems.append(Problem(str(path), f"line {reader.line_num}", what, remedy, is_unread=True))
    return rows


@contextmanager
def _collecting(problems: list[Problem] | None) -> Iterator[list[Problem]]:
    """Yield a list for problems; when the block ends, raise them or hand them on."""
    found: list[Problem] = []
    yield found
    if problems is not None:
        problems.extend(found)
    elif found:
        raise SideFileError.listing(found)


def _read_text(path: Path, problems: list[Problem]) -> str | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.strip():
            return text
        what, remedy = "the file is empty", "Replace it by the complete file."
    except FileNotFoundError:
        what, remedy = "the file does not exist", "Put it there, or correct 'file' in dataset.json."
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what, remedy = f"line {line} is not UTF-8", "Save the file with the encoding UTF-8."
    problems.append(Problem(str(path), "", what, remedy, is_unread=True))
    return None


# --- labels -----------------------------------------------------------------------------------------------------------
def _header_problem(header: Sequence[str], needed: Sequence[str]) -> tuple[str, str] | None:
    """What is wrong with a header and its remedy; None if every needed column is there once."""
    missing = [name for name in needed if name not in header]
    if not any(header):
        return "the first line is empty", f"Begin with the names of the columns: {', '.join(needed)}."
    if missing and len(header) == 1 and any(separator in header[0] for separator in ";\t"):
        return "the values are not separated by commas", "Save the file as comma-separated CSV."
    if missing:
        names = ", ".join(f"'{name}'" for name in missing)
        return f"no column {names}; there are {', '.join(header)}", "Correct the header, or dataset.json."
    repeated = [name for name in needed if header.count(name) > 1]
    if repeated:
        return f"more than one column '{repeated[0]}'", "Remove or rename all but one."
    return None


def _one_hot(path: Path, row: Row, target: ClassificationTarget, problems: list[Problem]) -> NDArray[np.float32]:
    (value,) = row.values
    values = np.full(len(target.classes), np.nan, dtype=np.float32)
    if value in target.classes:
        values[:] = 0
        values[target.classes.index(value)] = 1
    elif value:
        what = f"{target.columns[0]} is '{value}', which is not a class"
        problems.append(Problem(str(path), str(row), what, _class_remedy(value, target.classes, "empty: not labelled")))
    return values


def _findings(path: Path, row: Row, target: ClassificationTarget, problems: list[Problem]) -> NDArray[np.float32]:
    values = np.full(len(target.classes), np.nan, dtype=np.float32)
    for index, (column, value) in enumerate(zip(target.columns, row.values, strict=True)):
        if not value:
            continue
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if number in (0, 1):
            values[index] = number
        else:
            what = f"{column} is '{value}', which is neither 0 nor 1"
            problems.append(Problem(str(path), str(row), what, "Write 0 or 1; leave it empty where not labelled."))
    return values


def _class_remedy(value: str, classes: Sequence[str], also: str = "") -> str:
    by_lower = {name.lower(): name for name in classes}
    close = difflib.get_close_matches(value.lower(), list(by_lower), n=1)
    suggestion = f"Perhaps '{by_lower[close[0]]}'? " if close else ""
    allowed = ", ".join([*classes, *([also] if also else [])])
    return f"{suggestion}Allowed: {allowed}. Correct the value, or 'classes' in dataset.json."


# --- boxes ------------------------------------------------------------------------------------------------------------
def _read_box_lists(path: Path, problems: list[Problem]) -> dict[str, list[Any]]:
    """Case to its list of entries, which are not looked at."""
    text = _read_text(path, problems)
    if text is None:
        return {}
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in content if keys.count(key) > 1)
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = f"malformed JSON ({error})"
        problems.append(Problem(str(path), "", what, "Correct the file at this place.", is_unread=True))
        return {}
    for key in repeated:
        problems.append(
            Problem(str(path), f"key {key}", "it occurs more than once", "Leave one, with all of its boxes.")
        )
    form = f'case -> list of {{"label": CLASS, "box": {BOX_FORMS[2]} or {BOX_FORMS[3]}}}'
    if not isinstance(content, dict) or {"images", "annotations"} <= content.keys():
        remedy = f"Write {form}; nnUNetKD_convert_boxes makes it from COCO, nnDetection or masks."
        what = "the file does not hold lists of boxes by case"
        problems.append(Problem(str(path), "", what, remedy, is_unread=True))
        return {}
    cases: dict[str, list[Any]] = {}
    for case, entries in content.items():
        if isinstance(entries, list):
            cases[case] = entries
        else:
            what = f"a list of boxes is needed, not {_shortened(entries)}"
            problems.append(Problem(str(path), f"case {case}", what, f"Write {form}; [] is a case without boxes."))
    return cases


def _entry_problem(
    entry: Any, classes: Sequence[str], dimension: int, size: Sequence[int] | None
) -> tuple[str, str] | None:
    """What is wrong with a box and its remedy; None if it is usable."""
    form = BOX_FORMS[dimension]
    if not isinstance(entry, dict) or not {"label", "box"} <= entry.keys():
        return f"{_shortened(entry)} is not a box", f'Write {{"label": CLASS, "box": {form}}}.'
    label, box = entry["label"], entry["box"]
    if label not in classes:
        return f"{label!r} is not a class", _class_remedy(str(label), classes)
    if not isinstance(box, list) or len(box) != 2 * dimension:
        other = 5 - dimension
        if isinstance(box, list) and len(box) == 2 * other:
            what = f"{_shortened(box)} is a box in {other}D, but the images are {dimension}D"
        else:
            what = f"{_shortened(box)} is not a list of {2 * dimension} numbers"
        return what, f"Write {form}."
    if not all(_is_finite_number(edge) for edge in box):
        return f"{_shortened(box)} has an edge that is not a number", f"Write {form} in finite numbers."
    for axis, lower, upper in zip(AXES, box, box[dimension:], strict=False):
        if upper <= lower:
            what = f"{axis}1 = {upper:g} is not above {axis}0 = {lower:g}"
            return what, f"Write {form} with the end exclusive: a box around voxel 5 alone is 5 to 6."
    if size is None:
        return None
    for axis, lower, upper, voxels in zip(AXES, box, box[dimension:], reversed(size), strict=False):
        if lower < -OUTSIDE_TOLERANCE or upper > voxels + OUTSIDE_TOLERANCE:
            what = f"{axis} goes from {lower:g} to {upper:g}, but the image from 0 to {voxels}"
            return what, "Clip the box; its edges are in voxels of the stored image, x is the image column."
    return None


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _shortened(value: Any, length: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]}..."
