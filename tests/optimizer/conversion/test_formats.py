"""Every GGUF type that can be dequantised, and files whose headers say what is not so."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimizer.checkpoints import open_checkpoint
from optimizer.checkpoints.gguf_file import GgufCheckpoint
from optimizer.checkpoints.safetensors_folder import SafetensorsFolder
from optimizer.pipeline import optimize
from optimizer.recipe import Recipe
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import make_checkpoint
from torchweave_ray.errors import ArtifactError, ConfigError
from torchweave_ray.kernels.quantization import dequantize
from torchweave_ray.models.config import ModelConfig

ROWS, COLUMNS = 256, 512
DOWN, Q = "blk.0.ffn_down.weight", "blk.0.attn_q.weight"


def _can_be_dequantised(kind: gguf.GGMLQuantizationType) -> bool:
    """By trying: the package lists its types nowhere that is public."""
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


TYPES = [kind.name for kind in gguf.GGMLQuantizationType if _can_be_dequantised(kind)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a whole number of every type's blocks."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return make_checkpoint(folder, hidden_size=ROWS, intermediate_size=COLUMNS, num_hidden_layers=1)


def _blocks(kind: str, columns: int) -> np.ndarray:
    """Random blocks [ROWS, bytes] that stand for finite numbers, made of random bytes where the
    package cannot quantise."""
    number = gguf.GGMLQuantizationType[kind]
    generator = np.random.default_rng(0)
    values = generator.standard_normal((ROWS, columns)).astype(np.float32)
    try:
        return np.ascontiguousarray(gguf.quantize(values, number)).view(np.uint8)
    except NotImplementedError:
        block, num_bytes = gguf.GGML_QUANT_SIZES[number]
    data = generator.integers(0, 256, (ROWS * columns // block, num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        sound = np.isfinite(gguf.dequantize(data, number)).all(axis=1)
    data[~sound] = data[np.argmax(sound)]
    return data.reshape(ROWS, -1)


def test_the_types_are_all_there() -> None:
    assert len(TYPES) >= 26, TYPES
    assert {"F32", "F16", "BF16", "Q4_K", "Q6_K", "IQ4_XS", "IQ1_M", "TQ2_0", "MXFP4"} <= set(TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(tmp_path: Path, wide: Path, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("optimizer.checkpoints.gguf_file._STEP", 20 * COLUMNS)
    down, q = _blocks(kind, COLUMNS), _blocks(kind, ROWS)
    source = make_gguf(tmp_path / "m.gguf", wide, raw={DOWN: (kind, down), Q: (kind, q)})
    checkpoint = open_checkpoint(source)
    number = gguf.GGMLQuantizationType[kind]
    loaded = checkpoint.load("model.layers.0.mlp.down_proj.weight")
    wanted = torch.from_numpy(np.array(gguf.dequantize(down, number))).reshape(ROWS, COLUMNS)
    assert loaded.isfinite().all()
    assert torch.equal(loaded, wanted.float())
    pairs = np.array(gguf.dequantize(q, number), dtype=np.float32).reshape(4, ROWS // 8, 2, ROWS)
    halves = torch.from_numpy(pairs).transpose(1, 2).reshape(ROWS, ROWS)
    assert torch.equal(checkpoint.load("model.layers.0.self_attn.q_proj.weight"), halves)
    codes = checkpoint.codes("model.layers.0.mlp.down_proj.weight")
    assert (codes is not None) == (kind in ("Q4_0", "Q4_1", "Q8_0"))
    if codes is not None:
        assert torch.equal(dequantize(codes), loaded), "repacked without a rounding"


@pytest.mark.parametrize("kind", ["Q8_K", "I8"])
def test_types_that_cannot_be_dequantised(tmp_path: Path, wide: Path, kind: str) -> None:
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.zeros((ROWS, COLUMNS // block * num_bytes), np.int8 if kind == "I8" else np.uint8)
    source = make_gguf(tmp_path / "m.gguf", wide, raw={DOWN: (kind, data)})
    with pytest.raises(ArtifactError, match=f"ffn_down.* is {kind}, which the gguf package cannot"):
        optimize(Recipe("t", str(source), verify="none"), tmp_path / "store")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_gguf(folder / "m.gguf", make_checkpoint(folder / "tiny", num_hidden_layers=1))
    return folder


def _open(path: Path) -> None:
    """What staging does with a source before it reads weights."""
    with suppress(ArtifactError, ConfigError):
        checkpoint = GgufCheckpoint(path) if path.is_file() else SafetensorsFolder(path)
        ModelConfig.from_hf(json.loads(checkpoint.documents()["config.json"]))


EXTREMES = (0, 1, 31, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(EXTREMES).map(lambda number: struct.pack("<Q", number)),
            st.integers(0, 14).map(lambda number: struct.pack("<I", number)),
        ),
    ),
    min_size=1,
    max_size=3,
)
fuzzing = settings(
    max_examples=60,
    deadline=3000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _edited(data: bytes, limit: int, changes: list[tuple[float, bytes]]) -> bytes:
    edited = bytearray(data)
    for where, value in changes:
        at = int(where * limit)
        edited[at : at + len(value)] = value
    return bytes(edited)


@fuzzing
@given(changes=edits, early=st.booleans())
def test_a_gguf_that_says_what_is_not_so(
    plain: Path, changes: list[tuple[float, bytes]], early: bool
) -> None:
    """Read, or refused in a moment: never another error, a hang or memory without end."""
    data = (plain / "m.gguf").read_bytes()
    # Early: counts and the first keys. Else anywhere up to the tensors' entries.
    limit = 400 if early else len(data) - 80_000
    edited = plain / "edited.gguf"
    edited.write_bytes(_edited(data, limit, changes))
    _open(edited)


@fuzzing
@given(changes=edits)
def test_safetensors_that_say_what_is_not_so(
    plain: Path, changes: list[tuple[float, bytes]]
) -> None:
    folder = plain / "edited"
    if not folder.exists():
        make_checkpoint(folder, num_hidden_layers=1)
    data = (plain / "tiny" / "model.safetensors").read_bytes()
    limit = 8 + struct.unpack_from("<Q", data)[0]
    (folder / "model.safetensors").write_bytes(_edited(data, limit, changes))
    _open(folder)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(tensors: int, pairs: int, *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(rest)


def _tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return _string("token_embd.weight") + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a whole GGUF file"),
        (b"GGML" + b"\0" * 40, "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not 2 or 3 in little-endian"),
        (_gguf(1 << 60, 0), "1152921504606846976 tensors are more than it has room for"),
        (_gguf(0, 1 << 60), "keys are more than"),
        (_gguf(0, 1, struct.pack("<Q", 1 << 50)), "a name of 1125899906842624 bytes"),
        (_gguf(0, 1, _string("k"), struct.pack("<IQ", 8, 1 << 50)), "are beyond its"),
        (_gguf(0, 1, _string("k"), struct.pack("<IIQ", 9, 0, 1 << 50)), "are beyond its"),
        (_gguf(0, 1, _string("k"), struct.pack("<IIQ", 9, 8, 1 << 50)), "an array of 11258999"),
        (
            _gguf(0, 1, _string("k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 9),
            "a value of type 9",
        ),
        (_gguf(0, 1, _string("k"), struct.pack("<I", 77)), "a value of type 77"),
        (_gguf(1, 0, _tensor((1 << 40, 1 << 40))), "ends at byte"),
        (_gguf(1, 0, _tensor((4,), offset=1 << 50)), "ends at byte"),
        (_gguf(1, 0, _tensor((4,), offset=3)), "is not aligned"),
        (_gguf(1, 0, _tensor((4,), kind=99)), "of type 99"),
        (_gguf(1, 0, _tensor((1, 1, 1, 1, 1, 1))), "has 6 dimensions"),
    ],
)
def test_each_length_and_offset_is_checked(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=says):
        GgufCheckpoint(path)
