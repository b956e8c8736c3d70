from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def download(tmp_path: Path, radiograph, table) -> Path:
    root = tmp_path / "rsna-pneumonia-detection-challenge"
    for name in ("aa-01", "bb-02", "cc-03"):
        radiograph(root / "stage_2_train_images" / f"{name}.dcm", np.arange(80, dtype=np.uint8).reshape(8, 10))
    radiograph(root / "stage_2_test_images" / "ee-05.dcm", np.zeros((8, 10), dtype=np.uint8))
    table(
        root / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target",
        "aa-01,,,,,0",
        "bb-02,1.0,2.0,3.0,4.0,1",
        "bb-02,6.0,0.0,9.0,2.5,1",
        "cc-03,,,,,0",
        "dd-04,,,,,0",
    )
    table(
        root / "stage_2_detailed_class_info.csv",
        "patientId,class",
        "aa-01,No Lung Opacity / Not Normal",
        "bb-02,Lung Opacity",
        "bb-02,Lung Opacity",
        "cc-03,Normal",
        "dd-04,Normal",
    )
    return root


def test_boxes_and_classes_of_both_tables(run, download: Path) -> None:
    result = run("RSNA", download)
    assert (result.image("bb-02") == np.arange(80).reshape(8, 10)).all()
    assert result.boxes() == {
        "aa-01": [],
        "bb-02": [("lung_opacity", [1, 2, 4, 6]), ("lung_opacity", [6, 0, 10, 2.5])],  # clipped at the edge
        "cc-03": [],
    }
    assert result.table() == {
        "aa-01": {"label": "not_normal"},
        "bb-02": {"label": "lung_opacity"},
        "cc-03": {"label": "normal"},
    }
    assert result.dataset_json["nnunet_kd"] == {
        "tasks": {
            "segmentation": False,
            "classification": {
                "file": "classification.csv",
                "column": "label",
                "classes": ["normal", "not_normal", "lung_opacity"],
            },
            "detection": {"file": "boxes.json", "classes": ["lung_opacity"]},
        }
    }
    assert result.cases("imagesTs") == ["ee-05_0000"]
    assert not (result.folder / "labelsTs").exists()
    assert result.left_out == {"dd-04": "there is no stage_2_train_images/dd-04.dcm"}


def test_a_box_outside_its_image_is_dropped_and_counted(run, download: Path) -> None:
    with (download / "stage_2_train_labels.csv").open("a") as stream:
        stream.write("cc-03,20,2,3,4,1\n")
    result = run("RSNA", download)
    assert result.boxes()["cc-03"] == []
    assert result.report["boxes_outside_image"] == {"cc-03": 1}
    assert "1 boxes that lie outside their images" in result.printed


def test_a_value_that_is_no_number_is_a_clear_error(fails, download: Path) -> None:
    with (download / "stage_2_train_labels.csv").open("a") as stream:
        stream.write("cc-03,left,2,3,4,1\n")
    message = fails("RSNA", download)
    assert "a value that is not understood (ValueError" in message
    assert "left" in message
    assert "patientId,x,y,width,height,Target" in message


def test_a_missing_column_is_named(fails, download: Path, table) -> None:
    table(download / "stage_2_detailed_class_info.csv", "patientId,label", "aa-01,Normal")
    message = fails("RSNA", download)
    assert "stage_2_detailed_class_info.csv has no column class; it has patientId, label" in message
