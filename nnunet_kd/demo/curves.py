"""Learning curves from nnU-Net's training logs, which are there whatever became of the checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

EPOCH = re.compile(r": Epoch (\d+)\s*$")
PSEUDO_DICE = re.compile(r": Pseudo dice \[(.*)\]\s*$")
PSEUDO_DICE_PER_MEMBER = re.compile(r": Pseudo dice per member: (.*)$")
NUMPY_NUMBER = re.compile(r"np\.float\d+\(([^)]*)\)")
MEMBER = re.compile(r"(\S+) ([\d.]+|nan)(?: \(\d+ steps\))?")


def read_curve(fold_folder: Path, member: str | None = None) -> NDArray[np.float64]:
    """Mean pseudo Dice over the classes, per epoch.

    Args:
        fold_folder: ``fold_0`` of a trained model. A training that was resumed has several logs there; of an epoch that
            was run again, the later value counts.
        member: Full name of a member, where the model is a joint teacher.

    Returns:
        [epochs], NaN where the log has no value.
    """
    values: dict[int, float] = {}
    for log in sorted(fold_folder.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime):
        values |= parse_log(log.read_text(errors="replace"), member)
    curve = np.full(max(values, default=-1) + 1, np.nan)
    for epoch, value in values.items():
        curve[epoch] = value
    return curve


def parse_log(text: str, member: str | None = None) -> dict[int, float]:
    """Epoch to mean pseudo Dice, from the text of a training log; see :func:`read_curve`."""
    values: dict[int, float] = {}
    epoch = -1
    for line in text.splitlines():
        if found := EPOCH.search(line):
            epoch = int(found[1])
        elif member is None and (found := PSEUDO_DICE.search(line)):
            values[epoch] = _mean([float(entry) for entry in NUMPY_NUMBER.sub(r"\1", found[1]).split(",") if entry])
        elif member is not None and (found := PSEUDO_DICE_PER_MEMBER.search(line)):
            per_member = {name: float(value) for name, value in MEMBER.findall(found[1])}
            values[epoch] = per_member.get(member, float("nan"))
    return values


def _mean(values: list[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")
