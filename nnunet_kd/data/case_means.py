"""Mean intensity of each class in each whole preprocessed case, measured once and kept on disk (our design)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
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
    """The means of all preprocessed cases; measured and written first where they are missing or out of date."""
    file = means_file(member)
    state = {key: value for key, value in member.state().items() if key != "splits"}
    if file.is_file():
        recorded = json.loads(file.read_text())
        if recorded["state"] == state:
            return CaseMeans(recorded["means"])
    data = member.dataset_class(str(member.data_folder))
    means = {}
    for case in tqdm(member.identifiers, desc=f"Class means of {member.name}"):
        image, segmentation, _, _ = data.load_case(case)
        labels = np.asarray(segmentation[0])
        means[case] = _means(np.asarray(image[:]), labels, member.label_space.label_values)
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"state": state, "means": means})
    return CaseMeans(means)


def means_file(member: Member) -> Path:
    """Where the means of a dataset's configuration lie, beside its preprocessed images."""
    return member.base_folder / FOLDER / f"{member.configuration_manager.data_identifier}.json"


def _means(image: np.ndarray, labels: np.ndarray, values: tuple[int, ...]) -> list[list[float]]:
    """Mean of each channel over the voxels of each label; 0 for a label that does not occur.

    Voxels outside nnU-Net's crop (-1) are background, as they are in a batch.
    """
    labels = np.maximum(labels, 0)
    inside = [labels == value for value in values]
    return [
        [float(channel[mask].mean(dtype=np.float64)) if mask.any() else 0.0 for mask in inside] for channel in image
    ]
