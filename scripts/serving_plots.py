"""The plots of docs/performance.md: serves each recipe, measures it, and draws what came of it.

python scripts/serving_plots.py [--recipes smollm2-135m,smollm2-135m-int8] [--out docs/images]

Under five minutes on two cores; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from torchweave_ray.bench.process_tree import wait_until_calm
from torchweave_ray.bench.server_process import started_server

CLOSED = ("--concurrency", "1,4,8,16,32")
OPEN = ("--rates", "1,2,4,6", "--duration", "12", "--slo-ttft-ms", "500", "--slo-itl-ms", "100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipes", default="smollm2-135m,smollm2-135m-int8")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    closed, opened = [], []
    for recipe in options.recipes.split(","):
        with started_server(("--recipe", recipe, "--no-dashboard")) as server:
            wait_until_calm(server.pid)
            url = f"{recipe}={server.url}"
            closed.append(_measure(options.results, "--url", url, *CLOSED))
            opened.append(_measure(options.results, "--url", url, *OPEN))
    _torchweave("plot", *closed, "--out", str(options.out), "--name", "closed-loop")
    _torchweave("plot", *opened, "--out", str(options.out), "--name", "open-loop")


def _measure(results: Path, *arguments: str) -> str:
    """The results file."""
    before = set(results.glob("serving-*.json"))
    _torchweave("serving", *arguments, "--occupancy", "--save", "--results", str(results))
    (path,) = set(results.glob("serving-*.json")) - before
    return str(path)


def _torchweave(*arguments: str) -> None:
    command = [sys.executable, "-m", "torchweave_ray.cli", "bench", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
