"""Stages recipes from nothing and keeps what their reports say: size, seconds, quality and speed.

Backs the table of docs/optimizer.md: `staging_report.py WORK RECIPE... [--save]`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from optimizer.pipeline import optimize
from torchweave_ray.bench.origin import save_results
from torchweave_ray.models.artifact import WEIGHTS, read_manifest, read_report


def staged(recipe: str, store: Path) -> dict[str, Any]:
    folder = optimize(recipe, store)
    report, manifest = read_report(folder), read_manifest(folder)
    tuning = {k: v for k, v in report["tuning"].items() if k != "steps"}
    return {
        "recipe": recipe,
        "artifact_id": manifest.artifact_id,
        "weights_bytes": manifest.files[WEIGHTS].size,
        "seconds": {stage["name"]: stage["seconds"] for stage in report["stages"]},
        "quantization": {
            group: {k: said[k] for k in ("format", "num_lossless", "num_rounded")}
            for group, said in report["quantization"].items()
        },
        "quality": report["quality"],
        "speed": report["speed"],
        "tuning": tuning,
    }


def main() -> None:
    work, *recipes = [argument for argument in sys.argv[1:] if argument != "--save"]
    points = []
    for recipe in recipes:
        points.append(staged(recipe, Path(work)))
        print(points[-1], flush=True)
    if "--save" in sys.argv:
        print(save_results("staging", {"recipes": recipes}, points))


if __name__ == "__main__":
    main()
