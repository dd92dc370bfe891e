"""locks/: what the image installs, by hash, is what constraints.txt has tested, and is whole."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {path.stem: path.read_text() for path in (ROOT / "locks").glob("*.txt")}
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
CONSTRAINTS = {canonicalize_name(name): version for name, version in PINNED.items()}


def locked(name: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+) \\$", LOCKS[name], re.M)
    return {canonicalize_name(package): version for package, version in found}


def test_there_are_three() -> None:
    assert LOCKS.keys() == {"requirements", "torch-cpu", "torch-cuda"}
    assert locked("torch-cpu") == {"torch": CONSTRAINTS["torch"] + "+cpu"}
    assert locked("torch-cuda")["torch"] == CONSTRAINTS["torch"]


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_a_version_with_its_hashes_and_nothing_else(name: str) -> None:
    """So no index, no host and no option that would let something else in."""
    header, *lines = LOCKS[name].splitlines()
    assert header.startswith("# By `make lock`")
    entry = r"[\w.\[\]-]+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+"
    text = "\n".join(lines) + "\n"
    assert re.fullmatch(f"({entry})+", text), "run `make lock`"


def test_versions_are_those_that_are_tested() -> None:
    """What constraints.txt does not name is only there with torch's CUDA build."""
    found = locked("requirements")
    assert {name: found[name] for name in found if found[name] != CONSTRAINTS.get(name)} == {}


def test_nothing_is_missing() -> None:
    """Of what our packages need, and what these need in turn, as far as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = locked("requirements").keys() | {"torch"}
    wanted = [Requirement(each) for each in project["dependencies"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        each = wanted.pop()
        name = canonicalize_name(each.name)
        if (name, frozenset(each.extras)) in seen:
            continue
        seen.add((name, frozenset(each.extras)))
        assert name in found, f"{name} is needed and not locked: run `make lock`"
        if name == "torch":
            continue
        try:
            needs = [Requirement(line) for line in requires(each.name) or ()]
        except PackageNotFoundError:
            continue
        for need in needs:
            extras = {"", *each.extras}
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                wanted.append(need)


def test_the_image_takes_nothing_without_a_hash() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip (?:install|wheel) [^;\n]*", text)
    own = [line for line in installs if "/wheels" in line]
    assert len(installs) == len(own) + 2
    assert all("--no-deps" in line for line in installs)
    assert all("--require-hashes -r " in line for line in installs if line not in own)
    assert "--no-build-isolation" in own[0], "a build of its own would fetch what nobody locked"
