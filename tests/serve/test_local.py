"""The application in `_local_testing_mode`: no cluster, replicas and ingress in this process."""

from __future__ import annotations

from pathlib import Path

import ray
from ray import serve

from deployments.app import build
from deployments.args import AppArgs
from tests.tiny import make_tiny_artifact


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
