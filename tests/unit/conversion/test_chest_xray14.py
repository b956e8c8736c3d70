from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ALL = (
    "Atelectasis|Cardiomegaly|Consolidation|Edema|Effusion|Emphysema|Fibrosis|Hernia|Infiltration|Mass|Nodule|"
    "Pleural_Thickening|Pneumonia|Pneumothorax"
)


@pytest.fixture
def download(tmp_path: Path, picture, table) -> Path:
    grey = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) % 256
    picture(tmp_path / "images_001" / "images" / "00000001_000.png", grey.astype(np.uint8))
    colour = np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1).astype(np.uint8)
    picture(tmp_path / "images_002" / "images" / "00000001_001.png", colour)  # some are RGBA, as published
    picture(tmp_path / "images_002" / "images" / "00000002_000.png", size=(20, 30))
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width"
    )
    table(
        tmp_path / "Data_Entry_2017.csv",
        header + ",Height],OriginalImagePixelSpacing[x,y],",
        f"00000001_000.png,{ALL},0,1,58,M,PA,2682,2749,0.143,0.143,",
        "00000001_001.png,No Finding,1,1,58,M,PA,2682,2749,0.143,0.143,",
        "00000002_000.png,Effusion|Mass,0,2,81,M,PA,2500,2048,0.171,0.171,",
        "00000003_000.png,Hernia,0,3,81,M,PA,2500,2048,0.171,0.171,",
    )
    names = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltrate", "Mass", "Nodule", "Pneumonia", "Pneumothorax"]
    rows = [f"00000001_000.png,{name},{index}.5,2,3,4.25,,," for index, name in enumerate(names)]
    table(tmp_path / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows)
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n")
    return tmp_path


def test_findings_and_the_official_test_set(run, download: Path) -> None:
    result = run("ChestX-ray14", download)
    assert result.cases("imagesTr") == ["00000001_000_0000", "00000001_001_0000"]
    assert (result.image("00000001_001") == result.image("00000001_000")).all()
    assert result.image("00000001_001").shape == (20, 30)
    table = result.table()
    assert list(table["00000001_000"].values()) == ["1"] * 14 + ["1"]
    assert list(table["00000001_001"].values()) == ["0"] * 14 + ["1"]
    assert result.dataset_json["nnunet_kd"]["split_by"] == "patient"
    assert "detection" not in result.dataset_json["nnunet_kd"]["tasks"]
    assert result.cases("imagesTs") == ["00000002_000_0000"]
    test = result.table("labelsTs")["00000002_000"]
    assert {name for name, value in test.items() if value == "1"} == {"Effusion", "Mass"}
    assert result.left_out == {"00000003_000": "there is no 00000003_000.png"}


def test_without_a_test_list_all_are_training_cases(run, download: Path) -> None:
    (download / "test_list.txt").unlink()
    result = run("ChestX-ray14", download)
    assert len(result.cases("imagesTr")) == 3
    assert not (result.folder / "imagesTs").exists()


def test_boxes_are_a_dataset_of_the_images_that_have_some(run, download: Path) -> None:
    result = run("ChestX-ray14-boxes", download)
    assert result.cases("imagesTr") == ["00000001_000_0000"]
    boxes = result.boxes()["00000001_000"]
    assert boxes[0] == ("Atelectasis", [0.5, 2, 3.5, 6.25])
    assert [name for name, _ in boxes][3] == "Infiltration"
    assert result.table()["00000001_000"]["Hernia"] == "1"
