"""The file of KV blocks: what was written comes back or is gone, whatever happened to the file."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest

from torchweave_ray.errors import ConfigError
from torchweave_ray.runner.block_file import SUFFIX, BlockFile

KEY, OTHER = b"k" * 32, b"o" * 32
BLOCK = 1000
PLENTY = 1 << 20


def name_of(index: int) -> bytes:
    return index.to_bytes(16, "big")


def content_of(name: bytes) -> bytes:
    return blake2b(name, digest_size=50).digest() * (BLOCK // 50)


def opened(folder: Path, key: bytes = KEY, max_bytes: int = PLENTY) -> BlockFile:
    return BlockFile(folder, key, BLOCK, max_bytes)


def write(file: BlockFile, *indices: int) -> None:
    for name in map(name_of, indices):
        file.write(name, memoryview(content_of(name)))


def held(file: BlockFile, num: int = 100) -> list[int]:
    """Indices of what is given back; all of it must be right."""
    found = []
    for index in range(num):
        block = file.read(name_of(index))
        if block is not None:
            assert block == content_of(name_of(index))
            found.append(index)
    return found


def test_what_was_written_comes_back_in_another_life(tmp_path: Path) -> None:
    for start in (0, 10):
        file = opened(tmp_path)
        assert len(file) == start
        write(file, *range(start, start + 10))
        assert name_of(start) in file
        assert name_of(99) not in file
        file.close()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    file = opened(tmp_path)
    assert held(file) == list(range(20))
    assert file.num_damaged == 0
    file.close()


def test_it_stays_within_its_bound_and_forgets_what_was_used_least(tmp_path: Path) -> None:
    max_bytes = 4096 + 5 * 1088 + 1000
    file = opened(tmp_path, max_bytes=max_bytes)
    assert file.capacity == 5
    write(file, 0, 1, 2, 3, 4)
    assert held(file, 2) == [0, 1]
    write(file, 5, 6, 0)
    assert held(file) == [0, 1, 4, 5, 6]
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size <= max_bytes
    file.close()
    file = opened(tmp_path, max_bytes=4096 + 2 * 1088)
    assert len(held(file)) == 2
    assert path.stat().st_size <= 4096 + 2 * 1088
    file.close()


def test_files_of_other_models_go_and_those_of_live_processes_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    first = opened(tmp_path)
    write(first, 1)
    second, foreign = opened(tmp_path), opened(tmp_path, OTHER)
    assert len(second) == len(foreign) == 0
    write(second, 2)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3
    for each in (first, second, foreign):
        each.close()
    again = [opened(tmp_path), opened(tmp_path)]
    assert sorted(held(again[0]) + held(again[1])) == [1, 2]
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2
    for each in again:
        each.close()
    opened(tmp_path, OTHER).close()
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 1
    assert (tmp_path / "notes.txt").exists()


def test_damage_is_never_given_back(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    file = opened(whole)
    write(file, *range(20))
    file.close()
    (path,) = whole.iterdir()
    rng = random.Random(1)
    data = path.read_bytes()
    for turn in range(60):
        folder = tmp_path / str(turn)
        shutil.copytree(whole, folder)
        spoiled = bytearray(data[: rng.randrange(len(data))] if turn % 3 == 0 else data)
        for _ in range(rng.choice([1, 1, 40])):
            at = rng.randrange(max(1, len(spoiled)))
            spoiled[at : at + 1] = bytes([rng.randrange(256)]) * rng.choice([1, 1, 2000])
        (folder / path.name).write_bytes(spoiled)
        file = opened(folder)
        num_listed = len(file)
        found = held(file)
        assert num_listed == len(found) + file.num_damaged
        write(file, *range(20))
        assert held(file) == list(range(20))
        file.close()


WRITER = """
import sys
from pathlib import Path
from tests.spill.test_block_file import opened, write
file = opened(Path(sys.argv[1]), max_bytes=40_000)
print("ready", flush=True)
while True:
    write(file, *range(100))
"""


def test_a_killed_writer_leaves_nothing_wrong(tmp_path: Path) -> None:
    num_held = 0
    for turn in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.03 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        file = opened(tmp_path, max_bytes=40_000)
        num_held += len(held(file))
        assert file.num_damaged <= 1
        file.close()
    assert num_held > 30
    assert len(list(tmp_path.iterdir())) == 1


@contextmanager
def no_room_beyond(num_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_what_is_there_stays(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with no_room_beyond(4096 + 3 * 1088 + 500):
        write(file, 0, 1, 2)
        for _ in range(2):
            with pytest.raises(OSError, match=r"disk full|too large"):
                write(file, 3)
    assert held(file) == [0, 1, 2]
    write(file, 3)
    assert held(file) == [0, 1, 2, 3]
    file.close()


def test_places_of_no_use_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache\.spill\.path .*file cannot be used"):
        opened(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cache\.spill\.max_bytes 5000 holds no KV block"):
        opened(tmp_path, max_bytes=5000)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="cannot be used"):
            opened(tmp_path / "new")
