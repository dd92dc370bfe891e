"""The image's steps without an engine: the sources it copies become a wheel, which serves.

In a fresh environment that takes only the dependencies from this one.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.configs.test_image import ROOT, copied
from tests.serve.cluster import Client, free_port, wait_until
from tests.tiny import make_tiny_artifact

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Installed:
    wheel: Path
    bin: Path

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=cwd,
            env=environment(self.bin),
            capture_output=True,
            text=True,
            check=False,
        )


def environment(folder: Path) -> dict[str, str]:
    """This one, but for the way to the checkout."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}"}


def _pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("image")
    source = folder / "src"
    source.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    fresh = folder / "venv"
    venv.create(fresh, with_pip=False)
    python = fresh / "bin/python"
    (packages,) = (fresh / "lib").glob("python*/site-packages")
    # A plain path: no .pth file behind it is read, so no editable install of the checkout either.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    _pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    return Installed(wheel, fresh / "bin")


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def test_the_wheel_carries_kernels_recipes_and_pages(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert ("torchweave_ray/kernels/_cpu.so" in names) == _x86()
    assert "optimizer/recipes/smollm2-135m.yaml" in names
    assert "torchweave_ray/models/artifact/manifest.schema.json" in names
    assert any(name.endswith(".html") for name in names)
    assert not any(name.startswith(("tests/", "scripts/", "configs/")) for name in names)


def test_the_commands_run(installed: Installed, tmp_path: Path) -> None:
    where = installed.run(
        "python", "-c", "import torchweave_ray; print(torchweave_ray.__file__)", cwd=tmp_path
    )
    assert Path(where.stdout.strip()).is_relative_to(installed.bin.parent), where.stderr
    for command in ([], ["serve"], ["optimize"]):
        shown = installed.run("torchweave", *command, "--help", cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
    doctor = installed.run("torchweave", "doctor", "--port", str(free_port()), cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout
    assert ("native" in doctor.stdout) == _x86()


@pytest.mark.ray
def test_the_image_serves(installed: Installed, tmp_path: Path) -> None:
    """CMD, with a model that is staged already; SIGTERM ends it in order."""
    shutil.copy(ROOT / "serve_config.yaml", tmp_path)
    artifact = make_tiny_artifact(tmp_path / "tiny")
    client = Client(free_port())
    options: Sequence[str | Path] = ["--artifact", artifact, "--host", "127.0.0.1"]
    command = [installed.bin / "torchweave", "serve", *options, "--port", str(client.port)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--no-dashboard"],
            cwd=tmp_path,
            env=environment(installed.bin),
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: "[Serve] try:" in log.read_text() or process.poll() is not None, 90)
        assert client.get("/health")[0] == 200, log.read_text()
        status, model = client.get("/model")
        assert status == 200
        assert model["artifact_id"]
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    finally:
        while process.poll() is None:  # the second signal ends it and its Ray at once
            process.terminate()
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
