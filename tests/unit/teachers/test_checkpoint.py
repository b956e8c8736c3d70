"""A teacher's checkpoint is a file from the internet: it may be broken, and it may want to run code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_kd.errors import TeacherError
from nnunet_kd.teachers.checkpoint import checkpoint_file, load_checkpoint, model_folder, read_model_json

MODEL = "Dataset900_Joint/nnUNetTrainerKDTeacher__nnUNetKDPlans__3d_fullres"


def checkpoint() -> dict[str, Any]:
    """As nnU-Net writes it, its logger's numpy numbers included."""
    return {
        "network_weights": {"weight": torch.arange(2000.0)},
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "dice_per_class": [[np.float64(1), 0.5]]},
        "_best_ema": np.float64(0.3),
        "current_epoch": 3,
        "init_args": {"plans": {}, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
        "nnunet_kd": {"training_cases": {"Dataset001_A": ["a"]}, "steps": {"Dataset001_A": 3}},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint(), path)
    return path


def test_checkpoint_of_nnunet_is_read(file: Path) -> None:
    loaded = load_checkpoint(file)
    assert torch.equal(loaded["network_weights"]["weight"], torch.arange(2000.0))
    assert loaded["logging"]["mean_fg_dice"] == [0.5, 0.25]
    assert loaded["nnunet_kd"]["training_cases"] == {"Dataset001_A": ["a"]}


def test_checkpoint_written_with_numpy_1_is_read(tmp_path: Path, file: Path) -> None:
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in content
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(name, content)
    assert load_checkpoint(old)["logging"] == load_checkpoint(file)["logging"]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.9, 0.999])
def test_truncated(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept > 1 or kept in (0, 1) else kept * len(content))])
    with pytest.raises(TeacherError, match=r"truncated or corrupted") as error:
        load_checkpoint(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x00" * 5000, b"<html>404</html>", b"PK\x03\x04rest"])
def test_no_checkpoint_at_all(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(TeacherError, match=r"truncated or corrupted"):
        load_checkpoint(file)


def test_flipped_bytes_never_end_in_anything_but_a_teacher_error(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = content.find(b"data.pkl")
    refused = 0
    for position in range(start, start + 1200, 3):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        file.write_bytes(broken)
        try:
            load_checkpoint(file)
        except TeacherError:
            refused += 1
    assert refused > 100


class WritesFile:
    """Foreign code: unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["new", "legacy", "pickle"])
def test_foreign_code_is_not_run(tmp_path: Path, file: Path, way: str) -> None:
    target = tmp_path / "written_by_foreign_code"
    content = {**checkpoint(), "extra": WritesFile(target)}
    if way == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=way == "new")
    with pytest.raises(TeacherError, match=r"foreign code") as error:
        load_checkpoint(file)
    assert str(file) in str(error.value)
    assert "weights_only" not in str(error.value), "torch's advice to switch the protection off"
    assert not target.exists()
    torch.load(file, weights_only=False) if way != "pickle" else pickle.loads(file.read_bytes())
    assert target.exists(), "the file must be dangerous for this test to say anything"


def test_exchanged_pickle_inside_a_good_file_is_not_run(tmp_path: Path, file: Path) -> None:
    target, evil = tmp_path / "written", tmp_path / "evil.pth"
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(evil, "w", zipfile.ZIP_STORED) as bad:
        for name in good.namelist():
            content = pickle.dumps(WritesFile(target)) if name.endswith("data.pkl") else good.read(name)
            bad.writestr(name, content)
    with pytest.raises(TeacherError):
        load_checkpoint(evil)
    assert not target.exists()


@pytest.mark.parametrize("missing", ["network_weights", "init_args", "trainer_name"])
def test_missing_part_is_named(file: Path, missing: str) -> None:
    torch.save({key: value for key, value in checkpoint().items() if key != missing}, file)
    with pytest.raises(TeacherError, match=f"no nnU-Net checkpoint: it lacks {missing}"):
        load_checkpoint(file)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, None])
def test_something_else_saved_by_torch(file: Path, content: object) -> None:
    torch.save(content, file)
    with pytest.raises(TeacherError, match="no nnU-Net checkpoint"):
        load_checkpoint(file)


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


def test_missing_model_says_how_to_train_it(results: Path) -> None:
    command = "nnUNetv2_train 900 3d_fullres FOLD -tr nnUNetTrainerKDTeacher -p nnUNetKDPlans"
    with pytest.raises(TeacherError, match=command) as error:
        model_folder(MODEL)
    assert str(results / MODEL) in str(error.value)


def test_missing_model_elsewhere_asks_for_a_model_folder(results: Path) -> None:
    with pytest.raises(TeacherError, match=r"fold_0"):
        model_folder(str(results / "somewhere"))


def test_missing_fold_says_how_to_train_it_and_what_is_there(results: Path) -> None:
    folder = results / MODEL
    (folder / "fold_3").mkdir(parents=True)
    (folder / "fold_3" / "checkpoint_final.pth").touch()
    assert model_folder(MODEL) == folder
    assert checkpoint_file(folder, 3, "checkpoint_final.pth").is_file()
    with pytest.raises(TeacherError, match=r"3d_fullres 1 -tr nnUNetTrainerKDTeacher") as error:
        checkpoint_file(folder, 1, "checkpoint_final.pth")
    assert "fold_3" in str(error.value)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_missing_or_broken_plans(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "plans.json").write_text(content)
    with pytest.raises(TeacherError, match=r"plans\.json"):
        read_model_json(tmp_path, "plans.json")
