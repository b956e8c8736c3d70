from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from PIL import Image

from nnunet_kd.cli.verify import main
from nnunet_kd.data.side_files import Problem, SideFileError
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.data.verify import image_size, raw_cases, verify_dataset
from nnunet_kd.planners.tasks import declared_tasks, prepare_side_files

NAME = "Dataset901_Toy"
CASES = [f"toy_{index:03d}" for index in range(6)]
TASKS: dict[str, Any] = {
    "classification": [
        {"file": "classification.csv", "column": "grade", "classes": ["low", "high"]},
        {"file": "classification.csv", "columns": ["effusion", "edema"]},
    ],
    "detection": {"file": "boxes.json", "classes": ["nodule", "cyst"]},
}
ROWS = ["low,0,1,p0", "high,1,0,p0", "low,,0,p1", "high,1,1,p1", ",0,0,p2", "high,0,0,"]
GRADES = ["low", "high"] * 3
SPLITS = [{"train": CASES[2:], "val": CASES[:2]}, {"train": [*CASES[:2], *CASES[4:]], "val": CASES[2:4]}]


class Toy:
    """A small 2D dataset (images of 36 x 40) with every kind of side file, in files that a test may spoil."""

    def __init__(self, root: Path) -> None:
        self.raw = root / "nnUNet_raw" / NAME
        self.preprocessed = root / "nnUNet_preprocessed" / NAME

    def write(self, block: Any, rows: list[str], boxes: Any) -> None:
        dataset_json = json.loads((self.raw / "dataset.json").read_text())
        (self.raw / "dataset.json").write_text(json.dumps({**dataset_json, "nnunet_kd": block}))
        (self.raw / "classification.csv").write_text("\n".join(["case,grade,effusion,edema,patient", *rows]) + "\n")
        (self.raw / "boxes.json").write_text(json.dumps(boxes))

    def plan(self, splits: Any) -> None:
        """Put there what nnU-Net's planning and preprocessing leave."""
        self.preprocessed.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.raw / "labelsTr", self.preprocessed / "gt_segmentations", dirs_exist_ok=True)
        for file in ("dataset.json", "classification.csv", "boxes.json"):
            shutil.copy(self.raw / file, self.preprocessed / file)
        (self.preprocessed / "splits_final.json").write_text(json.dumps(splits))
        shapes = [[1, 36, 40]] * len(CASES)
        (self.preprocessed / "dataset_fingerprint.json").write_text(json.dumps({"shapes_after_crop": shapes}))

    def problems(self) -> tuple[Problem, ...]:
        return verify_dataset(NAME, show_progress=False).problems


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_dataset: Callable[..., Path]) -> Toy:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    make_dataset(tmp_path / "nnUNet_raw", 901, "Toy", num_cases=len(CASES), dimension=2)
    toy = Toy(tmp_path)
    toy.write({"tasks": TASKS, "split_by": "patient"}, good_rows(), good_boxes())
    return toy


def good_rows() -> list[str]:
    return [f"{case},{row}" for case, row in zip(CASES, ROWS, strict=True)]


def good_boxes() -> dict[str, Any]:
    box = {"label": "nodule", "box": [0, 0, 40, 36]}
    cyst = {"label": "cyst", "box": [3.5, 4, 9, 10]}
    return {CASES[0]: [box, cyst, cyst], CASES[1]: [], CASES[2]: [box, cyst], CASES[3]: [box]}


def test_a_good_dataset_is_counted_and_has_no_problems(toy: Toy) -> None:
    toy.plan(SPLITS)
    report = verify_dataset(NAME, show_progress=False)
    assert report.problems == ()
    assert (report.dimension, report.num_cases, report.num_groups, report.ungrouped) == (2, 6, 3, (CASES[5],))
    grade, findings, boxes = report.contents
    assert (grade.num_cases, grade.counts, grade.num_without) == (5, {"low": 2, "high": 3}, 1)
    assert (findings.num_cases, findings.counts, findings.num_without) == (6, {"effusion": 2, "edema": 2}, 0)
    assert (boxes.num_cases, boxes.counts, boxes.num_without, boxes.num_empty) == (4, {"nodule": 3, "cyst": 3}, 2, 1)


