"""Read a trained model folder. A teacher may be a file from the internet, so nothing in it is executed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from numpy._core import multiarray

from nnunet_kd.data.joint import changes
from nnunet_kd.data.member import read_json
from nnunet_kd.errors import JointDatasetError, TeacherError

# plain numbers that nnU-Net's logger leaves in checkpoints; nothing here can run code
SAFE_GLOBALS: list[Any] = [
    np.dtype,
    np.ndarray,
    multiarray.scalar,
    multiarray._reconstruct,
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 named them
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "U1")},
]


def model_folder(model: str, fold: int | str | None = None) -> Path:
    """Absolute path of a model folder, given absolute or relative to nnUNet_results.

    Args:
        model: The folder.
        fold: That is wanted, for the message.

    Raises:
        TeacherError: There is no such folder.
    """
    path = Path(model).expanduser()
    folder = path if path.is_absolute() else Path(str(nnUNet_results)) / path
    if not folder.is_dir():
        raise TeacherError(f"There is no trained model in {folder}. {_how_to_train(folder, fold)}")
    return folder


def read_model_json(folder: Path, name: str) -> dict[str, Any]:
    """Read plans.json or dataset.json of a model folder; errors are TeacherErrors."""
    try:
        return read_json(folder / name, "A teacher is a model folder as nnU-Net writes it.")
    except JointDatasetError as error:
        raise TeacherError(str(error)) from error


def checkpoint_file(folder: Path, fold: int | str, checkpoint: str) -> Path:
    """Path of a fold's checkpoint.

    Raises:
        TeacherError: It does not exist; says which folds do, and the command that trains it.
    """
    file = folder / f"fold_{fold}" / checkpoint
    if not file.is_file():
        present = sorted(path.parent.name for path in folder.glob(f"fold_*/{checkpoint}"))
        raise TeacherError(
            f"The teacher's checkpoint {file} does not exist (with {checkpoint}: {', '.join(present) or 'no fold'}). "
            f"{_how_to_train(folder, fold)}"
        )
    return file


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU with ``weights_only=True``.

    Raises:
        TeacherError: Truncated or corrupted, or it would run code.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise _unreadable(file, error) from error
        raise TeacherError(
            f"{file} holds {foreign.group(1)}, which is neither weights nor plain values; loading it could run foreign "
            f"code, so it was not loaded. Get the checkpoint from a source that you trust, or write it again with "
            f"nnU-Net."
        ) from error
    except Exception as error:  # a broken pickle can end in almost any exception
        raise _unreadable(file, error) from error
    missing = {"network_weights", "init_args", "trainer_name"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise TeacherError(f"{file} is no nnU-Net checkpoint: it lacks {', '.join(sorted(missing))}.")
    return checkpoint


def check_joint_plans(file: Path, checkpoint: dict[str, Any], plans: dict[str, Any]) -> None:
    """Refuse a joint teacher's fold that was trained under other joint plans than its folder's plans.json.

    Raises:
        TeacherError: Its channels, heads, members or architecture are others.
    """
    trained = checkpoint["init_args"].get("plans")
    changed = [] if trained is None else changes(trained, plans, checkpoint["init_args"]["configuration"])
    if changed:
        raise TeacherError(
            f"{file} was trained under other joint plans than {file.parents[1] / 'plans.json'} ({', '.join(changed)} "
            f"changed), so its channels and heads would be mixed up. Train this fold again, or put back the plans.json "
            f"of its training."
        )


def _unreadable(file: Path, error: Exception) -> TeacherError:
    return TeacherError(
        f"{file} cannot be read; it is truncated or corrupted ({type(error).__name__}). Copy it again, or train that "
        f"fold again."
    )


def _how_to_train(folder: Path, fold: int | str | None = None) -> str:
    parts = folder.name.split("__")
    if len(parts) != 3 or not folder.parent.name.startswith("Dataset"):
        return "Give the path of a model folder (the one that holds plans.json and fold_0)."
    trainer, plans, configuration = parts
    which = "FOLD" if fold is None else fold
    return f"Train it: nnUNetv2_train {folder.parent.name[7:10]} {configuration} {which} -tr {trainer} -p {plans}"
