"""Sends our log lines where Serve's go: replica log file, terminal, text or JSON as configured."""

from __future__ import annotations

import logging

PACKAGES = ("torchweave_ray", "deployments", "optimizer", "torchweave")


def log_through_serve() -> None:
    """Hang our loggers below Serve's own, whose handlers this process has set up already."""
    for name in PACKAGES:
        logging.getLogger(name).parent = logging.getLogger("ray.serve")
