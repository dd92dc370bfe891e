"""`torchweave artifact`: show, verify, diff, gc. Also which artifact an offline command means, and
the engine's configuration file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchweave_ray.cli.completion import recipes, staged

if TYPE_CHECKING:
    from torchweave_ray.config import EngineConfig

Model = Annotated[
    str | None,
    typer.Option(
        help="An artifact's folder, or what `torchweave optimize` takes. Default: "
        "ARTIFACT_MODEL_DIR, or SmolLM2-135M-Instruct.",
        autocompletion=recipes,
    ),
]
EngineFile = Annotated[
    Path | None, typer.Option("--engine", help="YAML of the engine's configuration.")
]


def artifact_of(model: str | None) -> Path:
    """The artifact's folder; what is not staged yet is staged, with bars on stderr."""
    from torchweave_ray.models.artifact import MANIFEST

    model = model or os.environ.get("ARTIFACT_MODEL_DIR")
    if model and (folder := Path(model).expanduser()).joinpath(MANIFEST).is_file():
        return folder
    from optimizer.pipeline import optimize
    from optimizer.progress import BarProgress
    from optimizer.recipe import DEFAULT_RECIPE

    with BarProgress() as progress:
        return optimize(model or DEFAULT_RECIPE, None, progress)


def read_engine_config(path: Path | None) -> EngineConfig:
    """Raises ConfigError for what cannot be read, and for unknown keys."""
    from torchweave_ray.config import EngineConfig

    return EngineConfig.from_dict(read_engine_options(path))


def read_engine_options(path: Path | None) -> dict[str, Any]:
    """The file as it is, but that a draft model which is named by its recipe is staged. Raises
    ConfigError for what cannot be read."""
    from torchweave_ray.documents import read_document
    from torchweave_ray.errors import ConfigError

    values = {} if path is None else read_document(path) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping")
    speculation = values.get("speculation")
    if isinstance(speculation, dict) and isinstance(speculation.get("model"), str):
        speculation["model"] = str(artifact_of(speculation["model"]))
    return values


StoreFolder = Annotated[
    Path | None, typer.Option(help="Folder of artifacts. Default: ARTIFACT_DIR, or ./artifacts.")
]
Named = Annotated[
    str,
    typer.Argument(
        help="A folder, or a model, an artifact or an id's beginning in the store.",
        autocompletion=staged,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def add_commands(app: typer.Typer) -> None:
    """`torchweave artifact ...`"""
    group = typer.Typer(help="Look at staged models, check and delete them.", no_args_is_help=True)
    for command in (show, verify, diff, gc):
        group.command()(command)
    app.add_typer(group, name="artifact")


def show(
    artifact: Annotated[
        str | None,
        typer.Argument(
            help="As of verify; without it, what the store holds.", autocompletion=staged
        ),
    ] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show an artifact: its source, files, stages, quality and tuning; or list them all."""
    from optimizer.inventory import list_artifacts

    shelf = _open_store(store)
    if artifact is None:
        entries = list_artifacts(shelf)
        if as_json:
            print(json.dumps({"store": str(shelf.root), "artifacts": [_entry(e) for e in entries]}))
        else:
            rows = [[e.model, e.artifact_id, *_sizes(e), " ".join(e.links)] for e in entries]
            _print_table(("model", "id", "MB", "published", "links"), rows)
        return
    values = _everything(shelf, artifact)
    if as_json:
        print(json.dumps(values))
    else:
        _print_artifact(values)


def verify(artifact: Named, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Hash every file of an artifact and look at every tensor's shape. Exit status 1: it is not
    whole."""
    from optimizer.inventory import find_artifact
    from torchweave_ray.errors import ArtifactError
    from torchweave_ray.models.artifact import verify_artifact
    from torchweave_ray.models.weights import check_weights

    directory = find_artifact(_open_store(store), artifact)
    try:
        manifest = verify_artifact(directory, full=True)
        check_weights(directory, manifest)
    except ArtifactError as error:
        if not as_json:
            raise
        print(json.dumps({"artifact": str(directory), "whole": False, "error": str(error)}))
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"artifact": str(directory), "whole": True, "id": manifest.artifact_id}))
    else:
        num_bytes = sum(entry.size for entry in manifest.files.values())
        print(f"{directory} is whole: {len(manifest.files)} files, {num_bytes / 1e6:.1f} MB")


