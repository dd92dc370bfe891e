"""Converting a checkpoint takes less memory than 1.3 times its largest shard."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optimizer.gguf_files import make_gguf
from tests.tiny import make_checkpoint
from torchweave_ray.models.artifact import WEIGHTS
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import fused_tensors

ROOT = Path(__file__).parents[3]
BOUND = 1.3


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], itemsize: int, code: str) -> int:
    """A safetensors file of zeros that takes no room on the disk; its size."""
    fields, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + itemsize * torch.Size(shape).numel()
        fields[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


def _sharded(folder: Path, code: str, itemsize: int, num_shards: int, **config: int) -> int:
    """A checkpoint of zeros in shards; the largest one's bytes."""
    make_checkpoint(folder, num_hidden_layers=1)
    (folder / WEIGHTS).unlink()
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    shapes = {
        name: shape
        for fused in fused_tensors(ModelConfig.read(folder))
        for name, shape in zip(fused.sources, fused.source_shapes, strict=True)
    }
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        if held >= total / num_shards:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += torch.Size(shape).numel()
    names = [f"model-{i:05}.safetensors" for i in range(len(shards))]
    sizes = [
        _write_sparse(folder / name, shard, itemsize, code)
        for name, shard in zip(names, shards, strict=True)
    ]
    weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return max(sizes)


def _peaks(
    tmp_path: Path, source: object, dtype: str, last: str = "fuse", more: str = ""
) -> dict[str, list[int]]:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\ndtype: {dtype}\n{more}")
    (tmp_path / "work").mkdir()
    module = "tests.optimizer.conversion.peak_memory"
    command = [sys.executable, "-m", module, str(recipe), str(tmp_path / "work"), last]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    peaks: dict[str, list[int]] = json.loads(ran.stdout)
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize(("code", "itemsize", "scheme"), [("BF16", 2, "local://"), ("F32", 4, "")])
def test_four_gigabytes_in_shards(tmp_path: Path, code: str, itemsize: int, scheme: str) -> None:
    """Any single tensor is a third of a shard at most, as in real models. One of the two is
    downloaded in chunks, the other read in place."""
    layers = 20 if itemsize == 2 else 9
    largest = _sharded(
        tmp_path / "big",
        code,
        itemsize,
        num_shards=4,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    assert 4 * largest > 4e9
    peaks = _peaks(tmp_path, f"{scheme}{tmp_path}/big", "bfloat16")
    for stage, (anonymous, resident) in peaks.items():
        print(f"{code} {stage}: {anonymous / 1e6:.0f} MB anonymous, {resident / 1e6:.0f} MB in all")
        assert anonymous < 0.3 * largest, stage
        assert resident < BOUND * largest, stage


@pytest.mark.slow
def test_a_gguf_is_dequantised_by_rows(tmp_path: Path) -> None:
    """One file, so it is its own shard: what counts is the largest tensor in float32."""
    shape = {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 2}
    checkpoint = make_checkpoint(tmp_path / "big", **shape, num_attention_heads=16)
    source = make_gguf(tmp_path / "big.gguf", checkpoint, "Q8_0")
    largest = 4 * 1024 * 16384
    for stage, (anonymous, _) in _peaks(tmp_path, source, "bfloat16").items():
        assert anonymous < 2.5 * largest, stage


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization",
    ["none", "int8", "{layers: int4-group32, head: int8-group32, method: gptq}"],
    ids=["bf16", "int8", "int4-gptq"],
)
def test_a_gigabyte_is_quantised_and_verified_in_little_memory(
    tmp_path: Path, quantization: str
) -> None:
    """In one shard; anonymous memory, since pages of mapped files can be taken back at any time.
    The fixed part: activations and logits of the texts, and GPTQ's matrices of inputs x inputs."""
    largest = _sharded(
        tmp_path / "big",
        "BF16",
        2,
        num_shards=1,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    assert largest > 1e9
    loose = "bars: {max_kl: 99, min_top1: 0, max_perplexity_ratio: 99}\ntuning_budget_s: 1\n"
    more = f"quantization: {quantization}\n{loose}"
    for stage, (anonymous, _) in _peaks(
        tmp_path, tmp_path / "big", "bfloat16", "tune", more
    ).items():
        print(f"{quantization} {stage}: {anonymous / 1e6:.0f} MB anonymous, {largest / 1e6:.0f}")
        assert anonymous < 1.3 * largest, stage
