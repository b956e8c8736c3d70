"""Images without labels, preprocessed with a dataset's own plans into a folder of ours (our design).

The files are nnU-Net's own. A case's ``.pkl`` is written last, so a case is finished when it is there, and it records
what the case was made of.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from filelock import FileLock, Timeout
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tqdm import tqdm

from nnunet_kd.data.member import Member
from nnunet_kd.data.unlabeled_checks import (
    Files,
    check_cases,
    find_cases,
    reason_of,
    some_of,
    source_record,
    sources_of,
)
from nnunet_kd.errors import UnlabeledError
from nnunet_kd.settings import BLOCK

FOLDER = "nnunet_kd_unlabeled"  # the collection of a dataset's own images without labels
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


@dataclass(frozen=True)
class Added:
    """What was done for one configuration: numbers of cases, and the folder where they lie."""

    member: Member
    folder: Path
    num_added: int
    num_skipped: int


def added_folder(member: Member, collection: str = FOLDER) -> Path:
    """Where the preprocessed images of a collection for a dataset's configuration lie; it may not exist yet."""
    return member.base_folder / collection / member.configuration_manager.data_identifier


def added_cases(member: Member, collection: str = FOLDER) -> list[str]:
    """The finished cases of a collection, sorted; none if there are none."""
    return sorted(file.name.removesuffix(".pkl") for file in added_folder(member, collection).glob("*.pkl"))


def check_added(member: Member, collection: str = FOLDER) -> None:
    """Check that the added cases still fit the dataset; nothing is read but their properties.

    Raises:
        UnlabeledError: Cases were preprocessed with other plans, are labelled by now, or have damaged properties.
    """
    problems = list(_outdated(member, _read_records(member, collection), collection))
    if problems:
        raise UnlabeledError(f"The images that were added to {member.name} no longer fit:\n  " + "\n  ".join(problems))


def add_unlabeled(
    members: Sequence[Member],
    folder: Path,
    num_processes: int | None = None,
    show_progress: bool = True,
    collection: str = FOLDER,
) -> list[Added]:
    """Preprocess the images in a folder with the plans of a dataset, as stock nnU-Net preprocesses test images.

    Everything is checked before anything is written. Finished cases are skipped, so a killed run goes on.

    Args:
        members: One dataset and plans; one entry per configuration. Those that share their data count once.
        folder: Files ``CASE_0000`` and on, with the dataset's file ending.
        num_processes: None takes nnU-Net's defaults.
        show_progress: Show bars.
        collection: Folder beside the dataset's preprocessed data. The images of another one than the default belong to
            another dataset, so that their cases may have the names of labelled ones.

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
        targets.setdefault(added_folder(member, collection), member)
    records = {target: _read_records(member, collection) for target, member in targets.items()}
    problems = [line for target, member in targets.items() for line in _outdated(member, records[target], collection)]
    cases = find_cases(folder, members[0], problems)
    problems += check_cases(cases, list(targets.values()), records, show_progress, own_names=collection == FOLDER)
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


def _read_records(member: Member, collection: str) -> dict[str, dict[str, Any]]:
    """Finished case to what it was made of."""
    folder = added_folder(member, collection)
    records = {}
    for case in added_cases(member, collection):
        try:
            records[case] = load_pickle(str(folder / f"{case}.pkl"))[RECORD]
        except Exception as error:  # of a damaged pickle there is no telling
            raise UnlabeledError(
                f"{folder / f'{case}.pkl'} is damaged, or was not written by nnunet_kd ({reason_of(error)}). Delete "
                f"it and run the command again that adds this image."
            ) from error
    return records


def _outdated(member: Member, records: Mapping[str, Mapping[str, Any]], collection: str) -> Iterator[str]:
    folder, current = added_folder(member, collection), _preparation(member)
    other = [case for case, record in records.items() if record["preparation"] != current]
    if other:
        then = records[other[0]]["preparation"]
        changed = ", ".join(key for key in current if then.get(key) != current[key])
        yield (
            f"{folder} holds {len(other)} cases ({some_of(other)}) that were preprocessed with other plans than "
            f"{member.plans_name} are now ({changed} differ). Delete this folder and add all images again"
        )
    labeled = sorted(set(records) & set(member.identifiers))
    if labeled and collection == FOLDER:
        yield (
            f"{folder} holds {some_of(labeled)}, by now labelled in {member.name}: they may be validated on. Delete "
            f"their files in this folder"
        )


def _preparation(member: Member) -> dict[str, Any]:
    configuration = member.configuration_manager.configuration
    return {
        "channels": list(member.channel_names),
        **{key: member.plans.get(key) for key in PLANS_KEYS},
        **{key: configuration.get(key) for key in CONFIGURATION_KEYS},
    }


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
            f"Another process is adding images to {folder}. Wait until it has ended."
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
                failures[case] = reason_of(error)
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
            "sources": [source_record(file) for file in sources_of(case, files, member)],
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
