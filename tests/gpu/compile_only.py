"""A Triton driver of a GPU that is not there: kernels are compiled for it, by the launches of the
real code over CPU tensors, and never run. No test in here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes that a block may have, by compute capability."""


class CompileOnly:
    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.compiled: dict[str, int] = {}
        """Bytes of shared memory, by kernel: the most of its variants."""
        properties = {"max_shared_mem": SHARED_MEMORY[capability]}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=self._load
        )

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.compiled[name] = max(shared, self.compiled.get(name, 0))
        return None, None, 0, 0, 1024


def compile_only(capability: int) -> CompileOnly:
    """Kernels launched from now on are compiled for this capability, 90 being 9.0."""
    active = CompileOnly(capability)
    driver.set_active(active)
    return active
