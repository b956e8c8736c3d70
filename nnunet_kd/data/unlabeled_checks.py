"""What is checked of images without labels before any is preprocessed (our design).

They must be like the dataset's own, and none of them may be one of its labelled cases.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_kd.data.image_headers import Header, num_axes_of, read_header
from nnunet_kd.data.member import Member

MAX_UNIT_RATIO = 20.0  # of the voxel sides' geometric means: 1000 between two units, below 10 between protocols
MAX_SHIFT = 0.1  # of a voxel, between the origins of a case's channels
MAX_TURN = 1e-3  # of the direction cosines: half a voxel at the end of 500

Files = Mapping[int, Path]
"""The image files of a case, by the channel number in their name."""


def find_cases(folder: Path, member: Member, problems: list[str]) -> dict[str, Files]:
    """The images in ``folder`` by case, sorted. Not nnU-Net's list, which cuts off what it takes for the channel."""
    ending = member.dataset_json["file_ending"]
    if not folder.is_dir():
        problems.append(f"{folder} is not a folder. Name the folder of the images with -i")
        return {}
    names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    other_endings = tuple(own for reader in LIST_OF_IO_CLASSES for own in reader.supported_file_endings)
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    refused = []
    for name in names:
        match = re.fullmatch(r"(.+)_(\d{4})" + re.escape(ending), name)
        if not (folder / name).is_file():
            refused.append(f"{name} is a link to nothing. Correct it, or move it away")
        elif match is not None:
            cases[match[1]][int(match[2])] = folder / name
        elif name.endswith(ending):
            refused.append(f"{name} is not named CASE_0000{ending}, as training images are. Rename it")
        elif name.endswith(other_endings):
            refused.append(f"{name} does not end with {ending}. Convert it, or move it away")
    if not cases:
        endings = sorted({_ending(name) for name in names})
        there = f"the files there end with {', '.join(endings)}" if endings else "the folder is empty"
        problems.append(
            f"no image is named CASE_0000{ending}, as the training images of {member.name} are ({there}). Convert or "
            f"rename the images, or name another folder with -i"
        )
        return {}
    problems += refused
    problems += [
        f"{case}: nnU-Net takes a name that ends with _seg for a segmentation. Rename the case"
        for case in cases
        if case.endswith("_seg")
    ]
    return {case: dict(sorted(files.items())) for case, files in cases.items()}


def _ending(name: str) -> str:
    after_channel = re.search(r"_\d{4}(\..+)$", name)
    return after_channel[1] if after_channel else Path(name).suffix or "no ending"


def check_cases(
    cases: Mapping[str, Files],
    members: Sequence[Member],
    records: Mapping[Path, Mapping[str, Mapping[str, Any]]],
    show_progress: bool,
    own_names: bool = True,
) -> list[str]:
    """What keeps the cases from being added to configurations of one dataset.

    Args:
        cases: See :func:`find_cases`.
        members: One dataset and plans, one entry per configuration.
        records: Per folder, finished case to what it was made of.
        show_progress: Show a bar.
        own_names: Whether a case that has the name of a labelled one is that one.
    """
    if not cases:
        return []
    member = members[0]
    labeled_files = _labeled_files(member)
    labeled = {*labeled_files.values(), *(case for own in members for case in own.identifiers)}
    copied_file = _copy_finder(labeled_files, member.plans_manager.image_reader_writer_class)
    num_axes = num_axes_of(member.dataset_class(str(member.data_folder)).load_case(member.identifiers[0])[3])
    problems: list[str] = []
    for case, files in tqdm(cases.items(), desc="Checking images", disable=not show_progress):
        copies = [(file, labeled_file) for file in files.values() if (labeled_file := copied_file(file)) is not None]
        if own_names and case in labeled:
            problems.append(
                f"{case} is a labelled case of {member.name} and may be validated on. Move it away; if it is another "
                f"image, rename it"
            )
        elif copies:
            problems.append(
                f"{copies[0][0].name} is a copy of {copies[0][1]}, whose case is labelled and may be validated on. "
                f"Move {case} away"
            )
        else:
            finished = {folder: own[case] for folder, own in records.items() if case in own}
            problems += _changes(case, sources_of(case, files, member), finished)
            if not finished:  # else it was checked then
                problems += _unfit(case, files, member, num_axes)
    return problems


def _labeled_files(member: Member) -> dict[Path, str]:
    """The training images in nnUNet_raw, if that is there, and the case of each."""
    if not nnUNet_raw.is_set():
        return {}
    folder = Path(str(nnUNet_raw)) / member.name
    if "dataset" in member.dataset_json:
        listed = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(member.dataset_json))
        files = {Path(file): str(case) for case, own in listed.items() for file in own["images"]}
    else:
        ending = member.dataset_json["file_ending"]
        files = {file: file.name[: -len(f"_0000{ending}")] for file in (folder / "imagesTr").glob(f"*{ending}")}
    return {file: case for file, case in files.items() if file.is_file()}


