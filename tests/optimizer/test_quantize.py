"""Quantised artifacts: which numbers they hold, where they lie, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer.checkpoints import open_checkpoint
from optimizer.pipeline import optimize
from optimizer.quantization import INT4, INT8, Quantization
from optimizer.recipe import Bars, Recipe
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import VARIANTS, make_checkpoint
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.kernels.library import ISA_VARIABLE
from torchweave_ray.kernels.packing import PackedLinear
from torchweave_ray.kernels.quantization import dequantize, quantize
from torchweave_ray.llm import LLM
from torchweave_ray.models.artifact import WEIGHTS, read_manifest, read_report, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import PACKED, QUANTIZED, fuse, fused_tensors
from torchweave_ray.models.weights import load_weights, map_packed
from torchweave_ray.sampling_params import SamplingParams

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"


def _stage(tmp_path: Path, source: Path, quantization: Quantization, **recipe: Any) -> Path:
    given = {"verify": "none", **recipe}
    return optimize(
        Recipe("t", str(source), quantization=quantization, **given), tmp_path / "store"
    )


def _config(artifact: Path) -> ModelConfig:
    return ModelConfig.read(artifact)


def _fused_source(source: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The source's own numbers in fp32, under the artifact's names."""
    checkpoint = open_checkpoint(source)
    return {
        tensor.name: fuse(tensor, [checkpoint.load(name).float() for name in tensor.sources])
        for tensor in fused_tensors(config)
    }


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_weights_are_the_rounded_source(
    tmp_path: Path, name: str, quantization: Quantization
) -> None:
    source = make_checkpoint(tmp_path / name, **VARIANTS[name])
    artifact = _stage(tmp_path, source, quantization)
    manifest = verify_artifact(artifact, full=True)
    expected = {"layers": quantization.layers, "head": quantization.head}
    assert (manifest.layout, manifest.dtype) == (QUANTIZED, "bfloat16")
    assert manifest.quantization == expected
    config = _config(artifact)
    found = load_weights(artifact, config, torch.float32, CPU)
    originals = _fused_source(source, config)
    report = read_report(artifact)["quantization"]
    for tensor in fused_tensors(config, manifest.quantization):
        original = originals[tensor.name]
        if tensor.format == "bf16":
            assert torch.equal(found[tensor.name], original.bfloat16().float())
            continue
        rounded = dequantize(quantize(original, tensor.format))
        assert torch.equal(found[tensor.name], rounded), tensor.name
        error = ((rounded - original).norm() / original.norm()).item()
        said = report[tensor.group]["relative_errors"][tensor.name]
        assert said == pytest.approx(error, rel=1e-3)
        assert 0 < said < (0.15 if tensor.format == "int4-group32" else 0.02)
    assert report["layers"]["num_rounded"] == 8
    assert report["layers"]["num_lossless"] == 0


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("Q4_1", INT4), ("Q4_0", INT4), ("Q8_0", Quantization("int8-group32", "int8-group32"))],
)
def test_codes_of_a_gguf_are_taken_as_they_are(
    tmp_path: Path, kind: str, quantization: Quantization
) -> None:
    """q and k too, whose rows lie in another order there."""
    source = make_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "tiny"), kind)
    artifact = _stage(tmp_path, source, quantization)
    config = _config(artifact)
    found = load_weights(artifact, config, torch.float32, CPU)
    originals = _fused_source(source, config)
    report = read_report(artifact)["quantization"]
    assert (report["layers"]["num_lossless"], report["layers"]["num_rounded"]) == (8, 0)
    assert report["layers"]["relative_errors"] == {}
    products = [t.name for t in fused_tensors(config) if t.group == "layers"]
    assert all(torch.equal(found[name], originals[name]) for name in products)
    number = gguf.GGMLQuantizationType[kind]
    down = load_file(tmp_path / "tiny" / "model.safetensors")[DOWN].numpy()
    wanted = gguf.dequantize(gguf.quantize(down, number), number).reshape(down.shape)
    assert np.array_equal(found["layers.1.down_proj.weight"].numpy(), wanted)
    head = report["head"]
    assert (head["num_lossless"], head["num_rounded"]) == ((1, 0) if kind == "Q8_0" else (0, 1))


def test_scales_without_a_half_precision_minimum_are_rounded_instead(tmp_path: Path) -> None:
    """w = (code - 8) * scale needs -8 * scale, which these scales have none of."""
    folder = make_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = tensors[DOWN] * 600_000
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, "Q4_0"))
    assert checkpoint.load(DOWN).isfinite().all()
    assert checkpoint.codes(DOWN) is None
    assert checkpoint.codes(DOWN.replace("layers.1", "layers.0")) is not None


