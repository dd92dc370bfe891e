"""Names and shapes of weights: what is missing, surplus or misshaped is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import TINY_CONFIG, make_checkpoint, make_tiny_artifact
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import MANIFEST, WEIGHTS, read_manifest, verify_artifact
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import Embed, Linear, Op, RMSNorm
from torchweave_ray.models.tensors import check_source_names, fuse, fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights

CPU = torch.device("cpu")


def _config(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_hf({**TINY_CONFIG, **overrides})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_tiny_artifact(tmp_path / "artifact")


def _edit(artifact: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors: dict[str, Any] = {k: v.clone() for k, v in load_file(artifact / WEIGHTS).items()}
    tensors.update(changes)
    save_file({k: v for k, v in tensors.items() if v is not None}, artifact / WEIGHTS)


def test_the_tiny_artifact_is_whole_and_repeatable(artifact: Path, tmp_path: Path) -> None:
    again = make_tiny_artifact(tmp_path / "again")
    other = make_tiny_artifact(tmp_path / "other", seed=1)
    assert verify_artifact(artifact, full=True) == verify_artifact(again, full=True)
    assert read_manifest(other).artifact_id != read_manifest(artifact).artifact_id


def test_fused_rows_are_the_sources_in_order(artifact: Path, tmp_path: Path) -> None:
    sources = load_file(make_checkpoint(tmp_path / "checkpoint") / WEIGHTS)
    weights = load_weights(artifact, _config(), torch.float32, CPU)
    prefix = "model.layers.1.self_attn."
    query, key, value = torch.split(weights["layers.1.qkv_proj.weight"], [64, 32, 32])
    assert torch.equal(query, sources[prefix + "q_proj.weight"])
    assert torch.equal(key, sources[prefix + "k_proj.weight"])
    assert torch.equal(value, sources[prefix + "v_proj.weight"])
    gate, up = weights["layers.0.gate_up_proj.weight"].chunk(2)
    assert torch.equal(gate, sources["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(up, sources["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_ops_use_exactly_the_stored_tensors(tied: bool, bias: bool) -> None:
    config = _config(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    spec = build_spec(config)
    used = {name for op in (*spec.ops, *spec.head_ops) for name in _tensors_of(op)}
    assert used == set(spec.tensors) == {t.name for t in fused_tensors(config)}
    assert ("head.weight" in used) is not tied


def _tensors_of(op: Op) -> list[str]:
    match op:
        case Embed():
            return [op.table]
        case Linear():
            return [op.weight] if op.bias is None else [op.weight, op.bias]
        case RMSNorm():
            return [op.weight]
    return []


def test_dtype_is_converted_and_an_equal_one_is_mapped(artifact: Path) -> None:
    mapped = load_weights(artifact, _config(), torch.float32, CPU)
    rounded = load_weights(artifact, _config(), torch.bfloat16, CPU)
    name = "layers.0.down_proj.weight"
    assert torch.equal(mapped[name].bfloat16(), rounded[name])
    assert all(t.dtype == torch.bfloat16 for t in rounded.values())
    addresses = [t.data_ptr() for t in mapped.values()]
    span = max(addresses) - min(addresses)
    assert span < (artifact / WEIGHTS).stat().st_size, "tensors were copied out of the mapped file"
    order = sorted(mapped, key=lambda n: mapped[n].data_ptr())
    ends = [mapped[n].data_ptr() + mapped[n].nbytes for n in order]
    assert ends[:-1] == [mapped[n].data_ptr() for n in order[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"tensor norm\.weight is missing"),
        ({"extra.weight": torch.zeros(2)}, r"tensor extra\.weight is unknown"),
        ({"norm.weight": torch.zeros(63)}, r"norm\.weight has shape \[63\].* \[64\]"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, r"norm\.weight holds torch\.int8"),
    ],
)
def test_a_wrong_tensor_is_named(
    artifact: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    _edit(artifact, changes)
    with pytest.raises(ArtifactError, match=message):
        load_weights(artifact, _config(), torch.float32, CPU)


def test_an_unreadable_or_foreign_file_is_named(artifact: Path) -> None:
    whole = (artifact / WEIGHTS).read_bytes()
    (artifact / WEIGHTS).write_bytes(whole[:1000])
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        load_weights(artifact, _config(), torch.float32, CPU)
    (artifact / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        load_weights(artifact, _config(), torch.float32, CPU)
    packed = replace(read_manifest(artifact), layout="packed-avx512")
    (artifact / MANIFEST).write_text(packed.to_json())
    with pytest.raises(ArtifactError, match="layout 'packed-avx512'"):
        load_weights(artifact, _config(), torch.float32, CPU)


def test_fusing_checks_each_source() -> None:
    qkv = next(t for t in fused_tensors(_config()) if t.name == "layers.0.qkv_proj.weight")
    parts = [torch.zeros(shape) for shape in qkv.source_shapes]
    assert tuple(fuse(qkv, parts).shape) == qkv.shape == (128, 64)
    parts[1] = torch.zeros(16, 64)
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.k_proj\.weight has shape"):
        fuse(qkv, parts)


def test_source_names_are_checked() -> None:
    names = [source for t in fused_tensors(_config()) for source in t.sources]
    check_source_names(_config(), [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    with pytest.raises(ArtifactError, match=r"tensor lm_head\.weight is missing"):
        check_source_names(_config(), names[:-1])
    with pytest.raises(ArtifactError, match=r"q_proj\.bias is not one of LlamaForCausalLM"):
        check_source_names(_config(), [*names, "model.layers.0.self_attn.q_proj.bias"])
    check_source_names(_config(tie_word_embeddings=True), names)


def test_the_executor_refuses_other_tensors(artifact: Path) -> None:
    spec = build_spec(_config())
    weights = load_weights(artifact, _config(), torch.float32, CPU)
    with pytest.raises(ArtifactError, match="surplus is used by no op"):
        TorchExecutor(spec, {**weights, "surplus": torch.zeros(1)}, TorchPagedAttention())
    del weights["embed.weight"]
    with pytest.raises(ArtifactError, match=r"embed\.weight is missing"):
        TorchExecutor(spec, weights, TorchPagedAttention())
