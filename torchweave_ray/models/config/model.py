"""ModelConfig: the shape and constants of a decoder, and what all families read alike.

Owns the meaning of Hugging Face's keys; what only some families have is families.py's. Knows
nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG, GENERATION_CONFIG
from torchweave_ray.models.config.families import FAMILIES, ExpertsConfig, Family
from torchweave_ray.models.config.foreign import KEY, ForeignConfig, read_foreign
from torchweave_ray.models.config.keys import flag, integer, positive, refused
from torchweave_ray.models.config.rope import RopeConfig, read_rope

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_MOST = {"num_hidden_layers": 1000, "head_dim": 1 << 14}
"""No model has so much; what a broken file says must not be counted through or allocated before it
is compared with its tensors."""

# Keys that would change the computation in a way no op of ours does: any other value is refused.
# A family may read some of them itself. Keys that nobody reads change nothing in transformers.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "auto_map": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "dual_chunk_attention_config": (None,),
    "use_bidirectional_attention": (None, False),
    "num_local_experts": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder. What follows `hidden_act` is Llama's by default."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    hidden_act: Literal["silu", "gelu_tanh"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """On q, k and v."""
    output_bias: bool = False
    """On o."""
    mlp_bias: bool = False
    """On gate, up and down."""
    qk_norm: bool = False
    """Queries and keys are normed head by head before they turn."""
    rotary_dim: int = 0
    """Dimensions of a head that turn, the first ones."""
    rotating_layers: tuple[bool, ...] = ()
    """Which layers have rope; (): all."""
    local_rope: RopeConfig | None = None
    """Of sliding layers, where it is another."""
    sliding_window: int | None = None
    """Positions that a query of a sliding layer sees, itself included."""
    sliding_layers: tuple[bool, ...] = ()
    """(): none."""
    attention_scale: float = 0.0
    """Of the products of queries and keys."""
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    norm_offset: float = 0.0
    """Norms multiply by weight + this."""
    post_norms: bool = False
    """What attention and MLP give is normed before it is added."""
    embedding_scale: float = 1.0
    experts: ExpertsConfig | None = None
    is_stored_fused: bool = False
    """A checkpoint has qkv_proj and gate_up_proj as we do."""
    foreign: ForeignConfig | None = None
    """transformers computes it; of what stands here the shape and the windows count."""
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> ModelConfig:
        """`config.json` of an artifact or checkpoint; its end tokens joined by those of
        `generation_config.json`, which may list more (Llama 3). Raises ArtifactError."""
        config = _read_json(directory / CONFIG)
        generation = directory / GENERATION_CONFIG
        if generation.is_file():
            more = eos_token_ids(_read_json(generation))
            config["eos_token_id"] = list(dict.fromkeys((*eos_token_ids(config), *more)))
        return cls.from_hf(config)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Raises ArtifactError naming the key that is missing, wrong or not supported."""
        if KEY in config:
            return _foreign(config)
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        config = {**family.defaults, **config}
        _refuse_unsupported(config, family)
        max_positions = integer(config, "max_position_embeddings")
        num_heads, num_kv_heads, head_dim = _heads(config)
        rotary_dim = _rotary_dim(config, head_dim, family)
        num_layers = integer(config, "num_hidden_layers")
        _refuse_huge(num_hidden_layers=num_layers, head_dim=head_dim)
        plain = cls(
            architecture=architecture,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=positive(config, "rms_norm_eps"),
            rope=read_rope(_global_rope(config, family), max_positions, rotary_dim, family.theta),
            hidden_act=_activation(config),
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            rotary_dim=rotary_dim,
            attention_scale=head_dim**-0.5,
            eos_token_ids=eos_token_ids(config),
        )
        return replace(plain, **family.flags(config, num_layers))


def _foreign(config: Mapping[str, Any]) -> ModelConfig:
    (name,) = config["architectures"]
    return ModelConfig(
        architecture=name,
        intermediate_size=0,
        rms_norm_eps=0.0,
        rope=RopeConfig(),
        eos_token_ids=eos_token_ids(config),
        **read_foreign(config),
    )


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`, which may be an id, a list of ids, null or absent."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise refused("eos_token_id", value, "must be a token id or a list of token ids")
    return tuple(ids)


def _refuse_huge(**values: int) -> None:
    for key, value in values.items():
        if value > _MOST[key]:
            raise refused(key, value, f"must be at most {_MOST[key]}")


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for key, neutral in _NEUTRAL.items():
        if key not in family.reads and config.get(key) not in neutral:
            raise refused(key, config[key], "is not supported")
    layer_types = config.get("layer_types") or []
    if "layer_types" not in family.reads and any(t != "full_attention" for t in layer_types):
        raise refused("layer_types", layer_types, "is not supported: only full_attention is")


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(heads, KV heads, dimensions of one)"""
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    num_kv_heads = integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise refused("num_key_value_heads", num_kv_heads, f"must divide {num_heads} heads")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise refused("head_dim", None, "is needed: hidden_size / num_attention_heads is uneven")
    head_dim = integer(config, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise refused("head_dim", head_dim, "must be even: rotary embedding turns pairs")
    return num_heads, num_kv_heads, head_dim


def _rotary_dim(config: Mapping[str, Any], head_dim: int, family: Family) -> int:
    """`partial_rotary_factor` stands outside or with the rope's keys."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key)
    inner = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    outer = config.get("partial_rotary_factor")
    if "partial_rotary_factor" not in family.reads and inner not in (None, 1.0):
        raise refused(f"{key}.partial_rotary_factor", inner, "is not supported")
    if inner is not None and outer is not None and inner != outer:
        raise refused("partial_rotary_factor", outer, f"contradicts the rope's {inner!r}")
    factor = inner if outer is None else outer
    factor = 1.0 if factor is None else factor
    dim: float = head_dim * factor if type(factor) in (int, float) else 0.0
    if not 0 < dim <= head_dim or int(dim) % 2:
        raise refused("partial_rotary_factor", factor, f"leaves no even part of {head_dim}")
    return int(dim)


def _global_rope(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """transformers 5 lists the ropes of full and of sliding layers apart."""
    nested = config.get("rope_parameters")
    if not family.has_local_rope or not isinstance(nested, Mapping):
        return config
    if not isinstance(nested.get("full_attention"), Mapping):
        raise refused("rope_parameters", nested, "must have full_attention and sliding_attention")
    return {**config, "rope_parameters": nested["full_attention"]}


def _activation(config: Mapping[str, Any]) -> Literal["silu", "gelu_tanh"]:
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    act = config.get(key, "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise refused(key, act, f"is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise refused("architectures", names, "must list exactly one architecture")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise refused("architectures", names, f"is not supported; supported: {supported}")
    return names[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must hold a JSON object")
    return values
