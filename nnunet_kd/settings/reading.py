"""The layers of settings: the user's file or variable, and how layers are merged (our design)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings.definitions import Settings
from nnunet_kd.settings.parsing import names_of, parse_settings
from nnunet_kd.settings.yaml_loader import SettingsLoader

ENVIRONMENT_VARIABLE = "nnUNetKD_settings"
BLOCK = "nnunet_kd"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on top: objects merge deeply, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read_user_settings(source: str | None = None) -> dict[str, Any]:
    """Read the user's settings from ``source`` or, if None, from the environment variable.

    Args:
        source: Path of a JSON or YAML file, or inline JSON. Empty or unset means no settings.

    Raises:
        SettingsError: The file is missing, or the text is not a JSON or YAML object.
    """
    source = os.environ.get(ENVIRONMENT_VARIABLE, "") if source is None else source
    if not source.strip():
        return {}
    if source.lstrip().startswith("{"):
        text, where = source, f"the inline value of {ENVIRONMENT_VARIABLE}"
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise SettingsError(
                f"{ENVIRONMENT_VARIABLE} names the file {path}, which does not exist. Give an existing JSON or YAML "
                f"file, or inline JSON that starts with '{{'."
            )
        text, where = _read_text(path), str(path)
    try:
        is_json = text.lstrip().startswith("{")
        loaded = json.loads(text) if is_json else yaml.load(text, Loader=SettingsLoader)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"The settings in {where} are not valid JSON or YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"The settings in {where} must be an object with keys {names_of(Settings)}, not {loaded!r}."
        )
    block = loaded.get(BLOCK, loaded)
    if not isinstance(block, dict):
        raise SettingsError(f"'{BLOCK}' in {where} must be an object with keys {names_of(Settings)}, not {block!r}.")
    return block


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"The settings file {path} is no text: {error}. Give a JSON or YAML file.") from error


def resolve_settings(*layers: Mapping[str, Any]) -> Settings:
    """Merge layers (later over earlier) and parse the result."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return parse_settings(merged)


def without_terms(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer without what only students read, so that one settings file serves teacher, student and control."""
    return {key: value for key, value in layer.items() if key not in ("teachers", "terms", "guard")}
