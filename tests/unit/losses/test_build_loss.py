"""Losses by name: what exists, and what a user's mistakes are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import LOSSES, build_loss


def test_names() -> None:
    assert set(LOSSES["logits"]) == {"kl", "dkd", "dist", "cwd"}
    assert set(LOSSES["features"]) == {
        "mse", "cosine", "attention", "cwd", "class_masked", "wavelet", "affinity", "intra_class"
    }  # fmt: skip


@pytest.mark.parametrize(("on", "name"), [(on, name) for on in LOSSES for name in LOSSES[on]])
def test_every_name_builds_its_class(on: str, name: str) -> None:
    loss = build_loss(on, name)
    assert type(loss) is LOSSES[on][name]
    assert isinstance(loss, nn.Module)


@pytest.mark.parametrize(
    ("on", "name", "options", "message"),
    [
        ("boxes", "kl", {}, "'boxes'.*logits, features"),
        ("logits", "mse", {}, "'mse' on logits.*kl, dkd, dist, cwd"),
        ("logits", "kl", {"tau": 4}, "'kl' on logits has no option 'tau'.*nonlinearity, temperature, balance"),
        ("logits", "cwd", {"balance": "class"}, "no option 'balance'.*nonlinearity, temperature"),
        ("features", "cosine", {"temperature": 4}, "no option 'temperature'.*none"),
        ("features", "mse", {"args": 1}, "no option 'args'; it has: standardise"),
        ("logits", "kl", {"temperature": 0}, "'temperature'.*greater than 0"),
        ("logits", "kl", {"temperature": float("nan")}, "'temperature'.*finite"),
        ("logits", "kl", {"temperature": "4"}, "'temperature'.*'4'.*number"),
        ("logits", "kl", {"temperature": None}, "'temperature'.*None.*number"),
        ("logits", "kl", {"balance": "label"}, "'balance'.*'label'.*voxel, class"),
        ("logits", "dist", {"nonlinearity": "relu"}, "'nonlinearity'.*'relu'.*softmax, sigmoid"),
        ("logits", "dist", {"gamma": -1}, "'gamma'.*at least 0"),
        ("logits", "dkd", {"alpha": True}, "'alpha'.*True.*number"),
        ("features", "cwd", {"temperature": -1}, "'temperature'.*greater than 0"),
        ("features", "mse", {"standardise": 1}, "'standardise'.*true or false"),
        ("features", "attention", {"power": 0.5}, "'power'.*at least 1"),
        ("features", "wavelet", {"levels": 0}, "'levels'.*at least 1"),
        ("features", "wavelet", {"levels": 1.5}, "'levels'.*whole number"),
        ("features", "wavelet", {"wavelet": "sym4"}, "'wavelet'.*haar, db4"),
        ("features", "wavelet", {"wavelet": ["db4"]}, "'wavelet'.*haar, db4"),
        ("features", "affinity", {"tokens_per_axis": 0}, "'tokens_per_axis'.*at least 1"),
        ("features", "class_masked", {"temperature": 0}, "'temperature'.*greater than 0"),
        ("features", "intra_class", {"num_classes": 0}, "'num_classes'.*at least 1"),
    ],
)
def test_mistakes_are_named(on: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_loss(on, name, **options)


def test_losses_do_not_import_nnunet() -> None:
    code = "import sys, nnunet_kd.losses.deep_supervision; sys.exit('nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
