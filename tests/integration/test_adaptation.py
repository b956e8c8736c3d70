"""AdaIN-based adaptation through the real commands: two datasets, one divided dataset, both networks, resume, codes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from PIL import Image

from nnunet_kd.teachers.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration

SOURCE, TARGET, VOLUMES = "Dataset001_Source", "Dataset002_Target", "Dataset007_Volumes"
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
SETTINGS: dict[str, Any] = {"training": SHORT}
DIVIDED = {"source": {"label": "normal"}, "target": {"label": "tuberculosis"}}
TRAINER = "nnUNetTrainerAdaIN"
CLASSES = {
    "nnunet_kd": {
        "tasks": {
            "classification": {
                "file": "classification.csv",
                "column": "finding",
                "classes": ["normal", "tuberculosis"],
            }
        }
    }
}


def train(
    world: Any,
    dataset: int = 1,
    *args: str,
    plans: str = "nnUNetKDPlans",
    configuration: str = "2d",
    settings: Any = SETTINGS,
    check: bool = True,
) -> str:
    command = ["nnUNetv2_train", str(dataset), configuration, "0", "-tr", TRAINER, "-p", plans, "-device", "cpu"]
    output: str = world.run(*command, *args, settings=settings, check=check)
    return output


def plan(world: Any, *args: str | Path, check: bool = True) -> str:
    command = ("nnUNetKD_plan_adaptation", *args, "-np", "1", "-npfp", "1", "--width", "0.25")
    output: str = world.run(*command, check=check, nnUNet_n_proc_DA="1")
    return output


def fold(world: Any, dataset: str = SOURCE, plans: str = "nnUNetKDPlans", configuration: str = "2d") -> Path:
    folder: Path = world.results / dataset / f"{TRAINER}__{plans}__{configuration}" / "fold_0"
    return folder


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def logged_averages(checkpoint: dict[str, Any]) -> list[float]:
    return [float(value) for value in checkpoint["logging"]["ema_fg_dice"]]


def logged_means(checkpoint: dict[str, Any]) -> list[float]:
    return [float(value) for value in checkpoint["logging"]["mean_fg_dice"]]


def write_findings(folder: Path, names: list[str]) -> None:
    rows = [[name, ("normal", "tuberculosis")[index % 2]] for index, name in enumerate(names)]
    with (folder / "classification.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["case", "finding"], *rows])


@pytest.fixture(scope="module")
def planned_sites(make_world: Any, make_dataset: Any) -> Any:
    """Two 2D sites with other intensities, prepared; and a dataset of volumes."""
    world = make_world()
    shape = {"dimension": 2, "shape": (32, 32), "channels": ("gray",)}
    site = make_dataset(world.raw, 1, "Source", num_cases=10, num_test_cases=2, extra=CLASSES, **shape)
    write_findings(site, [f"source_{index:03d}" for index in range(10)])
    make_dataset(world.raw, 2, "Target", num_cases=5, num_test_cases=1, contrast={0: [0.6], 1: [0.2]}, **shape)
    plan(world, "-source", "1", "-target", "2")
    return world


@pytest.fixture(scope="module")
def trained_sites(planned_sites: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both networks are trained, for one epoch per stage."""
    world = planned_sites.copy(tmp_path_factory.mktemp("trained_sites"))
    plan(world, "-source", "1", "-target", "2", "--network", "conditional_unet", "-plans_name", "nnUNetKDPlansC")
    for plans in ("nnUNetKDPlans", "nnUNetKDPlansC"):
        train(world, plans=plans)
    return world


def test_planning_leaves_the_raw_data_and_the_stock_plans_alone(planned_sites: Any) -> None:
    base = planned_sites.preprocessed / SOURCE
    plans = json.loads((base / "nnUNetKDPlans.json").read_text())
    stock = json.loads((base / "nnUNetPlans.json").read_text())
    own, theirs = (content["configurations"]["2d"] for content in (plans, stock))
    assert own["data_identifier"] == theirs["data_identifier"]
    assert own["architecture"]["network_class_name"].endswith("StarGenerator")
    assert theirs["architecture"]["network_class_name"].endswith("PlainConvUNet")
    assert plans["nnunet_kd"]["adaptation"]["target"] == {"dataset": TARGET}
    target = base / "nnunet_kd_target" / TARGET
    assert len(list((target / "nnUNetPlans_2d").glob("*.b2nd"))) == 5 * 2
    assert len(list((target / "gt_segmentations").iterdir())) == 5
    # the target's own trainings will have the same folds
    splits = json.loads((planned_sites.preprocessed / TARGET / "splits_final.json").read_text())
    assert sorted(splits[0]["train"] + splits[0]["val"]) == [f"target_{index:03d}" for index in range(5)]
    before = (base / "nnUNetKDPlans.json").read_text()
    again = plan(planned_sites, "-source", "1", "-target", "2")
    assert "10 labelled cases of the source, 5 of the target" in again
    assert (base / "nnUNetKDPlans.json").read_text() == before


