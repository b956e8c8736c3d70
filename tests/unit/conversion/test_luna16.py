from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

PREFIX = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
SHAPE = (16, 30, 40)  # z, y, x
READ = """<?xml version="1.0" encoding="UTF-8"?>
<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>
{sessions}</LidcReadMessage>"""
SESSION = """<readingSession><unblindedReadNodule><noduleID>1</noduleID>
<characteristics><subtlety>5</subtlety><malignancy>{malignancy}</malignancy></characteristics>
<roi><imageZposition>{z}</imageZposition><inclusion>TRUE</inclusion>
<edgeMap><xCoord>{x0}</xCoord><yCoord>{y0}</yCoord></edgeMap><edgeMap><xCoord>{x1}</xCoord><yCoord>{y1}</yCoord></edgeMap>
</roi></unblindedReadNodule></readingSession>"""


def _reading(x: int, y: int, z: float, malignancy: int) -> str:
    return SESSION.format(malignancy=malignancy, z=z, x0=x - 2, x1=x + 2, y0=y - 1, y1=y + 1)


@pytest.fixture
def download(tmp_path: Path, volume, table) -> Path:
    """Scan 1 has two nodules, around voxel (10, 12, 5) and (30, 20, 8); scan 2, flipped, has one; scan 3 none."""
    plain = {"array": np.zeros(SHAPE), "spacing": (0.5, 0.5, 2.0), "origin": (-100, -50, -300)}
    volume(tmp_path / "subset0" / f"{PREFIX}1.mhd", **plain)
    flipped = {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}
    volume(tmp_path / "subset9" / f"{PREFIX}2.mhd", **plain, **flipped)
    volume(tmp_path / "subset9" / f"{PREFIX}3.mhd", **plain)
    volume(tmp_path / "seg-lungs-LUNA16" / f"{PREFIX}1.mhd", **plain)
    table(
        tmp_path / "CSVFILES" / "annotations.csv",
        "seriesuid,coordX,coordY,coordZ,diameter_mm",
        f"{PREFIX}1,{-100 + 10 * 0.5},{-50 + 12 * 0.5},{-300 + 5 * 2},8",
        f"{PREFIX}1,{-100 + 30 * 0.5},{-50 + 20 * 0.5},{-300 + 8 * 2},4",
        f"{PREFIX}2,{-100 - 30 * 0.5},{-50 - 20 * 0.5},{-300 + 8 * 2},4",
    )
    return tmp_path


def test_boxes_are_cubes_around_the_nodules_in_voxels(run, download: Path) -> None:
    result = run("LUNA16", download)
    assert result.cases("imagesTr") == ["luna16_1_0000", "luna16_2_0000", "luna16_3_0000"]
    # voxel (10, 12, 5) has its centre at 10.5, 12.5, 5.5; 8 mm are 16 x 16 x 4 voxels
    assert result.boxes() == {
        "luna16_1": [
            ("nodule", [2.5, 4.5, 3.5, 18.5, 20.5, 7.5]),
            ("nodule", [26.5, 16.5, 7.5, 34.5, 24.5, 9.5]),
        ],
        "luna16_2": [("nodule", [26.5, 16.5, 7.5, 34.5, 24.5, 9.5])],
        "luna16_3": [],
    }
    assert result.table()["luna16_3"] == {"patient": f"{PREFIX}3"}
    assert result.dataset_json["nnunet_kd"]["tasks"] == {
        "segmentation": False,
        "detection": {"file": "boxes.json", "classes": ["nodule"]},
    }


def test_with_lidcs_readings_nodules_have_the_median_malignancy(run, download: Path, table) -> None:
    sessions = {
        "1": [
            _reading(10, 12, -290, 1),
            _reading(11, 12, -290, 2),
            _reading(10, 13, -290, 5),
            _reading(25, 12, -290, 5),  # 7.5 mm from the first, outside its radius of 4 mm
            _reading(30, 20, -284, 3),
        ],
        "2": [_reading(30, 20, -284, 4), _reading(30, 21, -284, 5)],
    }
    for number, own in sessions.items():
        path = download / "tcia-lidc-xml" / "157" / f"{number}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(READ.format(uid=PREFIX + number, sessions="\n".join(own)))
    (download / "tcia-lidc-xml" / "other.xml").write_text("<IdriReadMessage/>")
    table(
        download / "metadata.csv",
        "Series UID,Collection,Subject ID",
        f"{PREFIX}1,LIDC-IDRI,LIDC-IDRI-0132",
        f"{PREFIX}2,LIDC-IDRI,LIDC-IDRI-0132",
    )
    table(  # a second scan without a nodule is graded benign here, so that every class occurs
        download / "CSVFILES" / "annotations.csv",
        *(download / "CSVFILES" / "annotations.csv").read_text().split(),
        f"{PREFIX}4,-95,-44,-290,8",
    )
    (download / "subset9" / f"{PREFIX}3.mhd").rename(download / "subset9" / f"{PREFIX}3b.mhd")
    for file in ("1.mhd", "1.raw"):
        source = (download / "subset0" / f"{PREFIX}{file}").read_bytes()
        (download / "subset0" / f"{PREFIX}4{file[1:]}").write_bytes(source)
    one = _reading(10, 12, -290, 1)
    (download / "tcia-lidc-xml" / "157" / "4.xml").write_text(READ.format(uid=f"{PREFIX}4", sessions=one))
    result = run("LUNA16", download)
    labels = {case: [label for label, _ in boxes] for case, boxes in result.boxes().items()}
    assert labels == {
        "luna16_1": ["benign", "indeterminate"],
        "luna16_2": ["malignant"],
        "luna16_3b": [],
        "luna16_4": ["benign"],
    }
    assert {case: row["malignancy"] for case, row in result.table().items()} == {
        "luna16_1": "indeterminate",
        "luna16_2": "malignant",
        "luna16_3b": "none",
        "luna16_4": "benign",
    }
    assert result.table()["luna16_1"]["patient"] == result.table()["luna16_2"]["patient"] == "LIDC-IDRI-0132"
    assert result.dataset_json["nnunet_kd"]["split_by"] == "patient"


def test_a_broken_xml_is_named(fails, download: Path) -> None:
    (download / "broken.xml").write_text("<LidcReadMessage>")
    assert "broken.xml is not valid XML" in fails("LUNA16", download)
