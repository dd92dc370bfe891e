"""The file of keys: what it may say, and the commands that write it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchweave_ray.api.access.key_file import ApiKey, digest_of, read_keys, write_keys
from torchweave_ray.cli.app import build_app
from torchweave_ray.errors import ConfigError

DIGEST = digest_of("tw-1")


def entry(**values: object) -> dict[str, object]:
    return {"id": "a", "sha256": DIGEST, "tenant": "us", **values}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("keys: [", "keys.yaml is not YAML: while parsing"),
        ("[]", "must be a mapping with the list `keys`"),
        ("key: []", "keys is required"),
        (json.dumps({"keys": [entry(wieght=2)]}), "unknown field 'keys[0].wieght'"),
        (json.dumps({"keys": [{"id": "a", "tenant": "us"}]}), "keys[0].sha256 is required"),
        (json.dumps({"keys": [entry(sha256="tw-1")]}), "keys[0].sha256: must be 64"),
        (json.dumps({"keys": [entry(weight=0)]}), "keys[0].weight: input should be greater"),
        (json.dumps({"keys": [entry(tenant="a\nb")]}), "keys[0].tenant"),
        (json.dumps({"keys": [entry(expires="2030-01-01T00:00")]}), "keys[0].expires"),
        (json.dumps({"keys": [entry(), entry(sha256="0" * 64)]}), "two keys have the id 'a'"),
        (json.dumps({"keys": [entry(), entry(id="b")]}), "two entries are the same key"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_a_wrong_file_is_refused_with_its_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert complaint in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_an_error_and_not_an_open_door(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read keys file"):
        read_keys(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    every = ApiKey(
        id="a",
        sha256=DIGEST,
        tenant="us",
        weight=2,
        requests_per_minute=1,
        tokens_per_minute=2,
        max_concurrent_requests=3,
        max_context=4,
        models=("m", "n*"),
        max_priority=5,
        operator=True,
        created=expires,
        expires=expires,
        note="for tests",
    )
    keys = (every, ApiKey(id="b", sha256="0" * 64, tenant="them"))
    write_keys(tmp_path / name, keys)
    assert read_keys(tmp_path / name) == keys
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_add_revoke_list(tmp_path: Path) -> None:
    file = ["--file", str(tmp_path / "keys.yaml")]
    runner = CliRunner()

    def run(*words: str) -> str:
        result = runner.invoke(build_app(), ["keys", *words, *file])
        assert result.exit_code == 0, result.output
        return result.stdout

    limits = ["--requests-per-minute", "60", "--model", "a", "--model", "b*"]
    key = run("add", "us", *limits, "--expires-in-days", "1").strip()
    other = run("add", "us").strip()
    assert key.startswith("tw-")
    assert len(key) == 46
    assert key != other
    first, second = read_keys(tmp_path / "keys.yaml")
    assert (first.id, second.id) == ("us-1", "us-2")
    assert first.sha256 == digest_of(key)
    assert (first.requests_per_minute, first.models) == (60, ("a", "b*"))
    assert first.expires is not None
    assert 0.9 < (first.expires - datetime.now(UTC)).total_seconds() / 86_400 < 1.1
    assert key not in (tmp_path / "keys.yaml").read_text()
    listed = run("list")
    assert "us-1  tenant=us requests_per_minute=60" in listed
    assert first.sha256 not in listed
    run("revoke", "us-1")
    assert [each.id for each in read_keys(tmp_path / "keys.yaml")] == ["us-2"]
    again = runner.invoke(build_app(), ["keys", "revoke", "us-1", *file])
    assert isinstance(again.exception, ConfigError)
    assert "no key with the id 'us-1'" in str(again.exception)
