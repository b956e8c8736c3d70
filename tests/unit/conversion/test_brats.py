from __future__ import annotations

from pathlib import Path

import nnunetv2.dataset_conversion.Dataset137_BraTS21 as upstream
import numpy as np
import SimpleITK as sitk


def _patient(volume, folder: Path, separator: str, parts: tuple[str, ...], segmentation: np.ndarray | None) -> None:
    for index, part in enumerate(parts):
        volume(folder / f"{folder.name}{separator}{part}.nii.gz", np.full((4, 5, 6), index + 1))
    if segmentation is not None:
        volume(folder / f"{folder.name}{separator}seg.nii.gz", segmentation)


def test_brats_2021_gets_regions_and_nnunets_labels(run, tmp_path: Path, volume, labels) -> None:
    root = tmp_path / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021"
    parts = ("t1", "t1ce", "t2", "flair")
    _patient(volume, root / "BraTS2021_00000", "_", parts, labels(1, 2, 4))
    _patient(volume, root / "BraTS2021_00002", "_", parts, labels(1, 2, 3))
    _patient(volume, root / "BraTS2021_00003", "_", parts, None)
    _patient(volume, root / "BraTS2021_00005", "_", parts, labels(4))
    (root / "BraTS2021_00005" / "BraTS2021_00005_t2.nii.gz").unlink()
    _patient(volume, tmp_path / "RSNA_BraTS2021_ValidationData" / "BraTS2021_00001", "_", parts, None)
    result = run("BraTS2021", tmp_path)
    assert result.cases("labelsTr") == ["BraTS2021_00000"]
    assert [int(result.image("BraTS2021_00000", channel).max()) for channel in range(4)] == [1, 2, 3, 4]
    stored = result.labels("BraTS2021_00000")
    assert stored.ravel()[7:10].tolist() == [2, 1, 3]
    assert (upstream.convert_labels_back_to_BraTS(stored) == labels(1, 2, 4)).all()
    assert result.dataset_json["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
    assert result.dataset_json["labels"]["tumor core"] == [2, 3]
    assert result.dataset_json["regions_class_order"] == [1, 2, 3]
    assert result.cases("imagesTs") == [f"BraTS2021_00001_000{channel}" for channel in range(4)]
    assert "unexpected label" in result.left_out.pop("BraTS2021_00002")
    assert {entry["name"]: entry["why"] for entry in result.report["left_out"][1:]} == {
        "BraTS2021_00003": "there is no BraTS2021_00003_seg.nii.gz",
        "BraTS2021_00005": "there is no BraTS2021_00005_t2.nii.gz",
    }


def test_brats_2023_keeps_its_labels_and_groups_time_points(run, tmp_path: Path, volume, labels) -> None:
    root = tmp_path / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    parts = ("t1n", "t1c", "t2w", "t2f")
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"):
        _patient(volume, root / name, "-", parts, labels(1, 2, 3))
    result = run("BraTS2023-GLI", root)
    assert result.table() == {
        "BraTS-GLI-00000-000": {"patient": "BraTS-GLI-00000"},
        "BraTS-GLI-00000-001": {"patient": "BraTS-GLI-00000"},
        "BraTS-GLI-00002-000": {"patient": "BraTS-GLI-00002"},
    }
    assert (result.labels("BraTS-GLI-00000-001") == labels(1, 2, 3)).all()
    assert [int(result.image("BraTS-GLI-00000-000", channel).max()) for channel in range(4)] == [1, 2, 3, 4]
    # painted in this order, 2 (oedema), 1 (necrosis) and 3 (enhancing) leave the published labels
    regions = [result.dataset_json["labels"][name] for name in ("whole tumor", "tumor core", "enhancing tumor")]
    painted = np.zeros((4, 5, 6), dtype=np.uint8)
    for values, value in zip(regions, result.dataset_json["regions_class_order"], strict=True):
        painted[np.isin(labels(1, 2, 3), values)] = value
    assert (painted == labels(1, 2, 3)).all()


def test_geometry_is_that_of_the_first_channel(run, tmp_path: Path, volume, labels) -> None:
    root = tmp_path / "TrainingData"
    parts = ("t1n", "t1c", "t2w", "t2f")
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000", "BraTS-GLI-00002-000"):
        _patient(volume, root / name, "-", parts, labels(1, 2, 3))
    near, far = (root / name / f"{name}-t2w.nii.gz" for name in ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000"))
    volume(near, origin=(-10.001, 5, 7.5))
    volume(far, origin=(-10.5, 5, 7.5))
    result = run("BraTS2023-GLI", root)
    why = result.left_out["BraTS-GLI-00002-000"]
    assert why == "channel T2 has the origin (-10.5, 5, 7.5), the first channel (-10, 5, 7.5)"
    origins = [
        sitk.ReadImage(str(result.folder / "imagesTr" / f"BraTS-GLI-00001-000_000{channel}.nii.gz")).GetOrigin()
        for channel in range(4)
    ]
    assert origins == [(-10.0, 5.0, 7.5)] * 4
