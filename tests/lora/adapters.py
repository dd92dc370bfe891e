"""Random LoRA adapters as PEFT leaves them, of any tiny model. No test in here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.lora.fitted import FittedAdapter, fit
from torchweave_ray.models.lora.peft import LoraAdapter
from torchweave_ray.models.tensors import fused_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def make_adapter(
    folder: Path,
    model: Path,
    modules: Sequence[str] = ATTENTION + MLP,
    rank: int = 4,
    seed: int = 0,
    strength: float = 0.3,
    **config: Any,
) -> Path:
    """For the model in a folder with a config.json. `strength`: of its delta beside the weights,
    which are some 2 / sqrt(k) large."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for name, (n, k) in shapes_of(model).items():
        if name.rpartition(".")[2] not in modules:
            continue
        a = torch.randn(rank, k, generator=generator) / k**0.5
        b = strength * torch.randn(n, rank, generator=generator) / rank**0.5
        held[f"base_model.model.{name}.lora_A.weight"] = a
        held[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(held, folder / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def shapes_of(model: Path) -> Mapping[str, tuple[int, ...]]:
    """Of each module of the layers, by its Hugging Face name."""
    config = ModelConfig.read(model)
    return {
        name.removesuffix(".weight"): shape
        for tensor in fused_tensors(config)
        if tensor.group == "layers"
        for name, shape in zip(tensor.sources, tensor.source_shapes, strict=True)
    }


def fitted(folder: Path, model: Path) -> FittedAdapter:
    config = ModelConfig.read(model)
    return fit(LoraAdapter(folder), fused_tensors(config))
