"""Readers of model formats, all giving the same view: `open_checkpoint` picks by what is there."""

from __future__ import annotations

from pathlib import Path

from optimizer.checkpoints.checkpoint import Checkpoint, TensorInfo
from optimizer.checkpoints.gguf_file import GgufCheckpoint
from optimizer.checkpoints.random_weights import RandomCheckpoint
from optimizer.checkpoints.safetensors_folder import SafetensorsFolder
from optimizer.checkpoints.text_part import text_part
from optimizer.sources.random_weights import MODEL

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises ArtifactError naming what is missing, damaged or not supported."""
    if path.is_file():
        return GgufCheckpoint(path)
    if (path / MODEL).is_file():
        return RandomCheckpoint(path, open_checkpoint)
    return text_part(SafetensorsFolder(path))
