"""Which trainers nnU-Net would find, read from the sources: importing them takes seconds."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nnunet_kd.environment import TRAINERS_VARIABLE, trainers_folder

CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)


def known_trainers() -> set[str]:
    """Names of our trainers, of those in the folders of nnUNet_extTrainer, and of nnU-Net's own."""
    own = {file.stem for file in trainers_folder().glob("*.py") if not file.stem.startswith("_")}
    return own.union(*(CLASS.findall(file.read_text(errors="replace")) for file in _sources()))


def _sources() -> Iterator[Path]:
    specification = importlib.util.find_spec("nnunetv2")
    if specification is not None and specification.origin is not None:
        yield from (Path(specification.origin).parent / "training" / "nnUNetTrainer").rglob("*.py")
    for folder in os.environ.get(TRAINERS_VARIABLE, "").split(os.pathsep):
        if folder.strip():
            yield from Path(folder).rglob("*.py")
