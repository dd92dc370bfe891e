"""`Adapters`: the LoRA adapters of the models behind this ingress, asked of their replicas.

What a name stands for is kept until a replica refuses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.backend.attempts import ModelClient
from torchweave_ray.errors import InvalidRequest, RequestError, Unavailable
from torchweave_ray.outputs import GenerateRequest, ModelInfo

logger = logging.getLogger(__name__)

ADAPTER = "adapter_id"
"""What a replica refuses a request for that has other content under the adapter's name."""
FIND_TIMEOUT_S = 60.0
"""A replica may have to fetch it."""
LIST_TIMEOUT_S = 5.0
MAX_KNOWN = 1024


class Adapters:
    def __init__(self, clients: Mapping[str, ModelClient]) -> None:
        self._clients = clients
        self._known: OrderedDict[str, str] = OrderedDict()
        """Adapter id by model."""

    async def info(self, base: ModelInfo, model: str) -> ModelInfo:
        """Raises ModelNotFound with the names there are, InvalidRequest for one of no use."""
        name = model.removeprefix(f"{base.id}:")
        adapter_id = self._known.get(model)
        if adapter_id is None:
            adapter_id = self._known[model] = await self._ask(base.id, name)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return base.with_adapter(name, adapter_id)

    async def renewed(self, request: GenerateRequest, error: InvalidRequest) -> str:
        """The id that the adapter of a refused request has now; raises what it was refused with
        if it was refused for something else."""
        if error.param != ADAPTER:
            raise error
        self._known.pop(request.model, None)
        return await self._ask(request.base_model, request.adapter)

    async def listed(self, bases: Iterable[ModelInfo]) -> list[ModelInfo]:
        """Each model, and its adapters by name behind it."""
        listed: list[ModelInfo] = []
        for base in bases:
            listed.append(base)
            if not base.has_adapters:
                continue
            try:
                async with asyncio.timeout(LIST_TIMEOUT_S):
                    names = await self._clients[base.id].adapters.remote()
            except (TimeoutError, RayError, DeploymentUnavailableError) as error:
                logger.warning("[Adapter] %s does not list its adapters: %r", base.id, error)
                continue
            listed += map(base.with_adapter, names)
        return listed

    async def _ask(self, base: str, name: str) -> str:
        try:
            async with asyncio.timeout(FIND_TIMEOUT_S):
                answer = await self._clients[base].adapter.remote(name)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            reason = f"no replica of {base} has found adapter {name!r}: {error!r}"
            raise Unavailable(reason, None, None, 5.0) from None
        if isinstance(answer, RequestError):
            raise answer
        assert isinstance(answer, str)
        return answer
