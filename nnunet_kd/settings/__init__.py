"""The ``nnunet_kd`` settings: parse, merge, validate, write (our design).

Settings come from, later over earlier: the trainer's preset; what the joint dataset says of the member; the block
``nnunet_kd`` of the plans file; the environment variable ``nnUNetKD_settings`` (a JSON or YAML file, or inline JSON).
Objects merge deeply, lists replace. An unknown key or a value out of range is a :class:`SettingsError` that names the
key and what is allowed.
"""

from nnunet_kd.settings.definitions import (
    Adaptation,
    DinoMix,
    Domain,
    Foundation,
    Guard,
    Labeled,
    Schedule,
    Settings,
    ShapeIntensity,
    TaskSettings,
    Teacher,
    Term,
    Training,
)
from nnunet_kd.settings.parsing import DESCRIPTION_KEYS, check_types, parse_as, parse_settings
from nnunet_kd.settings.reading import (
    BLOCK,
    ENVIRONMENT_VARIABLE,
    merge,
    read_user_settings,
    resolve_settings,
    without_terms,
)

__all__ = [
    "BLOCK",
    "DESCRIPTION_KEYS",
    "ENVIRONMENT_VARIABLE",
    "Adaptation",
    "DinoMix",
    "Domain",
    "Foundation",
    "Guard",
    "Labeled",
    "Schedule",
    "Settings",
    "ShapeIntensity",
    "TaskSettings",
    "Teacher",
    "Term",
    "Training",
    "check_types",
    "merge",
    "parse_as",
    "parse_settings",
    "read_user_settings",
    "resolve_settings",
    "without_terms",
]