def diff(first: Named, second: Named, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Say in what two artifacts differ, times aside. Exit status 1: they have not the same id."""
    shelf = _open_store(store)
    left, right = (dict(_flat(_everything(shelf, name))) for name in (first, second))
    changed = {
        key: [left.get(key), right.get(key)]
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not key.startswith(_NOT_COMPARED)
    }
    if as_json:
        print(json.dumps(changed))
    else:
        rows = [
            [key, *("" if v is None else str(v) for v in pair)] for key, pair in changed.items()
        ]
        _print_table(("", first, second), rows)
    if "manifest.artifact_id" in changed:
        raise typer.Exit(1)


def gc(
    keep: Annotated[int, typer.Option(help="The newest of each model stay.", min=0)],
    store: StoreFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
    unfinished: Annotated[
        bool, typer.Option(help="Also what killed runs left, from which they would go on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old artifacts, never one that a process uses or a link of the store points to."""
    from optimizer.inventory import collect, discard_unfinished

    shelf = _open_store(store)
    verdicts = collect(shelf, keep, dry_run)
    gone = discard_unfinished(shelf, dry_run) if unfinished else []
    freed = sum(v.entry.num_bytes for v in verdicts if v.deleted) + sum(size for _, size in gone)
    if as_json:
        artifacts = [_entry(v.entry) | {"deleted": v.deleted, "why": v.why} for v in verdicts]
        result = {"store": str(shelf.root), "dry_run": dry_run, "freed_bytes": freed}
        print(json.dumps(result | {"artifacts": artifacts, "unfinished": [key for key, _ in gone]}))
        return
    word = "would go" if dry_run else "deleted"
    rows = [
        [word if v.deleted else "kept", v.entry.directory.name, *_sizes(v.entry), v.why]
        for v in verdicts
    ]
    rows += [[word, f".work/{key}", f"{size / 1e6:.1f}", "", "unfinished"] for key, size in gone]
    _print_table(("", "artifact", "MB", "published", "why"), rows)
    print(f"{freed / 1e6:.1f} MB {'would be ' if dry_run else ''}freed")


_NOT_COMPARED = ("directory", "report.stages", "report.report_sha256", "manifest.manifest_sha256")


def _open_store(root: Path | None) -> Any:
    """A `Store`; types of the upper packages are not known here."""
    from optimizer.remote_store import open_places
    from optimizer.store import Store

    return open_places(None, None)[0] if root is None else Store(root.expanduser().absolute())


def _entry(entry: Any) -> dict[str, Any]:
    values = {key: getattr(entry, key) for key in entry.__slots__}
    return values | {"directory": str(entry.directory)}


def _sizes(entry: Any) -> tuple[str, str]:
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.published_at))
    return f"{entry.num_bytes / 1e6:.1f}", moment


def _everything(store: Any, name: str) -> dict[str, Any]:
    from optimizer.inventory import find_artifact
    from torchweave_ray.models.artifact import read_manifest, read_report

    directory = find_artifact(store, name)
    manifest = json.loads(read_manifest(directory).to_json())
    return {"directory": str(directory), "manifest": manifest, "report": read_report(directory)}


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """("manifest.files.config.json.size", 12), ..."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}".lstrip("."))
    else:
        yield key, values


def _print_artifact(values: dict[str, Any]) -> None:
    manifest, report = values["manifest"], values["report"]
    rows = [["folder", values["directory"]]]
    names = ("artifact_id", "source", "revision", "source_sha256", "architecture", "dtype")
    rows += [[name, str(manifest[name])] for name in (*names, "layout") if manifest[name]]
    rows += [[f"quantization {k}", v] for k, v in manifest["quantization"].items()]
    rows += [
        [name, f"{entry['size'] / 1e6:.1f} MB, sha256 {entry['sha256'][:16]}…"]
        for name, entry in manifest["files"].items()
    ]
    rows += [
        [f"stage {s['name']}", f"{s['seconds']:.1f} s, {s['num_bytes'] / 1e6:.1f} MB"]
        for s in report.get("stages", [])
    ]
    rows += [
        [f"{part} {key}", f"{value:.5g}" if isinstance(value, float) else str(value)]
        for part in ("quality", "speed", "tuning")
        for key, value in _flat(report.get(part) or {})
        if key and not isinstance(value, list)
    ]
    _print_table(("", ""), rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=any(header), padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # In a file or a pipe lines stay whole.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
