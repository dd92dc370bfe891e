"""The language model out of a checkpoint that reads images, too: what is named here of the whole is
what its text-only sibling calls its own. Eyes are left where they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optimizer.checkpoints.checkpoint import Checkpoint, TensorInfo, json_document
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.quantization import QuantizedLinear
from torchweave_ray.models.artifact import CONFIG

_SIBLINGS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
}
_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
_EYES = ("vision_tower.", "multi_modal_projector.")
_FROM_WHOLE = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
)

logger = logging.getLogger("torchweave.optimizer")


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it has no other part."""
    try:
        config = json.loads(checkpoint.documents()[CONFIG])
    except (ValueError, RecursionError):
        return checkpoint  # whoever reads the configuration says what is wrong with it
    match config:
        case {"architectures": [str(name)]} if name in _SIBLINGS:
            logger.info("[Optimizer] of %s its text part is staged, as %s", name, _SIBLINGS[name])
            return TextPart(checkpoint, _SIBLINGS[name], config)
    return checkpoint


class TextPart:
    """A `Checkpoint`."""

    def __init__(self, whole: Checkpoint, architecture: str, config: Mapping[str, Any]) -> None:
        """`config`: of the whole. Raises ArtifactError for one without a text part."""
        self._whole = whole
        self._names = {_own_name(name): name for name in whole.tensors if not _is_eye(name)}
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ArtifactError(f"{CONFIG}: text_config = {text!r} must be an object")
        self._config = _completed(text) | {"architectures": [architecture]}
        self._config |= {key: config[key] for key in _FROM_WHOLE if key in config}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {own: self._whole.tensors[name] for own, name in self._names.items()}

    def load(self, name: str) -> Tensor:
        return self._whole.load(self._names[name])

    def codes(self, name: str) -> QuantizedLinear | None:
        return self._whole.codes(self._names[name])

    def documents(self) -> dict[str, bytes]:
        return self._whole.documents() | {CONFIG: json_document(self._config)}


def _completed(text: Mapping[str, Any]) -> dict[str, Any]:
    """Published ones leave out what transformers' configuration class fills in."""
    from torchweave_ray.hf.gate import make_config  # loads transformers

    values: dict[str, Any] = make_config(text).to_dict()
    return values


def _is_eye(name: str) -> bool:
    return name.removeprefix("model.").startswith(_EYES)


def _own_name(name: str) -> str:
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
