"""`.ci/run`: a browser where it is to be had, and the tests' own exit status in any case."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / ".ci/run"
NEEDED = ("bash", "dirname", "env", "id", "timeout")


def ran(folder: Path, **programs: str) -> tuple[int, str]:
    """With these programs, each of one line of shell, and nothing else on the path."""
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    for name, line in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!{folder / 'bash'}\n{line}\n")
        path.chmod(0o755)
    environment = {"PATH": str(folder), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [str(folder / "bash"), str(RUN)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_browser_is_installed_where_there_is_none(tmp_path: Path) -> None:
    programs = {"apt_get": 'echo apt-get "$@"', "sudo": 'shift; "$@"', "make": 'echo make "$@"'}
    status, said = ran(tmp_path, **programs)
    assert status == 0
    lines = said.splitlines()
    assert [line.split()[-1] for line in lines] == ["-q", "chromium", "test"]


def test_one_that_is_there_is_taken(tmp_path: Path) -> None:
    programs = {"apt_get": "exit 9", "google_chrome": "exit 0", "make": 'echo make "$@"'}
    assert ran(tmp_path, **programs) == (0, "make test\n")


@pytest.mark.parametrize("more", [{}, {"apt_get": "exit 100", "sudo": 'shift; "$@"'}])
def test_without_one_the_tests_run_and_their_status_counts(
    tmp_path: Path, more: dict[str, str]
) -> None:
    status, said = ran(tmp_path, make="exit 3", **more)
    assert status == 3
    assert "the tests of the page are skipped" in said
