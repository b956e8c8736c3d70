from __future__ import annotations

from pathlib import Path

import numpy as np

FINDINGS = "Aortic enlargement,Cardiomegaly,Nodule/Mass"


def test_physionet_needs_two_of_three_readers_and_averages_their_boxes(run, tmp_path: Path, radiograph, table) -> None:
    root = tmp_path / "1.0.0"
    image = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 6
    radiograph(root / "train" / "a1.dicom", image)
    radiograph(root / "train" / "b2.dicom", image, "MONOCHROME1")
    radiograph(root / "test" / "c3.dicom", image)
    table(
        root / "annotations" / "image_labels_train.csv",
        f"image_id,rad_id,{FINDINGS},Other diseases,No finding",
        "a1,R1,1,0,1,0,0",
        "a1,R2,1,1,1,1,0",
        "a1,R3,1,1,0,1,0",
        "b2,R1,0,0,1,0,0",
        "b2,R2,0,0,0,0,1",
        "b2,R3,0,0,0,0,1",
        "d4,R1,0,0,0,0,1",
    )
    table(
        root / "annotations" / "annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
        "a1,R1,Aortic enlargement,2,2,12,12",
        "a1,R2,Aortic enlargement,4,2,14,12",  # 8 * 10 of 12 * 10
        "a1,R3,Aortic enlargement,20,2,25,12",
        "a1,R2,Cardiomegaly,3,3,9,9",
        "a1,R1,Nodule/Mass,1,1,3,3",
        "b2,R1,Nodule/Mass,5,5,7,7",  # one reader alone
        "b2,R2,No finding,,,,",
    )
    table(
        root / "annotations" / "image_labels_test.csv",
        f"image_id,{FINDINGS},Other disease,No finding",
        "c3,0,1,0,1,0",
    )
    table(
        root / "annotations" / "annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max",
        "c3,Cardiomegaly,1,1,9,9",
        "c3,Cardiomegaly,1,1,9,8",
    )
    result = run("VinDr-CXR", tmp_path)
    assert result.image("a1").dtype == np.uint16
    assert (result.image("a1") == image).all()
    assert len(np.unique(result.image("b2").astype(int) + image)) == 1  # inverted, whatever white is
    names = [*FINDINGS.split(","), "Other diseases"]
    assert result.dataset_json["nnunet_kd"]["tasks"]["classification"]["columns"] == names
    assert [list(result.table()[case].values()) for case in ("a1", "b2")] == [["1"] * 4, ["0"] * 4]
    assert result.boxes() == {
        "a1": [
            ("Aortic enlargement", [3, 2, 13, 12]),
            ("Aortic enlargement", [20, 2, 25, 12]),
            ("Cardiomegaly", [3, 3, 9, 9]),
            ("Nodule/Mass", [1, 1, 3, 3]),
        ],
        "b2": [],
    }
    assert list(result.table("labelsTs")["c3"].values()) == ["0", "1", "0", "1"]
    assert result.boxes("labelsTs") == {"c3": [("Cardiomegaly", [1, 1, 9, 9]), ("Cardiomegaly", [1, 1, 9, 8])]}
    assert result.left_out == {"d4": "there is no train/d4.dicom"}


def test_kaggles_table_has_the_findings_that_have_boxes(run, tmp_path: Path, radiograph, table) -> None:
    for name in ("a1", "b2"):
        radiograph(tmp_path / "train" / f"{name}.dicom", np.full((20, 30), 3000, dtype=np.uint16))
    table(
        tmp_path / "train.csv",
        "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max",
        "a1,Cardiomegaly,3,R9,1.0,1.0,5.0,5.0",
        "a1,Cardiomegaly,3,R10,1.0,1.0,7.0,5.0",
        "a1,ILD,5,R9,8.0,8.0,9.0,9.0",
        "a1,ILD,5,R9,12.0,12.0,13.0,13.0",
        "a1,No finding,14,R8,,,,",
        "b2,No finding,14,R8,,,,",
        "b2,ILD,5,R9,8.0,8.0,9.0,9.0",
        "b2,ILD,5,R10,8.0,8.0,9.0,9.0",
    )
    result = run("VinDr-CXR", tmp_path)
    assert result.table() == {"a1": {"Cardiomegaly": "1", "ILD": "0"}, "b2": {"Cardiomegaly": "0", "ILD": "1"}}
    assert result.boxes() == {"a1": [("Cardiomegaly", [1, 1, 6, 5])], "b2": [("ILD", [8, 8, 9, 9])]}
