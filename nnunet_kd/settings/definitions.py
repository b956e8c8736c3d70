"""What can be set, and the defaults (our design)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Training:
    """The budget. Defaults are stock nnU-Net's.

    ``loss``: of the segmentation; "ce" leaves out the Dice part. ``num_threads``: of torch on a CPU; null takes all, as
    nnU-Net does.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    initial_lr: float = 0.01
    weight_decay: float = 3e-5
    oversample_foreground_percent: float = 0.33
    seed: int | None = None
    save_every: int = 50
    num_threads: int | None = None
    loss: Literal["dice_ce", "ce"] = "dice_ce"


@dataclass(frozen=True)
class TaskSettings:
    """How a dataset's tasks are trained together, where its plans have heads for them.

    ``segmentation``, ``classification``, ``detection``: weights of the tasks' losses. ``balance``: how rare image-level
    classes are made up for: "sampling" draws each class, and each group of a class, equally often; "loss" weighs the
    loss by class frequency; "none". ``label_smoothing``: of the classification loss, in [0, 1). ``minimum_visible``: a
    box counts in a patch where at least this fraction of its object is visible, in [0, 1].
    """

    segmentation: float = 1.0
    classification: float = 1.0
    detection: float = 1.0
    balance: Literal["sampling", "loss", "none"] = "sampling"
    label_smoothing: float = 0.0
    minimum_visible: float = 0.3


@dataclass(frozen=True)
class Schedule:
    """Weight factor over the training: constant, or a ramp from ``start`` to ``warmup``, see ``losses/schedules.py``.

    ``start`` and ``warmup`` are fractions of all epochs in [0, 1]. ``final``: what the factor falls to after the ramp,
    in half a cosine period until the training ends.
    """

    kind: Literal["constant", "linear", "cosine", "gaussian"] = "linear"
    warmup: float = 0.1
    start: float = 0.0
    final: float = 1.0


@dataclass(frozen=True)
class Guard:
    """What keeps a weak teacher from hurting (our design). See ``training/guard.py``, also for the scores of the tasks.

    ``margin``: the terms of a teacher fade out linearly while its score on the training batches falls behind the
    student's by up to this margin; null switches the fading off.
    ``exponent``: the terms of a teacher are multiplied by its score on the training batches to this power; 0 is off.
    """

    margin: float | None = None
    exponent: float = 0.0

    @property
    def watches(self) -> bool:
        """Whether the scores of teacher and student on the training batches are needed."""
        return self.margin is not None or self.exponent > 0


@dataclass(frozen=True)
class ShapeIntensity:
    """Shape-intensity distillation (SIKD), see ``training/shape_intensity.py``.

    ``recipe``: "nnunet" is nnU-Net's loss and standardised features, "paper" what the paper has. ``scope``: a class is
    averaged over the "patch" that the teacher sees, or over the whole "case"; students take that of their teacher.
    """

    recipe: Literal["nnunet", "paper"] = "nnunet"
    scope: Literal["patch", "case"] = "patch"


@dataclass(frozen=True)
class Labeled:
    """Which training cases of the fold keep their labels: ``fraction`` of them, drawn by ``seed``."""

    fraction: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class DinoMix:
    """Semi-supervised training with a foundation teacher (DINO-Mix), see ``training/dino_mix.py``.

    ``consistency``, ``cutmix``, ``foundation``: switch its parts on and off. ``unlabeled_per_batch``: null is half of
    the plans' batch. ``unsupervised_weight``: of the terms on unlabelled and mixed samples at the end of their ramp.
    ``mixes``: mixed patches per batch; null is as many as unlabelled ones. ``curriculum``: how the class of a mix is
    drawn, from the tail to all alike until ``curriculum_end`` (fraction of the training, raised to
    ``curriculum_power``); "tail" and "uniform" stay there. ``imbalance``: how much rarer classes are preferred, log(1 +
    n_max / n) or (n_max / n)^1/2. ``box``: range of a box's side as a fraction of the patch's. ``confidence``: a pseudo
    label counts above this probability. ``transductive``: also train on the images of the validation cases.
    ``predict_with``: the network that is validated and saved for prediction.
    """

    consistency: bool = True
    cutmix: bool = True
    foundation: bool = True
    unlabeled_per_batch: int | None = None
    unsupervised_weight: float = 0.1
    mixes: int | None = None
    curriculum: Literal["progressive", "tail", "uniform"] = "progressive"
    curriculum_end: float = 0.8
    curriculum_power: float = 1.0
    imbalance: Literal["log", "sqrt"] = "log"
    box: list[float] = field(default_factory=lambda: [0.25, 0.5])
    confidence: float = 0.8
    transductive: bool = False
    predict_with: Literal["student", "ema"] = "student"


@dataclass(frozen=True)
class Domain:
    """The cases of one domain of an adaptation.

    ``dataset``: its id or name; null is the one that is trained. ``label``: only cases with this value in ``column`` of
    the dataset's classification file; null takes all cases, and the only column.
    """

    dataset: str | int | None = None
    column: str | None = None
    label: str | int | None = None


