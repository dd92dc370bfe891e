"""The application on a real Ray: both transports, refusals, disconnects, deaths, changes in place.

The tiny model has a vocabulary of bytes, so its text is noise; equal noise is what counts.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import ray
from ray import serve

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import InvalidRequest, ModelNotFound
from torchweave_ray.models.artifact import WEIGHTS
from torchweave_ray.outputs import GenerateRequest, RequestOutput
from torchweave_ray.sampling_params import SamplingParams

pytestmark = pytest.mark.ray

TINY = "ModelReplica:tiny"
PROMPT = "the quick brown fox"
DEFAULT_TOKENS = 7
LONG: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}


@dataclass
class Served:
    bus: Client
    handle: Client
    artifact: Path

    def args(self, **changes: Any) -> dict[str, Any]:
        scheduler = {"max_num_seqs": 8, "max_waiting_tokens": 600}
        options = {"num_replicas": 2, "scheduler": scheduler, **changes}
        return {"models": [tiny_model(self.artifact, **options)]}

    def config(self, **deployment: Any) -> Any:
        deployments = [{"name": TINY, **deployment}] if deployment else []
        return config(self.args(), deployments=deployments)

    def handle_config(self) -> Any:
        args = self.args(num_replicas=1) | {"ingress": {"bus": False}}
        return config(args, name="by-handle", route_prefix="/by-handle")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = cluster.free_port()
    artifact = make_tiny_artifact(
        tmp_path_factory.mktemp("artifact") / "tiny", max_position_embeddings=1024
    )
    served = Served(Client(port), Client(port, "/by-handle"), artifact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAX_NEW_TOKENS", str(DEFAULT_TOKENS))
        with cluster.ray_cluster(num_cpus=6, port=port):
            deploy(served.config(), served.handle_config())
            wait_until(lambda: cluster.is_running("torchweave"))
            wait_until(lambda: cluster.is_running("by-handle"))
            wait_until(lambda: served.bus.get("/health")[0] == 200)
            yield served


def stats(app: str = "torchweave") -> list[Any]:
    handle = serve.get_deployment_handle(TINY, app)
    each: list[Any] = handle.broadcast("stats").results(timeout_s=10)
    return each


def is_idle() -> bool:
    return all(
        s.num_running == s.num_waiting == 0 and s.num_blocks == s.num_free_blocks for s in stats()
    )


def test_both_transports_give_the_same_answers(served: Served) -> None:
    for body in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "n": 3}, {"seed": 3, "logprobs": 2}):
        answers = [
            client.post("/v1/completions", prompt=PROMPT, max_tokens=40, **body)
            for client in (served.bus, served.handle)
        ]
        (status, first, _), (_, second, _) = answers
        assert status == 200
        assert first["choices"] == second["choices"]
        assert first["usage"]["completion_tokens"] == second["usage"]["completion_tokens"]


def test_tokens_really_go_by_the_bus(served: Served) -> None:
    served.bus.text(PROMPT)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    (by_bus,) = logs.glob("*torchweave_Ingress*.log")
    (by_handle,) = logs.glob("*by-handle_Ingress*.log")
    assert "[Bus] replica tiny" in by_bus.read_text()
    assert "[Bus]" not in by_handle.read_text()
    assert "[Request] id=" in by_bus.read_text()
    entries = [json.loads(line) for line in by_bus.read_text().splitlines()]
    assert all({"asctime", "deployment", "replica", "message"} <= entry.keys() for entry in entries)
    assert all(e["request_id"] for e in entries if e["message"].startswith("[Request]"))


def test_the_environment_reaches_the_builder(served: Served) -> None:
    _, answer, _ = served.bus.post("/v1/completions", prompt=PROMPT, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == DEFAULT_TOKENS


def test_a_crowd_reads_what_one_reads_alone(served: Served) -> None:
    prompts = [f"{PROMPT} {i % 3}" for i in range(12)]
    alone = {prompt: served.bus.text(prompt, **LONG) for prompt in set(prompts)}
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(lambda prompt: served.bus.text(prompt, **LONG), prompts))
    assert texts == [alone[prompt] for prompt in prompts]


@pytest.mark.parametrize("transport", ["bus", "handle"])
def test_a_client_that_leaves_frees_its_blocks(served: Served, transport: str) -> None:
    app = "torchweave" if transport == "bus" else "by-handle"
    before = sum(s.num_finished for s in stats(app))
    stream = getattr(served, transport).stream(PROMPT, **LONG | {"n": 2})
    next(stream.pieces())
    stream.hang_up()
    wait_until(lambda: sum(s.num_finished for s in stats(app)) > before, 5)
    wait_until(is_idle, 5)
    assert sum(s.num_generated_tokens for s in stats(app)) > 0


def test_refusals_of_replicas_are_statuses(served: Served) -> None:
    """The engine's own refusal: too many prompt tokens are waiting."""
    body = {"max_tokens": 100, "ignore_eos": True}

    def ask(i: int) -> tuple[int, Any, dict[str, str]]:
        return served.bus.post("/v1/completions", prompt=f"{i:3}" + "x" * 200, **body)

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    statuses = {status for status, _, _ in answers}
    assert statuses == {200, 429}
    for status, answer, headers in answers:
        if status == 429:
            assert answer["error"]["type"] == "rate_limit_error"
            assert int(headers["retry-after"]) >= 1
    wait_until(is_idle, 10)


