"""Plots and comparisons of results that the load generator really wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bench.fake_server import FakeServer
from tests.bench.test_cli import _run, _run_against


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    args = ["--url", "ours=URL", "--url", "theirs=URL", "--concurrency", "1,3", "--requests", "6"]
    args += ["--occupancy", "--save", "--results", str(folder)]
    result = _run_against(FakeServer(), "bench", "serving", *args)
    assert result.exit_code == 0, result.output
    (path,) = folder.glob("serving-*.json")
    return path


def test_images_show_the_data_by_name(measured: Path, tmp_path: Path) -> None:
    result = _run("bench", "plot", str(measured), "--out", str(tmp_path), "--name", "a", "--json")
    assert result.exit_code == 0, result.output
    names = [f"a-{c}.{f}" for c in ("throughput", "ttft", "batch") for f in ("png", "svg")]
    assert [Path(p).name for p in json.loads(result.stdout)["images"]] == names
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300
            colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
            assert colours is not None
            assert len(colours) > 20
    texts = _texts(tmp_path)
    for chart, labels in {
        "a-throughput": ("ours", "theirs", "median", "p99", "c=1", "c=3", "output tokens a second"),
        "a-ttft": ("ours", "theirs", "c=3", "share of requests", "time to first token, ms"),
        "a-batch": ("ours, c=1", "theirs, c=3", "running", "waiting", "requests"),
    }.items():
        for label in labels:
            assert f">{label}<" in texts[chart], (chart, label)
    assert "service level" not in texts["a-throughput"] + texts["a-ttft"]


def _texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.svg")}


def test_a_service_level_is_drawn_beside_what_was_reached(tmp_path: Path) -> None:
    args = ["--url", "URL", "--rates", "20,40", "--requests", "6", "--slo-ttft-ms", "300"]
    result = _run_against(
        FakeServer(), "bench", "serving", *args, "--plots", str(tmp_path), "--output-len", "7"
    )
    assert result.exit_code == 0, result.output
    texts = _texts(tmp_path)
    for label in ("service level", "Kept the service level, % of requests", "20/s", "40/s"):
        assert f">{label}<" in texts["serving-throughput"], label
    assert ">service level<" in texts["serving-ttft"]
    assert ">100 words in, 7 tokens out<" in texts["serving-batch"]


@pytest.mark.filterwarnings("error")
def test_texts_that_come_all_at_once_have_gaps_of_zero(measured: Path, tmp_path: Path) -> None:
    values = json.loads(measured.read_text())
    for point in values["points"]:
        point["itl_ms"] = dict.fromkeys(point["itl_ms"], 0.0)
    (tmp_path / "once.json").write_text(json.dumps(values))
    result = _run("bench", "plot", str(tmp_path / "once.json"), "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert list(tmp_path.glob("*-throughput.png"))


def test_a_run_draws_itself(tmp_path: Path) -> None:
    args = ["--url", "URL", "--concurrency", "2", "--requests", "4", "--plots", str(tmp_path)]
    result = _run_against(FakeServer(), "bench", "serving", *args)
    assert result.exit_code == 0, result.output
    names = {f"serving-{c}.{f}" for c in ("throughput", "ttft", "batch") for f in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_the_same_results_are_the_same_picture(measured: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _run("bench", "plot", str(measured), "--out", str(tmp_path / name), "--formats", "svg")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_terminal_shows_the_same(measured: Path) -> None:
    result = _run("bench", "plot", str(measured))
    assert result.exit_code == 0, result.output
    for label in ("TTFT p50, ms", "ITL p50, ms", "Requests running", "ours c=3", "theirs"):
        assert label in result.stdout
    assert "\x1b" not in result.stdout  # a pipe has no colours
    assert max(map(len, result.stdout.splitlines())) <= 100


def _changed(path: Path, folder: Path, **factors: float) -> Path:
    """With a rate or all percentiles of a time multiplied."""
    values = json.loads(path.read_text())
    for point in values["points"]:
        for name, factor in factors.items():
            old: Any = point[name]
            point[name] = (
                {q: v * factor for q, v in old.items()} if isinstance(old, dict) else old * factor
            )
    (folder / "changed.json").write_text(json.dumps(values))
    return folder / "changed.json"


def test_what_became_worse_gives_exit_status_1(measured: Path, tmp_path: Path) -> None:
    assert _run("bench", "compare", str(measured), str(measured)).exit_code == 0
    slower = _changed(measured, tmp_path, ttft_ms=1.3, output_tok_s=1.3)
    result = _run("bench", "compare", str(measured), str(slower), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["notes"] == []
    verdicts = {c["metric"]: c["verdict"] for c in found["changes"]}
    assert verdicts["ttft_ms p50"] == "worse"
    assert verdicts["ttft_ms p99"] == "shown"
    assert verdicts["output_tok_s"] == "better"
    assert verdicts["itl_ms p50"] == "same"
    args = (str(measured), str(slower), "--tolerance", "0.4")
    assert _run("bench", "compare", *args).exit_code == 0
    table = _run("bench", "compare", str(measured), str(slower)).stdout
    assert "+30.0 %" in table


def test_other_work_is_said_to_be_other(measured: Path, tmp_path: Path) -> None:
    values = json.loads(measured.read_text())
    values["config"]["workload"]["output_len"] = 7
    values["origin"]["machine"]["cores"] = 99
    (tmp_path / "other.json").write_text(json.dumps(values))
    result = _run("bench", "compare", str(measured), str(tmp_path / "other.json"))
    assert "not alike: cores" in result.stdout
    assert "not alike: config workload" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "no results file"),
        ('{"kind": "a", "origin": {}, "config": {}, "points": [{"a": 1}]}', "no points of a load"),
    ],
)
def test_what_is_no_results_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    for args in (("plot", str(tmp_path / "a.json")), ("compare", *2 * [str(tmp_path / "a.json")])):
        result = _run("bench", *args)
        assert result.exit_code == 1
        assert said in str(result.exception)
    missing = _run("bench", "plot", str(tmp_path / "none.json"))
    assert "cannot read" in str(missing.exception)