def test_where_raw_is_gone_the_preprocessed_folder_is_checked_without_image_sizes(toy: Toy) -> None:
    toy.plan(SPLITS)
    shutil.rmtree(toy.raw)
    report = verify_dataset(NAME, show_progress=False)
    assert report.problems == ()
    assert (report.folder, report.dimension, report.num_cases) == (toy.preprocessed, 2, 6)
    (toy.preprocessed / "boxes.json").write_text(
        json.dumps({**good_boxes(), "other": [], CASES[5]: [{"label": "cyst", "box": [0, 0, 1, 99, 99, 2]}]})
    )
    assert [problem.where for problem in toy.problems()] == [f"case {CASES[5]}, box 0", "case other"]


def test_every_problem_is_found_in_one_run(toy: Toy) -> None:
    """One of each kind of bad input that side files, images and splits can hold."""
    tasks = {**TASKS, "detection": {"file": "boxes.json", "classes": ["nodule", "cyst", "mass"]}}
    rows = [*good_rows()[:5], f"{CASES[5]},medium,nan,0,", "ghost,low,0,0,p9", f"{CASES[0]},high,0,1,p7"]
    out, flat, flat_3d = [0, 0, 41, 36], [4, 4, 4, 9], [0, 0, 0, 1, 1, 1]
    boxes: dict[str, Any] = {**good_boxes(), "toy_000_0000": []}
    boxes[CASES[4]] = [{"label": "nodule", "box": box} for box in (out, flat, flat_3d, [0, 0, float("nan"), 1])]
    boxes[CASES[5]] = [{"label": "Cyst", "box": [0, 0, 1, 1]}]
    toy.write({"tasks": tasks, "split_by": "patient"}, rows, boxes)
    toy.plan([{"train": [CASES[0], CASES[2], CASES[4]], "val": [CASES[1], CASES[3]]}])
    expected = [
        ("classification.csv", "line 7, case toy_005", "grade is 'medium', which is not a class"),
        ("classification.csv", "line 7, case toy_005", "effusion is 'nan', which is neither 0 nor 1"),
        ("classification.csv", "line 8, case ghost", "there is no training image of this case"),
        ("classification.csv", "line 9, case toy_000", "this case has another row with other values of grade"),
        ("classification.csv", "line 9, case toy_000", "patient is 'p7', but 'p0' in another row of this case"),
        ("boxes.json", "case toy_000_0000", "there is no training image of this case"),
        ("boxes.json", "case toy_004, box 0", "x goes from 0 to 41, but the image from 0 to 40"),
        ("boxes.json", "case toy_004, box 1", "x1 = 4 is not above x0 = 4"),
        ("boxes.json", "case toy_004, box 2", "[0, 0, 0, 1, 1, 1] is a box in 3D, but the images are 2D"),
        ("boxes.json", "case toy_004, box 3", "[0, 0, NaN, 1] has an edge that is not a number"),
        ("boxes.json", "case toy_005, box 0", "'Cyst' is not a class"),
        ("boxes.json", "", "no training case has the class 'mass' of boxes.json"),
        ("splits_final.json", "fold 0", "2 value(s) of 'patient' are both in training and validation: p0, p1"),
        ("splits_final.json", "fold 0", "no training case of classification.csv, grade has high"),
        ("splits_final.json", "fold 0", "no training case of classification.csv, findings has effusion"),
        (
            "splits_final.json",
            "fold 0",
            "every labelled validation case of classification.csv, grade has high, so that the AUROC is not defined "
            "and has no part in choosing checkpoint_best",
        ),
    ]
    problems = toy.problems()
    assert sorted((Path(problem.file).name, problem.where, problem.what) for problem in problems) == sorted(expected)
    assert all(problem.remedy.endswith((".", "?")) for problem in problems)


