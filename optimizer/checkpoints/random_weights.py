"""A checkpoint of random weights: any shape of model, equal for equal seeds, one tensor at a time.

Its tokenizer is another model's, cut to the vocabulary of this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.checkpoints.checkpoint import Checkpoint, TensorInfo, json_document
from optimizer.sources.random_weights import MODEL, TOKENIZER_PATH
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.tensors import fused_tensors

_DEVIATION = 0.02
"""As Llama models are initialised."""


class RandomCheckpoint:
    def __init__(self, folder: Path, open_tokenizer: Callable[[Path], Checkpoint]) -> None:
        """`open_tokenizer` opens the checkpoint whose tokenizer is taken."""
        values = json.loads((folder / MODEL).read_text())
        self._seed: int = values["seed"]
        self._config: dict[str, Any] = values["config"]
        self._tokenizer_path = Path((folder / TOKENIZER_PATH).read_text())
        self._open_tokenizer = open_tokenizer
        config = ModelConfig.from_hf(self._config)
        self._tensors = {
            name: TensorInfo(shape, "BF16", 2 * torch.Size(shape).numel())
            for fused in fused_tensors(config)
            for name, shape in zip(fused.sources, fused.source_shapes, strict=True)
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> Tensor:
        """bfloat16: ones in norms, zeros in biases, else normal."""
        shape = self._tensors[name].shape
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape, generator=generator).mul_(_DEVIATION).to(torch.bfloat16)

    def codes(self, name: str) -> None:
        """Nothing: they are made as floats."""

    def documents(self) -> dict[str, bytes]:
        lent = self._open_tokenizer(self._tokenizer_path).documents()
        settings = json.loads(lent[TOKENIZER_CONFIG])
        settings["model_max_length"] = self._config["max_position_embeddings"]
        return {
            CONFIG: json_document(self._config),
            TOKENIZER: cut_tokenizer(lent[TOKENIZER], self._config["vocab_size"]),
            TOKENIZER_CONFIG: json_document(settings),
        }


def cut_tokenizer(document: bytes, vocab_size: int) -> bytes:
    """A BPE tokenizer.json without its ids from `vocab_size` on and the merges that lead there."""
    tokenizer = json.loads(document)
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ArtifactError(f"a tokenizer of type {model.get('type')!r} cannot be cut, a BPE can")
    kept = {token: number for token, number in model["vocab"].items() if number < vocab_size}

    def leads_to_kept(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return left in kept and right in kept and left + right in kept

    model["vocab"] = kept
    model["merges"] = [merge for merge in model["merges"] if leads_to_kept(merge)]
    added = tokenizer.get("added_tokens", [])
    tokenizer["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    return json.dumps(tokenizer, ensure_ascii=False).encode()
