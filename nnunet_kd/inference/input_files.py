"""The images that nnUNetKD_predict is given: a folder, or single files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.errors import NnUNetKDError


def input_images(given: Sequence[str], file_ending: str) -> str | list[list[str]]:
    """What stock nnU-Net's ``predict_from_files`` takes: the folder, or one list of channel files per case.

    Args:
        given: One folder, or files named ``CASE_0000`` and on; the channels of a case may come in any order.
        file_ending: Of the training images.

    Raises:
        NnUNetKDError: Something does not exist, is named otherwise, or a case lacks a channel that it or another case
            must have; lists all of it. Whether the files hold all channels (a colour image is one file) is checked when
            they are read.
    """
    if len(given) == 1 and Path(given[0]).is_dir():
        return given[0]
    cases: dict[str, dict[int, str]] = defaultdict(dict)
    problems = []
    for name in given:
        case, _, channel = name.removesuffix(file_ending).rpartition("_")
        if Path(name).is_dir():
            problems.append(f"{name} is a folder; give one folder alone, or files")
        elif not Path(name).is_file():
            problems.append(f"{name} does not exist")
        elif not name.endswith(file_ending) or len(channel) != 4 or not channel.isdigit():
            problems.append(f"{name} is not named CASE_0000{file_ending}, as the training images are")
        else:
            cases[case][int(channel)] = name
    num_files = 1 + max((channel for files in cases.values() for channel in files), default=0)
    for case, files in cases.items():
        missing = [f"{case}_{channel:04d}{file_ending}" for channel in range(num_files) if channel not in files]
        if missing:
            problems.append(f"{Path(case).name} lacks {', '.join(missing)}")
    names = [Path(case).name for case in cases]
    problems += [f"several cases are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise NnUNetKDError("The input (-i) cannot be predicted:\n  " + "\n  ".join(problems))
    return [[files[channel] for channel in sorted(files)] for files in cases.values()]
