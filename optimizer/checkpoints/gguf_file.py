"""A GGUF file seen as a Hugging Face checkpoint: names, order of rows and config translated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only architecture "llama".
Whatever the file holds that we would not compute is refused by name.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from optimizer.checkpoints.checkpoint import TensorInfo, json_document
from optimizer.checkpoints.gguf_codes import read_codes
from optimizer.checkpoints.gguf_config import hf_config, hf_generation_config
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
ROPE_FREQS = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


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
        self._by_name: dict[str, Any] = {}
        rope_factors: list[float] | None = None
        for tensor in reader.tensors:
            if tensor.name == ROPE_FREQS:
                rope_factors = [float(value) for value in tensor.data]
            else:
                self._by_name[_hf_name(tensor.name, path)] = tensor
        self._tensors = {
            name: TensorInfo(_shape(tensor), tensor.tensor_type.name, int(tensor.n_bytes))
            for name, tensor in self._by_name.items()
        }
        with _sound_metadata(path):
            self._config = hf_config(self._metadata, self._tensors, rope_factors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> Tensor:
        """float32, in Hugging Face's order of rows."""
        tensor = self._by_name[name]
        try:
            values = self._dequantized(tensor)
        except NotImplementedError as error:
            raise ArtifactError(
                f"{self._path}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantise"
            ) from error
        self._unmap()
        return self._ordered(name, torch.from_numpy(values).reshape(_shape(tensor)))

    def _dequantized(self, tensor: Any) -> np.ndarray[Any, Any]:
        """float32, some rows at a time: the package's arithmetic takes several times the result."""
        data = tensor.data
        if data.ndim == 1:
            return np.array(gguf.dequantize(data, tensor.tensor_type), dtype=np.float32)
        values = np.empty((len(data), tensor.n_elements // max(len(data), 1)), np.float32)
        step = max(1, _STEP // max(values.shape[1], 1))
        for start in range(0, len(data), step):
            rows = gguf.dequantize(data[start : start + step], tensor.tensor_type)
            values[start : start + step] = rows.reshape(-1, values.shape[1])
        return values

    def codes(self, name: str) -> QuantizedLinear | None:
        """Of Q8_0, Q4_0 and Q4_1, in Hugging Face's order of rows."""
        tensor = self._by_name[name]
        found = read_codes(tensor.data, tensor.tensor_type)
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


def _hf_name(name: str, path: Path) -> str:
    if name in _TOP:
        return _TOP[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _PARTS:
        raise ArtifactError(f"{path}: tensor {name} is not one of architecture llama that we know")
    return f"model.layers.{found[1]}.{_PARTS[found[2]]}.{found[3]}"


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists the fastest dimension first."""
    return tuple(int(length) for length in reversed(tensor.shape))


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of rotary pairs: its rows of a head are 0, h, 1, h+1, ...

    weight [rows, columns] or bias [rows]; h is half a head.
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
