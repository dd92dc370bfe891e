"""The one-way imports of docs/structures.md: a table, and the walk over the ast that holds it.

Every import counts, also one inside a function or under TYPE_CHECKING; the only exemption is
`torchweave_ray.cli`, the composition root, which may import the upper packages inside functions.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torchweave_ray", "deployments", "optimizer")
UPPER = frozenset({"ray", "deployments", "optimizer"})
TW = "torchweave_ray."


@dataclass(frozen=True, slots=True)
class Rule:
    """`may`: modules of ours (with all below them) that this package may import besides itself."""

    may: frozenset[str] | None
    """None: anything of torchweave_ray."""
    never: frozenset[str]
    """Top-level names of other people's packages, and of our upper ones."""


def _ours(names: str) -> frozenset[str]:
    return frozenset(TW + name for name in names.split())


def _rule(may: str | None, never: str) -> Rule:
    return Rule(None if may is None else _ours(may), frozenset(never.split()) | UPPER)


CONTRACTS = "deadline errors outputs reported sampling_params stream_origin"
DEPLOYMENTS_MAY = _ours(
    f"{CONTRACTS} build config documents api batch metrics tokenizer block_hash "
    "engine.async_engine parallel.launch parallel.rank"
) | {TW + "kernels.machine", "optimizer.task"}
OPTIMIZER_MAY = _ours("models hf kernels attention documents errors")
RULES = {
    TW + "engine": _rule(
        f"{CONTRACTS} metrics tracing config block_hash tokenizer", "torch transformers"
    ),
    TW + "runner": _rule(
        f"{CONTRACTS} engine.plan engine.kv_groups models attention kernels config",
        "transformers asyncio",
    ),
    TW + "parallel": _rule(
        "errors config engine.plan runner models attention kernels", "transformers asyncio"
    ),
    TW + "models": _rule("attention.base kernels errors", "transformers asyncio"),
    TW + "hf": _rule("models attention kernels errors", "asyncio"),
    TW + "attention": _rule("kernels errors", "transformers asyncio"),
    TW + "kernels": _rule("attention.base errors", "transformers asyncio"),
    TW + "api": _rule(f"{CONTRACTS} documents metrics tracing tokenizer block_hash", "torch"),
    TW + "bench": _rule(None, ""),
    TW + "cli": Rule(None, frozenset()),
    "torchweave_ray": _rule(None, ""),
    "deployments": Rule(DEPLOYMENTS_MAY, frozenset({"torch"})),
    "deployments.bench": Rule(DEPLOYMENTS_MAY | _ours("bench.transport"), frozenset({"torch"})),
    "optimizer": Rule(OPTIMIZER_MAY, frozenset({"ray", "deployments"})),
    "optimizer.task": Rule(OPTIMIZER_MAY, frozenset({"deployments"})),
}
"""The longest matching name decides. Leaf modules of torchweave_ray follow its own row."""

LEAVES = (
    "errors",
    "sampling_params",
    "stream_origin",
    "reported",
    "deadline",
    "outputs",
    "block_hash",
    "config",
    "documents",
    "tokenizer",
    "metrics",
    "tracing",
)
"""What everybody may import must itself import nothing but leaves, and no torch."""


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _rule_of(module: str) -> tuple[str, Rule]:
    package = max((p for p in RULES if _within(module, p)), key=len)
    return package, RULES[package]


