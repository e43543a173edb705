"""The house: which room may import which, how long a file may be, and how many stand side by side (docs/structure.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450
MAX_UTIL_FILES = 25
# What each room may import, beside its own: arrows run down only.
BELOW = {
    "scripts": {"scripts", "run", "gaze", "downstream", "engine", "models", "datasets", "util"},
    "run": {"gaze", "downstream", "engine", "models", "datasets", "util"},
    "gaze": {"gaze", "datasets", "util"},
    "downstream": {"downstream", "datasets", "util"},
    "engine": {"engine", "models", "datasets", "util"},
    "models": {"models", "util"},
    "datasets": {"datasets", "util"},
    "util": {"util"},
}
ROOMS = {"datasets", "util", "scripts", "gaze", "downstream"}


def room(module: str) -> str | None:
    """The room of a module's dotted name; None for a library."""
    top = module.partition(".")[0]
    for prefix in ("run", "engine", "models"):
        if top.startswith(f"{prefix}_") and (ROOT / f"{top}.py").exists():
            return prefix
    return top if top in ROOMS else None


def upward_imports(path: Path, module: str) -> list[str]:
    """Imports of a file that its room may not make."""
    own = room(module)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level:
                found.append(f"line {node.lineno}: a relative import; name the room")
        else:
            continue
        for name in names:
            if (other := room(name)) is not None and other not in BELOW[own]:
                found.append(f"line {node.lineno}: {name}")
    return found


FILES = [*ROOT.glob("*.py"), *(path for top in BELOW for path in (ROOT / top).rglob("*.py"))]
SOURCES = [
    name
    for name in (str(path.relative_to(ROOT)) for path in FILES)
    if room(name.removesuffix(".py").replace("/", ".")) is not None
]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_down_only(name):
    assert upward_imports(ROOT / name, name.removesuffix(".py").replace("/", ".")) == []


@pytest.mark.parametrize("name", SOURCES)
def test_files_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_util_is_small():
    """Ground only: what only one room uses stands in that room."""
    assert len(list((ROOT / "util").glob("*.py"))) <= MAX_UTIL_FILES
