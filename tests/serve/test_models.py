"""Several models in one application: over HTTP, over handles, and where their replicas are put."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray import serve

from deployments.app import build
from deployments.args import AppArgs
from deployments.placement import Cluster, Placement, place
from tests.serve import cluster
from tests.serve.cluster import Client, config, deploy, wait_until
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import ConfigError, InvalidRequest, ModelNotFound

PROMPT = "the quick brown fox"
FIXED: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
NAMES = ("first", "org/second")
BUNDLES = [{"CPU": 1.0}, {"CPU": 0.5}]


def model(**values: Any) -> AppArgs:
    return AppArgs.model_validate({"models": [{"id": "m", "artifact": "/a", **values}]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"placement_group": {"bundle": []}}, "did you mean 'bundles'"),
        ({"placement_group": {"bundles": [{"CPU": 0}]}}, r"bundles\[0\] must name resources"),
        ({"placement_group": {"bundles": [{"CPU": 1}, {}]}}, r"bundles\[1\] must name resources"),
        ({"placement_group": {"bundles": [{"gpu": 1}]}}, "Ray's name is GPU"),
        ({"placement_group": {"bundles": [{"CPU": 1}]}, "num_cpus": 2}, "num_cpus = 2.0 does not"),
        ({"placement_group": {"bundles": [{"CPU": 1}]}, "num_gpus": 1}, "num_gpus = 1.0 does not"),
        ({"placement_group": {"bundles": [{"CPU": 1}]}, "device": "cuda"}, "has no GPU"),
        ({"placement_group": {"bundles": [{"CPU": 1}]}, "accelerator_type": "H100"}, "has no GPU"),
        ({"device": "cpu", "accelerator_type": "H100"}, "accelerator_type needs a GPU"),
        ({"device": "cpu", "num_gpus": 0.5}, "num_gpus needs a GPU"),
    ],
)
def test_places_that_cannot_be_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**values)


def test_a_default_that_is_not_served_is_named() -> None:
    with pytest.raises(ConfigError, match=r"default_model: no model 'n'; did you|known keys: m"):
        AppArgs.model_validate({"models": [{"id": "m"}], "api": {"default_model": "n"}})


CPU8 = Cluster(8, 1, 0)
GPU = {"CPU": 2.0, "GPU": 1.0}
KIND = {"accelerator_type:H100": 0.001}


@pytest.mark.parametrize(
    ("values", "placement"),
    [
        ({"num_gpus": 0.25, "device": "cuda"}, Placement(1, 0.25, 4)),
        ({"accelerator_type": "H100"}, Placement(1, 1, 1)),
        ({"placement_group": {"bundles": BUNDLES}}, Placement(1, 0, 1, tuple(BUNDLES))),
        ({"placement_group": {"bundles": [GPU]}}, Placement(2, 1, 1, (GPU,))),
        (
            {"placement_group": {"bundles": [GPU]}, "num_gpus": 0.5, "accelerator_type": "H100"},
            Placement(2, 0.5, 2, (GPU | KIND,)),
        ),
        (
            {"placement_group": {"bundles": [GPU]}, "device": "cpu", "num_replicas": 2},
            Placement(2, 0, 2, (GPU,)),
        ),
    ],
)
def test_placement(values: dict[str, Any], placement: Placement) -> None:
    assert place(model(**values), CPU8) == [placement]


def test_what_serve_is_asked_for() -> None:
    group = {"bundles": [GPU, GPU], "strategy": "STRICT_PACK"}
    app = build(model(placement_group=group, accelerator_type="H100", num_replicas=2))
    _, models, *_ = app._bound_deployment.init_args
    replica = models["m"]._bound_deployment
    options = replica.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"], options["accelerator_type"]) == (
        *(2, 1, "H100"),
    )
    assert replica._replica_config.placement_group_bundles == [GPU | KIND, GPU]
    assert replica._replica_config.placement_group_strategy == "STRICT_PACK"
    plain = build(model())._bound_deployment.init_args[1]["m"]._bound_deployment
    assert "accelerator_type" not in plain.ray_actor_options
    assert plain._replica_config.placement_group_bundles is None


@dataclass
class Two:
    client: Client
    port: int


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder, port = tmp_path_factory.mktemp("models"), cluster.free_port()
    common = {"threads": 1, "engine": {"cache": {"kv_memory": 2 << 20}}}
    models = [
        {
            "id": name,
            "artifact": str(make_tiny_artifact(folder / name.rsplit("/", 1)[-1], seed=seed)),
            **common,
            **own,
        }
        for name, seed, own in (
            ("first", 1, {"num_replicas": 2, "num_cpus": 0.5}),
            ("org/second", 2, {"placement_group": {"bundles": BUNDLES}}),
        )
    ]
    client = Client(port)
    with cluster.ray_cluster(num_cpus=5, port=port):
        deploy(config({"models": models}))
        wait_until(lambda: cluster.is_running("torchweave"))
        wait_until(lambda: len(client.get("/v1/models")[1].get("data", [])) == 2)
        yield Two(client, port)


@pytest.mark.ray
def test_the_request_chooses_over_http(two: Two) -> None:
    _, listed = two.client.get("/v1/models")
    assert [each["id"] for each in listed["data"]] == ["first", "org/second"]
    texts = {}
    for name in ("first", "org/second"):
        assert two.client.get(f"/v1/models/{name}")[1]["id"] == name
        assert two.client.get(f"/model?model={name}")[1]["model"] == name
        body = {"model": name, "prompt": PROMPT, **FIXED}
        status, answer, _ = two.client.post("/v1/completions", **body)
        assert (status, answer["model"]) == (200, name)
        texts[name] = answer["choices"][0]["text"]
        assert two.client.text(**body) == texts[name]
        status, embedded, _ = two.client.post("/v1/embeddings", model=name, input=PROMPT)
        assert (status, embedded["model"]) == (200, name)
        texts[f"{name} vector"] = str(embedded["data"][0]["embedding"])
    assert len(set(texts.values())) == 4
    _, answer, _ = two.client.post("/v1/completions", prompt=PROMPT, **FIXED)
    assert answer["choices"][0]["text"] == texts["first"]
    for path in ("/v1/completions", "/v1/embeddings", "/v1/chat/completions"):
        body = {"model": "third", "prompt": PROMPT, "input": PROMPT, "messages": []}
        status, answer, _ = two.client.post(path, **_only(path, body))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "there is first, org/second" in answer["error"]["message"]


@pytest.mark.ray
def test_a_model_sleeps_and_a_request_wakes_a_replica_of_it(two: Two) -> None:
    def text(model: str) -> str:
        return two.client.text(PROMPT, model=model, **FIXED)

    before = text("first")
    status, answer, _ = two.client.post("/sleep?model=first")
    assert (status, answer["models"]) == (200, {"first": {"replicas": 2, "sleeping": 2}})
    assert two.client.get("/health") == (200, {"status": "ok", "asleep": ["first"]})
    asleep = [two.client.get(f"/model?model={name}")[1]["asleep"] for name in NAMES]
    assert asleep == [True, False]
    series = re.findall(r"^torchweave_asleep{.*} (.*)$", two.client.get("/metrics")[1], re.M)
    assert sorted(series) == ["0.0", "1.0", "1.0"]
    with ThreadPoolExecutor(6) as pool:  # some arrive while the first one wakes it
        assert set(pool.map(text, ["first"] * 6)) == {before}
    assert two.client.get("/health") == (200, {"status": "ok"})
    assert two.client.post("/wake_up")[1]["models"] == {
        "first": {"replicas": 2, "sleeping": 0},
        "org/second": {"replicas": 1, "sleeping": 0},
    }
    replicas = serve.get_deployment_handle("ModelReplica:first", "torchweave")
    assert [stats.num_wakes for stats in replicas.broadcast("stats").results()] == [1, 1]


def _only(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "hi"}]
    field = {"/v1/completions": "prompt", "/v1/embeddings": "input"}.get(path, "messages")
    return {"model": body["model"], field: body[field]}


@pytest.mark.ray
def test_replicas_are_where_they_were_asked_for(two: Two) -> None:
    assert len(cluster.replica_pids("ModelReplica:first")) == 2
    groups = [group for group in list_groups() if group["state"] == "CREATED"]
    assert [sorted(group["bundles"].values(), key=str) for group in groups] == [
        sorted(BUNDLES, key=str)
    ]


def list_groups() -> list[dict[str, Any]]:
    return list(ray.util.placement_group_table().values())


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Caller:
    """Somebody's own deployment that asks ours."""

    def __init__(self) -> None:
        self._handle = serve.get_app_handle("torchweave")

    async def unary(self, model: str) -> str:
        output = await self._handle.complete.remote(PROMPT, model=model, **FIXED)
        text: str = output.deltas[0].text
        return text

    async def stream(self, model: str) -> str:
        outputs = self._handle.options(stream=True).generate.remote(PROMPT, model=model, **FIXED)
        return "".join([delta.text async for output in outputs for delta in output.deltas])


