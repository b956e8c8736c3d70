"""How often each case is drawn when images are classified (our design)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def case_probabilities(
    identifiers: Sequence[str],
    labels: Mapping[str, NDArray[np.float32]],
    multilabel: bool,
    groups: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """Probability of each case such that classes are balanced, and groups (patients) within a class.

    A labelled case has p = 1 / (classes * groups of its class * cases of its group in its class), counted over
    ``identifiers``. An unlabelled case has the mean of that, and all are normalised to a sum of 1. With several
    findings per image, the class of a case is the rarest of its positive findings (the first of equally rare ones), and
    cases without a positive finding are a class of their own.

    Args:
        identifiers: The cases, in the order of the result.
        labels: Case to [classes], 0 or 1, NaN where not labelled; a case that is all NaN or missing is unlabelled.
        multilabel: Several classes may be positive at once.
        groups: Case to group; a case that is not named is a group of its own.

    Returns:
        [N] with the sum 1, for nnU-Net's ``sampling_probabilities``.
    """
    values = [np.asarray(labels.get(case, [np.nan])) for case in identifiers]
    labelled = [index for index, value in enumerate(values) if not np.isnan(value).all()]
    if not labelled:
        return np.full(len(identifiers), 1 / len(identifiers))
    positive = np.stack([values[index] == 1 for index in labelled])  # NaN counts as not positive
    num_positive = positive.sum(axis=0)
    rarity = np.where(positive, num_positive, len(identifiers) + 1)
    classes = np.where(positive.any(axis=1), rarity.argmin(axis=1), -1) if multilabel else positive.argmax(axis=1)

    members = []
    for index, class_index in zip(labelled, classes.tolist(), strict=True):
        case = identifiers[index]
        group = ("case", case) if groups is None or case not in groups else ("group", groups[case])
        members.append((class_index, group))
    cases_per_group = Counter(members)
    groups_per_class = Counter(class_index for class_index, _ in cases_per_group)
    probabilities = np.full(len(identifiers), 1 / len(labelled))  # the mean over the labelled cases
    for index, (class_index, group) in zip(labelled, members, strict=True):
        probabilities[index] = 1 / (
            len(groups_per_class) * groups_per_class[class_index] * cases_per_group[class_index, group]
        )
    return probabilities / probabilities.sum()
