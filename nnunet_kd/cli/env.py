"""``eval "$(nnUNetKD_env)"`` lets every stock nnU-Net command started from this shell find our trainers."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder
from nnunet_kd.errors import NnUNetKDError


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shell line that makes nnU-Net find our trainers, and nothing else."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_env",
        description='Print the shell line that makes nnU-Net find the trainers of nnunet_kd: eval "$(nnUNetKD_env)"',
    )
    parser.parse_args(arguments)
    try:
        value = add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))
    except NnUNetKDError as error:
        sys.exit(f"nnUNetKD_env: {error}")
    print(f"export {TRAINERS_VARIABLE}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
