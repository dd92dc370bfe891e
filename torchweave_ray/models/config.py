"""A model's `config.json`, read strictly: what we compute from it is right or it is refused.

Owns the meaning of Hugging Face's keys in both layouts, the old (`rope_theta`, `rope_scaling`) and
that of transformers 5 (`rope_parameters`). Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG, GENERATION_CONFIG

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys that would change the computation in a way no op of ours does: any other value is refused.
# Keys in neither table nor `from_hf` are ignored because transformers' Llama does not read them.
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
    "num_local_experts": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `factor` and what follows only count for the types that name them."""

    theta: float = 10_000.0
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder, of every architecture that the registry lists."""

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
    """On q, k, v and o."""
    mlp_bias: bool = False
    """On gate, up and down."""
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Raises ArtifactError naming the key that is missing, wrong or not supported."""
        architecture = _architecture(config)
        _refuse_unsupported(config)
        max_positions = _integer(config, "max_position_embeddings")
        hidden_size = _integer(config, "hidden_size")
        num_heads = _integer(config, "num_attention_heads")
        num_kv_heads = _integer(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise _error("num_key_value_heads", num_kv_heads, f"must divide {num_heads} heads")
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise _error("head_dim", None, "is needed: hidden_size / num_attention_heads is uneven")
        head_dim = _integer(config, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise _error("head_dim", head_dim, "must be even: rotary embedding turns pairs")
        act = config.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise _error("hidden_act", act, f"is not supported; known: {', '.join(ACTIVATIONS)}")
        return cls(
            architecture=architecture,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=_positive(config, "rms_norm_eps"),
            rope=_rope(config, max_positions),
            hidden_act=ACTIVATIONS[act],
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            eos_token_ids=eos_token_ids(config),
        )


def read_hf_config(directory: Path) -> dict[str, Any]:
    """`config.json` of an artifact or checkpoint; its end tokens joined by those of
    `generation_config.json`, which may list more (Llama 3). Raises ArtifactError."""
    config = _read_json(directory / CONFIG)
    generation = directory / GENERATION_CONFIG
    if generation.is_file():
        more = eos_token_ids(_read_json(generation))
        config["eos_token_id"] = list(dict.fromkeys((*eos_token_ids(config), *more)))
    return config


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`, which may be an id, a list of ids, null or absent."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise _error("eos_token_id", value, "must be a token id or a list of token ids")
    return tuple(ids)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise _error(key, config[key], "is not supported")
    layer_types = config.get("layer_types") or []
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise _error("layer_types", layer_types, "is not supported: only full_attention is")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise _error("architectures", names, "must list exactly one architecture")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise _error("architectures", names, f"is not supported; supported: {supported}")
    return names[0]


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    values = config.get(key) or {}
    if not isinstance(values, Mapping):
        raise _error(key, values, "must be an object")
    rope_type = values.get("rope_type", values.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise _error(f"{key}.rope_type", rope_type, f"is not one of {', '.join(_ROPE_KEYS)}")
    if values.get("type", rope_type) != rope_type:
        raise _error(f"{key}.type", values["type"], f"contradicts rope_type {rope_type!r}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise _error(f"{key}.partial_rotary_factor", values["partial_rotary_factor"], "is not 1")
    known = _ROPE_KEYS[rope_type] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in values:
        if name not in known:
            raise _error(f"{key}.{name}", values[name], f"is not a key of rope type {rope_type!r}")
    outer, inner = config.get("rope_theta"), values.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise _error("rope_theta", outer, f"contradicts {key}.rope_theta {inner!r}")
    theta = _positive({"rope_theta": inner if outer is None else outer}, "rope_theta", 10_000.0)
    if rope_type == "default":
        return RopeConfig(theta)
    factor = _positive(values, "factor", where=key)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", factor)
    low = _positive(values, "low_freq_factor", where=key)
    high = _positive(values, "high_freq_factor", where=key)
    if high <= low:
        raise _error(f"{key}.high_freq_factor", high, f"must be above low_freq_factor {low}")
    trained = _integer(values, "original_max_position_embeddings", max_positions, where=key)
    return RopeConfig(theta, "llama3", factor, low, high, trained)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must hold a JSON object")
    return values


def _integer(
    values: Mapping[str, Any], key: str, default: int | None = None, where: str = ""
) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise _error(f"{where}.{key}" if where else key, value, "must be an integer above 0")
    return value


def _positive(
    values: Mapping[str, Any], key: str, default: float | None = None, where: str = ""
) -> float:
    value: Any = values.get(key)
    value = default if value is None else value
    number = float(value) if type(value) in (int, float) else 0.0
    if not 0.0 < number < float("inf"):
        raise _error(f"{where}.{key}" if where else key, value, "must be a number above 0")
    return number


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise _error(key, value, "must be true or false")
    return bool(value)


def _error(key: str, value: object, why: str) -> ArtifactError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ArtifactError(f"{CONFIG}: {key} = {shown} {why}")
