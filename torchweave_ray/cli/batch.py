"""`torchweave batch`: a file of requests in OpenAI's batch format, answered into another file."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchweave_ray.cli.artifact import AsJson, EngineFile, Model, artifact_of, read_engine_options

if TYPE_CHECKING:
    from torchweave_ray.batch.journal import Journal

REPORT_S = 5.0
AtOnce = Annotated[int | None, typer.Option(help="Requests at once. Default: 64.", min=1)]
Anew = Annotated[bool, typer.Option("--overwrite", help="Forget the results that are there.")]


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One result a line.")],
    model: Model = None,
    model_id: Annotated[
        str | None,
        typer.Option("--id", help="What requests call the model. Default: its folder's name."),
    ] = None,
    engine: EngineFile = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this server instead of an engine of our own.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(help="Above 0: so many engines over a Ray cluster, by Ray Data.", min=0),
    ] = 0,
    concurrency: AtOnce = None,
    overwrite: Anew = False,
    as_json: AsJson = False,
) -> None:
    """Answer every line of IN.jsonl into OUT.jsonl, in its order.

    A run that was killed goes on where it was when it is started again.
    """
    from torchweave_ray.batch.lines import read_lines
    from torchweave_ray.errors import ConfigError

    if url is not None and (workers or model or model_id or engine):
        raise ConfigError("--url asks a server: its model, engine and workers are the server's")
    journal = _journal_of(source, output, overwrite)
    if journal is None:
        print(f"[Batch] {output} is complete already", file=sys.stderr)
        if as_json:
            print(json.dumps({"output": str(output), "done": 0}))
        return
    with journal:
        report = _Report(sum(line.key in journal for line in read_lines(source)))
        if url is not None:
            _over_server(source, journal, url, concurrency or 64, report)
        else:
            options, artifact = read_engine_options(engine), artifact_of(model)
            if workers:
                _over_ray(source, journal, artifact, options, model_id, workers, report)
            else:
                _here(source, journal, artifact, options, model_id, concurrency or 64, report)
        journal.publish(read_lines(source))
    report.show(f"-> {output}")
    if as_json:
        print(json.dumps({"output": str(output), **report.counts()}))


def _journal_of(source: Path, output: Path, overwrite: bool) -> Journal | None:
    """None: there is nothing left to do."""
    from torchweave_ray.batch.journal import Journal, is_complete
    from torchweave_ray.batch.lines import read_lines
    from torchweave_ray.errors import ConfigError

    if not source.is_file():
        raise ConfigError(f"cannot read {source}: no such file")
    journal = Journal(output)
    if overwrite:
        journal.path.unlink(missing_ok=True)
    elif not journal.path.exists() and is_complete(output, read_lines(source)):
        return None
    return journal


class _Report:
    def __init__(self, num_before: int) -> None:
        self._num_before = num_before
        self._num_done = self._num_failed = self._num_tokens = 0
        self._start = self._shown_at = time.monotonic()

    def add(self, result: dict[str, Any]) -> None:
        from torchweave_ray.batch.lines import has_failed, num_output_tokens

        self._num_done += 1
        self._num_failed += has_failed(result)
        self._num_tokens += num_output_tokens(result)
        if time.monotonic() - self._shown_at > REPORT_S:
            self._shown_at = time.monotonic()
            self.show("")

    def counts(self) -> dict[str, float]:
        """Of this run; what was done before it is another's."""
        seconds = round(time.monotonic() - self._start, 3)
        counts = {"done": self._num_done, "failed": self._num_failed, "seconds": seconds}
        return {**counts, "output_tokens": self._num_tokens, "done_before": self._num_before}

    def show(self, what: str) -> None:
        seconds = time.monotonic() - self._start
        before = f", {self._num_before} were done before" if self._num_before else ""
        print(
            f"[Batch] {self._num_done} done in {seconds:.1f} s, {self._num_failed} failed, "
            f"{self._num_tokens / seconds:.1f} tok/s{before} {what}",
            file=sys.stderr,
        )


def _over_server(
    source: Path, journal: Journal, url: str, concurrency: int, report: _Report
) -> None:
    from torchweave_ray.batch.answering import of_server
    from torchweave_ray.batch.lines import read_lines
    from torchweave_ray.batch.run import run_lines

    ask = of_server(url, concurrency)
    asyncio.run(run_lines(read_lines(source), journal, ask, concurrency, report.add))


def _here(
    source: Path,
    journal: Journal,
    artifact: Path,
    engine_options: dict[str, Any],
    model_id: str | None,
    concurrency: int,
    report: _Report,
) -> None:
    from torchweave_ray.batch.lines import read_lines
    from torchweave_ray.batch.local import local_engine
    from torchweave_ray.batch.run import run_lines
    from torchweave_ray.config import EngineConfig

    async def run() -> None:
        config = EngineConfig.from_dict(engine_options)
        async with local_engine(artifact, config, model_id) as ask:
            await run_lines(read_lines(source), journal, ask, concurrency, report.add)

    asyncio.run(run())


def _over_ray(
    source: Path,
    journal: Journal,
    artifact: Path,
    engine_options: dict[str, Any],
    model_id: str | None,
    workers: int,
    report: _Report,
) -> None:
    from deployments.batch.workers import WorkerConfig, results_by_ray_data
    from torchweave_ray.batch.lines import read_lines

    left = [line for line in read_lines(source) if line.key not in journal]
    config = WorkerConfig(str(artifact.absolute()), engine_options, model_id)
    for key, result in results_by_ray_data(left, config, workers):
        journal.add(key, result)
        report.add(result)
