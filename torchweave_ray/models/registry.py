"""The spec of every model. Ours are flags of one decoder; which flags, is config/families.py's. Of
a model that transformers computes (hf/) only the shape is known, and there are no ops.
"""

from __future__ import annotations

from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.decoder import build_decoder
from torchweave_ray.models.spec import DecoderSpec
from torchweave_ray.models.tensors import fused_tensors


def build_spec(config: ModelConfig) -> DecoderSpec:
    if config.foreign is None:
        return build_decoder(config)
    return DecoderSpec(
        architecture=config.architecture,
        ops=(),
        head_ops=(),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tensors=tuple(tensor.name for tensor in fused_tensors(config)),
    )
