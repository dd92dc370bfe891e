"""Models of the Hugging Face hub, through huggingface_hub's own cache, settings and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.sources.local import model_files
from optimizer.sources.redaction import scrub
from optimizer.sources.remote_files import MODEL_PATTERNS, is_model_file
from optimizer.sources.source import Arrivals, Fetched
from torchweave_ray.errors import ArtifactError

_IGNORE = ["*/*"]  # other formats' copies: original/, onnx/, ...


@dataclass(frozen=True)
class HubSource:
    repo_id: str
    revision: str | None
    """Branch, tag or commit; None: the default branch, resolved when it is first staged."""
    member: str | None = None
    """A .gguf file of the repository; None: its safetensors."""

    @property
    def text(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{at}" + (f"#{self.member}" if self.member else "")

    def identity(self) -> None:
        return None

    def fetch(self, folder: Path, arrivals: Arrivals) -> Fetched:
        from huggingface_hub import snapshot_download  # slow to import

        hashes = self._fill_cache(folder, arrivals)
        try:
            snapshot = Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.revision,
                    allow_patterns=[self.member] if self.member else list(MODEL_PATTERNS),
                    ignore_patterns=None if self.member else _IGNORE,
                    tqdm_class=_counting_tqdm(arrivals),
                )
            )
        except Exception as error:
            # The client raises its own, its HTTP library's and built-in errors alike.
            raise ArtifactError(self._explain(error)) from error
        hashed = {snapshot / path: sha256 for path, sha256 in hashes.items()}
        if self.member is None:
            files = model_files(snapshot, follow=True)
            return Fetched(snapshot, files, snapshot.name, hashed)
        file = snapshot / self.member
        if not file.is_file():
            raise ArtifactError(f"{self.repo_id} has no file {self.member}")
        return Fetched(file, (file,), snapshot.name, hashed)

    def _fill_cache(self, folder: Path, arrivals: Arrivals) -> dict[str, str]:
        """What is too large to begin anew after a kill. Without a hub, what the cache has must do;
        any trouble but our own is left to the client, which says it better."""
        from optimizer.sources.hub_cache import fill_cache

        try:
            return fill_cache(self.repo_id, self.revision, self._wants, folder, arrivals)
        except ArtifactError:
            raise
        except Exception:
            return {}

    def _wants(self, path: str) -> bool:
        return path == self.member if self.member else is_model_file(path)

    def _explain(self, error: Exception) -> str:
        kind = type(error).__name__
        if kind in ("RepositoryNotFoundError", "GatedRepoError"):
            return (
                f"the Hugging Face hub has no {self.repo_id} that you may read: check the id, or "
                "set HF_TOKEN if it is private or gated"
            )
        if kind == "RevisionNotFoundError":
            return f"{self.repo_id} has no revision {self.revision!r} on the Hugging Face hub"
        first = scrub(f"{kind}: {str(error).strip()}".splitlines()[0], "")
        return (
            f"cannot fetch {self.text} from the Hugging Face hub and it is not in the local cache "
            f"({first}): connect, or copy the model to a folder and name that folder instead"
        )


def _counting_tqdm(arrivals: Arrivals) -> type[Any]:
    """The hub client reports through a tqdm class; this one passes bytes on and draws nothing."""
    from huggingface_hub.utils import tqdm

    class CountingTqdm(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            if self.counts_bytes and n:
                arrivals.advance(int(n))

    return CountingTqdm
