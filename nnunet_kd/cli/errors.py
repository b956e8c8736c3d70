"""User errors end a command with their message alone; anything else keeps its traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
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
            print(f"ERROR: {error}", file=sys.stderr)
            sys.exit(2)

    return run