@pytest.mark.parametrize("plans", ["nnUNetKDPlans", "nnUNetKDPlansC"], ids=["stargan", "conditional_unet"])
def test_both_stages_in_one_training(trained_sites: Any, plans: str) -> None:
    folder = fold(trained_sites, plans=plans)
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert "STAGE 2" in log
    assert log.index("Stage 1: discriminator") < log.index("STAGE 2") < log.index("Stage 2: discriminator")
    assert "self" not in log.split("Stage 1: ")[1].splitlines()[0]
    assert "self" in log.split("Stage 2: ")[1].splitlines()[0]
    for name in ("translations.png", "progress.png"):
        with Image.open(folder / name) as figure:
            assert figure.width > 200
    for summary in (folder / "validation", folder / "target" / "validation"):
        assert 0 <= json.loads((summary / "summary.json").read_text())["foreground_mean"]["Dice"] <= 1
    splits = json.loads((trained_sites.preprocessed / TARGET / "splits_final.json").read_text())[0]
    predicted = {file.stem for file in (folder / "target" / "validation").glob("*.png")}
    assert predicted == set(splits["val"])
    stage_1, final = (load_checkpoint(folder / f"checkpoint_{name}.pth") for name in ("stage_1", "final"))
    assert stage_1["current_epoch"] == 1
    assert logged_averages(final) == logged_means(final)  # of one epoch each, and stage 2 begins anew
    assert final["nnunet_kd"]["training_cases"][TARGET] == sorted(splits["train"])
    names = set(final["network_weights"])
    assert not any(name.startswith(("discriminator", "style", "mapping")) for name in names)
    assert any(name.startswith("discriminator") for name in final["nnunet_kd"]["auxiliary"])
    # the moving average predicts, the student goes on
    assert equal(final["network_weights"], {
        name: final["nnunet_kd"]["average"]["weights"][f"network.{name}"] for name in names
    })  # fmt: skip
    assert not equal(final["network_weights"], final["nnunet_kd"]["student_weights"])


def test_stock_prediction_is_the_one_step_segmentation(trained_sites: Any, tmp_path: Path) -> None:
    images = trained_sites.raw / SOURCE / "imagesTs"
    few = ("-device", "cpu", "-npp", "1", "-nps", "1")
    for plans in ("nnUNetKDPlans", "nnUNetKDPlansC"):
        out = tmp_path / plans
        stock = ("nnUNetv2_predict", "-d", "1", "-c", "2d", "-f", "0", "-tr", TRAINER, "-p", plans)
        trained_sites.run(*stock, "-i", images, "-o", out / "stock", *few)
        ours = ("nnUNetKD_predict", "-m", fold(trained_sites, plans=plans).parent, "-i", images)
        for code in ("self", "seg", "two_step"):
            trained_sites.run(*ours, *few, "-o", out / code, "--code", code)
        pictures = {
            name: np.stack([np.asarray(Image.open(file)) for file in sorted((out / name).glob("*.png"))])
            for name in ("stock", "self", "seg", "two_step")
        }
        assert len(pictures["stock"]) == 2
        assert np.array_equal(pictures["stock"], pictures["self"])
        trained_sites.run(*ours, *few, "-o", out / "translated", "--translate", "target")
        for file in sorted(images.iterdir()):
            before, after = (np.asarray(Image.open(path)) for path in (file, out / "translated" / file.name))
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
            assert not np.array_equal(before, after)


def test_export(trained_sites: Any, tmp_path: Path) -> None:
    out = trained_sites.run("nnUNetKD_export", "-m", fold(trained_sites, plans="nnUNetKDPlansC").parent, "-o",
                            tmp_path / "plain")  # fmt: skip
    assert "fold 0: identical logits" in out
    refused = trained_sites.run("nnUNetKD_export", "-m", fold(trained_sites).parent, "-o", tmp_path / "x", check=False)
    assert "StarGenerator" in refused
    assert "does not come with nnU-Net" in refused


def invert_masks(folder: Path, cases: list[str] | None = None) -> None:
    for file in folder.iterdir():
        if cases is None or file.stem in cases:
            Image.fromarray(1 - np.asarray(Image.open(file))).save(file)


