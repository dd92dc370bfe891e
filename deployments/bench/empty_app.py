"""Two deployments that do nothing: what Ray Serve itself takes to start.

`torchweave bench startup` starts it beside the real application, with the same command.
"""

from ray import serve
from ray.serve.handle import DeploymentHandle


class Back:
    def __call__(self) -> str:
        return "ok"


class Front:
    def __init__(self, back: DeploymentHandle) -> None:
        self._back = back

    async def __call__(self) -> str:
        return str(await self._back.remote())


_SMALL = {"num_cpus": 0.1}
app = (
    serve.deployment(Front)
    .options(ray_actor_options=_SMALL)
    .bind(serve.deployment(Back).options(ray_actor_options=_SMALL).bind())
)