@pytest.mark.parametrize(
    ("spoil", "file", "named"),
    [
        (lambda toy: (toy.raw / "boxes.json").unlink(), "boxes.json", ["the file does not exist"]),
        (lambda toy: (toy.raw / "boxes.json").write_text("{"), "boxes.json", ["malformed JSON"]),
        (lambda toy: (toy.raw / "boxes.json").write_text("[]"), "boxes.json", ["lists of boxes by case"]),
        (lambda toy: (toy.raw / "boxes.json").write_text(""), "boxes.json", ["the file is empty"]),
        (lambda toy: (toy.raw / "boxes.json").write_text("{}"), "boxes.json", ["no training case has any"]),
        (lambda toy: (toy.raw / "boxes.json").write_bytes(b'{"\xff": []}'), "boxes.json", ["UTF-8"]),
        (lambda toy: (toy.raw / "dataset.json").write_text("{"), "dataset.json", ["is not valid JSON"]),
        (lambda toy: (toy.raw / "dataset.json").write_text("[]"), "dataset.json", ["holds no object"]),
        (lambda toy: toy.write(5, [], {}), "dataset.json", ["nnunet_kd in dataset.json is 5"]),
        (
            lambda toy: (toy.raw / "dataset.json").write_bytes(b'{"\xff": 1}'),
            "dataset.json",
            ["Save it with the encoding"],
        ),
        (lambda toy: toy.write({"tasks": {"detection": {}}}, [], {}), "dataset.json", ["detection.classes"]),
        (lambda toy: shutil.rmtree(toy.raw / "imagesTr"), NAME, ["no training images"]),
        (lambda toy: next((toy.raw / "imagesTr").iterdir()).write_text("?"), None, ["cannot"]),
        (
            lambda toy: toy.write({"tasks": TASKS, "split_by": "site"}, good_rows(), good_boxes()),
            "classification.csv",
            ["no column 'site'"],
        ),
    ],
)
def test_a_broken_file_is_reported(toy: Toy, spoil: Callable[[Toy], Any], file: str | None, named: list[str]) -> None:
    spoil(toy)
    problems = [problem for problem in toy.problems() if file is None or Path(problem.file).name == file]
    assert len(problems) == len(named)
    for problem, text in zip(problems, named, strict=True):
        assert text in str(problem)
        assert problem.remedy


