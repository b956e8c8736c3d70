"""Mean intensity of each class in each whole preprocessed case, measured once and kept on disk (our design)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from nnunet_kd.data.member import Member
from nnunet_kd.files import write_json

FOLDER = "nnunet_kd_class_means"


class CaseMeans:
    """Table of a dataset's class means, looked up by case.

    Args:
        means: Case to [channels][classes], classes in the order of ``LabelSpace.label_values``.
    """

    def __init__(self, means: dict[str, list[list[float]]]) -> None:
        self.row_of = {case: row for row, case in enumerate(means)}
        self.table = torch.tensor(list(means.values()), dtype=torch.float32)

    def __call__(self, cases: list[str], device: torch.device) -> Tensor:
        """Means [B, C, classes] of a batch's cases."""
        if self.table.device != device:
            self.table = self.table.to(device)
        rows = torch.tensor([self.row_of[str(case)] for case in cases])
        return self.table[rows.to(device, non_blocking=True)]


def read_case_means(member: Member) -> CaseMeans:
    """The means of all preprocessed cases; where they are missing or out of date, one process measures them first."""
    several = distributed.is_available() and distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        _bring_up_to_date(member)
    if several:
        distributed.barrier()
    return CaseMeans(json.loads(means_file(member).read_text())["means"])


def means_file(member: Member) -> Path:
    """Where the means of a dataset's configuration lie, beside its preprocessed images."""
    return member.base_folder / FOLDER / f"{member.configuration_manager.data_identifier}.json"


def _bring_up_to_date(member: Member) -> None:
    file, state = means_file(member), _state(member)
    if file.is_file() and json.loads(file.read_text())["state"] == state:
        return
    data = member.dataset_class(str(member.data_folder))
    means = {}
    for case in tqdm(member.identifiers, desc=f"Class means of {member.name}"):
        image, segmentation, _, _ = data.load_case(case)
        means[case] = _means(image[:], segmentation[:][0], member.label_space.label_values)
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"state": state, "means": means})


def _state(member: Member) -> str:
    """Changes with the labels that are told apart and with any preprocessed file, and with nothing else."""
    files = sorted((entry.name, entry.stat()) for entry in member.data_folder.iterdir() if entry.is_file())
    seen = [member.label_space.label_values, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _means(image: np.ndarray, labels: np.ndarray, values: tuple[int, ...]) -> list[list[float]]:
    """Mean of each channel over the voxels of each label; 0 for a label that does not occur.

    Voxels outside nnU-Net's crop (-1) are background, as they are in a batch.
    """
    places = np.maximum(labels, 0).astype(np.int64).ravel()
    length = max(values) + 2  # the ignore label may follow
    counts = np.maximum(np.bincount(places, minlength=length), 1)
    means = [np.bincount(places, weights=channel.ravel(), minlength=length) / counts for channel in image]
    return [[float(own[value]) for value in values] for own in means]
