"""Stage 2: whatever the source's format, one safetensors file under Hugging Face's names in the
recipe's dtype, and JSON files. A model that could not be served is refused here, by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from optimizer.checkpoints import Checkpoint, open_checkpoint
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.stages.fetch import fetched_path
from optimizer.tensor_file import Entry, write_tensors
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG, TOKENIZER, WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.weights import check_source_names, fused_tensors

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ConvertStage:
    recipe: Recipe
    progress: Progress
    name: str = "convert"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"dtype": self.recipe.dtype}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `architecture`, `dtype` and the canonical `recipe`."""
        checkpoint = open_checkpoint(fetched_path(work))
        documents = checkpoint.documents()
        config = ModelConfig.from_hf(_parse(documents[CONFIG]))
        build_spec(config)
        names = _checked_names(config, checkpoint)
        _check_tokenizer(documents[TOKENIZER], config)
        asked = self.recipe.dtype
        dtype = _source_dtype(checkpoint, names) if asked == "auto" else asked
        folder = work / self.name
        folder.mkdir(exist_ok=True)
        for name, document in documents.items():
            (folder / name).write_bytes(document)
        entries = [Entry(name, checkpoint.tensors[name].shape) for name in names]
        self.progress.expect(_ITEMSIZE[dtype] * sum(_count(entry.shape) for entry in entries))
        parts = (checkpoint.load(name) for name in names)
        write_tensors(folder / WEIGHTS, dtype, entries, parts, self.progress.advance)
        canonical = {"dtype": dtype, "quantization": self.recipe.quantization}
        return replace(manifest, architecture=config.architecture, dtype=dtype, recipe=canonical)


def _checked_names(config: ModelConfig, checkpoint: Checkpoint) -> list[str]:
    """What the model reads, in the order it is stored. Shapes are checked before any work."""
    tensors = checkpoint.tensors
    check_source_names(config, tensors)
    names = []
    for fused in fused_tensors(config):
        for name, shape in zip(fused.sources, fused.source_shapes, strict=True):
            if tensors[name].shape != shape:
                raise ArtifactError(
                    f"tensor {name} has shape {list(tensors[name].shape)}, "
                    f"{CONFIG} asks for {list(shape)}"
                )
            names.append(name)
    return names


def _check_tokenizer(document: bytes, config: ModelConfig) -> None:
    try:
        tokenizer = Tokenizer.from_str(document.decode())
    except Exception as error:  # the Rust library raises plain Exception
        raise ArtifactError(f"{TOKENIZER} cannot be read: {error}") from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= config.vocab_size:
        raise ArtifactError(
            f"{TOKENIZER} has token id {highest}, the embedding only {config.vocab_size} rows"
        )


def _source_dtype(checkpoint: Checkpoint, names: list[str]) -> str:
    """float32 only if every matrix is; float16 and quantised sources become bfloat16."""
    matrices = [
        checkpoint.tensors[name] for name in names if len(checkpoint.tensors[name].shape) > 1
    ]
    return "float32" if all(tensor.dtype in ("F32", "F64") for tensor in matrices) else "bfloat16"


def _parse(document: bytes) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(document)
    except ValueError as error:
        raise ArtifactError(f"{CONFIG} is not JSON: {error}") from error
    return values


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
