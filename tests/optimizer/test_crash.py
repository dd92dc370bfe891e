"""SIGKILL anywhere leaves nothing or a whole artifact, and the next run ends with the same id;
many stagers at once stage once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimizer.pipeline import optimize
from tests.optimizer.sources.test_adapters import make_adapter
from tests.optimizer.sources.web_server import WebServer
from tests.tiny import make_checkpoint

STAGES = ["fetch", "convert", "fuse", "quantize", "pack", "verify", "tune", "seal", "publish"]


def _run(*arguments: object) -> list[Any]:
    command = [sys.executable, "-m", "tests.optimizer.forked_stagers", *map(str, arguments)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A recipe in bfloat16: every stage has work, packing too."""
    folder = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"source: {folder}\ndtype: bfloat16\n")
    return recipe


def _check_crashes(source: Path, tmp_path: Path, first: int, step: int, expected: str = "") -> None:
    expected = expected or optimize(source, tmp_path / "whole").name
    cases = _run("crash", source, tmp_path, first, step)
    assert len(cases) > 10
    assert [case["first"] for case in cases[:-1]] == [{"killed": True}] * (len(cases) - 1)
    for case in cases:
        assert case["broken"] == [], case
        assert case["last"]["artifact"] == expected, case
        assert case["left"] == 0, case
    # After the rename the sealed folder is gone, so sealing may be repeated; nothing else is.
    redone = [len(set(case["last"]["stages"]) - {"seal", "publish"}) for case in cases[:-1]]
    assert redone == sorted(redone, reverse=True), "a later death leaves no less done"


def test_killed_anywhere_then_resumed(tmp_path: Path, source: Path) -> None:
    _check_crashes(source, tmp_path, first=1, step=15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["web", "local"])
def test_killed_while_it_is_fetched_and_merged(tmp_path: Path, source: Path, kind: str) -> None:
    """A model and an adapter behind URLs, in chunks: as from a folder, wherever it was killed."""
    make_adapter(tmp_path / "lora")
    with WebServer(tmp_path / "tiny") as model, WebServer(tmp_path / "lora") as adapter:
        urls = [f"{model.url}/tiny", f"{adapter.url}/lora"]
        if kind == "local":
            urls = [f"local://{tmp_path}/{name}" for name in ("tiny", "lora")]
        source.write_text(
            f"source: {urls[0]}\ndtype: bfloat16\nverify: none\nadapters: [{urls[1]}]\n"
        )
        direct = tmp_path / "direct" / source.name
        direct.parent.mkdir()
        direct.write_text(
            f"source: {tmp_path}/tiny\ndtype: bfloat16\nverify: none\nadapters: [{tmp_path}/lora]\n"
        )
        expected = optimize(direct, tmp_path / "stores").name
        _check_crashes(source, tmp_path, first=2, step=7, expected=expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ["", "quantization: {layers: int4-group32, head: int8, method: gptq}\nverify: none\n"]
)
def test_killed_everywhere_then_resumed(tmp_path: Path, source: Path, more: str) -> None:
    source.write_text(source.read_text() + more)
    _check_crashes(source, tmp_path, first=1, step=4 if more else 1)


def _check_shared(source: Path, tmp_path: Path, seeds: range) -> None:
    expected = optimize(source, tmp_path / "whole").name
    for case in _run("shared", source, tmp_path / "shared", *seeds):
        killed = [result for result in case["results"] if result == {"killed": True}]
        ended = [result for result in case["results"] if "artifact" in result]
        assert len(killed) + len(ended) == 8, case
        assert len(ended) >= 4, case
        assert {result["artifact"] for result in ended + case["last"]} == {expected}, case
        assert [result["stages"] for result in case["last"]] == [[], []], case
        for seen in case["seen"]:
            assert seen == {"artifacts": [expected], "broken": []}, case


def test_two_nodes_at_once_with_some_killed(tmp_path: Path, source: Path) -> None:
    _check_shared(source, tmp_path, range(1))


@pytest.mark.slow
def test_two_nodes_at_once_with_some_killed_often(tmp_path: Path, source: Path) -> None:
    _check_shared(source, tmp_path, range(1, 20))


def test_stagers_at_once_stage_once(tmp_path: Path, source: Path) -> None:
    for results in _run("race", source, tmp_path / "store", 2, 8):
        assert len({result["artifact"] for result in results}) == 1
        assert sorted(result["stages"] for result in results) == [[]] * (len(results) - 1) + [
            STAGES
        ]
