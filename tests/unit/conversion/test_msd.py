from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset


@pytest.fixture
def task(tmp_path: Path, volume, labels) -> Callable[..., Path]:
    def write(name: str, channels: dict[str, str], structures: dict[str, str]) -> Path:
        root = tmp_path / "downloads" / name
        stem = name.partition("_")[2].lower()
        for side, numbers in (("Tr", (1, 14)), ("Ts", (2,))):
            for number in numbers:
                path = root / f"images{side}" / f"{stem}_{number:03d}.nii.gz"
                parts = [np.arange(120).reshape(4, 5, 6) + 1000 * index + number for index in range(len(channels))]
                if len(parts) == 1:
                    volume(path, parts[0])
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    images = [sitk.GetImageFromArray(part.astype(np.float32)) for part in parts]
                    sitk.WriteImage(sitk.JoinSeries(images), str(path))
                if side == "Tr":
                    plain = {} if len(parts) == 1 else {"spacing": (1, 1, 1), "origin": (0, 0, 0)}
                    volume(root / "labelsTr" / path.name, labels(*range(1, len(structures))), **plain)
        (root / "imagesTr" / f"._{stem}_001.nii.gz").write_bytes(b"what macOS leaves in archives")
        files = [f"{stem}_001.nii.gz", f"{stem}_014.nii.gz"]
        entries = [{"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"} for file in files]
        content = {"name": name, "licence": "CC-BY-SA 4.0", "modality": channels, "labels": structures}
        content |= {"training": entries, "test": [f"./imagesTs/{stem}_002.nii.gz"], "numTraining": 2, "numTest": 1}
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return write


@pytest.mark.parametrize(
    ("name", "channels", "structures"),
    [
        ("Task06_Lung", {"0": "CT"}, {"0": "background", "1": "cancer"}),
        ("Task05_Prostate", {"0": "T2", "1": "ADC"}, {"0": "background", "1": "PZ", "2": "TZ"}),
    ],
)
def test_it_agrees_with_nnunets_own_converter(
    run, task, tmp_path: Path, monkeypatch, name: str, channels: dict[str, str], structures: dict[str, str]
) -> None:
    root = task(name, channels, structures)
    result = run("MSD", root)
    other_raw = tmp_path / "other_raw"
    other_raw.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(other_raw))
    convert_msd_dataset(str(root), num_processes=1)
    other = other_raw / f"Dataset0{name[4:]}"
    assert result.folder.name == other.name
    theirs = json.loads((other / "dataset.json").read_text())
    for key in ("labels", "channel_names", "numTraining", "file_ending"):
        assert result.dataset_json[key] == theirs[key]
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        files = sorted(file.name for file in (other / part).iterdir())
        assert files == sorted(file.name for file in (result.folder / part).iterdir())
        for file in files:
            ours, expected = (sitk.ReadImage(str(folder / part / file)) for folder in (result.folder, other))
            assert (sitk.GetArrayFromImage(ours) == sitk.GetArrayFromImage(expected)).all()
            np.testing.assert_allclose(ours.GetOrigin(), expected.GetOrigin())
            np.testing.assert_allclose(ours.GetSpacing(), expected.GetSpacing())


def test_a_folder_of_several_tasks_is_refused_by_name(fails, task) -> None:
    root = task("Task06_Lung", {"0": "CT"}, {"0": "background", "1": "cancer"})
    task("Task09_Spleen", {"0": "CT"}, {"0": "background", "1": "spleen"})
    assert "several folders" in fails("MSD", root.parent)
    assert "Task06_Lung, Task09_Spleen" in fails("MSD", root.parent)


def test_a_renamed_folder_and_a_broken_dataset_json_are_clear(fails, task) -> None:
    root = task("Task06_Lung", {"0": "CT"}, {"0": "background", "1": "cancer"})
    (root / "dataset.json").write_text("{")
    assert "dataset.json is not valid JSON" in fails("MSD", root)
    (root / "dataset.json").write_text("{}")
    assert "no usable 'modality' or 'labels'" in fails("MSD", root)
    root.rename(root.with_name("lung"))
    assert "lung is not named Task06_Lung" in fails("MSD", root.with_name("lung"))
