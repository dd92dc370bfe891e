"""Readable is a test result: limits on files, functions, folders, pages and the ten-minute path."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("torchweave_ray", "deployments", "optimizer")
CODE = (*SOURCES, "tests", "scripts")
SUFFIXES = (".py", ".cpp", ".h")

MAX_FILE = 300
MAX_LONG_FILE = 400
MAX_FUNCTION = 50
MAX_FILES_IN_FOLDER = 16
MAX_DOCSTRING = 5
PAGES = {"README.md": 150, "docs/structures.md": 120}

TEN_MINUTE_PATH = (
    "torchweave_ray/engine/plan.py",
    "torchweave_ray/engine/sequence.py",
    "torchweave_ray/engine/scheduler.py",
    "torchweave_ray/engine/engine.py",
    "torchweave_ray/engine/async_engine.py",
    "torchweave_ray/api/app.py",
    "deployments/replica.py",
)
"""What docs/structures.md asks a newcomer to read, in its order."""
MAX_PATH_LINES = 1_400


def _files(folders: tuple[str, ...] = CODE) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _may_be_long(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return "kernels" in parts or parts[0] == "tests" or path.stem.startswith("schema")


def test_files_are_short() -> None:
    faults = []
    for path in _files():
        limit = MAX_LONG_FILE if _may_be_long(path) else MAX_FILE
        if (lines := _num_lines(path)) > limit:
            faults.append(f"{_name(path)} has {lines} lines, at most {limit}")
    assert not faults, "\n".join(faults)


def test_functions_are_short() -> None:
    faults = []
    for path in _files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    faults.append(f"{_name(path)}:{node.lineno} {node.name} has {lines} lines")
    assert not faults, "\n".join(faults)


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in _files())
    faults = [f"{_name(p)} has {n} files" for p, n in counts.items() if n > MAX_FILES_IN_FOLDER]
    assert not faults, "\n".join(faults)


def test_modules_say_what_they_own() -> None:
    """One to five lines before the first blank one; a table or a diagram may follow."""
    faults = []
    for path in _files():
        if path.suffix != ".py" or not path.read_text().strip():
            continue
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text is None:
            faults.append(f"{_name(path)} has no module docstring")
        elif len(text.split("\n\n")[0].splitlines()) > MAX_DOCSTRING:
            faults.append(f"{_name(path)}: the docstring's first paragraph is too long")
    assert not faults, "\n".join(faults)


def test_pages_are_short() -> None:
    faults = [
        f"{name} has {_num_lines(ROOT / name)} lines, at most {limit}"
        for name, limit in PAGES.items()
        if (ROOT / name).exists() and _num_lines(ROOT / name) > limit
    ]
    assert not faults, "\n".join(faults)


def test_one_request_can_be_followed_in_ten_minutes() -> None:
    lines = {name: _num_lines(ROOT / name) for name in TEN_MINUTE_PATH if (ROOT / name).exists()}
    assert sum(lines.values()) <= MAX_PATH_LINES, lines


def test_names_say_what_is_inside() -> None:
    """No utils, helpers, common; no *Mixin; no Manager but BlockManager."""
    faults = []
    for path in _files(SOURCES):
        if path.stem in ("utils", "helpers", "common") or path.parent.name in ("utils", "common"):
            faults.append(f"{_name(path)}: name it after what it holds")
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (
                node.name.endswith("Mixin")
                or (node.name.endswith("Manager") and node.name != "BlockManager")
            ):
                faults.append(f"{_name(path)}:{node.lineno} {node.name}")
    assert not faults, "\n".join(faults)
