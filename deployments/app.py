"""The application: `build` for `serve_config.yaml`, and `app`, the same with its defaults.

Decides names and places; needs neither a running cluster nor torch, which only replicas load.
No `from __future__ import annotations` here: Serve reads the builder's annotation as a class.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.access.ledger import Ledger
from deployments.args import AppArgs, ModelArgs
from deployments.autoscaling import SlotsKvBacklog
from deployments.environment import apply_environment
from deployments.ingress import Ingress, IngressConfig
from deployments.log import log_through_serve
from deployments.placement import Placement, ReplicaConfig, place, probe_cluster
from deployments.replica import ModelReplica
from deployments.router import PrefixRouter
from deployments.staging import WeightsOwner
from torchweave_ray.config import EngineConfig

INGRESS_MARGIN_S = 30.0
"""An ingress outlives its replicas, to tell its clients how their streams ended."""
MAX_ONGOING_REQUESTS = 10_000
"""Serve queues nothing: the engine has the only queue, and refuses by its exact backlog."""
ROUTING_STATS_PERIOD_S = 1.0
LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""Of the log files; the terminal keeps plain lines."""
MODEL_REPLICA = "ModelReplica:"
WEIGHTS = "Weights:"
SAME_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_LOG_TO_STDERR": "1",
}
"""User code, router and replica share one event loop: no thread hop a message. Nothing of ours
blocks it. There is no access log, so the rest of the log needs no buffer."""


def build(args: AppArgs) -> Application:
    """Raises ConfigError for what cannot be served."""
    log_through_serve()
    args = apply_environment(args, os.environ)
    placements = place(args, probe_cluster())
    replicas = {
        model.name: _replica(model, placement, args)
        for model, placement in zip(args.models, placements, strict=True)
    }
    settings = args.api_settings
    settings = replace(
        settings,
        default_model=settings.default_model or args.models[0].name,
        keys_file=_absolute(settings.keys_file),
        usage_log=_absolute(settings.usage_log),
    )
    sleepers = tuple(
        model.name
        for model in args.models
        if model.autoscaling is not None and model.autoscaling.min_replicas == 0
    )
    num_ingresses = args.ingress.num_replicas
    config = IngressConfig(
        settings, args.ingress.bus, args.longest_stream_s, sleepers, num_ingresses
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=num_ingresses,
        ray_actor_options=_actor_options(args.ingress.num_cpus, 0),
        max_surge_percent=100,  # it is small: a new one can start before the old one stops
        **_options(args.longest_stream_s + INGRESS_MARGIN_S),
    )
    is_shared = num_ingresses > 1 and settings.keys_file is not None
    return ingress.bind(config, replicas, _ledger() if is_shared else None)


def deployment_name(model: str) -> str:
    """Serve makes file names of it, so a Hugging Face id's slash has to go."""
    return f"{MODEL_REPLICA}{model.replace('/', '--')}"


def _replica(model: ModelArgs, placement: Placement, args: AppArgs) -> Application:
    recipe = model.recipe
    if recipe is not None and Path(recipe).exists():
        recipe = _absolute(recipe)
    lora = model.lora
    if lora is not None:
        lora = lora.model_copy(update={"source": _absolute(lora.source)})
    changes = {"recipe": recipe, "artifact": _absolute(model.artifact), "lora": lora}
    engine = _with_absolute_draft(model.engine)
    model = model.model_copy(update={**changes, "engine": engine})
    deployment = serve.deployment(ModelReplica).options(
        name=deployment_name(model.name),
        ray_actor_options=_actor_options(
            placement.num_cpus, placement.num_gpus, model.accelerator_type
        ),
        **_number(model),
        **_group(placement),
        max_constructor_retry_count=3,  # a bad artifact stays bad: say so soon
        **({"request_router_config": _router()} if model.router == "prefix" else {}),
        **_options(args.longest_stream_s),
    )
    store, cache = _absolute(args.artifact_dir), _absolute(args.artifact_cache)
    config = ReplicaConfig(model, placement, store, cache, args.staging, args.verify)
    return deployment.bind(config, _weights(config))


def _ledger() -> Application:
    """One, wherever it runs; ingresses manage while Serve replaces it."""
    ledger = serve.deployment(Ledger).options(
        name="Ledger",
        ray_actor_options=_actor_options(0, 0),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=2.0,
        logging_config=LOGGING,
    )
    return ledger.bind()


def _weights(config: ReplicaConfig) -> Application | None:
    """The owner of weights in the object store. It lives, and goes, with the application."""
    if config.staging.target != "object_store":
        return None
    owner = serve.deployment(WeightsOwner).options(
        name=f"{WEIGHTS}{config.model.name.replace('/', '--')}",
        ray_actor_options=_actor_options(0, 0),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        logging_config=LOGGING,
    )
    return owner.bind(config)


def _router() -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class=PrefixRouter, request_routing_stats_period_s=ROUTING_STATS_PERIOD_S
    )


def _options(longest_stream_s: float) -> dict[str, Any]:
    return {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": longest_stream_s,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 20.0,
        "logging_config": LOGGING,
    }


def _number(model: ModelArgs) -> dict[str, Any]:
    scaling = model.autoscaling
    if scaling is None:
        return {"num_replicas": model.num_replicas}
    slots = EngineConfig.from_dict(model.engine).scheduler.max_num_seqs
    policy = SlotsKvBacklog.__module__ + ":" + SlotsKvBacklog.__name__
    kwargs = {
        "target_load": scaling.target_load,
        "max_backlog_tokens": scaling.max_backlog_tokens,
        "slots": slots,
    }
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            # Also of 0: an ingress has to see a replica once to know what the model is.
            "initial_replicas": max(1, scaling.min_replicas),
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": scaling.interval_s,
            "look_back_period_s": 5 * scaling.interval_s,
            "policy": {"policy_function": policy, "policy_kwargs": kwargs},
        }
    }


def _group(placement: Placement) -> dict[str, Any]:
    if not placement.bundles:
        return {}
    return {
        "placement_group_bundles": [dict(bundle) for bundle in placement.bundles],
        "placement_group_strategy": placement.strategy,
    }


def _actor_options(
    num_cpus: float, num_gpus: float, accelerator_type: str | None = None
) -> dict[str, Any]:
    kind = {} if accelerator_type is None else {"accelerator_type": accelerator_type}
    return kind | {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": SAME_LOOP},
    }


def _with_absolute_draft(engine: dict[str, Any]) -> dict[str, Any]:
    speculation = engine.get("speculation", {})
    draft = speculation.get("model")
    if draft is None or not Path(draft).expanduser().exists():
        return engine
    return engine | {"speculation": speculation | {"model": _absolute(draft)}}


def _absolute(path: str | None) -> str | None:
    """A replica may run in another folder than this builder. A URL means the same everywhere."""
    if path and "://" in path:
        return path
    return path and str(Path(path).expanduser().absolute())


def __getattr__(name: str) -> Application:
    """`app`, built when it is asked for: importing `build` alone builds nothing."""
    if name == "app":
        return build(AppArgs())
    raise AttributeError(name)
