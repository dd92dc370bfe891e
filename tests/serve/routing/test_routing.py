"""Where requests go on a real Ray: turns of a conversation, sessions, refusals, both of them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from ray import serve

from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, tiny_model, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.outputs import Stats

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BLOCK = 16
LIMIT = 200


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of three replicas that run one request at a time each and let LIMIT tokens wait."""
    port = cluster.free_port()
    artifact = make_tiny_artifact(
        tmp_path_factory.mktemp("artifact") / "tiny", max_position_embeddings=8192
    )
    scheduler = {"max_num_seqs": 1, "max_waiting_tokens": LIMIT}
    model = tiny_model(artifact, num_replicas=3, kv_memory=8 << 20, scheduler=scheduler)
    client = Client(port)
    with cluster.ray_cluster(num_cpus=5, port=port):
        deploy(config({"models": [model]}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: client.get("/health")[0] == 200)
        yield client


def replicas() -> Callable[[], list[Stats]]:
    """Asks each replica, always in the same order."""
    handle = serve.get_deployment_handle("ModelReplica:tiny", "torchweave")

    def ask_all() -> list[Stats]:
        each: list[Stats] = handle.broadcast("stats").results(timeout_s=10)
        return each

    return ask_all


def ask(client: Client, session: str, **body: Any) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    try:
        connection.request(
            "POST", f"{client.prefix}/v1/completions", json.dumps(body), {"x-session-id": session}
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


def test_turns_of_a_conversation_find_their_prefix_and_conversations_spread(client: Client) -> None:
    texts = {i: f"conversation {i * 7919}: " + chr(ord("a") + i) * 60 for i in range(9)}
    lengths = dict.fromkeys(texts, 0)
    for turn in range(4):
        for i, text in texts.items():
            status, answer, _ = client.post("/v1/completions", prompt=text, max_tokens=4)
            assert status == 200
            usage = answer["usage"]
            hits = usage["prompt_tokens_details"]["cached_tokens"]
            assert hits >= lengths[i] // BLOCK * BLOCK, f"turn {turn} of {i} went elsewhere"
            lengths[i] = usage["prompt_tokens"]
            texts[i] = f"{text} and turn {turn}: " + chr(ord("k") + turn) * 40
    counts = [stats.num_finished for stats in replicas()()]
    assert sum(counts) == 36
    assert min(counts) >= 4, counts  # a conversation at least
    assert max(counts) <= 20, counts


def test_a_session_stays_on_one_replica(client: Client) -> None:
    """Whatever its prompts are, over HTTP and from Python."""
    ask_all = replicas()
    before = [stats.num_finished for stats in ask_all()]
    for i in range(4):
        prompt = f"{i} things that have nothing in common {i}"
        assert ask(client, "alice", prompt=prompt, max_tokens=2)[0] == 200
    handle = serve.get_app_handle("torchweave").options(stream=True)
    for i in range(4):
        list(handle.generate.remote(f"{i} more of them {i}", session_id="alice", max_tokens=2))
    after = [stats.num_finished for stats in ask_all()]
    gained = sorted(b - a for a, b in zip(before, after, strict=True))
    assert gained == [0, 0, 8]
    status, answer, _ = ask(client, "x" * 257, prompt="x", max_tokens=2)
    assert (status, answer["error"]["param"]) == (400, "x-session-id")


def test_where_one_has_no_room_the_other_answers_and_then_429(client: Client) -> None:
    """A session wants one replica, where its third request finds no room."""
    ask_all = replicas()
    waiter = list(range(5, 155))

    def waiting() -> list[int]:
        return [stats.num_waiting_tokens for stats in ask_all()]

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        waits = []
        for num_full in (1, 2, 3):
            stack.callback(_run_long(client, "bob").close)
            waits.append(pool.submit(ask, client, "bob", prompt=waiter, max_tokens=1))
            wait_until(lambda num=num_full: waiting().count(150) == num, 5)
            before = ask_all()
            # Too much beside 150 tokens, and dearer anywhere else than the two requests there.
            asker = [200 + num_full] * 180
            status, answer, headers = ask(client, "bob", prompt=asker, max_tokens=2)
            ended = [
                b.num_finished - a.num_finished for a, b in zip(before, ask_all(), strict=True)
            ]
            assert waiting().count(150) == num_full, "the long streams have ended"
            if num_full < 3:
                assert status == 200, answer
                assert sum(ended) == 1
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int({k.lower(): v for k, v in headers.items()}["retry-after"]) >= 1
        stack.close()
        assert [wait.result(20)[0] for wait in waits] == [200, 200, 200]


def _run_long(client: Client, session: str) -> http.client.HTTPResponse:
    """A stream that runs until it is closed."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    body = {"prompt": [7, 8, 9], "max_tokens": 8000, "ignore_eos": True, "stream": True}
    headers = {"x-session-id": session}
    connection.request("POST", f"{client.prefix}/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    return response
