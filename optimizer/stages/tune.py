"""Stage 7: what steps of this model cost on this machine, for schedulers that count milliseconds.

The result belongs to the machine, not to the model: it goes into the report, under a fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.measuring.model import all_cores, open_staged
from optimizer.measuring.step_cost import fit_step_cost, measure_steps
from optimizer.progress import Progress
from optimizer.store import write_atomically
from torchweave_ray.kernels.machine import fingerprint
from torchweave_ray.models.artifact import WEIGHTS, Manifest
from torchweave_ray.models.config import ModelConfig, read_hf_config

RESULT = "tuning.json"


@dataclass(frozen=True)
class TuneStage:
    progress: Progress
    name: str = "tune"

    @property
    def inputs(self) -> dict[str, Any]:
        return {}

    def run(self, work: Path, manifest: Manifest) -> Manifest:
        """Leaves `RESULT`: fingerprint, step_cost, and the steps it was fitted to."""
        folder, packed = work / self.name, work / "pack"
        folder.mkdir(exist_ok=True)
        self.progress.expect((packed / WEIGHTS).stat().st_size)
        with all_cores() as threads:
            model = open_staged(packed, manifest, threads)
            self.progress.advance((packed / WEIGHTS).stat().st_size)
            config = ModelConfig.from_hf(read_hf_config(packed))
            steps = measure_steps(model, config.max_position_embeddings)
            name = model.executor_name
        cost = fit_step_cost(steps)
        values = {
            "fingerprint": fingerprint(name, threads),
            "step_cost": dataclasses.asdict(cost),
            "steps": [
                dataclasses.asdict(step) | {"predicted_ms": round(cost.predict(step), 4)}
                for step in steps
            ],
        }
        write_atomically(folder / RESULT, json.dumps(values))
        return manifest
