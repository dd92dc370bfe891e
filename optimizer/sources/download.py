"""Brings remote files here: several at once, in ranges, continued where a run broke off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optimizer.disk_space import needing
from optimizer.sources.partial_file import PartialFile
from optimizer.sources.remote_files import RemoteFile, RemoteFiles
from optimizer.sources.retry import retried
from optimizer.sources.source import Arrivals


def download(
    remote: RemoteFiles, files: Sequence[RemoteFile], folder: Path, arrivals: Arrivals
) -> dict[Path, str]:
    """sha256 of each file by its path in `folder`.

    Memory: a chunk of 8 MB a connection. Raises ArtifactError for a disk that is full, and what
    `remote` raises after its last try.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = [PartialFile(folder, file) for file in files]
    left = sum((part.file.size or 0) - part.num_bytes for part in partial if part.file.size)
    arrivals.expect(left)
    pool = ThreadPoolExecutor(remote.num_connections, thread_name_prefix="fetch")
    try:
        with needing(folder, left, "fetch"):
            _run(pool, remote, partial, arrivals)
            for part in partial:
                part.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        for part in partial:
            part.close()
    return {part.path: part.sha256 for part in partial if part.sha256 is not None}


def _run(
    pool: ThreadPoolExecutor,
    remote: RemoteFiles,
    partial: Iterable[PartialFile],
    arrivals: Arrivals,
) -> None:
    """Chunks in order, so that hashing follows them; the first error ends it."""

    def chunk(part: PartialFile, index: int, start: int, end: int) -> int:
        part.add(index, retried(lambda: remote.read(part.file, start, end)))
        return end - start

    futures = []
    for part in partial:
        if part.sha256 is not None:
            continue
        if part.file.can_seek:
            futures += [pool.submit(chunk, part, *span) for span in part.missing()]
        else:
            futures.append(pool.submit(_stream, remote, part))
    for future in futures:
        arrivals.advance(future.result())


def _stream(remote: RemoteFiles, part: PartialFile) -> int:
    """From the start to the end: this place gives no ranges, so a break starts again."""
    return retried(lambda: _stream_once(remote, part))


def _stream_once(remote: RemoteFiles, part: PartialFile) -> int:
    part.restart()
    waiting = bytearray()
    index = count = 0
    for piece in remote.stream(part.file):
        waiting += piece
        count += len(piece)
        while len(waiting) >= part.chunk_size:
            part.add(index, bytes(waiting[: part.chunk_size]))
            del waiting[: part.chunk_size]
            index += 1
    if waiting:
        part.add(index, bytes(waiting))
    if part.file.size not in (None, count):
        raise ConnectionError(f"{count} bytes of {part.file.size} came")
    return count
