"""The plots of docs/performance.md: serves each recipe, measures it, and draws what came of it.

python scripts/serving_plots.py [--recipes smollm2-135m,smollm2-135m-int8] [--out docs/images]
python scripts/serving_plots.py --draw benchmarks/results/serving-*.json

Four minutes a recipe on two cores; nothing else may run meanwhile. `--draw` takes what is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchweave_ray.bench.origin import RESULTS
from torchweave_ray.bench.process_tree import wait_until_calm
from torchweave_ray.bench.server_process import started_server

LEVEL = ("--slo-ttft-ms", "500", "--slo-itl-ms", "100")
LOADS = {
    "clients": ("--concurrency", "1,4,8,16,32"),
    "arrivals": ("--rates", "1,2,3,4,6", "--duration", "12", *LEVEL),
    "conversations": (
        *("--workload", "multi-turn", "--pause", "1", "--output-len", "64"),
        *("--rates", "0.5,1,2", "--duration", "12", *LEVEL),
    ),
}
SHOWN = (
    *("clients-throughput", "arrivals-throughput", "arrivals-ttft", "arrivals-batch"),
    *("conversations-throughput", "conversations-ttft"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipes", default="smollm2-135m,smollm2-135m-int8")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", type=Path, nargs="*", help="These files; measure nothing.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    recipes, loads = options.recipes.split(","), options.loads.split(",")
    files = options.draw or list(_measure_all(recipes, loads, options.results))
    with tempfile.TemporaryDirectory() as folder:
        for load, chosen in _by_load(files).items():
            target = ("--out", folder, "--name", load, "--formats", "png")
            _torchweave("plot", *map(str, chosen), *target)
        for name in SHOWN:
            if (drawn := Path(folder) / f"{name}.png").exists():
                shutil.copy(drawn, options.out)


def _measure_all(recipes: Sequence[str], loads: Sequence[str], results: Path) -> Iterator[Path]:
    for recipe in recipes:
        with started_server(("--recipe", recipe, "--no-dashboard")) as server:
            wait_until_calm(server.pid)
            for load in loads:
                yield _measure(results, "--url", f"{recipe}={server.url}", *LOADS[load])


def _by_load(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in files:
        config = json.loads(path.read_text())["config"]
        loop = "arrivals" if config.get("rates") else "clients"
        talk = config["workload"]["kind"] == "multi-turn"
        found.setdefault("conversations" if talk else loop, []).append(path)
    return found


def _measure(results: Path, *arguments: str) -> Path:
    """The results file."""
    before = set(results.glob("serving-*.json"))
    _torchweave("serving", *arguments, "--occupancy", "--save", "--results", str(results))
    (path,) = set(results.glob("serving-*.json")) - before
    return path


def _torchweave(*arguments: str) -> None:
    command = [sys.executable, "-m", "torchweave_ray.cli", "bench", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
