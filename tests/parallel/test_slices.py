"""A model in slices gives the logits of the whole one: every family, every format, real collectives
between two ranks, which are threads here."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.pipeline import optimize
from optimizer.quantization import parse_quantization
from optimizer.recipe import Recipe
from tests.families import FAMILIES
from tests.parity.paged import CPU, Text, make_inputs
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.attention.base import LayerKV
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.quantization import QuantizedFormat
from torchweave_ray.models.artifact import read_manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.executors import Placement
from torchweave_ray.models.ops import TorchOps
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.models.tensors import FusedTensor, fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor
from torchweave_ray.models.weights import load_weights
from torchweave_ray.parallel.collectives import Collectives
from torchweave_ray.parallel.opening import check_ranks, open_slice
from torchweave_ray.parallel.slices import Slice, check_divides, sliced_spec
from torchweave_ray.parallel.step_message import num_bytes, packed, unpacked

BLOCK = 16
TEXTS = [[5, 9, 200, 17, 33], [7], list(range(40, 70))]
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-odd": {"tie_word_embeddings": True, "vocab_size": 301},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
}
_SLOW = ("qwen2", "gemma2", "phi3", "mistral", "smollm3")
MODELS = LLAMAS | {name: FAMILIES[name] for name in ("qwen3", "gemma3", "qwen3-moe", *_SLOW)}


def run(
    executor: TorchExecutor, spec: DecoderSpec, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A prompt of each text, then a token more, then hidden states of another."""
    shape = (8, spec.num_kv_heads, BLOCK, spec.head_dim)
    kv = [
        LayerKV(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        for _ in range(spec.num_layers)
    ]
    texts = [Text([*ids, 3, 4], [2 * i, 2 * i + 1]) for i, ids in enumerate(TEXTS)]
    found = [executor.forward(make_inputs([(t, len(t.token_ids) - 2) for t in texts], BLOCK), kv)]
    for text in texts:
        text.num_computed = len(text.token_ids) - 2
    found.append(executor.forward(make_inputs([(t, 1) for t in texts], BLOCK), kv))
    for text in texts:
        text.num_computed += 1
    found.append(executor.hidden(make_inputs([(t, 1) for t in texts], BLOCK), kv))
    return found


def run_ranks(
    artifact: Path, num_ranks: int, codes: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    manifest = read_manifest(artifact)
    config = ModelConfig.read(artifact)
    attention = TorchPagedAttention()
    placement = Placement(dtype, CPU, 1, ops=TorchOps(attention) if codes else None)
    store = Collectives.open_store()

    def one(rank: int) -> list[Tensor]:
        collectives = Collectives(rank, num_ranks, CPU)
        collectives.join(store.port)
        executor = open_slice(artifact, config, manifest, placement, attention, collectives)
        return run(executor, sliced_spec(config, Slice(rank, num_ranks)), dtype)

    with ThreadPoolExecutor(num_ranks) as threads:
        first, *_ = threads.map(one, range(num_ranks))
        return first


def run_whole(artifact: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    config = ModelConfig.read(artifact)
    weights = load_weights(artifact, config, dtype, CPU)
    spec = build_spec(config)
    return run(TorchExecutor(spec, weights, TorchPagedAttention()), spec, dtype)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in _SLOW else []) for n in MODELS],
)
def test_slices_equal_the_whole(name: str, tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "a", **MODELS[name])
    whole = run_whole(artifact)
    for mine, wanted in zip(run_ranks(artifact, 2), whole, strict=True):
        assert mine.shape == wanted.shape
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(mine.argmax(dim=1), wanted.argmax(dim=1))


def test_bf16(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "a", dtype=torch.bfloat16)
    exact = run_whole(artifact)
    whole, ranks = (
        run_whole(artifact, dtype=torch.bfloat16),
        run_ranks(artifact, 2, dtype=torch.bfloat16),
    )
    for mine, other, wanted in zip(ranks, whole, exact, strict=True):
        assert (mine - wanted).norm() < 1.5 * (other - wanted).norm()


def test_four_ranks(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "a", num_key_value_heads=4, vocab_size=298)
    for mine, wanted in zip(run_ranks(artifact, 4), run_whole(artifact), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "target"), [("int8", "auto"), ("int4", "auto"), ("fp8", "sm_90")])
def test_quantised_weights_are_sliced_as_codes(name: str, target: str, tmp_path: Path) -> None:
    """Row-major for GPUs and packed for CPUs; dequantised, or read as codes."""
    source = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    quantization = parse_quantization(name)
    recipe = Recipe("t", str(source), quantization=quantization, target=target, verify="none")
    artifact = optimize(recipe, tmp_path / "store")
    whole = run_whole(artifact)
    for codes in (False, True):
        for mine, wanted in zip(run_ranks(artifact, 2, codes), whole, strict=True):
            torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=1e-4)