def test_the_masks_of_the_target_are_used_for_nothing_but_the_final_evaluation(
    planned_sites: Any, tmp_path: Path
) -> None:
    """Other masks before anything is prepared, or none: the same weights, bit by bit, and other scores."""
    weights, scores = [], []
    for kind in ("true", "other", "none"):
        world = planned_sites.copy(tmp_path / kind)
        prepared = world.preprocessed / SOURCE / "nnunet_kd_target"
        if kind != "true":
            shutil.rmtree(prepared)
            shutil.rmtree(world.preprocessed / TARGET)
            if kind == "none":
                shutil.rmtree(world.raw / TARGET / "labelsTr")
            else:
                invert_masks(world.raw / TARGET / "labelsTr")
            plan(world, "-source", "1", "-target", "2")
        output = train(world)
        weights.append(load_checkpoint(fold(world) / "checkpoint_final.pth")["network_weights"])
        summary = fold(world) / "target" / "validation" / "summary.json"
        if kind == "none":
            assert "no masks of held-back cases" in output
            assert not summary.exists()
        else:
            scores.append(json.loads(summary.read_text())["foreground_mean"]["Dice"])
        shutil.rmtree(world.preprocessed)
    assert equal(weights[0], weights[1])
    assert equal(weights[0], weights[2])
    assert scores[0] != scores[1]


def test_nor_are_those_of_the_other_part_of_a_divided_dataset(planned_sites: Any, tmp_path: Path) -> None:
    weights = []
    for kind in ("true", "other"):
        world = planned_sites.copy(tmp_path / kind)
        if kind == "other":
            ill = [f"source_{index:03d}" for index in range(1, 10, 2)]
            invert_masks(world.raw / SOURCE / "labelsTr", ill)
            shutil.rmtree(world.preprocessed / SOURCE / "nnUNetPlans_2d")
            plan(world, "-source", "1", "-target", "1", "-source_label", "normal", "-target_label", "tuberculosis",
                 "-plans_name", "nnUNetKDPlansParts")  # fmt: skip
        train(world, plans="nnUNetPlans", settings={**SETTINGS, "adaptation": DIVIDED})
        weights.append(load_checkpoint(fold(world, plans="nnUNetPlans") / "checkpoint_final.pth")["network_weights"])
    assert equal(*weights)


def test_masks_of_some_held_back_cases_are_enough(trained_sites: Any, tmp_path: Path) -> None:
    world = trained_sites.copy(tmp_path)
    splits = json.loads((world.preprocessed / TARGET / "splits_final.json").read_text())
    held_back, trained = splits[0]["val"], splits[0]["train"]
    splits[0] = {"train": trained[:-1], "val": [*held_back, trained[-1]]}
    (world.preprocessed / TARGET / "splits_final.json").write_text(json.dumps(splits))
    references = world.preprocessed / SOURCE / "nnunet_kd_target" / TARGET / "gt_segmentations"
    (references / f"{trained[-1]}.png").unlink()
    assert "1 of 2 held-back cases" in train(world, 1, "--val")
    predicted = {file.stem for file in (fold(world) / "target" / "validation").glob("*.png")}
    assert predicted == set(held_back)


def test_a_stage_for_a_cascade_is_not_planned(planned_sites: Any, tmp_path: Path) -> None:
    """Stock validation of 3d_lowres would ask for the configuration of the next stage."""
    world = planned_sites.copy(tmp_path)
    file = world.preprocessed / SOURCE / "nnUNetPlans.json"
    stock = json.loads(file.read_text())
    stock["configurations"]["2d"]["next_stage"] = "cascade"
    file.write_text(json.dumps(stock))
    plan(world, "-source", "1", "-target", "2", "-plans_name", "nnUNetKDPlansLow")
    planned = json.loads(file.with_name("nnUNetKDPlansLow.json").read_text())
    assert "next_stage" not in planned["configurations"]["2d"]


def saved_again(world: Any, checkpoint: Path, again: Path, settings: Any) -> dict[str, Any]:
    """A checkpoint that was loaded as ``--c`` does, and saved without a step."""

    def child() -> None:
        os.environ.update({**world.environment, "nnUNetKD_settings": json.dumps(settings)})
        trainer = get_trainer_from_args("1", "2d", 0, TRAINER, "nnUNetKDPlans", True, torch.device("cpu"))
        trainer.load_checkpoint(str(checkpoint))
        trainer.on_train_start()
        trainer.current_epoch -= 1  # nnU-Net stores the next one
        trainer.save_checkpoint(str(again))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return load_checkpoint(again)


