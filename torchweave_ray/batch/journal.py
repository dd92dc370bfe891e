"""The results so far, in the order in which they came, in a file beside the output.

A killed run leaves it; the next one drops a torn last entry and goes on. The output itself appears
whole, in the order of the input, by one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from torchweave_ray.batch.lines import Line
from torchweave_ray.errors import ConfigError


class Journal:
    """Use as a context; holds a lock on the file, so that no two runs write the same output."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.path = output.with_name(output.name + ".part")
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Raises ConfigError when another run has it, or the folder cannot be written to."""
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another run is writing {self._output}") from None
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Out of this process at once: a kill of it loses nothing that was added."""
        self._offsets[key] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps([key, result]).encode() + b"\n")
        self._file.flush()

    def publish(self, lines: Iterable[Line]) -> None:
        """Write the output, and forget what led to it. Every line must have its result."""
        partial = self._output.with_name(self._output.name + ".new")
        with partial.open("wb") as file:
            for line in lines:
                self._file.seek(self._offsets[line.key])
                _, result = json.loads(self._file.readline())
                file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._output)
        self.path.unlink()

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for raw in self._file:
            try:
                key, _ = json.loads(raw) if raw.endswith(b"\n") else ("", None)
            except ValueError:
                break
            if not key:
                break
            self._offsets[key] = end
            end += len(raw)
        self._file.truncate(end)


def is_complete(output: Path, lines: Iterable[Line]) -> bool:
    """Whether an output is there, with a result for each of these lines and no others.

    Raises ConfigError when there is one of other lines.
    """
    if not output.exists():
        return False
    with output.open("rb") as file:
        for line in lines:
            if _id_of(file.readline()) != f"batch_req_{line.key}":
                raise ConfigError(f"{output} has results of other lines; say --overwrite")
        if file.readline():
            raise ConfigError(f"{output} has results of more lines; say --overwrite")
    return True


def _id_of(raw: bytes) -> object:
    try:
        result = json.loads(raw)
    except ValueError:
        return None
    return result.get("id") if isinstance(result, dict) else None
