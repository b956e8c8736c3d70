"""DINO-Mix through the real commands, on stock plans: few labels, unlabelled images, resume, prediction, export."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_kd.data.member import Member
from nnunet_kd.teachers.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration

ALPHA, BETA, GAMMA = "Dataset001_Alpha", "Dataset002_Beta", "Dataset003_Gamma"
NAMES = {1: ALPHA, 2: BETA, 3: GAMMA}
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
TINY_VIT = {"model": "test_vit", "foundation": {"pretrained": False, "slices": 2, "size": 32}}
CACHED_VIT = {**TINY_VIT, "foundation": {"pretrained": False, "slices": 2, "size": 32, "cache": True}}
SETTINGS: dict[str, Any] = {
    "training": SHORT,
    "labeled": {"fraction": 0.5},
    "teachers": {"foundation": TINY_VIT},
}
NO_EMA = {"consistency": False, "cutmix": False}
MIXED = {"teacher": "ema", "loss": "pseudo_label", "samples": ["mixed"], "options": {"confidence": 0.7}}
FEATURES = {"teacher": "foundation", "on": "features", "loss": "cosine", "levels": ["bottleneck"]}
TWO_AVERAGES = {
    "teachers": {"ema2": {"kind": "ema"}},
    "terms": [{"teacher": name, "loss": "pseudo_label", "samples": ["mixed"]} for name in ("ema", "ema2")],
}
SHAPE = {
    "teachers": {"shape": {"kind": "class_average", "model": "x"}},
    "terms": [{"teacher": "shape", "on": "features", "levels": ["bottleneck"], "loss": "mse"}],
}
TERMS = ("ema.logits.pseudo_label", "ema.logits.pseudo_label.2", "foundation.features.cosine")


def train_command(
    dataset: int, *args: str, trainer: str = "nnUNetTrainerDINOMix", configuration: str = "3d_fullres"
) -> list[str]:
    return ["nnUNetv2_train", str(dataset), configuration, "0", "-tr", trainer, "-device", "cpu", *args]


def train(world: Any, dataset: int, *args: str, settings: Any = SETTINGS, check: bool = True, **options: str) -> str:
    output: str = world.run(*train_command(dataset, *args, **options), settings=settings, check=check)
    return output


def fold(world: Any, dataset: str, trainer: str = "nnUNetTrainerDINOMix", configuration: str = "3d_fullres") -> Path:
    folder: Path = world.results / dataset / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"
    return folder


def final(world: Any, dataset: str, trainer: str = "nnUNetTrainerDINOMix") -> dict[str, Any]:
    return load_checkpoint(fold(world, dataset, trainer) / "checkpoint_final.pth")


def logged(output: str, term: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{re.escape(term)}: (\S+), weighted", output)]


def splits(world: Any, dataset: str) -> dict[str, list[str]]:
    first: dict[str, list[str]] = json.loads((world.preprocessed / dataset / "splits_final.json").read_text())[0]
    return first


@pytest.fixture(scope="module")
def world(planned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the planned members, so that results of other tests are not touched."""
    return planned.copy(tmp_path_factory.mktemp("dino_mix"))


@pytest.mark.parametrize("dataset", NAMES)
def test_all_parts_train_on_stock_plans(world: Any, dataset: int, tmp_path: Path) -> None:
    output = train(world, dataset)
    for term in TERMS:
        assert len(logged(output, term)) == 2
        assert max(logged(output, term)) > 0
    assert "2 labelled and 2 unlabelled images" in output
    assert "NOT PRETRAINED: random weights" in output
    checkpoint = final(world, NAMES[dataset])
    ours = checkpoint["nnunet_kd"]
    assert list(ours["projector_shapes"]) == ["foundation encoder@1/16"]
    assert ours["teacher_states"]["ema"]["step"] == 4
    assert sorted(ours["training_cases"][NAMES[dataset]]) == sorted(splits(world, NAMES[dataset])["train"])
    assert not any(name.startswith(("auxiliary", "ema")) for name in checkpoint["network_weights"])
    assert (fold(world, NAMES[dataset]) / "validation" / "summary.json").is_file()
    exported = world.run("nnUNetKD_export", "-m", fold(world, NAMES[dataset]).parent, "-o", tmp_path / "plain")
    assert "fold 0: identical logits" in exported


