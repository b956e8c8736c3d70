"""Images without labels, preprocessed with a dataset's own plans into a folder of ours (our design).

The files are nnU-Net's own. A case's ``.pkl`` is written last, so a case is finished when it is there, and it records
what the case was made of.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from filelock import FileLock, Timeout
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_kd.data.member import Member
from nnunet_kd.errors import UnlabeledError
from nnunet_kd.settings import BLOCK

FOLDER = "nnunet_kd_unlabeled"
RECORD = "nnunet_kd_unlabeled"  # the key of a case's properties that says what the case was made of
TEMPORARY = ".temporary"

# what a preprocessed image depends on; other plans with these are as good (residual encoder, smaller student)
PLANS_KEYS = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
# stock nnU-Net's defaults of nnUNetv2_preprocess
NUM_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
NUM_PROCESSES_OTHERS = 4

MAX_UNIT_RATIO = 20.0  # of the voxel sides' geometric means: 1000 between two units, below 10 between protocols
MAX_SHIFT = 0.1  # of a voxel, between the origins of a case's channels
MAX_TURN = 1e-3  # of the direction cosines: half a voxel at the end of 500

Files = Mapping[int, Path]
"""The image files of a case, by the channel number in their name."""


@dataclass(frozen=True)
class Added:
    """What was done for one configuration: numbers of cases, and the folder where they lie."""

    member: Member
    folder: Path
    num_added: int
    num_skipped: int


@dataclass(frozen=True)
class _Header:
    """What an image file says about itself.

    Attributes:
        num_axes: 2 or 3 as stored; None from readers that know one number only.
        num_channels: In this one file.
        size: Voxels per axis of the array, ``(z, y, x)`` or ``(y, x)``.
        spacing: Three voxel sides as nnU-Net reads them (of 2D, the first is a made-up large one), usually in mm.
        origin: Of the first voxel; empty where the format has none.
        direction: Cosines; empty where the format has none.
    """

    num_axes: int | None
    num_channels: int
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]


# --- what is there ----------------------------------------------------------------------------------------------------
def added_folder(member: Member) -> Path:
    """Where the preprocessed images without labels of a dataset's configuration lie; it may not exist yet."""
    return member.base_folder / FOLDER / member.configuration_manager.data_identifier


def added_cases(member: Member) -> list[str]:
    """The finished cases without labels, sorted; none if there are none."""
    return sorted(file.name.removesuffix(".pkl") for file in added_folder(member).glob("*.pkl"))


def check_added(member: Member) -> None:
    """Check that the added cases still fit the dataset; nothing is read but their properties.

    Raises:
        UnlabeledError: Cases were preprocessed with other plans, are labelled by now, or have damaged properties.
    """
    problems = list(_outdated(member, _read_records(member)))
    if problems:
        raise UnlabeledError(f"The images that were added to {member.name} no longer fit:\n  " + "\n  ".join(problems))


def add_unlabeled(
    members: Sequence[Member], folder: Path, num_processes: int | None = None, show_progress: bool = True
) -> list[Added]:
    """Preprocess the images in a folder with the plans of a dataset, as stock nnU-Net preprocesses test images.

    Everything is checked before anything is written. Finished cases are skipped, so a killed run goes on.

    Args:
        members: One dataset and plans; one entry per configuration. Those that share their data count once.
        folder: Files ``CASE_0000`` and on, with the dataset's file ending.
        num_processes: None takes nnU-Net's defaults.
        show_progress: Show bars.

    Returns:
        One entry per folder that was filled, in the order of ``members``.

    Raises:
        UnlabeledError: Images are missing or cannot be added (lists all problems), or preprocessing failed.
        JointDatasetError: Plans, configuration or the preprocessed labelled cases are missing.
        NotImplementedError: A configuration is the second stage of a cascade.
    """
    for member in members:
        _check_configuration(member)
    targets: dict[Path, Member] = {}
    for member in members:
        targets.setdefault(added_folder(member), member)
    records = {target: _read_records(member) for target, member in targets.items()}
    problems = [line for target, member in targets.items() for line in _outdated(member, records[target])]
    cases = _find_cases(folder, members[0], problems)
    problems += _check_cases(cases, list(targets.values()), records, show_progress)
    if problems:
        raise UnlabeledError(f"The images in {folder} cannot be added:\n  " + "\n  ".join(problems))

    report = []
    for target, member in targets.items():
        missing = {case: files for case, files in cases.items() if case not in records[target]}
        processes = num_processes or NUM_PROCESSES.get(member.configuration, NUM_PROCESSES_OTHERS)
        if missing:
            _preprocess(member, target, missing, processes, show_progress)
        report.append(Added(member, target, len(missing), len(cases) - len(missing)))
    return report


