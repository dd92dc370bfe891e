"""A Hugging Face model folder: safetensors in one file or in shards, and its JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimizer.checkpoints.checkpoint import TensorInfo, json_document
from optimizer.sources.remote_files import check_shards
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorInfo] = {}
        self._shard_of: dict[str, Path] = {}
        wanted = self._indexed()
        for path in sorted(set(wanted.values())) or [folder / _SINGLE]:
            self._read_header(path)
        for name, path in wanted.items():
            if self._shard_of.get(name) != path:
                raise ArtifactError(f"{path} holds no tensor {name}, which {_INDEX} promises")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> Tensor:
        path = self._shard_of[name]
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def codes(self, name: str) -> None:
        """Nothing: what is quantised already is refused."""

    def documents(self) -> dict[str, bytes]:
        """As they lie in the folder; newer folders hold the chat template in a file of its own."""
        documents = {name: self._bytes(name) for name in (CONFIG, TOKENIZER)}
        if self._has(GENERATION_CONFIG):
            documents[GENERATION_CONFIG] = self._bytes(GENERATION_CONFIG)
        settings = self._json(TOKENIZER_CONFIG) if self._has(TOKENIZER_CONFIG) else {}
        if self._has(_CHAT_TEMPLATE):
            settings["chat_template"] = self._bytes(_CHAT_TEMPLATE).decode()
        documents[TOKENIZER_CONFIG] = json_document(settings)
        return documents

    def _indexed(self) -> dict[str, Path]:
        """Shard of each tensor by the index file; {} for an unsharded folder."""
        if not self._has(_INDEX):
            if not self._has(_SINGLE):
                raise ArtifactError(
                    f"{self._folder} has neither {_SINGLE} nor {_INDEX}: only safetensors weights "
                    "and .gguf files can be staged"
                )
            return {}
        weight_map = self._json(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ArtifactError(f"{self._folder / _INDEX} has no weight_map")
        check_shards(weight_map.values(), str(self._folder / _INDEX))
        return {name: self._folder / shard for name, shard in weight_map.items()}

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    view = file.get_slice(name)
                    self._add(name, path, tuple(view.get_shape()), view.get_dtype())
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing") from error
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error

    def _add(self, name: str, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        if dtype not in _BYTES:
            raise ArtifactError(
                f"{path}: tensor {name} is {dtype}: a checkpoint that is quantised already "
                f"cannot be staged; these can: {', '.join(_BYTES)}"
            )
        count = 1
        for length in shape:
            count *= length
        self._tensors[name] = TensorInfo(shape, dtype, count * _BYTES[dtype])
        self._shard_of[name] = path

    def _has(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def _bytes(self, name: str) -> bytes:
        path = self._folder / name
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing") from error
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._bytes(name))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self._folder / name} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ArtifactError(f"{self._folder / name} must hold a JSON object")
        return values
