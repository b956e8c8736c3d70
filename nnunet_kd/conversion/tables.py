"""Tables that public datasets come with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.errors import ConversionError


def read_table(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header as column to stripped text.

    Args:
        file: The file, in UTF-8.
        columns: Columns that must be there; others are kept too.

    Raises:
        ConversionError: The file is missing or not UTF-8, or a column is missing.
    """
    if not file.is_file():
        raise ConversionError(f"There is no {file}.")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file} is not UTF-8. Save it with the encoding UTF-8.") from error
    missing = [name for name in columns if name not in header]
    if missing:
        raise ConversionError(f"{file} has no column {', '.join(missing)}; it has {', '.join(header)}.")
    return rows