def test_skipped_tensors_stay_as_they_are(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny")
    skipping = Quantization(layers="int8", skip=("layers.0.*", "*.o_proj.weight"))
    artifact = _stage(tmp_path, source, skipping)
    manifest = read_manifest(artifact)
    assert manifest.quantization["layers"] == "int8"
    skipped = {name for name, form in manifest.quantization.items() if form == "none"}
    assert skipped == {
        *(f"layers.0.{part}_proj.weight" for part in ("qkv", "o", "gate_up", "down")),
        "layers.1.o_proj.weight",
    }
    found = load_weights(artifact, _config(artifact), torch.float32, CPU)
    originals = _fused_source(source, _config(artifact))
    for name in (*skipped, "head.weight"):
        assert torch.equal(found[name], originals[name].bfloat16().float())
    name = "layers.1.qkv_proj.weight"
    assert torch.equal(found[name], dequantize(quantize(originals[name], "int8")))
    with pytest.raises(ConfigError, match=r"skip 'layers\.7\.\*' fits no product of this model"):
        _stage(tmp_path, source, Quantization(layers="int8", skip=("layers.7.*",)))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_codes_and_scales_are_mapped_where_they_lie(tmp_path: Path, name: str) -> None:
    artifact = _stage(tmp_path, make_checkpoint(tmp_path / name, **VARIANTS[name]), INT4)
    stored = map_packed(artifact, _config(artifact))
    packed = [t for t in stored.values() if isinstance(t, PackedLinear)]
    assert {t.format for t in packed} == {"int4-group32", "int8-group32"}
    tensors = [t for p in packed for t in (p.data, p.scales) if t is not None]
    assert len(tensors) == 2 * len(packed)
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    tensors += [t for t in stored.values() if isinstance(t, torch.Tensor)]
    start = min(t.data_ptr() for t in tensors)
    assert start % 4096 == 0
    end = max(t.data_ptr() + t.nbytes for t in tensors)
    assert end - start < (artifact / WEIGHTS).stat().st_size


def test_torch_runs_it_dequantised_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = _stage(tmp_path, make_checkpoint(tmp_path / "tiny"), INT8)
    monkeypatch.setenv(ISA_VARIABLE, "none")
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    with caplog.at_level(logging.INFO), LLM(artifact, max_model_len=64) as llm:
        assert (llm.info.executor, llm.info.dtype) == ("torch", "bfloat16")
        (answer,) = llm.generate([[5, 6, 7, 8]], greedy)
    assert len(answer.token_ids) == 6
    assert "9 of them dequantised to torch.bfloat16" in caplog.text


def test_an_int8_kv_cache_is_the_artifacts_default(tmp_path: Path) -> None:
    """Also where no weight is quantised; its quality is judged, and a replica may say otherwise."""
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    loose = Bars(5.0, 0.0, 5.0)
    reports = {}
    for quantization in (Quantization(kv="int8"), Quantization()):
        artifact = _stage(
            tmp_path, source, quantization, dtype="bfloat16", verify="auto", bars=loose
        )
        manifest = read_manifest(artifact)
        assert manifest.quantization == {}
        assert manifest.kv_dtype == ("int8" if quantization.kv == "int8" else "auto")
        reports[quantization.kv] = read_report(artifact)["quality"]
        for asked, wanted in (("auto", quantization.kv), ("model", "none"), ("int8", "int8")):
            with LLM(artifact, max_model_len=64, runner={"kv_dtype": asked}) as llm:
                assert llm.info.kv_dtype == ("int8" if wanted == "int8" else "bfloat16")
    assert [reports[kind]["kv_dtype"] for kind in ("int8", "none")] == ["int8", "bfloat16"]
    assert reports["int8"]["kl"] != reports["none"]["kl"]


def test_what_is_not_close_enough_is_not_published(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"t is not published.*KL divergence"):
        _stage(tmp_path, source, INT4, verify="auto", bars=Bars(max_kl=1e-6))
    assert not list((tmp_path / "store").glob("t*"))
    artifact = _stage(tmp_path, source, INT8, verify="auto", bars=Bars(1.0, 0.1, 2.0))
    quality = read_report(artifact)["quality"]
    assert 1e-5 < quality["kl"] < 0.2
    assert quality["top1"] > 0.8


def test_ids_tell_formats_apart_and_runs_alike(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny")
    names = {_stage(tmp_path / "a", source, q).name for q in (INT8, INT4)}
    assert len(names) == 2
    assert _stage(tmp_path / "b", source, INT8).name in names


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    artifact = _stage(tmp_path, make_checkpoint(tmp_path / "tiny"), INT8)
    manifest, config = read_manifest(artifact), _config(artifact)
    for quantization, layout, says in (
        ({"layers": "int3"}, QUANTIZED, "quantization 'int3' of 'layers' is not one"),
        ({"heads": "int8"}, QUANTIZED, "quantization 'int8' of 'heads' is not one"),
        ({}, QUANTIZED, "layout 'quantized-panels-32' with quantization none is not one"),
        (manifest.quantization, PACKED, "layout 'bf16-panels-32' with quantization"),
        ({"layers": "int8"}, QUANTIZED, r"head.weight.scales is unknown"),
        (manifest.quantization | {"layers": "int8-group32"}, QUANTIZED, "scales has shape"),
    ):
        foreign = replace(manifest, quantization=quantization, layout=layout)
        with pytest.raises(ArtifactError, match=says):
            map_packed(artifact, config, foreign)
    tensors = load_file(artifact / WEIGHTS)
    tensors["norm.weight"] = tensors["norm.weight"].clone()
    tensors["head.weight"] = tensors["head.weight"].to(torch.int8)
    (artifact / WEIGHTS).unlink()
    save_file(tensors, artifact / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"head\.weight holds torch\.int8, not torch\.uint8"):
        load_weights(artifact, config, torch.bfloat16, CPU)


def test_the_report_of_a_plain_artifact(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny")
    artifact = optimize(Recipe("t", str(source), verify="none"), tmp_path / "store")
    assert json.loads((artifact / "report.json").read_text())["quantization"] == {}
    assert read_manifest(artifact).quantization == {}
