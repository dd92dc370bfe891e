"""Runs stagings in forked children of one process that has loaded torch but never used it.

Started by tests as `python -m tests.optimizer.forked_stagers MODE SOURCE STORE ...`. No test here.

    crash FROM STEP   kill a child with SIGKILL at its event FROM, FROM + STEP, ...; look at the
                      store; kill the next run too, at its event 3; let the third finish
    race COUNT ...    let COUNT children stage at once
    shared SEED ...   let 8 children on two nodes (caches) of one shared store stage at once, and
                      kill half of them with SIGKILL somewhere; then one on each node

Prints one JSON line a case. Events are what touches the disk: fsync, rename, link, and progress.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimizer.stages.convert
import optimizer.stages.fuse
import optimizer.stages.pack
import optimizer.stages.publish
import optimizer.stages.quantize
import optimizer.stages.seal
import optimizer.stages.tune
import optimizer.stages.verify  # noqa: F401 - loaded here once, not in every child
from optimizer.measuring import quality, step_cost
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.sources.partial_file import PartialFile
from optimizer.tensor_file import TensorWriter
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact import verify_artifact


class Events(SilentProgress):
    """Counts what happens and kills the process at event number `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal = fatal
        self.last = 0
        self.stages: list[str] = []
        for name in ("fsync", "replace", "rename", "link", "symlink", "unlink"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.happen()
            return function(*args, **kwargs)

        return call

    def happen(self) -> None:
        self.last += 1
        if self.last == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self, stage: str) -> None:
        self.stages.append(stage)
        self.happen()

    def advance(self, num_bytes: int) -> None:
        self.happen()

    def finish(self, stage: str, seconds: float, resumed: bool) -> None:
        self.happen()


def stage_in_child(
    source: Path,
    store: str | Path,
    fatal: int | None,
    ready: Any = None,
    cache: Path | None = None,
) -> Any:
    """{"killed": True} or {"artifact": name, "stages": [...], "events": n} of the child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        if ready is not None:
            ready.wait()
        events = Events(fatal)
        directory = optimize(source, store, events, cache)
        result = {"artifact": directory.name, "stages": events.stages, "events": events.last}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)

    def result() -> Any:
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return {"killed": os.WTERMSIG(status) == signal.SIGKILL}
        return json.loads(text) if text else {"failed": status}

    return result if ready is not None else result()


def visible(store: Path) -> dict[str, Any]:
    """What a reader of the store can see, and whether each artifact in it is whole."""
    folders = [p for p in store.glob("[!.]*") if p.is_dir() and not p.is_symlink()]
    broken = []
    for folder in folders:
        try:
            verify_artifact(folder, full=True)
        except ArtifactError as error:
            broken.append(str(error))
    links = [p for p in store.glob("[!.]*") if p.is_symlink()]
    broken += [f"{link} leads nowhere" for link in links if not link.exists()]
    return {"artifacts": [folder.name for folder in folders], "broken": broken}


def crash(source: Path, root: Path, first: int, step: int) -> None:
    fatal = first
    while True:
        store = root / str(fatal)
        killed = stage_in_child(source, store, fatal)
        seen = visible(store)
        again = stage_in_child(source, store, 3)
        seen_again = visible(store)
        last = stage_in_child(source, store, None)
        case = {"fatal": fatal, "first": killed, "second": again, "last": last}
        case["broken"] = seen["broken"] + seen_again["broken"] + visible(store)["broken"]
        case["left"] = len(list((store / ".work").iterdir()))
        print(json.dumps(case), flush=True)
        shutil.rmtree(store)
        if not killed.get("killed"):
            return
        fatal += step


def race(source: Path, store: Path, count: int) -> None:
    ready = multiprocessing.Barrier(count)
    results = [stage_in_child(source, store, None, ready) for _ in range(count)]
    print(json.dumps([result() for result in results]), flush=True)


def shared(source: Path, root: Path, seed: int) -> None:
    draw = random.Random(seed)
    nodes = [root / "node0", root / "node1"]
    url = f"file://{root / 'shared'}"
    ready = multiprocessing.Barrier(8)
    fatal = [draw.randrange(2, 150) if i % 2 else None for i in range(8)]
    started = [
        stage_in_child(source, url, fatal[i], ready, nodes[i // 2 % 2]) for i in range(len(fatal))
    ]
    case = {"seed": seed, "fatal": fatal, "results": [result() for result in started]}
    case["last"] = [stage_in_child(source, url, None, None, node) for node in nodes]
    seen = [visible(folder) for folder in (*nodes, root / "shared")]
    print(json.dumps(case | {"seen": seen}), flush=True)


if __name__ == "__main__":
    step_cost.MAX_REPEATS = 1
    quality.MAX_CALIBRATION_TOKENS = 512
    PartialFile.chunk_size, TensorWriter.sync_bytes = 20_000, 30_000  # a tiny model has several
    mode, source, store = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    numbers = [int(number) for number in sys.argv[4:]]
    if mode == "crash":
        crash(source, store, *numbers)
    elif mode == "race":
        for count in numbers:
            race(source, store / str(count), count)
    else:
        for seed in numbers:
            shared(source, store / str(seed), seed)
