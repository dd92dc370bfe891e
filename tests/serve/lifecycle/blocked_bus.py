"""The application with a bus that nobody gets through to: its ingresses tell replicas a port whose
full backlog swallows what comes, as a firewall would. No test in here.

No `from __future__ import annotations` here: Serve reads the builder's annotation as a class.
"""

import socket
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from ray.serve import Application

from deployments import app
from deployments.args import AppArgs
from deployments.bus.listener import BusListener
from deployments.ingress import Ingress
from torchweave_ray.outputs import BusAddress

_sockets: list[socket.socket] = []


def _blocked_port(host: str) -> int:
    listener = socket.create_server((host, 0), backlog=0)
    port: int = listener.getsockname()[1]
    _sockets.append(listener)
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((host, port))
        _sockets.append(client)
    return port


class _BlockedListener(BusListener):
    async def start(self, host: str) -> BusAddress:
        self._address = replace(await super().start(host), port=_blocked_port(host))
        return self._address


class BlockedIngress(Ingress):  # type: ignore[misc]
    async def __init__(self, *args: Any) -> None:
        with patch("deployments.ingress.BusListener", _BlockedListener):
            await super().__init__(*args)


def build(args: AppArgs) -> Application:
    with patch.object(app, "Ingress", BlockedIngress):
        return app.build(args)
