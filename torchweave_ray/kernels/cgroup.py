"""The control groups over this process, version 1 and 2: where a container's limits are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's groups, each with its parents. `root` is for tests.

    Inside a container the path in /proc/self/cgroup may name folders of the host that are not
    mounted: the mount's own root, which comes last, still tells the container's limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            base, version = mount, 2
        elif controller in controllers.split(","):
            base, version = mount / controller, 1
        else:
            continue
        folder = base / path.lstrip("/")
        for parent in (folder, *folder.parents):
            if parent.is_relative_to(base):
                yield parent, version


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that this process may use; None: no limit."""
    quotas = [_quota(folder, version) for folder, version in cgroups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, version: int) -> float | None:
    try:
        if version == 2:
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None
