"""An Executor around a transformers model, in place of a DecoderSpec's ops: any device, slower.

Before it serves, a few tokens go through our paged attention and through the model's own, and both
must agree: a model whose flags promise more than it keeps is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from torchweave_ray.attention.base import AttentionBackend, LayerKV, StepInputs
from torchweave_ray.errors import ArtifactError
from torchweave_ray.hf.attention import NAME, PagedStep
from torchweave_ray.hf.gate import make_config
from torchweave_ray.models.config import ModelConfig

_LENGTHS = (21, 13)
_FIRST = 9  # tokens of the longer one that go first
_BLOCK = 16
_WORST = 0.1
"""Of the logits' deviation: bf16 rounds by a few hundredths, a wrong attention by about 1."""


class HfExecutor:
    """An `Executor`."""

    name = "transformers"

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], attention: AttentionBackend
    ) -> None:
        """`tensors` as the checkpoint names them, of one dtype and device. Raises ArtifactError for
        weights that do not fit, or a model that our attention does not compute."""
        assert config.foreign is not None
        self._config = config
        self._attention = attention
        some = next(iter(tensors.values()))
        self._model = _load(config, tensors, some.dtype).to(some.device).eval()
        self._check(some.device, some.dtype)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Logits of `inputs.logit_rows`: [R, vocab_size] float32."""
        logits: Tensor = self._run(
            self._model, inputs, kv, logits_to_keep=inputs.logit_rows
        ).logits[0]
        return logits.float()

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """What the head reads for `inputs.logit_rows`: [R, hidden_size] float32."""
        rows: Tensor = self._run(self._model.base_model, inputs, kv).last_hidden_state[0]
        return rows.index_select(0, inputs.logit_rows).float()

    def _run(self, model: Any, inputs: StepInputs, kv: Sequence[LayerKV], **options: Any) -> Any:
        step = PagedStep(inputs, kv, self._attention)
        found = model(
            input_ids=inputs.input_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            torchweave_step=step,
            **options,
        )
        if step.layers != list(range(self._config.num_layers)):
            raise ArtifactError(f"{self._config.architecture}: not every layer attends once")
        return found

    @torch.inference_mode()
    def _check(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab = self._config.vocab_size
        texts = [torch.randint(vocab, (n,), generator=generator).to(device) for n in _LENGTHS]
        shape = (2 * len(_LENGTHS), self._config.num_kv_heads, _BLOCK, self._config.head_dim)
        kv = [
            LayerKV(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(self._config.num_layers)
        ]
        paged = [
            self.forward(_inputs(texts, bounds, device), kv)
            for bounds in (((0, _FIRST),), ((_FIRST, _LENGTHS[0]), (0, _LENGTHS[1])))
        ]
        self._model.set_attn_implementation("eager")
        plain = [self._model(text[None], use_cache=False).logits[0].float() for text in texts]
        self._model.set_attn_implementation(NAME)
        got, expected = torch.cat(paged), torch.cat(plain)
        error = ((got - expected).square().mean().sqrt() / expected.std()).item()
        if not error <= _WORST:
            raise ArtifactError(
                f"{self._config.architecture} is not supported: our attention gives other logits "
                f"than its own, {error:.2f} of their deviation apart"
            )


def _load(config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    assert config.foreign is not None
    model_class = getattr(transformers, config.architecture)
    model, report = model_class.from_pretrained(
        None,
        config=make_config(config.foreign.hf_config),
        state_dict=dict(tensors),
        dtype=dtype,
        attn_implementation=NAME,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, report.get(kind) or ())):
            said = kind.replace("_", " ")
            raise ArtifactError(f"{config.architecture}: {said}: {found[0]} ({len(found)} in all)")
    model.config.pad_token_id = None  # or it warns of a mask that we have no need of
    return model


def _inputs(
    texts: Sequence[Tensor], bounds: Sequence[tuple[int, int]], device: torch.device
) -> StepInputs:
    """Tokens [start, end) of each text; text i has blocks 2 i and 2 i + 1."""
    ids = torch.cat([text[a:b] for text, (a, b) in zip(texts, bounds, strict=False)])
    positions = torch.cat([torch.arange(a, b) for a, b in bounds])
    slots = torch.cat([torch.arange(a, b) + 2 * i * _BLOCK for i, (a, b) in enumerate(bounds)])
    starts = torch.tensor([0, *(b - a for a, b in bounds)]).cumsum(0)
    return StepInputs(
        input_ids=ids,
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        query_start_loc=starts.int().to(device),
        seq_lens=torch.tensor([b for _, b in bounds], dtype=torch.int32, device=device),
        block_tables=torch.arange(2 * len(bounds), dtype=torch.int32, device=device).view(-1, 2),
        logit_rows=torch.arange(len(ids), device=device),
        max_query_len=max(b - a for a, b in bounds),
        max_seq_len=max(b for _, b in bounds),
    )
