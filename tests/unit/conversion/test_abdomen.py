from __future__ import annotations

import json
from pathlib import Path

import nnunetv2.dataset_conversion.Dataset220_KiTS2023 as upstream_kits
import numpy as np
import pytest
import SimpleITK as sitk
import yaml

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture
def protocol() -> dict:
    return yaml.safe_load((CHECKOUT / "examples" / "leaderboards" / "dino_mix.yaml").read_text())["datasets"]


def _in_order(labels: dict[str, int]) -> list[str]:
    return sorted(labels, key=labels.__getitem__)


def test_synapse_keeps_the_four_digits_and_the_order_of_the_leaderboard(
    run, tmp_path: Path, volume, labels, protocol
) -> None:
    root = tmp_path / "RawData"
    for digits in ("0001", "0040"):
        volume(root / "Training" / "img" / f"img{digits}.nii.gz", np.full((4, 5, 6), int(digits)))
        volume(root / "Training" / "label" / f"label{digits}.nii.gz", labels(*range(14)))
    volume(root / "Training" / "img" / "img0002.nii.gz")
    volume(root / "Testing" / "img" / "img0061.nii.gz")
    result = run("Synapse", root)
    assert result.cases("labelsTr") == ["img0001", "img0040"]
    assert (result.image("img0040") == 40).all()
    assert (result.labels("img0001") == labels(*range(14))).all()
    assert _in_order(result.dataset_json["labels"]) == protocol["synapse_20"]["labels"]
    assert result.cases("imagesTs") == ["img0061_0000"]
    assert result.left_out == {"img0002": "there is no label0002.nii.gz"}


def test_amos_has_the_official_validation_set_as_test_set(run, tmp_path: Path, volume, labels, protocol) -> None:
    for side, number in (("Tr", 1), ("Tr", 507), ("Va", 8), ("Ts", 2)):
        volume(tmp_path / f"images{side}" / f"amos_{number:04d}.nii.gz", np.full((4, 5, 6), number))
        if side != "Ts":
            volume(tmp_path / f"labels{side}" / f"amos_{number:04d}.nii.gz", labels(*range(16)))
    result = run("AMOS22", tmp_path)
    assert result.cases("labelsTr") == ["amos_0001", "amos_0507"]
    assert result.cases("labelsTs") == ["amos_0008"]
    assert result.cases("imagesTs") == ["amos_0008_0000"]
    assert result.table() == {"amos_0001": {"modality": "CT"}, "amos_0507": {"modality": "MR"}}
    assert _in_order(result.dataset_json["labels"]) == protocol["amos_5"]["labels"]


def test_axes_are_brought_into_one_order_with_image_and_labels_together(run, tmp_path: Path, volume, labels) -> None:
    """KiTS stores volumes with the slices first: x of the file runs from head to foot."""
    case = tmp_path / "case_00000"
    stored = volume(case / "imaging.nii.gz", spacing=(5.0, 0.8, 0.7), direction=(0, 0, 1, 0, -1, 0, -1, 0, 0))
    seg = volume(
        case / "segmentation.nii.gz",
        labels(1, 2, 3),
        spacing=(5.0, 0.8, 0.7),
        direction=(0, 0, 1, 0, -1, 0, -1, 0, 0),
    )
    result = run("KiTS23", tmp_path)
    image = sitk.ReadImage(str(result.folder / "imagesTr" / "case_00000_0000.nii.gz"))
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel(), atol=1e-6)
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 5.0), rtol=1e-6)
    # array order (z, y, x) of the file is (x, y, z) of the world, with y and z reversed
    assert (result.image("case_00000") == stored.transpose(2, 1, 0)[::-1, ::-1, :]).all()
    assert (result.labels("case_00000") == seg.transpose(2, 1, 0)[::-1, ::-1, :]).all()


def test_kits_has_the_regions_of_nnunets_own_converter(run, tmp_path: Path, volume, labels, monkeypatch) -> None:
    for name in ("case_00000", "case_00588"):
        volume(tmp_path / "dataset" / name / "imaging.nii.gz")
        volume(tmp_path / "dataset" / name / "segmentation.nii.gz", labels(1, 2, 3))
    result = run("KiTS23", tmp_path / "dataset")
    monkeypatch.setattr(upstream_kits, "nnUNet_raw", str(tmp_path / "upstream"))
    upstream_kits.convert_kits2023(str(tmp_path / "dataset"))
    theirs = json.loads((tmp_path / "upstream" / "Dataset220_KiTS2023" / "dataset.json").read_text())
    for key in ("labels", "regions_class_order", "channel_names", "numTraining", "file_ending"):
        assert result.dataset_json[key] == theirs[key]
    assert result.folder.name == "Dataset220_KiTS2023"


def test_kits_cases_without_annotation_are_left_out(run, tmp_path: Path, volume, labels) -> None:
    volume(tmp_path / "case_00000" / "imaging.nii.gz")
    volume(tmp_path / "case_00000" / "segmentation.nii.gz", labels(1))
    volume(tmp_path / "case_00001" / "segmentation.nii.gz", labels(1))
    assert run("KiTS23", tmp_path).left_out == {"case_00001": "there is no imaging.nii.gz"}
