"""The images that nnUNetKD_predict is given: a folder, or single files."""

from __future__ import annotations

import re
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_kd.data.image_headers import num_channels_of
from nnunet_kd.errors import NnUNetKDError

READERS = "nnunetv2.imageio."
DEAD_WORKERS = "Background workers died"  # nnU-Net's error where a process failed that preprocesses


def input_images(given: Sequence[str], file_ending: str) -> str | list[list[str]]:
    """What stock nnU-Net's ``predict_from_files`` takes: the folder, or one list of channel files per case.

    Args:
        given: One folder, or files named ``CASE_0000`` and on; the channels of a case may come in any order.
        file_ending: Of the training images.

    Raises:
        NnUNetKDError: The folder holds no image. Or, of files, something does not exist, is named otherwise, or a case
            lacks a channel that it or another case must have; lists all of it.
    """
    if len(given) == 1 and Path(given[0]).is_dir():
        if not _in_folder(Path(given[0]), file_ending):
            raise NnUNetKDError(
                f"The input folder {given[0]} (-i) holds no image CASE_0000{file_ending}, which is how the training "
                f"images are named: the file ending {file_ending} after the channel number _0000. Rename or convert "
                f"the images, or give another folder."
            )
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


def need_all_channels(
    images: str | list[list[str]], file_ending: str, channels: Sequence[str], reader: type[BaseReaderWriter]
) -> None:
    """Refuse images that do not have the channels that a model was trained with.

    One file may hold several channels (a colour image), so a case with another number of files is looked into.

    Args:
        images: As returned by :func:`input_images`.
        file_ending: Of the training images.
        channels: Names of the model's input channels.
        reader: The model's.

    Raises:
        NnUNetKDError: Lists the cases that lack channels or have more. What cannot be read is not among them.
    """
    cases = _in_folder(Path(images), file_ending).values() if isinstance(images, str) else images
    wrong = []
    for files in cases:
        if len(files) == len(channels):
            continue
        try:
            found = sum(num_channels_of(Path(file), reader) for file in files)
        except Exception:  # whatever a broken image makes its library raise; unreadable_images_named will say it
            continue
        if found != len(channels):
            wrong.append(f"{_case_of(files, file_ending)} has {found}: {', '.join(Path(file).name for file in files)}")
    if wrong:
        raise NnUNetKDError(
            f"The model was trained with {len(channels)} channel(s), in this order: {', '.join(channels)}. Give each "
            f"case these as CASE_0000{file_ending} and on, or remove it. Of the input (-i),\n  " + "\n  ".join(wrong)
        )


@contextmanager
def unreadable_images_named(
    images: str | list[list[str]], file_ending: str, reader: BaseReaderWriter
) -> Iterator[None]:
    """Where a prediction in this context fails because an image cannot be read, say which one.

    Args:
        images: As returned by :func:`input_images`.
        file_ending: Of the training images.
        reader: The model's.

    Raises:
        NnUNetKDError: Names the first image that cannot be read. Every other error is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if not _failed_at_reading(error):
            raise
        cases = _in_folder(Path(images), file_ending).values() if isinstance(images, str) else images
        unread = _first_unread(cases, reader)
        if unread is None:
            raise
        files, reason = unread
        raise NnUNetKDError(
            f"Case {_case_of(files, file_ending)} cannot be read from {', '.join(files)}: "
            f"{reason}. Replace or remove it and predict again with --continue_prediction, which keeps the cases that "
            f"are predicted already."
        ) from error


def _case_of(files: Sequence[str], file_ending: str) -> str:
    return Path(files[0]).name.removesuffix(file_ending)[: -len("_0000")]


def _in_folder(folder: Path, file_ending: str) -> dict[str, list[str]]:
    """Case to its channel files, as stock nnU-Net finds them."""
    cases: dict[str, list[str]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        named = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(file_ending)}", file.name)
        if named is not None and file.is_file():
            cases[named[1]].append(str(file))
    return cases


def _failed_at_reading(error: Exception) -> bool:
    """Whether an error comes out of nnU-Net's readers, or out of a process that may have failed there."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(READERS) for name in modules) or str(error).startswith(DEAD_WORKERS)


def _first_unread(cases: Iterable[Sequence[str]], reader: BaseReaderWriter) -> tuple[Sequence[str], str] | None:
    """The first case that cannot be read, and why: its one broken file, or all where they do not fit together."""
    for files in cases:
        together = _reading_error(files, reader)
        if together is not None:
            alone = [(file, _reading_error([file], reader)) for file in files]
            return next((([file], reason) for file, reason in alone if reason is not None), (files, together))
    return None


def _reading_error(files: Sequence[str], reader: BaseReaderWriter) -> str | None:
    """Why files cannot be read as the channels of a case; None if they can."""
    try:
        reader.read_images(list(files))
    except Exception as error:  # whatever a broken image makes its library raise
        return " ".join(str(error).split()) or "its channels differ in size"
    return None
