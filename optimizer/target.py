"""What an artifact is made for: this machine, or an instruction set or GPU architecture by name.

Weights are the same for every CPU, so a target decides what may be measured here, and the layout
where GPUs read it.
"""

from __future__ import annotations

import re

from torchweave_ray.errors import ConfigError, nearest

THIS_MACHINE = "auto"
INSTRUCTION_SETS = ("avx2", "avx512", "avx512vnni", "avx512bf16")
"""The kernels' own list, which loads torch, and a recipe is read without: a test compares."""
_GPU = re.compile(r"sm_[0-9]{2,3}[a-z]?|gfx[0-9a-f]{3,5}")


def check_target(target: str) -> None:
    """Raises ConfigError unless it is auto, an instruction set of ours or a GPU architecture."""
    if target == THIS_MACHINE or target in INSTRUCTION_SETS or _GPU.fullmatch(target):
        return
    known = [THIS_MACHINE, *INSTRUCTION_SETS]
    raise ConfigError(
        f"recipe.target {target!r} is not supported; known: {', '.join(known)}, or a GPU's "
        f"architecture (sm_90, gfx942){nearest(target, known)}"
    )


def is_gpu(target: str) -> bool:
    return _GPU.fullmatch(target) is not None


def why_not_measured(target: str) -> str | None:
    """None: speeds measured on this machine's CPU are the target's."""
    if target == THIS_MACHINE:
        return None
    if is_gpu(target):
        return f"the recipe's target is the GPU architecture {target}, and only CPUs are measured"
    from torchweave_ray.kernels.library import KernelsUnavailable, load_library

    try:
        here = load_library().isa
    except KernelsUnavailable as error:
        here = f"none ({error})"
    if here == target:
        return None
    return f"the recipe's target is {target}, this machine's instruction set is {here}"
