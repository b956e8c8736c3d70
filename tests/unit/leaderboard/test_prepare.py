from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_kd.leaderboard.plan import Plan
from nnunet_kd.leaderboard.prepare import prepare
from nnunet_kd.leaderboard.yaml_lines import RecipeError

MakePlan = Callable[..., Plan]
TASKS = {
    "segmentation": True,
    "classification": {"file": "classification.csv", "column": "size", "classes": ["s", "l"]},
}


@pytest.fixture
def raw(tmp_path: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Raw datasets 1 and 2, of which 2 also declares classes, and empty folders of nnU-Net."""
    folder = tmp_path / "raw"
    make_dataset(folder, 1, "Alpha", dimension=2, num_cases=3, channels=("R", "G"))
    make_dataset(folder, 2, "Beta", dimension=2, num_cases=6, extra={"nnunet_kd": {"tasks": TASKS}})
    with (folder / "Dataset002_Beta/classification.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["case", "size"], ["beta_000", "s"]])
    monkeypatch.setenv("SOMEWHERE", str(folder))
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(tmp_path / "out" / name))
    (tmp_path / "out/nnUNet_preprocessed/Dataset002_Beta").mkdir(parents=True)
    return folder


def test_raw_data_is_linked_and_declares_the_tasks_of_the_recipe_alone(raw: Path, make_small_plan: MakePlan) -> None:
    before = (raw / "Dataset002_Beta/dataset.json").read_text()
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE"))
    for _ in range(2):
        prepare(plan.recipe, "b", plan.out, None)
    target = plan.out / "nnUNet_raw/Dataset002_Beta"
    assert (target / "imagesTr").is_symlink()
    assert (target / "imagesTr/beta_000_0000.png").is_file()
    assert json.loads((target / "dataset.json").read_text())["nnunet_kd"]["tasks"] == {"segmentation": True}
    assert (raw / "Dataset002_Beta/dataset.json").read_text() == before
    wanted = ("name: Alpha, tests", "name: Alpha, tasks: [detection], tests")
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE"), wanted, ("[dice, hd95]", "[dice]"))
    with pytest.raises(RecipeError, match="declares no detection"):
        prepare(plan.recipe, "a", plan.out, None)


def test_raw_folders_that_do_not_exist(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(("name: small", "name: small\nraw: $NOT_SET_ANYWHERE"))
    with pytest.raises(RecipeError, match="that variable is not set"):
        prepare(plan.recipe, "a", plan.out, None)
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE/none"))
    with pytest.raises(RecipeError, match="which is no folder"):
        prepare(plan.recipe, "a", plan.out, None)
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE"), ("id: 2, name: Beta", "id: 3, name: Beta"))
    with pytest.raises(RecipeError, match=r"Dataset003_Beta.dataset.json does not exist"):
        prepare(plan.recipe, "b", plan.out, None)


def test_the_splits_of_a_protocol(raw: Path, make_small_plan: MakePlan) -> None:
    splits = "splits: {validation: [beta_001], left_out: [beta_000, beta_777]}"
    one_fold = (("name: small", "name: small\nraw: $SOMEWHERE"), ("folds: [0, 1]", "folds: [0]"))
    plan = make_small_plan(*one_fold, ("name: Beta}", f"name: Beta, {splits}}}"))
    prepare(plan.recipe, "b", plan.out, None)
    file = plan.out / "nnUNet_preprocessed/Dataset002_Beta/splits_final.json"
    training = ["beta_002", "beta_003", "beta_004", "beta_005"]
    assert json.loads(file.read_text()) == [{"train": training, "val": ["beta_001"]}]
    prepare(plan.recipe, "b", plan.out, None)
    other = make_small_plan(*one_fold, ("name: Beta}", "name: Beta, splits: {validation: [beta_002]}}"))
    with pytest.raises(RecipeError, match="exists and differs"):
        prepare(other.recipe, "b", other.out, None)
    unknown = make_small_plan(*one_fold, ("name: Beta}", "name: Beta, splits: {validation: [x]}}"))
    with pytest.raises(RecipeError, match="has no case x"):
        prepare(unknown.recipe, "b", unknown.out, None)
    file.unlink()
    existing = make_small_plan(*one_fold, ("name: Beta}", "name: Beta, splits: existing}"))
    with pytest.raises(RecipeError, match="make the file from those of the protocol's authors"):
        prepare(existing.recipe, "b", existing.out, None)


def test_test_images_are_linked(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE"))
    for name in ("a", "b"):
        prepare(plan.recipe, name, plan.out, None)
    prepare(plan.recipe, "a", plan.out, "all")
    names = [f"alpha_{case:03d}_{channel:04d}.png" for case in range(3) for channel in range(2)]
    linked = plan.out / "inputs/Dataset001_Alpha/all"
    assert sorted(file.name for file in linked.iterdir()) == names
    assert (linked / names[3]).read_bytes() == (raw / "Dataset001_Alpha/imagesTr" / names[3]).read_bytes()
    # the folds that stock training would make are made first, where there are none
    prepare(plan.recipe, "b", plan.out, "fold_1")
    splits = json.loads((plan.out / "nnUNet_preprocessed/Dataset002_Beta/splits_final.json").read_text())
    assert len(splits) == 5
    linked = plan.out / "inputs/Dataset002_Beta/fold_1"
    assert sorted(file.name for file in linked.iterdir()) == [f"{case}_0000.png" for case in sorted(splits[1]["val"])]
    with pytest.raises(RecipeError, match="Give all, or fold_F"):
        prepare(plan.recipe, "b", plan.out, "some")
    with pytest.raises(RecipeError, match="no dataset 'c'"):
        prepare(plan.recipe, "c", plan.out, None)
