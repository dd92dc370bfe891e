"""Whether transformers' own code can run a model on our paged cache, found out when it is staged.

Flags alone are not enough: a forward of one token without weights says what each layer attends
with. hf/executor.py compares logits besides, when the weights are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from torchweave_ray.attention.base import AttentionShape
from torchweave_ray.errors import ArtifactError
from torchweave_ray.hf.attention import NAME, Probe
from torchweave_ray.models.artifact import CONFIG
from torchweave_ray.models.config import SUPPORTED_ARCHITECTURES

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def find_out(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What ForeignConfig reads, of a `config.json` and its checkpoint's shapes.

    Raises ArtifactError that says why, and what is supported.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    try:
        model_class = _model_class(name, config)
        hf_config = make_config(config)
        shapes = _probe(model_class, hf_config)
    except ArtifactError as error:
        raise ArtifactError(
            f"{CONFIG}: architectures = {names!r} is not supported: {error}. Supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}, and models of transformers whose attention "
            "is full or sliding and can be replaced"
        ) from error
    positions = getattr(hf_config, "max_position_embeddings", None)
    if type(positions) is not int:
        raise ArtifactError(f"{CONFIG}: max_position_embeddings = {positions!r} is not known")
    shape = shapes[0]
    return {
        "vocab_size": hf_config.vocab_size,
        "hidden_size": hf_config.hidden_size,
        "num_layers": hf_config.num_hidden_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": positions,
        "sliding_windows": [each.sliding_window for each in shapes],
        "tensors": {name: list(dims) for name, dims in sorted(tensors.items())},
    }


def make_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object, which fills in what the file leaves out."""
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # its validation raises what comes
        raise ArtifactError(f"transformers cannot read its configuration: {error}") from error


def _model_class(name: object, config: Mapping[str, Any]) -> Any:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    if not isinstance(name, str) or name != causal:
        raise ArtifactError("transformers has no causal language model of this name")
    if config.get("auto_map") is not None:
        raise ArtifactError("it brings code of its own (auto_map)")
    if config.get("quantization_config") is not None:
        raise ArtifactError("it is quantised already (quantization_config)")
    model_class = getattr(transformers, name)
    if not model_class._supports_attention_backend:
        raise ArtifactError("its attention cannot be replaced (_supports_attention_backend)")
    arguments = inspect.signature(model_class.forward).parameters
    for needed in ("position_ids", "logits_to_keep"):
        if needed not in arguments:
            raise ArtifactError(f"its forward takes no {needed}")
    return model_class


def _probe(model_class: Any, config: Any) -> list[AttentionShape]:
    """One token through every layer, without weights."""
    if unknown := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        raise ArtifactError(f"it has layers of type {', '.join(sorted(unknown))}")
    probe, token = Probe(), torch.zeros(1, 1, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"):
            model = model_class._from_config(config, attn_implementation=NAME, dtype=torch.bfloat16)
        model.config.pad_token_id = None  # some models look for it among the tokens
        with torch.inference_mode():
            model(token, position_ids=token, use_cache=False, torchweave_step=probe)
    except ArtifactError:
        raise
    except Exception as error:  # models raise what comes
        raise ArtifactError(f"one token without weights fails: {error!r}") from error
    if sorted(probe.shapes) != list(range(config.num_hidden_layers)):
        raise ArtifactError(f"{len(probe.shapes)} of {config.num_hidden_layers} layers attend")
    kinds = {(s.num_heads, s.num_kv_heads, s.head_dim) for s in probe.shapes.values()}
    if len(kinds) != 1:
        raise ArtifactError("its layers have attention of different shapes")
    return [probe.shapes[layer] for layer in range(config.num_hidden_layers)]
