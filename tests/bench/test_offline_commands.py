"""`torchweave generate` and `bench throughput` on a tiny artifact, in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny_artifact, model_options
from torchweave_ray.cli.app import build_app
from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("models") / "tiny")


def _run(artifact: Path, *args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(build_app(), [*args, *model_options(artifact)], input=stdin)


def test_generate_streams_what_llm_generates(artifact: Path) -> None:
    result = _run(artifact, "generate", "Gravity is", "--raw", "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    llm = LLM(artifact, max_model_len=256, cache={"kv_memory": 4194304}, runner={"threads": 1})
    with llm:
        (expected,) = llm.generate("Gravity is", SamplingParams(temperature=0.0, max_tokens=8))
    assert result.stdout == expected.text + "\n"
    assert f"{len(expected.token_ids)} tokens" in result.stderr


def test_a_prompt_from_stdin_goes_through_the_chat_template(artifact: Path) -> None:
    args = ("--max-tokens", "4", "--system", "Be brief.")
    typed = _run(artifact, "generate", "What is a star?", *args)
    piped = _run(artifact, "generate", "-", *args, stdin="What is a star?")
    raw = _run(artifact, "generate", "What is a star?", "--max-tokens", "4", "--raw")
    assert typed.exit_code == piped.exit_code == raw.exit_code == 0
    assert typed.stdout == piped.stdout
    assert typed.stderr.split()[0] == piped.stderr.split()[0] != raw.stderr.split()[0]


def test_generate_says_all_of_it_as_json(artifact: Path) -> None:
    args = ("generate", "Gravity is", "--raw", "--max-tokens", "8")
    plain, whole = _run(artifact, *args), _run(artifact, *args, "--json")
    assert whole.exit_code == 0, whole.output
    found = json.loads(whole.stdout)
    assert found["text"] + "\n" == plain.stdout
    assert found["finish_reason"] in ("length", "stop")
    assert found["usage"]["completion_tokens"] <= 8
    assert found["timings"]["total_s"] > 0


def test_bad_sampling_is_refused_before_a_model_loads(artifact: Path) -> None:
    result = _run(artifact, "generate", "hi", "--top-p", "0")
    assert result.exit_code == 1
    assert "top_p" in str(result.exception)


def test_an_unknown_engine_key_is_named(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text("max_model_length: 5")
    args = ["generate", "hi", "--model", str(artifact), "--engine", str(tmp_path / "engine.yaml")]
    result = CliRunner().invoke(build_app(), args)
    assert result.exit_code == 1
    assert "max_model_len" in str(result.exception)


def test_throughput_counts_every_token(artifact: Path, tmp_path: Path) -> None:
    work = ("--concurrency", "1,3", "--requests", "4", "--input-len", "6", "--output-len", "5")
    result = _run(artifact, "bench", "throughput", *work, "--save", "--results", str(tmp_path))
    assert result.exit_code == 0, result.output
    points = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(p["concurrency"], p["output_tokens"], p["failed"]) for p in points] == [
        (1, 20, 0),
        (3, 20, 0),
    ]
    (saved,) = tmp_path.glob("throughput-*.json")
    assert json.loads(saved.read_text())["config"]["executor"]
