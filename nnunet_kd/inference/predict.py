"""Prediction from raw images through stock nnU-Net's predictor, also with one head of a joint teacher."""

from __future__ import annotations

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.inference.plain_model import choose_member, in_own_labels, plain_member_model
from nnunet_kd.inference.trained_model import TrainedModel


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
    plain = plain_member_model(model, choose_member(joint, head, member), in_own_labels(joint, head))
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