def test_bad_requests_name_the_field(served: Served) -> None:
    for body, status, param in (
        ({"prompt": "x" * 3000}, 400, "prompt"),
        ({"prompt": PROMPT, "model": "other"}, 404, "model"),
        ({"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
        ({"prompt": "x" * (10 << 20)}, 413, None),
    ):
        got, answer, _ = served.bus.post("/v1/completions", **body)
        assert (got, answer["error"]["param"]) == (status, param)


def test_nothing_that_was_said_is_in_a_log(served: Served) -> None:
    secret, path = "sesame 4711", "/v1/completions"
    bodies = ({"structured_outputs": {"regex": f"({secret}"}}, {"temperature": secret}, {"n": 2})
    assert [served.bus.post(path, prompt=secret, **b)[0] for b in bodies] == [400, 400, 200]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*.*")
    texts = [log.read_text(errors="replace") for log in logs if log.is_file()]
    assert any("[Request]" in text for text in texts)
    assert not any(secret in text for text in texts)


@pytest.mark.parametrize("given", ["", "mine-1"])
def test_an_answer_has_one_request_id(served: Served, given: str) -> None:
    """Serve says it as well: a second one would make one strange id in clients that join them."""
    headers = {"x-request-id": given} if given else {}
    for path in ("/v1/models", "/nowhere"):
        connection = http.client.HTTPConnection("127.0.0.1", served.bus.port, timeout=30)
        connection.request("GET", path, headers=headers)
        said = connection.getresponse().headers.get_all("x-request-id")
        connection.close()
        assert said == [given] if given else said is not None and len(said) == 1


def test_the_ingress_has_no_torch(served: Served) -> None:
    (pid,) = cluster.replica_pids("Ingress")
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_python_handles(served: Served) -> None:
    handle = serve.get_app_handle("torchweave").options(stream=True)
    outputs = list(handle.generate.remote(PROMPT, max_tokens=9, temperature=0, ignore_eos=True))
    text = "".join(delta.text for output in outputs for delta in output.deltas)
    assert text == served.bus.text(PROMPT, max_tokens=9, ignore_eos=True)
    assert outputs[-1].usage.completion_tokens == 9
    with pytest.raises(ModelNotFound):
        list(handle.generate.remote(PROMPT, model="other"))
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        list(handle.generate.remote(PROMPT, temperatur=0))


def test_a_deadline_passes_in_a_replica(served: Served) -> None:
    long: dict[str, Any] = LONG | {"max_tokens": 900, "n": 4, "deadline_ms": 200}
    status, answer, _ = served.bus.post("/v1/completions", prompt=PROMPT, **long)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    handle = serve.get_app_handle("torchweave").options(stream=True)
    outputs = list(handle.generate.remote(PROMPT, **long))
    deltas = [delta for output in outputs for delta in output.deltas]
    assert {delta.error for delta in deltas if delta.finish_reason} == {"the deadline passed"}
    assert outputs[-1].is_last
    with pytest.raises(InvalidRequest, match="deadline_ms"):
        list(handle.generate.remote(PROMPT, deadline_ms=0))
    wait_until(is_idle, 5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_streams_survive_the_loss_of_their_replica(served: Served, how: signal.Signals) -> None:
    expected = served.bus.text(PROMPT, **LONG)
    wait_until(lambda: len(cluster.replica_pids(TINY)) == 2)
    wait_until(lambda: cluster.is_running("torchweave"))
    victim, survivor = cluster.replica_pids(TINY)
    streams = [served.bus.stream(PROMPT, **LONG) for _ in range(6)]
    readers = [stream.pieces() for stream in streams]
    texts = [next(reader) for reader in readers]
    os.kill(victim, how)
    try:
        with ThreadPoolExecutor(len(readers)) as pool:
            rest = list(pool.map(lambda reader: "".join(reader), readers))
        assert [a + b for a, b in zip(texts, rest, strict=True)] == [expected] * 6
        assert all(stream.usage and stream.usage["completion_tokens"] == 300 for stream in streams)
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    assert served.bus.text(PROMPT, **LONG) == expected
    wait_until(lambda: len(set(cluster.replica_pids(TINY)) - {victim, survivor}) == 1)


def test_user_config_changes_in_place(served: Served) -> None:
    wait_until(lambda: len(cluster.replica_pids(TINY)) == 2)
    wait_until(lambda: cluster.is_running("torchweave"))
    before = sorted(cluster.replica_pids(TINY))
    stream = served.bus.stream(PROMPT, **LONG)
    pieces = stream.pieces()
    next(pieces)
    deploy(served.config(user_config={"max_num_seqs": 1}), served.handle_config())
    assert len("".join(pieces)) > 0
    assert stream.finish_reason == "length"
    wait_until(lambda: cluster.is_running("torchweave"))
    assert sorted(cluster.replica_pids(TINY)) == before
    streams = [served.bus.stream(PROMPT, **LONG) for _ in range(4)]
    assert max(s.num_running for s in stats()) == 1
    for each in streams:
        each.hang_up()
    deploy(served.config(user_config={"max_num_seq": 3}), served.handle_config())
    lines = wait_until(lambda: cluster.logged("torchweave", TINY, "limits stay as they were"))
    assert "'max_num_seqs'" in lines[0]["message"]
    assert sorted(cluster.replica_pids(TINY)) == before, "a typo must not end what runs well"
    streams = [served.bus.stream(PROMPT, **LONG) for _ in range(4)]
    assert max(s.num_running for s in stats()) == 1, "the old limits stay"
    for each in streams:
        each.hang_up()
    deploy(served.config(), served.handle_config())
    wait_until(lambda: cluster.is_running("torchweave"))


def test_a_tampered_artifact_is_named(served: Served, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(served.artifact, tmp_path / "bad"))
    raw = bytearray((artifact / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (artifact / WEIGHTS).write_bytes(raw)
    args = served.args(artifact=str(artifact), num_replicas=1, num_cpus=0.1)
    bad = config(args, name="bad", route_prefix="/bad")
    deploy(served.config(), served.handle_config(), bad)
    wait_until(lambda: f"{WEIGHTS} was altered" in cluster.deployment_message("bad", TINY))
    assert "/optimizer/" not in cluster.deployment_message("bad", TINY), "the way to it is no help"
    (line, *_) = wait_until(lambda: cluster.logged("bad", TINY, "[Start] failed"))
    assert line["levelname"] == "ERROR"
    assert f"{WEIGHTS} was altered" in line["message"]
    client = Client(served.bus.port, "/bad")
    answer = wait_until(lambda: _if_unavailable(client))
    assert f"{WEIGHTS} was altered" in answer["reason"]


def _if_unavailable(client: Client) -> Any:
    status, answer = client.get("/health")
    return answer if status == 503 and isinstance(answer, dict) else None


def test_official_clients(served: Served) -> None:
    """Every protocol against the real thing, once: what the fake backend cannot show."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.bus.port}/v1", api_key="none")
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
    four = client.chat.completions.create(**ask, n=4, seed=5, max_tokens=20)
    singles = [
        client.chat.completions.create(**ask, seed=5 + i, max_tokens=20).choices[0].message.content
        for i in range(4)
    ]
    assert [choice.message.content for choice in four.choices] == singles
    stream = client.chat.completions.create(
        **ask, seed=5, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == singles[0]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20

    scored = client.completions.create(
        model="tiny", prompt=PROMPT, echo=True, logprobs=1, max_tokens=3, n=2, temperature=0
    )
    one, two = (choice.logprobs for choice in scored.choices)
    assert one is not None
    assert two is not None
    assert (scored.choices[0].text, one.tokens) == (scored.choices[1].text, two.tokens)
    assert one.token_logprobs is not None
    assert two.token_logprobs is not None
    assert one.token_logprobs[0] is None
    assert one.token_logprobs[1:] == pytest.approx(two.token_logprobs[1:], abs=1e-3)
    assert all(value <= 0 for value in one.token_logprobs[1:] if value is not None)
    first, second = client.embeddings.create(model="tiny", input=[PROMPT, "x"]).data
    assert len(first.embedding) == 64
    assert first.embedding != second.embedding

    response = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=20)
    assert response.status in ("completed", "incomplete")
    claude = anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.bus.port}", api_key="none")
    with claude.messages.stream(**ask, max_tokens=20) as events:
        message = events.get_final_message()
    assert message.usage.output_tokens <= 20
    assert message.stop_reason in ("max_tokens", "end_turn")


def test_a_call_that_must_be_made_is_made(served: Served) -> None:
    """Random weights know nothing of tools: the grammar does."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.bus.port}/v1", api_key="none")
    parameters = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "lamp", "parameters": parameters}}
    for choice in ("required", {"type": "function", "function": {"name": "lamp"}}):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[tool],
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=False,
            max_tokens=400,
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert json.loads(call.function.arguments).keys() == {"on"}
        assert answer.choices[0].finish_reason == "tool_calls"


def test_a_request_is_stopped_over_http(served: Served) -> None:
    stream = served.bus.stream(PROMPT, **LONG)
    raw = next(line for line in stream.response if line.startswith(b"data: "))
    request_id = json.loads(raw.removeprefix(b"data: "))["id"]
    connection = http.client.HTTPConnection("127.0.0.1", served.bus.port, timeout=20)
    connection.request("DELETE", f"/v1/requests/{request_id}")
    assert connection.getresponse().status == 200
    connection.close()
    list(stream.pieces())
    assert stream.finish_reason == "abort"
    assert stream.usage is not None
    assert 0 < stream.usage["completion_tokens"] < 300
    wait_until(is_idle, 5)


def test_a_request_of_another_ingress_is_stopped_too(served: Served) -> None:
    """It came to its replica by a handle: the ingress that is told to stop it never saw it."""
    replicas = serve.get_deployment_handle(TINY, "torchweave")
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    sampling = SamplingParams(max_tokens=900, ignore_eos=True)
    request = GenerateRequest(answer_id, "tiny", (5, 6, 7), sampling, n=2)
    items = replicas.options(method_name="generate_stream", stream=True).remote(request)
    outputs = (item for item in items if isinstance(item, RequestOutput))  # no signs of life
    news = [next(outputs)]
    for path, status in ((f"cmpl-{uuid.uuid4().hex}", 404), (answer_id, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", served.bus.port, timeout=20)
        connection.request("DELETE", f"/v1/requests/{path}")
        assert connection.getresponse().status == status
        connection.close()
    news += outputs
    reasons = [d.finish_reason for output in news for d in output.deltas if d.finish_reason]
    assert reasons == ["abort", "abort"]
    assert news[-1].usage is not None
    assert 0 < news[-1].usage.completion_tokens < 1800
    wait_until(is_idle, 5)
