"""Prediction files, and nnUNetKD_evaluate on folders of them, as a user calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nnunet_kd.cli.evaluate import main, table
from nnunet_kd.data.side_files import SideFileError
from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.folder import evaluate_folder
from nnunet_kd.evaluation.prediction_files import (
    read_box_predictions,
    read_classification_predictions,
    write_box_predictions,
    write_classification_predictions,
)
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.evaluation.statistics import bootstrap_interval
from nnunet_kd.evaluation.tasks import evaluate_tasks, summarize_segmentation

GRADE = ClassificationTarget("grade", "classification.csv", ("grade",), ("II", "III"), multilabel=False)
FINDINGS = ClassificationTarget("findings", "classification.csv", ("a", "b, c"), ("a", "b, c"), multilabel=True)
CLASSES = ("cyst", "stone")
BLOCK = {
    "tasks": {
        "classification": {"file": "classification.csv", "column": "grade", "classes": ["II", "III"]},
        "detection": {"file": "boxes.json", "classes": ["cyst"]},
    },
    "split_by": "patient",
}


# --- prediction files -------------------------------------------------------------------------------------------------
def test_classification_round_trip(tmp_path: Path) -> None:
    probabilities = np.random.default_rng(0).dirichlet([1, 1], size=5).astype(np.float32)
    written = {
        f"case {number}, left": {"grade": row, "findings": row[::-1]} for number, row in enumerate(probabilities)
    }
    write_classification_predictions(tmp_path / "classification.csv", written, [GRADE, FINDINGS])
    read = read_classification_predictions(tmp_path / "classification.csv", [FINDINGS, GRADE])
    assert list(read) == list(written)
    for case, own in written.items():
        for target in ("grade", "findings"):
            assert np.array_equal(read[case][target].astype(np.float32), own[target])


def test_classification_format(tmp_path: Path) -> None:
    file = tmp_path / "classification.csv"
    write_classification_predictions(file, {"x": {"grade": np.array([0.25, 0.75])}}, [GRADE])
    assert file.read_text() == "case,grade/II,grade/III\nx,0.25,0.75\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,grade/II\nx,1\n", "no column 'grade/III'"),
        (
            "case,grade/II,grade/III,grade/IV\nx,0.5,0.5,0\n",
            "'grade/IV' is of no class of grade; its classes are II, III",
        ),
        ("case,grade/II,grade/III\nx,nan,1\n", "line 2, case x: grade/II is 'nan', which is not a number in"),
        ("case,grade/II,grade/III\nx,0,1\ny,0.5,\n", "line 3, case y: grade/III is ''"),
        ("case,grade/II,grade/III\nx,-0.1,1.1\n", "grade/II is '-0.1'"),
        ("case,grade/II,grade/III\nx,0.5,0.6\n", "grade add up to 1.1, not to 1"),
        ("case,grade/II,grade/III\nx,0.5,0.5\nx,0.5,0.5\n", "line 3, case x: the case has another row"),
        ("case,grade/II,grade/III\nx,0.5\n", "line 2: 2 values, but the header has 3"),
        (b"case,grade/II,grade/III\n\xff,0.5,0.5\n", "line 2 is not UTF-8"),
        ("", "the file is empty"),
    ],
)
def test_bad_classification_predictions(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "classification.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SideFileError) as error:
        read_classification_predictions(file, [GRADE])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert str(file) in str(error.value)


def test_all_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "classification.csv"
    file.write_text("case,grade/II,grade/III\nx,nan,1\ny,0.5,0.5\nz,0,0\n")
    with pytest.raises(SideFileError, match=r"(?s)case x.*\n.*case z"):
        read_classification_predictions(file, [GRADE])


@pytest.mark.parametrize("dimension", [2, 3])
def test_box_round_trip(tmp_path: Path, dimension: int) -> None:
    random = np.random.default_rng(dimension)
    written = {}
    for number in (0, 1, 7, 40):
        lower = random.normal(0, 300, (number, dimension)).astype(np.float32)
        upper = lower + random.exponential(20, lower.shape).astype(np.float32) + np.float32(0.01)
        scores = np.sort(random.random(number).astype(np.float32) ** 9)[::-1]
        written[f"case {number}"] = random.integers(0, 2, number), np.concatenate([lower, upper], axis=1), scores
    write_box_predictions(tmp_path / "boxes.json", written, CLASSES)
    read = read_box_predictions(tmp_path / "boxes.json", CLASSES, dimension)
    assert list(read) == list(written)
    for case, own in written.items():
        for back, original in zip(read[case], own, strict=True):
            assert back.shape == original.shape
            assert np.array_equal(back.astype(original.dtype), original)


def test_box_format_has_x_first_and_falling_scores(tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    boxes = np.array([[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60.5]])
    predicted = {"x": (np.array([0, 1]), boxes, np.array([0.25, 0.5])), "y": (np.zeros(0, int), boxes[:0], np.zeros(0))}
    write_box_predictions(file, predicted, CLASSES)
    assert json.loads(file.read_text()) == {
        "x": [
            {"label": "stone", "box": [30, 20, 10, 60.5, 50, 40], "score": 0.5},
            {"label": "cyst", "box": [3, 2, 1, 6, 5, 4], "score": 0.25},
        ],
        "y": [],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": [{"label": "tumour", "box": [0, 0, 1, 1], "score": 0.5}]}', "case x, box 0: 'tumour' is not a class"),
        ('{"x": [{"label": "cyst", "box": [0, 0, 1, 1]}]}', "case x, box 0: its score is null"),
        ('{"x": [{"label": "cyst", "box": [0, 0, 1, 1], "score": NaN}]}', "its score is NaN"),
        ('{"x": [{"label": "cyst", "box": [0, 0, 1, 1], "score": 1.5}]}', "its score is 1.5"),
        ('{"x": [{"label": "cyst", "box": [0, 0, 1, 1], "score": true}]}', "its score is true"),
        ('{"x": [{"label": "cyst", "box": [0, NaN, 1, 1], "score": 0.5}]}', "not a number"),
        ('{"x": [{"label": "cyst", "box": [0, 0, 0, 1, 1, 1], "score": 0.5}]}', "is a box in 3D"),
        ('{"x": [{"label": "cyst", "box": [1, 0, 1, 1], "score": 0.5}]}', "x1 = 1 is not above x0 = 1"),
        ('{"x": [', "malformed JSON"),
        ("[]", "does not hold lists of boxes by case"),
    ],
)
def test_bad_box_predictions(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(SideFileError) as error:
        read_box_predictions(file, CLASSES, dimension=2)
    assert message in str(error.value)
    assert str(file) in str(error.value)


# --- evaluation -------------------------------------------------------------------------------------------------------
@pytest.fixture
def dataset(tmp_path: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A 2D dataset of 8 cases and 4 patients with all tasks; one case has no label, three have no boxes."""
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    folder = make_dataset(raw, 7, "Kidney", num_cases=8, dimension=2, extra={"nnunet_kd": BLOCK})
    grades = ["II", "III", "II", "III", "II", "III", "III", ""]
    rows = [f"kidney_00{number},{grade},p{number // 2}" for number, grade in enumerate(grades)]
    (folder / "classification.csv").write_text("\n".join(["case,grade,patient", *rows]) + "\n")
    boxes = {f"kidney_00{number}": [{"label": "cyst", "box": [10, 2, 20, 8]}] for number in range(5)}
    (folder / "boxes.json").write_text(json.dumps({**boxes, "kidney_005": []}))  # and no entry for 006 and 007
    (preprocessed / folder.name).mkdir(parents=True)
    splits = [{"train": [f"kidney_00{number}" for number in range(4)], "val": ["kidney_004", "kidney_006"]}]
    (preprocessed / folder.name / "splits_final.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    return folder


@pytest.fixture
def predicted(dataset: Path, tmp_path: Path) -> Path:
    """Predictions of all cases and of one that the dataset does not have."""
    folder = tmp_path / "predicted"
    shutil.copytree(dataset / "labelsTr", folder)
    flawed = folder / "kidney_003.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(flawed)))).save(flawed)
    cases = [f"kidney_00{number}" for number in range(8)]
    third = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.25, 0.5])
    probabilities = {case: {"grade": np.array([1 - own, own])} for case, own in zip(cases, third, strict=True)}
    write_classification_predictions(
        folder / "classification.csv", {**probabilities, "other": {"grade": np.array([0.5, 0.5])}}, [GRADE]
    )
    found = np.array([[2.0, 10.0, 8.0, 20.0]])  # array order
    one, none = (np.array([0]), found, np.array([0.9])), (np.zeros(0, int), found[:0], np.zeros(0))
    boxes = {case: none if case == "kidney_004" else one for case in cases}
    write_box_predictions(folder / "boxes.json", boxes, ["cyst"])
    return folder


