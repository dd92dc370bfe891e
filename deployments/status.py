"""Why a deployment has no replica, in the words that `serve status` shows. Asks the controller."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray import serve
from ray.serve.schema import ServeStatus

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MAX_CHARS = 600


async def why_down(deployment: str) -> str | None:
    """None when there is nothing to tell, or nobody to ask."""
    if not ray.is_initialized():
        return None
    try:
        status = await asyncio.wait_for(asyncio.to_thread(serve.status), TIMEOUT_S)
    except Exception as error:
        logger.warning("[Health] the controller does not say why: %r", error)
        return None
    return message_of(status, deployment)


def message_of(status: ServeStatus, deployment: str) -> str | None:
    for application in status.applications.values():
        found = application.deployments.get(deployment)
        if found is not None and found.message:
            return the_error_in(found.message)
    return None


def the_error_in(message: str) -> str:
    """Of a constructor's traceback its last line: the error itself."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [""])[-1][:MAX_CHARS]
