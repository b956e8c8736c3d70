"""Prediction from raw images through nnU-Net's predictor: with all tasks, or with one head of a joint teacher."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.inference.plain_model import choose_member, in_own_labels, plain_member_model
from nnunet_kd.inference.trained_model import TrainedModel
from nnunet_kd.networks.multitask import planned_heads


def build_predictor(
    model: TrainedModel,
    *,
    head: str | None = None,
    member: str | None = None,
    tasks: Collection[str] | None = None,
    box_merging: Any = "cluster",
    **options: Any,
) -> nnUNetPredictor:
    """Return a predictor that is ready: of all tasks where the plans have heads for them, else the stock one.

    Args:
        model: Any trained nnU-Net.
        head: See :func:`initialize_predictor`.
        member: See :func:`initialize_predictor`.
        tasks: Predict these only: "segmentation", "classification", "detection". None predicts all.
        box_merging: "cluster" or "suppress", see ``CasePredictor``.
        **options: Of the stock predictor.

    Raises:
        NnUNetKDError: As :func:`initialize_predictor`, or the model does not predict a task.
    """
    if has_heads(model, head, member):
        from nnunet_kd.inference.task_predictor import TaskPredictor  # needs MONAI, which takes a second to import

        predictor = TaskPredictor(box_merging=box_merging, **options)
        initialize_predictor(predictor, model, head, member)
        predictor.choose_tasks(tasks)
        return predictor
    others = sorted(set(tasks or ()) - {"segmentation"})
    if others:
        raise NnUNetKDError(f"{model.folder} does not predict {' and '.join(others)}, only segmentation.")
    stock = nnUNetPredictor(**options)
    initialize_predictor(stock, model, head, member)
    return stock


def has_heads(model: TrainedModel, head: str | None = None, member: str | None = None) -> bool:
    """Whether a model, of a joint teacher the chosen member, has heads for classification or detection.

    A shared head, asked for by its name, speaks for no member, so it has none.
    """
    if model.joint is not None:
        chosen = choose_member(model.joint, head, member)
        own = [heads.get(chosen, {}) for heads in model.joint.task_heads.values()]
        return in_own_labels(model.joint, head) and any(any(settings.values()) for settings in own)
    configurations = model.plans["configurations"].values()
    architectures = [own["architecture"] for own in configurations if "architecture" in own]
    return any(planned_heads(own) is not None for own in architectures)


def initialize_predictor(
    predictor: nnUNetPredictor, model: TrainedModel, head: str | None = None, member: str | None = None
) -> None:
    """Give ``predictor`` the network, plans and labels of ``model``; afterwards it predicts as stock nnU-Net does.

    Args:
        predictor: A stock predictor.
        model: A joint teacher, or any trained nnU-Net.
        head: Joint teacher only: the member to predict in its own labels, or the head to predict in its labels.
        member: Joint teacher only: the member whose images are given, where several share the head.

    Raises:
        NnUNetKDError: The head is missing, unknown, ambiguous, or given for a model that has none.
        TeacherError: A checkpoint cannot be read.
    """
    joint = model.joint
    if joint is None:
        refuse_head(model, head, member)
        for fold in model.files:
            model.load(fold)  # refuses foreign code, which stock nnU-Net would run
        names = {file.name for file in model.files.values()}
        predictor.initialize_from_trained_model_folder(str(model.folder), tuple(model.files), names.pop())
        return
    own_labels = in_own_labels(joint, head)
    plain = plain_member_model(model, choose_member(joint, head, member), own_labels, task_heads=own_labels)
    predictor.manual_initialization(
        plain.build_network(),
        plain.plans_manager,
        plain.configuration_manager,
        list(plain.weights.values()),
        plain.dataset_json,
        "nnUNetTrainer",
        plain.mirroring_axes,
    )


def refuse_head(model: TrainedModel, head: str | None, member: str | None) -> None:
    """Raise NnUNetKDError if a head is asked of a model that is no joint teacher."""
    given = [f"{flag} {value}" for flag, value in (("--head", head), ("--member", member)) if value is not None]
    if given:
        raise NnUNetKDError(
            f"{model.folder} is a model of one dataset ({model.plans['dataset_name']}), not a joint teacher, so "
            f"{' and '.join(given)} means nothing for it. Leave it out, or give the teacher's folder with -m."
        )
