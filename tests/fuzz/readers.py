"""Mutated model files for each of our readers: `python -m tests.fuzz.readers gguf --num 100000`.

What may come out is a whole object or an error of our own. Anything else, a file opened outside the
input's folder, an allocation without bound or a second without an answer is a failure, and its
input's number is said: `--only N` makes it again. No test in here.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import typer

from optimizer.checkpoints import open_checkpoint
from optimizer.checkpoints.gguf_header import _Walk
from optimizer.progress import SilentProgress
from optimizer.recipe import Recipe
from optimizer.stages.convert import ConvertStage
from optimizer.stages.fetch import RESULT
from tests.fuzz.mutation import mutated, mutated_bytes
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError, ConfigError, InvalidRequest
from torchweave_ray.models.artifact import (
    MANIFEST,
    REPORT,
    WEIGHTS,
    Manifest,
    read_manifest,
    read_report,
    verify_artifact,
)
from torchweave_ray.models.artifact.manifest import compute_artifact_id, signed_json
from torchweave_ray.models.config import ModelConfig
from torchweave_ray.models.lora.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter
from torchweave_ray.models.weights import load_weights
from torchweave_ray.tokenizer import load_tokenizer

OURS = (ArtifactError, ConfigError, InvalidRequest)
ANSWER_S = 5
LIBRARIES = (sys.prefix, sys.base_prefix, "/proc/", "/sys/", "__editable__", gettempdir() + "/")
"""Where packages open files of their own when they are loaded."""
ROOM = 2 << 30
"""Bytes of addresses beyond what the process has at the start."""
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X")

RECIPE = Recipe("fuzz", "fuzz/fuzz", verify="none")
FETCHED = Manifest("", "fuzz", "0" * 64, "", "", "", {})
Make = Callable[[random.Random], None]
Read = Callable[[random.Random], None]


class NoAnswer(BaseException):
    """A reader that goes on for too long; nobody catches it by chance."""


class _Places(_Walk):
    """Where the numbers of a sound GGUF begin."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.places: list[int] = []

    def _u32(self) -> int:
        self.places.append(self._at)
        return super()._u32()

    def _u64(self) -> int:
        self.places.append(self._at)
        return super()._u64()


def gguf_reader(folder: Path) -> tuple[Make, Read]:
    path = make_gguf(folder / "whole.gguf", make_checkpoint(folder / "tiny", **SMALL))
    data = path.read_bytes()
    walk = _Places(data)
    walk.check()
    places = walk.places + [at for at in walk.places if at < 600] * 2
    shutil.rmtree(folder / "tiny")
    path.unlink()
    edited = folder / "edited.gguf"

    def make(rng: random.Random) -> None:
        edited.write_bytes(mutated_bytes(data, rng, places))

    return make, lambda _: _read_checkpoint(edited)


def safetensors_reader(folder: Path) -> tuple[Make, Read]:
    """A checkpoint's folder: its weights, or one of its documents."""
    import torchweave_ray.hf.gate  # noqa: F401 - for other families; it takes seconds

    folder = make_checkpoint(folder / "source", **SMALL)
    weights = folder / WEIGHTS
    data = weights.read_bytes()
    documents = {path: path.read_bytes() for path in folder.glob("*.json")}
    index = folder / "model.safetensors.index.json"

    def make(rng: random.Random) -> None:
        index.unlink(missing_ok=True)
        for path, text in documents.items():
            path.write_bytes(text)
        weights.write_bytes(data)
        if rng.random() < 0.6:
            weights.write_bytes(_mutated_safetensors(data, rng))
        elif rng.random() < 0.3:
            names = dict.fromkeys(_header(data)[0], WEIGHTS)
            index.write_text(json.dumps(mutated({"weight_map": names}, rng)))
        else:
            _mutate_document(rng.choice(list(documents)), rng)

    return make, lambda _: _read_checkpoint(folder)


def artifact_reader(folder: Path) -> tuple[Make, Read]:
    """What a replica reads at its start; mutated files are listed with their true hashes, so that
    no check of those stands before the readers."""
    make_tiny_artifact(folder, **SMALL)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    manifest = read_manifest(folder)
    data = whole[folder / WEIGHTS]
    report = {"tuned": {"threads": 1, "step_ms": [0.1, 0.2]}, "quality": {"kl": 0.01}}

    def make(rng: random.Random) -> None:
        for path, content in whole.items():
            path.write_bytes(content)
        (folder / REPORT).write_text(json.dumps(mutated(report, rng)))
        kind = rng.randrange(5)
        if kind == 0:
            text = mutated_bytes(whole[folder / MANIFEST], rng, ())
            (folder / MANIFEST).write_bytes(text)
        elif kind == 1:
            raw = mutated(json.loads(whole[folder / MANIFEST]), rng)
            _sign(folder, raw)
        elif kind < 4:
            (folder / WEIGHTS).write_bytes(_mutated_safetensors(data, rng))
        else:
            _mutate_document(rng.choice([p for p in whole if p.suffix == ".json"]), rng)

    def read(rng: random.Random) -> None:
        read_report(folder)
        with suppress(*OURS):
            verify_artifact(folder)
        with suppress(*OURS):
            load_tokenizer(folder)
        config = ModelConfig.read(folder)
        found = read_manifest(folder) if rng.random() < 0.5 else manifest
        for tensor in load_weights(
            folder, config, torch.float32, torch.device("cpu"), replace(found)
        ).values():
            tensor.sum()  # every byte of it

    return make, read