def assert_equal(first: Any, second: Any, where: str) -> None:
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_training_goes_on_where_it_was(planned_sites: Any, tmp_path: Path, stage: int) -> None:
    """Of ten epochs; everything that trains comes back exactly."""
    world = planned_sites.copy(tmp_path)
    settings = {**SETTINGS, "training": {**SHORT, "num_epochs": 10, "num_iterations_per_epoch": 1, "save_every": 1}}
    started = world.start("nnUNetv2_train", "1", "2d", "0", "-tr", TRAINER, "-p", "nnUNetKDPlans", "-device", "cpu",
                          settings=settings)  # fmt: skip
    latest = fold(world) / "checkpoint_latest.pth"
    while started.poll() is None:
        if latest.is_file() and (stage == 1 or load_checkpoint(latest)["current_epoch"] > 5):
            started.kill()
            break
    killed = load_checkpoint(latest)
    epoch = killed["current_epoch"]
    assert 0 < epoch <= 4 if stage == 1 else 5 < epoch < 10
    restored = saved_again(world, latest, tmp_path / "again.pth", settings)
    for name in ("network_weights", "optimizer_state", "nnunet_kd", "current_epoch", "_best_ema"):
        assert_equal(restored[name], killed[name], name)
    optimizers = killed["nnunet_kd"]["optimizers"]
    assert set(optimizers) == {"discriminator", "mapping", "style"}
    assert all(own["state"] for own in optimizers.values())
    output = train(world, 1, "--c", settings=settings)
    assert f"Epoch {epoch}" in output
    assert f"Epoch {epoch - 1}" not in output
    assert ("STAGE 2" in output) == (stage == 1)
    logged = load_checkpoint(fold(world) / "checkpoint_final.pth")["logging"]
    assert len(logged["segmentation"]) == 10
    assert np.isnan(logged["self"]).tolist() == [True] * 5 + [False] * 5
    assert (killed["nnunet_kd"]["competence"] is None) == (stage == 1)
    other = {**settings, "adaptation": {"cycle": 1.0}}
    assert "adaptation.cycle was 2.0, is 1.0" in train(world, 1, "--c", settings=other, check=False)


def test_one_dataset_divided_by_its_classes_on_stock_plans(planned_sites: Any, tmp_path: Path) -> None:
    """Settings alone, no planning; the network is in the model's own plans."""
    world = planned_sites.copy(tmp_path)
    settings = {**SETTINGS, "adaptation": {**DIVIDED, "network": "conditional_unet"}}
    output = train(world, plans="nnUNetPlans", settings=settings)
    splits = json.loads((world.preprocessed / SOURCE / "splits_final.json").read_text())[0]
    odd = {name for name in splits["train"] if int(name[-1]) % 2}
    assert f"{8 - len(odd)} labelled cases of {SOURCE}; target: {len(odd)} cases of {SOURCE}" in output
    folder = fold(world, plans="nnUNetPlans")
    seen = load_checkpoint(folder / "checkpoint_final.pth")["nnunet_kd"]["training_cases"]
    assert seen == {SOURCE: sorted(splits["train"])}
    for where, parity in (("validation", 0), ("target/validation", 1)):
        predicted = {file.stem for file in (folder / where).glob("*.png")}
        assert predicted == {name for name in splits["val"] if int(name[-1]) % 2 == parity}
    other = {**settings, "adaptation": DIVIDED}
    assert "holds folds of the network 'conditional_unet'" in train(
        world, plans="nnUNetPlans", settings=other, check=False
    )


