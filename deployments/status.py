"""Why a deployment has no replica, in the words that `serve status` shows. Asks the controller."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray import serve
from ray.serve.schema import DeploymentStatusOverview

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MAX_CHARS = 600


async def why_down(deployment: str, app: str) -> str | None:
    """None when there is nothing to tell, or nobody to ask."""
    overview = await _overview(deployment, app)
    return the_error_in(overview.message) if overview is not None and overview.message else None


async def is_asleep(deployment: str, app: str) -> bool:
    """Whether it has no replica that runs, and nothing keeps it from getting one."""
    overview = await _overview(deployment, app)
    if overview is None or overview.replica_states.get("RUNNING", 0):
        return False
    return overview.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")


async def _overview(deployment: str, app: str) -> DeploymentStatusOverview | None:
    """Several applications may have a deployment of this name."""
    if not ray.is_initialized():
        return None
    try:
        status = await asyncio.wait_for(asyncio.to_thread(serve.status), TIMEOUT_S)
    except Exception as error:
        logger.warning("[Health] the controller does not answer: %r", error)
        return None
    found = status.applications.get(app)
    return None if found is None else found.deployments.get(deployment)


def the_error_in(message: str) -> str:
    """Of a constructor's traceback its last line: the error itself."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [""])[-1][:MAX_CHARS]
