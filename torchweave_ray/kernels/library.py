"""Finds and loads the compiled CPU kernels, and says why there are none. Owns the thread teams.

The library is an optional part of the package's build; without it everything runs on torch.
TORCHWEAVE_ISA=avx2|avx512|avx512vnni|avx512bf16|none takes less than the machine's best.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torchweave_ray.errors import ConfigError
from torchweave_ray.kernels.structs import ABI, Op, Step

PATH = Path(__file__).with_name("_cpu.so")
ISA_VARIABLE = "TORCHWEAVE_ISA"
ISAS: Mapping[str, int] = MappingProxyType(
    {"avx2": 1, "avx512": 2, "avx512vnni": 3, "avx512bf16": 4}
)


class KernelsUnavailable(Exception):
    """There are no native kernels here; the message says why."""


class Library:
    """The kernels for one instruction set."""

    def __init__(self, functions: Any, isa: str) -> None:
        self._functions = functions
        self.isa = isa
        """One of ISAS: results of different ones differ in their last bits."""

    def create_team(self, num_threads: int) -> Team:
        return Team(self._functions, ISAS[self.isa], num_threads)


class Team:
    """Threads that run one call at a time, the caller's among them, and sleep between calls."""

    def __init__(self, functions: Any, isa: int, num_threads: int) -> None:
        assert num_threads >= 1
        self._functions = functions
        self._isa = isa
        self.num_threads = num_threads
        self._handle: int | None = functions.tw_team_create(num_threads)

    def run(self, ops: Any, num_ops: int, step: Step) -> None:
        """Run the first `num_ops` of a ctypes array of `Op`. Lets go of the GIL."""
        status = self._functions.tw_run(self._handle, self._isa, ops, num_ops, ctypes.byref(step))
        assert status == 0, status

    def sample(
        self, logits: int, num_rows: int, vocab: int, stride: int, draws: Any, ids: int
    ) -> None:
        """`logits` and `ids` are addresses, `draws` a ctypes array of `Draw`."""
        status = self._functions.tw_sample(
            self._handle, self._isa, logits, num_rows, vocab, stride, draws, ids
        )
        assert status == 0, status

    def ceiling(self, what: int, memory: int, amount: int) -> int:
        """Bytes read or operations done by nothing but that, on all threads (`structs.READ`, ...).
        `memory` is the address of `amount` bytes, or `amount` the rounds of multiplying."""
        done: int = self._functions.tw_ceiling(self._handle, self._isa, what, memory, amount)
        assert done >= 0, done
        return done

    def close(self) -> None:
        if self._handle is not None:
            self._functions.tw_team_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


def load_library(path: Path = PATH) -> Library:
    """The best kernels for this machine. Raises KernelsUnavailable, or ConfigError when
    TORCHWEAVE_ISA names what is not there."""
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted == "none":
        raise KernelsUnavailable(f"{ISA_VARIABLE} is 'none'")
    if not path.is_file():
        raise KernelsUnavailable("the native kernels were not built when this was installed")
    try:
        functions = ctypes.CDLL(str(path))
        _declare(functions)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path.name} cannot be loaded: {error}") from error
    if functions.tw_abi() != ABI:
        raise KernelsUnavailable(f"{path.name} is of another version: install the package again")
    best = functions.tw_best_isa()
    if best == 0:
        raise KernelsUnavailable("this CPU has no AVX2 with FMA")
    names = [name for name, level in ISAS.items() if level <= best]
    if wanted is not None and wanted not in names:
        raise ConfigError(f"{ISA_VARIABLE} must be none or one of {', '.join(names)} here")
    return Library(functions, wanted or names[-1])


def _declare(functions: Any) -> None:
    functions.tw_abi.restype = c_int32
    functions.tw_best_isa.restype = c_int32
    functions.tw_team_create.argtypes = (c_int32,)
    functions.tw_team_create.restype = c_void_p
    functions.tw_team_destroy.argtypes = (c_void_p,)
    functions.tw_team_destroy.restype = None
    functions.tw_run.argtypes = (c_void_p, c_int32, ctypes.POINTER(Op), c_int64, c_void_p)
    functions.tw_run.restype = c_int32
    functions.tw_sample.argtypes = (
        *(c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int64),
        *(c_void_p, c_void_p),
    )
    functions.tw_sample.restype = c_int32
    functions.tw_ceiling.argtypes = (c_void_p, c_int32, c_int32, c_void_p, c_int64)
    functions.tw_ceiling.restype = c_int64
