"""How processes for the other ranks come to be. Here: children of this process.

deployments/ has another `Launcher`, which places them by Ray. Loads no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Summons:
    """What a new process needs to find rank 0, which tells it the rest."""

    rank: int
    port: int
    key: str
    """Known to nobody else: who comes with it is the rank."""


class RankProcess(Protocol):
    def why_ended(self) -> str | None:
        """None while it runs."""
        ...

    def kill(self) -> None:
        """At once, and never an error."""
        ...


class Launcher(Protocol):
    def launch(self, summons: Summons, device: str | None) -> RankProcess:
        """Start a process that calls `rank.serve(summons)`. `device`: which GPU of this process's
        it is to see alone; None: whichever it is given."""
        ...


class Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def why_ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Children:
    """A `Launcher`. A child ends when it notices that this process has."""

    def launch(self, summons: Summons, device: str | None) -> Child:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        process = subprocess.Popen(
            [sys.executable, "-m", "torchweave_ray.parallel.rank"],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, which knows what to do
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(asdict(summons)).encode())
        return Child(process)


def visible_devices(num_gpus: int) -> Sequence[str]:
    """Names of the GPUs that this process sees, in its order."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(num_gpus)]
