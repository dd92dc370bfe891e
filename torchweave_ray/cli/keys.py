"""`torchweave keys`: add, revoke, list. A server that uses the file notices within a second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock
from pydantic import ValidationError

from torchweave_ray.api.access.key_file import ApiKey, digest_of, new_key, read_keys, write_keys
from torchweave_ray.api.errors import invalid_body
from torchweave_ray.errors import ConfigError

VARIABLE = "API_KEYS_FILE"
DEFAULT_FILE = Path("keys.yaml")
File = Annotated[
    Path | None,
    typer.Option("--file", help=f"The keys file. Default: {VARIABLE}, or {DEFAULT_FILE}."),
]


def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: File = None,
    name: Annotated[
        str | None, typer.Option("--id", help="What logs call it. Default: the tenant, numbered.")
    ] = None,
    cache_group: Annotated[
        str | None, typer.Option(help="Share the prefix cache with tenants of this group.")
    ] = None,
    weight: Annotated[float, typer.Option(help="Share of the machine, among tenants.")] = 1.0,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of all models.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts and outputs.")] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(help="At one time.")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and output together.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="May use this model only; may be repeated, * and ?.")
    ] = None,
    max_priority: Annotated[int, typer.Option(help="Highest priority of its requests.")] = 0,
    operator: Annotated[bool, typer.Option(help="May read /metrics.")] = False,
    expires_in_days: Annotated[float | None, typer.Option(help="Default: never.", min=0)] = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
) -> None:
    """Draw a new key, print it once, and add its hash to the file."""
    key, now = new_key(), datetime.now(UTC).replace(microsecond=0)
    with _locked(file) as path:
        keys = read_keys(path) if path.exists() else ()
        entry = _entry(
            id=name or _free_id(tenant, {each.id for each in keys}),
            sha256=digest_of(key),
            tenant=tenant,
            cache_group=cache_group,
            weight=weight,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_concurrent_requests=max_concurrent_requests,
            max_context=max_context,
            models=tuple(model) if model else None,
            max_priority=max_priority,
            operator=operator,
            created=now,
            expires=None if expires_in_days is None else now + timedelta(days=expires_in_days),
            note=note,
        )
        if any(each.id == entry.id for each in keys):
            raise ConfigError(f"{path} has a key with the id {entry.id!r} already")
        write_keys(path, [*keys, entry])
    typer.echo(f"{entry.id}: added to {path}; the key, which nobody can show again:", err=True)
    typer.echo(key)


def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As `keys list` shows them.")],
    file: File = None,
) -> None:
    """Take keys out of the file. Calls that are running go on."""
    with _locked(file) as path:
        keys = read_keys(path)
        if unknown := set(ids) - {key.id for key in keys}:
            raise ConfigError(f"{path} has no key with the id {min(unknown)!r}")
        write_keys(path, [key for key in keys if key.id not in ids])
    typer.echo(f"revoked: {', '.join(ids)}", err=True)


def show(
    file: File = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """The keys of the file, with what is set of each."""
    keys = read_keys(_path(file))
    shown = [
        {name: value for name, value in key.written().items() if name != "sha256"} for key in keys
    ]
    if as_json:
        expired = [{"expired": key.is_expired()} for key in keys]
        both = [values | more for values, more in zip(shown, expired, strict=True)]
        print(json.dumps({"keys": both}, default=str))
        return
    for key, values in zip(keys, shown, strict=True):
        words = [f"{name}={value}" for name, value in values.items() if name != "id"]
        typer.echo(f"{key.id}  {' '.join(words)}{'  EXPIRED' if key.is_expired() else ''}")


def add_commands(app: typer.Typer) -> None:
    keys = typer.Typer(help="API keys of a server.", no_args_is_help=True)
    keys.command()(add)
    keys.command()(revoke)
    keys.command("list")(show)
    app.add_typer(keys, name="keys")


def _path(file: Path | None) -> Path:
    return file or Path(os.environ.get(VARIABLE) or DEFAULT_FILE)


@contextmanager
def _locked(file: Path | None) -> Iterator[Path]:
    """Two commands at once do not lose each other's keys."""
    path = _path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield path


def _entry(**values: Any) -> ApiKey:
    try:
        return ApiKey(**values)
    except ValidationError as error:
        raise ConfigError(invalid_body(error).message) from None


def _free_id(tenant: str, taken: set[str]) -> str:
    number = 1
    while f"{tenant}-{number}" in taken:
        number += 1
    return f"{tenant}-{number}"
