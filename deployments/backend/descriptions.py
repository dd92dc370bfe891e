"""`Descriptions`: what each model is, asked of a replica once and kept until one refuses.

Knows nothing of requests on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.backend.attempts import ModelClient
from deployments.calls import Description
from deployments.status import why_down
from torchweave_ray.errors import Unavailable
from torchweave_ray.outputs import ModelInfo


class Descriptions:
    def __init__(self, clients: Mapping[str, ModelClient]) -> None:
        self._clients = clients
        self._tasks: dict[str, asyncio.Task[Description]] = {}

    def known(self, model: str) -> ModelInfo | None:
        """Without asking."""
        task = self._tasks.get(model)
        return task.result().info if task is not None and _is_good(task) else None

    async def ask(self, model: str, timeout_s: float) -> Description:
        """Raises Unavailable, with the reason, when no replica answers in time."""
        client = self._clients[model]
        task = self._tasks.get(model)
        if task is None or (task.done() and not _is_good(task)):
            task = asyncio.create_task(_ask(client))
            self._tasks[model] = task
        try:
            return await asyncio.wait_for(asyncio.shield(task), timeout_s)
        except TimeoutError:
            why = await why_down(*client.names)
            reason = f"no replica of {model} has answered within {timeout_s:g} s"
            raise Unavailable(f"{reason}: {why}" if why else reason, None, None, 5.0) from None
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Unavailable(f"no replica of {model} answers: {error}", None, None, 5.0) from None

    async def all(self, timeout_s: float) -> list[ModelInfo]:
        """Models that a replica serves; Unavailable, with the reason, when there is none yet."""
        if ready := [info for info in map(self.known, self._clients) if info is not None]:
            return ready
        asked = (self.ask(model, timeout_s) for model in self._clients)
        found = await asyncio.gather(*asked, return_exceptions=True)
        infos = [each.info for each in found if isinstance(each, Description)]
        if not infos:
            raise next(each for each in found if isinstance(each, BaseException))
        return infos

    async def forget(self, model: str) -> None:
        """Forget what the model was; raises Unavailable when it now reads text differently."""
        known = self._tasks.pop(model, None)
        answers = await self._clients[model].ask_all("describe")
        files = [each.files for each in answers if isinstance(each, Description)]
        if known is not None and _is_good(known):
            files.append(known.result().files)
        if not files or any(each != files[0] for each in files):
            reason = f"{model} is being replaced by a model with another tokenizer"
            raise Unavailable(reason, None, "model_changed", 1.0)


async def _ask(client: ModelClient) -> Description:
    description = await client.describe.remote()
    assert isinstance(description, Description)
    return description


def _is_good(task: asyncio.Task[Description]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
