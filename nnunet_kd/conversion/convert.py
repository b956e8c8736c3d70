"""Write a public dataset in nnU-Net's raw format: resumable, in several processes, with a report (our design).

``conversion_report.json`` in the dataset's folder says what it was made by and, until it is finished, that it is not.
A case that is written has a line in ``.conversion/cases.jsonl``; dataset.json is written last, so that nnU-Net takes no
unfinished dataset.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from tqdm import tqdm

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut
from nnunet_kd.conversion.checks import checked
from nnunet_kd.conversion.description import write_description
from nnunet_kd.errors import ConversionError
from nnunet_kd.files import write_json

REPORT_FILE = "conversion_report.json"
WORK_FOLDER = ".conversion"
PROGRESS_FILE = "cases.jsonl"
UNREADABLE = (ConversionError, RuntimeError, OSError, ValueError, KeyError, IndexError)  # of a broken or odd file


@dataclass(frozen=True)
class Written:
    """What is known of a case that lies on the disk: its boxes, and how many were dropped as outside its image."""

    boxes: tuple[Box, ...]
    num_outside: int


@dataclass(frozen=True)
class Report:
    """What a conversion has made.

    Attributes:
        folder: The dataset.
        content: What ``conversion_report.json`` holds.
        was_there: The dataset was finished before, and nothing was done.
    """

    folder: Path
    content: Mapping[str, Any]
    was_there: bool = False


def convert(
    converter: Converter,
    source: Path,
    raw_root: Path,
    dataset_id: int | None = None,
    num_processes: int = 1,
    show_progress: bool = True,
) -> Report:
    """Convert a download; go on where an earlier run of the same conversion stopped.

    Args:
        converter: The dataset.
        source: The download, in the layout that the converter describes.
        raw_root: nnU-Net's raw folder; made if it is missing.
        dataset_id: None takes the converter's default.
        num_processes: 1 works in this process.
        show_progress: Show a bar over the cases.

    Raises:
        ConversionError: The input is not this dataset, its id is taken, the output folder cannot be made, or no case
            can be converted.
    """
    if not source.is_dir():
        raise ConversionError(
            f"The input folder {source} does not exist. Give the downloaded {converter.name} with -i."
        )
    if converter.specialise is not None:
        with _explaining(converter):
            converter = converter.specialise(converter, source)
    folder = _folder(converter, raw_root, dataset_id)
    report = _begun(converter, source, folder)
    if report["finished"]:
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)  # of a run killed at its very end
        return Report(folder, report, was_there=True)
    with _explaining(converter):
        found = list(converter.find(source))
    cases = [entry for entry in found if isinstance(entry, Case)]
    written = _written_before(folder)
    _check_names([case.name for case in cases], written, source)
    try:
        (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(
            f"{folder} cannot be made ({error}). Give a folder that can be written to with -o."
        ) from error
    write_json(folder / REPORT_FILE, report)
    left_out = [entry for entry in found if isinstance(entry, LeftOut)]
    remaining = [case for case in cases if case.name not in written]
    for name, outcome in _run(converter, folder, remaining, num_processes, len(cases), show_progress):
        if isinstance(outcome, LeftOut):
            left_out.append(outcome)
        else:
            written[name] = outcome
    done = [case for case in cases if case.name in written]
    if not any(case.training for case in done):
        reasons = "\n".join(f"  {entry.name}: {entry.why}" for entry in left_out[:5])
        raise ConversionError(f"No training case of {source} could be converted:\n{reasons}")
    write_description(converter, folder, done, {name: own.boxes for name, own in written.items()})
    report = {
        **report,
        "finished": True,
        "training_cases": sum(case.training for case in done),
        "test_cases": sum(not case.training for case in done),
        "left_out": [asdict(entry) for entry in sorted(left_out, key=lambda entry: entry.name)],
        "boxes_outside_image": {name: own.num_outside for name, own in sorted(written.items()) if own.num_outside},
    }
    write_json(folder / REPORT_FILE, report)
    shutil.rmtree(folder / WORK_FOLDER)
    return Report(folder, report)


@contextmanager
def _explaining(converter: Converter) -> Iterator[None]:
    """Say with an error how the download must look."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{error} {converter.name} must look like this:\n{converter.layout}") from error
    except (ValueError, KeyError) as error:
        raise ConversionError(
            f"The download has a value that is not understood ({error!r}). {converter.name} must look like this:\n"
            f"{converter.layout}"
        ) from error


def _folder(converter: Converter, raw_root: Path, dataset_id: int | None) -> Path:
    """The dataset's folder, of an id that no other dataset has."""
    number = converter.dataset_id if dataset_id is None else dataset_id
    if not 1 <= number <= 999:
        raise ConversionError(f"The dataset id {number} is not between 1 and 999. Give another one with -id.")
    name = f"Dataset{number:03d}_{converter.dataset_name}"
    here = [path.name for path in raw_root.glob(f"Dataset{number:03d}_*")]
    others = sorted({*here, *map(str, find_candidate_datasets(number))} - {name})
    if others:
        raise ConversionError(
            f"The id {number} belongs to {', '.join(others)}, which is left alone. Give another id with -id."
        )
    return raw_root / name


