"""Losses by name: what exists, what a user's mistakes are told, and what is meant on classification."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from torch import nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import LOSSES, build_loss


def test_names() -> None:
    assert set(LOSSES["logits"]) == {"kl", "dkd", "dist", "cwd", "l1", "pseudo_label"}
    assert set(LOSSES["features"]) == {
        "mse", "cosine", "attention", "cwd", "class_masked", "wavelet", "affinity", "intra_class"
    }  # fmt: skip
    assert set(LOSSES["classification"]) == {"kl", "dkd", "cosine"}
    assert set(LOSSES["boxes"]) == {"kl", "giou", "imitation"}


@pytest.mark.parametrize(("on", "name"), [(on, name) for on in LOSSES for name in LOSSES[on]])
def test_every_name_builds_its_class(on: str, name: str) -> None:
    loss = build_loss(on, name)
    assert type(loss) is LOSSES[on][name]
    assert isinstance(loss, nn.Module)


@pytest.mark.parametrize(
    ("on", "name", "options", "message"),
    [
        ("masks", "kl", {}, "'masks'.*logits, features, classification, boxes"),
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
        ("classification", "mse", {}, "'mse' on classification.*kl, dkd, cosine"),
        ("boxes", "dkd", {}, "'dkd' on boxes.*kl, giou, imitation"),
        ("boxes", "kl", {"nonlinearity": "softmax"}, "no option 'nonlinearity'; it has: temperature, exponent"),
        ("boxes", "kl", {"temperature": 0}, "'temperature'.*greater than 0"),
        ("boxes", "kl", {"exponent": -1}, "'exponent'.*at least 0"),
        ("boxes", "giou", {"threshold": 1.5}, "'threshold'.*1.5.*at most 1"),
        ("boxes", "giou", {"threshold": -0.5}, "'threshold'.*at least 0"),
        ("boxes", "imitation", {"temperature": 0}, "'temperature'.*greater than 0"),
        ("boxes", "imitation", {"beta": "0.5"}, "'beta'.*'0.5'.*number"),
        ("boxes", "imitation", {"standardise": 1}, "'standardise'.*true or false"),
    ],
)
def test_mistakes_are_named(on: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_loss(on, name, **options)


def test_losses_do_not_import_nnunet() -> None:
    code = "import sys, nnunet_kd.losses.deep_supervision; sys.exit('nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what the names on classification compute on [B, C, 1, 1] ---------------------------------------------------------
@pytest.fixture
def of_images() -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher [6 images, 4 classes or channels]."""
    student, teacher = 2 * np.random.default_rng(0).standard_normal((2, 6, 4))
    return student, teacher


def compare(
    values: tuple[np.ndarray, np.ndarray], name: str, target: np.ndarray | None = None, **options: Any
) -> float:
    student, teacher = (torch.from_numpy(of_either)[..., None, None] for of_either in values)
    labels = None if target is None else torch.from_numpy(target).view(-1, 1, 1, 1)
    return build_loss("classification", name, **options)(student, teacher, target=labels).item()


def test_kl_of_an_image_is_the_textbooks(of_images: tuple[np.ndarray, np.ndarray]) -> None:
    """Hinton et al.: T^2 * sum over classes of p_teacher log(p_teacher / p_student), mean over the batch."""
    student, teacher = (softmax(logits / 3, axis=1) for logits in of_images)
    expected = 9 * (teacher * np.log(teacher / student)).sum(axis=1).mean()
    assert compare(of_images, "kl", temperature=3.0) == pytest.approx(expected)


def test_kl_of_several_labels_is_the_sum_of_their_divergences(of_images: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = (expit(logits / 3) for logits in of_images)
    of_label = teacher * np.log(teacher / student) + (1 - teacher) * np.log((1 - teacher) / (1 - student))
    expected = 9 * of_label.sum(axis=1).mean()
    assert compare(of_images, "kl", temperature=3.0, nonlinearity="sigmoid") == pytest.approx(expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_dkd_of_an_image_is_the_textbooks(of_images: tuple[np.ndarray, np.ndarray], labelled: bool) -> None:
    """Zhao et al., equation 7: alpha * KL(b_teacher || b_student) + beta * KL(p^_teacher || p^_student), times T^2."""
    labels = np.array([0, 3, 2, 2, 1, 0]) if labelled else of_images[1].argmax(axis=1)
    per_image = []
    for student_logits, teacher_logits, label in zip(*of_images, labels, strict=True):
        student, teacher = (
            np.exp(logits / 3) / np.exp(logits / 3).sum() for logits in (student_logits, teacher_logits)
        )
        b_student, b_teacher = (np.array([p[label], 1 - p[label]]) for p in (student, teacher))
        others_student, others_teacher = (np.delete(p, label) / (1 - p[label]) for p in (student, teacher))
        of_target = (b_teacher * np.log(b_teacher / b_student)).sum()
        of_others = (others_teacher * np.log(others_teacher / others_student)).sum()
        per_image.append(9 * (0.7 * of_target + 1.9 * of_others))
    value = compare(of_images, "dkd", labels if labelled else None, temperature=3.0, alpha=0.7, beta=1.9)
    assert value == pytest.approx(np.mean(per_image))


def test_cosine_of_pooled_features_is_the_mean_over_images(of_images: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = of_images
    lengths = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    assert compare(of_images, "cosine") == pytest.approx(np.mean(1 - (student * teacher).sum(axis=1) / lengths))
