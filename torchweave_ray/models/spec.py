"""A decoder as data: ordered ops over named buffers and named tensors.

`DecoderSpec` says what to compute, an `Executor` computes it: the torch executor is the
reference, a native program and CUDA graphs are others. Ops are the only vocabulary they share.

Buffers of a step: "hidden" is the residual stream [T, hidden_size]; others are scratch, written
before they are read. Tensor names are those in the artifact (fused: `qkv_proj`, `gate_up_proj`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from torchweave_ray.attention.base import AttentionShape, LayerKV, StepInputs


@dataclass(frozen=True, slots=True)
class Embed:
    """out = table[input_ids] * scale"""

    table: str
    out: str
    scale: float = 1.0
    first_row: int | None = None
    """The table is a slice of the rows from here on, other rows are zeros, and the sum over all
    ranks is taken; None: it is whole."""


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """out = x / rms(x) * (weight + weight_offset), computed in fp32; added to `out` when
    `accumulate` (a norm before the residual add)."""

    x: str
    out: str
    weight: str
    eps: float
    weight_offset: float = 0.0
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """out = x @ weight.T + bias, added to `out` when `accumulate` (the residual add)."""

    x: str
    out: str
    weight: str  # [out_features, in_features]
    bias: str | None = None
    accumulate: bool = False
    is_partial: bool = False
    """x and weight are slices of the inputs: the product is summed over all ranks, before the
    bias."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding, NeoX halves of a head's first 2 * len(inv_freq) dimensions; inv_freq holds
    all scaling already."""

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    """Multiplies cos and sin (yarn, longrope)."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Split qkv, norm q and k if asked, rotate, write KV of `layer`, attend."""

    qkv: str
    out: str
    layer: int
    shape: AttentionShape
    rope: Rope | None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_eps: float = 1e-6
    norm_weight_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """out = act(x[:, :n]) * x[:, n:], n = half of x's columns."""

    x: str
    out: str
    kind: Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of gated MLPs, added to `out`: each row of x goes through the `top_k` experts of
    which the router's softmax is largest (of equal ones the first), and their results are added up
    with its weights, in order of the rank.

    `gate_up` [num_experts * 2 * size, hidden]: an expert's gates, then its ups, expert by expert;
    `down` [num_experts * hidden, size].
    """

    x: str
    router: str
    """Buffer of the router's logits [T, num_experts]."""
    out: str
    gate_up: str
    down: str
    num_experts: int
    top_k: int
    normalize: bool
    """The weights of the chosen add up to 1."""
    kind: Literal["silu", "gelu_tanh"]
    is_partial: bool = False
    """`size` is a slice of each expert's: the results are summed over all ranks."""


Op = Embed | RMSNorm | Linear | Attention | GatedActivation | Experts


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """`ops` run over all tokens; then rows are picked and `head_ops` give "logits" [R, vocab]."""

    architecture: str
    ops: tuple[Op, ...]
    head_ops: tuple[Op, ...]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tensors: tuple[str, ...]
    """Every tensor the ops name; a missing or a surplus one in an artifact is an error."""
    logits_soft_cap: float | None = None


class Ranks(Protocol):
    """The processes that hold the other slices of a decoder; all run the same steps."""

    def sum(self, x: Tensor) -> None:
        """In place, the same bits on all ranks."""
        ...

    def gather_columns(self, x: Tensor) -> Tensor:
        """[R, n] of each -> [R, n * ranks] on rank 0."""
        ...


class Executor(Protocol):
    """Runs a DecoderSpec over batches; owns the weights, not the KV cache."""

    @property
    def name(self) -> str:
        """ "torch", "native", ...: shown by GET /model and doctor."""
        ...

    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32."""
        ...

    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """What the head's product reads for `inputs.logit_rows`, after the last norm:
        [R, hidden_size] float32. For pooling; writes KV like `forward`."""
        ...
