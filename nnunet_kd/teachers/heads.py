"""Whether a teacher's heads for classes and boxes can be compared with a student's (our design)."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.errors import TeacherError
from nnunet_kd.tasks.detection_plan import DetectionPlan


def match_classification(
    student: Sequence[ClassificationTarget], teacher: Sequence[ClassificationTarget]
) -> dict[str, tuple[int, ...]]:
    """Match targets and classes by name.

    Returns:
        For each of the student's targets, the teacher's output of each class, in the student's order of classes.

    Raises:
        TeacherError: The teacher lacks a target, or its classes or their kind (one of them, or several at once) differ.
    """
    if student and not teacher:
        raise TeacherError("It has no classification head. Train it with -p nnUNetKDPlans on a dataset with classes.")
    orders = {}
    for target in student:
        other = next((own for own in teacher if own.name == target.name), None)
        kinds = {(own.multilabel, frozenset(own.classes)) for own in (target, other) if own is not None}
        if other is None or len(kinds) > 1:
            raise TeacherError(
                f"Its classification targets are {_listed(teacher)}, the student's {_listed(student)}; '{target.name}' "
                f"must be there under the same name with the same classes. Make both equal in dataset.json (a target's "
                f'"name", "classes" or "columns"), then plan and train the teacher again.'
            )
        orders[target.name] = tuple(other.classes.index(name) for name in target.classes)
    return orders


def match_detection(student: DetectionPlan, teacher: DetectionPlan | None, zoom: Sequence[float]) -> None:
    """Check that both heads speak of the same anchors and classes.

    Args:
        student: Of the student.
        teacher: Of the teacher; None without a detection head.
        zoom: By how much the teacher's grid is finer than the student's, per axis.

    Raises:
        TeacherError: There is no head, or classes, strides, anchors or grids differ; both sides are named.
    """
    if teacher is None:
        raise TeacherError("It has no detection head. Train it with -p nnUNetKDPlans on a dataset with boxes.")
    if any(factor != 1 for factor in zoom):
        raise TeacherError(
            f"It sees images at {[round(factor, 3) for factor in zoom]} times the student's resolution, so the two "
            f"have no anchors in common. Plan both with the same spacing (-overwrite_target_spacing)."
        )
    for what in ("classes", "strides", "anchors"):
        own, other = getattr(student, what), getattr(teacher, what)
        if own != other:
            raise TeacherError(
                f"The {what} of its detection head are {other}, the student's {own}; boxes are compared anchor by "
                f"anchor. Plan the student's dataset with nnUNetKD_plan_and_preprocess, then the joint dataset again: "
                f"the joint planner takes over a member's anchors where the teacher's decoder has their strides."
            )


def _listed(targets: Sequence[ClassificationTarget]) -> str:
    kinds = {False: "one of", True: "any of"}
    return "; ".join(f"'{own.name}' ({kinds[own.multilabel]} {', '.join(own.classes)})" for own in targets)
