"""The verdicts over canned lines, and one real run of the HTTP rows against a fake server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

import pytest

from optimizer.recipe import resolve_recipe
from scripts import measure_targets
from scripts.measure_targets import (
    ROWS,
    TARGETS,
    Row,
    Run,
    Targets,
    measure_http,
    measure_served,
    verdicts,
)
from tests.bench.fake_server import FakeServer
from torchweave_ray.bench.server_process import ServerFailed


def _rows(run: Run, *names: str) -> dict[str, Row]:
    return {row.row: row for row in verdicts(run, names)}


def test_every_row_is_there_and_unmet_when_nothing_was_measured() -> None:
    for recipe, targets in TARGETS.items():
        rows = verdicts(Run(recipe, targets, failures={"load": "no server"}), ROWS)
        assert len(rows) >= 8
        assert not any(row.met for row in rows)
        assert rows[0].to_dict()["note"] == "no server"


def test_a_row_is_met_on_the_right_side_of_its_target() -> None:
    load = [
        {"concurrency": 1, "output_tok_s": 90.0},
        {"concurrency": 4, "output_tok_s": 259.9},
        {"concurrency": 16, "output_tok_s": 600.0, "ttft_ms": {"p50": 700.0}},
    ]
    tax = [{"concurrency": 16, "output_tok_s": 700.0}]
    run = Run("smollm2-135m", TARGETS["smollm2-135m"], {"load": load, "tax": tax})
    rows = _rows(run, "load", "tax")
    met = {name: row.met for name, row in rows.items()}
    assert met == {
        "tok/s at c=1": True,
        "tok/s at c=4": False,
        "tok/s at c=16": True,
        "tok/s at c=32": False,
        "TTFT p50 at c=16, s": True,
        "HTTP / in process at c=16": True,
    }
    assert rows["HTTP / in process at c=16"].to_dict()["figure"] == pytest.approx(0.857)


def test_starts_count_beyond_the_empty_application() -> None:
    ready = [
        {"profile": profile, "app": app, "seconds": seconds}
        for profile, app, seconds in (
            ("default", "empty", 13.0),
            ("default", "model", 20.0),
            ("haproxy", "empty", 17.0),
            ("haproxy", "model", 26.0),
        )
    ]
    lines = {
        "ready": ready,
        "first-token": [{"seconds": s} for s in (3.0, 9.0, 3.5)],
        "memory": [{"uss_mib": [300.0, 401.0]}],
        "batching": [
            {"target": "sse", "output_tok_s": 50.0},
            {"target": "nobatch", "output_tok_s": 20.0},
        ],
    }
    run = Run("smollm2-135m", TARGETS["smollm2-135m"], lines)
    figures = {r.row: (r.figure, r.met) for r in _rows(run, *lines).values()}
    assert figures == {
        "ready after an empty application, default, s": (7.0, True),
        "ready after an empty application, haproxy, s": (9.0, False),
        "process start to first token, s": (3.5, True),
        "USS of one of two replicas, MiB": (401.0, False),
        "batching gain at c=4": (2.5, True),
    }


def test_the_http_rows_need_nothing_but_an_address() -> None:
    run = Run("smollm2-135m", Targets({1: 1.0, 2: 1e9}, output_len=4, requests=1, prefix_rounds=1))

    async def main() -> None:
        async with FakeServer().listening() as url:
            await asyncio.to_thread(measure_http, run, ("load", "batching", "prefix"), url)

    asyncio.run(main())
    rows = _rows(run, "load", "batching", "prefix")
    assert run.failures == {}
    assert all(row.figure for row in rows.values())
    assert rows["tok/s at c=1"].met
    assert not rows["tok/s at c=2"].met


def test_a_command_that_fails_leaves_its_reason() -> None:
    run = Run("smollm2-135m", Targets({1: 1.0}))
    measure_http(run, ("load",), "http://127.0.0.1:9")
    (row,) = verdicts(run, ("load",))
    assert row.figure is None
    assert "no server at" in row.note


def test_unknown_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["measure_targets.py", "--rows", "load,speed"])
    with pytest.raises(SystemExit) as exit_:
        measure_targets.main()
    assert exit_.value.code == 2


def test_the_default_recipe_exists() -> None:
    assert resolve_recipe("smollm2-135m").name in TARGETS


def test_a_server_that_does_not_start_costs_its_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: Sequence[str]) -> NoReturn:
        raise ServerFailed("no such recipe")

    monkeypatch.setattr(measure_targets, "started_server", fails)
    run = Run("smollm2-135m", Targets({1: 1.0}), {"ready": []})
    measure_served(run, ("load", "ready"))
    assert run.failures == {"load": "the server did not start"}