def _begun(converter: Converter, source: Path, folder: Path) -> dict[str, Any]:
    """The report of this conversion as far as it has come; a new one where there is no folder."""
    new = {
        "converter": converter.name,
        "title": converter.title,
        "licence": converter.licence,
        "citation": converter.citation,
        "url": converter.url,
        "source": str(source.resolve()),
        "finished": False,
    }
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return new
    file = folder / REPORT_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if before.get("converter") != converter.name or "finished" not in before:
        raise ConversionError(
            f"{folder} exists and was not made by nnUNetKD_convert {converter.name}; it is not overwritten. Give "
            f"another id with -id, or move it away."
        )
    if before.get("source") != new["source"]:
        raise ConversionError(
            f"{folder} was made from {before.get('source')}, not from {new['source']}; it is not overwritten. Give "
            f"that folder or another id with -id, or move the dataset away."
        )
    return before


def _check_names(names: Sequence[str], written: Collection[str], source: Path) -> None:
    counts = Counter(names)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ConversionError(
            f"{source} holds {repeated[0]} more than once. Leave one copy of the download in the folder."
        )
    gone = [name for name in written if name not in counts]
    if gone:
        raise ConversionError(
            f"{source} has changed since the conversion was begun: {gone[0]} is no longer there. Put it back, or move "
            f"the begun dataset away."
        )


def _written_before(folder: Path) -> dict[str, Written]:
    """The cases that an earlier run has written; the last line may be cut off."""
    file = folder / WORK_FOLDER / PROGRESS_FILE
    done: dict[str, Written] = {}
    if not file.is_file():
        return done
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        boxes = tuple(Box(label, tuple(edges)) for label, edges in entry["boxes"])
        done[entry["case"]] = Written(boxes, entry["num_outside"])
    return done


def _run(
    converter: Converter,
    folder: Path,
    cases: Sequence[Case],
    num_processes: int,
    num_all: int,
    show_progress: bool,
) -> Iterator[tuple[str, Written | LeftOut]]:
    """Write the cases; yield their names and boxes, or why they were left out, as they finish."""
    for name in ("imagesTr", "imagesTs") + (("labelsTr", "labelsTs") if converter.labels is not None else ()):
        (folder / name).mkdir(exist_ok=True)
    write = partial(write_case, converter, folder)
    progress = folder / WORK_FOLDER / PROGRESS_FILE
    bar = tqdm(total=num_all, initial=num_all - len(cases), desc=converter.name, disable=not show_progress)
    with progress.open("a", encoding="utf-8") as stream, bar:
        stream.write("\n")  # ends a line that a killed run has cut off
        for case, outcome in _outcomes(write, cases, num_processes):
            if not isinstance(outcome, LeftOut):
                boxes = [[box.label, box.edges] for box in outcome.boxes]
                line = {"case": case.name, "boxes": boxes, "num_outside": outcome.num_outside}
                stream.write(json.dumps(line) + "\n")
                stream.flush()
            bar.update()
            yield case.name, outcome
    for name in ("imagesTs", "labelsTs"):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _outcomes(
    write: partial[Written | LeftOut], cases: Sequence[Case], num_processes: int
) -> Iterator[tuple[Case, Written | LeftOut]]:
    if num_processes == 1 or len(cases) < 2:
        for case in cases:
            yield case, write(case)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(cases)), context) as pool:
        futures = {pool.submit(write, case): case for case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise ConversionError(
                "A worker process ended, perhaps because memory ran out. Run the command again with fewer processes "
                "(-np); it goes on where it stopped."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def write_case(converter: Converter, folder: Path, case: Case) -> Written | LeftOut:
    """Read, check and write one case: under a temporary name first, the segmentation last.

    Args:
        converter: The dataset.
        folder: The dataset.
        case: What to write.

    Returns:
        What is there now, or why it was left out.

    Raises:
        ConversionError: A file cannot be written.
    """
    side, ending = "Tr" if case.training else "Ts", converter.file_ending
    image_files = [f"images{side}/{case.name}_{index:04d}{ending}" for index in range(len(converter.channels))]
    label_file = f"labels{side}/{case.name}{ending}"
    try:
        read = case.load()
        loaded = checked(read, converter, case.labelled)
    except UNREADABLE as error:
        for relative in (*image_files, label_file):
            (folder / relative).unlink(missing_ok=True)  # of a killed run, before the download was changed
        text = _message(error)
        return LeftOut(case.name, text if isinstance(error, ConversionError) else f"cannot be read ({text})")
    parts = list(zip(image_files, loaded.images, strict=True))
    if loaded.segmentation is not None:
        parts.append((label_file, loaded.segmentation))
    for relative, image in parts:
        temporary = folder / WORK_FOLDER / relative.replace("/", "_")
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
            temporary.replace(folder / relative)
        except (RuntimeError, OSError) as error:
            raise ConversionError(
                f"{folder / relative} cannot be written ({_message(error)}). Is the disk full? Run the command again; "
                f"it goes on where it stopped."
            ) from error
    return Written(loaded.boxes, len(read.boxes) - len(loaded.boxes))


def _message(error: BaseException) -> str:
    """The message of an error in one line; of ITK's, the last, which holds it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Exception thrown in SimpleITK") else " ".join(lines)
