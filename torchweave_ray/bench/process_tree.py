"""CPU and memory of a process and all that it started, from /proc. Knows nothing of Ray.

Ended children count through their parent's cutime, so a worker that dies in between is not lost.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
CALM_S, CALM_CORES = 2.0, 0.3


class ProcessTree:
    """The tree below some process ids, walked anew at every reading."""

    def __init__(self, pids: list[int], proc: Path = _PROC) -> None:
        self._pids = pids
        self._proc = proc
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")

    def cpu_seconds(self) -> float:
        """User and system time of the tree. Raises ProcessLookupError if a root is gone."""
        stats = self._read_all()
        return sum(stats[pid][1] for pid in self._walk(stats)) / self._ticks_per_second

    def named(self, *words: str) -> list[int]:
        """Process ids of the tree whose command line has all the words. Raises as above."""
        found = []
        for pid in sorted(self._walk(self._read_all())):
            try:
                command = (self._proc / str(pid) / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it ended while we looked
                continue
            if all(word in command for word in words):
                found.append(pid)
        return found

    def _walk(self, stats: dict[int, tuple[int, int]]) -> set[int]:
        for pid in self._pids:
            if pid not in stats:
                raise ProcessLookupError(f"there is no process {pid}")
        children: dict[int, list[int]] = {}
        for pid, (parent, _) in stats.items():
            children.setdefault(parent, []).append(pid)
        pending, seen = list(self._pids), set[int]()
        while pending:
            pid = pending.pop()
            if pid not in seen:
                seen.add(pid)
                pending += children.get(pid, ())
        return seen

    def _read_all(self) -> dict[int, tuple[int, int]]:
        """By pid: (parent, ticks of itself and its ended children)."""
        found = {}
        for path in self._proc.iterdir():
            if not path.name.isdigit():
                continue
            try:
                text = (path / "stat").read_text()
            except OSError:  # it ended while we looked
                continue
            # The name in parentheses may itself hold spaces and parentheses.
            fields = text[text.rindex(")") + 2 :].split()
            found[int(path.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
        return found


def wait_until_calm(pid: int, tries: int = 15) -> bool:
    """Until the tree below `pid` takes little CPU; False if it never does. Ray goes on starting
    workers after a server's first 200, and they are not what one wants to measure."""
    tree = ProcessTree([pid])
    for _ in range(tries):
        before = tree.cpu_seconds()
        time.sleep(CALM_S)
        if tree.cpu_seconds() - before < CALM_CORES * CALM_S:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process."""

    uss: int
    """Of pages that only this process maps: what would be free if it ended."""
    pss: int
    """Each page divided by the processes that map it."""
    rss: int
    """Of all pages."""


def memory_of(pid: int, proc: Path = _PROC) -> Memory:
    found = {"Private_": 0, "Pss:": 0, "Rss:": 0}
    for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
        for name in found:
            if line.startswith(name):
                found[name] += int(line.split()[1]) * 1024
    return Memory(*found.values())