def test_volumes_with_regions(planned_sites: Any, make_dataset: Any, tmp_path: Path) -> None:
    """3d_fullres, NIfTI, two channels; the other options of self-distillation."""
    world = planned_sites.copy(tmp_path)
    options = {
        "channels": ("T1", "FLAIR"),
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "regions_class_order": [1, 2],
        "shape": (10, 16, 16),
        "num_test_cases": 1,
    }
    make_dataset(world.raw, 7, "Volumes", **options)
    make_dataset(world.raw, 8, "Others", **options)
    plan(world, "-source", "7", "-target", "8", "-c", "3d_fullres")
    settings = {**SETTINGS, "adaptation": {"self_on": "probabilities", "self_teacher": "ema"}}
    train(world, 7, configuration="3d_fullres", settings=settings)
    model = fold(world, VOLUMES, configuration="3d_fullres").parent
    assert (model / "fold_0" / "target" / "validation" / "summary.json").is_file()
    images = world.raw / VOLUMES / "imagesTs"
    command = ("nnUNetKD_predict", "-m", model, "-i", images, "-o", tmp_path / "out", "-device", "cpu")
    world.run(*command, "--translate", "target")
    for file in images.iterdir():
        before, after = (sitk.ReadImage(str(path)) for path in (file, tmp_path / "out" / file.name))
        assert before.GetSize() == after.GetSize()
        assert before.GetSpacing() == pytest.approx(after.GetSpacing())
        values = sitk.GetArrayFromImage(after)
        assert np.isfinite(values).all()
        assert values.std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-target", "1"), "both in Dataset001_Source, but not told apart"),
        (("-target", "1", "-source_label", "normal", "-target_label", "normal"), "Give them two labels"),
        (("-target", "1", "-source_label", "normal", "-target_label", "flu"), "No case of Dataset001_Source has 'flu'"),
        (("-target", "2", "-source_label", "normal", "-column", "sex"), "no column 'sex'"),
        (("-target", "3"), "has the channels CT, the source Dataset001_Source has gray"),
        (("-target", "4"), "4 times the size"),
        (("-target", "5"), "is a copy of"),
        (("-target", "6"), "has no images"),
        (("-target", "77"), "There is no dataset with id 77"),
        (("-target", "2", "--network", "conditional_unet"), "Choose another -plans_name"),
        (("-target", "2", "-c", "3d_fullres"), "has no configuration 3d_fullres"),
        (("-target", "2", "-c", "3d", "--no_pp"), "has no configuration 3d"),
    ],
)
def test_bad_domains_are_clear_errors(
    planned_sites: Any, other_targets: Any, arguments: tuple[str, ...], message: str
) -> None:
    del other_targets
    output = plan(planned_sites, "-source", "1", *arguments, check=False)
    assert message in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def other_targets(planned_sites: Any, make_dataset: Any) -> None:
    """Datasets that are no target: another channel, another size, a copy, an empty one."""
    raw = planned_sites.raw
    make_dataset(raw, 3, "Channel", num_cases=2, dimension=2, shape=(32, 32), channels=("CT",), file_ending=".tif")
    make_dataset(raw, 4, "Large", num_cases=2, dimension=2, shape=(128, 128), channels=("gray",))
    copied = make_dataset(raw, 5, "Copy", num_cases=2, dimension=2, shape=(32, 32), channels=("gray",))
    shutil.copyfile(raw / SOURCE / "imagesTr" / "source_001_0000.png", copied / "imagesTr" / "copy_001_0000.png")
    empty = make_dataset(raw, 6, "Empty", num_cases=1, dimension=2, shape=(32, 32), channels=("gray",))
    shutil.rmtree(empty / "imagesTr")


def test_bad_trainings_are_clear_errors(planned_sites: Any, tmp_path: Path) -> None:
    world = planned_sites.copy(tmp_path)

    def message(settings: Any, plans: str = "nnUNetKDPlans") -> str:
        return train(world, plans=plans, settings={**SETTINGS, **settings}, check=False)

    no_target = {"adaptation": {"target": {"dataset": 2}}}
    shutil.rmtree(world.preprocessed / SOURCE / "nnunet_kd_target")
    assert "Run: nnUNetKD_plan_adaptation -source 001 -target 002 -c 2d -p nnUNetPlans" in message({})
    assert "not told apart" in message({}, plans="nnUNetPlans")
    assert "is not prepared as the target" in message(no_target, plans="nnUNetPlans")
    asked = {"adaptation": {"network": "conditional_unet"}}
    assert "plans 'stargan'" in message(asked)
    assert "'adaptation.stage_1' is 1.0; it must be less than 1" in message({"adaptation": {"stage_1": 1.0}})
    assert "'training.num_epochs' is 1" in message({"training": {**SHORT, "num_epochs": 1}})
    world.plan("-d", "1", "-p", "nnUNetPlans", "-plans_name", "nnUNetKDPlansHeads", "-c", "2d")
    assert "has heads for classes or boxes" in message(no_target, plans="nnUNetKDPlansHeads")
    splits = json.loads((world.preprocessed / SOURCE / "splits_final.json").read_text())
    for split in splits:
        split["train"] = [name for name in split["train"] if int(name[-1]) % 2 == 0]
    (world.preprocessed / SOURCE / "splits_final.json").write_text(json.dumps(splits))
    divided = {"adaptation": DIVIDED}
    assert "The target of the adaptation is empty" in message(divided, plans="nnUNetPlans")
