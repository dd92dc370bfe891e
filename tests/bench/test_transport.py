"""`bench transport`: the engine that echoes, and every route with it for real."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployments.bench.echo_app import EchoReplica
from deployments.replica import ModelReplica
from torchweave_ray.bench.load.targets import run_in_loop
from torchweave_ray.bench.transport.echo import ECHO_ENGINE, byte_tokenizer, load_echo
from torchweave_ray.bench.transport.measure import ROUTES, TransportConfig, measure
from torchweave_ray.build import build_engine
from torchweave_ray.cli.app import build_app
from torchweave_ray.engine.async_engine import AsyncEngine
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer import TOKENIZER_FILE, load_tokenizer

SHORT = TransportConfig(concurrency=(1, 4), step_ms=2.0, output_len=8)


def test_the_answer_is_the_prompt_also_when_it_is_resumed(tmp_path: Path) -> None:
    loaded = load_echo(0.0, tmp_path)
    prompt = tuple(byte_tokenizer().encode("Größe ").ids)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)

    async def text(request: GenerateRequest) -> str:
        engine = AsyncEngine(
            build_engine(loaded, ECHO_ENGINE, load_tokenizer(tmp_path)), loaded.info
        )
        engine.start()
        deltas = [d async for output in engine.generate(request) for d in output.deltas]
        engine.close()
        return "".join(delta.text for delta in deltas)

    whole = run_in_loop(text(GenerateRequest("a", "echo", prompt, sampling)))
    assert whole.startswith("Größe Größe Gr")
    part = (prompt * 3)[:9]
    request = GenerateRequest("b", "echo", prompt, sampling, output_token_ids=part, emitted_chars=7)
    assert run_in_loop(text(request)) == whole[7:]


def test_one_process_is_measured() -> None:
    lone, loaded = measure("process", SHORT)
    assert (lone.concurrency, loaded.concurrency) == (1, 4)
    for point in (lone, loaded):
        assert point.failed == 0
        assert point.cpu_ms_per_token > 0
        assert point.ttft_ms > SHORT.step_ms
        assert point.added_ttft_ms == pytest.approx(point.ttft_ms - SHORT.step_ms)
        assert 0 < point.texts_s <= point.tok_s
    assert set(lone.to_dict()) >= {"route", "cpu_ms_per_token", "added_ttft_ms", "texts_s"}


def test_a_replica_loads_the_echo_in_place_of_its_artifact() -> None:
    """A seam that moves fails here, not in a test of minutes."""
    replica: Any = EchoReplica.__new__(EchoReplica)
    replica._step_s = 0.0
    assert "_load" in vars(ModelReplica)
    loaded, tokenizer, files = asyncio.run(replica._load(None, ECHO_ENGINE, None))
    assert loaded.info.id == "echo"
    assert tokenizer.encode("ab") == byte_tokenizer().encode("ab").ids
    assert TOKENIZER_FILE in files


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("route", [name for name in ROUTES if name != "process"])
def test_every_route_is_measured(route: str, tmp_path: Path) -> None:
    options = ["--routes", route, "--concurrency", "2", "--step-ms", "2", "--output-len", "8"]
    command = ["bench", "transport", *options, "--save", "--results", str(tmp_path)]
    done = CliRunner().invoke(build_app(), command)
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("transport-*.json")
    (point,) = json.loads(file.read_text())["points"]
    assert point["route"] == route
    assert point["failed"] == 0
    assert point["cpu_ms_per_token"] > 0


def test_an_unknown_route_is_told() -> None:
    done = CliRunner().invoke(build_app(), ["bench", "transport", "--routes", "haproxi"])
    assert done.exit_code == 2
    assert "haproxy+bus" in done.output
