"""The plain Deployment and the ECS task: they hold together and name what server and image have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from starlette.routing import Route
from typer.main import get_command

from optimizer.task import check_recipe
from tests.api.conftest import load_tokenizer
from tests.configs.test_kuberay import LONGEST_DRAIN_S, crd_schema
from tests.fakes import FakeBackend
from torchweave_ray.api.app import create_app
from torchweave_ray.cli.app import build_app

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/kubernetes"
ECS = json.loads((FOLDER / "ecs-task-definition.json").read_text())

Json = dict[str, Any]


def _documents(path: Path) -> dict[str, Json]:
    return {each["kind"]: each for each in yaml.safe_load_all(path.read_text())}


DOCUMENTS = _documents(FOLDER / "deployment.yaml")
DEPLOYMENT = DOCUMENTS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(SERVER,) = POD["containers"]
(OPTIMIZER,) = POD["initContainers"]


@pytest.mark.parametrize("name", ["kubernetes/deployment.yaml", "kuberay/prerequisites.yaml"])
def test_pod_templates_are_pod_templates(name: str) -> None:
    """By the schema of one inside KubeRay's: unknown fields and wrong types are errors."""
    group = crd_schema()["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]
    schema = group["headGroupSpec"]["properties"]["template"]
    documents = _documents(ROOT / "configs" / name)
    for kind in {"Deployment", "StatefulSet"} & set(documents):
        template = documents[kind]["spec"]["template"]
        jsonschema.validate(template["spec"], schema["properties"]["spec"])
        assert documents[kind]["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        service = documents["Service"]["spec"]
        assert service["selector"] == template["metadata"]["labels"]
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert {port.get("targetPort", port["name"]) for port in service["ports"]} <= ports


def test_volumes_are_there() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    for container in (SERVER, OPTIMIZER):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        assert {"name": "artifacts", "mountPath": "/artifacts"} in container["volumeMounts"]
    claim = volumes["artifacts"]["persistentVolumeClaim"]["claimName"]
    assert claim == DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_probes_ask_endpoints_of_the_server() -> None:
    paths = {
        route.path
        for route in create_app(FakeBackend(), load_tokenizer).routes
        if isinstance(route, Route)
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = SERVER[probe]["httpGet"]
        assert asked["path"] in paths
        assert asked["port"] == SERVER["ports"][0]["name"]
    assert SERVER["livenessProbe"]["httpGet"]["path"] == "/livez"  # not for want of a replica


def test_streams_end_before_the_pod_does() -> None:
    pause = float(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + LONGEST_DRAIN_S < POD["terminationGracePeriodSeconds"]
    (server,) = (each for each in ECS["containerDefinitions"] if each["name"] == "server")
    assert server["stopTimeout"] > LONGEST_DRAIN_S


def test_nobody_is_root() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    for container in (SERVER, OPTIMIZER):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
    assert all(each["user"] == "1000:1000" for each in ECS["containerDefinitions"])


def test_commands_are_those_of_torchweave() -> None:
    known = getattr(get_command(build_app()), "commands")  # noqa: B009
    commands = [SERVER["command"], OPTIMIZER["command"]]
    commands += [each["command"] for each in ECS["containerDefinitions"]]
    for command in commands:
        words = command[command.index("torchweave") :]
        assert words[1] in known
        for recipe in words[2:]:
            check_recipe(recipe)


def test_the_ecs_task_stages_first() -> None:
    optimizer, server = ECS["containerDefinitions"]
    assert optimizer["essential"] is False
    assert server["dependsOn"] == [{"containerName": "optimizer", "condition": "SUCCESS"}]
    volumes = {volume["name"] for volume in ECS["volumes"]}
    for container in (optimizer, server):
        (mount,) = container["mountPoints"]
        assert mount["sourceVolume"] in volumes
        assert mount["containerPath"] == "/artifacts"
    assert "http://127.0.0.1:8000/health" in server["healthCheck"]["command"][1]
    assert server["portMappings"][0]["containerPort"] == 8000
