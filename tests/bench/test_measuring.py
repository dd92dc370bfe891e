"""Percentiles, CPU of a process tree, and where a number comes from."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from torchweave_ray.bench.origin import describe_machine, memory_bytes, save_results
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.report.points import RequestRecord, quantile, summarize
from torchweave_ray.bench.report.tables import failures, points_table


def test_a_point_from_two_requests_by_hand() -> None:
    records = [
        RequestRecord(0.0, 1.0, (0.4, 0.6, 1.0), prompt_tokens=10, output_tokens=3),
        RequestRecord(0.0, 2.0, (0.2, 2.0), prompt_tokens=10, output_tokens=3),
        RequestRecord(0.0, 0.1, error="HTTP 429"),
    ]
    point = summarize("t", 2, records, wall_s=2.0, client_cpu_s=0.003, server_cpu_s=0.6)
    assert (point.requests, point.failed, point.errors) == (3, 1, ("HTTP 429",))
    assert point.output_tok_s == 3.0
    assert point.ttft_ms is not None
    assert point.ttft_ms.p50 == pytest.approx(300.0)
    assert point.ttft_ms.p90 == pytest.approx(380.0)
    assert point.ttft_ms.p95 == pytest.approx(390.0)
    assert point.ttft_ms.p99 == pytest.approx(398.0)
    assert point.itl_ms is not None
    assert point.itl_ms.mean == pytest.approx(800.0)  # 0.2, 0.4 and 1.8 s
    assert point.tpot_ms is not None
    assert point.tpot_ms.p50 == pytest.approx(600.0)  # 0.3 and 0.9 s
    assert point.client_cpu_ms_per_token == pytest.approx(0.5)
    assert point.server_cpu_ms_per_token == pytest.approx(100.0)


def test_nothing_measured_is_left_out() -> None:
    point = summarize("t", 1, [RequestRecord(0.0, 1.0, error="refused")], wall_s=1.0)
    line = json.loads(json.dumps(point.to_dict()))
    assert line["failed"] == 1
    assert line["errors"] == ["refused"]
    assert not {"ttft_ms", "itl_ms", "tpot_ms", "request_ms"} & set(line)


def test_quantiles_interpolate() -> None:
    assert quantile([1.0], 0.99) == 1.0
    assert quantile([0.0, 10.0], 0.5) == 5.0
    assert quantile([0.0, 1.0, 2.0, 3.0, 4.0], 0.99) == pytest.approx(3.96)


def _process(proc: Path, pid: int, parent: int, own: int, ended: int) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    ticks = f"{own} 0 {ended} 0"
    (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} {'0 ' * 9}{ticks} 20 0 1")


def test_cpu_of_a_tree_counts_children_living_and_ended(tmp_path: Path) -> None:
    _process(tmp_path, 1, 0, own=7, ended=0)
    _process(tmp_path, 10, 1, own=100, ended=5)
    _process(tmp_path, 11, 10, own=20, ended=0)
    _process(tmp_path, 12, 11, own=3, ended=0)
    (tmp_path / "meminfo").touch()
    ticks = os.sysconf("SC_CLK_TCK")
    assert ProcessTree([10], tmp_path).cpu_seconds() == pytest.approx(128 / ticks)
    assert ProcessTree([10, 11], tmp_path).cpu_seconds() == pytest.approx(128 / ticks)
    with pytest.raises(ProcessLookupError, match="99"):
        ProcessTree([99], tmp_path).cpu_seconds()


def test_cpu_of_this_process_is_read_from_the_real_proc() -> None:
    assert ProcessTree([os.getpid()]).cpu_seconds() > 0


def test_memory_is_the_smaller_of_machine_and_cgroup(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       8388608 kB\n")
    assert memory_bytes(tmp_path, tmp_path) == 8 * 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path, tmp_path) == 8 * 2**30
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert memory_bytes(tmp_path, tmp_path) == 2**30


def test_machine_reads_model_and_isa(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1048576 kB\n")
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16\n")
    machine = describe_machine(tmp_path, tmp_path)
    assert (machine.cpu, machine.isa) == ("Some CPU", ("avx2", "avx512_bf16"))
    assert machine.cores >= 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert describe_machine(tmp_path, tmp_path).cores == 1


def test_results_carry_their_origin(tmp_path: Path) -> None:
    path = save_results("serving", {"input_len": 100}, [{"failed": 0}], tmp_path / "results")
    document = json.loads(path.read_text())
    assert document["kind"] == "serving"
    assert {"date", "commit", "machine", "python", "versions"} <= set(document["origin"])
    assert document["config"] == {"input_len": 100}
    assert path.name.startswith("serving-")


def test_the_table_fits_a_pipe_and_names_failures() -> None:
    slow = RequestRecord(0.0, 98.7654, (12.3456, 98.7), prompt_tokens=100, output_tokens=128)
    broken = RequestRecord(0.0, 0.1, error="HTTP 429")
    point = summarize("completions", 128, [slow, broken], wall_s=0.1, server_cpu_s=12.3)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(points_table([point]))
    header, row = console.export_text().splitlines()[1:3]
    assert len(row) <= 80
    assert "…" not in row
    assert row.split()[:4] == ["completions", "c=128", "1280.0", "12.3s/12.3s"]
    assert header.split()[-1] == "CPU/token"
    assert list(failures([point])) == ["completions c=128: 1 of 2 failed: HTTP 429"]