def evaluated(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a call that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_all_tasks(dataset: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        main(["-ref", str(dataset), "-pred", str(predicted), "-o", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"
    main(["-ref", str(dataset), "-pred", str(predicted), "-o", str(tmp_path / "out")])
    content = evaluated(tmp_path / "out")
    assert content["segmentation"]["classes"]["lesion"]["dice"]["value"] == pytest.approx(7 / 8)
    grade = content["classification"]["grade"]
    assert (grade["num_cases"], grade["num_groups"]) == (7, 4)
    assert grade["auroc_macro"]["value"] == pytest.approx(11 / 12)  # one III, 0.25, is below one II, 0.3
    assert grade["confusion"] == [[3, 0], [1, 3]]
    detection = content["detection"]
    assert (detection["num_images"], detection["num_images_without_boxes"]) == (8, 3)
    # 4 of 5 boxes are found, and all 7 detections have the same score: 3 false positives in 8 images
    assert detection["mean"]["froc"] == pytest.approx([0, 0] + [0.8] * 5)
    assert detection["mean"]["ap_50"]["value"] == pytest.approx(81 / 101)
    assert "curve" not in detection["classes"][0]
    assert "NaN" not in (tmp_path / "out" / "evaluation.json").read_text()

    classification = pd.read_csv(tmp_path / "out" / "classification_metrics.csv", keep_default_na=False)
    row = classification[(classification["class"] == "") & (classification["metric"] == "auroc")].iloc[0]
    assert (row["target"], float(row["value"])) == ("grade", pytest.approx(11 / 12))
    boxes = pd.read_csv(tmp_path / "out" / "detection_metrics.csv").set_index(["class", "metric"])["value"]
    assert boxes["cyst", "sensitivity@0.5"] == pytest.approx(0.8)
    assert boxes["cyst", "detections"] == 7
    means = pd.read_csv(tmp_path / "out" / "segmentation_metrics.csv", keep_default_na=False)
    row = means[(means["class"] == "") & (means["metric"] == "dice")].iloc[0]
    assert float(row["value"]) == pytest.approx(7 / 8)
    assert float(row["low"]) < float(row["value"]) <= float(row["high"])
    assert set(means[means["metric"] == "volume_error_ml"]["value"]) == {""}  # the images are 2D
    assert pd.read_csv(tmp_path / "out" / "segmentation_cases.csv")["dice"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    figures = sorted(file.name for file in (tmp_path / "out" / "figures").iterdir())
    kinds = ("confusion", "precision_recall", "reliability", "roc")
    assert figures == ["detection_froc.png", *(f"grade_{kind}.png" for kind in kinds)]

    printed = capsys.readouterr().out
    assert "Classification: grade (multi-class, 7 cases, 4 groups)" in printed
    assert "0.875 [" in printed
    assert "Note: grade: 1 predicted cases are not in the dataset." in printed
    assert "Note: grade: 1 of 8 cases have no label." in printed


def test_fold_by_id_into_the_prediction_folder(predicted: Path) -> None:
    """Twice, because files of the first evaluation must not be taken for predictions by the second."""
    for _ in range(2):
        main(["-ref", "7", "-pred", str(predicted), "--fold", "0", "--no_figures"])
        content = evaluated(predicted)
        assert content["segmentation"]["num_cases"] == content["classification"]["grade"]["num_cases"] == 2
        assert content["detection"]["num_images"] == 2
        assert content["detection"]["mean"]["froc"] == [0] * 7
        assert not (predicted / "figures").exists()


def test_fold_needs_all_its_cases(predicted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (predicted / "kidney_006.png").unlink()
    message = fails(capsys, "-ref", "7", "-pred", predicted, "--fold", "0")
    assert f"segmentation: 1 of 2 cases have no prediction in {predicted}, among them kidney_006" in message
    assert "has no fold 3. Its folds are 0 to 0" in fails(capsys, "-ref", "7", "-pred", predicted, "--fold", "3")


def test_named_cases(dataset: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cases.txt").write_text("kidney_000\nkidney_001\n")
    arguments = ["-ref", str(dataset), "-pred", str(predicted), "--cases", str(tmp_path / "cases.txt"), "--no_figures"]
    main(arguments)
    assert evaluated(predicted)["detection"]["mean"]["ap_50"]["value"] == 1
    (tmp_path / "cases.txt").write_text("kidney_000 kidney_077")
    assert "1 of 2 cases are not in the dataset, among them kidney_077" in fails(capsys, *arguments)


def test_a_task_that_was_asked_for_must_be_there(
    dataset: Path, predicted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (predicted / "boxes.json").unlink()
    arguments = ["-ref", str(dataset), "-pred", str(predicted), "--no_figures"]
    assert f"detection cannot be evaluated: {predicted} has no boxes.json" in fails(
        capsys, *arguments, "--tasks", "detection"
    )
    main(arguments)
    assert {"segmentation", "classification"} == evaluated(predicted).keys() & {
        "segmentation",
        "classification",
        "detection",
    }
    description = json.loads((dataset / "dataset.json").read_text())
    description["nnunet_kd"] = {"tasks": {}}
    (dataset / "dataset.json").write_text(json.dumps(description))
    message = fails(capsys, *arguments, "--tasks", "classification")
    assert "dataset.json of Dataset007_Kidney declares no classification" in message


def test_nothing_to_evaluate_says_why(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    message = fails(capsys, "-ref", dataset, "-pred", tmp_path / "empty")
    assert "nothing to evaluate" in message
    assert "has no segmentation of a case of Dataset007_Kidney, for example kidney_000.png" in message
    assert "has no classification.csv" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-ref", "7", "-pred", "nowhere"), "The prediction folder nowhere does not exist"),
        (("-ref", "77", "-pred", "."), "There is no dataset with id 77"),
        (("-ref", "Dataset077_Gone", "-pred", "."), "neither a folder nor a dataset"),
        (("-ref", ".", "-pred", "."), "dataset.json does not exist"),
        (("-ref", "7", "-pred", ".", "--cases", "gone.txt"), "--cases gone.txt cannot be read"),
    ],
)
@pytest.mark.usefixtures("dataset")
def test_bad_arguments(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert message in fails(capsys, *arguments)


def test_a_short_row_of_the_groups_file_is_named(
    dataset: Path, predicted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dataset / "classification.csv"
    file.write_text("grade,patient,case\nII,p0,kidney_000\nIII,p0\n")
    message = fails(capsys, "-ref", dataset, "-pred", predicted, "--no_figures")
    assert f"{file}, line 3: 2 values, but the header has 3 columns" in message


@pytest.mark.parametrize("ending", [None, ""])
def test_a_reference_without_file_ending_is_refused(
    dataset: Path, predicted: Path, ending: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    del description["file_ending"]
    (dataset / "dataset.json").write_text(
        json.dumps({**description, **({} if ending is None else {"file_ending": ""})})
    )
    message = fails(capsys, "-ref", dataset, "-pred", predicted)
    assert f"{dataset / 'dataset.json'} has no 'file_ending'" in message


def test_predictions_of_other_images(dataset: Path, predicted: Path) -> None:
    write_box_predictions(predicted / "boxes.json", {}, ["cyst"])
    with pytest.raises(NnUNetKDError, match="none of the 0 predicted cases"):
        evaluate_tasks(ReferenceDataset.open(str(dataset)), predicted, tasks=["detection"])


def test_side_files_of_a_preprocessed_dataset_may_lie_in_the_raw_one(dataset: Path, predicted: Path) -> None:
    preprocessed = dataset.parents[1] / "preprocessed" / dataset.name
    shutil.copytree(dataset / "labelsTr", preprocessed / "gt_segmentations")
    shutil.copy(dataset / "dataset.json", preprocessed)
    reference = ReferenceDataset.open(str(preprocessed))
    assert reference.segmentation_folder == preprocessed / "gt_segmentations"
    evaluation = evaluate_tasks(reference, predicted, num_resamples=0, show_progress=False)
    assert evaluation.detection is not None
    assert evaluation.detection.mean.ap_50.value == pytest.approx(81 / 101)
    assert evaluation.classification[0].scores.num_groups == 4


def test_segmentation_summary(dataset: Path, predicted: Path) -> None:
    rows = evaluate_folder(
        dataset / "labelsTr",
        predicted,
        json.loads((dataset / "dataset.json").read_text()),
        cases=[f"kidney_00{number}" for number in range(8)],
        show_progress=False,
    )
    rows.loc[len(rows)] = {**rows.iloc[0].to_dict(), "class": "rare", "dice": 0.5}
    summary = {(row["class"], row["metric"]): row for row in summarize_segmentation(rows, {})}
    assert summary["rare", "dice"]["value"] == 0.5  # where it has a value
    assert summary["", "dice"]["value"] == pytest.approx((0.75 + 6) / 8)  # classes are averaged within a case first
    other = bootstrap_interval(rows.loc[rows["class"] == "lesion", "dice"])
    own = summary["lesion", "dice"]
    assert (own["value"], own["low"], own["high"]) == pytest.approx((other.value, other.low, other.high), abs=0.01)


def test_table_shows_a_missing_value_as_such() -> None:
    rows = [
        {"class": "a", "metric": "cases", "value": 3},
        {"class": "a", "metric": "auroc", "value": float("nan"), "low": float("nan"), "high": float("nan")},
        {"class": "", "metric": "auroc", "value": 0.5, "low": 0.25, "high": 0.75},
    ]
    assert table(rows).splitlines() == [
        "       a    all",
        "cases  3",
        "auroc  n/a  0.500 [0.250, 0.750]",
    ]
