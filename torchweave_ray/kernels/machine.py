"""This machine's CPU, as far as it decides how fast a model runs on it: cores and a fingerprint."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from torchweave_ray.kernels.cgroup import cpu_quota


def num_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use. A container's quota counts in whole ones: threads beyond it
    would stop in the middle of a product until the next period. `root` is for tests."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def fingerprint(executor: str, threads: int) -> dict[str, str | int]:
    """What measured speeds hold for; plain JSON. `executor` names the instruction set, too."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "executor": executor,
        "threads": threads,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As Linux names it, with the model's number: virtual machines shorten the name."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        fields = {}
    names = ("model name", "cpu family", "model", "stepping")
    found = [fields[name] for name in names if fields.get(name)]
    return " ".join(found) if "model name" in fields else platform.machine()
