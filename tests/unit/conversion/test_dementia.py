from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk


def _analyze(path: Path, array: np.ndarray) -> None:
    """A big-endian Analyze file with a fourth axis of one, as OASIS has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*array.shape, 1))
    header.set_zooms((1, 1.5, 2, 1))
    nibabel.AnalyzeImage(array[..., None], None, header).to_filename(path)


def test_oasis_has_a_rating_where_the_table_has_one(run, tmp_path: Path, table) -> None:
    ratings = {"0001": "0", "0002": "0.5", "0003": "1", "0004": "2", "0005": "", "0006": "0"}
    table(
        tmp_path / "oasis_cross-sectional.csv",
        "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay",
        *(f"OAS1_{number}_MR1,F,R,74,2,3,29,{cdr},1344,0.743,1.306,N/A" for number, cdr in ratings.items()),
    )
    array = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    sessions = [*(f"OAS1_{number}_MR1" for number in list(ratings)[:-1]), "OAS1_0005_MR2"]
    for session in sessions:
        atlas = tmp_path / "disc1" / session / "PROCESSED" / "MPRAGE" / "T88_111"
        _analyze(atlas / f"{session}_mpr_n4_anon_111_t88_masked_gfc.hdr", array)
        _analyze(atlas / f"{session}_mpr_n4_anon_111_t88_gfc.hdr", array * 0)
    (tmp_path / "disc1" / "OAS1_0006_MR1" / "PROCESSED" / "MPRAGE" / "T88_111").mkdir(parents=True)
    result = run("OASIS-1", tmp_path)
    assert (result.image("OAS1_0001_MR1") == array.transpose(2, 1, 0)).all()
    image = sitk.ReadImage(str(result.folder / "imagesTr" / "OAS1_0001_MR1_0000.nii.gz"))
    assert image.GetSpacing() == (1.0, 1.5, 2.0)
    rows = result.table()
    assert [rows[session]["cdr"] for session in sessions] == ["0", "0.5", "1", "2", "", ""]
    assert rows["OAS1_0005_MR2"]["subject"] == rows["OAS1_0005_MR1"]["subject"] == "OAS1_0005"
    assert result.dataset_json["nnunet_kd"]["split_by"] == "subject"
    assert result.left_out == {"OAS1_0006_MR1": "T88_111 has 0 files *_t88_masked_gfc.hdr"}


def _adni_table(table, path: Path, *rows: str) -> None:
    header = "Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Type,Acq Date,Format,Downloaded"
    columns = ",".join(f'"{name}"' for name in header.split(","))
    table(path, columns, *rows)


def test_adni_joins_table_and_files_by_the_image_id(run, tmp_path: Path, volume, table) -> None:
    tail = '"M","75","1","MRI","MPR; GradWarp; B1 Correction; N3; Scaled","Processed","4/18/2006","NiFTI",""'
    _adni_table(
        table,
        tmp_path / "ADNI1_Complete_1Yr_1.5T.csv",
        f'"I45108","002_S_0295","CN",{tail}',
        f'"I118692","002_S_0413","MCI",{tail}',
        f'"40817","002_S_0413","MCI",{tail}',
        f'"I99","002_S_0619","AD",{tail}',
        f'"I100","002_S_0619","AD",{tail}',
    )
    images = {}
    for subject, number in (("002_S_0295", 45108), ("002_S_0413", 118692), ("002_S_0413", 40817), ("002_S_0619", 99)):
        name = f"ADNI_{subject}_MR_MPR__GradWarp__N3__Scaled_Br_20070216_S13408_I{number}.nii"
        folder = tmp_path / "ADNI" / subject / "MPR__GradWarp__N3__Scaled" / "2006-04-18_08_20_30.0" / f"I{number}"
        images[number] = volume(folder / name, np.full((4, 5, 6), number % 7))
    volume(tmp_path / "ADNI" / "stray.nii.gz")
    result = run("ADNI", tmp_path)
    assert result.table() == {
        "002_S_0295_I45108": {"group": "CN", "subject": "002_S_0295"},
        "002_S_0413_I118692": {"group": "MCI", "subject": "002_S_0413"},
        "002_S_0413_I40817": {"group": "MCI", "subject": "002_S_0413"},
        "002_S_0619_I99": {"group": "AD", "subject": "002_S_0619"},
    }
    assert (result.image("002_S_0413_I40817") == images[40817]).all()
    assert result.dataset_json["nnunet_kd"]["tasks"]["classification"]["classes"] == ["CN", "MCI", "AD"]
    assert result.left_out == {
        "002_S_0619_I100": "there is no file whose name ends in this image id",
        "stray": "its name does not end in an image id (_I45108) of the table",
    }


def test_adni_needs_one_table_with_two_groups(fails, tmp_path: Path, table) -> None:
    assert "holds 0 CSV files" in fails("ADNI", tmp_path)
    _adni_table(table, tmp_path / "a.csv", '"I1","002_S_0295","CN"')
    assert "has the groups CN; two are needed" in fails("ADNI", tmp_path)
    table(tmp_path / "b.csv", "x")
    assert "holds 2 CSV files" in fails("ADNI", tmp_path)
