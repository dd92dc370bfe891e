"""What our code never does with somebody else's bytes: unpickle them, run them, or run a shell."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizer.checkpoints import open_checkpoint
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG, LoraAdapter

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for package in ("torchweave_ray", "deployments", "optimizer", "scripts")
    for path in sorted((ROOT / package).rglob("*.py"))
]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package", "np.load", "numpy.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen"),
    *("pd.read_pickle", "__import__"),
}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            if (name := _name(node.func)) in CALLS:
                yield name
            for keyword in node.keywords:
                is_on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and is_on:
                    yield keyword.arg


def test_nothing_is_unpickled_run_or_given_to_a_shell() -> None:
    found = {path.name: [*_dangers(ast.parse(path.read_text()))] for path in SOURCES}
    assert len(found) > 200
    assert {name: dangers for name, dangers in found.items() if dangers} == {}


def test_it_would_be_found() -> None:
    text = "import pickle\ntorch.load(x)\nf(trust_remote_code=flag)\nrun(x, shell=True)\neval(y)"
    assert len(list(_dangers(ast.parse(text)))) == 5


class _Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._mark),)


def test_weights_that_are_pickles_are_refused_unread(tmp_path: Path) -> None:
    """Beside it, also under the name of a safetensors file."""
    mark = tmp_path / "mark"
    bomb = pickle.dumps(_Bomb(mark))
    pickle.loads(bomb)
    mark.rmdir()  # so it does go off
    folder = make_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(bomb)
    open_checkpoint(folder)
    weights.write_bytes(bomb)
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_checkpoint(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match="only safetensors weights and"):
        open_checkpoint(folder)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(bomb)
    with pytest.raises(ArtifactError, match="does not begin with GGUF"):
        open_checkpoint(gguf)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (adapter / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(ArtifactError, match="is missing"):
        LoraAdapter(adapter)
    assert not mark.exists()


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    from optimizer.progress import SilentProgress
    from optimizer.recipe import Recipe
    from optimizer.stages.convert import ConvertStage
    from optimizer.stages.fetch import RESULT
    from torchweave_ray.models.artifact import Manifest

    mark = tmp_path / "mark"
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for architecture in ("LlamaForCausalLM", "OlmoForCausalLM", "EvilForCausalLM"):
        folder = make_checkpoint(tmp_path / architecture)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": [architecture], "auto_map": code}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
        work = tmp_path / f"work-{architecture}"
        (work / "fetch").mkdir(parents=True)
        fetched = {"path": str(folder), "adapters": []}
        (work / "fetch" / RESULT).write_text(json.dumps(fetched))
        stage = ConvertStage(Recipe("t", "org/name", verify="none"), SilentProgress())
        with pytest.raises(ArtifactError):
            stage.run(work, Manifest("", "t", "0" * 64, "", "", "", {}))
    assert not mark.exists()