def adapter_reader(folder: Path) -> tuple[Make, Read]:
    from safetensors.torch import save

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {
        f"{prefix}.lora_A.weight": torch.ones(2, 16),
        f"{prefix}.lora_B.weight": torch.ones(16, 2),
    }
    data = save(pair)
    config = {
        **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "bias": "none"},
        **{"init_lora_weights": True, "use_rslora": False},
    }

    def make(rng: random.Random) -> None:
        is_of_config = rng.random() < 0.4
        text = json.dumps(mutated(config, rng) if is_of_config else config).encode()
        if rng.random() < 0.1:
            text = mutated_bytes(text, rng, ())
        (folder / ADAPTER_CONFIG).write_bytes(text)
        weights = data if is_of_config else _mutated_safetensors(data, rng)
        (folder / ADAPTER_WEIGHTS).write_bytes(weights)

    def read(rng: random.Random) -> None:
        adapter = LoraAdapter(folder)
        for name in adapter.targets:
            adapter.matrices(name)

    return make, read


READERS = {
    "gguf": gguf_reader,
    "safetensors": safetensors_reader,
    "artifact": artifact_reader,
    "adapter": adapter_reader,
}


def run(kind: str, seed: int, numbers: range, report: Callable[[str], None] = print) -> int:
    """Reads the inputs of these numbers; returns how many failed. An input depends on nothing but
    the seed and its number."""
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=_memory_folder()) as name:
        folder = Path(name)
        make, read = READERS[kind](folder)
        num_failed = 0
        with _limited(folder) as opened_outside:
            for number in numbers:
                rng = random.Random(f"{kind} {seed} {number}")
                shutil.rmtree(folder / "work", ignore_errors=True)
                make(rng)
                opened_outside.clear()
                problem = _problem_of(read, rng)
                if opened_outside:
                    problem = f"opened {opened_outside[0]}"
                if problem is not None:
                    num_failed += 1
                    report(f"{kind} --seed {seed} --only {number}: {problem}")
        return num_failed


def _problem_of(read: Read, rng: random.Random) -> str | None:
    signal.setitimer(signal.ITIMER_REAL, ANSWER_S)
    try:
        read(rng)
    except OURS as error:
        return None if len(str(error)) < 20_000 else "an error message without bound"
    except NoAnswer:
        return f"no answer in {ANSWER_S} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


@contextmanager
def _limited(folder: Path) -> Iterator[list[str]]:
    """Time and addresses are limited; files opened outside the folder are noted."""
    outside: list[str] = []
    is_on = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if is_on and event == "open" and isinstance(args[0], str):
            path = args[0]
            is_imported = path.endswith((".py", ".pyc", ".so"))
            if not path.startswith((str(folder), *LIBRARIES)) and not is_imported:
                outside.append(path)

    def stop(*_: Any) -> None:
        raise NoAnswer

    sys.addaudithook(audit)
    before = signal.signal(signal.SIGALRM, stop)
    _, hard = limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield outside
    finally:
        is_on = False
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, before)


def _read_checkpoint(path: Path) -> None:
    """What staging does with a source."""
    work = path.with_name("work")
    (work / "fetch").mkdir(parents=True)
    (work / "fetch" / RESULT).write_text(json.dumps({"path": str(path), "adapters": []}))
    ConvertStage(RECIPE, SilentProgress()).run(work, FETCHED)
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.codes(name)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def _mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    header, rest = _header(data)
    if rng.random() < 0.4:
        limit = len(data) - len(rest)
        return mutated_bytes(data, rng, (0, *rng.sample(range(limit), 8)))
    text = json.dumps(mutated(header, rng, DTYPES)).encode()
    text += b" " * (-len(text) % 8)
    if rng.random() < 0.1:
        rest = rest[: rng.randrange(len(rest))]
    return struct.pack("<Q", len(text)) + text + rest


def _mutate_document(path: Path, rng: random.Random) -> None:
    text = path.read_bytes()
    kind = rng.random()
    if kind < 0.01:
        path.write_bytes(b"[" * 100_000)
    elif kind < 0.3:
        path.write_bytes(mutated_bytes(text, rng, ()))
    else:
        path.write_text(json.dumps(mutated(json.loads(text), rng)))


def _sign(folder: Path, raw: Any) -> None:
    """A manifest that is its own content's, whatever that is."""
    text = json.dumps(raw)
    if isinstance(raw, dict):
        raw.pop("manifest_sha256", None)
        with suppress(Exception):
            raw["artifact_id"] = compute_artifact_id(
                raw["source_sha256"],
                raw["recipe"],
                {name: _Entry(entry["sha256"]) for name, entry in raw["files"].items()},  # type: ignore[misc]
                raw["format_version"],
            )
        text = signed_json(raw, "manifest_sha256")
    (folder / MANIFEST).write_text(text)


class _Entry:
    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main(kind: str, seed: int = 0, num: int = 1000, only: int | None = None) -> None:
    numbers = range(num) if only is None else range(only, only + 1)
    if num_failed := run(kind, seed, numbers):
        raise SystemExit(f"{num_failed} of {len(numbers)} failed")
    print(f"{kind}: {len(numbers)} inputs")


if __name__ == "__main__":
    typer.run(main)
