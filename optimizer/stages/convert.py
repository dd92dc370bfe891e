"""Stage 2: whatever the source's format, one safetensors file under Hugging Face's names in the
recipe's dtype, and JSON files. A model that could not be served is refused here, by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from optimizer.checkpoints import Checkpoint
from optimizer.checkpoints.checkpoint import json_document
from optimizer.checkpoints.lora import MergedCheckpoint
from optimizer.progress import Progress
from optimizer.recipe import Recipe
from optimizer.stages.fetch import open_fetched
from optimizer.tensor_file import DTYPES, TensorWriter
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import CONFIG, TOKENIZER, WEIGHTS, Manifest
from torchweave_ray.models.config import FOREIGN_KEY, SUPPORTED_ARCHITECTURES, ModelConfig
from torchweave_ray.models.registry import build_spec
from torchweave_ray.models.tensors import StoredTensor, check_source_names, fused_tensors


@dataclass(frozen=True)
class ConvertStage:
    recipe: Recipe
    progress: Progress
    name: str = "convert"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"dtype": self.recipe.dtype, "quantization": self.recipe.quantization.canonical()}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Fills `architecture`, `dtype` and the rest of the canonical `recipe`."""
        checkpoint = open_fetched(work)
        documents = checkpoint.documents()
        documents[CONFIG] = self._with_what_is_foreign(documents[CONFIG], checkpoint)
        config = ModelConfig.from_hf(_parse(documents[CONFIG]))
        if config.num_layers > len(checkpoint.tensors):
            raise ArtifactError(
                f"{CONFIG} has {config.num_layers} layers, the source only "
                f"{len(checkpoint.tensors)} tensors"
            )
        build_spec(config)
        names = _checked_names(config, checkpoint)
        if isinstance(checkpoint, MergedCheckpoint):
            checkpoint.check_read(names)
        documents[TOKENIZER] = _fitting_tokenizer(documents[TOKENIZER], config)
        dtype = self._dtype(checkpoint, names)
        folder = work / self.name
        folder.mkdir(exist_ok=True)
        for name, document in documents.items():
            (folder / name).write_bytes(document)
        entries = [
            StoredTensor(name, checkpoint.tensors[name].shape, DTYPES[dtype]) for name in names
        ]
        itemsize = DTYPES[dtype].itemsize
        self.progress.expect(itemsize * sum(_count(entry.shape) for entry in entries))
        key = json.dumps([manifest.source_sha256, manifest.recipe], sort_keys=True)
        with TensorWriter(folder / WEIGHTS, entries, self.progress.advance, key) as writer:
            for name in names[writer.num_done :]:
                writer.write(checkpoint.load(name))
        canonical = {"dtype": dtype, "quantization": self.recipe.quantization.canonical()}
        return replace(
            manifest,
            architecture=config.architecture,
            dtype=dtype,
            recipe=manifest.recipe | canonical,
        )

    def _with_what_is_foreign(self, document: bytes, checkpoint: Checkpoint) -> bytes:
        """config.json; of a model that only transformers' own code can run, with what a replica
        must know of it. Raises ArtifactError for one that it cannot run either."""
        values = _parse(document)
        names = values.get("architectures")
        if not isinstance(names, list) or any(n in SUPPORTED_ARCHITECTURES for n in names):
            return document
        if self.recipe.quantization.is_any:
            raise ArtifactError(
                f"{CONFIG}: architectures = {names!r} cannot be quantised; these can: "
                f"{', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        from torchweave_ray.hf.gate import find_out  # loads transformers

        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        return json_document({**values, FOREIGN_KEY: find_out(values, shapes)})

    def _dtype(self, checkpoint: Checkpoint, names: list[str]) -> str:
        """float32 only if it is asked for, or every matrix of the source is; float16, quantised
        sources and quantised artifacts become bfloat16."""
        if self.recipe.dtype != "auto":
            return self.recipe.dtype
        if self.recipe.quantization.is_any:
            return "bfloat16"
        shapes = {name: checkpoint.tensors[name] for name in names}
        matrices = [tensor.dtype for tensor in shapes.values() if len(tensor.shape) > 1]
        return "float32" if set(matrices) <= {"F32", "F64"} else "bfloat16"


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


def _fitting_tokenizer(document: bytes, config: ModelConfig) -> bytes:
    """Added tokens that the embedding has no row for are left out (Gemma 3's image token in its
    text models). Raises ArtifactError where other tokens are without one."""
    try:
        tokenizer = Tokenizer.from_str(document.decode())
    except BaseException as error:  # the Rust library raises plain Exception, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(f"{TOKENIZER} cannot be read: {error}") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if highest >= config.vocab_size:
        raise ArtifactError(
            f"{TOKENIZER} has token id {highest}, the embedding only {config.vocab_size} rows"
        )
    if max(tokenizer.get_vocab().values(), default=0) < config.vocab_size:
        return document
    values = _parse(document)
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < config.vocab_size]
    return json.dumps(values, ensure_ascii=False).encode()


def _parse(document: bytes) -> dict[str, Any]:
    try:
        values = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{CONFIG} must hold a JSON object")
    return values


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
