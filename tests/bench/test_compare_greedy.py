"""What counts as a near-tie, and the comparison on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts import compare_greedy
from scripts.compare_greedy import compare, judge, make_prompts, step_of_bf16, summary
from tests.tiny import make_tiny_artifact
from torchweave_ray.kernels.library import KernelsUnavailable, load_library


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_artifact(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [0.3, 1.0, 1.9921875, 2.0, 17.25, -17.25, 1000.0])
def test_a_step_is_the_distance_to_the_next_bf16(value: float) -> None:
    here = torch.tensor(abs(value)).bfloat16()
    following = (here.view(torch.int16) + 1).view(torch.bfloat16)
    assert step_of_bf16(value) == following.item() - here.item()


def test_a_near_tie_is_two_steps_at_most() -> None:
    logits = torch.tensor([17.0, 17.25, 17.375, -3.0])  # steps of 0.125 here
    near = judge(logits, logits, native=0, reference=1)
    assert (near["gap"], near["gap_in_steps"], near["near_tie"]) == (0.25, 2.0, True)
    far = judge(logits, logits, native=0, reference=2)
    assert (far["gap_in_steps"], far["near_tie"]) == (3.0, False)
    assert judge(logits, -logits, native=0, reference=1)["gap_fp32"] == -0.25


def test_prompts_are_distinct_and_half_prose() -> None:
    prompts = make_prompts(200)
    assert len(set(prompts)) == 200
    prose = " ".join(compare_greedy.PROSE.read_text().split())
    assert [prompt in prose for prompt in prompts] == [True] * 100 + [False] * 100


def test_both_executors_answer_and_differ_at_near_ties_only(artifact: Path) -> None:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    assert all(d.near_tie for d in compare(artifact, make_prompts(6), 4))


def test_a_difference_is_judged_where_the_texts_part(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"torch": [(5, 6, 7), (5, 6, 7)], "native": [(5, 6, 7), (5, 9, 8)]}
    monkeypatch.setattr(
        compare_greedy,
        "generate",
        lambda artifact, executor, prompts, num: ([(3, 4), (3, 4)], answers[executor]),
    )
    (difference,) = compare(artifact, ["a", "b"], 3)
    assert (difference.prompt, difference.index) == (1, 1)
    assert (difference.native, difference.torch) == (9, 6)
    logits = compare_greedy.TorchLogits(artifact, torch.bfloat16).after([3, 4, 5])
    assert difference.gap == (logits[6] - logits[9]).item()
    counts = summary(2, [difference])
    assert (counts["prompts"], counts["equal"]) == (2, 1)
    assert counts["near_ties"] + counts["not_near_ties"] == 1
    assert counts["fp32_sides_with_native"] == int(difference.gap_fp32 < 0)
