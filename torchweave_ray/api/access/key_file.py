"""The file of API keys: hashes, whose they are, and what each may do.

YAML or JSON, by its name. Keys are 256 random bits, so that one SHA-256 is all the hashing that
they need: there is nothing to guess. Knows no HTTP; who reads it again, and when, is the keyring's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from torchweave_ray.api.errors import invalid_body
from torchweave_ray.documents import read_document
from torchweave_ray.errors import ConfigError

KEY_PREFIX = "tw-"
_NAME = r"^[\w.:@-]+$"
_HEX_DIGEST = re.compile("[0-9a-f]{64}")
_HEADER = "# API keys of TorchWeave Ray: `torchweave keys` writes this file. It holds no key.\n"


class ApiKey(BaseModel):
    """One key. A limit that is not set does not limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(max_length=64, pattern=_NAME)
    """What lists, logs and the usage log call it. It is no secret."""
    sha256: str
    """Of the key, in hexadecimal."""
    tenant: str = Field(max_length=64, pattern=_NAME)
    """Whose it is. Tenants share the machine by weight, and no prefix cache unless told to."""
    cache_group: str | None = Field(default=None, max_length=64, pattern=_NAME)
    """Tenants of one group share the prefix cache: each can then tell by the time of an answer
    what another has asked."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """The share of the machine that its requests get where tenants compete."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and outputs together."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    max_context: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and output together."""
    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The only ones that it may use, by name or with * and ?."""
    max_priority: int = 0
    """The highest `priority` that its requests may ask for."""
    operator: bool = False
    """May also read /metrics, which tells of all tenants, and let replicas sleep."""
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    note: str = ""

    @field_validator("sha256")
    @classmethod
    def _digest(cls, value: str) -> str:
        if not _HEX_DIGEST.fullmatch(value):
            raise ValueError("must be 64 lower-case hexadecimal digits")
        return value

    def is_expired(self, now: datetime | None = None) -> bool:
        return self.expires is not None and self.expires <= (now or datetime.now(UTC))

    def written(self) -> dict[str, Any]:
        """As it stands in the file, without what is not set."""
        return self.model_dump(mode="json", exclude_defaults=True)


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey]


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises ConfigError naming the file, the entry and its field."""
    values = read_document(path, "keys file ")
    if not isinstance(values, dict):
        raise ConfigError(f"keys file {path} must be a mapping with the list `keys`")
    try:
        keys = tuple(_Keys.model_validate(values).keys)
    except ValidationError as error:
        raise ConfigError(f"keys file {path}: {invalid_body(error).message}") from None
    ids = [key.id for key in keys]
    if twice := [each for each, count in Counter(ids).items() if count > 1]:
        raise ConfigError(f"keys file {path}: two keys have the id {twice[0]!r}")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ConfigError(f"keys file {path}: two entries are the same key")
    return keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """In one piece: a server that reads meanwhile sees the old file or the new one."""
    values = {"keys": [key.written() for key in keys]}
    if path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        text = _HEADER + yaml.safe_dump(values, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
