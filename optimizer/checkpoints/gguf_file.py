"""A GGUF file seen as a Hugging Face checkpoint: names, order of rows and config translated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Whatever the file holds that we would not compute is refused by name.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from optimizer.checkpoints.checkpoint import TensorInfo, json_document
from optimizer.checkpoints.gguf_codes import read_codes
from optimizer.checkpoints.gguf_config import (
    RopeFactors,
    family_of,
    hf_config,
    hf_generation_config,
)
from optimizer.checkpoints.gguf_families import TOP, GgufFamily
from optimizer.checkpoints.gguf_header import check_header
from optimizer.checkpoints.gguf_tokenizer import tokenizer_config, tokenizer_json
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.quantization import QuantizedLinear
from torchweave_ray.models.artifact import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
)

_STEP = 4 << 20
"""Elements that are dequantised at once."""
_ROPE_FACTORS: Mapping[str, str] = MappingProxyType(
    {
        "rope_freqs.weight": "llama3",
        "rope_factors_long.weight": "long",
        "rope_factors_short.weight": "short",
    }
)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor under a Hugging Face name: one of the file, or one expert of it."""

    tensor: Any
    expert: int | None = None

    @property
    def data(self) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self.tensor.data
        return found if self.expert is None else found[self.expert]

    @property
    def info(self) -> TensorInfo:
        """GGUF lists the fastest dimension first."""
        shape = tuple(int(length) for length in reversed(self.tensor.shape))
        kind, size = self.tensor.tensor_type.name, int(self.tensor.n_bytes)
        if self.expert is None:
            return TensorInfo(shape, kind, size)
        return TensorInfo(shape[1:], kind, size // shape[0])


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Slices plain arrays: a slice of np.memmap costs ten times more, and there are 250,000."""

    @property
    def data(self) -> np.ndarray[Any, Any]:
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray[Any, Any]) -> None:
        self._plain = mapped.view(np.ndarray)
        self.mapped = mapped._mmap  # type: ignore[attr-defined]


class GgufCheckpoint:
    def __init__(self, path: Path) -> None:
        self._path = path
        check_header(path)
        try:
            reader = self._reader = _Reader(path)
            self._metadata: dict[str, Any] = {
                name: field.contents()
                for name, field in reader.fields.items()
                if name[:5] != "GGUF."
            }
        except Exception as error:  # the package expects a whole file, and raises what comes
            raise ArtifactError(f"{path} is not a whole GGUF file: {error}") from error
        self._family = family_of(self._metadata)
        factors: dict[str, list[float]] = {}
        self._by_name: dict[str, _Part] = {}
        for tensor in reader.tensors:
            if tensor.name in _ROPE_FACTORS:
                factors[_ROPE_FACTORS[tensor.name]] = [float(value) for value in tensor.data]
            else:
                self._by_name |= _parts(tensor, self._family, path)
        self._tensors = {name: part.info for name, part in self._by_name.items()}
        with _sound_metadata(path):
            self._config = hf_config(self._metadata, self._tensors, RopeFactors(**factors))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> Tensor:
        """float32, in Hugging Face's order of rows."""
        part = self._by_name[name]
        try:
            values = self._dequantized(part)
        except NotImplementedError as error:
            raise ArtifactError(
                f"{self._path}: tensor {part.tensor.name} is {part.info.dtype}, which the gguf "
                "package cannot dequantise"
            ) from error
        self._unmap()
        loaded = torch.from_numpy(values).reshape(part.info.shape)
        if name.endswith("norm.weight"):
            loaded -= self._family.norm_offset
        return self._ordered(name, loaded)

    def _dequantized(self, part: _Part) -> np.ndarray[Any, Any]:
        """float32, some rows at a time: the package's arithmetic takes several times the result."""
        data, kind = part.data, part.tensor.tensor_type
        if data.ndim == 1:
            return np.array(gguf.dequantize(data, kind), dtype=np.float32)
        values = np.empty((len(data), part.info.shape[1]), np.float32)
        step = max(1, _STEP // max(values.shape[1], 1))
        for start in range(0, len(data), step):
            rows = gguf.dequantize(data[start : start + step], kind)
            values[start : start + step] = rows.reshape(-1, values.shape[1])
        return values

    def codes(self, name: str) -> QuantizedLinear | None:
        """Of Q8_0, Q4_0 and Q4_1, in Hugging Face's order of rows."""
        part = self._by_name[name]
        found = read_codes(part.data, part.tensor.tensor_type)
        if found is None:
            return None
        mins = None if found.mins is None else self._ordered(name, found.mins)
        codes, scales = self._ordered(name, found.codes), self._ordered(name, found.scales)
        self._unmap()
        return replace(found, codes=codes, scales=scales, mins=mins)

    def _unmap(self) -> None:
        """What was read stays in the page cache, but is no longer this process's memory."""
        self._reader.mapped.madvise(mmap.MADV_DONTNEED)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        if not self._family.is_permuted:
            return rows
        if ".q_proj." in name:
            return _unpermute(rows, self._config["num_attention_heads"])
        if ".k_proj." in name:
            return _unpermute(rows, self._config["num_key_value_heads"])
        return rows

    def documents(self) -> dict[str, bytes]:
        with _sound_metadata(self._path):
            return {
                CONFIG: json_document(self._config),
                GENERATION_CONFIG: json_document(hf_generation_config(self._metadata)),
                TOKENIZER: tokenizer_json(self._metadata, self._config["vocab_size"]),
                TOKENIZER_CONFIG: json_document(tokenizer_config(self._metadata)),
            }


@contextmanager
def _sound_metadata(path: Path) -> Iterator[None]:
    """A key whose value is of another type than it should be is refused, whichever it is."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ArtifactError(f"{path}: its metadata cannot be read: {error!r}") from error


def _parts(tensor: Any, family: GgufFamily, path: Path) -> dict[str, _Part]:
    """The tensor by Hugging Face name: one, or one for each expert that it holds."""
    if tensor.name in TOP:
        return {TOP[tensor.name]: _Part(tensor)}
    found = _LAYER.fullmatch(tensor.name)
    if found is None or found[2] not in family.parts:
        raise ArtifactError(
            f"{path}: tensor {tensor.name} is not one of {family.architecture} that we know"
        )
    name = f"model.layers.{found[1]}.{family.parts[found[2]]}.{found[3]}"
    if "{}" not in name:
        return {name: _Part(tensor)}
    if len(tensor.shape) != 3:
        raise ArtifactError(f"{path}: tensor {tensor.name} does not hold one matrix an expert")
    return {name.format(i): _Part(tensor, i) for i in range(int(tensor.shape[2]))}


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of rotary pairs: its rows of a head are 0, h, 1, h+1, ...

    weight [rows, columns] or bias [rows]; h is half a head.
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
