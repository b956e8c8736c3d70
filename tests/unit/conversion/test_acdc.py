from __future__ import annotations

import json
from pathlib import Path

import nnunetv2.dataset_conversion.Dataset027_ACDC as upstream
import numpy as np
import pytest


@pytest.fixture
def download(tmp_path: Path, volume, labels) -> Path:
    root = tmp_path / "database"
    for part, patient, group, frames in (
        ("training", "patient001", "DCM", (1, 12)),
        ("training", "patient002", "NOR", (1, 10)),
        ("testing", "patient101", "RV", (1, 14)),
    ):
        folder = root / part / patient
        for frame in frames:
            volume(folder / f"{patient}_frame{frame:02d}.nii.gz", np.full((4, 5, 6), frame))
            volume(folder / f"{patient}_frame{frame:02d}_gt.nii.gz", labels(1, 2, 3))
        volume(folder / f"{patient}_4d.nii.gz")
        (folder / "Info.cfg").write_text(f"ED: 1\nES: 12\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    return root


def test_frames_are_cases_grouped_by_patient(run, download: Path) -> None:
    result = run("ACDC", download)
    assert result.folder.name == "Dataset027_ACDC"
    assert result.cases("labelsTr") == [
        "patient001_frame01",
        "patient001_frame12",
        "patient002_frame01",
        "patient002_frame10",
    ]
    assert (result.image("patient001_frame12") == 12).all()
    assert result.table()["patient001_frame12"] == {"patient": "patient001", "group": "DCM"}
    assert result.dataset_json["nnunet_kd"] == {"split_by": "patient"}
    assert result.cases("imagesTs") == ["patient101_frame01_0000", "patient101_frame14_0000"]
    assert result.labels("patient101_frame14", "Ts").max() == 3
    assert result.table("labelsTs")["patient101_frame01"]["group"] == "RV"


def test_it_agrees_with_nnunets_own_converter(run, download: Path, tmp_path: Path, monkeypatch) -> None:
    result = run("ACDC", download)
    monkeypatch.setattr(upstream, "nnUNet_raw", str(tmp_path / "upstream"))
    upstream.convert_acdc(str(download))
    other = tmp_path / "upstream" / "Dataset027_ACDC"
    theirs = json.loads((other / "dataset.json").read_text())
    for key in ("labels", "channel_names", "numTraining", "file_ending"):
        assert result.dataset_json[key] == theirs[key]
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        assert sorted(file.name for file in (other / part).iterdir()) == sorted(
            file.name for file in (result.folder / part).iterdir()
        )


def test_a_frame_without_segmentation_is_left_out(run, download: Path) -> None:
    (download / "training" / "patient002" / "patient002_frame10_gt.nii.gz").unlink()
    result = run("ACDC", download)
    assert result.left_out == {"patient002_frame10": "there is no segmentation"}
    assert "patient002_frame10" in result.printed
