"""Arguments, environment, placement and the command line's configuration, without a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.app import build, deployment_name
from deployments.args import AppArgs, ModelArgs, StagingArgs, limits_of
from deployments.environment import VARIABLES, apply_environment
from deployments.launch import load_config
from deployments.placement import Cluster, Placement, ReplicaConfig, place
from deployments.status import the_error_in
from torchweave_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CPU2 = Cluster(node_cpus=2, num_nodes=1, num_gpus=0)


def args(**values: Any) -> AppArgs:
    return AppArgs.model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modells": []}, "unknown key 'modells' in app args; did you mean 'models'?"),
        ({"models": [{"recipee": "x"}]}, "'recipee' in model args; did you mean 'recipe'?"),
        ({"ingress": {"buss": True}}, "'buss' in ingress args; did you mean 'bus'?"),
        ({"staging": {"taget": "files"}}, "'taget' in staging args; did you mean 'target'?"),
        ({"models": [{"engine": {"cach": {}}}]}, "engine.cach; did you mean 'cache'?"),
        ({"models": [{"engine": {"scheduler": {"max_num_seq": 1}}}]}, "'max_num_seqs'"),
        ({"models": [{"engine": {"scheduler": {"max_num_seqs": "8"}}}]}, "must be int, got '8'"),
        ({"models": [{"engine": {"runner": {"device": "cpu"}}}]}, "set device of the model"),
        ({"models": [{"recipe": "a", "artifact": "b"}]}, "recipe or an artifact, not both"),
        ({"models": [{"id": "a"}, {"id": "a"}]}, "two models have the id 'a'"),
        ({"api": {"max_new_token": 3}}, "api.max_new_token; did you mean 'max_new_tokens'?"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        args(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"models": []}, "models"),
        ({"models": [{"num_replicas": 0}]}, "models.0.num_replicas"),
        ({"models": [{"id": "a#b"}]}, "models.0.id"),
        ({"models": [{"device": "tpu"}]}, "models.0.device"),
        ({"ingress": {"num_replicas": "many"}}, "ingress.num_replicas"),
    ],
)
def test_values_out_of_range_name_their_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        args(**values)


def test_names_of_models_and_deployments() -> None:
    assert args().models[0].name == "smollm2-135m"
    assert args(models=[{"recipe": "org/Model"}]).models[0].name == "Model"
    assert args(models=[{"artifact": "/a/b-123/"}]).models[0].name == "b-123"
    assert deployment_name("org/model") == "ModelReplica:org--model"


def test_environment_over_configuration_over_defaults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="deployments.environment")
    said = args(
        models=[{"recipe": "r", "engine": {"scheduler": {"max_num_seqs": 4}}}], api={"top_k": 3}
    )
    environment = {"MAX_BATCH": "8", "TEMPERATURE": "0.5", "TOP_P": "", "SCHEDULE_TICK_MS": "2"}
    result = apply_environment(said, environment)
    assert result.models[0].engine["scheduler"] == {"max_num_seqs": 8, "schedule_tick_ms": 2.0}
    assert (result.api_settings.temperature, result.api_settings.top_k) == (0.5, 3)
    assert result.api_settings.top_p == args().api_settings.top_p
    lines = [record.getMessage() for record in caplog.records]
    assert "[Config] MAX_BATCH=8: environment, over 4 of the configuration" in lines
    assert "[Config] TEMPERATURE=0.5: environment, over the default" in lines
    assert "[Config] TOP_K: 3 of the configuration" in lines
    assert "[Config] TOP_P: the default" in lines
    assert len(lines) == len(VARIABLES)


def test_environment_names_the_model() -> None:
    said = args(models=[{"id": "mine", "recipe": "r", "num_replicas": 2}])
    (model,) = apply_environment(said, {"HF_MODEL": "org/m"}).models
    assert (model.name, model.recipe, model.artifact, model.num_replicas) == (
        *("org/m", "org/m", None, 2),
    )
    (model,) = apply_environment(said, {"ARTIFACT_MODEL_DIR": "/a"}).models
    assert (model.name, model.recipe, model.artifact) == ("mine", None, "/a")
    both = {"HF_MODEL": "org/m", "ARTIFACT_MODEL_DIR": "/a", "ARTIFACT_DIR": "/store"}
    result = apply_environment(said, both)
    assert (result.models[0].name, result.models[0].artifact) == ("org/m", "/a")
    assert result.artifact_dir == "/store"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MAX_BATCH": "many"}, "MAX_BATCH=many"),
        ({"MAX_BATCH": "0"}, "MAX_BATCH=0: max_num_seqs must be at least 1"),
        ({"SPECULATION": "guess"}, "SPECULATION=guess: .*must be 'none' or 'ngram'"),
        ({"TEMPERATURE": "warm"}, "TEMPERATURE=warm"),
    ],
)
def test_a_bad_variable_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_environment(args(), environment)


def test_hf_model_does_not_choose_among_several() -> None:
    two = args(models=[{"id": "a"}, {"id": "b"}])
    with pytest.raises(ConfigError, match="HF_MODEL names one model, the configuration 2"):
        apply_environment(two, {"HF_MODEL": "org/m"})


@pytest.mark.parametrize(
    ("values", "cluster", "placements"),
    [
        ({}, CPU2, [Placement(1, 0, 1)]),
        ({}, Cluster(1, 1, 0), [Placement(0.9, 0, 1)]),
        ({}, Cluster(8, 1, 0), [Placement(7, 0, 1)]),
        ({}, Cluster(8, 1, 1), [Placement(1, 1, 1)]),
        ({"models": [{"device": "cpu"}]}, Cluster(8, 1, 1), [Placement(7, 0, 1)]),
        ({"models": [{"device": "cuda"}]}, CPU2, [Placement(1, 1, 1)]),
        ({"models": [{"num_replicas": 2}]}, Cluster(8, 1, 1), [Placement(1, 0.5, 2)]),
        ({"models": [{"num_replicas": 2}]}, Cluster(8, 2, 0), [Placement(7, 0, 1)]),
        ({"models": [{"num_replicas": 2}]}, CPU2, [Placement(0.9, 0, 2)]),
        ({"models": [{"num_cpus": 3}]}, Cluster(8, 1, 0), [Placement(3, 0, 1)]),
        (
            {"models": [{"id": "a"}, {"id": "b", "device": "cpu"}]},
            Cluster(8, 1, 1),
            [Placement(1, 1, 1), Placement(6, 0, 1)],
        ),
    ],
)
def test_placement(values: dict[str, Any], cluster: Cluster, placements: list[Placement]) -> None:
    assert place(args(**values), cluster) == placements


def test_a_replica_shares_cores_and_memory_with_its_neighbours() -> None:
    (model,) = args(models=[{"engine": {"runner": {"dtype": "bfloat16"}}}]).models
    config = ReplicaConfig(model, Placement(1, 0, 2), None).engine_config(cores=8)
    assert (config.runner.device, config.runner.dtype, config.runner.threads) == (
        *("cpu", "bfloat16", 4),
    )
    assert config.cache.replicas_per_node == 2
    (model,) = args(models=[{"threads": 3}]).models
    config = ReplicaConfig(model, Placement(1, 1, 1), None).engine_config(cores=8)
    assert (config.runner.device, config.runner.threads) == ("cuda", 3)


def test_importing_is_cheap_and_needs_no_torch() -> None:
    code = (
        "import sys; from deployments.app import build; from deployments.args import AppArgs\n"
        "build(AppArgs())\n"
        "import ray; assert not ray.is_initialized()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_the_configurations_in_the_repository_are_valid() -> None:
    paths = [ROOT / "serve_config.yaml", *sorted((ROOT / "configs" / "serve").glob("*.yaml"))]
    assert len(paths) > 1
    for path in paths:
        schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
        for application in schema.applications:
            said = AppArgs.model_validate(application.args)
            build(said)
            names = {deployment_name(model.name) for model in said.models} | {"Ingress"}
            assert {deployment.name for deployment in application.deployments} <= names
    for path in sorted((ROOT / "configs" / "engine").glob("*.yaml")):
        args(models=[{"engine": yaml.safe_load(path.read_text())}])


def test_the_environment_file_lists_every_variable() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    named = {line.lstrip("# ").partition("=")[0] for line in lines if "=" in line}
    assert {variable.name for variable in VARIABLES} <= named


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text((ROOT / "serve_config.yaml").read_text())
    config = load_config(path, "org/m", None, "127.0.0.1", 9)
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 9)
    assert config.applications[0].args["models"] == [{"recipe": "org/m"}]
    verified = load_config(path, None, None, None, None, verify="full")
    assert AppArgs.model_validate(verified.applications[0].args).verify == "full"
    assert load_config(path, None, Path("a"), None, None).applications[0].args["models"] == [
        {"artifact": str(Path("a").absolute())}
    ]
    with pytest.raises(ConfigError, match="not both"):
        load_config(path, "r", Path("a"), None, None)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml", None, None, None, None)
    path.write_text("- a list")
    with pytest.raises(ConfigError, match="lists no applications"):
        load_config(path, None, None, None, None)


def test_a_message_is_cut_to_the_error_itself() -> None:
    message = (
        "The deployment failed to start 1 times in a row.\nTraceback (most recent call last):\n"
        '  File "x.py", line 1, in f\ntorchweave_ray.errors.ArtifactError: /a/b was altered\n'
    )
    assert the_error_in(message) == "torchweave_ray.errors.ArtifactError: /a/b was altered"
    assert the_error_in("  Deploying  \n") == "Deploying"


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"max_num_seq": 4}, "unknown limit max_num_seq; did you mean 'max_num_seqs'"),
        ({"max_num_seqs": 9}, "max_num_seqs = 9 exceeds the capacity of 8"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_seqs": "4"}, "max_num_seqs"),
        ({"ageing_tokens_per_step": 1}, "unknown limit ageing_tokens_per_step"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens must be at least max_num_seqs"),
    ],
)
def test_a_bad_user_config_is_named(user_config: dict[str, Any], message: str) -> None:
    model = ModelArgs(engine={"scheduler": {"max_num_seqs": 8}})
    with pytest.raises(ConfigError, match=message):
        limits_of(model, user_config)
    assert limits_of(model, {"max_num_seqs": 4}) == {"max_num_seqs": 4}


def test_staging_by_its_target_alone() -> None:
    assert args(staging="object_store").staging == StagingArgs(target="object_store")
    given = {"target": "object_store", "num_cpus": 2, "memory": 10, "max_retries": 0}
    assert args(staging=given).staging.model_dump() == given
    with pytest.raises(ValueError, match="'files' or 'object_store'"):
        args(staging="objectstore")
