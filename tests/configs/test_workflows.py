"""GitHub's workflows: valid by GitHub's own schema, and what they call is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from torchweave_ray.cli.app import build_app

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def _steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def _scripts(path: Path) -> list[str]:
    return [step["run"].replace("\\\n", " ") for step in _steps(path) if "run" in step]


def test_they_are_valid() -> None:
    assert {path.name for path in WORKFLOWS} >= {"ci.yml", "benchmark.yml"}
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_they_run_exists(path: Path) -> None:
    for script in _scripts(path):
        parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr
        for target in re.findall(r"^make ([a-z-]+)", script, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for file in re.findall(r"^(\.ci/\w+)", script, re.MULTILINE):
            assert (ROOT / file).exists()


def test_the_benchmarks_commands_and_options_exist() -> None:
    lines = [
        line for s in _scripts(ROOT / ".github/workflows/benchmark.yml") for line in s.split("\n")
    ]
    calls = [line.split("torchweave ", 1)[1] for line in lines if ".venv/bin/torchweave" in line]
    calls += [
        "bench serving " + line.strip() for line in lines if line.strip().startswith("measure --")
    ]
    assert len(calls) == 6
    for call in calls:
        command: Any = get_command(build_app())
        words = call.split()
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", call)) <= known, call


def test_what_is_compared_is_what_is_uploaded() -> None:
    """upload-artifact keeps paths from the least folder that all of `path` share: the checkout."""
    steps = _steps(ROOT / ".github/workflows/benchmark.yml")
    (upload,) = (s for s in steps if s.get("uses", "").startswith("actions/upload-artifact"))
    assert upload["with"]["path"].split() == ["results", "server.log"]
    download, compare = (
        s["run"] for s in steps if s.get("name", "").startswith(("Fetch", "Compare"))
    )
    assert f"--name {upload['with']['name']} --dir previous" in download
    assert "previous/results/$kind.json results/$kind.json" in compare
