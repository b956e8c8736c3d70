"""A trained model folder as nnU-Net writes it: plans, dataset.json and one checkpoint per fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_kd.data.joint import JointDataset
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.settings import BLOCK
from nnunet_kd.teachers.checkpoint import check_joint_plans, load_checkpoint, model_folder, read_model_json

Fold = int | str


@dataclass(frozen=True)
class TrainedModel:
    """A model folder. ``files`` holds the checkpoint of each fold that is used; weights are read when asked for."""

    folder: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    files: dict[Fold, Path]

    @property
    def joint(self) -> JointDataset | None:
        """The joint dataset's description; None where the model is no joint teacher."""
        return JointDataset.from_plans(self.plans) if "members" in self.plans.get(BLOCK, {}) else None

    def load(self, fold: Fold) -> dict[str, Any]:
        """Read one fold's checkpoint to the CPU without executing anything in it.

        Raises:
            TeacherError: The file is corrupted, holds foreign code, or was trained under other joint plans.
        """
        checkpoint = load_checkpoint(self.files[fold])
        if self.joint is not None:
            check_joint_plans(self.files[fold], checkpoint, self.plans)
        return checkpoint


def open_model(
    folder: str | Path, folds: Sequence[Fold] | None = None, checkpoint: str = "checkpoint_final.pth"
) -> TrainedModel:
    """Find a model folder and the checkpoints of its folds.

    Args:
        folder: Path of the folder, or relative to nnUNet_results.
        folds: Numbers or "all"; None takes every numbered fold that has the checkpoint, or else ``fold_all``.
        checkpoint: File name in each fold's folder.

    Raises:
        NnUNetKDError: There is no such folder, or a fold has no such checkpoint; lists those that have it.
    """
    path = Path(folder).expanduser()
    path = path.resolve() if path.is_dir() else model_folder(str(folder))
    present = {_fold(file.parent.name): file for file in sorted(path.glob(f"fold_*/{checkpoint}"))}
    wanted = folds if folds is not None else [fold for fold in present if fold != "all"] or list(present)
    missing = [fold for fold in wanted if fold not in present]
    if missing or not wanted:
        others = sorted({file.name for file in path.glob("fold_*/checkpoint_*.pth")})
        raise NnUNetKDError(
            f"{path} has no {checkpoint} in {', '.join(f'fold_{fold}' for fold in missing) or 'any fold'}. Folds that "
            f"have it: {_listed(str(fold) for fold in present)}; checkpoints in this model: {_listed(others)}. Choose "
            f"folds with -f and the checkpoint with -chk, or train the missing fold."
        )
    plans, dataset_json = (read_model_json(path, name) for name in ("plans.json", "dataset.json"))
    return TrainedModel(path, plans, dataset_json, {fold: present[fold] for fold in wanted})


def _fold(name: str) -> Fold:
    number = name.removeprefix("fold_")
    return int(number) if number.isdigit() else number


def _listed(values: Any) -> str:
    return ", ".join(values) or "none"
