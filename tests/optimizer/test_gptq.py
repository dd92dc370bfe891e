"""GPTQ: nearer in what products give than rounding, the same bits every time, also after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.calibration import Calibration
from optimizer.checkpoints import open_checkpoint
from optimizer.gptq import DAMPING, Moments, quantize_compensating
from optimizer.measuring.layerwise import LayerwiseModel, SourceTensors
from optimizer.measuring.quality import calibration_windows, text_windows
from optimizer.pipeline import optimize
from optimizer.progress import SilentProgress
from optimizer.quantization import Quantization
from optimizer.recipe import Bars, Recipe
from optimizer.stages import quantize as stage
from optimizer.tensor_file import TensorWriter
from tests.optimizer.gguf_files import make_gguf
from tests.tiny import make_checkpoint
from torchweave_ray.kernels.quantization import QuantizedFormat, dequantize, quantize
from torchweave_ray.models.artifact import read_report
from torchweave_ray.models.config import ModelConfig

FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int8-group32", "int4-group32")
GPTQ = Quantization("int4-group32", "int8-group32", method="gptq")


def _activations(k: int, rows: int = 600) -> Tensor:
    """Correlated, as real ones are; one input is never used."""
    generator = torch.Generator().manual_seed(k)
    mixed = torch.randn(rows, k, generator=generator) @ torch.randn(k, k, generator=generator)
    mixed[:, 3] = 0.0
    return mixed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [96, 75, 300])
def test_products_lose_less_than_by_rounding(format: QuantizedFormat, k: int) -> None:
    x = _activations(k)
    weight = torch.randn(40, k, generator=torch.Generator().manual_seed(1))
    moments = Moments.of(x)
    found = quantize_compensating(weight, moments.factor(), format)
    wanted = x @ weight.T
    errors = [(x @ dequantize(w).T - wanted).norm() for w in (found, quantize(weight, format))]
    assert errors[0] < 0.85 * errors[1]
    energy = moments.energy(dequantize(found) - weight)
    assert energy == pytest.approx(float(errors[0] ** 2), rel=1e-2)


def test_without_correlation_it_is_rounding() -> None:
    """And inputs that the text never used are rounded as they are."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for total in (torch.eye(64), torch.zeros(64, 64)):
        factor = Moments(total.double()).factor()
        found = quantize_compensating(weight, factor, "int8")
        assert torch.equal(found.codes, quantize(weight, "int8").codes)


