"""Every third-party package that the code imports is declared as a dependency."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_distributions() -> dict[str, set[str]]:
    """Distribution to the files that import it."""
    providers = packages_distributions()
    found: dict[str, set[str]] = {}
    for folder in ("nnunet_kd", "trainers", "planners"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nnunet_kd"}:
                    for distribution in providers.get(top, [top]):
                        found.setdefault(canonical(distribution), set()).add(path.relative_to(CHECKOUT).as_posix())
    return found


def test_imported_packages_are_declared() -> None:
    lines = [line for line in requires("nnunet-kd") or [] if "extra ==" not in line]
    declared = {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines}
    undeclared = {name: files for name, files in imported_distributions().items() if name not in declared}
    assert undeclared == {}