@pytest.mark.ray
def test_python_from_a_driver_and_from_a_deployment(two: Two) -> None:
    handle = serve.get_app_handle("torchweave")
    caller = serve.run(Caller.bind(), name="caller", route_prefix=None)
    for name in ("first", "org/second"):
        text = two.client.text(PROMPT, model=name, **FIXED)
        output = handle.complete.remote(PROMPT, model=name, **FIXED).result()
        assert output.deltas[0].text == text
        assert output.usage.completion_tokens == 12
        outputs = handle.options(stream=True).generate.remote(PROMPT, model=name, **FIXED)
        assert "".join(delta.text for out in outputs for delta in out.deltas) == text
        assert caller.unary.remote(name).result() == text
        assert caller.stream.remote(name).result() == text
    serve.delete("caller")
    many = handle.complete.remote(
        messages=[{"role": "user", "content": "hi"}], n=2, seed=3, max_tokens=5
    ).result()
    assert [delta.index for delta in many.deltas] == [0, 1]
    with pytest.raises(ModelNotFound, match="there is first, org/second"):
        handle.complete.remote(PROMPT, model="third").result()
    with pytest.raises(InvalidRequest, match="either a prompt or messages"):
        handle.complete.remote().result()


@pytest.mark.ray
def test_a_unary_call_that_is_cancelled_stops(two: Two) -> None:
    handle = serve.get_app_handle("torchweave")
    replicas = serve.get_deployment_handle("ModelReplica:first", "torchweave")
    before = sum(stats.num_generated_tokens for stats in replicas.broadcast("stats").results())
    response = handle.complete.remote(PROMPT, max_tokens=400, ignore_eos=True)

    def num_running() -> int:
        return sum(stats.num_running for stats in replicas.broadcast("stats").results())

    wait_until(lambda: num_running() == 1)
    response.cancel()
    wait_until(lambda: num_running() == 0, 5)
    each = replicas.broadcast("stats").results()
    assert sum(stats.num_generated_tokens for stats in each) - before < 400
