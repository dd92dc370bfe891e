"""The documentation is true: its blocks run, and what it names exists.

A fence may carry a word after its language: `server` needs a running server, `weights` the real
model, `install` and `server-start` set up or start something and are only parsed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

from tests.smollm2 import staged_smollm2
from torchweave_ray.bench.server_process import started_server

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CORE = {"ray", "torch", "transformers", "starlette", "pydantic", "pytest", "requests"}
WITH_RAY_SERVE = {"uvloop", "uvicorn", "opentelemetry"}
"""Imported where they are installed; ray[serve] brings them."""
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TOP = {"torchweave_ray", "deployments", "optimizer", "tests", "docs", "benchmarks", "configs"}
_TOP |= {"scripts", ".ci", ".github"}
_PATH = re.compile(r"(?<![\w./-])((?:[\w.-]+/)+[\w.*-]*|[\w-]+\.(?:py|md|yaml|toml|txt))(?![\w/])")
_LINK = re.compile(r"\]\(([^)#:]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    line: int
    language: str
    tag: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page, line, match[1], match[2].strip(), match[3])


BLOCKS = list(_blocks())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_parse(block: Block) -> None:
    assert block.tag in ("", "server", "server-start", "weights", "install"), block.tag
    if block.language == "python":
        ast.parse(block.code)
    elif block.language == "bash":
        ran = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    else:
        assert block.language == "yaml"
        _check_yaml(yaml.safe_load(block.code), block.page)


def _check_yaml(values: Any, page: Path) -> None:
    """An application's configuration, or a recipe."""
    if "applications" in values:
        from deployments.args import AppArgs

        AppArgs.model_validate(values["applications"][0]["args"])
        return
    from optimizer.recipe import recipe_from_mapping

    recipe_from_mapping(values, page)


def run_block(block: Block, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a reader would: in the checkout, with this environment's commands first on the path."""
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-ec"]
    return subprocess.run(
        [*command, code],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.weights
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.tag == "weights"], ids=str)
def test_blocks_that_need_weights_run(block: Block) -> None:
    ran = run_block(block, block.code, ARTIFACT_DIR=str(staged_smollm2().parent))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.weights
