"""Runs the application on a Ray of its own: start, wait until it answers, drain, stop.

Behind `torchweave serve`. Knows no signals, and sets no environment variables.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeApplicationSchema, ServeDeploySchema

from deployments.app import MODEL_REPLICA, deployment_name
from deployments.args import DEFAULT_RECIPE, LONGEST_STREAM_S, AppArgs, limits_of
from deployments.drain.drain import close_haproxy, drain, end_haproxy
from deployments.environment import apply_environment
from deployments.log import log_through_serve
from deployments.status import the_error_in
from optimizer.task import check_recipe
from torchweave_ray.api.access.key_file import read_keys
from torchweave_ray.config import EngineConfig
from torchweave_ray.documents import read_document
from torchweave_ray.errors import ConfigError, TorchWeaveError

BUILDER = "deployments.app:build"
DEFAULT_CONFIG = Path("serve_config.yaml")
OBJECT_STORE_BYTES = 512 << 20
"""Tokens do not travel through Ray's object store, and weights only where `staging` says so: then
Ray gives it its usual share of the memory."""
PERMANENT = ("ArtifactError: ", "ConfigError: ")
"""Another try of the constructor ends the same way."""
OUR_ERRORS = "torchweave_ray.errors."
POLL_S = 0.1
HTTP_READY_S = 60.0


def load_config(
    path: Path | None,
    recipe: str | None,
    artifact: str | Path | None,
    host: str | None,
    port: int | None,
    verify: str | None = None,
) -> ServeDeploySchema:
    """The configuration file, with what the command line says over it."""
    if path is None and DEFAULT_CONFIG.is_file():
        path = DEFAULT_CONFIG
    values = _read(path) if path is not None else _built_in()
    http = values.setdefault("http_options", {})
    http.update({k: v for k, v in (("host", host), ("port", port)) if v is not None})
    values["proxy_location"] = "HeadOnly"  # one node, and HAProxy can only do this there
    if recipe is not None and artifact is not None:
        raise ConfigError("give --recipe or --artifact, not both")
    if recipe is not None or artifact is not None:
        model = {"artifact": _absolute(artifact)} if artifact else {"recipe": recipe}
        for application in values.get("applications", []):
            application.setdefault("args", {})["models"] = [model]
    if verify is not None:
        for application in values.get("applications", []):
            application.setdefault("args", {})["verify"] = verify
    try:
        return ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


def _absolute(artifact: str | Path) -> str:
    return str(artifact) if "://" in str(artifact) else str(Path(artifact).absolute())


def _read(path: Path) -> dict[str, Any]:
    values = read_document(path)
    if not isinstance(values, dict) or not values.get("applications"):
        raise ConfigError(f"{path} is not a Serve configuration: it lists no applications")
    return values


def _built_in() -> dict[str, Any]:
    application = {"name": "torchweave", "import_path": BUILDER}
    return {"applications": [{**application, "route_prefix": "/"}]}


def _check(application: ServeApplicationSchema) -> None:
    """Says what our arguments come to, and what is wrong with them before Ray has started."""
    if application.import_path == BUILDER:
        try:
            args = AppArgs.model_validate(application.args)
        except ValidationError as error:
            raise ConfigError(f"args: {error}") from error
        args = apply_environment(args, os.environ)  # as the builder will, in one like this
        if (keys_file := args.api_settings.keys_file) is not None:
            read_keys(Path(keys_file))
        for model in args.models:
            if model.artifact is None:
                check_recipe(model.recipe or DEFAULT_RECIPE)
            draft = EngineConfig.from_dict(model.engine).speculation.model
            if draft is not None and "://" not in draft and not Path(draft).expanduser().is_dir():
                check_recipe(draft)
            for deployment in application.deployments:
                if deployment.name == deployment_name(model.name):
                    user_config = deployment.user_config
                    limits_of(model, user_config if isinstance(user_config, dict) else {})


def _check_address(host: str, port: int) -> None:
    """Ray would say it after ten seconds, in sixty lines; HAProxy would share it with another."""
    try:
        (family, kind, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ConfigError(f"{reason}; --host and --port choose another address") from error


class Launch:
    def __init__(
        self, config: ServeDeploySchema, dashboard: bool, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._dashboard = dashboard
        self._say = say
        self._seconds: dict[str, float] = {}
        self._dashboard_url: str | None = None
        host = config.http_options.host
        self._url = (
            f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{config.http_options.port}"
        )

    def run(self, stop: threading.Event, ray_has_started: Callable[[], None]) -> None:
        """Until `stop` is set and the streams that are open then have ended.

        Raises TorchWeaveError with the reason when the application cannot start.
        """
        log_through_serve()
        for application in self._config.applications:
            _check(application)
        _check_address(self._config.http_options.host, self._config.http_options.port)
        try:
            self._timed("ray", self._start_ray)
            ray_has_started()
            self._timed("serve", self._start_serve)
            self._timed("app", lambda: self._deploy(stop))
            if not stop.is_set():
                self._announce()
            stop.wait()
            self._drain()
        finally:
            # Not by way of Serve: without its applications a proxy answers for itself, with a 404.
            self._say("[Serve] stopping")
            ray.shutdown()
            end_haproxy()
        self._say("[Serve] stopped")

    def _timed(self, stage: str, action: Callable[[], None]) -> None:
        start = time.perf_counter()
        action()
        self._seconds[stage] = time.perf_counter() - start

    def _start_ray(self) -> None:
        context = ray.init(
            address="local",
            namespace="serve",
            include_dashboard=self._dashboard,
            object_store_memory=self._object_store_bytes(),
        )
        self._dashboard_url = context.dashboard_url

    def _object_store_bytes(self) -> int | None:
        ours = [app for app in self._config.applications if app.import_path == BUILDER]
        targets = {AppArgs.model_validate(app.args).staging.target for app in ours}
        return None if "object_store" in targets else OBJECT_STORE_BYTES

    def _start_serve(self) -> None:
        try:
            serve.start(
                proxy_location=self._config.proxy_location,
                http_options=self._config.http_options.model_dump(),
                grpc_options=self._config.grpc_options.model_dump(),
            )
        except (RayError, TimeoutError) as error:
            why = the_error_in(str(error))
            raise TorchWeaveError(f"Ray Serve did not start: {why}") from error

    def _deploy(self, stop: threading.Event) -> None:
        _get_global_client().deploy_apps(self._config, _blocking=False)
        said: dict[str, None] = {}
        while not stop.is_set():
            applications = list(serve.status().applications.values())
            for application in applications:
                for name, deployment in application.deployments.items():
                    line = the_error_in(deployment.message)
                    if "Error" in line and line not in said:
                        said[line] = None
                        self._say(f"[Serve] {name}: {line}")
                failed = application.status == ApplicationStatus.DEPLOY_FAILED
                if failed or any(error in line for line in said for error in PERMANENT):
                    why = "; ".join(said) or the_error_in(application.message)
                    raise TorchWeaveError(why.replace(OUR_ERRORS, ""))
            states = [application.status for application in applications]
            if states and all(state == ApplicationStatus.RUNNING for state in states):
                return self._wait_for_http(stop)
            stop.wait(POLL_S)
        return None

    def _wait_for_http(self, stop: threading.Event) -> None:
        """The proxy learns of the replicas a moment after they run."""
        deadline = time.monotonic() + HTTP_READY_S
        while not stop.is_set():
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if time.monotonic() > deadline:
                    raise TorchWeaveError(f"{self._url}/health: {error}") from error
            stop.wait(POLL_S)

    def _announce(self) -> None:
        for name, startup_s in self._startup_of_models():
            self._say(f"[Serve] {name}: seconds: {_listed(startup_s)}")
        total = sum(self._seconds.values())
        body = '{"prompt": "Gravity is", "max_new_tokens": 64}'
        self._say(f"[Serve] ready: {self._url} (start-up {total:.1f} s: {_listed(self._seconds)})")
        if self._dashboard_url:
            url = f"http://{self._dashboard_url}"
            self._say(f"[Serve] dashboard: {url}; `ray get-auth-token` prints its token")
        self._say(
            f"[Serve] try: {self._url}/ in a browser, or\n"
            f"curl -N {self._url}/v1/generate -d '{body}'"
        )

    def _startup_of_models(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Seconds by stage of one replica of each model."""
        for app_name, application in serve.status().applications.items():
            for name in application.deployments:
                if name.startswith(MODEL_REPLICA):
                    handle = serve.get_deployment_handle(name, app_name)
                    handle._init(_run_router_in_separate_loop=True)  # no loop runs here
                    described = handle.describe.remote().result(timeout_s=HTTP_READY_S)
                    yield name, described.startup_s

    def _drain(self) -> None:
        """Returns when nothing is open any more, and no new request can come."""
        self._say("[Serve] draining: open streams are finished first, a second signal ends them")
        running = set(serve.status().applications)
        ours = {
            app.name: AppArgs.model_validate(app.args).longest_stream_s
            for app in self._config.applications
            if app.import_path == BUILDER and app.name in running
        }
        longest_s = max(ours.values(), default=LONGEST_STREAM_S)
        drain(list(ours), longest_s, self._say)
        if others := running - ours.keys():
            _get_global_client().delete_apps(list(others), blocking=False)
            deadline = time.monotonic() + longest_s
            while time.monotonic() < deadline and others & serve.status().applications.keys():
                time.sleep(POLL_S)
        close_haproxy()


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
