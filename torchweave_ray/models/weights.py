"""Weights by name: which Hugging Face tensors make which fused tensor, and loading the fused ones.

The one place that knows both namings. The optimizer converts and fuses by `fused_tensors`; an
executor gets what `load_weights` maps from an artifact's file. Knows nothing of ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import WEIGHTS, read_manifest
from torchweave_ray.models.config import ModelConfig

EMBED = "embed.weight"
NORM = "norm.weight"
HEAD = "head.weight"
LAYOUT = "fused"
"""`Manifest.layout` of plain row-major tensors under the names of `fused_tensors`."""


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of the artifact: its sources, concatenated along the first axis in this order."""

    name: str
    sources: tuple[str, ...]
    """Hugging Face names."""
    source_shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s[0] for s in self.source_shapes), *self.source_shapes[0][1:])


def layer_name(layer: int, part: str) -> str:
    """The artifact's name of a layer's tensor: `layers.3.qkv_proj.weight`."""
    return f"layers.{layer}.{part}"


def fused_tensors(config: ModelConfig) -> tuple[FusedTensor, ...]:
    """Every tensor of an artifact of this model, in the order they are stored and used.

    A tied head is the embedding itself: it is stored once and has no entry of its own.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    tensors = [FusedTensor(EMBED, ("model.embed_tokens.weight",), ((vocab, hidden),))]
    for layer in range(config.num_layers):
        tensors += _layer_tensors(config, layer)
    tensors.append(FusedTensor(NORM, ("model.norm.weight",), ((hidden,),)))
    if not config.tie_word_embeddings:
        tensors.append(FusedTensor(HEAD, ("lm_head.weight",), ((vocab, hidden),)))
    return tuple(tensors)


def _layer_tensors(config: ModelConfig, layer: int) -> list[FusedTensor]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    found: list[FusedTensor] = []

    def norm(name: str, source: str) -> None:
        full = f"model.layers.{layer}.{source}.weight"
        found.append(FusedTensor(layer_name(layer, f"{name}.weight"), (full,), ((hidden,),)))

    def linear(
        name: str, block: str, sources: Sequence[str], rows: Sequence[int], columns: int, bias: bool
    ) -> None:
        prefixes = [f"model.layers.{layer}.{block}.{source}" for source in sources]
        weights = tuple(f"{prefix}.weight" for prefix in prefixes)
        shapes = tuple((n, columns) for n in rows)
        found.append(FusedTensor(layer_name(layer, f"{name}.weight"), weights, shapes))
        if bias:
            biases = tuple(f"{prefix}.bias" for prefix in prefixes)
            lengths = tuple((n,) for n in rows)
            found.append(FusedTensor(layer_name(layer, f"{name}.bias"), biases, lengths))

    q_k_v = ("q_proj", "k_proj", "v_proj")
    att_bias, mlp_bias = config.attention_bias, config.mlp_bias
    norm("input_norm", "input_layernorm")
    linear("qkv_proj", "self_attn", q_k_v, (q_rows, kv_rows, kv_rows), hidden, att_bias)
    linear("o_proj", "self_attn", ("o_proj",), (hidden,), q_rows, att_bias)
    norm("post_attention_norm", "post_attention_layernorm")
    linear("gate_up_proj", "mlp", ("gate_proj", "up_proj"), (mlp, mlp), hidden, mlp_bias)
    linear("down_proj", "mlp", ("down_proj",), (hidden,), mlp, mlp_bias)
    return found


def check_source_names(config: ModelConfig, names: Iterable[str]) -> None:
    """Raises ArtifactError unless a checkpoint has every tensor we need and none we don't know."""
    present = set(names)
    wanted = {source for tensor in fused_tensors(config) for source in tensor.sources}
    if missing := sorted(wanted - present):
        raise ArtifactError(f"tensor {missing[0]} is missing ({len(missing)} missing in all)")
    surplus = sorted(n for n in present - wanted if not _is_redundant(config, n))
    if surplus:
        raise ArtifactError(
            f"tensor {surplus[0]} is not one of {config.architecture} with this config "
            f"({len(surplus)} such in all)"
        )


def _is_redundant(config: ModelConfig, name: str) -> bool:
    """Known tensors that say nothing new: old rope buffers, the copy of a tied head."""
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    return name.endswith("rotary_emb.inv_freq")


def fuse(tensor: FusedTensor, parts: Sequence[Tensor]) -> Tensor:
    """The fused tensor out of its sources, in order. Raises ArtifactError naming a wrong one."""
    for name, shape, part in zip(tensor.sources, tensor.source_shapes, parts, strict=True):
        _check_shape(name, tuple(part.shape), shape)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=0)


def load_weights(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """An artifact's tensors by name. On the CPU in their own dtype they are views of the mapped
    file, shared by all replicas of a node through the page cache.

    Raises ArtifactError naming the tensor that is missing, unknown or of another shape.
    """
    manifest = read_manifest(directory)
    if manifest.layout != LAYOUT or manifest.quantization:
        raise ArtifactError(
            f"{directory}: layout {manifest.layout!r} with quantization "
            f"{manifest.quantization or 'none'} is not one that this executor reads"
        )
    expected = {tensor.name: tensor.shape for tensor in fused_tensors(config)}
    path = directory / WEIGHTS
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), set(expected))
            for name, shape in expected.items():
                _check_shape(f"{path}: {name}", tuple(file.get_slice(name).get_shape()), shape)
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise ArtifactError(f"{path}: tensor {name} holds {tensor.dtype}, not floats")
                tensors[name] = tensor.to(device=device, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return tensors


def _check_names(path: Path, present: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - present):
        raise ArtifactError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if surplus := sorted(present - wanted):
        raise ArtifactError(f"{path}: tensor {surplus[0]} is unknown ({len(surplus)} in all)")


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ArtifactError(
            f"tensor {name} has shape {list(shape)}, config.json asks for {list(wanted)}"
        )
