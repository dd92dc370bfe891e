"""The protocol of a checkpoint: a model as Hugging Face names it, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.quantization import QuantizedLinear


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str
    """The source's own word for it: "BF16", "Q4_1"."""
    nbytes: int
    """As stored in the source."""


class Checkpoint(Protocol):
    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By Hugging Face name."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor in a floating point dtype that holds all its digits."""
        ...

    def codes(self, name: str) -> QuantizedLinear | None:
        """The matrix as the source has quantised it, if that is one of our formats: its
        `dequantize` gives the very numbers of `load`."""
        ...

    def documents(self) -> dict[str, bytes]:
        """The small JSON files of the artifact by file name: config and tokenizer."""
        ...


def json_document(values: Mapping[str, Any]) -> bytes:
    """Raises ArtifactError for text that no file can hold."""
    try:
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(f"a document of the model holds no valid Unicode: {error}") from error
