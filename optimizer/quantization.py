"""A recipe's `quantization`: which format each group of weights gets, and what is left as it is.

Parsed strictly. Knows format names, not formats, and loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torchweave_ray.errors import ConfigError, nearest

GroupFormat = Literal["none", "int8", "int8-group32", "int4-group32", "fp8"]
KVFormat = Literal["none", "int8"]
Method = Literal["rtn", "gptq"]


@dataclass(frozen=True, slots=True)
class Quantization:
    layers: GroupFormat = "none"
    """The products of the layers."""
    head: GroupFormat = "none"
    """The head's product; a tied embedding is the same table."""
    kv: KVFormat = "none"
    """Of the KV cache, unless a replica's `runner.kv_dtype` says otherwise."""
    method: Method = "rtn"
    """rtn: each weight to the nearest; gptq: what rounding loses is taken out of the weights that
    follow, by the activations of a bundled text."""
    skip: tuple[str, ...] = ()
    """Tensors of the artifact to leave in bfloat16: names, or patterns such as `layers.0.*`."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                named = ", ".join(get_args(kind))
                raise ConfigError(
                    f"recipe.quantization.{name} {value!r} is not supported; known: {named}"
                )
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigError(f"recipe.quantization.skip must be names, got {list(self.skip)!r}")
        if self.skip and not self.is_any:
            raise ConfigError("recipe.quantization.skip has nothing to be left out of")
        if self.method == "gptq" and "fp8" in (self.layers, self.head):
            raise ConfigError("recipe.quantization.method 'gptq' does not round to fp8")
        if self.method != "rtn" and not self.is_any:
            raise ConfigError(f"recipe.quantization.method {self.method!r} has nothing to round")

    @property
    def is_any(self) -> bool:
        """Of weights; a quantised KV cache leaves them as they are."""
        return (self.layers, self.head) != ("none", "none")

    def canonical(self) -> Any:
        """Plain JSON for the artifact's id."""
        return "none" if self == Quantization() else dataclasses.asdict(self)

    def formats(self, products: Mapping[str, str]) -> dict[str, str]:
        """What a manifest says: the format of each group, and "none" for each skipped tensor.

        `products`: group by name of the tensor. Raises ConfigError for a pattern that fits none.
        """
        if not self.is_any:
            return {}
        wanted = {"layers": self.layers, "head": self.head}
        said: dict[str, str] = {group: form for group, form in wanted.items() if form != "none"}
        for pattern in self.skip:
            names = [name for name in products if fnmatchcase(name, pattern)]
            if not names:
                raise ConfigError(
                    f"recipe.quantization.skip {pattern!r} fits no product of this model"
                    f"{nearest(pattern, products)}"
                )
            said |= {name: "none" for name in names if products[name] in said}
        return said


_KINDS: Mapping[str, Any] = {
    "layers": GroupFormat,
    "head": GroupFormat,
    "kv": KVFormat,
    "method": Method,
}
NONE = Quantization()
INT8 = Quantization(layers="int8", head="int8-group32")
INT4 = Quantization(layers="int4-group32", head="int8-group32")
FP8 = Quantization(layers="fp8")
NAMED: Mapping[str, Quantization] = {"none": NONE, "int8": INT8, "int4": INT4, "fp8": FP8}


def parse_quantization(value: Any) -> Quantization:
    """Of a recipe: one of NAMED, or a mapping. Raises ConfigError naming the nearest key."""
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"recipe.quantization {value!r} is not supported; known: {', '.join(NAMED)}, or a "
            "mapping with layers, head, kv, method and skip"
        )
    known = [item.name for item in dataclasses.fields(Quantization)]
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in quantization{nearest(str(key), known)}")
    given = dict(value)
    skip = given.pop("skip", ())
    if isinstance(skip, str) or not isinstance(skip, Sequence):
        raise ConfigError(f"recipe.quantization.skip must be a list, got {skip!r}")
    return Quantization(**given, skip=tuple(skip))