@dataclass(frozen=True)
class Adaptation:
    """AdaIN-based adaptation from a labelled source to an unlabelled target, see ``training/adaptation.py``.

    ``network``: "stargan" (the paper's generator) or "conditional_unet" (the planned U-Net); null is that of the plans,
    else the first. ``stage_1``: its share of the epochs. ``learning_rate``, ``mapping_learning_rate``: of Adam.
    ``segmentation_steps``: per iteration, on the same patches. ``background_weight``: of the cross entropy, where
    ``training.loss`` is "ce". The next are weights of losses; ``adversarial`` 0 leaves translation out, ``diversity``
    falls linearly to 0 in stage 1, ``self_target`` and ``self_source`` belong to stage 2. ``self_teacher``: "network"
    is the present one, "ema" its moving average. ``self_on``: logits or probabilities are compared. ``ema_decay``: of
    the moving average; ``predict_with`` says which network is validated and saved for prediction.
    """

    source: Domain = field(default_factory=Domain)
    target: Domain = field(default_factory=Domain)
    network: Literal["stargan", "conditional_unet"] | None = None
    stage_1: float = 0.5
    learning_rate: float = 1e-4
    mapping_learning_rate: float = 1e-6
    segmentation_steps: int = 2
    background_weight: float = 0.7
    adversarial: float = 1.0
    r1: float = 1.0
    style: float = 1.0
    cycle: float = 2.0
    diversity: float = 1.0
    segmentation: float = 5.0
    self_target: float = 10.0
    self_source: float = 1.0
    self_teacher: Literal["network", "ema"] = "network"
    self_on: Literal["logits", "probabilities"] = "logits"
    ema_decay: float = 0.999
    predict_with: Literal["ema", "network"] = "ema"


@dataclass(frozen=True)
class Foundation:
    """A foundation model, see ``teachers/foundation.py``; the teacher's ``model`` names it.

    ``pretrained``: false leaves random weights, for tests and ablations. ``weights``: a local file of them; ``sha256``:
    what its hash must be. ``slices``: that are seen of a 3D patch. ``size``: of the longer side, in pixels. ``cache``:
    DINO-Mix keeps the tokens of whole cases on disk and cuts them as patches are, see ``teachers/token_maps.py``.
    """

    pretrained: bool = True
    weights: str | None = None
    sha256: str | None = None
    slices: int = 4
    size: int = 224
    cache: bool = False


@dataclass(frozen=True)
class Teacher:
    """Where targets come from. ``model`` is a trained model folder, absolute or relative to ``nnUNet_results``.

    ``kind``: "nnunet" sees the student's images, "class_average" (SIKD) their class-wise averages; "ema" is the moving
    average of the student's own weights, with ``decay``; "foundation" a vision model trained elsewhere: ``model`` is
    its name in timm, or MODULE:FUNCTION.
    """

    kind: Literal["nnunet", "class_average", "ema", "foundation"] = "nnunet"
    model: str = ""
    fold: int | str | list[int] = "same"
    checkpoint: str = "checkpoint_final.pth"
    head: str | None = None
    labels: dict[str, str] | None = None
    allow_leakage: bool = False
    precision: Literal["auto", "float32"] = "auto"
    decay: float = 0.999
    foundation: Foundation = field(default_factory=Foundation)


@dataclass(frozen=True)
class Term:
    """One line of the student's extra loss. ``options`` go to the loss (for example ``balance`` of kl).

    ``on``: what is compared: segmentation logits, features of ``levels``, logits of the classification targets, or
    boxes. Of the terms on boxes, "imitation" compares features too and takes the levels of the student's detection head
    where it names none. ``foreground_only``: patches of nothing but background do not count (features only).
    ``samples``: the part of a semi-supervised batch that is compared; empty is all of it.
    """

    teacher: str = "joint"
    on: Literal["logits", "features", "classification", "boxes"] = "logits"
    loss: str = "kl"
    weight: float = 1.0
    temperature: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    deep_supervision: bool = True
    levels: list[str] = field(default_factory=list)
    foreground_only: bool = False
    samples: list[Literal["labeled", "unlabeled", "mixed"]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """All settings of one training.

    ``joint`` names the joint dataset whose teacher a student uses, where several fit. The next four belong to the
    joint teacher. ``sampling_exponent``: a member with n training cases is drawn with p ~ n^exponent. ``budget``:
    "member" multiplies the teacher's iterations so that every member gets at least the steps that its control gets,
    "total" keeps ``num_iterations_per_epoch`` for all members together. ``alignment`` "dann" adds a classifier of the
    member behind gradient reversal at the bottleneck. ``labeled``: the training cases that keep their labels, as a
    share or by name; null is all.
    """

    joint: str | None = None
    training: Training = field(default_factory=Training)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    sampling_exponent: float = 0.5
    budget: Literal["member", "total"] = "member"
    alignment: Literal["none", "dann"] = "none"
    alignment_weight: float = 0.01
    labeled: Labeled | list[str] | None = None
    sikd: ShapeIntensity = field(default_factory=ShapeIntensity)
    dino_mix: DinoMix = field(default_factory=DinoMix)
    adaptation: Adaptation = field(default_factory=Adaptation)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    guard: Guard = field(default_factory=Guard)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, complete with all defaults."""
        return dataclasses.asdict(self)
