"""What one step may still take on: tokens, and predicted milliseconds when they are known."""

from __future__ import annotations

from collections.abc import Iterable

from torchweave_ray.config import SchedulerConfig, StepCost

DECODE_SLOWDOWN = 4.0
"""A prompt may make a step with decodes so many times as long as a lone decode's step is."""
DECODE_SHARE = 3.0
"""Or, where many decodes take long by themselves, so many times as long as without the prompt."""
PROMPT_STEPS = 12.0
"""A step of prompts alone may last so many lone decode steps: long enough for products to run at
full speed, short enough for a small request that arrives meanwhile."""


def work_ms(cost: StepCost, start: int, num_tokens: int) -> float:
    """Predicted for these positions of one sequence, without the step around them."""
    return cost.b * num_tokens + cost.c * num_tokens * (start + num_tokens / 2)


def prompt_tokens_per_s(config: SchedulerConfig, decode_lens: Iterable[int]) -> float | None:
    """Predicted for prompts beside decodes at these positions; None: costs are not known."""
    cost = config.step_cost
    if cost is None:
        return None
    budget = StepBudget(config, min_chunk=1)
    for start in decode_lens:
        budget.take_decode(start)
    size = budget.chunk(0, config.step_tokens)
    budget.take_chunk(0, size)
    return 1e3 * size / budget.ms


def least_prefill_s(config: SchedulerConfig, start: int, num_tokens: int) -> float:
    """Predicted for a prompt that has the engine to itself; 0: costs are not known."""
    cost = config.step_cost
    if cost is None or num_tokens <= 0:
        return 0.0
    num_steps = -(-num_tokens // config.step_tokens)
    return (num_steps * cost.a + work_ms(cost, start, num_tokens)) / 1e3


class StepBudget:
    def __init__(self, config: SchedulerConfig, min_chunk: int) -> None:
        """`min_chunk`: tokens that the step's first prompt gets whatever the milliseconds say."""
        self._cost: StepCost | None = config.step_cost
        self._max_ms = config.max_step_ms
        self._ms = self._decode_ms = self._cost.a if self._cost is not None else 0.0
        self._has_decodes = False
        self._tokens_left = config.step_tokens
        self._min_chunk = min_chunk

    @property
    def ms(self) -> float:
        """Predicted for the step as it is."""
        return self._ms

    @property
    def is_spent(self) -> bool:
        return self._tokens_left <= 0

    def take_decode(self, start: int) -> None:
        self._tokens_left -= 1
        cost = self._cost_of(start, 1)
        self._ms += cost
        self._decode_ms += cost
        self._has_decodes = True

    def take_chunk(self, start: int, num_tokens: int) -> None:
        self._tokens_left -= num_tokens
        self._ms += self._cost_of(start, num_tokens)
        self._min_chunk = 0

    def chunk(self, start: int, wanted: int) -> int:
        """How many of the next `wanted` prompt tokens fit, 0 if none.

        Decodes that use up the milliseconds must not stop prompts for ever, hence `min_chunk`.
        """
        size = min(wanted, self._tokens_left)
        left = self._limit_ms() - self._ms
        if self._cost is not None and self._cost_of(start, size) > left:
            # Cost is convex in the size: the largest that fits, by bisection.
            low, high = 0, size
            while low < high:
                middle = (low + high + 1) // 2
                if self._cost_of(start, middle) <= left:
                    low = middle
                else:
                    high = middle - 1
            size = max(low, min(self._min_chunk, size))
        return max(size, 0)

    def price(self, start: int, num_draws: int) -> float:
        """Of one more token, in tokens that the step draws in that time; 0: costs are not known."""
        return self._cost_of(start, 1) * num_draws / self._ms if self._ms > 0 else 0.0

    def _limit_ms(self) -> float:
        """The whole step's. A lone decode is the measure: it costs what the model and the machine
        make it cost, so one rule fits all of them."""
        if self._max_ms is not None or self._cost is None:
            return self._max_ms or 0.0
        lone_ms = self._cost.a + self._cost.b
        if not self._has_decodes:
            return PROMPT_STEPS * lone_ms
        return max(DECODE_SLOWDOWN * lone_ms, DECODE_SHARE * self._decode_ms)

    def _cost_of(self, start: int, num_tokens: int) -> float:
        return 0.0 if self._cost is None else work_ms(self._cost, start, num_tokens)
