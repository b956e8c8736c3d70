"""Lists of terms of the user's in DINO-Mix."""

from __future__ import annotations

from nnunet_kd.settings import resolve_settings
from nnunet_kd.training.dino_mix_terms import check_terms

EMA = {"teacher": "ema", "loss": "pseudo_label"}


def test_pseudo_labels_have_the_confidence_of_dino_mix_where_a_term_names_none() -> None:
    own = {"teacher": "ema", "loss": "pseudo_label", "samples": ["mixed"], "options": {"confidence": 0.95}}
    settings = resolve_settings(
        {"teachers": {"ema": {"kind": "ema"}}},
        {"dino_mix": {"confidence": 0.95}, "terms": [{**EMA, "samples": ["unlabeled"]}, own]},
    )
    assert [term.options["confidence"] for term in check_terms(settings)] == [0.95, 0.95]
