"""``eval "$(nnUNetKD_env)"`` lets every stock nnU-Net command started from this shell find our trainers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.errors import NnUNetKDError

VARIABLE = "nnUNet_extTrainer"


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
            "Run `pip install .` (or `pip install -e .`) in its checkout and use the command nnUNetKD_env."
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shell line that makes nnU-Net find our trainers, and nothing else."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_env",
        description='Print the shell line that makes nnU-Net find the trainers of nnunet_kd: eval "$(nnUNetKD_env)"',
    )
    parser.parse_args(arguments)
    try:
        value = add_trainers_folder(os.environ.get(VARIABLE, ""))
    except NnUNetKDError as error:
        sys.exit(f"nnUNetKD_env: {error}")
    print(f"export {VARIABLE}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
