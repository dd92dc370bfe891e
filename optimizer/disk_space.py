"""A disk that is too small or full: said before the work where that can be known, else after it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchweave_ray.errors import ArtifactError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def needing(folder: Path, num_bytes: int, stage: str) -> Iterator[None]:
    """Around work that writes `num_bytes` more below `folder`.

    Raises ArtifactError saying which disk is full, how much the stage needs and how much is free;
    what is there is left for the next run.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ArtifactError(_explain(folder, num_bytes, free, stage))
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        said = _explain(folder, num_bytes, free, stage)
        raise ArtifactError(f"{said} ({error.strerror})") from error


def _explain(folder: Path, num_bytes: int, free: int, stage: str) -> str:
    return (
        f"the disk of {folder} is full: {stage} needs {num_bytes / 1e6:.1f} MB there, "
        f"{free / 1e6:.1f} MB are free. Make room and run again: it goes on from here, and "
        "what the store held before is unchanged"
    )
