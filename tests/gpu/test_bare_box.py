"""A GPU box has torch, triton, numpy, safetensors and tokenizers: `LLM` answers with no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_artifact

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ALLOWED = set("torchweave_ray torch torchgen functorch triton numpy safetensors tokenizers".split())
BROUGHT_BY_TORCH = set("typing_extensions sympy mpmath networkx jinja2 markupsafe filelock".split())

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in sys.stdlib_module_names | ALLOWED | BROUGHT_BY_TORCH:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]

from torchweave_ray.llm import LLM
from torchweave_ray.sampling_params import SamplingParams

with LLM(sys.argv[1]) as llm:
    (completion,) = llm.generate("gravity", SamplingParams(temperature=0.0, max_tokens=4))
    print(len(completion.token_ids), completion.finish_reason.value)
"""


def test_llm_needs_no_more(tmp_path: Path) -> None:
    artifact = make_tiny_artifact(tmp_path / "tiny")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(artifact)], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[1] in ("length", "stop")
