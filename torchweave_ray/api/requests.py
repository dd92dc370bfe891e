"""DELETE /v1/requests/{id}: a client stops a request of its own, whose id only it knows."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchweave_ray.api.service import Service
from torchweave_ray.errors import RequestNotFound


class RequestsApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def stop(self, request: Request) -> Response:
        request_id: str = request.path_params["request_id"]
        if not self._service.running.stop(request_id):
            raise RequestNotFound(f"no request {request_id!r} is running", "request_id")
        return JSONResponse({"id": request_id, "object": "request", "stopped": True})
