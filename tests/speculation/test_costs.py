"""How many guesses are worth their time, from what was measured."""

from __future__ import annotations

import pytest

from torchweave_ray.engine.speculation.costs import (
    Acceptance,
    Costs,
    GuessTimes,
    StepTimes,
    most_worth,
)


def guesses(acceptances: list[float], row_s: float, round_s: float = 0.0, most: int = 8):
    costs = Costs(1.0, row_s, lambda num_rows: round_s)
    return most_worth(acceptances, [most] * len(acceptances), len(acceptances), costs)


def rate(acceptance: float, num: int, row_s: float, round_s: float) -> float:
    """Tokens a second of one sequence with so many guesses."""
    return sum(acceptance**i for i in range(num + 1)) / (1 + num * (row_s + round_s))


def test_guesses_are_made_while_each_clearly_raises_the_rate() -> None:
    assert guesses([0.5], row_s=0.0).num_guesses == [8]
    assert guesses([0.9], row_s=1.0).num_guesses == [0]
    assert guesses([0.9], row_s=0.1, most=-1).num_guesses == [0]
    assert guesses([], row_s=0.1).num_guesses == []
    for acceptance in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97):
        for row_s in (0.02, 0.1, 0.3, 0.6):
            for round_s in (0.0, 0.05, 0.4):
                (num,) = guesses([acceptance], row_s, round_s).num_guesses
                rates = [rate(acceptance, each, row_s, round_s) for each in range(9)]
                assert rates[num] >= max(rates[0], 0.9 * max(rates))


def test_a_round_has_to_pay_for_all_whom_it_serves() -> None:
    # Alone, 0.5 tokens for 0.6 of a step; four of them share it.
    assert guesses([0.5], row_s=0.0, round_s=0.6).num_guesses == [0]
    assert min(guesses([0.5] * 4, row_s=0.0, round_s=0.2).num_guesses) >= 1
    # A row that its own sequence's chance does not pay is nobody else's.
    assert guesses([0.9, 0.1], row_s=0.2).num_guesses[1] == 0


def test_what_a_step_saves_is_known() -> None:
    outcome = guesses([0.5], row_s=0.1, most=1)
    assert outcome.seconds == pytest.approx(1.5 - 1.1)
    assert outcome.tokens == [0.5]
    assert guesses([0.1], row_s=0.5).seconds == 0.0


def test_acceptance_follows_the_last_steps_and_fades_back() -> None:
    state = Acceptance()
    assert state.rate(0.8) == 0.8
    for _ in range(50):
        state.note(num_drafts=4, num_accepted=4, fade=0.9)
    assert state.rate(0.5) > 0.9
    for _ in range(10):
        state.note(num_drafts=4, num_accepted=0, fade=0.9)
    assert state.rate(0.5) < 0.7
    for _ in range(200):
        state.fade(0.97)
    assert state.rate(0.5) == pytest.approx(0.5, abs=0.02)


def test_the_time_of_a_step_is_a_line_through_the_last_ones() -> None:
    times = StepTimes()
    assert times.step_s(4) is None
    assert times.row_s is None
    for num_rows in (4, 5, 6, 7) * 20:
        times.note(num_rows, 0.010 + 0.001 * num_rows)
    assert times.row_s == pytest.approx(0.001)
    assert times.step_s(4) == pytest.approx(0.014)
    for _ in range(2000):
        times.note(4, 0.014)
    assert times.row_s is None, "without drafts nobody knows what they cost"
    assert times.step_s(4) == pytest.approx(0.014)


def test_a_step_of_few_rows_never_seems_to_be_free() -> None:
    times = StepTimes()
    for num_rows in (8, 9, 10) * 10:
        times.note(num_rows, 0.010 * (num_rows - 7))
    assert times.step_s(1) > 0


def test_a_drafters_own_steps_and_prompts_are_told_apart() -> None:
    times = GuessTimes(0.25)
    assert (times.share, times.token_s(0.08)) == (0.25, pytest.approx(0.0025))
    for _ in range(60):
        times.note(num_rows=2, num_tokens=3, seconds=0.004, step_s=0.01)
    times.note(num_rows=1, num_tokens=100, seconds=0.05, step_s=0.01)
    assert times.share == pytest.approx(0.4, abs=0.01)
    assert times.token_s(0.08) == pytest.approx(0.0005)
