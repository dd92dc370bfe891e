"""Sends our log lines where Serve's go: replica log file, terminal, text or JSON as configured.

Also what a replica says when it has started.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torchweave_ray.outputs import ModelInfo

logger = logging.getLogger(__name__)

PACKAGES = ("torchweave_ray", "deployments", "optimizer", "torchweave")


def log_through_serve() -> None:
    """Hang our loggers below Serve's own, whose handlers this process has set up already."""
    for name in PACKAGES:
        logging.getLogger(name).parent = logging.getLogger("ray.serve")


def log_start(
    info: ModelInfo, startup_s: Mapping[str, float], threads: int, cores: int, sharing: int
) -> None:
    """`sharing`: replicas on this node's `cores`."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in startup_s.items())
    formats = "".join(f", {group} {name}" for group, name in info.quantization.items())
    logger.info(
        "[Start] %s: artifact %s, %s executor on %s, %s%s, KV %s, %d threads; seconds: %s",
        *(info.id, info.artifact_id, info.executor, info.device, info.dtype, formats),
        *(info.kv_dtype, threads, stages),
    )
    if info.device == "cpu" and threads * sharing > cores:
        logger.warning(
            "[Start] %d threads of %d replicas share %d cores: lower num_replicas or threads",
            *(threads * sharing, sharing, cores),
        )
