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


def imported_distributions(*, at_start: bool = False) -> dict[str, set[str]]:
    """Distribution to the files that import it; ``at_start``: not only inside a function."""
    providers = packages_distributions()
    found: dict[str, set[str]] = {}
    for folder in ("nnunet_kd", "trainers", "planners"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in tree.body if at_start else ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nnunet_kd"}:
                    for distribution in providers.get(top, [top]):
                        found.setdefault(canonical(distribution), set()).add(path.relative_to(CHECKOUT).as_posix())
    return found


def declared(extra: str) -> set[str]:
    """Distributions that an extra needs; "" are those of every installation."""
    lines = [
        line
        for line in requires("nnunet-kd") or []
        if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)
    ]
    return {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines}


def test_imported_packages_are_declared() -> None:
    known = declared("") | declared("cluster")
    undeclared = {name: files for name, files in imported_distributions().items() if name not in known}
    assert undeclared == {}


def test_packages_of_extras_are_imported_late() -> None:
    optional = declared("cluster") - declared("")
    assert optional == {"submitit"}
    assert optional & set(imported_distributions()) == optional
    assert optional & set(imported_distributions(at_start=True)) == set()
