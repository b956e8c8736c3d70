from __future__ import annotations

from pathlib import Path


def test_slices_of_one_source_are_one_group(run, tmp_path: Path, picture) -> None:
    root = tmp_path / "Images-processed"
    paper = "2020.01.24.919183-p27-13"
    picture(root / "CT_COVID" / f"{paper}2.png", seed=1)
    picture(root / "CT_COVID" / f"{paper}5.png", seed=2)
    picture(root / "CT_COVID" / "kjr-21-e24-g001-l-a.jpg")
    picture(root / "CT_COVID" / "._kjr-21-e24-g001-l-a.jpg")
    picture(root / "CT_NonCOVID" / "1%0.jpg")
    picture(root / "CT_NonCOVID" / "1%2.png", seed=3)
    picture(root / "CT_NonCOVID" / "12.png")
    result = run("COVID-CT", tmp_path)
    groups = {case: row["group"] for case, row in result.table().items()}
    assert groups == {
        "covid_2020_01_24_919183_p27_132_png": "covid_2020.01.24.919183",
        "covid_2020_01_24_919183_p27_135_png": "covid_2020.01.24.919183",
        "covid_kjr_21_e24_g001_l_a_jpg": "covid_kjr-21-e24-g001-l-a",
        "non_covid_12_png": "non_covid_12",
        "non_covid_1_0_jpg": "non_covid_1",
        "non_covid_1_2_png": "non_covid_1",
    }
    assert [row["label"] for row in result.table().values()].count("covid") == 3
    assert result.dataset_json["nnunet_kd"]["split_by"] == "group"
    assert result.dataset_json["nnunet_kd"]["tasks"]["segmentation"] is False
