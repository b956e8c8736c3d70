"""Which values the settings may have, and which of them go together (our design)."""

from __future__ import annotations

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings.definitions import Labeled, Settings


def check_ranges(settings: Settings) -> None:
    """Raise SettingsError for a value out of range, or two that contradict each other; the message names the key."""
    training, guard, tasks, mix = settings.training, settings.guard, settings.tasks, settings.dino_mix
    adaptation = settings.adaptation
    positive = {
        "training.num_epochs": training.num_epochs,
        "training.num_iterations_per_epoch": training.num_iterations_per_epoch,
        "training.num_val_iterations_per_epoch": training.num_val_iterations_per_epoch,
        "training.initial_lr": training.initial_lr,
        "training.save_every": training.save_every,
        "training.num_threads": 1 if training.num_threads is None else training.num_threads,
        "dino_mix.unlabeled_per_batch": 1 if mix.unlabeled_per_batch is None else mix.unlabeled_per_batch,
        "dino_mix.mixes": 1 if mix.mixes is None else mix.mixes,
        "dino_mix.curriculum_end": mix.curriculum_end,
        "dino_mix.curriculum_power": mix.curriculum_power,
        **{
            f"adaptation.{key}": getattr(adaptation, key)
            for key in ("stage_1", "learning_rate", "mapping_learning_rate", "segmentation_steps", "segmentation")
        },
    }
    for key, value in positive.items():
        if value <= 0:
            raise SettingsError(f"'{key}' is {value}; it must be greater than 0.")
    fractions = {
        "training.oversample_foreground_percent": training.oversample_foreground_percent,
        "tasks.label_smoothing": tasks.label_smoothing,
        "tasks.minimum_visible": tasks.minimum_visible,
        "dino_mix.curriculum_end": mix.curriculum_end,
    }
    not_negative = {
        "training.seed": training.seed,
        "labeled.seed": settings.labeled.seed if isinstance(settings.labeled, Labeled) else None,
        "training.weight_decay": training.weight_decay,
        "tasks.segmentation": tasks.segmentation,
        "tasks.classification": tasks.classification,
        "tasks.detection": tasks.detection,
        "sampling_exponent": settings.sampling_exponent,
        "alignment_weight": settings.alignment_weight,
        "dino_mix.unsupervised_weight": mix.unsupervised_weight,
        "guard.margin": guard.margin,
        "guard.exponent": guard.exponent,
        **{
            f"adaptation.{key}": getattr(adaptation, key)
            for key in ("background_weight", "adversarial", "r1", "style", "cycle", "diversity", "self_target",
                        "self_source", "ema_decay")
        },
    }
    for index, term in enumerate(settings.terms):
        where = f"terms[{index}]"
        schedule = term.schedule
        fractions |= {f"{where}.schedule.{key}": getattr(schedule, key) for key in ("warmup", "start", "final")}
        not_negative[f"{where}.weight"] = term.weight
        if term.temperature is not None and term.temperature <= 0:
            raise SettingsError(f"'{where}.temperature' is {term.temperature}; it must be greater than 0.")
        if schedule.kind != "constant" and schedule.start > schedule.warmup:
            raise SettingsError(
                f"'{where}.schedule.start' is {schedule.start}, after the end of the ramp, 'warmup' = "
                f"{schedule.warmup}. Raise 'warmup' or lower 'start'."
            )
        if term.levels and term.on != "features" and (term.on, term.loss) != ("boxes", "imitation"):
            raise SettingsError(
                f"'{where}.levels' belongs to a term on features, or on boxes with the loss 'imitation'. Remove it, or "
                f"change '{where}.on'."
            )
        if term.on == "features" and not term.levels:
            raise SettingsError(
                f"'{where}.levels' is empty. A term on features names its levels, for example "
                f'["bottleneck", "decoder@1/2", "encoder@1/4"].'
            )
        if term.foreground_only and term.on != "features":
            raise SettingsError(f"'{where}.foreground_only' belongs to a term on features. Remove it.")
        if term.teacher not in settings.teachers:
            raise SettingsError(
                f"'{where}.teacher' is '{term.teacher}', but 'teachers' names {sorted(settings.teachers) or 'none'}."
            )
    if isinstance(settings.labeled, list):
        if not settings.labeled:
            raise SettingsError("'labeled' is an empty list. Name the cases that keep their labels, or remove it.")
    elif settings.labeled is not None and not 0 < settings.labeled.fraction <= 1:
        raise SettingsError(
            f"'labeled.fraction' is {settings.labeled.fraction}; it must be greater than 0 and at most 1."
        )
    if not 0.5 <= mix.confidence < 1:
        raise SettingsError(
            f"'dino_mix.confidence' is {mix.confidence}; it must be at least 0.5, so that one class alone can have it, "
            f"and less than 1."
        )
    if len(mix.box) != 2 or not 0 < mix.box[0] <= mix.box[1] <= 1:
        raise SettingsError(
            f"'dino_mix.box' is {mix.box}. Give the smallest and the largest side as fractions of the patch's, for "
            f"example [0.25, 0.5]."
        )
    for key, fraction in (("stage_1", adaptation.stage_1), ("ema_decay", adaptation.ema_decay)):
        if fraction >= 1:
            raise SettingsError(f"'adaptation.{key}' is {fraction}; it must be less than 1.")
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise SettingsError(f"'{key}' is {value}; it must lie between 0 and 1.")
    for key, number in not_negative.items():
        if number is not None and number < 0:
            raise SettingsError(f"'{key}' is {number}; it must not be negative.")
    for name, teacher in settings.teachers.items():
        if not 0 <= teacher.decay < 1:
            raise SettingsError(f"'teachers.{name}.decay' is {teacher.decay}; it must be at least 0 and less than 1.")
        if teacher.foundation.sha256 is not None and teacher.foundation.weights is None:
            raise SettingsError(f"'teachers.{name}.foundation.sha256' is that of a file, but 'weights' names none.")
        for key in ("slices", "size"):
            if getattr(teacher.foundation, key) <= 0:
                raise SettingsError(
                    f"'teachers.{name}.foundation.{key}' is {getattr(teacher.foundation, key)}; it must be greater "
                    f"than 0."
                )
        if teacher.fold == []:
            raise SettingsError(f"'teachers.{name}.fold' is an empty list. Allowed: a number, a list, 'same', 'all'.")
        if isinstance(teacher.fold, str) and teacher.fold not in ("same", "all"):
            raise SettingsError(f"'teachers.{name}.fold' is '{teacher.fold}'. Allowed: number, list, 'same', 'all'.")
