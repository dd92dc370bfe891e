"""DELETE /v1/requests/{id}: a client stops a request of its own, whose id only it knows."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.api.running import call_id_of
from torchweave_ray.api.service import Service
from torchweave_ray.errors import RequestNotFound


class RequestsApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def stop(self, request: Request) -> Response:
        request_id: str = request.path_params["request_id"]
        call_id = call_id_of(request_id)
        if call_id is None or not await self._stop(call_id):
            raise RequestNotFound(f"no request {request_id!r} is running", "request_id")
        return JSONResponse({"id": request_id, "object": "request", "stopped": True})

    async def _stop(self, call_id: str) -> bool:
        """Another process's client may be asking us: the engines know every request."""
        return self._service.running.stop(call_id) or await self._service.backend.stop(call_id)
