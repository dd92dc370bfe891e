"""The application in `_local_testing_mode`: no cluster, replicas and ingress in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import ray
from ray import serve

from deployments.access.accounts import accounts_of
from deployments.app import build
from deployments.args import AppArgs
from tests.tiny import make_tiny_artifact
from torchweave_ray.api.access.key_file import ApiKey, digest_of, write_keys
from torchweave_ray.errors import ModelNotFound, RateLimited


def test_it_answers_without_a_cluster(tmp_path: Path) -> None:
    model = {"id": "tiny", "artifact": str(make_tiny_artifact(tmp_path / "tiny")), "threads": 1}
    model["engine"] = {"cache": {"kv_memory": 1 << 20}}
    texts = []
    for bus in (True, False):
        args = AppArgs.model_validate({"models": [model], "ingress": {"bus": bus}})
        handle = serve.run(build(args), name=f"local-{bus}", _local_testing_mode=True)
        outputs = handle.options(stream=True).generate.remote(
            "the quick brown fox", max_tokens=12, seed=1, ignore_eos=True, n=2
        )
        text = ["", ""]
        for output in outputs:
            for delta in output.deltas:
                text[delta.index] += delta.text
        assert output.usage.completion_tokens == 24
        texts.append(text)
    assert texts[0] == texts[1]
    assert not ray.is_initialized()


def test_several_models_and_unary_calls(tmp_path: Path) -> None:
    """Options of scaling and placement are without effect: there is one replica each, here."""
    engine = {"cache": {"kv_memory": 1 << 20}}
    models = [
        {"id": name, "artifact": str(make_tiny_artifact(tmp_path / name, seed=seed)), "threads": 1}
        | {"engine": engine, **own}
        for name, seed, own in (
            ("a", 1, {"autoscaling": {"min_replicas": 0, "max_replicas": 3}}),
            ("b", 2, {"placement_group": {"bundles": [{"CPU": 1}]}}),
        )
    ]
    args = AppArgs.model_validate({"models": models, "api": {"default_model": "b"}})
    handle = serve.run(build(args), name="local-two", _local_testing_mode=True)
    asked = {"max_tokens": 12, "seed": 1, "ignore_eos": True}
    texts = {}
    for name in ("a", "b", None):
        output = handle.complete.remote("the quick brown fox", model=name, **asked).result()
        assert output.usage.completion_tokens == 12
        texts[name] = output.deltas[0].text
    assert texts[None] == texts["b"] != texts["a"]
    with pytest.raises(ModelNotFound, match="there is a, b"):
        handle.complete.remote("x", model="c").result()
    assert not ray.is_initialized()


def test_ingresses_share_a_ledger_through_their_handles(tmp_path: Path) -> None:
    """The application with keys and two ingresses has one, and accounts understand its answers."""
    path = tmp_path / "keys.yaml"
    key = ApiKey(id="k", sha256=digest_of("k"), tenant="us", requests_per_minute=3)
    write_keys(path, [key])
    model = {"id": "tiny", "artifact": str(make_tiny_artifact(tmp_path / "tiny")), "threads": 1}
    model["engine"] = {"cache": {"kv_memory": 1 << 20}}
    args = {"models": [model], "ingress": {"num_replicas": 2}, "api": {"keys_file": str(path)}}
    application = build(AppArgs.model_validate(args))
    *_, ledger = application._bound_deployment.init_args
    assert ledger is not None
    handle = serve.run(application, name="local-keys", _local_testing_mode=True)
    assert handle.complete.remote("the quick", max_tokens=2).result().usage.completion_tokens == 2
    handle = serve.run(ledger, name="local-ledger", _local_testing_mode=True)

    async def scene() -> int:
        ingresses = [accounts_of(handle, 2) for _ in range(2)]
        num = 0
        for ingress in ingresses * 3:
            try:
                await ingress.enter(key, True)
            except RateLimited:
                continue
            num += 1
        assert all(ingress._down_until < 0 for ingress in ingresses), "it was asked, and answered"
        return num

    assert asyncio.run(scene()) == 3
    assert not ray.is_initialized()
