"""What holds for every converter; LiTS stands for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_kd.cli.convert import main
from nnunet_kd.conversion import CONVERTERS

NUM_CASES = 6


@pytest.fixture
def lits(tmp_path: Path, volume, labels) -> Path:
    """A download of six cases that differ."""
    root = tmp_path / "lits"
    for number in range(NUM_CASES):
        volume(root / f"volume-{number}.nii", np.arange(120).reshape(4, 5, 6) + 1000 * number)
        volume(root / f"segmentation-{number}.nii", labels(1, 2))
    return root


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


# --- the input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONVERTERS)
def test_a_wrong_folder_says_what_was_expected_and_writes_nothing(fails, raw: Path, tmp_path: Path, name: str) -> None:
    wrong = tmp_path / "wrong"
    (wrong / "pictures").mkdir(parents=True)
    (wrong / "pictures" / "holiday.png").write_bytes(b"")
    message = fails(name, wrong)
    assert str(wrong) in message
    assert CONVERTERS[name].layout in message
    assert list(raw.iterdir()) == []


@pytest.mark.parametrize("name", CONVERTERS)
def test_licence_citation_and_page_are_printed_first(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        main([name.lower(), "-i", str(tmp_path / "nowhere"), "-o", str(raw)])
    captured = capsys.readouterr()
    for text in (CONVERTERS[name].licence, CONVERTERS[name].citation, CONVERTERS[name].url):
        assert text
        assert text in captured.out
    assert f"The input folder {tmp_path / 'nowhere'} does not exist" in captured.err


def test_licence_citation_and_page_stay_with_the_dataset(run, lits: Path) -> None:
    result = run("LiTS", lits)
    converter = CONVERTERS["LiTS"]
    for content, page in ((result.dataset_json, "reference"), (result.report, "url")):
        assert content["licence"] == converter.licence
        assert content["citation"] == converter.citation
        assert content[page] == converter.url
    assert result.dataset_json["name"] == "Dataset513_LiTS"


def test_the_list_has_a_line_for_every_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CONVERTERS)
    assert all(len(line.split()) > 4 for line in lines)


def test_default_ids_and_names_are_different() -> None:
    of_one_task = [converter for converter in CONVERTERS.values() if converter.dataset_name]
    assert len({converter.dataset_id for converter in of_one_task}) == len(of_one_task)
    assert len({converter.dataset_name for converter in of_one_task}) == len(of_one_task)


def test_an_unknown_name_has_a_suggestion(fails, tmp_path: Path) -> None:
    assert "no converter 'litz'. Perhaps LiTS?" in fails("litz", tmp_path)


@pytest.mark.parametrize("arguments", [["LiTS"], ["-i", "x"], ["LiTS", "-i", "x", "-np", "0"]])
def test_missing_or_impossible_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_the_raw_folder_is_nnunets_unless_told(raw: Path, lits: Path) -> None:
    main(["LiTS", "-i", str(lits), "-np", "1", "--disable_progress_bar"])
    assert (raw / "Dataset513_LiTS" / "dataset.json").is_file()


# --- checks -----------------------------------------------------------------------------------------------------------
def test_cases_that_cannot_be_used_are_left_out_with_the_reason(run, lits: Path, volume, labels) -> None:
    (lits / "volume-0.nii").write_bytes(b"no volume")
    volume(lits / "segmentation-1.nii", labels(1, 2, 3))
    volume(lits / "segmentation-2.nii", labels(1, 2), spacing=(0.75, 0.75, 2.6))
    volume(lits / "segmentation-3.nii", labels(1, 2)[1:])
    mirrored = (-1, 0, 0, 0, 1, 0, 0, 0, 1)
    volume(lits / "segmentation-4.nii", labels(1, 2), direction=mirrored)
    result = run("LiTS", lits)
    assert result.cases("labelsTr") == ["lits_005"]
    reasons = result.left_out
    assert reasons.pop("lits_000").startswith("cannot be read (")
    assert reasons == {
        "lits_001": "the segmentation holds 3; declared are 0, 1, 2",
        "lits_002": "the segmentation has the spacing (0.75, 0.75, 2.6), the first channel (0.75, 0.75, 2.5)",
        "lits_003": "the segmentation has the size (6, 5, 3), the first channel (6, 5, 4)",
        "lits_004": f"the segmentation has the direction {mirrored}, the first channel (1, 0, 0, 0, 1, 0, 0, 0, 1)",
    }
    assert "Left out: 5 cases" in result.printed
    assert "declared are 0, 1, 2: lits_001" in result.printed


def test_a_label_grid_within_rounding_gets_the_images_grid(run, lits: Path, volume, labels) -> None:
    turned = 1e-4
    direction = (1, -turned, 0, turned, 1, 0, 0, 0, 1)
    volume(lits / "segmentation-0.nii", labels(1, 2), spacing=(0.7501, 0.75, 2.5), origin=(-10.01, 5, 7.5))
    volume(lits / "segmentation-1.nii", labels(1, 2), direction=direction)
    result = run("LiTS", lits)
    assert result.left_out == {}
    for case in ("lits_000", "lits_001"):
        files = (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz")
        image, segmentation = (sitk.ReadImage(str(result.folder / file)) for file in files)
        assert segmentation.GetSpacing() == image.GetSpacing()
        assert segmentation.GetOrigin() == image.GetOrigin()
        assert segmentation.GetDirection() == image.GetDirection()


def test_axes_that_are_nearly_at_right_angles_are_rounded(run, lits: Path, labels) -> None:
    """ITK refuses such a file; nnU-Net's own readers of other formats take it."""
    for number, skew in ((0, 0.01), (1, 0.2)):
        affine = np.array([[-1.0, skew, 0, 10], [0, -1.0, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
        array = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
        segmentation = labels(1, 2).transpose(2, 1, 0)
        for name, content in (("volume", array), ("segmentation", segmentation)):
            stored = nibabel.Nifti1Image(content, affine)
            stored.header.set_sform(affine, code=1)
            stored.header["qform_code"] = 0
            nibabel.save(stored, lits / f"{name}-{number}.nii")
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(lits / "volume-0.nii"))
    result = run("LiTS", lits)
    assert (result.image("lits_000") == np.arange(120).reshape(6, 5, 4).transpose(2, 1, 0)).all()
    image = sitk.ReadImage(str(result.folder / "imagesTr" / "lits_000_0000.nii.gz"))
    np.testing.assert_allclose(image.GetOrigin(), (-10, -20, 30), atol=1e-5)
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel(), atol=0.006)
    assert result.left_out == {"lits_001": "the axes of volume-1.nii are not at right angles"}


def test_without_any_usable_case_the_reasons_are_the_error(fails, lits: Path, raw: Path) -> None:
    for file in lits.glob("volume-*"):
        file.write_bytes(b"no volume")
    message = fails("LiTS", lits)
    assert "No training case" in message
    assert "lits_000: cannot be read" in message
    assert not (raw / "Dataset513_LiTS" / "dataset.json").exists()


# --- going on, and leaving others alone -------------------------------------------------------------------------------
def test_a_killed_conversion_goes_on_where_it_stopped(run, lits: Path, raw: Path, tmp_path: Path) -> None:
    whole = _contents(run("LiTS", lits, "-id", "600").folder)
    blocked = lits / "volume-3.nii"
    content = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)  # reading it waits for ever
    arguments = ["LiTS", "-i", lits, "-o", raw, "-np", "1", "--disable_progress_bar"]
    process = subprocess.Popen([sys.executable, "-m", "nnunet_kd.cli.convert", *map(str, arguments)])
    folder = raw / "Dataset513_LiTS"
    try:
        _wait_until(lambda: (folder / "labelsTr" / "lits_002.nii.gz").is_file(), process)
        progress = folder / ".conversion" / "cases.jsonl"
        _wait_until(lambda: "lits_002" in progress.read_text(), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with progress.open("a") as stream:
        stream.write('{"case": "lits_00')  # what a kill in the middle of a line leaves
    (folder / "imagesTr" / "lits_003_0000.nii.gz").write_bytes(b"half a file")
    assert not (folder / "dataset.json").exists()
    before = _stamps(folder)
    blocked.unlink()
    blocked.write_bytes(content)
    result = run("LiTS", lits)
    after = _stamps(folder)
    for case in ("lits_000", "lits_001", "lits_002"):
        for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            assert before[file] == after[file]
    assert result.report["training_cases"] == NUM_CASES
    ours = _contents(folder)
    assert ours.keys() == whole.keys()
    assert all(ours[file] == whole[file] for file in ours if file.endswith(".nii.gz"))


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None
        time.sleep(0.05)
    pytest.fail("the conversion did not get there in 30 s")


def test_boxes_of_cases_written_before_are_kept(run, fails, raw: Path, tmp_path: Path, radiograph, table) -> None:
    for name in ("a", "b"):
        radiograph(tmp_path / "stage_2_train_images" / f"{name}.dcm", np.zeros((8, 10), dtype=np.uint8))
    table(
        tmp_path / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target",
        "a,1,2,3.5,4,1",
        "a,20,2,3,4,1",
        "b,,,,,0",
        "c,,,,,0",
    )
    classes = ("a,Lung Opacity", "b,Normal", "c,No Lung Opacity / Not Normal")
    table(tmp_path / "stage_2_detailed_class_info.csv", "patientId,class", *classes)
    in_the_way = raw / "Dataset541_RSNAPneumonia" / "imagesTr" / "c_0000.png"
    (tmp_path / "stage_2_train_images" / "a.dcm").rename(tmp_path / "a.dcm")
    (tmp_path / "stage_2_train_images" / "b.dcm").rename(tmp_path / "b.dcm")
    radiograph(tmp_path / "stage_2_train_images" / "c.dcm", np.zeros((8, 10), dtype=np.uint16) + 70)
    (tmp_path / "stage_2_train_images" / "c.dcm").write_bytes(b"")
    assert "No training case" in fails("RSNA", tmp_path)
    with (raw / "Dataset541_RSNAPneumonia" / ".conversion" / "cases.jsonl").open("a") as stream:
        stream.write('{"case": "x')  # what a kill in the middle of a line leaves
    in_the_way.mkdir()  # c cannot be written, after a was
    for name in ("a", "b"):
        (tmp_path / f"{name}.dcm").rename(tmp_path / "stage_2_train_images" / f"{name}.dcm")
    radiograph(tmp_path / "stage_2_train_images" / "c.dcm", np.zeros((8, 10), dtype=np.uint8))
    message = fails("RSNA", tmp_path)
    assert f"{in_the_way} cannot be written" in message
    assert "goes on where it stopped" in message
    in_the_way.rmdir()
    before = _stamps(raw)
    result = run("RSNA", tmp_path)
    for name in ("a", "b"):
        file = f"Dataset541_RSNAPneumonia/imagesTr/{name}_0000.png"
        assert _stamps(raw)[file] == before[file]
    assert result.boxes() == {"a": [("lung_opacity", [1, 2, 4.5, 6])], "b": [], "c": []}
    assert result.report["boxes_outside_image"] == {"a": 1}


def test_what_a_killed_run_left_of_a_case_goes_with_the_case(run, fails, lits: Path, raw: Path) -> None:
    volumes = {file: file.read_bytes() for file in lits.glob("volume-*")}
    for file in volumes:
        file.write_bytes(b"no volume")
    fails("LiTS", lits)
    for relative in ("imagesTr/lits_000_0000.nii.gz", "labelsTr/lits_000.nii.gz"):
        (raw / "Dataset513_LiTS" / relative).write_bytes(b"not yet in the list of those that are done")
    for file, content in volumes.items():
        if file.name != "volume-0.nii":
            file.write_bytes(content)
    result = run("LiTS", lits)
    assert list(result.left_out) == ["lits_000"]
    assert result.cases("labelsTr") == [f"lits_{number:03d}" for number in range(1, NUM_CASES)]


def test_a_finished_conversion_is_not_done_again(run, lits: Path) -> None:
    first = run("LiTS", lits)
    before = _stamps(first.folder)
    (lits / "volume-2.nii").unlink()
    second = run("LiTS", lits)
    assert _stamps(second.folder) == before
    assert "was finished before: 6 training and 0 test cases" in second.printed


def test_no_other_dataset_of_the_id_is_touched(run, fails, lits: Path, raw: Path, monkeypatch, tmp_path: Path) -> None:
    (raw / "Dataset513_Other").mkdir()
    message = fails("LiTS", lits)
    assert "The id 513 belongs to Dataset513_Other" in message
    assert "-id" in message
    (raw / "Dataset513_Other").rename(raw / "Dataset514_Other")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    (tmp_path / "preprocessed" / "Dataset513_Planned").mkdir(parents=True)
    assert "Dataset513_Planned" in fails("LiTS", lits)
    assert run("LiTS", lits, "-id", "515").folder.name == "Dataset515_LiTS"
    assert "not between 1 and 999" in fails("LiTS", lits, "-id", "1000")


def test_a_folder_of_the_same_name_from_elsewhere_is_not_overwritten(fails, lits: Path, raw: Path) -> None:
    folder = raw / "Dataset513_LiTS"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "dataset.json").write_text("mine")
    before = _contents(folder)
    assert "was not made by nnUNetKD_convert LiTS; it is not overwritten" in fails("LiTS", lits)
    (folder / "conversion_report.json").write_text(json.dumps({"converter": "KiTS23", "finished": True}))
    assert "was not made by nnUNetKD_convert LiTS" in fails("LiTS", lits)
    (folder / "conversion_report.json").unlink()
    assert _contents(folder) == before


