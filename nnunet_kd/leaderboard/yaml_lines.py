"""A YAML file as plain values, and the line of every key, so that messages can name it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.settings.yaml_loader import SettingsLoader

MERGE = "tag:yaml.org,2002:merge"
QUOTED_KEY = re.compile(r"'([^']+)'")


class RecipeError(NnUNetKDError):
    """A recipe cannot be used; the message names the file and the line."""


class YamlFile:
    """The content of a YAML file.

    Attributes:
        path: The file.
        values: Its content.

    Raises:
        RecipeError: The file is missing, no YAML object, or has a key twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, int] = {}
        if not path.is_file():
            raise RecipeError(f"The recipe {path} does not exist. Give the path of a YAML file.")
        try:
            text = path.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=SettingsLoader)
            if not isinstance(root, yaml.MappingNode):
                raise RecipeError(f"{path} holds no recipe: it must be an object with keys such as 'datasets'.")
            self._visit(root, "")
            self.values: dict[str, Any] = yaml.load(text, Loader=SettingsLoader)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 text. Save it with the encoding UTF-8.") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error

    def _visit(self, node: yaml.Node, where: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.tag == MERGE:  # keys of the mapping itself come first
                    self._visit(value, where)
                    continue
                name = f"{where}.{key.value}" if where else str(key.value)
                if key.value in seen:
                    raise self.error(f"'{name}' is there twice. Leave one.", key.start_mark.line + 1)
                seen.add(key.value)
                self._lines[name] = key.start_mark.line + 1
                self._visit(value, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                name = f"{where}[{index}]"
                self._lines[name] = value.start_mark.line + 1
                self._visit(value, name)

    def has(self, where: str) -> bool:
        """Whether the file has a key; ``where`` is dotted, as in ``methods.control.settings.terms[0].weight``."""
        return where in self._lines

    def line(self, where: str) -> int:
        """The line of a key, or of the nearest one around it; lines count from 1."""
        while where and where not in self._lines:
            where = re.sub(r"(\.[^.\[\]]+|\[\d+\]|^[^.\[\]]+)$", "", where)
        return self._lines.get(where, 1)

    def error(self, message: str, line: int) -> RecipeError:
        """An error that names the file and the line."""
        return RecipeError(f"{self.path}, line {line}: {message}")

    def error_at(self, where: str, message: str) -> RecipeError:
        """An error at a key."""
        return self.error(message, self.line(where))

    def located(self, message: str) -> RecipeError:
        """An error whose message begins with its dotted key in quotes, as those of the settings do."""
        quoted = QUOTED_KEY.search(message)
        return self.error_at(quoted[1] if quoted else "", message)