def _module_names() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(imported name, line, inside a function). `from a import b` gives a.b: b may be a module."""
    anchor = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = anchor[: len(anchor) - child.level + 1] if child.level else []
                prefix = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{prefix}.{alias.name}", child.lineno, inside
            else:
                deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside or deeper)

    yield from walk(tree, False)


def _faults(module: str, source: str, is_package: bool = False) -> list[str]:
    package, rule = _rule_of(module)
    found = []
    for name, line, inside in _imports(ast.parse(source), module, is_package):
        top = name.split(".")[0]
        if package == TW + "cli" and top in UPPER | {"torch"} and not inside:
            found.append(f"{module}:{line} imports {name} outside a function")
        elif top in rule.never:
            found.append(f"{module}:{line} imports {name}; {package} never imports {top}")
        elif top in PACKAGES and not _allowed(name, package, rule):
            found.append(f"{module}:{line} imports {name}; {package} may not")
        if module.removeprefix(TW).split(".")[0] in LEAVES and top in ("torchweave_ray", "torch"):
            leaf = name.removeprefix(TW).split(".")[0]
            if leaf not in LEAVES:
                found.append(f"{module}:{line} imports {name}; a leaf imports leaves only")
    return found


def _allowed(name: str, package: str, rule: Rule) -> bool:
    top = name.split(".")[0]
    if _within(name, package) or top == package.split(".")[0] != "torchweave_ray":
        return True
    if rule.may is None:
        return True
    return any(_within(name, allowed) for allowed in rule.may)


def test_every_import_goes_one_way() -> None:
    faults = []
    for module, path in _module_names():
        faults += _faults(module, path.read_text(), path.name == "__init__.py")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torchweave_ray.engine.x", "import torch"),
        ("torchweave_ray.engine.x", "def f():\n    from torchweave_ray.runner import inputs"),
        ("torchweave_ray.engine.x", "from ..models import spec"),
        ("torchweave_ray.engine.x", "from torchweave_ray import models"),
        ("torchweave_ray.runner.x", "from torchweave_ray.engine.scheduler import Scheduler"),
        ("torchweave_ray.api.x", "import torch.nn"),
        ("torchweave_ray.llm", "def f():\n    import ray"),
        ("torchweave_ray.outputs", "from torchweave_ray.engine.plan import StepPlan"),
        ("torchweave_ray.cli.x", "from optimizer.pipeline import optimize"),
        ("deployments.x", "from optimizer.pipeline import optimize"),
        ("deployments.x", "from torchweave_ray.engine.scheduler import Scheduler"),
        ("optimizer.x", "from ray import serve"),
        ("optimizer.x", "from torchweave_ray.config import EngineConfig"),
    ],
)
def test_the_walk_sees_a_wrong_import(module: str, source: str) -> None:
    assert _faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torchweave_ray.engine.x", "from .plan import StepPlan"),
        ("torchweave_ray.runner.x", "from torchweave_ray.engine.plan import StepPlan"),
        ("torchweave_ray.cli.x", "def f():\n    from optimizer.pipeline import optimize"),
        ("deployments.x", "from optimizer.task import stage_artifact"),
        ("optimizer.task", "import ray"),
        ("optimizer.x", "from torchweave_ray.models.artifact import Manifest"),
    ],
)
def test_the_walk_lets_a_right_import_pass(module: str, source: str) -> None:
    assert not _faults(module, source)


MAY_SAY_CUDA = ("torchweave_ray/runner/device.py", "torchweave_ray/config.py")
"""The one file that talks to CUDA, and the one that has the word for it. Only commands that
describe the machine look for themselves; Ray's placement of GPUs is deployments' own."""


def _says_cuda(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "cuda"
    return isinstance(node, ast.Constant) and str(node.value).split(":")[0] == "cuda"


def test_cuda_stays_behind_the_device() -> None:
    """Nobody else asks whether the device is one of CUDA, or calls torch.cuda."""
    faults = []
    for folder in ("torchweave_ray", "optimizer"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in MAY_SAY_CUDA and path.relative_to(ROOT).parts[1] not in ("cli", "bench"):
                nodes = ast.walk(ast.parse(path.read_text()))
                faults += [f"{name}: {ast.unparse(node)}" for node in nodes if _says_cuda(node)]
    assert not faults, faults


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("torchweave_ray", "torch ray transformers"),
        ("torchweave_ray.engine.plan", "torch ray transformers"),
        ("torchweave_ray.engine.scheduler", "torch ray transformers"),
        ("torchweave_ray.engine.async_engine", "torch ray transformers"),
        ("torchweave_ray.api.app", "torch ray opentelemetry"),
        ("torchweave_ray.cli", "torch ray transformers"),
        ("torchweave_ray.bench.load.serving", "torch ray transformers"),
        ("deployments.app", "torch"),
        ("optimizer.recipe", "torch ray transformers"),
    ],
)
def test_importing_it_loads_no(module: str, absent: str) -> None:
    code = f"import {module}, sys; print(*[m for m in {absent.split()!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "", f"import {module} loads {ran.stdout.strip()}"
