"""What steps and guesses take, as measured, and how many guesses are worth their time.

A guess is worth it while it raises the step's tokens a second. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_PRIOR_WEIGHT = 2.0
_MARGIN = 1.25
"""What a guess has to promise, of what its row costs: of rough estimates the best ones flatter."""
_STEP_FADE = 0.99
_LEAST_STEPS, _LEAST_VARIANCE = 4, 0.1
_GUESS_FADE = 0.9
_PROMPT_SHARE = 1 / 8
"""Of a drafter's step of one token, until its prompts are measured: what a prompt's token takes."""
_PROMPT_TOKENS = 4
"""From so many tokens a row on it is its prompt that a drafter computes."""


class Acceptance:
    """How often the last drafts were right."""

    __slots__ = ("_accepted", "_rejected")

    def __init__(self) -> None:
        self._accepted = self._rejected = 0.0

    def rate(self, prior: float) -> float:
        """Probability that the next draft is right, if those before it are; `prior` before
        anything is known."""
        known = self._accepted + self._rejected
        return (self._accepted + _PRIOR_WEIGHT * prior) / (known + _PRIOR_WEIGHT)

    def note(self, num_drafts: int, num_accepted: int, fade: float) -> None:
        """`fade`: what the steps before weigh beside this one. What stands behind a wrong draft
        says nothing."""
        self.fade(fade)
        self._accepted += num_accepted
        self._rejected += num_accepted < num_drafts

    def fade(self, share: float) -> None:
        self._accepted *= share
        self._rejected *= share


class StepTimes:
    """What decode steps take by their rows: a line through the last of them.

    Least squares, weighted by age. Rows have to differ for a slope, so steps without guesses
    forget what a row costs, and after some time it is tried again.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of weights, rows, seconds, rows squared, rows x seconds

    def note(self, num_rows: int, seconds: float) -> None:
        new = (1.0, num_rows, seconds, num_rows * num_rows, num_rows * seconds)
        self._sums = [_STEP_FADE * old + value for old, value in zip(self._sums, new, strict=True)]

    @property
    def row_s(self) -> float | None:
        """Seconds of one more row; None: not known."""
        weight, rows, seconds, squares, products = self._sums
        variance = squares * weight - rows * rows
        if weight < _LEAST_STEPS or variance < _LEAST_VARIANCE * weight * weight:
            return None
        return max(0.0, (products * weight - rows * seconds) / variance)

    def step_s(self, num_rows: int) -> float | None:
        """Seconds of a step of so many rows; None: not known."""
        weight, rows, seconds, _, _ = self._sums
        if weight < _LEAST_STEPS:
            return None
        mean = rows / weight
        # Below the mean a line may cross zero: a step of fewer rows takes its share at least.
        least = seconds / weight * min(1.0, num_rows / mean)
        return max(least, seconds / weight + (self.row_s or 0.0) * (num_rows - mean))


class GuessTimes:
    """What a drafter's own steps take, the last ones most. `share`: of a step of the model's on
    as many rows; its first value is only a prior."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._token_s: float | None = None

    def note(self, num_rows: int, num_tokens: int, seconds: float, step_s: float) -> None:
        """`step_s`: of a step of the model's on these rows."""
        if num_tokens >= _PROMPT_TOKENS * num_rows:
            self._token_s = _blend(self._token_s, seconds / num_tokens)
        elif step_s > 0:
            self.share = _blend(self.share, seconds / step_s)

    def token_s(self, step_s: float) -> float:
        """Of a token of its prompt, where a step of the model's on one row takes `step_s`."""
        return self.share * step_s * _PROMPT_SHARE if self._token_s is None else self._token_s


def _blend(old: float | None, new: float) -> float:
    return new if old is None else _GUESS_FADE * old + (1 - _GUESS_FADE) * new


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, in any unit."""

    step_s: float
    """Of the step as it is."""
    row_s: float
    """What it takes longer for each guess that it verifies."""
    round_s: Callable[[int], float]
    """Of making one guess for each of so many sequences."""


@dataclass(frozen=True, slots=True)
class Outcome:
    num_guesses: list[int]
    """By sequence."""
    seconds: float
    """That the step saves beside steps without guesses that make as many tokens."""
    tokens: list[float]
    """By sequence, those beyond the first that may be expected."""


def least_acceptance(num_draws: int, costs: Costs) -> float:
    """A sequence's first guess has to be right more often than that to be worth its row."""
    return _MARGIN * num_draws * costs.row_s / costs.step_s


def most_worth(
    acceptances: Sequence[float], most: Sequence[int], num_draws: int, costs: Costs
) -> Outcome:
    """How many guesses each of these sequences should get in a step of `num_draws` tokens.

    The i-th is right with acceptance ** i. Guesses are made in rounds, one for each sequence; each
    has to be worth more than its row, and a round its time.
    """
    num_guesses, tokens = [0] * len(most), [0.0] * len(most)
    gain, seconds = float(num_draws), costs.step_s
    alive = list(range(len(most)))
    for depth in range(1, max(most, default=0) + 1):
        limit = _MARGIN * gain * costs.row_s
        alive = [i for i in alive if most[i] >= depth and acceptances[i] ** depth * seconds > limit]
        if not alive:
            break
        added = sum(acceptances[i] ** depth for i in alive)
        spent = costs.round_s(len(alive)) + costs.row_s * len(alive)
        if added * seconds <= gain * spent:
            break
        gain, seconds = gain + added, seconds + spent
        for i in alive:
            num_guesses[i] = depth
            tokens[i] += acceptances[i] ** depth
    return Outcome(num_guesses, gain * costs.step_s / max(1, num_draws) - seconds, tokens)
