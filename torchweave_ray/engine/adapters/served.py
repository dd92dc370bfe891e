"""The models that one engine serves: its own, and its own with an adapter, as `base:adapter`."""

from __future__ import annotations

import asyncio

from torchweave_ray.engine.adapters.pool import AdapterPool
from torchweave_ray.errors import model_not_found
from torchweave_ray.outputs import ModelInfo


async def served_models(info: ModelInfo, adapters: AdapterPool) -> list[ModelInfo]:
    """Adapters by name only: they are read when they are asked for."""
    if not info.has_adapters:
        return [info]
    names = await asyncio.to_thread(adapters.names)
    return [info, *(info.with_adapter(name) for name in names)]


async def served_model(model: str, info: ModelInfo, adapters: AdapterPool) -> ModelInfo:
    """Raises ModelNotFound with the names there are, InvalidRequest for an adapter of no use."""
    if model == info.id:
        return info
    base, _, name = model.rpartition(":")
    if base != info.id or not info.has_adapters:
        raise model_not_found(model, [info.id])
    return info.with_adapter(name, await asyncio.to_thread(adapters.find, name))
