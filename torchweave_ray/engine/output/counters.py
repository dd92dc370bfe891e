"""What an engine counts of its requests, and a snapshot of it beside what its scheduler counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torchweave_ray.engine.memory.rest import Rest
from torchweave_ray.engine.scheduler import Scheduler
from torchweave_ray.outputs import RequestOutput, Stats


@dataclass(slots=True)
class Counters:
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0
    num_finished: int = 0
    num_failed: int = 0

    def note_outputs(self, outputs: Iterable[RequestOutput]) -> None:
        self.num_generated_tokens += sum(len(d.token_ids) for o in outputs for d in o.deltas)

    def note_end(self, output: RequestOutput) -> None:
        is_failed = any(delta.error is not None for delta in output.deltas)
        self.num_failed += is_failed
        self.num_finished += not is_failed

    def stats(self, scheduler: Scheduler, rest: Rest) -> Stats:
        drafter = scheduler.drafter
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_blocks=scheduler.blocks.num_blocks,
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_cacheable_tokens=scheduler.blocks.num_cacheable_tokens,
            num_steps=scheduler.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_prefix_query_tokens=scheduler.num_query_tokens,
            num_prefix_hit_tokens=scheduler.num_hit_tokens,
            num_draft_tokens=drafter.num_draft_tokens if drafter else 0,
            num_accepted_tokens=drafter.num_accepted_tokens if drafter else 0,
            num_finished=self.num_finished,
            num_failed=self.num_failed,
            num_restored_tokens=scheduler.spill.num_restored_tokens,
            num_saved_blocks=scheduler.spill.num_saved_blocks,
            num_damaged_blocks=scheduler.spill.num_damaged_blocks,
            num_asleep=int(rest.is_sleeping),
            num_wakes=rest.num_wakes,
        )
