"""Where a number comes from: machine, commit, versions. No host or user names.

The rule of the house: no number without its origin. Every results file carries this.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PACKAGES = ("torch", "ray", "transformers", "numpy")
ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    """Cores this process may use: its affinity, or less by the cgroup's quota."""
    isa: tuple[str, ...]
    memory_gib: float
    """The smaller of the machine's and the cgroup's."""


@dataclass(frozen=True, slots=True)
class Origin:
    date: str
    commit: str
    """With "+dirty" when the checkout has changes; "unknown" outside one."""
    machine: Machine
    python: str
    versions: dict[str, str]


def describe_origin(root: Path | None = None) -> Origin:
    return Origin(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(root or Path(__file__).resolve().parents[2]),
        machine=describe_machine(),
        python=platform.python_version(),
        versions=installed_versions(PACKAGES),
    )


def describe_machine(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    cpuinfo = _read(proc / "cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    return Machine(
        cpu=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        cores=_cores(cgroup),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory_gib=round(memory_bytes(proc, cgroup) / 2**30, 1),
    )


def _cores(cgroup: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(cores or 1, int(quota) // int(period)))
    return cores or 1


def memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may use at most: the machine's memory or the cgroup's limit."""
    total = int((_field(_read(proc / "meminfo"), "MemTotal") or "0").split()[0]) * 1024
    limits = [total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(cgroup / name).strip()
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Read from the installed metadata: importing torch for its version would take seconds."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_results(
    kind: str, config: dict[str, Any], points: list[dict[str, Any]], folder: Path = RESULTS
) -> Path:
    """Write `<kind>-<date>-<commit>.json` and return its path."""
    origin = describe_origin()
    stamp = origin.date.replace("-", "").replace(":", "")
    path = folder / f"{kind}-{stamp}-{origin.commit.replace('+', '-')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    document = {"kind": kind, "origin": asdict(origin), "config": config, "points": points}
    path.write_text(json.dumps(document, indent=2, default=str) + "\n")
    return path


def _commit(root: Path) -> str:
    def git(*args: str) -> str:
        ran = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return ran.stdout.strip() if ran.returncode == 0 else ""

    if not (root / ".git").exists():
        return "unknown"
    commit = git("rev-parse", "--short=10", "HEAD")
    # An earlier run's results file beside this one changes no code.
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (commit + ("+dirty" if changes else "")) if commit else "unknown"


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
