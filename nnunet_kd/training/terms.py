"""Which terms a student may have: the default ones, those that fit its tasks, and the task that judges each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import NEED_TARGET
from nnunet_kd.settings import Term
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.output import task_names

TASK_OF = {"logits": "segmentation", "classification": "classification", "boxes": "detection"}


def default_terms(tasks: Tasks) -> list[dict[str, Any]]:
    """The terms of a student whose settings name none (our choice; those without segmentation are not tuned)."""
    terms: list[dict[str, Any]] = []
    if tasks.segmentation:
        terms.append({"on": "logits", "loss": "kl", "temperature": 4.0, "weight": 1.0})
        terms.append({"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "weight": 15.0})
    else:
        terms.append({"on": "features", "loss": "mse", "levels": ["bottleneck"], "weight": 1.0})
    if tasks.classification:
        terms.append({"on": "classification", "loss": "kl", "temperature": 2.0, "weight": 1.0})
    if tasks.detection is not None:
        terms.append({"on": "boxes", "loss": "kl", "weight": 1.0})
        terms.append({"on": "boxes", "loss": "giou", "weight": 1.0})
    return terms


def fit_terms(terms: Collection[Term], dataset: str, tasks: Tasks, detection_plan: DetectionPlan | None) -> list[Term]:
    """Check that the student has what each term compares, and name the levels that imitation leaves open.

    Args:
        terms: Validated settings.
        dataset: The student's, for messages.
        tasks: That the student's network learns.
        detection_plan: Of its detection head; None without.

    Raises:
        SettingsError: A term is on a task that the student has not, or needs the segmentation's labels.
    """
    fitted = []
    for index, term in enumerate(terms):
        task = TASK_OF.get(term.on)
        if task == "segmentation" and not tasks.segmentation:
            raise SettingsError(
                f"'terms[{index}].on' is 'logits', but {dataset} has no segmentations. Use terms on features, which "
                f"any teacher can teach, or on what the dataset has: {', '.join(task_names(tasks)) or 'nothing'}."
            )
        if task is not None and task not in task_names(tasks):
            raise SettingsError(
                f"'terms[{index}].on' is '{term.on}', but the plans of {dataset} have no head for {task}. Declare it "
                f"in dataset.json and train with -p nnUNetKDPlans, which nnUNetKD_plan_and_preprocess writes, or "
                f"remove the term."
            )
        if term.on == "features" and (term.loss in NEED_TARGET or term.foreground_only) and not tasks.segmentation:
            what = f"loss' is '{term.loss}" if term.loss in NEED_TARGET else "foreground_only' is 'true"
            raise SettingsError(
                f"'terms[{index}].{what}', which needs segmentations, and {dataset} has none. Use another loss on "
                f"features, for example 'mse', and all patches."
            )
        if is_imitation(term) and not term.levels:
            assert detection_plan is not None  # the dataset has boxes
            # levels are named by their stride along the last axis, in which several may agree
            levels = dict.fromkeys(f"decoder@1/{stride[-1]}" for stride in detection_plan.strides)
            term = replace(term, levels=list(levels))
        fitted.append(term)
    return fitted


def check_samples(terms: Sequence[Term], available: Sequence[str]) -> None:
    """Raise SettingsError for a term on samples that the trainer's batches do not have, or that lie apart in them."""
    for index, term in enumerate(terms):
        if term.samples and not available:
            raise SettingsError(
                f"'terms[{index}].samples' is {term.samples}, but only semi-supervised trainers have such parts of a "
                f"batch (nnUNetTrainerDINOMix). Remove it, or choose that trainer."
            )
        if "labeled" in term.samples and "mixed" in term.samples and "unlabeled" not in term.samples:
            raise SettingsError(
                f"'terms[{index}].samples' leaves out 'unlabeled' between 'labeled' and 'mixed'. Make two terms of it."
            )


def reads_target(term: Term) -> bool:
    """Whether the term asks which class a voxel has."""
    by_class = term.options.get("balance") == "class" or term.options.get("agreement", False)
    return term.loss in (*NEED_TARGET, "dkd") or term.foreground_only or by_class


def is_imitation(term: Term) -> bool:
    """Whether the term compares features around boxes."""
    return (term.on, term.loss) == ("boxes", "imitation")


def is_pooled(term: Term) -> bool:
    """Whether the term compares the features that classification pools."""
    return (term.on, term.loss) == ("classification", "cosine")


def asked_task(term: Term) -> str | None:
    """The task whose outputs the term asks of its teacher; None where features are enough."""
    return None if is_imitation(term) else TASK_OF.get(term.on)


def judging_task(term: Term, common: Collection[str]) -> str | None:
    """The task in which the guard compares student and teacher for this term.

    The term's own one; else the first that both have, segmentation before classification before detection; None where
    they have none in common.

    Args:
        term: Any.
        common: The tasks that both have, in this order.
    """
    own = TASK_OF.get(term.on)
    return own if own in common else next(iter(common), None)
