"""What a shell offers after Tab, where words are known. Reads folders only: it must be quick."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def recipes(incomplete: str) -> list[str]:
    """Those of the optimizer, by name."""
    from optimizer.recipe import EMBEDDED

    return _beginning(incomplete, (path.stem for path in EMBEDDED.glob("*.yaml")))


def staged(incomplete: str) -> list[str]:
    """Models and artifacts of this shell's store, by name; it knows nothing of --store."""
    from torchweave_ray.models.artifact import MANIFEST

    store = Path(os.environ.get("ARTIFACT_DIR") or "artifacts").expanduser()
    return _beginning(incomplete, (path.parent.name for path in store.glob(f"*/{MANIFEST}")))


def one_of(*words: str) -> Callable[[str], list[str]]:
    return lambda incomplete: _beginning(incomplete, words)


def _beginning(with_: str, words: Iterable[str]) -> list[str]:
    return sorted(word for word in words if word.startswith(with_))
