"""The real SmolLM2-135M-Instruct for tests marked `weights`: staged once, then kept."""

from __future__ import annotations

import os
from pathlib import Path

from optimizer.pipeline import optimize


def staged_smollm2(recipe: str = "smollm2-135m") -> Path:
    """An embedded recipe's artifact, out of the store that TORCHWEAVE_TEST_STORE names or ~/.cache
    holds."""
    default = Path.home() / ".cache" / "torchweave" / "test-artifacts"
    return optimize(recipe, Path(os.environ.get("TORCHWEAVE_TEST_STORE") or default))
