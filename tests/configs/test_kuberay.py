"""The RayService manifests: KubeRay's schema, Ray's, ours, and no drift between them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.app import INGRESS_MARGIN_S
from deployments.args import LONGEST_STREAM_S, AppArgs, IngressArgs
from deployments.placement import Cluster, place
from tests.serve.cluster import CONFIG
from torchweave_ray.cli.serve import haproxy_profile

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/kuberay"
CRD = ROOT.parent / "shared/data/ray.io_rayservices.crd.yaml"
FILES = ("rayservice.yaml", "rayservice-gpu.yaml")
LONGEST_DRAIN_S = LONGEST_STREAM_S + INGRESS_MARGIN_S
GPU = {"device": "cuda", "num_gpus": 1}
OF_ONE_RUN = ("PORT", "PATH", "LOC", "STATE", "MIN_DRAINING")
"""Parts of names: ports and files are a process's own; a pod keeps Ray's, and Ray's drain pause."""

Json = dict[str, Any]


def _load(name: str) -> Json:
    manifest: Json = yaml.safe_load((FOLDER / name).read_text())
    return manifest


def _pods(manifest: Json) -> Iterator[Json]:
    """Pod specs: the head's, then the workers'."""
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def _environment(pod: Json) -> dict[str, str]:
    (container,) = pod["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"]}


def strict(schema: Any) -> Any:
    """The API server drops fields that a schema does not know, in silence: here they are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False, **schema} if closed else schema


@cache
def crd_schema() -> Json:
    if not CRD.exists():
        pytest.skip(f"no {CRD.name}: KubeRay's schema lies beside the checkout, not in it")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte
    versions = yaml.load(CRD.read_text(), Loader=loader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
    }
    closed: Json = strict(schema)
    return closed


@pytest.mark.parametrize("name", FILES)
def test_the_crd_accepts_it(name: str) -> None:
    schema = crd_schema()
    manifest = _load(name)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParms"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParms"):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("name", FILES)
def test_what_is_served_is_serve_config(name: str) -> None:
    """Ray's schema and ours take it, and it is the file that the tests and everybody else run."""
    values = yaml.safe_load(_load(name)["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(values)
    (application,) = values["applications"]
    AppArgs.model_validate(application["args"])
    expected = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert CONFIG == ROOT / "serve_config.yaml"
    if "gpu" in name:
        (model,) = expected["applications"][0]["args"]["models"]
        model |= GPU
    assert values == expected


@pytest.mark.parametrize("name", FILES)
def test_every_node_has_the_profile_of_torchweave_serve(name: str, tmp_path: Path) -> None:
    expected = {"RAY_worker_niceness": "0"} | haproxy_profile(tmp_path)
    for variable in list(expected):
        if any(part in variable for part in OF_ONE_RUN):
            del expected[variable]
    assert len(expected) == 4, expected
    for pod in _pods(_load(name)):
        environment = _environment(pod)
        assert {key: environment[key] for key in expected} == expected
        assert environment["ARTIFACT_DIR"] == "/artifacts"


@pytest.mark.parametrize("name", FILES)
def test_a_stopping_node_lets_its_streams_end(name: str) -> None:
    manifest = _load(name)
    for pod in _pods(manifest):
        drain = float(_environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert LONGEST_DRAIN_S < drain < pod["terminationGracePeriodSeconds"]
        # `ray stop` before the drain would kill the streams that it waits for.
        assert all("preStop" not in each.get("lifecycle", {}) for each in pod["containers"])
    assert manifest["spec"]["rayClusterDeletionDelaySeconds"] > LONGEST_DRAIN_S


@pytest.mark.parametrize("name", FILES)
def test_pods_have_what_a_node_needs(name: str) -> None:
    manifest = _load(name)
    head, worker = _pods(manifest)
    for pod in (head, worker):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        # The volume of this name is the one that KubeRay mounts in the autoscaler's container.
        assert mounts["/tmp/ray"] == "ray-logs"
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        claim = volumes[mounts["/artifacts"]]["persistentVolumeClaim"]["claimName"]
        assert claim in _names("PersistentVolumeClaim")
        assert pod["securityContext"]["runAsNonRoot"] is True
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in (8000, 8265, 52365)
    (container,) = worker["containers"]
    limits = container["resources"]["limits"]
    if "gpu" in name:
        assert limits["nvidia.com/gpu"] == 1
        assert container["image"].endswith("-cuda")
    else:
        assert limits["cpu"] == container["resources"]["requests"]["cpu"]
        assert container["image"].endswith("-cpu")


def test_the_first_worker_has_room_for_the_application() -> None:
    """It is built before a worker has come, with the head alone, which offers no CPUs."""
    for name in FILES:
        manifest = _load(name)
        values = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        args = AppArgs.model_validate(values["applications"][0]["args"])
        (placement,) = place(args, Cluster(node_cpus=1, num_nodes=1, num_gpus=0))
        (_, worker) = _pods(manifest)
        limits = worker["containers"][0]["resources"]["limits"]
        assert placement.num_cpus + IngressArgs().num_cpus <= float(limits["cpu"])
        assert placement.num_gpus == limits.get("nvidia.com/gpu", 0)
        cluster = manifest["spec"]["rayClusterConfig"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_gpu_variant_differs_where_it_must() -> None:
    cpu, gpu = (copy.deepcopy(_load(name)) for name in FILES)
    for manifest in (cpu, gpu):
        manifest["metadata"] = manifest["spec"]["serveConfigV2"] = None
        manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"] = None
        head, worker = _pods(manifest)
        for pod in (head, worker):
            pod["containers"][0]["image"] = None
        worker["containers"][0]["resources"] = None
        worker.pop("tolerations", None)
    assert gpu == cpu


def test_secrets_volume_and_redis_are_those_of_the_page() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for name in FILES:
        cluster = _load(name)["spec"]["rayClusterConfig"]
        assert cluster["authOptions"]["mode"] == "token"
        assert f"secret generic {cluster['authOptions']['secretName']} " in page
        redis = cluster["gcsFaultToleranceOptions"]
        assert redis["redisAddress"].partition(":")[0] in _names("Service")
        secret = redis["redisPassword"]["valueFrom"]["secretKeyRef"]
        assert f"secret generic {secret['name']} --from-literal={secret['key']}=" in page


def test_prometheus_asks_ports_that_pods_have() -> None:
    manifest = _load("podmonitor.yaml")
    assert manifest["kind"] == "PodMonitor"
    asked = {endpoint["port"] for endpoint in manifest["spec"]["podMetricsEndpoints"]}
    asked.remove("metrics")  # KubeRay adds this one
    wanted = dict(manifest["spec"]["selector"]["matchLabels"])
    assert wanted.pop("ray.io/is-ray-node") == "yes"  # KubeRay's own label
    cluster = _load(FILES[0])["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert wanted.items() <= group["template"]["metadata"]["labels"].items()
    *_, worker = _pods(_load(FILES[0]))
    assert asked <= {port["name"] for port in worker["containers"][0]["ports"]}


def _names(kind: str) -> set[str]:
    documents = yaml.safe_load_all((FOLDER / "prerequisites.yaml").read_text())
    return {each["metadata"]["name"] for each in documents if each["kind"] == kind}
