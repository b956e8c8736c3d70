"""From plain values to settings of the right types (our design)."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from nnunet_kd.errors import SettingsError
from nnunet_kd.settings.definitions import Settings
from nnunet_kd.settings.ranges import check_ranges

# keys of the block in a plans file that describe the joint dataset; they are data, not settings
DESCRIPTION_KEYS = ("version", "members", "channels", "heads", "member_of", "student")


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Turn merged plain values into validated :class:`Settings`.

    Raises:
        SettingsError: Unknown key, wrong type, or value out of range; names the key and what is allowed.
    """
    settings = check_types(values)
    check_ranges(settings)
    return settings


def check_types(values: Mapping[str, Any]) -> Settings:
    """Like :func:`parse_settings`, for settings that are not complete yet: keys and types, but no ranges.

    Raises:
        SettingsError: Unknown key or wrong type; names the key and what is allowed.
    """
    return parse_as(Settings, {key: value for key, value in values.items() if key not in DESCRIPTION_KEYS}, "")


def names_of(cls: type) -> str:
    """The fields of a settings object, for messages."""
    return ", ".join(f.name for f in dataclasses.fields(cls))


def parse_as(expected: Any, value: Any, where: str) -> Any:
    """Convert a plain value to an annotated type, dataclasses included.

    Args:
        expected: The type.
        value: Plain JSON types.
        where: Dotted key of the value, which messages begin with.

    Raises:
        SettingsError: Unknown key or wrong type; names the key and what is allowed.
    """
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(value, Mapping):
            raise SettingsError(f"'{where}' must be an object with keys {names_of(expected)}, not {value!r}.")
        types_of = typing.get_type_hints(expected)
        unknown = [key for key in value if key not in types_of]
        if unknown:
            raise SettingsError(f"Unknown setting '{_join(where, unknown[0])}'. Allowed here: {names_of(expected)}.")
        for own in dataclasses.fields(expected):
            is_required = own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
            if is_required and own.name not in value:
                raise SettingsError(f"'{where}' lacks '{own.name}'." if where else f"'{own.name}' is missing.")
        return expected(**{key: parse_as(types_of[key], item, _join(where, key)) for key, item in value.items()})
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"'{where}' is {value!r}. Allowed: {', '.join(map(repr, arguments))}.")
        return value
    if origin in (Union, types.UnionType):
        objects = [option for option in arguments if dataclasses.is_dataclass(option)]
        if isinstance(value, Mapping) and objects:
            return parse_as(objects[0], value, where)  # whose message names the key
        for option in arguments:
            try:
                return parse_as(option, value, where)
            except SettingsError:
                continue
        raise SettingsError(f"'{where}' is {value!r}. Allowed types: {', '.join(_describe(a) for a in arguments)}.")
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"'{where}' must be a list, not {value!r}.")
        return [parse_as(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"'{where}' must be an object, not {value!r}.")
        return {str(key): parse_as(arguments[1], item, _join(where, str(key))) for key, item in value.items()}
    if expected is Any:
        return value
    if expected is types.NoneType:
        if value is not None:
            raise SettingsError(f"'{where}' must be null, not {value!r}.")
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise SettingsError(f"'{where}' must be {_describe(expected)}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"'{where}' must be a finite number, not {value!r}.")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _describe(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return f"an object with keys {names_of(expected)}"
    return names.get(expected, str(expected))
