"""CPU seconds of a process and all that it started, from /proc. Knows nothing of Ray.

Ended children count through their parent's cutime, so a worker that dies in between is not lost.
"""

from __future__ import annotations

import os
from pathlib import Path


class ProcessTree:
    """The tree below some process ids, walked anew at every reading."""

    def __init__(self, pids: list[int], proc: Path = Path("/proc")) -> None:
        self._pids = pids
        self._proc = proc
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")

    def cpu_seconds(self) -> float:
        """User and system time of the tree. Raises ProcessLookupError if a root is gone."""
        stats = self._read_all()
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
        return sum(stats[pid][1] for pid in seen) / self._ticks_per_second

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