def test_another_download_does_not_go_on_in_the_folder_of_the_first(run, fails, lits: Path, tmp_path: Path) -> None:
    run("LiTS", lits)
    lits.rename(tmp_path / "moved")
    message = fails("LiTS", tmp_path / "moved")
    assert f"was made from {lits}, not from {tmp_path / 'moved'}" in message


def test_a_download_that_shrank_since_the_kill_is_refused(fails, lits: Path, raw: Path) -> None:
    for file in lits.glob("volume-*"):
        file.write_bytes(b"no volume")
    assert "No training case" in fails("LiTS", lits)
    line = {"case": "lits_000", "boxes": [], "num_outside": 0}
    (raw / "Dataset513_LiTS" / ".conversion" / "cases.jsonl").write_text(json.dumps(line))
    (lits / "volume-0.nii").unlink()
    assert "has changed since the conversion was begun: lits_000 is no longer there" in fails("LiTS", lits)


def test_an_output_that_is_no_folder(lits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["LiTS", "-i", str(lits), "-o", str(lits / "volume-0.nii"), "--disable_progress_bar"])
    assert "cannot be made" in capsys.readouterr().err


def test_two_copies_of_a_case_are_refused(fails, lits: Path) -> None:
    (lits / "copy").mkdir()
    for name in ("volume-0.nii", "segmentation-0.nii"):
        (lits / "copy" / name).write_bytes((lits / name).read_bytes())
    assert "holds lits_000 more than once" in fails("LiTS", lits)


def test_several_processes_write_what_one_does(run, lits: Path) -> None:
    (lits / "volume-4.nii").write_bytes(b"no volume")
    one = run("LiTS", lits, "-id", "600")
    several = run("LiTS", lits, processes=2)
    assert several.left_out == one.left_out
    ours, theirs = _contents(several.folder), _contents(one.folder)
    assert ours.keys() == theirs.keys()
    for file, content in theirs.items():
        if file.endswith(".json"):
            assert ours[file].decode() == content.decode().replace("Dataset600_LiTS", "Dataset513_LiTS")
        else:
            assert ours[file] == content
