"""The terms of DINO-Mix, and what lists of terms of the user's must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import DinoMix, Settings, Term, merge
from nnunet_kd.training.terms import reads_target

NATURAL: list[Literal["labeled", "unlabeled", "mixed"]] = ["labeled", "unlabeled"]
RAMP = {"kind": "gaussian", "warmup": 1.0}
CONSISTENCY = {"teacher": "ema", "on": "logits", "loss": "pseudo_label", "samples": ["unlabeled"], "schedule": RAMP}
CUTMIX = {**CONSISTENCY, "samples": ["mixed"]}
FOUNDATION = {
    "teacher": "foundation",
    "on": "features",
    "loss": "cosine",  # 1 - cos is half of the squared error of features of length 1
    "levels": ["encoder@1/16"],
    "samples": NATURAL,
    "weight": 1.0,
    "schedule": {"kind": "linear", "warmup": 0.1, "final": 0.2},
}


def terms_of(parts: DinoMix) -> list[dict[str, Any]]:
    """The terms of the parts that are switched on."""
    unsupervised = {"weight": parts.unsupervised_weight, "options": {"confidence": parts.confidence}}
    terms = [
        merge(CONSISTENCY, unsupervised) if parts.consistency else None,
        merge(CUTMIX, unsupervised) if parts.cutmix else None,
        FOUNDATION if parts.foundation else None,
    ]
    return [term for term in terms if term is not None]


def check_terms(settings: Settings) -> list[Term]:
    """The terms, with the samples of a foundation teacher and the confidence of pseudo labels where they name none.

    Raises:
        SettingsError: They contradict the switches, or need a moving average that is not there.
        NotImplementedError: A class-average teacher.
    """
    kinds = {name: teacher.kind for name, teacher in settings.teachers.items()}
    _check_parts(settings, kinds)
    _check_average(settings, kinds)
    _check_samples(settings, kinds)
    if "class_average" in (kinds[term.teacher] for term in settings.terms):
        raise NotImplementedError(
            "A class-average teacher needs the labels of all samples, which DINO-Mix does not have. Use "
            "-tr nnUNetTrainerSIKDStudent, or remove its terms."
        )
    terms = [
        replace(term, samples=NATURAL) if kinds[term.teacher] == "foundation" and not term.samples else term
        for term in settings.terms
    ]
    confidence = {"confidence": settings.dino_mix.confidence}
    return [
        replace(term, options={**confidence, **term.options}) if term.loss == "pseudo_label" else term for term in terms
    ]


def _check_parts(settings: Settings, kinds: Mapping[str, str]) -> None:
    """Raise SettingsError where terms and the switches in 'dino_mix' say different things."""
    parts = settings.dino_mix
    for index, term in enumerate(settings.terms):
        of_ema = {"unlabeled": "consistency", "mixed": "cutmix"}.get("+".join(term.samples))
        part = {"foundation": "foundation", "ema": of_ema}.get(kinds[term.teacher])
        if part is not None and term.weight and not getattr(parts, part):
            raise SettingsError(
                f"'terms[{index}]' is the part '{part}' of DINO-Mix, which 'dino_mix.{part}' switches off. Remove the "
                f"term, or 'terms' as a whole so that the switches decide."
            )
        confidence = term.options.get("confidence", parts.confidence)
        if term.loss == "pseudo_label" and confidence != parts.confidence:
            raise SettingsError(
                f"'terms[{index}].options.confidence' is {confidence}, but 'dino_mix.confidence', by which samples are "
                f"mixed, is {parts.confidence}. Set both to the same."
            )


def _check_samples(settings: Settings, kinds: Mapping[str, str]) -> None:
    """Raise SettingsError where a moving average would be asked about what has labels."""
    for index, term in enumerate(settings.terms):
        if kinds[term.teacher] == "ema" and (not term.samples or "labeled" in term.samples):
            raise SettingsError(
                f"'terms[{index}].samples' is {list(term.samples) or 'not given, which means all'}, but what a moving "
                f"average says of labelled samples is replaced by their labels here. Set it to ['unlabeled'], "
                f"['mixed'] or both."
            )


def _check_average(settings: Settings, kinds: Mapping[str, str]) -> None:
    """Raise SettingsError where there is no moving average though it is needed, or more than one."""
    active = [term for term in settings.terms if term.weight]
    averages = sorted({term.teacher for term in active if kinds[term.teacher] == "ema"})
    if len(averages) > 1:
        raise SettingsError(f"'teachers' has several moving averages, {', '.join(averages)}. DINO-Mix takes one.")
    if averages:
        return
    if settings.dino_mix.predict_with == "ema":
        raise SettingsError(
            "'dino_mix.predict_with' is 'ema', but no term has a moving average as its teacher. Set it to 'student', "
            "or switch on 'consistency' or 'cutmix'."
        )
    for index, term in enumerate(settings.terms):
        if not term.weight:
            continue
        if "mixed" in term.samples:
            raise SettingsError(
                f"'terms[{index}].samples' has 'mixed', but samples are mixed by the pseudo labels of a moving "
                f"average, which no term has as its teacher. Add such a term, or remove 'mixed'."
            )
        if reads_target(term) and term.samples != ["labeled"]:
            raise SettingsError(
                f"'terms[{index}]' asks for the class of voxels, which unlabelled samples have from a moving average "
                f"alone, and no term has one as its teacher. Set 'samples' to ['labeled'], or add such a term."
            )
