"""Ranks that die, fall silent or lose rank 0: a clear error, and nothing waits for ever."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import make_tiny_artifact
from torchweave_ray.build import LoadedModel, load_model
from torchweave_ray.config import EngineConfig
from torchweave_ray.errors import ConfigError, EngineDead
from torchweave_ray.llm import LLM
from torchweave_ray.parallel import ranks
from torchweave_ray.parallel.channel import connect
from torchweave_ray.parallel.launch import Child, Children, Summons
from torchweave_ray.sampling_params import SamplingParams

PROMPTS = [[5, 6, 7], [8] * 20]
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("tp") / "tiny")


class Known(Children):
    """Says which processes it started."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def launch(self, summons: Summons, device: str | None) -> Child:
        self.children.append(super().launch(summons, device))
        return self.children[-1]

    @property
    def pid(self) -> int:
        return self.children[0]._process.pid


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_dead(loaded: LoadedModel) -> bool:
    try:
        loaded.runner.check_health()
    except EngineDead:
        return True
    return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def generate_for_long(llm: LLM) -> None:
    for _ in range(200):
        llm.generate(PROMPTS, LONG)


def open_two(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, Known]:
    known = Known()
    monkeypatch.setattr("torchweave_ray.parallel.group.Children", lambda: known)
    return LLM(artifact, tensor_parallel_size=2, cache={"kv_memory": 4 << 20}), known


def test_a_rank_that_is_killed_in_a_step(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, known = open_two(artifact, monkeypatch)
    with llm:
        threading.Timer(0.2, os.kill, (known.pid, signal.SIGKILL)).start()
        with pytest.raises(EngineDead, match="rank 1 died: killed by signal 9"):
            generate_for_long(llm)
        assert is_dead(llm._loaded)
        with pytest.raises(EngineDead, match="rank 1 died"):
            llm.generate(PROMPTS, LONG)


def test_a_rank_that_dies_while_nothing_runs(artifact: Path) -> None:
    """Health says so before a request has to find out; a slice is of no use to another start."""
    known = Known()
    config = EngineConfig.from_dict({"tensor_parallel_size": 2, "cache": {"kv_memory": 4 << 20}})
    loaded = load_model(artifact, config, launcher=known)
    loaded.runner.check_health()
    os.kill(known.pid, signal.SIGTERM)
    wait_until(lambda: is_dead(loaded))
    with pytest.raises(EngineDead, match="rank 1 died: killed by signal 15"):
        loaded.runner.check_health()
    loaded.runner.close()
    loaded.lease.release()


@pytest.mark.slow
def test_a_rank_that_falls_silent(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped in the middle of a step: what waits for it is broken off."""
    llm, known = open_two(artifact, monkeypatch)
    monkeypatch.setattr(ranks, "SILENT_S", 3.0)
    with llm:
        threading.Timer(0.2, os.kill, (known.pid, signal.SIGSTOP)).start()
        with pytest.raises(EngineDead, match="rank 1 has shown no sign of life for 3 s"):
            generate_for_long(llm)
        assert not is_running(known.pid)


@pytest.mark.slow
def test_ranks_end_with_their_parent(artifact: Path) -> None:
    """However it ends: killed, or forgotten by a program that goes on."""
    code = textwrap.dedent(
        f"""
        import gc, sys
        from tests.parallel.test_failures import Known
        import torchweave_ray.parallel.group as group
        known = Known()
        group.Children = lambda: known
        from torchweave_ray.llm import LLM
        llm = LLM({str(artifact)!r}, tensor_parallel_size=2, cache={{"kv_memory": 4 << 20}})
        print(known.pid, flush=True)
        input()
        del llm
        gc.collect()
        print("forgotten", known.children[0].why_ended(), flush=True)
        llm = LLM({str(artifact)!r}, tensor_parallel_size=2, cache={{"kv_memory": 4 << 20}})
        print(known.children[1]._process.pid, flush=True)
        input()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        first = int(parent.stdout.readline())
        assert is_running(first)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "forgotten killed by signal 9\n"
        second = int(parent.stdout.readline())
        assert is_running(second)
        parent.kill()
        wait_until(lambda: not is_running(second))


@pytest.mark.slow
def test_a_ctrl_c_leaves_no_rank_behind_another(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as it was, or says that it is of no use: never wrong, and nothing waits."""
    short = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    said: list[str] = []
    for delay in (0.11, 0.17, 0.23):
        llm, _ = open_two(artifact, monkeypatch)
        with llm:
            wanted = [each.token_ids for each in llm.generate(PROMPTS, short)]
            threading.Timer(delay, _thread.interrupt_main).start()
            with pytest.raises(KeyboardInterrupt):
                generate_for_long(llm)
            try:
                assert [each.token_ids for each in llm.generate(PROMPTS, short)] == wanted
            except EngineDead as error:
                said.append(str(error))
    assert said, "most of the time is spent in steps"
    assert all("a step was interrupted" in why for why in said)


class Broken:
    """A launcher whose processes end before they have said who they are."""

    def launch(self, summons: Summons, device: str | None) -> Child:
        return Child(subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"]))


def test_a_process_that_does_not_start(artifact: Path) -> None:
    config = EngineConfig.from_dict({"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="rank 1 ended at its start: exit status 3"):
        load_model(artifact, config, launcher=Broken())


class Strangers(Broken):
    """Others come first: one guesses the key, one speaks HTTP, one is no JSON, one says nothing."""

    def launch(self, summons: Summons, device: str | None) -> Child:
        self.channels = [connect(summons.port, 5) for _ in range(4)]
        self.channels[0].send({"rank": 1, "key": "guessed"})
        self.channels[1]._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        self.channels[2]._socket.sendall(b"\0\0\0\x03{{{")
        return super().launch(summons, device)


def test_a_stranger_is_no_rank(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_HELLO_S", 0.1)
    strangers = Strangers()
    config = EngineConfig.from_dict({"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="rank 1 ended at its start"):
        load_model(artifact, config, launcher=strangers)
    for channel in strangers.channels:
        channel.close()
