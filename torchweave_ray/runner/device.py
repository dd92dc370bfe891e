"""Where the model runs: device, dtype, threads, free memory. The only file that may say "cuda".

Knows no model. Memory that a container may not have counts as not there: cgroup v1 and v2 limits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.kernels.cgroup import cgroups
from torchweave_ray.kernels.machine import num_cores

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROOT = Path("/")
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Limit, usage and a key of memory.stat, by the version of the cgroup."""


def resolve_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """auto: a GPU where torch sees one. Raises ConfigError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if choice == "cuda" and not has_gpu:
        built = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(f"runner.device is 'cuda' but torch {torch.__version__} {built}")
    return torch.device("cuda" if has_gpu and choice != "cpu" else "cpu")


def resolve_dtype(choice: str, artifact_dtype: str) -> torch.dtype:
    """auto: the artifact's. Raises ArtifactError for one that no executor computes in."""
    name = artifact_dtype if choice == "auto" else choice
    if name not in _DTYPES:
        raise ArtifactError(f"dtype {name!r} of the artifact is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def resolve_kv_dtype(
    choice: Literal["auto", "model", "int8"], artifact_kv_dtype: str, dtype: torch.dtype
) -> torch.dtype:
    """auto: what the artifact's recipe asked for; model: what the model computes in."""
    name = artifact_kv_dtype if choice == "auto" else choice
    return torch.int8 if name == "int8" else dtype


def set_num_threads(threads: int | None) -> int:
    """Let torch use so many CPU threads; None: all cores of this process. Returns the number."""
    threads = threads or num_cores()
    torch.set_num_threads(threads)
    return threads


def num_gpus() -> int:
    """That torch sees."""
    return torch.cuda.device_count()


def numerics_path(device: torch.device) -> str:
    """What, besides artifact, executor and dtype, decides the last bits of a result."""
    if device.type == "cuda":
        return f"torch {torch.__version__} {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


def why_no_triton(device: torch.device, may_interpret: bool = False) -> str | None:
    """Why our Triton kernels cannot run on the device; None: they can. Imports no triton.
    `may_interpret`: on a CPU, too, where its interpreter is turned on."""
    is_interpreted = may_interpret and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not is_interpreted:
        return "the device is a CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else None


def gpu_fingerprint(device: torch.device) -> dict[str, str | int]:
    """What measured speeds hold for, of a GPU; {} of a CPU, which has one of its own."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {"gpu": torch.cuda.get_device_name(device), "architecture": f"sm_{major}{minor}"}


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device. Nothing waits for it: it goes through pinned memory to a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the host, as they are now; later changes of them do not matter."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.Event | None = None
        self._copies = [self._copy(tensor) for tensor in tensors]
        if self._event is not None:
            self._event.record()

    def get(self) -> list[Tensor]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        self._event = self._event or torch.Event(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What `run` takes at most beyond what is taken before it; 0 on a CPU, where it is not run."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


class DeviceGraph:
    """A CUDA graph; all of a pool share the memory of what lies between their ops."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        torch.cuda.synchronize()
        # Other threads may go on meanwhile: an adapter may be on its way to the device.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()


def graphs_of(device: torch.device) -> Callable[[], DeviceGraph] | None:
    """Makes graphs of one pool; None: the device has none."""
    if device.type != "cuda":
        return None
    return partial(DeviceGraph, torch.cuda.graph_pool_handle())


def release_cached_memory() -> None:
    """Give the system what a GPU's allocator keeps of memory that nobody uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_host_memory(root: Path = _ROOT) -> int:
    """min(MemAvailable, what each cgroup over this process leaves). `root` is for tests."""
    frees = [_cgroup_free(folder, *_FILES[version]) for folder, version in cgroups("memory", root)]
    available = _mem_available(root / "proc/meminfo")
    return max(0, min(free for free in (*frees, available) if free is not None))


def _mem_available(meminfo: Path) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: physical memory, half of which we take for used.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_free(folder: Path, limit: str, usage: str, inactive: str) -> int | None:
    """Limit minus use, page cache that the kernel drops first not counted; None: no limit."""
    try:
        text = (folder / limit).read_text().strip()
        if text == "max":
            return None
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(text) - used + int(stat.get(inactive, 0))
    except (OSError, ValueError):
        return None
