"""Says loudly when whoever reaches the server's address may use it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging

import ray
from ray.serve.context import _get_global_client

logger = logging.getLogger(__name__)

WARNING = (
    "[Keys] OPEN TO EVERYBODY: HTTP listens on %s, beyond this machine, and no keys are asked for. "
    "Whoever reaches it can use the models and read the metrics. Make keys with `torchweave keys "
    "add`, and name the file in API_KEYS_FILE or args.api.keys_file; or listen on 127.0.0.1"
)


async def warn_if_open() -> None:
    """Call it where no keys are asked for; not without a cluster, which nobody reaches."""
    if not ray.is_initialized():
        return
    host = await asyncio.to_thread(_listens_on)
    if not is_loopback(host):
        logger.warning(WARNING, host)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: nobody knows who else it stands for


def _listens_on() -> str:
    client = _get_global_client(raise_if_no_controller_running=False)
    return "127.0.0.1" if client is None else str(client.http_config.host)