def test_the_first_correction_is_the_closed_form() -> None:
    """Of two inputs: what the first loses, the second makes up for by least squares."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.0, 0.2]])
    moments = Moments.of(x)
    damped = moments.total + DAMPING * moments.total.diagonal().mean() * torch.eye(2)
    inverse = damped.inverse()
    factor = moments.factor().double()
    assert torch.allclose(factor.T @ factor, inverse, atol=1e-5)
    moved = factor[0, 1] / factor[0, 0]
    assert moved.item() == pytest.approx((-damped[0, 1] / damped[1, 1]).item(), rel=1e-4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)


def _stage(source: Path, store: Path, **recipe: Any) -> Path:
    given = {"quantization": GPTQ, "bars": Bars(5.0, 0.0, 5.0)} | recipe
    return optimize(Recipe("t", str(source), **given), store)


def test_the_report_compares_it_with_rounding(tmp_path: Path, source: Path) -> None:
    report = read_report(_stage(source, tmp_path / "store"))
    layers, head = (report["quantization"][group] for group in ("layers", "head"))
    assert (layers["num_rounded"], head["num_rounded"]) == (8, 1)
    assert set(layers["output_errors"]) == set(layers["relative_errors"])
    assert head["output_errors"] == {}, "a tied table is looked up, too: its rows stay nearest"
    for name, errors in layers["output_errors"].items():
        assert 0 < errors["gptq"] < errors["rtn"], name
    plain = replace(GPTQ, method="rtn")
    rounded = read_report(_stage(source, tmp_path / "store", quantization=plain))
    assert rounded["quantization"]["layers"]["output_errors"] == {}
    assert report["quality"]["kl"] < rounded["quality"]["kl"]


def test_the_sources_own_codes_are_kept(tmp_path: Path, source: Path) -> None:
    gguf = make_gguf(tmp_path / "m.gguf", source, "Q4_1")
    groups = read_report(_stage(gguf, tmp_path / "store"))["quantization"]
    assert (groups["layers"]["num_lossless"], groups["layers"]["num_rounded"]) == (8, 0)


class _Killed(Exception):
    pass


class _DyingProgress(SilentProgress):
    def __init__(self, after: int) -> None:
        self.left, self.stage = after, ""

    def start(self, stage: str) -> None:
        self.stage = stage

    def advance(self, num_bytes: int) -> None:
        self.left -= self.stage == "quantize"
        if self.left < 0:
            raise _Killed


@pytest.mark.parametrize("after", [1, 2, 7, 12, 25])
def test_a_killed_run_goes_on_and_gives_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Not from the start: what was certain on the disk is not rounded again."""
    whole = _stage(source, tmp_path / "whole", verify="none", tuning_budget_s=0)
    monkeypatch.setattr(TensorWriter, "sync_bytes", 1)
    recipe = Recipe("t", str(source), quantization=GPTQ, verify="none", tuning_budget_s=0)
    with pytest.raises(_Killed):
        optimize(recipe, tmp_path / "store", _DyingProgress(after))
    rounded: list[str] = []
    quantize_fused = stage.quantize_fused

    def counted(tensor: Any, *args: Any) -> Any:
        rounded.append(tensor.name)
        return quantize_fused(tensor, *args)

    monkeypatch.setattr(stage, "quantize_fused", counted)
    again = optimize(recipe, tmp_path / "store")
    assert again.name == whole.name
    groups = [read_report(folder)["quantization"] for folder in (whole, again)]
    assert json.dumps(groups[0]) == json.dumps(groups[1])
    assert len(rounded) < 9 or after <= 2


def test_a_layerwise_run_is_the_models(tmp_path: Path, source: Path) -> None:
    """With nothing replaced; and with weights that are replaced it sees what they give."""
    config = ModelConfig.read(source)
    checkpoint = open_checkpoint(source)
    windows = calibration_windows(source / "tokenizer.json", 64)[:3]
    tensors = SourceTensors(checkpoint, config, lambda num_bytes: None)
    model = LayerwiseModel(config, tensors, windows)
    logits = list(model.logits())
    assert [len(rows) for rows in logits] == [len(window) for window in windows]
    name = "layers.1.o_proj.weight"
    runs = []
    for format in ("none", "int4-group32"):
        calibration = Calibration(config, checkpoint, windows)
        if format != "none":
            first = "layers.0.qkv_proj.weight"
            assert calibration.moments(first) is not None
            calibration.replace(first, quantize(tensors[first], "int4-group32"))
        found = calibration.moments(name)
        assert found is not None
        runs.append(found.total)
    assert 0.001 < float((runs[0] - runs[1]).norm() / runs[0].norm()) < 0.5
    assert Calibration(config, checkpoint, windows).moments("embed.weight") is None


def test_the_two_texts_share_no_sentence(source: Path) -> None:
    judged, calibrated = (
        torch.cat(windows(source / "tokenizer.json", 10**6)[:1]).tolist()
        for windows in (text_windows, calibration_windows)
    )
    assert len(calibrated) >= 256
    folder = Path(stage.__file__).parents[1] / "measuring"
    texts = [(folder / name).read_text() for name in ("prose.txt", "calibration.txt")]
    sentences = [{s.strip() for s in text.replace("\n", " ").split(".")} for text in texts]
    assert max(len(s) for s in sentences[0] & sentences[1]) < 20
    assert judged != calibrated
