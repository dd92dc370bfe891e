"""Changes to a call's outputs on their way: several tokens at once, or the prompt's scores alone.

Knows no protocol.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

from torchweave_ray.api.generation import Outputs
from torchweave_ray.errors import RequestError
from torchweave_ray.outputs import ChoiceDelta, FinishReason, RequestOutput, merge_outputs


async def at_intervals(outputs: Outputs, num_tokens: int) -> Outputs:
    """So many tokens or more in each output; the first of a prompt is not delayed."""
    held: dict[int, list[RequestOutput]] = {}
    async with aclosing(outputs):
        try:
            async for index, output in outputs:
                is_first = index not in held
                parts = held.setdefault(index, [])
                parts.append(output)
                num_held = sum(len(delta.token_ids) for part in parts for delta in part.deltas)
                has_end = any(delta.finish_reason is not None for delta in output.deltas)
                if is_first or has_end or output.is_last or num_held >= num_tokens:
                    yield index, merge_outputs(parts)
                    parts.clear()
        except RequestError:
            for index, parts in held.items():
                if parts:
                    yield index, merge_outputs(parts)
            raise


async def without_answer(outputs: Outputs) -> Outputs:
    """Only what is said of the prompt: the one token that had to be drawn is taken out."""
    async with aclosing(outputs):
        async for index, output in outputs:
            usage = output.usage
            yield (
                index,
                replace(
                    output,
                    deltas=tuple(_emptied(delta) for delta in output.deltas),
                    usage=None if usage is None else replace(usage, completion_tokens=0),
                ),
            )


def _emptied(delta: ChoiceDelta) -> ChoiceDelta:
    if delta.finish_reason is FinishReason.ERROR:
        return delta
    reason = None if delta.finish_reason is None else FinishReason.LENGTH
    return ChoiceDelta(delta.index, 0, (), "", None, reason)
