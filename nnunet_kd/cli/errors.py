"""User errors end a command with their message alone; anything else keeps its traceback."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from nnunet_kd.errors import NnUNetKDError

Parameters = ParamSpec("Parameters")


def clear_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Print a user error on stderr and exit with status 2."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (NnUNetKDError, NotImplementedError) as error:
            _stop(str(error))
        except RuntimeError as error:
            # nnU-Net's own message when one of its folders is asked for and not set
            unset = re.match(r"(nnUNet_\w+) is not defined", str(error))
            if unset is None:
                raise
            _stop(f"{unset[1]} is not set. Name nnU-Net's folder: export {unset[1]}=/path/to/{unset[1]}")

    return run


def need_folder(flag: str, folder: Path) -> None:
    """Raise NnUNetKDError if what ``flag`` names as a folder to write into is a file."""
    if folder.exists() and not folder.is_dir():
        raise NnUNetKDError(f"{flag} {folder} is a file. Give a folder.")


def _stop(message: str) -> None:
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(2)
