"""Writes locks/: the exact files, by hash, that the image installs. `make lock` runs it.

`requirements.txt` is everything but torch; `torch-cuda.txt` is torch as the package index has it,
with what it brings; `torch-cpu.txt` its CPU build, from wherever pip finds one for this platform.
Versions are those of constraints.txt. No address of an index gets in.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
BUILD = "setuptools>=77"
"""What building our own wheel takes, beside what it needs to run."""
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEADER = "# By `make lock`, of pyproject.toml and constraints.txt: {what}\n"


def main() -> None:
    entries = _compiled()
    torch = [entry for entry in entries if OF_TORCH.match(entry)]
    others = [entry for entry in entries if not OF_TORCH.match(entry)]
    LOCKS.mkdir(exist_ok=True)
    _write("requirements.txt", "all but torch", others)
    _write("torch-cuda.txt", "torch, its CUDA build", torch)
    _write("torch-cpu.txt", "torch, its CPU build", [_cpu_build(torch)])


def _compiled() -> list[str]:
    """Requirements with their hashes, for Linux, sorted."""
    command = ["uv", "pip", "compile", "pyproject.toml", "-", "--constraints", "constraints.txt"]
    command += [
        "--generate-hashes",
        "--no-emit-index-url",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    command += ["--no-config", "--python-version", "3.11", "--python-platform", "linux"]
    ran = subprocess.run(
        command, cwd=ROOT, input=BUILD, text=True, check=True, stdout=subprocess.PIPE
    )
    return re.findall(r"^\S.*\\\n(?:    --hash=.*\n?)+", ran.stdout, re.M)


def _cpu_build(torch: list[str]) -> str:
    version = next(entry for entry in torch if entry.startswith("torch==")).split()[0] + "+cpu"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*command, version], check=True, env={**os.environ, "PIP_CONSTRAINT": ""})
        (wheel,) = Path(folder).iterdir()
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{version} \\\n    --hash=sha256:{digest}\n"


def _write(name: str, what: str, entries: list[str]) -> None:
    text = "".join(entry.rstrip("\n") + "\n" for entry in entries)
    (LOCKS / name).write_text(HEADER.format(what=what) + text)


if __name__ == "__main__":
    main()
