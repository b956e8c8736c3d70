"""Files are written under a temporary name and renamed, so that a killed run leaves no half file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block succeeds, it becomes ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in nnU-Net's style (indent 4, numpy types converted); an identical file is left untouched."""
    text = json.dumps(content, indent=4, default=_plain)
    if path.is_file() and path.read_text() == text:
        return
    with replacing(path) as temporary:
        temporary.write_text(text)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written as JSON")
