"""The builder of each supported architecture. All are flags of one decoder so far; which flags, is
config/families.py's. An unknown architecture is refused there.
"""

from __future__ import annotations

from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.decoder import build_decoder
from torchweave_ray.models.spec import DecoderSpec


def build_spec(config: ModelConfig) -> DecoderSpec:
    return build_decoder(config)