def _check_configuration(member: Member) -> None:
    if "members" in (member.dataset_json.get(BLOCK) or {}):
        raise UnlabeledError(
            f"{member.name} is a joint dataset and has no images of its own. Add the images to one of its members."
        )
    previous_stage = member.configuration_manager.previous_stage_name
    if previous_stage is not None:
        raise NotImplementedError(
            f"{member.configuration} of {member.name} is the second stage of a cascade and also needs the labels that "
            f"{previous_stage} predicts; images without labels cannot be added to it. Choose {previous_stage} or "
            f"another configuration with -c."
        )


def _read_records(member: Member) -> dict[str, dict[str, Any]]:
    """Finished case to what it was made of."""
    folder = added_folder(member)
    records = {}
    for case in added_cases(member):
        try:
            records[case] = load_pickle(str(folder / f"{case}.pkl"))[RECORD]
        except Exception as error:  # of a damaged pickle there is no telling
            raise UnlabeledError(
                f"{folder / f'{case}.pkl'} is damaged, or was not written by nnUNetKD_add_unlabeled "
                f"({_reason(error)}). Delete it and add the image again."
            ) from error
    return records


def _outdated(member: Member, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    folder, current = added_folder(member), _preparation(member)
    other = [case for case, record in records.items() if record["preparation"] != current]
    if other:
        then = records[other[0]]["preparation"]
        changed = ", ".join(key for key in current if then.get(key) != current[key])
        yield (
            f"{folder} holds {len(other)} cases ({_some(other)}) that were preprocessed with other plans than "
            f"{member.plans_name} are now ({changed} differ). Delete this folder and add all images again"
        )
    labeled = sorted(set(records) & set(member.identifiers))
    if labeled:
        yield (
            f"{folder} holds {_some(labeled)}, by now labelled in {member.name}: they may be validated on. Delete "
            f"their files in this folder"
        )


def _preparation(member: Member) -> dict[str, Any]:
    configuration = member.configuration_manager.configuration
    return {
        "channels": list(member.channel_names),
        **{key: member.plans.get(key) for key in PLANS_KEYS},
        **{key: configuration.get(key) for key in CONFIGURATION_KEYS},
    }


# --- checks, before anything is written -------------------------------------------------------------------------------
def _find_cases(folder: Path, member: Member, problems: list[str]) -> dict[str, Files]:
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


def _check_cases(
    cases: Mapping[str, Files],
    members: Sequence[Member],
    records: Mapping[Path, Mapping[str, Mapping[str, Any]]],
    show_progress: bool,
) -> list[str]:
    if not cases:
        return []
    member = members[0]
    labeled_files = _labeled_files(member)
    labeled = {*labeled_files.values(), *(case for own in members for case in own.identifiers)}
    copied_file = _copy_finder(labeled_files, member.plans_manager.image_reader_writer_class)
    num_axes = _num_axes(member.dataset_class(str(member.data_folder)).load_case(member.identifiers[0])[3])
    problems: list[str] = []
    for case, files in tqdm(cases.items(), desc="Checking images", disable=not show_progress):
        copies = [(file, labeled_file) for file in files.values() if (labeled_file := copied_file(file)) is not None]
        if case in labeled:
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
            problems += _changes(case, _sources(case, files, member), finished)
            if len(finished) < len(members):
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


def _sources(case: str, files: Files, member: Member) -> list[Path]:
    """All files that nnU-Net reads for a case."""
    sources = list(files.values())
    spacing = sources[0].with_name(f"{case}.json")
    if issubclass(member.plans_manager.image_reader_writer_class, Tiff3DIO) and spacing.is_file():
        sources.append(spacing)
    return sources


def _source_record(file: Path) -> dict[str, Any]:
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
    headers: dict[int, _Header] = {}
    for channel, file in files.items():
        try:
            headers[channel] = _read_header(file, member.plans_manager.image_reader_writer_class)
        except Exception as error:  # each reader has its own, AssertionError among them
            yield f"{file.name} cannot be read ({_reason(error)}). Repair it, or move the case away"
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


def _unfit_channels(case: str, files: Files, headers: Mapping[int, _Header], member: Member) -> Iterator[str]:
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


def _unequal_channels(file: Path, header: _Header, other_file: Path, other: _Header) -> Iterator[str]:
    """nnU-Net raises without a message, or only prints a warning."""
    shift = MAX_SHIFT * min(header.spacing)
    tolerances = {"spacing": (1e-5, 1e-8), "origin": (0.0, shift), "direction": (0.0, MAX_TURN)}  # relative, absolute
    different = [] if header.size == other.size else ["size"]
    for name, (relative, absolute) in tolerances.items():
        if not np.allclose(getattr(header, name), getattr(other, name), rtol=relative, atol=absolute):
            different.append(name)
    if different:
        values = "; ".join(
            f"{name} {_numbers(getattr(header, name))} and {_numbers(getattr(other, name))}" for name in different
        )
        yield (
            f"{file.name} and {other_file.name} are channels of one case and differ in {values}. Resample one onto the "
            f"other, or move the case away"
        )


def _unfit_spacing(file: Path, header: _Header, member: Member) -> Iterator[str]:
    # the geometric mean does not ask for the order of the axes, which plans transpose
    median = member.plans_manager.original_median_spacing_after_transp
    if not all(0 < side < np.inf for side in header.spacing):
        yield f"{file.name} has the spacing {_numbers(header.spacing)}. Correct its header"
        return
    ratio = float(np.exp(np.mean(np.log(header.spacing)) - np.mean(np.log(median))))
    if not 1 / MAX_UNIT_RATIO < ratio < MAX_UNIT_RATIO:
        unit = "metres" if ratio < 1 else "micrometres"
        yield (
            f"{file.name} has the spacing {_numbers(header.spacing)}, {ratio:.3g} times that of {member.name} (median "
            f"{_numbers(median)}). It seems to be in other units ({unit}?) or not set. Correct its header"
        )


# --- headers ----------------------------------------------------------------------------------------------------------
def _read_header(file: Path, reader: type[BaseReaderWriter]) -> _Header:
    if reader is SimpleITKIO:
        return _read_itk_header(file)
    with contextlib.redirect_stdout(io.StringIO()):  # of tif, a warning about the spacing that preprocessing repeats
        image, properties = reader().read_images((str(file),))
    itk = properties.get("sitk_stuff", {"origin": (), "direction": ()})
    origin, direction = np.array(itk["origin"], dtype=float), np.array(itk["direction"], dtype=float)
    if "nibabel_stuff" in properties:
        stored = properties["nibabel_stuff"]
        affine = stored.get("reoriented_affine", stored["original_affine"])
        origin, direction = affine[:3, 3], affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    spacing = tuple(float(side) for side in properties["spacing"])
    return _Header(_num_axes(properties), image.shape[0], image.shape[1:], spacing, origin, direction)


def _read_itk_header(file: Path) -> _Header:
    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    header.ReadImageInformation()
    stored_axes = header.GetDimension()
    num_axes = min(stored_axes, 3)  # nnU-Net takes the fourth axis for channels
    channels_of_axis = header.GetSize()[3] if stored_axes > 3 else 1
    sides = [abs(side) for side in reversed(header.GetSpacing()[:num_axes])]
    spacing = sides if num_axes == 3 else [999 * max(sides), *sides]
    direction = np.array(header.GetDirection()).reshape(stored_axes, stored_axes)[:num_axes, :num_axes]
    return _Header(
        num_axes,
        int(channels_of_axis * header.GetNumberOfComponents()),
        tuple(reversed(header.GetSize()[:num_axes])),
        tuple(spacing),
        np.array(header.GetOrigin()[:num_axes]),
        direction,
    )


def _num_axes(properties: Mapping[str, Any]) -> int | None:
    """2 or 3 as stored, from nnU-Net's properties of an image; None from readers that know one number only."""
    itk = properties.get("sitk_stuff")
    return None if itk is None else min(len(itk["spacing"]), 3)


# --- preprocessing ----------------------------------------------------------------------------------------------------
def _preprocess(
    member: Member, folder: Path, cases: Mapping[str, Files], num_processes: int, show_progress: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(folder / TEMPORARY, ignore_errors=True)  # what a killed run left
            failures = _run_processes(member, folder, cases, num_processes, show_progress)
            shutil.rmtree(folder / TEMPORARY, ignore_errors=True)
    except Timeout as error:
        raise UnlabeledError(
            f"Another nnUNetKD_add_unlabeled is adding images to {folder}. Wait until it has ended."
        ) from error
    if failures:
        lines = [
            f"{case} ({', '.join(file.name for file in cases[case].values())}): {failures[case]}"
            for case in sorted(failures)
        ]
        raise UnlabeledError(
            f"{len(failures)} of {len(cases)} cases could not be preprocessed for {member.configuration} of "
            f"{member.name}:\n  " + "\n  ".join(lines) + "\nRepair these images or move them away, and run the same "
            "command again; finished cases are skipped."
        )


def _run_processes(
    member: Member, folder: Path, cases: Mapping[str, Files], num_processes: int, show_progress: bool
) -> dict[str, str]:
    """Preprocess all cases and return what went wrong, by case."""
    failures = {}
    spawn = multiprocessing.get_context("spawn")  # as nnU-Net does
    pool = ProcessPoolExecutor(min(num_processes, len(cases)), mp_context=spawn, initializer=_end_with_parent)
    try:
        futures = {pool.submit(_preprocess_case, member, folder, case, files): case for case, files in cases.items()}
        unfinished = dict.fromkeys(cases)
        bar = tqdm(
            as_completed(futures),
            total=len(cases),
            desc=f"Preprocessing {member.configuration}",
            disable=not show_progress,
        )
        for future in bar:
            case = futures[future]
            try:
                future.result()
            except BrokenProcessPool as error:
                in_work = list(unfinished)[:num_processes]
                raise UnlabeledError(
                    f"A process was killed while it preprocessed one of {', '.join(in_work)} for "
                    f"{member.configuration} of {member.name}, most likely because memory ran out. Run the same "
                    f"command again with a smaller -np (it was {num_processes}); finished cases are skipped."
                ) from error
            except Exception as error:
                failures[case] = _reason(error)
            del unfinished[case]
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def _end_with_parent() -> None:
    """In a worker: end when the command is killed; the pool's workers would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _preprocess_case(member: Member, folder: Path, case: str, files: Files) -> None:
    """In a worker: preprocess a case aside, then move it to its place, the properties last."""
    aside = folder / TEMPORARY / f"{case}.{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        for file in files.values():
            _check_whole(file)
        record = {
            "sources": [_source_record(file) for file in _sources(case, files, member)],
            "preparation": _preparation(member),
        }
        preprocessor = member.configuration_manager.preprocessor_class(verbose=False)
        preprocessor.run_case_save(
            str(aside / case),
            [str(file) for file in files.values()],
            None,  # as of test images
            member.plans_manager,
            member.configuration_manager,
            member.dataset_json,
        )
        image, _, _, properties = infer_dataset_class(str(aside))(str(aside)).load_case(case)
        if not np.isfinite(image[:]).all():
            raise ValueError("the image has values that are not finite (NaN or infinite)")
        write_pickle({**properties, "class_locations": {}, RECORD: record}, str(aside / f"{case}.pkl"))
        for file in sorted(aside.iterdir(), key=lambda file: file.suffix == ".pkl"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_whole(file: Path) -> None:
    """Raise where a compressed file breaks off: ITK fills what is missing with zeros and says nothing."""
    if file.suffix == ".gz":
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass


# --- words ------------------------------------------------------------------------------------------------------------
def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.6g}" for value in np.ravel(np.array(values)))
