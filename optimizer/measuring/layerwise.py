"""A source's model over whole texts in fp32, op by op: each weight is read once and then let go.

So memory holds one weight and the text's activations, whatever the model's size. Who runs it may
look at every op's inputs, and put another weight in the place of the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from optimizer.checkpoints import Checkpoint
from optimizer.measuring.model import layer_cache, make_inputs
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.spec import Attention, DecoderSpec, Embed, GatedActivation, Linear, Op
from torchweave_ray.models.tensors import FusedTensor, check_shape, fused_tensors
from torchweave_ray.models.torch_executor import TorchExecutor, TorchStep

_VOCAB_PIECE = 16_384
"""Rows of the head's table that are brought to fp32 at once."""


class SourceTensors(Mapping[str, Tensor]):
    """The source's own numbers under the artifact's names, [..] fp32, loaded at each access."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, advance: Callable[[int], None]
    ) -> None:
        """`advance` is told the bytes (4 an element) that are loaded."""
        self._checkpoint, self._advance = checkpoint, advance
        # Vectors first: who wants to know a dtype or device reads the first one.
        fused = sorted(fused_tensors(config), key=lambda tensor: len(tensor.shape))
        self._fused: Mapping[str, FusedTensor] = {tensor.name: tensor for tensor in fused}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._fused[name]
        whole = torch.empty(tensor.shape)
        start = 0
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            part = self._checkpoint.load(source)
            check_shape(source, tuple(part.shape), shape)
            whole[start : start + shape[0]] = part
            start += shape[0]
        self._advance(whole.nbytes)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._fused)

    def __len__(self) -> int:
        return len(self._fused)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Some rows of a table, [len(ids), k] fp32."""
        return self.table(name)[ids].float()

    def table(self, name: str) -> Tensor:
        """A tensor that is not fused, as the source holds it: a view of a mapped file if it can."""
        (source,) = self._fused[name].sources
        return self._checkpoint.load(source)

    @property
    def num_bytes(self) -> int:
        return 4 * sum(torch.Size(tensor.shape).numel() for tensor in self._fused.values())


class LayerwiseModel:
    """`windows`: token ids of texts that run beside each other, each from its first position."""

    def __init__(
        self, config: ModelConfig, tensors: SourceTensors, windows: Sequence[Tensor]
    ) -> None:
        self.spec: DecoderSpec = build_spec(config)
        self._tensors, self._windows = tensors, windows
        longest = max(len(window) for window in windows)
        chunks = [(0, len(window)) for window in windows]
        inputs = make_inputs(chunks, torch.cat(list(windows)), longest, every_row=True)
        # One layer runs at a time, so one layer's cache is all.
        kv = [layer_cache(self.spec, longest, len(windows), torch.float32)] * self.spec.num_layers
        executor = TorchExecutor(self.spec, tensors, TorchPagedAttention())
        self.step: TorchStep = executor.begin(inputs, kv)
        self._token_ids = inputs.input_ids

    @torch.inference_mode()
    def run(self, op: Op) -> None:
        if isinstance(op, Embed):
            self.step.buffers[op.out] = self._tensors.rows(op.table, self._token_ids) * op.scale
        else:
            self.step.run(op)
        match op:  # the two widest buffers, each read once
            case Attention():
                del self.step.buffers[op.qkv]
            case GatedActivation():
                del self.step.buffers[op.x]

    @torch.inference_mode()
    def logits(self) -> Iterator[Tensor]:
        """Of every position of each window, [T, vocab_size] fp32. Runs all ops first."""
        *before, head = self.spec.head_ops
        assert isinstance(head, Linear)
        for op in (*self.spec.ops, *before):
            self.run(op)
        table, cap = self._tensors.table(head.weight), self.spec.logits_soft_cap
        rows = self.step.buffers[head.x]
        lengths = [len(window) for window in self._windows]
        for hidden in torch.split(rows, lengths):
            pieces = torch.split(table, _VOCAB_PIECE)
            logits = torch.cat([functional.linear(hidden, p.float()) for p in pieces], dim=-1)
            yield logits if cap is None else torch.tanh(logits / cap) * cap
