"""Sends our log lines where Serve's go: replica log file, terminal, text or JSON as configured.

Also what a replica says when it has started, and why it has not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import ParamSpec

from torchweave_ray.errors import TorchWeaveError
from torchweave_ray.outputs import ModelInfo

P = ParamSpec("P")
logger = logging.getLogger(__name__)

PACKAGES = ("torchweave_ray", "deployments", "optimizer", "torchweave")


def log_through_serve() -> None:
    """Hang our loggers below Serve's own, whose handlers this process has set up already."""
    for name in PACKAGES:
        logging.getLogger(name).parent = logging.getLogger("ray.serve")


def says_why_it_fails(start: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Of a constructor: Serve tells its error to the controller alone, and there behind the whole
    way to it. Here it comes into the replica's log too, and our own errors without the way."""

    @functools.wraps(start)
    async def started(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await start(*args, **kwargs)
        except TorchWeaveError as error:
            logger.error("[Start] failed: %s", error)
            raise error.with_traceback(None) from None
        except Exception:
            logger.exception("[Start] failed")
            raise

    return started


def log_start(
    info: ModelInfo, startup_s: Mapping[str, float], threads: int, cores: int, sharing: int
) -> None:
    """`sharing`: replicas on this node's `cores`."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in startup_s.items())
    formats = "".join(f", {group} {name}" for group, name in info.quantization.items())
    logger.info(
        "[Start] %s: artifact %s, %s executor on %s, %s%s, KV %s, speculation %s, %d threads; "
        "seconds: %s",
        *(info.id, info.artifact_id, info.executor, info.device, info.dtype, formats),
        *(info.kv_dtype, info.speculation, threads, stages),
    )
    if info.device == "cpu" and threads * sharing > cores:
        logger.warning(
            "[Start] %d threads of %d replicas share %d cores: lower num_replicas or threads",
            *(threads * sharing, sharing, cores),
        )
