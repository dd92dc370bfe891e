"""The application as it is, with an engine that has no model: what `bench transport` measures.

`default_path` undoes what is ours: one event loop, gRPC between ingress and replica, the router.
No `from __future__ import annotations` here: Serve reads the builder's annotation as a class.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.app import MAX_ONGOING_REQUESTS, SAME_LOOP, _router, deployment_name
from deployments.args import ModelArgs, StrictModel
from deployments.ingress import Ingress, IngressConfig
from deployments.placement import Placement, ReplicaConfig
from deployments.replica import ModelReplica
from deployments.staging import Loaded
from torchweave_ray.api.settings import ApiSettings
from torchweave_ray.config import EngineConfig
from torchweave_ray.tokenizer import load_tokenizer, read_tokenizer_files

MODEL = "echo"
LONGEST_STREAM_S = 60.0
OUR_TRANSPORT = ("_by_reference", "request_serialization", "response_serialization")


class EchoArgs(StrictModel):
    step_ms: float = Field(default=25.0, ge=0)
    bus: bool = True
    default_path: bool = False


class EchoReplica(ModelReplica):
    async def __init__(self, config: ReplicaConfig, step_s: float) -> None:  # type: ignore[misc]
        self._step_s = step_s
        await super().__init__(config)

    async def _load(self, config: ReplicaConfig, engine: EngineConfig, weights: Any) -> Loaded:
        from torchweave_ray.bench.transport.echo import load_echo

        with tempfile.TemporaryDirectory() as folder:
            loaded = load_echo(self._step_s, Path(folder))
            return loaded, load_tokenizer(Path(folder)), read_tokenizer_files(Path(folder))


class DefaultHandle:
    """A handle that keeps Serve's own transport, whatever a caller chooses."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def options(self, **chosen: Any) -> "DefaultHandle":
        kept = {name: value for name, value in chosen.items() if name not in OUR_TRANSPORT}
        return DefaultHandle(self._handle.options(**kept))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class DefaultIngress(Ingress):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: IngressConfig, models: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        handles: Any = {model: DefaultHandle(handle) for model, handle in models.items()}
        await super().__init__(config, handles)


def build(args: EchoArgs) -> Application:
    # Every prompt is done in its first step, as in the process that is compared with it.
    scheduler = {"max_num_seqs": 256, "max_num_batched_tokens": 16_384}
    model = ModelArgs(id=MODEL, artifact=MODEL, threads=1, engine={"scheduler": scheduler})
    environment = {} if args.default_path else SAME_LOOP
    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": LONGEST_STREAM_S,
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": environment}},
    }
    routing = {} if args.default_path else {"request_router_config": _router()}
    replica = serve.deployment(EchoReplica).options(
        name=deployment_name(MODEL), **options, **routing
    )
    ingress = serve.deployment(DefaultIngress if args.default_path else Ingress)
    config = ReplicaConfig(model, Placement(0.1, 0, 1), None)
    return ingress.options(name="Ingress", **options).bind(
        IngressConfig(ApiSettings(), args.bus, LONGEST_STREAM_S),
        {MODEL: replica.bind(config, args.step_ms / 1e3)},
    )
