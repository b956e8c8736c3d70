"""What stock nnU-Net's functions see beside their arguments: environment variables and attributes of their object.

One of the variables names our trainers folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_kd.errors import NnUNetKDError

TRAINERS_VARIABLE = "nnUNet_extTrainer"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set ``values`` in ``os.environ`` and restore what was there, also what was not there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``target`` within the block; they must exist, and get their values back."""
    before = {name: getattr(target, name) for name in values}
    target.__dict__.update(values)
    try:
        yield
    finally:
        target.__dict__.update(before)


def trainers_folder() -> Path:
    """Return the folder of the installed ``nnunet_kd.trainers``.

    The folder is located, not imported: importing the trainers costs seconds, because they load nnU-Net and torch.

    Raises:
        NnUNetKDError: The package is on the path without its trainers, so it is not installed.
    """
    specification = importlib.util.find_spec("nnunet_kd.trainers")
    if specification is None or not specification.submodule_search_locations:
        package = importlib.util.find_spec("nnunet_kd")
        origin = package.origin if package is not None else "nowhere"
        msg = (
            f"nnunet_kd is imported from {origin}, where its trainers are not installed. "
            "Run `pip install .` (or `pip install -e .`) in its checkout and use the command nnUNetKD_env. "
            "Where that was done, start the command in another folder: this one hides the installed package."
        )
        raise NnUNetKDError(msg)
    return Path(specification.submodule_search_locations[0]).resolve()


def add_trainers_folder(current: str) -> str:
    """Put our trainers folder in front of the folders that ``nnUNet_extTrainer`` lists already.

    Ours comes first so that a folder left over from another installation cannot answer in its place.

    Args:
        current: The present value of ``nnUNet_extTrainer``: folders joined by ``os.pathsep``, may be empty.

    Returns:
        The new value: our folder once, then the user's other folders as they were written.
    """
    ours = trainers_folder()
    others = [entry for entry in current.split(os.pathsep) if entry.strip() and Path(entry).resolve() != ours]
    return os.pathsep.join([str(ours), *others])
