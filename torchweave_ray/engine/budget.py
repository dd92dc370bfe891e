"""What one step may still take on: tokens, and predicted milliseconds when they are known."""

from __future__ import annotations

from torchweave_ray.config import SchedulerConfig, StepCost


class StepBudget:
    def __init__(self, config: SchedulerConfig, min_chunk: int) -> None:
        """`min_chunk`: tokens that the step's first prompt gets whatever the milliseconds say."""
        self._cost: StepCost | None = None
        self._ms_left = 0.0
        if config.max_step_ms is not None and config.step_cost is not None:
            self._cost = config.step_cost
            self._ms_left = config.max_step_ms - config.step_cost.a
        self._tokens_left = config.max_num_batched_tokens
        self._min_chunk = min_chunk

    @property
    def is_spent(self) -> bool:
        return self._tokens_left <= 0

    def take_decode(self, start: int) -> None:
        self._tokens_left -= 1
        self._ms_left -= self._ms(start, 1)

    def take_chunk(self, start: int, num_tokens: int) -> None:
        self._tokens_left -= num_tokens
        self._ms_left -= self._ms(start, num_tokens)
        self._min_chunk = 0

    def chunk(self, start: int, wanted: int) -> int:
        """How many of the next `wanted` prompt tokens fit, 0 if none.

        Decodes that use up the milliseconds must not stop prompts for ever, hence `min_chunk`.
        """
        size = min(wanted, self._tokens_left)
        if self._cost is not None and self._ms(start, size) > self._ms_left:
            # Cost is convex in the size: the largest that fits, by bisection.
            low, high = 0, size
            while low < high:
                middle = (low + high + 1) // 2
                if self._ms(start, middle) <= self._ms_left:
                    low = middle
                else:
                    high = middle - 1
            size = max(low, min(self._min_chunk, size))
        return max(size, 0)

    def _ms(self, start: int, num_tokens: int) -> float:
        if self._cost is None:
            return 0.0
        token_context = num_tokens * (start + num_tokens / 2)
        return self._cost.b * num_tokens + self._cost.c * token_context
