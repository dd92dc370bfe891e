"""Who uses an artifact: a shared lock of its manifest, which the system frees with its holder.

It needs no write permission, and holds across nodes where the file system's locks do (NFS too).
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.artifact.manifest import MANIFEST

logger = logging.getLogger(__name__)


class Lease:
    """Holds until it is released or collected, or its process ends, however that ends."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def hold_artifact(directory: Path) -> Lease:
    """Keep `torchweave artifact gc` from deleting this artifact. Any number may hold it.

    Raises ArtifactError if it was deleted a moment ago.
    """
    path = directory / MANIFEST
    gone = f"no artifact in {directory}: {MANIFEST} is missing, it may just have been deleted"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(gone) from error
    lease = Lease(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:  # this file system has no locks: gc refuses to work on it, too
        logger.warning("[Artifact] %s cannot be marked as in use: %s", directory, error)
        return lease
    if not _is_there(descriptor, path):
        lease.release()
        raise ArtifactError(gone)
    return lease


def claim_artifact(directory: Path) -> Lease | None:
    """The right to delete an artifact, None while anybody holds it.

    Raises OSError where the file system has no locks: nobody can then tell.
    """
    path = directory / MANIFEST
    lease = Lease(descriptor := os.open(path, os.O_RDWR))  # NFS wants it writable
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lease.release()
        return None
    return lease if _is_there(descriptor, path) else None


def _is_there(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        found = path.stat()
    except OSError:
        return False
    return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)
