"""Settings: where they come from, how they merge, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import (
    ENVIRONMENT_VARIABLE,
    Settings,
    merge,
    parse_settings,
    read_user_settings,
    resolve_settings,
)

TEACHER = {"joint": {"model": "somewhere"}}


def settings_with_term(**term: Any) -> dict[str, Any]:
    return {"teachers": TEACHER, "terms": [term]}


def test_defaults_are_stock_nnunets() -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    source = Path(__import__("inspect").getsourcefile(nnUNetTrainer)).read_text()
    training = parse_settings({}).training
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
        assert f"self.{name} = {getattr(training, name)}\n" in source, name
    assert (training.initial_lr, training.weight_decay, training.oversample_foreground_percent) == (1e-2, 3e-5, 0.33)
    assert "self.initial_lr = 1e-2\n" in source
    assert "self.weight_decay = 3e-5\n" in source
    assert "self.oversample_foreground_percent = 0.33\n" in source
    assert training.seed is None


def test_objects_merge_deeply_and_lists_replace() -> None:
    base = {"training": {"num_epochs": 5, "seed": 1}, "terms": [{"loss": "kl"}, {"loss": "dkd"}], "joint": "a"}
    over = {"training": {"seed": None}, "terms": [{"loss": "cwd"}]}
    merged = merge(base, over)
    assert merged == {"training": {"num_epochs": 5, "seed": None}, "terms": [{"loss": "cwd"}], "joint": "a"}
    assert base["training"]["seed"] == 1


def test_later_layers_win() -> None:
    layers = ({"training": {"num_epochs": 1, "seed": 1}}, {"training": {"num_epochs": 2}}, {"training": {"seed": 3}})
    training = resolve_settings(*layers).training
    assert (training.num_epochs, training.seed) == (2, 3)


def test_resolved_settings_are_complete_and_read_back_the_same() -> None:
    given = {
        **settings_with_term(on="features", loss="mse", levels=["bottleneck"], schedule={"kind": "cosine"}, weight=2),
        "guard": {"margin": 0.5},
    }
    settings = parse_settings(given)
    again = parse_settings(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert settings.terms[0].schedule.kind == "cosine"
    assert settings.terms[0].schedule.warmup == 0.1
    assert isinstance(settings.terms[0].weight, float)


def test_imitation_may_name_levels_or_leave_them_open() -> None:
    for levels in ([], ["bottleneck"]):
        (term,) = parse_settings(settings_with_term(on="boxes", loss="imitation", levels=levels)).terms
        assert term.levels == levels


def test_description_of_a_joint_dataset_is_no_setting() -> None:
    block = {"version": 1, "members": {"x": {}}, "channels": [], "heads": {}, "member_of": ["a"], "student": {}}
    assert parse_settings(block) == Settings()


# --- reading ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_nothing_given_is_no_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_user_settings(text) == {}
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    assert read_user_settings() == {}
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert read_user_settings() == {}


def test_inline_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '  {"training": {"num_epochs": 7}}')
    assert read_user_settings() == {"training": {"num_epochs": 7}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"training": {"num_epochs": 7}}'),
        ("s.yaml", "training:\n  num_epochs: 7\n"),
        ("s.yml", "nnunet_kd:\n  training: {num_epochs: 7}\n"),
        ("plans.json", '{"nnunet_kd": {"training": {"num_epochs": 7}}, "plans_name": "x"}'),
    ],
)
def test_files(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / name))
    assert read_user_settings() == {"training": {"num_epochs": 7}}


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.json").write_text("{}")
    assert read_user_settings("~/s.json") == {}


def test_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.json, which does not exist"):
        read_user_settings("/nowhere.json")


@pytest.mark.parametrize("text", ['{"a": ', "{'a': 1}", '{"a": 1}}'])
def test_broken_inline_json(text: str) -> None:
    with pytest.raises(SettingsError, match="inline value of nnUNetKD_settings are not valid JSON"):
        read_user_settings(text)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text", "a: b: c"])
def test_broken_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"s\.yaml"):
        read_user_settings(str(tmp_path / "s.yaml"))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xff\xfe\x00\x80binary")
    with pytest.raises(SettingsError, match=r"s\.json"):
        read_user_settings(str(tmp_path / "s.json"))


def test_block_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"nnunet_kd": [1]}')
    with pytest.raises(SettingsError, match=r"s\.json"):
        read_user_settings(str(tmp_path / "s.json"))


def test_yaml_is_that_of_version_1_2(tmp_path: Path) -> None:
    """In 1.1 the key of a term would be True, and the rate a text."""
    (tmp_path / "s.yaml").write_text(
        "adaptation: {learning_rate: 1e-3, r1: 2.5E+1}\njoint: no\ndino_mix: {cutmix: false}\n"
        "terms:\n- {on: logits, loss: kl, teacher: joint}\n"
    )
    assert read_user_settings(str(tmp_path / "s.yaml")) == {
        "adaptation": {"learning_rate": 0.001, "r1": 25.0},
        "joint": "no",
        "dino_mix": {"cutmix": False},
        "terms": [{"on": "logits", "loss": "kl", "teacher": "joint"}],
    }


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(SettingsError):
        read_user_settings(str(tmp_path / "s.yaml"))
    assert not (tmp_path / "made").exists()


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"trainning": {}}, ["'trainning'", "training"]),
        ({"training": {"epochs": 3}}, ["'training.epochs'", "num_epochs"]),
        ({"training": 3}, ["'training'"]),
        ({"training": None}, ["'training'"]),
        ({"training": {"num_epochs": "3"}}, ["'training.num_epochs'", "whole number"]),
        ({"training": {"num_epochs": 3.5}}, ["'training.num_epochs'", "whole number"]),
        ({"training": {"num_epochs": True}}, ["'training.num_epochs'", "whole number"]),
        ({"training": {"num_epochs": 0}}, ["'training.num_epochs'", "greater than 0"]),
        ({"training": {"num_iterations_per_epoch": -1}}, ["'training.num_iterations_per_epoch'"]),
        ({"training": {"num_val_iterations_per_epoch": 0}}, ["'training.num_val_iterations_per_epoch'"]),
        ({"training": {"initial_lr": 0}}, ["'training.initial_lr'"]),
        ({"training": {"initial_lr": float("nan")}}, ["'training.initial_lr'"]),
        ({"training": {"initial_lr": float("inf")}}, ["'training.initial_lr'"]),
        ({"training": {"weight_decay": -1}}, ["'training.weight_decay'"]),
        ({"training": {"oversample_foreground_percent": 33}}, ["'training.oversample_foreground_percent'", "1"]),
        ({"training": {"seed": "x"}}, ["'training.seed'"]),
        ({"training": {"seed": -1}}, ["'training.seed'"]),
        ({"training": {"save_every": 0}}, ["'training.save_every'"]),
        ({"sampling_exponent": -1}, ["'sampling_exponent'"]),
        ({"sampling_exponent": float("nan")}, ["'sampling_exponent'"]),
        ({"budget": "both"}, ["'budget'", "'member'", "'total'"]),
        ({"alignment": "mmd"}, ["'alignment'", "'none'", "'dann'"]),
        ({"alignment_weight": -1}, ["'alignment_weight'"]),
        ({"dino_mix": {"unsupervised_weight": -1}}, ["'dino_mix.unsupervised_weight'"]),
        ({"joint": 900.5}, ["'joint'"]),
        ({"teachers": {"x": {"kind": "onnx"}}}, ["'teachers.x.kind'", "'nnunet'"]),
        ({"teachers": {"x": {"modell": "a"}}}, ["'teachers.x.modell'", "model"]),
        ({"teachers": {"x": {"fold": "some"}}}, ["'teachers.x.fold'", "'same'", "'all'"]),
        ({"teachers": {"x": {"fold": []}}}, ["'teachers.x.fold'"]),
        ({"teachers": {"x": {"fold": ["a"]}}}, ["'teachers.x.fold'"]),
        ({"teachers": {"x": {"fold": 0.5}}}, ["'teachers.x.fold'"]),
        ({"teachers": {"x": {"allow_leakage": "yes"}}}, ["'teachers.x.allow_leakage'", "true or false"]),
        ({"teachers": {"x": {"precision": "half"}}}, ["'teachers.x.precision'"]),
        ({"teachers": [1]}, ["'teachers'"]),
        ({"terms": {"teacher": "joint"}}, ["'terms'", "list"]),
        ({"terms": ["kl"]}, ["'terms[0]'"]),
        ({"terms": [{"teacher": "joint"}]}, ["'terms[0].teacher'", "'joint'"]),
        (settings_with_term(on="pixels"), ["'terms[0].on'", "'logits'", "'features'"]),
        (settings_with_term(weight=-1), ["'terms[0].weight'"]),
        (settings_with_term(weight=float("nan")), ["'terms[0].weight'"]),
        (settings_with_term(weight=float("inf")), ["'terms[0].weight'"]),
        (settings_with_term(temperature=0), ["'terms[0].temperature'"]),
        (settings_with_term(temperature=float("nan")), ["'terms[0].temperature'"]),
        (settings_with_term(wieght=1), ["'terms[0].wieght'", "weight"]),
        (settings_with_term(schedule={"kind": "step"}), ["'terms[0].schedule.kind'", "'cosine'"]),
        (settings_with_term(schedule={"warmup": 1.5}), ["'terms[0].schedule.warmup'"]),
        (settings_with_term(schedule={"start": -0.1}), ["'terms[0].schedule.start'"]),
        (settings_with_term(schedule={"start": 0.5, "warmup": 0.2}), ["'terms[0].schedule.start'", "warmup"]),
        (settings_with_term(schedule="linear"), ["'terms[0].schedule'"]),
        (settings_with_term(on="features", loss="mse"), ["'terms[0].levels'", "bottleneck"]),
        (settings_with_term(on="features", loss="mse", levels="bottleneck"), ["'terms[0].levels'", "list"]),
        (settings_with_term(on="features", loss="mse", levels=[2]), ["'terms[0].levels[0]'"]),
        (settings_with_term(levels=["bottleneck"]), ["'terms[0].levels'", "features"]),
        (settings_with_term(on="classification", levels=["bottleneck"]), ["'terms[0].levels'", "imitation"]),
        (settings_with_term(on="boxes", loss="giou", levels=["bottleneck"]), ["'terms[0].levels'", "imitation"]),
        (settings_with_term(on="masks"), ["'terms[0].on'", "'classification'", "'boxes'"]),
        ({"guard": {"margin": -1}}, ["'guard.margin'"]),
        ({"guard": {"margin": "half"}}, ["'guard.margin'"]),
        ({"guard": {"margin": -0.1}}, ["'guard.margin'"]),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings(values)
    for text in named:
        assert text in str(error.value), str(error.value)


@pytest.mark.parametrize("fold", [0, 4, "same", "all", [0, 1, 2]])
def test_folds_of_a_teacher(fold: int | str | list[int]) -> None:
    assert parse_settings({"teachers": {"x": {"fold": fold}}}).teachers["x"].fold == fold
