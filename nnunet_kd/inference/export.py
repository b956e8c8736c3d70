"""Write a trained model as a plain nnU-Net model folder, and verify that stock nnU-Net gets the same logits from it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_kd.data.joint_network import build_joint_network
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import write_json
from nnunet_kd.inference.plain_model import (
    PlainModel,
    choose_member,
    in_own_labels,
    plain_member_model,
    plain_single_model,
)
from nnunet_kd.inference.predict import refuse_head
from nnunet_kd.inference.trained_model import Fold, TrainedModel
from nnunet_kd.settings import BLOCK
from nnunet_kd.teachers.checkpoint import load_checkpoint

CHECKPOINT = "checkpoint_final.pth"
FINGERPRINT = "dataset_fingerprint.json"
MAX_DIFFERENCE = 1e-4  # of logits: a head's convolutions may be summed in another order
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Verification:
    """How the exported folds compare with the trained ones: largest absolute difference of logits per fold."""

    patch_shape: tuple[int, ...]
    differences: dict[Fold, float]


def export_model(
    model: TrainedModel, output: str | Path, head: str | None = None, member: str | None = None
) -> Verification:
    """Write ``model`` to the folder ``output`` and verify it. Nothing is left there if that fails.

    Args:
        model: A student, control or stock model; or a joint teacher, of which one head is written.
        output: A folder that does not exist or is empty.
        head: Joint teacher only: the member to write in its own labels, or the head to write in its labels.
        member: Joint teacher only: the member whose images are predicted, where several share the head.

    Returns:
        The differences between logits of trained and exported folds on random patches of the size of a tile.

    Raises:
        NnUNetKDError: ``output`` is not empty; the network is no stock one; the head is missing, unknown or ambiguous;
            or the logits differ.
    """
    folder = Path(output).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NnUNetKDError(f"{folder} exists and is not an empty folder. Choose another -o, or remove it first.")
    joint = model.joint
    if joint is None:
        refuse_head(model, head, member)
        plain = plain_single_model(model)
        fingerprint = model.folder / FINGERPRINT
    else:
        plain = plain_member_model(model, choose_member(joint, head, member), in_own_labels(joint, head))
        assert plain.member is not None
        fingerprint = Path(os.environ.get("nnUNet_preprocessed", "")) / plain.member / FINGERPRINT
    with _folder_in_the_making(folder) as temporary:
        write_plain_model(plain, temporary, fingerprint)
        return verify(model, plain, temporary)


def write_plain_model(plain: PlainModel, folder: Path, fingerprint: Path | None = None) -> None:
    """Write what stock prediction reads: plans.json, dataset.json and one checkpoint per fold.

    Args:
        plain: The model.
        folder: An existing folder.
        fingerprint: The dataset's fingerprint, which stock nnU-Net keeps beside a model for information.
    """
    write_json(folder / "plans.json", plain.plans)
    write_json(folder / "dataset.json", plain.dataset_json)
    if fingerprint is not None and fingerprint.is_file():
        shutil.copyfile(fingerprint, folder / FINGERPRINT)
    for fold, weights in plain.weights.items():
        checkpoint: dict[str, Any] = {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "init_args": {
                "plans": plain.plans,
                "configuration": plain.configuration,
                "fold": fold,
                "dataset_json": plain.dataset_json,
            },
            "inference_allowed_mirroring_axes": plain.mirroring_axes,
        }
        if fold in plain.seen_cases:  # plain names, which stock nnU-Net does not look at
            checkpoint[BLOCK] = plain.seen_cases[fold]
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / CHECKPOINT)


def verify(model: TrainedModel, plain: PlainModel, folder: Path) -> Verification:
    """Compare the trained network of every fold with what stock nnU-Net loads from ``folder``.

    Raises:
        NnUNetKDError: Logits of a student differ at all, or those of a head by more than 1e-4.
    """
    shape = (plain.num_input_channels, *(int(size) for size in plain.configuration_manager.patch_size))
    predictor = _stock_predictor(folder, tuple(plain.weights))
    trained = _trained_network(model, plain)
    differences: dict[Fold, float] = {}
    for fold, weights in zip(plain.weights, predictor.list_of_parameters, strict=True):
        trained.load_state_dict(load_checkpoint(model.files[fold])["network_weights"])
        predictor.network.load_state_dict(weights)
        differences[fold] = largest_difference(in_labels_of(plain, trained), predictor.network, shape)
    allowed = MAX_DIFFERENCE if plain.member is not None else 0.0
    wrong = [f"fold {fold} {value:.3g}" for fold, value in differences.items() if value > allowed]
    if wrong:
        raise NnUNetKDError(
            f"The exported folds do not give the logits of {model.folder}: largest differences {', '.join(wrong)} "
            f"(allowed {allowed:g}). Nothing was written. Check that the model predicts numbers (no NaN); if it does, "
            f"report this."
        )
    return Verification(shape, differences)


def in_labels_of(plain: PlainModel, trained: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The trained network with its shared head's logits in the member's labels, if the plain model speaks in these."""
    label_map = plain.label_map
    if label_map is None:
        return trained
    return lambda image: label_map.expand(trained(image), lower=True, axis=1)


@torch.no_grad()
def largest_difference(
    first: Callable[[torch.Tensor], torch.Tensor],
    second: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> float:
    """Largest absolute difference of two networks' outputs on random patches [1, *shape].

    0 means equal in every bit; other shapes or NaN count as infinite.
    """
    largest = 0.0
    for seed in SEEDS:
        patch = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
        expected, exported = first(patch), second(patch)
        if expected.shape != exported.shape:
            return float("inf")
        if not torch.equal(expected, exported):
            difference = (expected - exported).abs().max().item()
            largest = float("inf") if math.isnan(difference) else max(difference, largest)
    return largest


def _trained_network(model: TrainedModel, plain: PlainModel) -> nn.Module:
    """The network as it was trained, without weights: the joint one speaking for the member, or the trainer's own."""
    plans_manager = PlansManager(model.plans)
    configuration_manager = plans_manager.get_configuration(plain.configuration)
    if plain.member is not None:
        network = build_joint_network(plans_manager, configuration_manager, deep_supervision=False)
        network.select(plain.member)
        return network.eval()
    name = next(iter(model.files))
    trainer = recursive_find_trainer_class_by_name(load_checkpoint(model.files[name])["trainer_name"])
    return trainer.build_network_architecture(
        plans_manager,
        configuration_manager,
        determine_num_input_channels(plans_manager, configuration_manager, model.dataset_json),
        plans_manager.get_label_manager(model.dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    ).eval()


def _stock_predictor(folder: Path, folds: tuple[Fold, ...]) -> nnUNetPredictor:
    with contextlib.redirect_stdout(io.StringIO()):  # it talks about CUDA
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds, CHECKPOINT)
    predictor.network = getattr(predictor.network, "_orig_mod", predictor.network)
    predictor.network.eval()
    return predictor


@contextlib.contextmanager
def _folder_in_the_making(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
