"""Who may import whom: the rooms of the package, read from the source with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

# One line per level; a room may import its own line and the lines before it, but never in a circle.
LEVELS = (
    ("errors", "environment", "files", "settings", "spaces"),
    ("losses", "networks", "tasks"),
    ("teachers", "data"),
    ("training", "inference", "evaluation", "conversion"),
    ("leaderboard",),
    ("demo", "cli"),
    ("trainers", "planners", "train"),
)
LEVEL_OF = {room: number for number, level in enumerate(LEVELS) for room in level}
WITHOUT_NNUNET = ("errors", "environment", "files", "settings", "spaces", "losses", "networks")
MAPPED = ("trainers", "planners")


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Yield the full names that ``module`` imports anywhere, also inside functions; ``a.b`` for ``from a import b``."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of ``nnunet_kd.<room>...``; None outside the package and for its top (``nnunet_kd.__version__``)."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nnunet_kd" and len(parts) > 1 and not parts[1].startswith("__") else None


def forbidden_edges(source: str, module: str) -> list[str]:
    room = room_of(module)
    return [
        f"{module} imports {imported}"
        for imported in imported_modules(source, module)
        if (other := room_of(imported)) is not None
        and (room is None or LEVEL_OF.get(other, len(LEVELS)) > LEVEL_OF.get(room, -1))
    ]


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield (module name as installed, file) of everything that ends up in the wheel."""
    for folder, name in (("nnunet_kd", "nnunet_kd"), *((mapped, f"nnunet_kd.{mapped}") for mapped in MAPPED)):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            yield ".".join([name, *path.relative_to(CHECKOUT / folder).with_suffix("").parts]), path


@pytest.mark.parametrize(
    ("source", "module", "forbidden"),
    [
        ("from nnunet_kd.losses import logits", "nnunet_kd.teachers.ema", False),
        ("import nnunet_kd.teachers.ema", "nnunet_kd.losses.logits", True),
        ("def late():\n    from nnunet_kd import training", "nnunet_kd.data.joint", True),
        ("from ..training import student", "nnunet_kd.teachers.ema", True),
        ("from . import taps", "nnunet_kd.networks.joint", False),
        ("from nnunet_kd.planners import joint", "nnunet_kd.cli.demo", True),
        ("from nnunet_kd import __version__", "nnunet_kd.settings", False),
        ("import nnunet_kd.settings", "nnunet_kd.__init__", True),
    ],
)
def test_the_check_itself_tells_edges_apart(source: str, module: str, forbidden: bool) -> None:
    assert bool(forbidden_edges(source, module)) == forbidden


def test_every_module_belongs_to_a_known_room() -> None:
    assert {room_of(module) for module, _ in source_files()} <= {None, *LEVEL_OF}


def test_rooms_import_only_what_stands_before_them() -> None:
    edges = [edge for module, path in source_files() for edge in forbidden_edges(path.read_text(), module)]
    assert edges == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in source_files():
        room = room_of(module)
        others = {room_of(imported) for imported in imported_modules(path.read_text(), module)} - {None, room}
        if room is not None:
            graph.setdefault(room, set()).update(other for other in others if other is not None)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_in_the_package_imports_the_mapped_folders() -> None:
    """Also not by their top-level names, under which a checkout offers a second copy of each."""
    edges = [
        f"{module} imports {imported}"
        for module, path in source_files()
        for imported in imported_modules(path.read_text(), module)
        if imported.split(".")[0] in MAPPED or (room_of(imported) in MAPPED and room_of(module) != room_of(imported))
    ]
    assert edges == []


def test_losses_networks_spaces_and_metrics_do_not_need_nnunet() -> None:
    edges = [
        f"{module} imports {imported}"
        for module, path in source_files()
        for imported in imported_modules(path.read_text(), module)
        if imported.split(".")[0] == "nnunetv2"
        and (room_of(module) in WITHOUT_NNUNET or module.startswith("nnunet_kd.evaluation.metrics"))
    ]
    assert edges == []


def test_trainers_folder_contains_no_class_statement() -> None:
    """A class defined there could not be pickled: nnU-Net imports its file under another name and drops it again."""
    classes = [
        f"{path.name}:{node.lineno} class {node.name}"
        for path in sorted((CHECKOUT / "trainers").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert classes == []