def test_a_rank_holds_its_share_and_no_more(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "a", **FAMILIES["qwen3-moe"])
    config = ModelConfig.read(artifact)
    whole = load_weights(artifact, config, torch.float32, CPU)
    own = open_slice(
        artifact,
        config,
        read_manifest(artifact),
        Placement(torch.float32, CPU, 1),
        TorchPagedAttention(),
        Collectives(1, 2, CPU),
    )
    held = {name: tensor.numel() for name, tensor in own._tensors.items()}  # type: ignore[union-attr]
    cut = {name for name, tensor in whole.items() if held[name] < tensor.numel()}
    assert all(2 * held[name] == whole[name].numel() for name in cut)
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name in set(whole) - cut}
    assert kept == {"input_norm", "post_attention_norm", "q_norm", "k_norm", "router", "norm"}


def test_what_does_not_divide_is_refused_by_name() -> None:
    def refusal(num_ranks: int, format: QuantizedFormat | None = None, **overrides: Any) -> str:
        values = json.loads(json.dumps(_tiny() | overrides))
        config = ModelConfig.from_hf(values)
        tensors = fused_tensors(config, {} if format is None else {"layers": format})
        with pytest.raises(ConfigError) as raised:
            check_divides(config, num_ranks, tensors)
        return str(raised.value)

    assert "num_attention_heads 4" in refusal(3)
    assert "num_key_value_heads 2" in refusal(4)
    assert "intermediate_size 127" in refusal(2, intermediate_size=127)
    moe = FAMILIES["qwen3-moe"] | {"moe_intermediate_size": 47}
    assert "moe_intermediate_size 47" in refusal(2, **moe)
    said = refusal(2, "int8-group32", intermediate_size=96)
    assert "48 inputs of layers.0.down_proj.weight" in said
    assert "groups of 32" in said
    check_divides(ModelConfig.from_hf(_tiny()), 2)


def _tiny() -> dict[str, Any]:
    from tests.tiny import TINY_CONFIG

    return dict(TINY_CONFIG)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora.source", {"lora": {"source": "x"}}),
        ("cache.spill", {"cache": {"spill": {"path": "x"}}}),
        ("runner.executor native", {"runner": {"executor": "native"}}),
        ("runner.batch_invariant", {"runner": {"batch_invariant": True}}),
    ],
)
def test_options_that_need_one_rank_are_refused_by_name(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    artifact = make_tiny_artifact(tmp_path / "a")
    config = ModelConfig.read(artifact)
    manifest = read_manifest(artifact)
    with pytest.raises(ConfigError, match=f"^{name} does not go with tensor_parallel_size 2"):
        check_ranks(
            EngineConfig.from_dict({"tensor_parallel_size": 2, **options}), config, manifest, True
        )
    plain = EngineConfig.from_dict({"tensor_parallel_size": 2})
    check_ranks(plain, config, manifest, True)
    with pytest.raises(ConfigError, match="object_store does not go"):
        check_ranks(plain, config, manifest, False)


def test_a_step_travels_whole() -> None:
    texts = [Text([*ids, 3], [2 * i, 2 * i + 1]) for i, ids in enumerate(TEXTS)]
    inputs = replace(make_inputs([(t, 1) for t in texts], BLOCK), num_padding=0)
    header, piece = packed(inputs)
    assert piece.numel() == num_bytes(header)
    again = unpacked(json.loads(json.dumps(header)), piece.clone())
    for name in ("input_ids", "positions", "slot_mapping", "block_tables", "logit_rows"):
        mine, sent = getattr(again, name), getattr(inputs, name)
        assert (mine.dtype, mine.tolist()) == (sent.dtype, sent.tolist())
    assert (again.max_query_len, again.max_seq_len) == (inputs.max_query_len, inputs.max_seq_len)


def test_the_parts_of_a_fused_tensor_make_up_the_whole() -> None:
    """Every row is somewhere, once."""
    from torchweave_ray.parallel.slices import sliced_tensor

    config = ModelConfig.from_hf(_tiny())
    tensor: FusedTensor
    for tensor in fused_tensors(config):
        ids = torch.arange(tensor.shape[0]).view(-1, *[1] * (len(tensor.shape) - 1))
        rows = ids.expand(tensor.shape).contiguous()
        parts = [sliced_tensor(tensor, rows, config, Slice(rank, 2)) for rank in range(2)]
        if len(parts[0]) < tensor.shape[0]:  # type: ignore[arg-type]
            found = torch.cat([p.reshape(len(p), -1)[:, 0] for p in parts if isinstance(p, Tensor)])
            assert sorted(found.tolist()) == list(range(tensor.shape[0]))
