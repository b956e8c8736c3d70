"""Datasets with image-level classes and boxes: planned, trained, predicted and evaluated by the real commands."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from nnunet_kd.networks.multitask import UNTRAINED

pytestmark = pytest.mark.integration

EVERYTHING, CLASSES, VOLUMES = "Dataset011_Everything", "Dataset012_Classes", "Dataset013_Volumes"
SETTINGS = {
    "training": {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2, "seed": 1},
    "tasks": {"label_smoothing": 0.1},
}
SIZES = {"file": "classification.csv", "column": "size", "classes": ["small", "large"]}
FINDINGS = {"file": "classification.csv", "columns": ["dark", "bright"]}
LESIONS = {"file": "boxes.json", "classes": ["lesion"]}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def planned(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path], write_side_files: Callable[[Path], None]
) -> Any:
    """2D with all tasks; 2D with classes alone and no labelsTr; 3D with all tasks."""
    world = make_world()
    tasks = {"segmentation": True, "classification": [SIZES, FINDINGS], "detection": LESIONS}
    block = {"nnunet_kd": {"tasks": tasks, "split_by": "patient"}}
    everything = make_dataset(world.raw, 11, "Everything", num_cases=10, num_test_cases=2, dimension=2, extra=block)
    write_side_files(everything)
    block = {"nnunet_kd": {"tasks": {"segmentation": False, "classification": SIZES}, "split_by": "patient"}}
    classes = make_dataset(world.raw, 12, "Classes", num_cases=10, num_test_cases=2, dimension=2, extra=block)
    write_side_files(classes)
    shutil.rmtree(classes / "labelsTr")
    block = {"nnunet_kd": {"tasks": {"classification": SIZES, "detection": LESIONS}}}
    volumes = make_dataset(world.raw, 13, "Volumes", num_cases=5, shape=(12, 20, 18), extra=block)
    write_side_files(volumes)
    world.plan("-d", "11", "12", "-c", "2d")
    world.plan("-d", "13", "-c", "3d_fullres", "2d")
    for dataset, name in ((11, EVERYTHING), (12, CLASSES), (13, VOLUMES)):
        world.run("nnUNetKD_plan_student", "-d", str(dataset), "--width", "0.25", "-plans_name", "nnUNetKDPlansSmall")
        assert (world.preprocessed / name / "nnUNetKDPlansSmall.json").is_file()
    return world


@pytest.fixture(scope="module")
def trained(planned: Any) -> Any:
    """The control of the dataset with all tasks."""
    planned.train(11, "Control", "-p", "nnUNetKDPlansSmall", configuration="2d", settings=SETTINGS)
    return planned


@pytest.fixture(scope="module")
def classifier(planned: Any) -> Path:
    """The control of the dataset with classes alone."""
    planned.train(12, "Control", "-p", "nnUNetKDPlansSmall", configuration="2d", settings=SETTINGS)
    return control(planned, CLASSES)


def control(world: Any, dataset: str, configuration: str = "2d") -> Path:
    return world.model(dataset, "Control", "nnUNetKDPlansSmall", configuration)


def test_groups_are_not_divided_and_raw_folders_stay_as_they_are(planned: Any) -> None:
    for dataset in (EVERYTHING, CLASSES):
        with (planned.raw / dataset / "classification.csv").open() as file:
            patient = {row["case"]: row["patient"] for row in csv.DictReader(file)}
        for split in read(planned.preprocessed / dataset / "splits_final.json"):
            assert not {patient[case] for case in split["train"]} & {patient[case] for case in split["val"]}
    assert not (planned.raw / CLASSES / "labelsTr").exists()
    assert len(list((planned.preprocessed / CLASSES / "nnUNetPlans_2d").glob("*.pkl"))) == 10


def test_boxes_of_volumes_are_planned_in_3d_only(planned: Any) -> None:
    configurations = read(planned.preprocessed / VOLUMES / "nnUNetKDPlans.json")["configurations"]
    heads = {name: content["architecture"]["arch_kwargs"] for name, content in configurations.items()}
    assert heads["2d"]["detection"] is None
    assert len(heads["3d_fullres"]["detection"]["anchors"][0][0]) == 3
    assert heads["2d"]["classification"] == heads["3d_fullres"]["classification"] == {"targets": [["size", 2]]}


def test_validation_writes_all_tasks_and_their_metrics(trained: Any) -> None:
    fold = control(trained, EVERYTHING) / "fold_0"
    cases = read(trained.preprocessed / EVERYTHING / "splits_final.json")[0]["val"]
    with (fold / "validation" / "classification.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(cases)
    for row in rows.values():
        assert float(row["size/small"]) + float(row["size/large"]) == pytest.approx(1, abs=1e-4)
        assert 0 < float(row["findings/dark"]) < 1
    assert set(read(fold / "validation" / "boxes.json")) <= set(cases)
    summary = read(fold / "validation" / "summary.json")
    assert {"size", "findings"} == set(summary["nnunet_kd"]["classification"])
    assert summary["nnunet_kd"]["detection"]["num_images"] == len(cases)
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    mean = summary["nnunet_kd"]["segmentation"]["mean"]
    assert mean["dice"]["value"] == pytest.approx(summary["foreground_mean"]["Dice"])
    assert {"nsd", "hd95_mm", "volume_error_ml"} <= set(mean)
    (log,) = fold.glob("training_log_*.txt")
    assert "Pseudo scores: Dice" in log.read_text()
    assert "Joint score 0." in log.read_text()
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert len(checkpoint["logging"]["AP"]) == len(checkpoint["logging"]["AUROC size"]) == 2


def test_training_continues(trained: Any) -> None:
    more = {**SETTINGS, "training": {**SETTINGS["training"], "num_epochs": 2}}
    fold = control(trained, EVERYTHING) / "fold_0"
    before = (fold / "checkpoint_final.pth").read_bytes()
    trained.train(11, "Control", "-p", "nnUNetKDPlansSmall", "--val", configuration="2d", settings=more)
    assert (fold / "checkpoint_final.pth").read_bytes() == before


def test_stock_prediction_equals_ours_and_ours_adds_classes_and_boxes(trained: Any, tmp_path: Path) -> None:
    images = trained.raw / EVERYTHING / "imagesTs"
    model = control(trained, EVERYTHING)
    own, stock = tmp_path / "own", tmp_path / "stock"
    trained.run("nnUNetKD_predict", "-m", model, "-i", images, "-o", own, "-device", "cpu", "-npp", "0", "-nps", "0")
    flags = ("-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1")
    output = trained.run("nnUNetv2_predict_from_modelfolder", "-m", model, "-i", images, "-o", stock, *flags)
    assert UNTRAINED not in output
    files = sorted(file.name for file in stock.glob("*.png"))
    assert len(files) == 2
    for file in files:
        np.testing.assert_array_equal(np.array(Image.open(own / file)), np.array(Image.open(stock / file)))
    with (own / "classification.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [Path(name).stem for name in files]
    assert set(read(own / "boxes.json")) == {Path(name).stem for name in files}


def test_boxes_are_reported_from_the_scores_that_the_validation_chose(trained: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(control(trained, EVERYTHING), tmp_path / "model"))
    plans = read(model / "plans.json")
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["detection"]["score_threshold"] = 0.0
    (model / "plans.json").write_text(json.dumps(plans))

    output = tmp_path / "out"
    arguments = ("-m", model, "-i", trained.raw / EVERYTHING / "imagesTs", "-o", output, "-device", "cpu")
    trained.run("nnUNetKD_predict", *arguments, "--tasks", "detection")

    def scores(name: str) -> list[float]:
        cases = read(output / name)
        assert len(cases) == 2
        return sorted(box["score"] for boxes in cases.values() for box in boxes)

    everything = scores("boxes.json")
    summary = read(model / "fold_0" / "validation" / "summary.json")
    half = len(everything) // 2
    chosen = (everything[half - 1] + everything[half]) / 2
    detection = summary["nnunet_kd"]["detection"]
    detection["classes"][0]["froc_thresholds"][detection["froc_rates"].index(2.0)] = chosen
    (model / "fold_0" / "validation" / "summary.json").write_text(json.dumps(summary))
    trained.run("nnUNetKD_predict", *arguments, "--tasks", "detection", "--c", "--false_positives", "2")
    assert scores("boxes.json") == everything
    assert scores("boxes_reported.json") == everything[half:]
    shutil.rmtree(tmp_path)


def test_evaluation_of_the_validation_says_what_the_summary_says(trained: Any, tmp_path: Path) -> None:
    validation = control(trained, EVERYTHING) / "fold_0" / "validation"
    output = trained.run("nnUNetKD_evaluate", "-ref", "11", "-pred", validation, "-o", tmp_path, "--fold", "0")
    assert "detection" in output
    assert output.count("permuted_...: ") == 1
    evaluated, summary = read(tmp_path / "evaluation.json"), read(validation / "summary.json")["nnunet_kd"]
    assert evaluated["detection"]["mean"]["ap_10"] == summary["detection"]["mean"]["ap_10"]
    assert evaluated["classification"]["size"]["num_cases"] == summary["classification"]["size"]["num_cases"]


def test_segmentation_alone_is_exported(trained: Any, tmp_path: Path) -> None:
    trained.run("nnUNetKD_export", "-m", control(trained, EVERYTHING), "-o", tmp_path / "plain")  # checks the logits
    plans = read(tmp_path / "plain" / "plans.json")
    assert plans["configurations"]["2d"]["architecture"]["network_class_name"].endswith("PlainConvUNet")


def test_classes_alone_need_no_segmentation(planned: Any, classifier: Path) -> None:
    validation = classifier / "fold_0" / "validation"
    assert {file.name for file in validation.iterdir()} == {"classification.csv", "summary.json"}
    checkpoint = torch.load(validation.parent / "checkpoint_final.pth", weights_only=False)
    network = checkpoint["network_weights"]
    assert any(key.startswith("heads.classification") for key in network)
    (log,) = validation.parent.glob("training_log_*.txt")
    cases = read(planned.preprocessed / CLASSES / "splits_final.json")[0]["val"]
    assert re.findall(r"predicting (\S+)", log.read_text()) == cases  # which also times them for leaderboards
    assert UNTRAINED not in log.read_text()


def test_stock_prediction_of_classes_alone_warns_of_its_masks(planned: Any, classifier: Path, tmp_path: Path) -> None:
    data = ("-i", planned.raw / CLASSES / "imagesTr", "-m", classifier, "-f", "0", "-device", "cpu")
    flags = ("-npp", "1", "-nps", "1", "--disable_tta")
    output = planned.run("nnUNetv2_predict_from_modelfolder", *data, "-o", tmp_path / "stock", *flags)
    assert output.count(UNTRAINED) == 1
    assert UNTRAINED not in planned.run("nnUNetKD_predict", *data, "-o", tmp_path / "own", *flags)


def test_folds_that_cannot_be_learned_are_warned_of_and_those_that_divide_groups_refused(
    planned: Any, tmp_path: Path
) -> None:
    world = planned.copy(tmp_path)
    folder = world.preprocessed / CLASSES
    with (folder / "classification.csv").open() as file:
        rows = list(csv.DictReader(file))
    patient = {row["case"]: row["patient"] for row in rows}
    small = [row["case"] for row in rows if row["size"] == "small"]
    large = [row["case"] for row in rows if row["size"] == "large"]
    other = [case for case in large if patient[case] not in {patient[own] for own in small}]
    assert small
    assert other
    (folder / "splits_final.json").write_text(json.dumps([{"train": small, "val": other}]))
    command = (12, "Control", "-p", "nnUNetKDPlansSmall")
    output = world.train(*command, configuration="2d", settings=SETTINGS)
    warning = "fold 0: no training case of classification.csv, size has large"
    assert f"WARNING: {CLASSES}, {warning}" in output
    fold = control(world, CLASSES) / "fold_0"
    assert warning in read(fold / "validation" / "summary.json")["nnunet_kd"]["notes"]
    unscored = "fold 0: every labelled validation case of classification.csv, size has large, so that the AUROC"
    assert f"WARNING: {CLASSES}, {unscored}" in output
    best = torch.load(fold / "checkpoint_best.pth", weights_only=False)
    assert best["current_epoch"] == 2  # AUROC was never defined, so the newest epoch is taken
    assert np.isnan(best["logging"]["mean_fg_dice"]).all()
    (folder / "splits_final.json").write_text(json.dumps([{"train": [rows[0]["case"]], "val": [rows[1]["case"]]}]))
    divided = patient[rows[0]["case"]] == patient[rows[1]["case"]]
    assert divided, "the first two cases are of one patient"
    output = world.train(*command, configuration="2d", settings=SETTINGS, check=False)
    assert "'patient' both in training and in validation" in output
    (folder / "splits_final.json").unlink()
    shutil.rmtree(world.results)
    world.train(*command, configuration="2d", settings=SETTINGS)
    for split in read(folder / "splits_final.json"):
        assert not {patient[case] for case in split["train"]} & {patient[case] for case in split["val"]}
    shutil.rmtree(tmp_path)


def test_folds_are_looked_at_once_they_are_made(planned: Any, tmp_path: Path) -> None:
    world = planned.copy(tmp_path)
    (world.preprocessed / CLASSES / "splits_final.json").unlink()
    for file in (world.raw / CLASSES / "classification.csv", world.preprocessed / CLASSES / "classification.csv"):
        with file.open() as opened:
            rows = list(csv.DictReader(opened))
        first = rows[0]["patient"]
        for row in rows:
            row["size"] = "small" if row["patient"] == first else "large"
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    output = world.plan("-d", "12", "-c", "2d")
    assert "no training case of classification.csv, size has small" in output
    assert "WARNING" in output
    output = world.plan("-d", "12", "-c", "2d", "--width", "0.5", check=False)
    assert "nnUNetKD_plan_student" in output
    shutil.rmtree(tmp_path)


def test_volumes(planned: Any) -> None:
    planned.train(13, "Control", "-p", "nnUNetKDPlansSmall", settings={**SETTINGS, "tasks": {"balance": "loss"}})
    validation = control(planned, VOLUMES, "3d_fullres") / "fold_0" / "validation"
    assert {"boxes.json", "classification.csv", "summary.json"} <= {file.name for file in validation.iterdir()}


def test_single_slices_in_files_of_volumes_are_2d(
    make_world: Callable[[], Any],
    make_dataset: Callable[..., Path],
    write_side_files: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    world = make_world()
    block = {"nnunet_kd": {"tasks": {"segmentation": True, "classification": SIZES, "detection": LESIONS}}}
    raw = make_dataset(world.raw, 14, "Slices", num_cases=5, num_test_cases=1, shape=(1, 36, 40), extra=block)
    write_side_files(raw)
    assert "2D, 5 cases" in world.run("nnUNetKD_verify", "-d", "14")
    world.plan("-d", "14", "-c", "2d")
    world.run("nnUNetKD_plan_student", "-d", "14", "--width", "0.25", "-plans_name", "nnUNetKDPlansSmall")
    world.train(14, "Control", "-p", "nnUNetKDPlansSmall", configuration="2d", settings=SETTINGS)
    model = control(world, "Dataset014_Slices")
    detection = read(model / "plans.json")["configurations"]["2d"]["architecture"]["arch_kwargs"]["detection"]
    assert len(detection["anchors"][0][0]) == 2
    summary = read(model / "fold_0" / "validation" / "summary.json")["nnunet_kd"]
    assert summary["detection"]["num_images"] == 1
    world.run("nnUNetKD_predict", "-m", model, "-i", raw / "imagesTs", "-o", tmp_path, "-device", "cpu")
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "slices_005.nii.gz")))
    assert predicted.shape == (1, 36, 40)
    assert set(read(tmp_path / "boxes.json")) == {"slices_005"}

    thin = {"shape": (1, 36, 40), "spacing": (0.5, 1.0, 1.0), "extra": block}  # nnU-Net plans volumes of these
    write_side_files(make_dataset(world.raw, 15, "Thin", num_cases=5, **thin))
    output = world.plan("-d", "15", "-c", "2d", check=False)
    assert "Traceback" not in output
    assert "all of them are single slices. Give them a spacing" in output


def test_tasks_that_are_declared_later_get_heads_which_then_stay(planned: Any, tmp_path: Path) -> None:
    world = planned.copy(tmp_path)
    raw = world.raw / EVERYTHING / "dataset.json"
    declared = read(raw)
    declared["nnunet_kd"]["tasks"]["classification"].append({**SIZES, "name": "again"})
    raw.write_text(json.dumps(declared))
    file = world.preprocessed / EVERYTHING / "nnUNetKDPlans.json"
    before = read(file)["configurations"]["2d"]["architecture"]["arch_kwargs"]
    world.plan("-d", "11", "-c", "2d")
    plans = read(file)
    heads = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert heads["classification"]["targets"] == [*before["classification"]["targets"], ["again", 2]]
    assert heads["detection"] == before["detection"]
    heads["classification"]["pooling"] = "attention"
    file.write_text(json.dumps(plans))
    world.plan("-d", "11", "-c", "2d")
    assert read(file)["configurations"]["2d"]["architecture"]["arch_kwargs"] == heads
    shutil.rmtree(tmp_path)


def test_plans_without_heads_are_refused_where_there_is_nothing_else(planned: Any) -> None:
    output = planned.train(12, "Control", "-p", "nnUNetPlans", configuration="2d", settings=SETTINGS, check=False)
    assert "-p nnUNetKDPlans" in output


def test_side_files_with_mistakes_stop_the_planning(planned: Any, tmp_path: Path) -> None:
    world = planned.copy(tmp_path)
    boxes = read(world.raw / EVERYTHING / "boxes.json")
    boxes["everything_000"][0]["box"] = [30, 5, 10, 20]
    boxes["nobody"] = []
    (world.raw / EVERYTHING / "boxes.json").write_text(json.dumps(boxes))
    classes = world.raw / CLASSES / "classification.csv"
    classes.write_text(classes.read_text() + "somebody,small,0,0,0\n")
    output = world.plan("-d", "11", "12", "-c", "2d", check=False)
    assert "Traceback" not in output
    for mistake in ("everything_000", "nobody", "somebody"):  # of both datasets at once
        assert mistake in output
    shutil.rmtree(tmp_path)
