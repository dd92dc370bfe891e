"""An artifact's tensors: of which Hugging Face tensors each is made, and how a file holds it.

The one place that knows both namings, which tensors are packed and in which format. The optimizer
converts, fuses, quantises and packs by `fused_tensors`, weights.py reads by it. Knows no ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels import packing
from torchweave_ray.kernels.packing import PackedLinear, pack_linear, packed_shape, scales_shape
from torchweave_ray.kernels.quantization import GROUP, Format, QuantizedFormat, QuantizedLinear
from torchweave_ray.models.config import ExpertsConfig, ModelConfig

EMBED = "embed.weight"
NORM = "norm.weight"
HEAD = "head.weight"
LAYOUT = "fused"
"""`Manifest.layout` of plain row-major tensors under the names of `fused_tensors`."""
PACKED = packing.LAYOUT
"""`Manifest.layout` of the same names, the weights of products as the CPU kernels read them."""
QUANTIZED = "quantized-panels-32"
"""As PACKED, with quantised weights: codes under the name, scales under it with SCALES."""
QUANTIZED_ROWS = "quantized-rows"
"""As LAYOUT, with quantised weights: codes [n, k] and, under it, SCALES and MINS. For GPUs."""
SCALES = ".scales"
MINS = ".mins"
NOT_QUANTIZED = "none"
"""In `Manifest.quantization`, by the name of a tensor that its group's format leaves out."""
Packing = Literal["none", "linear", "gated"]
"""How PACKED holds a tensor: as it is; by `pack_linear`; so with gates and ups interleaved."""
Group = Literal["", "layers", "head"]
"""Products of the layers; the head's, which is the embedding where they are tied; no product."""
GROUPS: tuple[Group, ...] = ("layers", "head")
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of the artifact: its sources, concatenated along the first axis in this order."""

    name: str
    sources: tuple[str, ...]
    """Hugging Face names."""
    source_shapes: tuple[tuple[int, ...], ...]
    packing: Packing = "none"
    group: Group = ""
    format: Format = "bf16"
    """Of the weights of a product."""
    num_experts: int = 1
    """Weights of one shape below each other, each packed by itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s[0] for s in self.source_shapes), *self.source_shapes[0][1:])

    def row_major(self, dtype: torch.dtype) -> tuple[StoredTensor, ...]:
        """As it lies before it is packed; `dtype` where it is not quantised."""
        if self.format == "bf16":
            return (StoredTensor(self.name, self.shape, dtype),)
        n, k = self.shape
        scales = StoredTensor(self.name + SCALES, (n,), torch.float32)
        if self.format not in ("int8", "fp8"):
            scales = StoredTensor(self.name + SCALES, (n, -(-k // GROUP)), torch.float16)
        mins = (replace(scales, name=self.name + MINS),) if self.format == "int4-group32" else ()
        return (StoredTensor(self.name, self.shape, torch.uint8), scales, *mins)

    def stored(self, layout: str, dtype: torch.dtype) -> tuple[StoredTensor, ...]:
        """As an artifact of this layout holds it."""
        if layout in (LAYOUT, QUANTIZED_ROWS) or self.packing == "none":
            return self.row_major(dtype)
        n, k = self.shape
        gated, format = self.packing == "gated", self.format
        shape = packed_shape(n, k, gated, format, self.num_experts)
        if format == "bf16":
            return (StoredTensor(self.name, shape, torch.bfloat16),)
        scales_dtype = torch.float32 if format == "int8" else torch.float16
        return (
            StoredTensor(self.name, shape, torch.uint8),
            StoredTensor(
                self.name + SCALES,
                scales_shape(n, k, gated, format, self.num_experts),
                scales_dtype,
            ),
        )

    def pack(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `stored` names out of what `row_major` names, the layout not being LAYOUT."""
        if self.packing == "none":
            return (parts[0],)
        weight = parts[0] if self.format == "bf16" else QuantizedLinear(self.format, *parts)
        packed = pack_linear(weight, self.packing == "gated", self.num_experts)
        return (packed.data,) if packed.scales is None else (packed.data, packed.scales)

    def packed(self, stored: Sequence[Tensor]) -> Tensor | PackedLinear:
        """What `pack` gave, around the same memory."""
        if self.packing == "none":
            return stored[0]
        n, k = self.shape
        data, scales = (stored[0], None) if len(stored) == 1 else stored
        gated = self.packing == "gated"
        return PackedLinear(data, n, k, gated, self.format, scales, self.num_experts)


def layer_name(layer: int, part: str) -> str:
    """The artifact's name of a layer's tensor: `layers.3.qkv_proj.weight`."""
    return f"layers.{layer}.{part}"


def fused_tensors(
    config: ModelConfig, quantization: Mapping[str, str] = _NONE
) -> tuple[FusedTensor, ...]:
    """Every tensor of an artifact of this model, in the order they are stored and used.

    A tied head is the embedding itself: it is stored once and has no entry of its own, packed as
    the head reads it (the kernels pick an embedding's row out of a packed table, too).
    `quantization`: as in a manifest. Raises ArtifactError for what it says that we do not know.
    """
    tensors = _all_tensors(config)
    formats = _formats(tensors, quantization)
    return tuple(replace(tensor, format=formats[tensor.name]) for tensor in tensors)


def _formats(tensors: Sequence[FusedTensor], quantization: Mapping[str, str]) -> dict[str, Format]:
    """By name of the tensor. The entry of a tensor goes over that of its group."""
    known: dict[str, Format] = {name: name for name in get_args(QuantizedFormat)}
    known[NOT_QUANTIZED] = "bf16"
    products = {tensor.name for tensor in tensors if tensor.group}
    for key, name in quantization.items():
        if name not in known or not (key in GROUPS or key in products):
            raise ArtifactError(
                f"quantization {name!r} of {key!r} is not one that this build reads (formats: "
                f"{', '.join(known)}); stage the model again with `torchweave optimize`"
            )
    asked = {t.name: quantization.get(t.name, quantization.get(t.group)) for t in tensors}
    return {name: known[format or NOT_QUANTIZED] for name, format in asked.items()}


def _all_tensors(config: ModelConfig) -> list[FusedTensor]:
    if config.foreign is not None:
        return [FusedTensor(name, (name,), (shape,)) for name, shape in config.foreign.tensors]
    hidden, vocab = config.hidden_size, config.vocab_size
    embed = FusedTensor(EMBED, ("model.embed_tokens.weight",), ((vocab, hidden),))
    if config.tie_word_embeddings:
        embed = replace(embed, packing="linear", group="head")
    tensors = [embed]
    for layer in range(config.num_layers):
        tensors += [*_attention_tensors(config, layer), *_mlp_tensors(config, layer)]
    tensors.append(FusedTensor(NORM, ("model.norm.weight",), ((hidden,),)))
    if not config.tie_word_embeddings:
        head = FusedTensor(HEAD, ("lm_head.weight",), ((vocab, hidden),), "linear", "head")
        tensors.append(head)
    return tensors


def _attention_tensors(config: ModelConfig, layer: int) -> list[FusedTensor]:
    hidden, source = config.hidden_size, f"model.layers.{layer}.self_attn"
    rows = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    columns = rows[0]
    qkv = [f"{source}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    if config.is_stored_fused:
        qkv, rows = [f"{source}.qkv_proj"], [sum(rows)]
    found = [_norm(config, layer, "input_norm", "input_layernorm")]
    found += _linear(layer, "qkv_proj", qkv, rows, hidden, config.attention_bias)
    if config.qk_norm:
        heads = (config.head_dim,)
        found += [_vector(layer, f"{x}_norm", f"{source}.{x}_norm", heads) for x in "qk"]
    o_proj = [f"{source}.o_proj"]
    found += _linear(layer, "o_proj", o_proj, [hidden], columns, config.output_bias)
    if config.post_norms:
        found.append(_norm(config, layer, "attention_out_norm", "post_attention_layernorm"))
    return found


def _mlp_tensors(config: ModelConfig, layer: int) -> list[FusedTensor]:
    hidden, size, source = config.hidden_size, config.intermediate_size, f"model.layers.{layer}.mlp"
    before = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    found = [_norm(config, layer, "post_attention_norm", before)]
    if config.experts is not None and config.experts.layers[layer]:
        return found + _expert_tensors(config.experts, layer, source, hidden)
    gate_up, rows = [f"{source}.gate_proj", f"{source}.up_proj"], [size, size]
    if config.is_stored_fused:
        gate_up, rows = [f"{source}.gate_up_proj"], [2 * size]
    found += _linear(layer, "gate_up_proj", gate_up, rows, hidden, config.mlp_bias)
    found += _linear(layer, "down_proj", [f"{source}.down_proj"], [hidden], size, config.mlp_bias)
    if config.post_norms:
        found.append(_norm(config, layer, "mlp_out_norm", "post_feedforward_layernorm"))
    return found


def _norm(config: ModelConfig, layer: int, name: str, source: str) -> FusedTensor:
    return _vector(layer, name, f"model.layers.{layer}.{source}", (config.hidden_size,))


def _vector(layer: int, name: str, source: str, shape: tuple[int, ...]) -> FusedTensor:
    return FusedTensor(layer_name(layer, f"{name}.weight"), (f"{source}.weight",), (shape,))


def _linear(
    layer: int, name: str, sources: Sequence[str], rows: Sequence[int], columns: int, bias: bool
) -> list[FusedTensor]:
    packing: Packing = "gated" if name == "gate_up_proj" else "linear"
    weights = tuple(f"{source}.weight" for source in sources)
    shapes = tuple((n, columns) for n in rows)
    full = layer_name(layer, f"{name}.weight")
    found = [FusedTensor(full, weights, shapes, packing, "layers")]
    if bias:
        biases = tuple(f"{source}.bias" for source in sources)
        lengths = tuple((n,) for n in rows)
        found.append(FusedTensor(layer_name(layer, f"{name}.bias"), biases, lengths))
    return found


def _expert_tensors(experts: ExpertsConfig, layer: int, mlp: str, hidden: int) -> list[FusedTensor]:
    """The router stays in bf16, whatever the layers are: its errors change who computes."""
    size, each = experts.intermediate_size, range(experts.num)
    gate_up = [f"{mlp}.experts.{e}.{half}_proj.weight" for e in each for half in ("gate", "up")]
    down = [f"{mlp}.experts.{e}.down_proj.weight" for e in each]
    router = FusedTensor(
        layer_name(layer, "router.weight"),
        (f"{mlp}.gate.weight",),
        ((experts.num, hidden),),
        "linear",
    )
    parts: list[tuple[str, list[str], tuple[int, int], Packing]] = [
        ("gate_up", gate_up, (size, hidden), "gated"),
        ("down", down, (hidden, size), "linear"),
    ]
    return [
        router,
        *(
            FusedTensor(
                layer_name(layer, f"experts.{name}_proj.weight"),
                tuple(sources),
                (shape,) * len(sources),
                packing,
                "layers",
                num_experts=experts.num,
            )
            for name, sources, shape, packing in parts
        ),
    ]


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
        check_shape(name, tuple(part.shape), shape)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=0)


def stored_order(tensors: Sequence[FusedTensor], layout: str) -> list[FusedTensor]:
    """Packed layouts have the packed tensors first: codes and scales are of sizes that leave the
    next one aligned to 64 bytes, bf16 of most models to a page."""
    return list(tensors) if layout == LAYOUT else sorted(tensors, key=lambda t: t.packing == "none")


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ArtifactError(
            f"tensor {name} has shape {list(shape)}, config.json asks for {list(wanted)}"
        )
