from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def test_metastases_from_slices(run, tmp_path: Path, picture) -> None:
    root = tmp_path / "stanford_release_brainmask"
    values = np.random.default_rng(0).integers(1, 255, (5, 11, 8, 10), dtype=np.uint8)  # part, slice, y, x
    mask = np.where(values[4] > 200, 255, 0).astype(np.uint8)
    for split, name in (("train", "Mets_005"), ("train", "Mets_010"), ("test", "Mets_001")):
        patient = root / f"mets_stanford_releaseMask_{split}" / name
        for number in range(11):  # not padded, so that 10.png must not come after 1.png
            for part in range(4):
                picture(patient / str(part) / f"{number}.png", values[part, number])
            if split == "train":
                picture(patient / "seg" / f"{number}.png", mask[number])
    (root / "mets_stanford_releaseMask_train" / "Mets_010" / "3" / "10.png").unlink()
    result = run("BrainMetShare", tmp_path)
    for part in range(4):
        assert (result.image("Mets_005", part) == values[part]).all()
    assert (result.labels("Mets_005") == mask // 255).all()
    image = sitk.ReadImage(str(result.folder / "imagesTr" / "Mets_005_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.94, 0.94, 1.0), rtol=1e-6)
    assert result.cases("imagesTs") == [f"Mets_001_000{part}" for part in range(4)]
    assert result.left_out["Mets_010"].startswith("channel FLAIR has the size (10, 8, 10)")


def test_metastases_from_nifti(run, tmp_path: Path, volume, labels) -> None:
    root = tmp_path / "brainmetshare-3"
    for patient in (root / "train" / "Mets_005", root / "train" / "Mets_006", root / "test" / "Mets_001"):
        for index, part in enumerate(("bravo", "t1_pre", "t1_gd", "flair")):
            volume(patient / f"{part}.nii.gz", np.full((4, 5, 6), index))
    volume(root / "train" / "Mets_005" / "seg.nii.gz", labels(1, 1))
    result = run("BrainMetShare", root)
    assert [int(result.image("Mets_005", part).max()) for part in range(4)] == [0, 1, 2, 3]
    assert (result.labels("Mets_005") == labels(1, 1)).all()
    assert len(result.cases("imagesTs")) == 4
    assert result.left_out == {"Mets_006": "there is no seg.nii.gz"}


def test_strokes_take_dwi_and_adc_of_both_published_layouts(run, tmp_path: Path, volume, labels) -> None:
    for number, folder in ((1, "ses-0001/dwi"), (2, "ses-0001"), (3, "ses-0001/dwi"), (4, "ses-0001/dwi")):
        name = f"sub-strokecase{number:04d}"
        dwi = volume(tmp_path / name / folder / f"{name}_ses-0001_dwi.nii.gz", np.full((4, 5, 6), number))
        volume(tmp_path / name / folder / f"{name}_ses-0001_adc.nii.gz", dwi + 10)
        volume(tmp_path / name / "ses-0001/anat" / f"{name}_ses-0001_FLAIR.nii.gz", np.zeros((7, 7, 7)))
        derived = tmp_path / "derivatives" / name / "ses-0001"
        if number != 3:
            volume(derived / f"{name}_ses-0001_msk.nii.gz", labels(1), dtype=np.float64)
    (tmp_path / "sub-strokecase0004/ses-0001/dwi/sub-strokecase0004_ses-0001_adc.nii.gz").unlink()
    result = run("ISLES2022", tmp_path)
    assert result.cases("labelsTr") == ["sub-strokecase0001_ses-0001", "sub-strokecase0002_ses-0001"]
    assert (result.image("sub-strokecase0002_ses-0001", 0) == 2).all()
    assert (result.image("sub-strokecase0002_ses-0001", 1) == 12).all()
    assert result.left_out == {
        "sub-strokecase0003_ses-0001": "there is no mask",
        "sub-strokecase0004_ses-0001": "there is no ADC",
    }