def test_stock_prediction(world: Any, tmp_path: Path) -> None:
    if not (fold(world, ALPHA) / "checkpoint_final.pth").is_file():
        train(world, 1)
    command = ("nnUNetv2_predict", "-i", world.raw / ALPHA / "imagesTs", "-o", tmp_path, "-d", "1", "-c", "3d_fullres")
    world.run(*command, "-f", "0", "-tr", "nnUNetTrainerDINOMix", "-device", "cpu", "-npp", "1", "-nps", "1")
    assert [file.name for file in tmp_path.glob("*.nii.gz")] == ["alpha_005.nii.gz"]


def differ(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


def spoil_labels(world: Any, dataset: str, cases: list[str], places_too: bool) -> None:
    """Give cases other labels, and other places of their classes."""
    folder = world.preprocessed / dataset / "nnUNetPlans_3d_fullres"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_kd.data.member.nnUNet_preprocessed", world.preprocessed)
        data = Member(dataset, "nnUNetPlans", "3d_fullres").dataset_class(str(folder))
    for case in cases:
        image, labels, _, properties = data.load_case(case)
        image, labels = image[:], labels[:]
        if places_too:
            properties["class_locations"] = {1: properties["class_locations"][1][:1] * 0}
        (folder / f"{case}_seg.b2nd").unlink()
        (folder / f"{case}.b2nd").unlink()
        data.save_case(image, np.where(labels < 0, labels, 1 - labels.clip(0)), properties, str(folder / case))


@pytest.mark.parametrize("trainer", ["nnUNetTrainerKDControl", "nnUNetTrainerDINOMix"])
def test_labels_of_unlabelled_and_validation_cases_are_never_trained_on(
    planned: Any, tmp_path: Path, trainer: str
) -> None:
    weights = []
    for number in range(2):
        copied = planned.copy(tmp_path / str(number))
        side = splits(copied, ALPHA)
        named = {**SETTINGS, "labeled": side["train"][:2]}
        if number == 1:
            spoil_labels(copied, ALPHA, side["train"][2:], places_too=True)
            # stock validation crops around places, and draws the random numbers for that between the training steps
            spoil_labels(copied, ALPHA, side["val"], places_too=False)
        train(copied, 1, settings=named, trainer=trainer)
        weights.append(final(copied, ALPHA, trainer)["network_weights"])
    assert not differ(*weights)


def test_validation_images_are_used_only_if_asked_for(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    output = train(copied, 1, settings={**SETTINGS, "dino_mix": {"transductive": True}})
    validation = splits(copied, ALPHA)["val"]
    assert "2 labelled and 3 unlabelled images" in output
    assert "TRANSDUCTIVE: the images of 1 validation cases" in output
    summary = json.loads((fold(copied, ALPHA) / "validation" / "summary.json").read_text())
    assert summary["nnunet_kd"]["transductive"] == validation
    ours = final(copied, ALPHA)["nnunet_kd"]
    assert set(validation) < set(ours["training_cases"][ALPHA])
    assert set(validation) < set(ours["unlabeled_cases"][ALPHA])
    train(copied, 1, "--val", settings={**SETTINGS, "dino_mix": {"transductive": True}})
    again = json.loads((fold(copied, ALPHA) / "validation" / "summary.json").read_text())
    assert again["nnunet_kd"]["transductive"] == validation


def test_the_average_can_be_the_network_that_predicts_and_training_goes_on(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    budget = {**SHORT, "num_epochs": 8, "save_every": 1}
    settings = {**SETTINGS, "training": budget, "dino_mix": {"predict_with": "ema", "foundation": False}}
    started = copied.start(*train_command(1), settings=settings)
    latest = fold(copied, ALPHA) / "checkpoint_latest.pth"
    deadline = time.monotonic() + 200
    while not latest.is_file():
        assert started.poll() is None, started.output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.kill()
    before = load_checkpoint(latest)
    ours = before["nnunet_kd"]
    assert ours["teacher_states"]["ema"]["step"] == 2 * before["current_epoch"]
    for name, value in ours["teacher_states"]["ema"]["weights"].items():
        assert torch.equal(before["network_weights"][name], value)
    assert differ(before["network_weights"], ours["student_weights"])
    shorter = {**settings, "training": {**budget, "num_epochs": before["current_epoch"] + 2}}
    refused = train(copied, 1, "--c", settings=shorter, check=False)
    assert "num_epochs was 8" in refused
    other = {**settings, "dino_mix": {"predict_with": "student", "foundation": False}}
    assert "predict_with was 'ema'" in train(copied, 1, "--c", settings=other, check=False)
    output = train(copied, 1, "--c", settings=settings)
    assert re.search(rf"Epoch {before['current_epoch']}\s", output)
    assert not re.search(r"Epoch 0\s", output)
    after = final(copied, ALPHA)
    assert after["nnunet_kd"]["teacher_states"]["ema"]["step"] == 16
    assert after["nnunet_kd"]["class_frequencies"]["updates"] == 16
    for name, value in after["nnunet_kd"]["teacher_states"]["ema"]["weights"].items():
        assert torch.equal(after["network_weights"][name], value)
    assert differ(after["network_weights"], after["nnunet_kd"]["student_weights"])
    dice = re.findall(r"Mean Validation Dice:\s+(\S+)", output)
    again = train(copied, 1, "--val", settings=settings)  # from the checkpoint: the same network
    assert re.findall(r"Mean Validation Dice:\s+(\S+)", again) == dice


def test_with_worker_processes(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    output = copied.run(*train_command(1), settings=SETTINGS, nnUNet_n_proc_DA="2")
    assert all(max(logged(output, term)) > 0 for term in TERMS)


def test_images_that_were_normalised_inside_a_mask_are_not_blanked(planned: Any, tmp_path: Path) -> None:
    """Stock augmentation sets to 0 what its segmentation calls outside."""
    copied = planned.copy(tmp_path)
    with_plans(copied, lambda configuration: configuration.update(use_mask_for_norm=[True]))
    loader = copied.preprocessed / "means.json"
    probe = tmp_path / "Probe.py"
    probe.write_text(PROBE.format(file=str(loader)))
    copied.run(*train_command(1, "-p", "Other", trainer="Probe"), settings=SETTINGS, nnUNet_extTrainer=str(tmp_path))
    labeled, unlabeled = json.loads(loader.read_text())
    assert 0.5 < unlabeled / labeled < 2


PROBE = """
import json
from nnunet_kd.training.dino_mix import nnUNetTrainerDINOMix

class Probe(nnUNetTrainerDINOMix):
    def train_step(self, batch):
        sizes = batch["data"].abs().mean((1, 2, 3, 4)).tolist()
        json.dump([sizes[0], sizes[-1]], open({file!r}, "w"))
        return super().train_step(batch)
"""


def test_a_teacher_that_knows_the_labels_of_unlabelled_cases_is_refused(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    budget = {"training": SHORT}
    train(copied, 1, settings=budget, trainer="nnUNetTrainerSIKDTeacher")
    few = {**budget, "labeled": {"fraction": 0.5}}
    refused = train(copied, 1, settings=few, trainer="nnUNetTrainerSIKDStudent", check=False)
    assert "was trained on 2 cases of Dataset001_Alpha that are validation cases of fold 0, or unlabelled" in refused
    shutil.rmtree(copied.results / ALPHA)
    train(copied, 1, settings=few, trainer="nnUNetTrainerSIKDTeacher")
    train(copied, 1, settings=few, trainer="nnUNetTrainerSIKDStudent")


def test_a_semi_supervised_teacher_of_the_same_labels_may_teach(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    train(copied, 1, settings={**SETTINGS, "dino_mix": {"foundation": False}})
    ours, few = final(copied, ALPHA)["nnunet_kd"], {"training": SHORT, "labeled": SETTINGS["labeled"]}
    hidden = ours["unlabeled_cases"][ALPHA]
    assert len(hidden) == 2
    assert set(hidden) < set(splits(copied, ALPHA)["train"])
    own = {"kind": "nnunet", "model": f"{ALPHA}/nnUNetTrainerDINOMix__nnUNetPlans__3d_fullres"}
    taught = {**few, "teachers": {"own": own}, "terms": [{"teacher": "own", "on": "logits", "loss": "kl"}]}
    train(copied, 1, settings=taught, trainer="nnUNetTrainerKDStudent")
    exported = tmp_path / "exported"
    copied.run("nnUNetKD_export", "-m", copied.results / own["model"], "-o", exported, "-f", "0")
    again = {**taught, "teachers": {"own": {**own, "model": str(exported)}}}
    shutil.rmtree(copied.results / ALPHA / "nnUNetTrainerKDStudent__nnUNetPlans__3d_fullres")
    train(copied, 1, settings=again, trainer="nnUNetTrainerKDStudent")
    fewer = {**taught, "labeled": [next(case for case in splits(copied, ALPHA)["train"] if case in hidden)]}
    shutil.rmtree(copied.results / ALPHA / "nnUNetTrainerKDStudent__nnUNetPlans__3d_fullres")
    refused = train(copied, 1, settings=fewer, trainer="nnUNetTrainerKDStudent", check=False)
    assert "was trained on 2 cases of Dataset001_Alpha" in refused  # whose labels it has seen


def test_2d(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    copied.run("nnUNetv2_preprocess", "-d", "1", "-c", "2d", "-np", "1", nnUNet_n_proc_DA="1")
    for foundation in (TINY_VIT, CACHED_VIT):
        shutil.rmtree(copied.results / ALPHA, ignore_errors=True)
        settings = {**SETTINGS, "teachers": {"foundation": foundation}}
        output = train(copied, 1, configuration="2d", settings=settings)
        assert all(max(logged(output, term)) > 0 for term in TERMS)
    assert any((copied.preprocessed / ALPHA / "nnunet_kd_tokens").rglob("*.npy"))


def test_images_that_were_added(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    images = copied.raw / ALPHA / "imagesTs"
    copied.run("nnUNetKD_add_unlabeled", "-d", "1", "-i", images, "-c", "3d_fullres", "-np", "1")
    everything = {key: value for key, value in SETTINGS.items() if key != "labeled"}
    output = train(copied, 1, settings=everything)
    assert "4 labelled and 1 unlabelled images" in output


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"cutmix": False, "foundation": False}, TERMS[:1]),
        ({"consistency": False, "foundation": False}, TERMS[:1]),
        ({"consistency": False, "cutmix": False}, TERMS[2:]),
        ({"curriculum": "uniform", "unlabeled_per_batch": 1, "mixes": 3}, TERMS),
        ({"unsupervised_weight": 0}, TERMS[2:]),
    ],
)
def test_parts_are_switched_off(planned: Any, tmp_path: Path, parts: dict[str, Any], expected: tuple[str, ...]) -> None:
    copied = planned.copy(tmp_path)
    output = train(copied, 1, settings={**SETTINGS, "dino_mix": parts})
    assert {term for term in TERMS if logged(output, term)} == set(expected)
    if "curriculum" in parts:
        assert "+ 1 patches and 3 mixed ones per step" in output
        assert re.search(r"Mixed boxes around each class, of those that a donor has: lesion \d+ \(p 1.000\)", output)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dino_mix": dict.fromkeys(("consistency", "cutmix", "foundation"), False)}, "All parts.*KDControl"),
        ({"guard": {"margin": 0.1}}, "'guard' compares"),
        ({"labeled": None}, "no unlabelled images of Dataset001_Alpha.*nnUNetKD_add_unlabeled -d 001.*fraction"),
        ({"labeled": {"fraction": 2}}, "'labeled.fraction' is 2.0"),
        ({"labeled": {"share": 0.5}}, "Unknown setting 'labeled.share'. Allowed here: fraction, seed"),
        ({"labeled": ["alpha_099"]}, "no training cases of this fold.*alpha_099"),
        ({"dino_mix": {"unlabeled_per_batch": 99}}, "cannot hold labelled and 99 unlabelled"),
        ({"dino_mix": {"box": [0.5, 0.25]}}, "'dino_mix.box'"),
        ({"teachers": {"foundation": {**TINY_VIT, "model": "vit_17"}}}, "timm has no model 'vit_17'"),
        (SHAPE, "needs the labels of all samples"),
        ({"terms": [{"teacher": "ema", "samples": ["labeled", "mixed"]}]}, "leaves out 'unlabeled'"),
        ({"dino_mix": {**NO_EMA, "predict_with": "ema"}}, "'dino_mix.predict_with' is 'ema', but no term"),
        ({"dino_mix": {"cutmix": False}, "terms": [MIXED]}, "is the part 'cutmix' of DINO-Mix"),
        ({"dino_mix": {"confidence": 0.6}, "terms": [MIXED]}, "options.confidence' is 0.7, but 'dino_mix.confidence'"),
        ({"terms": [{**FEATURES, "samples": ["mixed"]}]}, "mixed by the pseudo labels of a moving average"),
        ({"terms": [{**FEATURES, "foreground_only": True}]}, "asks for the class of voxels"),
        (TWO_AVERAGES, "several moving"),
        ({"terms": [{"teacher": "ema", "samples": []}]}, "'terms.0..samples' is not given, which means all, but"),
        ({"dino_mix": {"unsupervised_weight": 1}, "terms": [FEATURES]}, "unsupervised_weight' is that of the standard"),
        ({"labeled": {"fraction": 0.5, "seed": -1}}, "'labeled.seed' is -1"),
        ({"teachers": {"foundation": {**TINY_VIT, "model": "swin_tiny_patch4_window7_224"}}}, "gives no map of"),
        ({"teachers": {"foundation": {"foundation": {"sha256": "0"}}}}, "sha256' is that of a file"),
    ],
)  # fmt: skip
def test_bad_settings(world: Any, changed: dict[str, Any], message: str) -> None:
    output = train(world, 1, settings={**SETTINGS, **changed}, check=False)
    assert re.search(message, output.replace("\n", " ")), output


def test_what_other_trainers_refuse(trained: Any) -> None:
    settings = {"training": SHORT, "terms": [{"teacher": "joint", "samples": ["mixed"]}]}
    output = train(trained, 1, settings=settings, trainer="nnUNetTrainerKDStudent", check=False)
    assert "only semi-supervised trainers have such parts" in output
    options = {"trainer": "nnUNetTrainerKDTeacher"}
    output = train(trained, 900, "-p", "nnUNetKDPlans", settings={"labeled": {"fraction": 0.5}}, check=False, **options)
    assert "'labeled' is for one dataset" in output


def with_plans(world: Any, change: Any) -> None:
    file = world.preprocessed / ALPHA / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    change(plans["configurations"]["3d_fullres"])
    file.write_text(json.dumps({**plans, "plans_name": "Other"}))
    shutil.move(file, file.with_name("Other.json"))


def test_a_batch_of_one(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    with_plans(copied, lambda configuration: configuration.update(batch_size=1))
    output = train(copied, 1, "-p", "Other", check=False)
    assert "A batch of 1 cannot hold labelled and any unlabelled patches. Train on plans with a larger batch" in output


def test_a_class_that_no_labelled_case_has(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    kept = splits(copied, ALPHA)["train"][0]
    file = copied.preprocessed / ALPHA / "nnUNetPlans_3d_fullres" / f"{kept}.pkl"
    properties = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({**properties, "class_locations": {1: []}}))
    output = train(copied, 1, settings={**SETTINGS, "labeled": [kept]}, check=False)
    assert "None of the 1 cases of Dataset001_Alpha that keep their labels has lesion" in output


def test_plans_that_it_cannot_train(planned: Any, tmp_path: Path) -> None:
    copied = planned.copy(tmp_path)
    with_plans(copied, lambda configuration: configuration.update(previous_stage="3d_lowres"))
    output = train(copied, 1, "-p", "Other", check=False)
    assert "DINO-Mix is not supported in the second stage of a cascade (3d_fullres): unlabelled images" in output


def test_token_maps_of_whole_cases(world: Any, tmp_path: Path) -> None:
    copied = world.copy(tmp_path / "world")
    shutil.rmtree(copied.results, ignore_errors=True)
    settings = {**SETTINGS, "dino_mix": NO_EMA, "teachers": {"foundation": CACHED_VIT}}
    written = []
    for _ in range(2):
        shutil.rmtree(copied.results, ignore_errors=True)
        output = train(copied, 1, settings=settings)
        assert len(logged(output, TERMS[2])) == 2
        assert max(logged(output, TERMS[2])) > 0
        (folder,) = (copied.preprocessed / ALPHA / "nnunet_kd_tokens").iterdir()
        assert sorted(file.stem for file in folder.glob("*.npy")) == sorted(splits(copied, ALPHA)["train"])
        written.append({file.name: file.stat().st_mtime_ns for file in folder.iterdir()})
    assert written[0] == written[1]
    refused = train(copied, 1, settings=settings, trainer="nnUNetTrainerKDStudent", check=False)
    assert "'foundation.cache' is for nnUNetTrainerDINOMix" in refused
