"""The gate: numbers of the staged model beside its source, and what misses a bar."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.measuring.model import MeasuredModel, make_inputs
from optimizer.measuring.quality import Quality, compare, text_windows, window_logits
from optimizer.pipeline import optimize
from optimizer.recipe import Bars, Recipe, load_recipe
from optimizer.stages import pack
from optimizer.stages.verify import missed_bars
from tests.parity.paged import PagedDecoder
from tests.tiny import make_tiny_artifact
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.models.tensors import FusedTensor

GOOD = Quality(1000, "native", 0.0002, 0.01, 0.99, 20.1, 20.0)


def _quality(artifact: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    return dict(report["quality"])


def test_numbers_of_the_report(tmp_path: Path, source: Path) -> None:
    exact = _quality(optimize(Recipe("t", str(source)), tmp_path / "a"))
    assert (exact["executor"], exact["top1"], exact["num_tokens"]) == ("torch", 1.0, 1020)
    assert exact["kl"] == pytest.approx(0.0, abs=1e-6)
    assert exact["perplexity"] == pytest.approx(exact["reference_perplexity"])
    rounded = _quality(optimize(Recipe("t", str(source), dtype="bfloat16"), tmp_path / "b"))
    assert 1e-6 < rounded["kl"] < rounded["bars"]["max_kl"]
    assert rounded["bars"] == dataclasses.asdict(Bars())
    again = _quality(optimize(Recipe("t", str(source), dtype="bfloat16"), tmp_path / "c"))
    assert again == rounded


def test_numbers_are_those_of_their_definitions(tmp_path: Path) -> None:
    artifacts = [make_tiny_artifact(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    decoders = [PagedDecoder(artifact) for artifact in artifacts]
    models = [MeasuredModel(d.executor, "torch", d.spec, torch.float32) for d in decoders]
    windows = [torch.tensor([5, 9, 200, 31]), torch.tensor([7, 7])]
    found = compare(*(window_logits(m, windows) for m in models), windows, "torch")
    rows: list[list[torch.Tensor]] = [[], []]
    for ids in windows:
        for model, kept in zip(models, rows, strict=True):
            inputs = make_inputs([(0, len(ids))], ids, 4, every_row=True)
            kept.append(model.executor.forward(inputs, model.cache(4))[:-1].double())
    p, q = (torch.cat(kept).softmax(dim=-1) for kept in rows)
    following = torch.cat([ids[1:] for ids in windows])[:, None]
    assert found.num_tokens == 4
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    for perplexity, shares in ((found.reference_perplexity, p), (found.perplexity, q)):
        expected = (-shares.gather(1, following).log().mean()).exp().item()
        assert perplexity == pytest.approx(expected, rel=1e-4)


def test_a_model_under_a_bar_is_not_published(tmp_path: Path, source: Path) -> None:
    recipe = Recipe("t", str(source), dtype="bfloat16", bars=Bars(max_kl=1e-7))
    for _ in range(2):  # nor by the run that goes on from there
        with pytest.raises(ArtifactError, match=r"t is not published.*KL divergence is 0\.000"):
            optimize(recipe, tmp_path / "store")
        assert not list((tmp_path / "store").glob("t*"))
    optimize(dataclasses.replace(recipe, verify="none"), tmp_path / "store")


def test_wrong_weights_are_caught(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = FusedTensor.pack

    def gates_not_interleaved(tensor: FusedTensor, weight: torch.Tensor) -> torch.Tensor:
        plain = "linear" if tensor.packing == "gated" else tensor.packing
        return packed(dataclasses.replace(tensor, packing=plain), weight)

    monkeypatch.setattr(pack.FusedTensor, "pack", gates_not_interleaved)
    with pytest.raises(ArtifactError, match=r"is not published.*top-1 agreement"):
        optimize(Recipe("t", str(source), dtype="bfloat16"), tmp_path / "store")


def test_speed_beside_the_source(tmp_path: Path, source: Path) -> None:
    """Torch on the plain weights and what is served, measured in turns; a bar names itself."""
    recipe = Recipe("t", str(source), dtype="bfloat16", bars=Bars(min_speedup=1e-6))
    report = json.loads((optimize(recipe, tmp_path / "a") / "report.json").read_text())
    speed = report["speed"]
    assert speed["source"]["executor"] == "torch"
    assert speed["staged"]["executor"] == report["quality"]["executor"]
    for said in (speed["source"], speed["staged"]):
        assert min(said["decode_1"], said["decode_16"], said["prompt"]) > 0
    ratio = speed["staged"]["decode_1"] / speed["source"]["decode_1"]
    assert speed["speedup"] == pytest.approx(ratio, rel=1e-2)
    too_fast = dataclasses.replace(recipe, bars=Bars(min_speedup=1e6))
    with pytest.raises(ArtifactError, match=r"its bar min_speedup 1000000\.0"):
        optimize(too_fast, tmp_path / "b")
    unknown = dataclasses.replace(too_fast, target="sm_90")
    with pytest.raises(ArtifactError, match=r"no speed was measured .*sm_90.*min_speedup"):
        optimize(unknown, tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"kl": 0.011}, ["the KL divergence is 0.01100, its bar max_kl 0.01"]),
        ({"kl": float("nan")}, ["the KL divergence is nan, its bar max_kl 0.01"]),
        ({"top1": 0.9}, ["top-1 agreement is 0.9000, its bar min_top1 0.93"]),
        ({"perplexity": 21.0}, ["perplexity is 21.000 instead of 20.000, 1.0500 times as much, "
                                "its bar max_perplexity_ratio 1.02"]),
    ],
)  # fmt: skip
def test_bars(changes: dict[str, float], says: list[str]) -> None:
    assert missed_bars(dataclasses.replace(GOOD, **changes), Bars()) == says


def test_bars_of_a_recipe(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"source: {source}\nbars: {{max_kl: 0.5}}\n")
    assert load_recipe(path).bars == Bars(max_kl=0.5)
    for text, says in (
        ("bars: {max_kll: 1}", "unknown key 'max_kll' in bars of recipe .*max_kl"),
        ("bars: {min_top1: high}", "recipe.bars.min_top1 must be a number, got 'high'"),
        ("bars: 3", "recipe.bars must be a mapping"),
        ("verify: maybe", "recipe.verify 'maybe' is not supported"),
        ("layout: rows", "recipe.layout 'rows' is not supported"),
    ):
        path.write_text(f"source: {source}\n{text}\n")
        with pytest.raises(ConfigError, match=says):
            load_recipe(path)


def test_windows_fit_the_model(source: Path) -> None:
    windows = text_windows(source / "tokenizer.json", 100)
    assert {len(window) for window in windows[:-1]} == {100}
    assert 1 < len(windows[-1]) <= 100
