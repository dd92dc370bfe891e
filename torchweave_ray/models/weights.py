"""Weights by name: which Hugging Face tensors make which fused tensor, and how a file holds them.

The one place that knows both namings and which tensors are packed. The optimizer converts, fuses
and packs by `fused_tensors`; an executor gets what `load_weights` or `map_packed` reads from an
artifact's file. Knows nothing of ops.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels import packing
from torchweave_ray.kernels.packing import PackedLinear, pack_linear, packed_shape, unpack_linear
from torchweave_ray.models.artifact import WEIGHTS, Manifest, read_manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.mapped_file import map_tensors

EMBED = "embed.weight"
NORM = "norm.weight"
HEAD = "head.weight"
LAYOUT = "fused"
"""`Manifest.layout` of plain row-major tensors under the names of `fused_tensors`."""
PACKED = packing.LAYOUT
"""`Manifest.layout` of the same names, the weights of products as the CPU kernels read them."""
Packing = Literal["none", "linear", "gated"]
"""How PACKED holds a tensor: as it is; by `pack_linear`; by `pack_linear` with its gates and ups
interleaved."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of the artifact: its sources, concatenated along the first axis in this order."""

    name: str
    sources: tuple[str, ...]
    """Hugging Face names."""
    source_shapes: tuple[tuple[int, ...], ...]
    packing: Packing = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s[0] for s in self.source_shapes), *self.source_shapes[0][1:])

    def stored_shape(self, layout: str) -> tuple[int, ...]:
        if layout == LAYOUT or self.packing == "none":
            return self.shape
        n, k = self.shape
        return packed_shape(n, k, self.packing == "gated")

    def pack(self, weight: Tensor) -> Tensor:
        """What PACKED stores of the fused tensor."""
        if self.packing == "none":
            return weight
        return pack_linear(weight, self.packing == "gated").data

    def packed(self, stored: Tensor) -> Tensor | PackedLinear:
        """What PACKED has stored, around the same memory."""
        if self.packing == "none":
            return stored
        n, k = self.shape
        return PackedLinear(stored, n, k, self.packing == "gated")


def layer_name(layer: int, part: str) -> str:
    """The artifact's name of a layer's tensor: `layers.3.qkv_proj.weight`."""
    return f"layers.{layer}.{part}"


def fused_tensors(config: ModelConfig) -> tuple[FusedTensor, ...]:
    """Every tensor of an artifact of this model, in the order they are stored and used.

    A tied head is the embedding itself: it is stored once and has no entry of its own, packed as
    the head reads it (the kernels pick an embedding's row out of a packed table, too).
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    tied: Packing = "linear" if config.tie_word_embeddings else "none"
    tensors = [FusedTensor(EMBED, ("model.embed_tokens.weight",), ((vocab, hidden),), tied)]
    for layer in range(config.num_layers):
        tensors += _layer_tensors(config, layer)
    tensors.append(FusedTensor(NORM, ("model.norm.weight",), ((hidden,),)))
    if not config.tie_word_embeddings:
        tensors.append(FusedTensor(HEAD, ("lm_head.weight",), ((vocab, hidden),), "linear"))
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
        packing: Packing = "gated" if name == "gate_up_proj" else "linear"
        found.append(FusedTensor(layer_name(layer, f"{name}.weight"), weights, shapes, packing))
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


def stored_order(tensors: Sequence[FusedTensor], layout: str) -> list[FusedTensor]:
    """PACKED has the packed tensors first: their sizes are multiples of 128 bytes, for most models
    of 4096, so behind an aligned header each starts aligned."""
    return list(tensors) if layout == LAYOUT else sorted(tensors, key=lambda t: t.packing == "none")


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    manifest: Manifest | None = None,
) -> dict[str, Tensor]:
    """An artifact's tensors by name, row-major. On the CPU in their own dtype they are views of
    the mapped file, shared by all replicas of a node through the page cache; packed ones are
    unpacked, which takes a copy. `manifest`: of a folder that has none yet.

    Raises ArtifactError naming the tensor that is missing, unknown or of another shape.
    """
    tensors: dict[str, Tensor] = {}
    num_unpacked = 0
    for tensor, stored in _read(directory, config, manifest):
        held = stored
        if isinstance(stored, PackedLinear):
            held = unpack_linear(stored)
            num_unpacked += 1
        assert isinstance(held, Tensor)
        tensors[tensor.name] = held.to(device=device, dtype=dtype)
    if num_unpacked:
        _logger.info(
            "[Weights] unpacked %d tensors of %s: it is packed for the native executor",
            num_unpacked,
            directory,
        )
    return tensors


def map_packed(
    directory: Path, config: ModelConfig, manifest: Manifest | None = None
) -> Mapping[str, Tensor | PackedLinear]:
    """The tensors of a CPU artifact as they are stored, all views of the mapped file: packed where
    its layout is PACKED. Raises as `load_weights`."""
    found = _read(directory, config, manifest, in_place=True)
    return {tensor.name: stored for tensor, stored in found}


def _read(
    directory: Path, config: ModelConfig, manifest: Manifest | None, in_place: bool = False
) -> Iterator[tuple[FusedTensor, Tensor | PackedLinear]]:
    manifest = manifest or read_manifest(directory)
    layout = manifest.layout
    if layout not in (LAYOUT, PACKED) or manifest.quantization:
        raise ArtifactError(
            f"{directory}: layout {layout!r} with quantization {manifest.quantization or 'none'} "
            f"is not one that this build reads ({LAYOUT!r} and {PACKED!r} without); stage the "
            "model again with `torchweave optimize`"
        )
    expected = fused_tensors(config)
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), {tensor.name for tensor in expected})
            mapped = map_tensors(path) if in_place else {}
            for tensor in expected:
                wanted = tensor.stored_shape(layout)
                found = tuple(file.get_slice(tensor.name).get_shape())
                _check_shape(f"{path}: {tensor.name}", found, wanted)
                stored = mapped.get(tensor.name)
                if stored is None:
                    stored = file.get_tensor(tensor.name)
                if not stored.is_floating_point():
                    raise ArtifactError(
                        f"{path}: tensor {tensor.name} holds {stored.dtype}, not floats"
                    )
                yield tensor, tensor.packed(stored) if layout == PACKED else stored
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


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
