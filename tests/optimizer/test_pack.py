"""The packed layout: its bytes, in place use, every executor, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from tests.tiny import VARIANTS, make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.library import ISA_VARIABLE, KernelsUnavailable, load_library
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import MANIFEST, WEIGHTS, read_manifest, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.lowering import lower
from torchweave_ray.models.mapped_file import cache_in_huge_pages, map_file, tensors_in
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import LAYOUT, PACKED
from torchweave_ray.models.weights import load_weights, map_packed
from torchweave_ray.sampling_params import SamplingParams

CPU = torch.device("cpu")


def _has_kernels() -> bool:
    try:
        load_library()
    except KernelsUnavailable:
        return False
    return True


needs_kernels = pytest.mark.skipif(not _has_kernels(), reason="no native kernels here")


def _stage(tmp_path: Path, name: str = "plain", **recipe: Any) -> Path:
    source = make_checkpoint(tmp_path / name, **VARIANTS[name])
    given = {"dtype": "bfloat16", "verify": "none", **recipe}
    return optimize(Recipe(name, str(source), **given), tmp_path / "store")


def _config(artifact: Path) -> ModelConfig:
    return ModelConfig.read(artifact)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_kernels_use_every_weight_where_it_is_mapped(tmp_path: Path, name: str) -> None:
    artifact = _stage(tmp_path, name)
    manifest = verify_artifact(artifact, full=True)
    assert (manifest.layout, manifest.dtype) == (PACKED, "bfloat16")
    stored = map_packed(artifact, _config(artifact))
    tensors = [t.data if isinstance(t, PackedLinear) else t for t in stored.values()]
    start = min(t.data_ptr() for t in tensors)
    assert start % 4096 == 0
    assert (
        max(t.data_ptr() + t.nbytes for t in tensors) - start < (artifact / WEIGHTS).stat().st_size
    ), "tensors were copied out of the mapped file"
    packed = [t.data for t in stored.values() if isinstance(t, PackedLinear)]
    assert all(t.data_ptr() % 64 == 0 for t in packed)
    code = lower(build_spec(_config(artifact)), stored).code
    kept = {t.data_ptr() for t in code.kept if t.dtype == torch.bfloat16}
    table = stored["embed.weight"]
    rows = [] if isinstance(table, PackedLinear) else [table]
    assert kept == {t.data_ptr() for t in [*packed, *rows]}, "a weight was packed or copied at load"


@pytest.mark.parametrize("name", list(VARIANTS))
def test_unpacking_gives_what_was_fused(tmp_path: Path, name: str) -> None:
    artifact = _stage(tmp_path, name)
    direct = make_tiny_artifact(tmp_path / "direct", dtype=torch.bfloat16, **VARIANTS[name])
    expected = load_weights(direct, _config(direct), torch.bfloat16, CPU)
    actual = load_weights(artifact, _config(artifact), torch.bfloat16, CPU)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_mapping_is_the_file_and_its_own(tmp_path: Path) -> None:
    path = _stage(tmp_path) / WEIGHTS
    before = path.read_bytes()
    mapped = tensors_in(map_file(path), str(path))
    with safe_open(path, framework="pt") as file:
        assert mapped.keys() == set(file.keys())
        assert all(torch.equal(mapped[name], file.get_tensor(name)) for name in mapped)
    mapped["norm.weight"].zero_()
    cache_in_huge_pages(path)
    assert path.read_bytes() == before
    assert tensors_in(map_file(path), str(path))["norm.weight"].count_nonzero() > 0


def test_what_is_left_row_major(tmp_path: Path) -> None:
    assert read_manifest(_stage(tmp_path, layout="fused")).layout == LAYOUT
    assert read_manifest(_stage(tmp_path, dtype="float32")).layout == LAYOUT


@needs_kernels
def test_answers_do_not_depend_on_the_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native from either layout, and torch from the packed one where there are no kernels."""
    packed, fused = _stage(tmp_path), _stage(tmp_path, layout="fused")
    prompts = [[5, 6, 7, 8], list(range(20, 50))]
    greedy = SamplingParams(temperature=0.0, max_tokens=6)

    def answers(artifact: Path, executor: str) -> list[Any]:
        with LLM(artifact, max_model_len=64) as llm:
            assert llm.info.executor.startswith(executor)
            return [done.token_ids for done in llm.generate(prompts, greedy)]

    expected = answers(fused, "native")
    assert answers(packed, "native") == expected
    monkeypatch.setenv(ISA_VARIABLE, "none")
    with caplog.at_level(logging.INFO, logger="torchweave_ray.models.weights"):
        assert len(answers(packed, "torch")) == len(prompts)
    assert len(re.findall(r"unpacked \d+ tensors", caplog.text)) == 1


def test_a_damaged_or_foreign_packed_file_is_refused(tmp_path: Path) -> None:
    artifact = _stage(tmp_path)
    manifest = read_manifest(artifact)
    foreign = replace(manifest, layout="bf16-panels-48")
    with pytest.raises(ArtifactError, match=r"layout 'bf16-panels-48'.*stage the model again"):
        map_packed(artifact, _config(artifact), foreign)
    mistaken = replace(manifest, layout=LAYOUT)
    with pytest.raises(ArtifactError, match=r"qkv_proj.weight has shape \[4, 32, 32, 2\]"):
        map_packed(artifact, _config(artifact), mistaken)
    (artifact / MANIFEST).write_text(foreign.to_json())
    with pytest.raises(ArtifactError, match="layout 'bf16-panels-48'"):
        LLM(artifact, max_model_len=64)
    (artifact / MANIFEST).write_text(manifest.to_json())
    data = bytearray((artifact / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors was altered"):
        LLM(artifact, max_model_len=64)


def test_the_id_is_that_of_any_other_run(tmp_path: Path) -> None:
    """Reports differ from run to run; packing does not."""
    first = _stage(tmp_path / "a")
    second = _stage(tmp_path / "b", verify="auto")
    assert first.name == second.name
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert (first / "report.json").read_text() != (second / "report.json").read_text()
    report = json.loads((first / "report.json").read_text())
    assert report["quality"] is None
    with safe_open(first / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