def test_blocks_that_need_a_server_run() -> None:
    """All of them against one `torchweave serve` on a port of its own."""
    store = f"ARTIFACT_DIR={staged_smollm2().parent}"
    program = ["env", f"--chdir={ROOT}", store, str(BIN / "torchweave"), "serve"]
    with started_server(["--no-dashboard"], program=program) as server:
        for block in BLOCKS:
            if block.tag != "server":
                continue
            code = block.code.replace("http://127.0.0.1:8000", server.url)
            with_url = rf"\g<0> --url {server.url}"
            code = re.sub(r"^torchweave bench serving(?!.*--url)", with_url, code)
            ran = run_block(block, code)
            assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr}"
            assert ran.stdout.strip(), block
            assert '"error"' not in ran.stdout, f"{block}\n{ran.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_named_exists(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    missing = []
    for code in re.findall(r"`([^`\n]+)`", text):
        for match in _PATH.finditer(code):
            name = match[1]
            if name.split("/")[0] in _TOP and not _exists(ROOT, name):
                missing.append(name)
    missing += [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing, missing


def _exists(root: Path, name: str) -> bool:
    return any(root.glob(name.rstrip("/"))) if "*" in name else (root / name).exists()


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`|^((?:[A-Z_]+=\S+ )?make .*)$", page.read_text(), re.M):
            named |= set(re.findall(r"(?:^|&& |=\S+ )make ([a-z-]+)", "".join(code)))
    assert named >= {"serve", "test", "check", "setup"}
    assert not named - targets


def test_every_command_named_exists() -> None:
    from typer.main import get_command

    from torchweave_ray.cli.app import build_app

    root = get_command(build_app())
    for page in PAGES:
        for words in re.findall(r"\btorchweave ((?:[a-z]+ ?)+)", page.read_text()):
            command = root
            for word in words.split():
                known = getattr(command, "commands", None)
                if known is None:
                    break
                assert word in known, f"{page.name}: torchweave {words}"
                command = known[word]


def test_options_named_in_blocks_exist() -> None:
    """Every --option of a `torchweave` line, asked of the command's own help."""
    for block in BLOCKS:
        joined = block.code.replace("\\\n", " ")
        for line in re.findall(
            r"^(?:torchweave|python scripts/bench.py) .*$", joined, re.MULTILINE
        ):
            line = line.replace("python scripts/bench.py", "torchweave bench serving")
            words = line.split()[1:]
            path = words[: 2 if words[0] in ("artifact", "bench", "keys") else 1]
            command = [sys.executable, "-m", "torchweave_ray.cli", *path, "--help"]
            known = subprocess.run(
                command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""}
            )
            for option in re.findall(r"(?<=\s)--[a-z-]+", line):
                assert option in known.stdout, f"{block}: {option}"


def test_endpoints_are_those_of_the_app() -> None:
    from tests.api.conftest import load_tokenizer
    from tests.fakes import FakeBackend
    from torchweave_ray.api.app import create_app

    routes = {
        re.sub(r"\w+(?::path)?}", "}", route.path)
        for route in create_app(FakeBackend(), load_tokenizer).routes
        if isinstance(route, Route)
    }
    page = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^\| (?:GET|POST|DELETE) \| `([^`]+)`", page, re.MULTILINE)
    assert {re.sub(r"\w+}", "}", path) for path in listed} == routes


def test_sampling_fields_are_those_of_the_schema() -> None:
    from torchweave_ray.api.native.schema import GenerateBody
    from torchweave_ray.api.openai.schema import ChatBody, CompletionBody
    from torchweave_ray.api.schema import SamplingFields

    page = (ROOT / "docs/api.md").read_text()
    sampling = page.split("## Sampling")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` ", sampling, re.MULTILINE) == list(SamplingFields.model_fields)
    named = set(re.findall(r"`(\w+)(?:\.\w+)?`", page))
    for schema in (GenerateBody, CompletionBody, ChatBody):
        assert not set(schema.model_fields) - named, schema


def test_environment_variables_are_those_of_the_table() -> None:
    from deployments.environment import VARIABLES

    names = [variable.name for variable in VARIABLES]
    page = (ROOT / "docs/operations.md").read_text()
    assert re.findall(r"^\| `([A-Z_]+)` ", page, re.MULTILINE) == names
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)) == set(names)


def test_dependencies_are_declared_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    core = {_distribution(text) for text in project["dependencies"]}
    everything = core | {_distribution(text) for texts in extras.values() for text in texts}
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## Dependencies")[1]
    explained = {
        name.strip()
        for row in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
        for name in row.split(",")
    }
    assert explained - {"package", "---"} == everything - CORE
    constraints = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for name in everything:
        assert re.search(rf"^{name.lower().replace('_', '-')}(\[.*\])?==", constraints, re.M), name
    of_extras = {_distribution(t) for name in extras if name != "dev" for t in extras[name]}
    assert _imported() <= core | of_extras | WITH_RAY_SERVE


def _distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def _imported() -> set[str]:
    """Distributions that our packages import, by the names they are declared under."""
    names = set()
    for package in ("torchweave_ray", "deployments", "optimizer"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names.add(node.module.split(".")[0])
    names -= {"torchweave_ray", "deployments", "optimizer"} | sys.stdlib_module_names
    renamed = {"prometheus_client": "prometheus-client"}
    renamed |= {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    return {renamed.get(name, name) for name in names}


def test_the_measured_table_quotes_a_results_file() -> None:
    """Each number of a row is in the file that the slot names, rounded as printed there."""
    text = (ROOT / "README.md").read_text()
    slot = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    files = re.findall(r"benchmarks/results/[\w.+-]+\.json", slot)
    rows = [row for row in slot.splitlines() if re.match(r"\|.*\d", row)]
    assert bool(rows) == bool(files)
    known: set[str] = set()
    for name in files:
        for value in _numbers(json.loads((ROOT / name).read_text())):
            known |= {f"{value:.0f}", f"{value:.1f}", f"{value:.2f}", f"{value / 1e3:.2f}"}
    for row in rows:
        for cell in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", row.replace(",", "")):
            assert cell in known, f"{cell} of {row!r} is in no results file"


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