def _copy_finder(files: Iterable[Path], reader: type[BaseReaderWriter]) -> Callable[[Path], Path | None]:
    """Find the training image that a file is a copy of. Only files of equal size are read, each once."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        by_size[file.stat().st_size].append(file)
    hash_of = functools.cache(_sha256)

    def find(file: Path) -> Path | None:
        alike = by_size.get(file.stat().st_size, [])
        found = next((other for other in alike if hash_of(file) == hash_of(other)), None)
        # an empty channel stands for a missing one and is the same file in many cases
        return None if found is None or _is_blank(found, reader) else found

    return find


def _is_blank(file: Path, reader: type[BaseReaderWriter]) -> bool:
    image, _ = reader().read_images((str(file),))
    return bool(image.min() == image.max())


def sources_of(case: str, files: Files, member: Member) -> list[Path]:
    """All files that nnU-Net reads for a case."""
    sources = list(files.values())
    spacing = sources[0].with_name(f"{case}.json")
    if issubclass(member.plans_manager.image_reader_writer_class, Tiff3DIO) and spacing.is_file():
        sources.append(spacing)
    return sources


def source_record(file: Path) -> dict[str, Any]:
    """What is remembered of a file: path, size, time and hash."""
    stat = file.stat()
    return {
        "path": str(file.absolute()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": _sha256(file),
    }


def _changes(case: str, sources: Sequence[Path], finished: Mapping[Path, Mapping[str, Any]]) -> Iterator[str]:
    """Finished cases whose image is not the one that was added."""
    for folder, record in finished.items():
        recorded = record["sources"]
        if len(sources) != len(recorded) or not all(map(_is_same, sources, recorded)):
            yield (
                f"{case} was added before from {recorded[0]['path']}, and this image is another one. If both are "
                f"needed, rename the case; otherwise delete {folder / case}.pkl to add it anew"
            )


def _is_same(file: Path, recorded: Mapping[str, Any]) -> bool:
    """Whether a file has the recorded content; it is read only where path or time differ."""
    stat = file.stat()
    if stat.st_size != recorded["size"]:
        return False
    untouched = (str(file.absolute()), stat.st_mtime_ns) == (recorded["path"], recorded["mtime_ns"])
    return untouched or _sha256(file) == recorded["sha256"]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unfit(case: str, files: Files, member: Member, num_axes: int | None) -> Iterator[str]:
    """What keeps a case from being preprocessed as the dataset's own cases are."""
    headers: dict[int, Header] = {}
    for channel, file in files.items():
        try:
            headers[channel] = read_header(file, member.plans_manager.image_reader_writer_class)
        except Exception as error:  # each reader has its own, AssertionError among them
            yield f"{file.name} cannot be read ({reason_of(error)}). Repair it, or move the case away"
    if len(headers) < len(files):
        return
    yield from _unfit_channels(case, files, headers, member)
    other_axes = [channel for channel, header in headers.items() if header.num_axes != num_axes]
    for channel in other_axes:
        yield (
            f"{files[channel].name} has {headers[channel].num_axes} dimensions, the images of {member.name} have "
            f"{num_axes}. Convert it, or move the case away"
        )
    if not other_axes:
        first, *others = headers
        for channel in others:
            yield from _unequal_channels(files[first], headers[first], files[channel], headers[channel])
        yield from _unfit_spacing(files[first], headers[first], member)


def _unfit_channels(case: str, files: Files, headers: Mapping[int, Header], member: Member) -> Iterator[str]:
    names, ending = member.channel_names, member.dataset_json["file_ending"]
    num_channels = sum(header.num_channels for header in headers.values())
    if num_channels == len(names) and list(files) == list(range(len(files))):
        return
    if num_channels > len(files):  # colours, or a fourth axis
        yield (
            f"{case} has {num_channels} channels in the files {', '.join(file.name for file in files.values())}; "
            f"{member.name} has {len(names)} ({', '.join(names)}), in files that are numbered from _0000 on"
        )
        return
    missing = [f"{name} ({case}_{channel:04d}{ending})" for channel, name in enumerate(names) if channel not in files]
    further = [file.name for channel, file in files.items() if channel >= len(names)]
    if missing:
        yield f"{case} lacks the channels {', '.join(missing)}. Put them there, or move the case away"
    if further:
        yield (
            f"{', '.join(further)}: {member.name} has no such channel; it has {', '.join(names)}, numbered from _0000 "
            f"on. Move the files away"
        )


def _unequal_channels(file: Path, header: Header, other_file: Path, other: Header) -> Iterator[str]:
    """nnU-Net raises without a message, or only prints a warning."""
    shift = MAX_SHIFT * min(header.spacing)
    tolerances = {"spacing": (1e-5, 1e-8), "origin": (0.0, shift), "direction": (0.0, MAX_TURN)}  # relative, absolute
    different = [] if header.size == other.size else ["size"]
    for name, (relative, absolute) in tolerances.items():
        if not np.allclose(getattr(header, name), getattr(other, name), rtol=relative, atol=absolute):
            different.append(name)
    if different:
        values = "; ".join(
            f"{name} {numbers(getattr(header, name))} and {numbers(getattr(other, name))}" for name in different
        )
        yield (
            f"{file.name} and {other_file.name} are channels of one case and differ in {values}. Resample one onto the "
            f"other, or move the case away"
        )


def _unfit_spacing(file: Path, header: Header, member: Member) -> Iterator[str]:
    # the geometric mean does not ask for the order of the axes, which plans transpose
    median = member.plans_manager.original_median_spacing_after_transp
    if not all(0 < side < np.inf for side in header.spacing):
        yield f"{file.name} has the spacing {numbers(header.spacing)}. Correct its header"
        return
    ratio = float(np.exp(np.mean(np.log(header.spacing)) - np.mean(np.log(median))))
    if not 1 / MAX_UNIT_RATIO < ratio < MAX_UNIT_RATIO:
        unit = "metres" if ratio < 1 else "micrometres"
        yield (
            f"{file.name} has the spacing {numbers(header.spacing)}, {ratio:.3g} times that of {member.name} (median "
            f"{numbers(median)}). It seems to be in other units ({unit}?) or not set. Correct its header"
        )


def reason_of(error: Exception) -> str:
    """The last line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def numbers(values: Iterable[float]) -> str:
    """1 x 2 x 3."""
    return " x ".join(f"{value:.6g}" for value in np.ravel(np.array(values)))
