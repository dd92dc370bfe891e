"""The doctor's checks: each looks at one thing and says ok, warn or fail in words.

warn: it works, or will once `torchweave serve` has done its part. fail: serving cannot work.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from torchweave_ray.bench.origin import describe_machine, memory_bytes
from torchweave_ray.errors import TorchWeaveError

MIN_MEMORY_GIB = 2.0
MIN_DISK_GIB = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


def run_checks(port: int) -> list[Check]:
    return [
        _python(),
        _packages(),
        *_machine(),
        _device(),
        _kernels(),
        *_artifacts(),
        _port(port),
    ]


def _python() -> Check:
    text = ".".join(map(str, sys.version_info[:3]))
    status: Literal["ok", "fail"] = "ok" if sys.version_info >= (3, 11) else "fail"
    return Check("python", status, f"{text} at {sys.executable}")


def _packages() -> Check:
    """Every requirement of our own metadata, by installed version. Imports nothing."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for text in requires("torchweave-ray") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
        elif requirement.name in ("ray", "torch", "transformers"):
            found.append(f"{requirement.name} {installed}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong) + "; run `make setup`")
    return Check("packages", "ok", ", ".join(found))


def _machine() -> Iterator[Check]:
    machine = describe_machine()
    isa = ", ".join(machine.isa) or "no AVX2 or better"
    yield Check("cpu", "ok", f"{machine.cpu}, {machine.cores} cores, {isa}")
    enough = machine.memory_gib >= MIN_MEMORY_GIB
    note = "" if enough else f"; at least {MIN_MEMORY_GIB:g} GiB are needed"
    yield Check("memory", "ok" if enough else "fail", f"{machine.memory_gib} GiB{note}")


def _device() -> Check:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Check("device", "fail", f"torch cannot be loaded: {error}")
    if not torch.cuda.is_available():
        return Check("device", "ok", f"cpu, torch {torch.__version__}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    from torchweave_ray.runner.device import resolve_device, why_no_triton

    said = f"cuda: {', '.join(names)}, torch {torch.__version__}"
    if why := why_no_triton(resolve_device("auto")):
        return Check("device", "warn", f"{said}; plain torch serves: {why}")
    return Check("device", "ok", f"{said}, with our Triton kernels")


def _kernels() -> Check:
    from torchweave_ray.kernels.library import ISA_VARIABLE, KernelsUnavailable, load_library

    try:
        isa = load_library().isa
    except (KernelsUnavailable, TorchWeaveError) as error:
        return Check("kernels", "warn", f"{error}: the torch executor serves")
    chosen = f" ({ISA_VARIABLE} is set)" if os.environ.get(ISA_VARIABLE) else ""
    return Check("kernels", "ok", f"native, {isa}{chosen}: bfloat16 models on the CPU use them")


def _artifacts() -> Iterator[Check]:
    from torchweave_ray.models.artifact import verify_artifact

    folders = artifact_folders()
    for folder in folders:
        try:
            manifest = verify_artifact(folder)
        except TorchWeaveError as error:
            yield Check("artifact", "fail", str(error))
        else:
            yield Check("artifact", "ok", f"{folder} ({manifest.architecture}, {manifest.dtype})")
    if not folders:
        yield Check("artifact", "warn", f"none in {_store()} yet: `torchweave optimize` makes one")
    yield _disk(_store())


def artifact_folders() -> list[Path]:
    """The one that ARTIFACT_MODEL_DIR names, or what the store holds."""
    from torchweave_ray.models.artifact import MANIFEST

    if chosen := os.environ.get("ARTIFACT_MODEL_DIR"):
        return [Path(chosen).expanduser()]
    return sorted(p.parent for p in _store().glob(f"*/{MANIFEST}") if not p.parent.is_symlink())


def device_and_memory() -> tuple[str, int]:
    """What serves, and the bytes that it may use at most."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "cpu", memory_bytes()
    return "cuda", int(torch.cuda.get_device_properties(0).total_memory)


def _store() -> Path:
    return Path(os.environ.get("ARTIFACT_DIR") or "artifacts").expanduser().absolute()


def _disk(store: Path) -> Check:
    place = next(path for path in (store, *store.parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        return Check("store", "warn", f"{place} cannot be written: no model can be staged there")
    if free < MIN_DISK_GIB:
        return Check("store", "warn", f"only {free:.1f} GiB free at {place}")
    return Check("store", "ok", f"{free:.1f} GiB free at {place}")


def _port(port: int) -> Check:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            return Check("port", "warn", f"{port} cannot be taken: {error.strerror}")
    return Check("port", "ok", f"{port} is free")
