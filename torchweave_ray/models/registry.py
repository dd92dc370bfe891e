"""The builder of each supported architecture. A new one is a file, a row here and its name in
`config.SUPPORTED_ARCHITECTURES`, which is where an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.llama import build_llama
from torchweave_ray.models.spec import DecoderSpec

BUILDERS: Mapping[str, Callable[[ModelConfig], DecoderSpec]] = MappingProxyType(
    {"LlamaForCausalLM": build_llama}
)


def build_spec(config: ModelConfig) -> DecoderSpec:
    return BUILDERS[config.architecture](config)