def test_a_missing_table_is_reported_once_for_all_who_read_it(toy: Toy) -> None:
    (toy.raw / "classification.csv").unlink()
    assert [problem.what for problem in toy.problems()] == ["the file does not exist"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the file is empty"),
        (b"case;grade;effusion;edema;patient\ntoy_000;low;0;1;p0\n", "not separated by commas"),
        (b'case,grade,effusion,edema,patient\ntoy_000,low,0,1,"p0\n', "malformed CSV"),
        (b"case,grade,effusion,edema,patient\ntoy_000,low,0,1,\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_not_said_to_lack_classes(toy: Toy, content: bytes, named: str) -> None:
    (toy.raw / "classification.csv").write_bytes(content)
    (problem,) = toy.problems()
    assert named in problem.what


# --- splits -----------------------------------------------------------------------------------------------------------
def fold_problems(toy: Toy, training: list[str], validation: list[str]) -> list[str]:
    toy.plan([{"train": training, "val": validation}])
    problems = toy.problems()
    assert all(Path(problem.file).name == "splits_final.json" for problem in problems)
    assert all(problem.where == "fold 0" for problem in problems)
    return [problem.what for problem in problems]


def test_cases_without_a_group_are_named_before_planning(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = Tasks.from_dataset_json(json.loads((toy.raw / "dataset.json").read_text()))
    prepare_side_files({NAME: tasks})
    assert f"WARNING: {NAME}: 1 case(s) without a value of 'patient'" in capsys.readouterr().out
    (toy.raw / "classification.csv").write_text(
        "\n".join(["case,grade,effusion,edema,patient", *(row[: row.rindex(",") + 1] for row in good_rows())])
    )
    match = "no training case has a value of patient, by which folds are made"
    with pytest.raises(SideFileError, match=match):
        prepare_side_files({NAME: tasks})
    toy.write({"split_by": "patient"}, [], {})
    with pytest.raises(SideFileError, match=match):
        prepare_side_files({NAME: Tasks(split_by="patient")})
    toy.write({"split_by": "patient"}, ["ghost,low,0,0,p9"], {})
    with pytest.raises(SideFileError, match=match):
        prepare_side_files({NAME: Tasks(split_by="patient")})
    assert verify_dataset(NAME, show_progress=False).notes == []
    assert "WARNING" not in capsys.readouterr().out


def test_a_group_on_both_sides_of_a_fold_is_reported(toy: Toy) -> None:
    (what,) = fold_problems(toy, [CASES[0], CASES[3], CASES[5]], [CASES[1], CASES[2], CASES[4]])
    assert what == "2 value(s) of 'patient' are both in training and validation: p0, p1"


def test_cases_on_both_sides_of_a_fold_and_unknown_ones_are_reported(toy: Toy) -> None:
    found = fold_problems(toy, [*CASES, "nobody"], [CASES[-1], "nothing"])
    assert found[:2] == [
        f"1 case(s) are both in training and validation: {CASES[-1]}",
        "2 case(s) have no training image: nobody, nothing",
    ]


def test_a_fold_that_nobody_may_train_forbids_no_planning(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock nnU-Net lets a fold validate on its training cases, "if this is intentional"."""
    toy.plan([*SPLITS, {"train": CASES, "val": CASES[:2]}])
    tasks = Tasks.from_dataset_json(json.loads((toy.raw / "dataset.json").read_text()))
    with pytest.raises(SideFileError, match=r"'patient' are both in training and validation"):
        prepare_side_files({NAME: tasks})
    toy.write({"tasks": TASKS}, good_rows(), good_boxes())
    prepare_side_files({NAME: replace(tasks, split_by=None)})
    assert f"fold 2: 2 case(s) are both in training and validation: {CASES[0]}, {CASES[1]}" in capsys.readouterr().out


def test_mistakes_of_all_datasets_are_listed_and_stop_the_others_too(toy: Toy) -> None:
    toy.plan(SPLITS)
    copies = {name: Toy(toy.raw.parent.parent) for name in ("Dataset902_Wrong", "Dataset903_Good")}
    for name, copy in copies.items():
        copy.raw, copy.preprocessed = (shutil.copytree(f, f.parent / name) for f in (toy.raw, toy.preprocessed))
    block = {"tasks": TASKS}  # without the groups of before
    wrong = [{"label": "nodule", "box": [9, 9, 3, 12]}] * 25
    toy.write(block, good_rows(), {**good_boxes(), CASES[1]: wrong})
    wrong_copy, good_copy = copies.values()
    wrong_copy.write(block, [*good_rows(), "nobody,low,0,1,p0"], good_boxes())
    good_copy.write(block, good_rows()[:-1], good_boxes())
    tasks = dict.fromkeys(("Dataset903_Good", NAME, "Dataset902_Wrong"), Tasks.from_dataset_json({"nnunet_kd": block}))
    files = sorted(file for file in toy.preprocessed.parent.rglob("*") if file.is_file())
    before = [file.read_bytes() for file in files]
    with pytest.raises(SideFileError) as error:
        prepare_side_files(tasks)
    assert f"... and 5 more in {toy.raw / 'boxes.json'}" in str(error.value)
    assert "nobody" in str(error.value)
    assert [file.read_bytes() for file in files] == before
    prepare_side_files({"Dataset903_Good": tasks["Dataset903_Good"]})
    for file in ("classification.csv", "boxes.json"):
        assert (good_copy.preprocessed / file).read_bytes() == (good_copy.raw / file).read_bytes()
    assert json.loads((good_copy.preprocessed / "dataset.json").read_text())["nnunet_kd"] == block


def test_mistakes_in_the_declaration_are_listed_with_those_of_the_side_files_of_all_datasets(toy: Toy) -> None:
    other = Toy(toy.raw.parent.parent)
    other.raw = shutil.copytree(toy.raw, toy.raw.parent / "Dataset902_Wrong")
    grade, findings = TASKS["classification"]
    tasks = {"classification": [{**grade, "classes": ["low"]}, {**findings, "files": "x"}], "detection": []}
    other.write({"tasks": {**tasks, "depth": 1}, "split_by": 3}, good_rows(), good_boxes())
    wrong_rows = [*good_rows(), "nobody,low,0,1,p0"]
    toy.write({"tasks": {**TASKS, "segmentation": "no"}}, wrong_rows, {})
    expected = {
        str(toy.raw / "dataset.json"): ["tasks.segmentation"],
        str(toy.raw / "classification.csv"): ["line 8, case nobody"],
        str(toy.raw / "boxes.json"): ["no training case has any"],
        str(other.raw / "dataset.json"): ["'depth'", "split_by", "classification[0].classes", "'files'", "detection"],
    }
    with pytest.raises(SideFileError) as error:
        declared_tasks([NAME, "Dataset902_Wrong"])
    for file, named in expected.items():
        own = [str(problem) for problem in error.value.problems if problem.file == file]
        assert len(own) == len(named)
        for text in named:
            assert any(text in problem for problem in own)
    assert len(error.value.problems) == sum(map(len, expected.values()))


def test_a_training_fold_that_lacks_a_class_is_reported(toy: Toy) -> None:
    found = fold_problems(toy, [CASES[1], CASES[0]], [CASES[2], CASES[3]])
    assert found == []
    found = fold_problems(toy, CASES[3:], CASES[:2])
    assert found == [
        "no training case of classification.csv, grade has low",
        "no training case of boxes.json has cyst",
    ]


def test_a_finding_needs_both_answers(toy: Toy) -> None:
    rows = [f"{case},{grade},{effusion},1," for case, grade, effusion in zip(CASES, GRADES, "101011", strict=True)]
    toy.write({"tasks": TASKS}, rows, {**good_boxes(), CASES[4]: [{"label": "cyst", "box": [0, 0, 1, 1]}]})
    found = fold_problems(toy, [CASES[0], *CASES[2:4], CASES[5]], [CASES[1], CASES[4]])
    assert found == ["every labelled training case of classification.csv, findings has edema"]
    found = fold_problems(toy, [CASES[0], CASES[5], CASES[2]], [CASES[1], CASES[4]])
    assert found == [
        f"every labelled training case of classification.csv, findings has {x}" for x in ("effusion", "edema")
    ]


def test_a_validation_that_gives_no_score_is_reported(toy: Toy) -> None:
    found = fold_problems(toy, [CASES[0], *CASES[2:4]], [CASES[4]])
    assert [what.split(", so that")[0] for what in found] == [
        "no validation case of classification.csv, grade is labelled",
        "no validation case of classification.csv, findings has effusion, edema",
        "no validation case of boxes.json has nodule, cyst",
    ]


@pytest.mark.parametrize(
    "table",
    [
        "\n".join(["case,grade,edema,patient", *(f"{case},high,0,p" for case in CASES)]),
        "\n".join(["case,grade,effusion,edema,patient", *good_rows()[:2], '"toy_002,low', *good_rows()[3:]]),
    ],
)
def test_what_could_not_be_read_is_not_said_to_be_missing(toy: Toy, table: str) -> None:
    toy.plan([{"train": CASES[:2], "val": CASES[2:]}])
    for folder in (toy.raw, toy.preprocessed):
        (folder / "classification.csv").write_text(table)
    report = verify_dataset(NAME, show_progress=False)
    assert report.notes == []
    unread = [problem for problem in report.problems if problem.is_unread]
    assert len(unread) == 1
    others = "".join(problem.what for problem in report.problems)
    assert "findings" not in others
    assert ("grade" in others) == ("effusion" not in table)  # what is wrong with the column that is there is said


@pytest.mark.parametrize("splits", [{}, [[]], [{"train": []}], [{"train": None, "val": [CASES[0]]}], "x"])
def test_splits_of_another_form_are_reported(toy: Toy, splits: Any) -> None:
    toy.plan(splits)
    (problem,) = toy.problems()
    assert Path(problem.file).name == "splits_final.json"
    assert "'train' and 'val'" in problem.what


def test_a_copy_that_differs_from_the_raw_file_is_reported(toy: Toy) -> None:
    toy.plan(SPLITS)
    (toy.raw / "boxes.json").write_text(json.dumps({**good_boxes(), CASES[1]: good_boxes()[CASES[0]]}))
    assert [(problem.file, "differs" in problem.what) for problem in toy.problems()] == [
        (str(toy.preprocessed / "boxes.json"), True)
    ]
    toy.write({"tasks": {**TASKS, "segmentation": False}, "split_by": "patient"}, good_rows(), good_boxes())
    assert [(problem.file, "other tasks" in problem.what) for problem in toy.problems()] == [
        (str(toy.preprocessed / "dataset.json"), True)
    ]


# --- images -----------------------------------------------------------------------------------------------------------
def test_image_sizes_are_those_that_the_readers_return(tmp_path: Path) -> None:
    volume = np.zeros((3, 5, 7), dtype=np.uint8)
    Image.fromarray(volume[0]).save(tmp_path / "plane.png")
    Image.fromarray(np.zeros((5, 7, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / "volume.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(volume[0]), str(tmp_path / "plane.mha"))
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), tmp_path / "other.nii.gz")
    for file, reader, size in (
        ("plane.png", NaturalImage2DIO, (5, 7)),
        ("colour.png", NaturalImage2DIO, (5, 7)),
        ("volume.nii.gz", SimpleITKIO, (3, 5, 7)),
        ("plane.mha", SimpleITKIO, (5, 7)),
        ("other.nii.gz", NibabelIO, (3, 5, 7)),
    ):
        images, _ = reader().read_images((str(tmp_path / file),))
        assert image_size(tmp_path / file, reader) == size == tuple(images.shape[1:])[-len(size) :]


def test_single_slices_in_files_of_volumes_have_boxes_in_2d(toy: Toy) -> None:
    for file in (toy.raw / "imagesTr").iterdir():
        slices = np.array(Image.open(file))[None]
        sitk.WriteImage(sitk.GetImageFromArray(slices), str(file).replace(".png", ".nii.gz"))
        file.unlink()
    dataset_json = json.loads((toy.raw / "dataset.json").read_text())
    (toy.raw / "dataset.json").write_text(json.dumps({**dataset_json, "file_ending": ".nii.gz"}))
    toy.write({"tasks": {**TASKS, "segmentation": False}, "split_by": "patient"}, good_rows(), good_boxes())
    report = verify_dataset(NAME, show_progress=False)
    assert (report.dimension, report.problems) == (2, ())
    outside = {**good_boxes(), CASES[3]: [{"label": "nodule", "box": [0, 0, 41, 36]}]}
    toy.write({"tasks": {**TASKS, "segmentation": False}}, good_rows(), outside)
    (problem,) = toy.problems()
    assert "x goes from 0 to 41, but the image from 0 to 40" in str(problem)


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient"])
def test_boxes_are_refused_where_a_reader_turns_the_images(toy: Toy, reader: str) -> None:
    for file in (toy.raw / "imagesTr").iterdir():
        volume = np.stack([np.array(Image.open(file))] * 3)
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(file).replace(".png", ".nii.gz"))
        file.unlink()
    dataset_json = json.loads((toy.raw / "dataset.json").read_text())
    dataset_json |= {"file_ending": ".nii.gz", "overwrite_image_reader_writer": reader}
    (toy.raw / "dataset.json").write_text(json.dumps(dataset_json))
    toy.write({"tasks": {"detection": TASKS["detection"]}}, [], {})
    what = [problem.what for problem in toy.problems() if "turns" in problem.what]
    assert what == [f"its boxes are in the axes of the stored image, which {reader} turns"]


def test_missing_segmentations_are_reported_once_unless_they_are_copied_already(toy: Toy) -> None:
    for case in CASES[:2]:
        (toy.raw / "labelsTr" / f"{case}.png").rename(toy.raw / f"{case}.png")
    (problem,) = toy.problems()
    assert (problem.file, problem.what) == (
        str(toy.raw / "labelsTr"),
        f"2 of 6 cases have no segmentation: {CASES[0]}, {CASES[1]}",
    )
    assert '"segmentation": false' in problem.remedy
    toy.plan(SPLITS)
    for case in CASES[:2]:
        (toy.raw / f"{case}.png").rename(toy.preprocessed / "gt_segmentations" / f"{case}.png")
    assert toy.problems() == ()
    toy.write({"tasks": {**TASKS, "segmentation": False}}, good_rows(), good_boxes())
    shutil.rmtree(toy.raw / "labelsTr")
    shutil.rmtree(toy.preprocessed)
    assert toy.problems() == ()


def test_cases_may_be_listed_in_dataset_json(toy: Toy) -> None:
    dataset_json = json.loads((toy.raw / "dataset.json").read_text())
    found = raw_cases(toy.raw, dataset_json)
    assert list(found) == CASES
    assert all(files.image.is_file() and files.segmentation.is_file() for files in found.values())
    listed = {case: {"images": [f"imagesTr/{case}_0000.png"], "label": f"labelsTr/{case}.png"} for case in CASES[:2]}
    assert raw_cases(toy.raw, {**dataset_json, "dataset": listed}) == {case: found[case] for case in CASES[:2]}


# --- command ----------------------------------------------------------------------------------------------------------
def test_the_command_prints_all_and_its_status_tells(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-d", "901", "--disable_progress_bar"])
    output = capsys.readouterr().out
    assert f"{NAME} in {toy.raw.parent}: 2D, 6 cases" in output
    assert "5 labelled (low 2, high 3), 1 images without a label" in output
    assert "4 entries, 6 boxes (nodule 3, cyst 3), 1 entries without boxes, 2 images without an entry" in output
    assert "split by patient: 3 groups\n" in output
    assert "1 case(s) without a value of 'patient' in classification.csv are each taken for a group of" in output
    assert f"their own: {CASES[5]}. Fill it in" in output
    assert "no problems" in output

    (toy.raw / "boxes.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["-d", "901", NAME, "--disable_progress_bar"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.count(f"{toy.raw / 'boxes.json'}: the file does not exist") == 2

    for dataset in ("902", "Dataset902_Missing"):
        with pytest.raises(SystemExit) as ended:
            main(["-d", dataset, "--disable_progress_bar"])
        assert ended.value.code == 2
        assert "902" in capsys.readouterr().err

    with pytest.raises(SystemExit) as ended:
        main(["-d", "902", "Dataset903_Missing", "901", "--disable_progress_bar"])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert f"{toy.raw / 'boxes.json'}: the file does not exist" in output.out  # the others keep it from nothing
    assert "902" in output.err
    assert "Dataset903_Missing" in output.err


def test_a_joint_dataset_is_refused(toy: Toy) -> None:
    toy.write({"members": ["Dataset301_A"]}, [], {})
    with pytest.raises(SideFileError, match="joint dataset"):
        verify_dataset(NAME, show_progress=False)
