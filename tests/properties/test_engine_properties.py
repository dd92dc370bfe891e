"""Thousands of random workloads through the whole engine on EchoRunner: every output must equal
the one computed alone, every invariant must hold after every step, and nothing may be left."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, Expected, LetterDetokenizer, Unsure, expected
from torchweave_ray.config import CacheConfig, SchedulerConfig, SpeculationConfig, StepCost
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.kv_groups import ONE_GROUP, KVGroups
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.engine.speculation.draft_model import DraftModel
from torchweave_ray.engine.speculation.drafter import Drafter, Wanted
from torchweave_ray.engine.speculation.ngram import NgramProposer
from torchweave_ray.outputs import FinishReason, GenerateRequest, OutputKind, RequestOutput
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.tokenizer.grammar import GrammarCompiler

NUM_WORKLOADS = 3000
BATCHES = 10


@dataclass
class Received:
    """What a client joined from the outputs of one request."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    stop_reasons: dict[int, str | int | None] = field(default_factory=dict)
    last: RequestOutput | None = None

    def add(self, output: RequestOutput, resumed: int) -> None:
        assert self.last is None, "nothing comes after the last output"
        for delta in output.deltas:
            assert delta.index not in self.reasons, "nothing comes after a finish reason"
            assert delta.first_index == resumed + len(self.token_ids[delta.index])
            self.token_ids[delta.index] += delta.token_ids
            self.texts[delta.index] += delta.text
            if delta.finish_reason is not None:
                self.reasons[delta.index] = delta.finish_reason
                self.stop_reasons[delta.index] = delta.stop_reason
        if output.is_last:
            self.last = output


class Oracle:
    """Proposes what will come, or not quite: each guess is wrong with probability 0.2."""

    method, acceptance, share = "oracle", 0.8, 0.0

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rng = random.Random(workload.limits.num_blocks)
        self._wholes: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        for request in workload.requests:
            for index in range(request.n):
                whole = workload.whole(request, index).token_ids
                self._wholes[request.prompt_token_ids].append(whole)

    def lag(self, seq: object, end: int) -> int:
        return 0

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._guesses(w.seq.token_ids[: w.end], w.num) for w in wanted]

    def release(self, seq_id: int) -> None:
        pass

    def take_rounds(self) -> list[object]:
        return []

    def _guesses(self, known: list[int], most: int) -> list[int]:
        end = len(known)
        for prompt, wholes in self._wholes.items():
            for whole in wholes:
                text = [*prompt, *whole]
                if text[:end] == known and len(text) > end:
                    drafts = text[end : end + self._rng.randint(0, most)]
                    return [self._maybe(token_id) for token_id in drafts]
        return [self._rng.randrange(VOCAB)][:most]

    def _maybe(self, token_id: int) -> int:
        return self._rng.randrange(VOCAB) if self._rng.random() < 0.2 else token_id


def random_groups(rng: random.Random, block_size: int, num_blocks: int) -> KVGroups:
    """Every other time layers that see everything, else some or all that slide; a few tables at
    most, for a sequence needs a block of each."""
    num_full, num_sliding = rng.choice([(1, 0)] * 4 + [(0, 1), (1, 1), (1, 2), (2, 1)])
    if not num_sliding or num_blocks < 2 * (num_full + num_sliding):
        return ONE_GROUP
    window, chunk = rng.choice([1, 5, 16]), rng.choice([1, 3, 64])
    chunk_blocks = -(-2 * chunk // block_size) + 1  # two steps may be in flight
    return KVGroups(num_full, num_sliding, -(-window // block_size), chunk, chunk_blocks)


class Workload:
    """One random engine with random requests, driven to the end."""

    grammars: GrammarCompiler | None = None

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.now = 1000.0
        block_size = rng.choice([1, 2, 3, 4, 8])
        num_blocks = rng.randint(6, 40)
        groups = random_groups(random.Random(seed), block_size, num_blocks)
        max_model_len = rng.randint(2, min(60, (groups.longest(num_blocks) or 60) * block_size))
        sizes, step_depth = (num_blocks, block_size, max_model_len), rng.randint(0, 1)
        self.limits = RuntimeLimits(*sizes, VOCAB, (EOS,), step_depth, groups)
        max_num_seqs = rng.randint(1, 6)
        with_cost = rng.random() < 0.3
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 7, 64]),
            max_step_ms=rng.choice([1.0, 5.0, 20.0]) if with_cost else None,
            step_cost=StepCost(0.5, 0.3, 0.01) if with_cost else None,
            ageing_tokens_per_step=rng.choice([1, 8, 64]),
        )
        cache = CacheConfig(
            block_size=block_size,
            enable_prefix_caching=rng.random() < 0.7,
            watermark=rng.choice([0.0, 0.1]),
        )
        self.prefix = [rng.randrange(1, VOCAB) for _ in range(max_model_len)]
        self.requests = [self.random_request(i) for i in range(rng.randint(1, 10))]
        self.poisoned = {r.sampling.seed for r in self.requests if rng.random() < 0.03}
        self.runner = EchoRunner(self.limits, frozenset(self.poisoned))
        speculation = SpeculationConfig(max_draft_tokens=rng.choice([1, 3, 8]))
        self.draft_model = self.random_draft_model(cache)
        self.proposer = rng.choice(
            [None, Oracle(self), self.draft_model, self.draft_model, NgramProposer(speculation)]
        )
        self.engine = Engine(
            self.runner,
            LetterDetokenizer(),
            cache,
            self.config,
            "artifact",
            lambda: self.now,
            self.grammars,
            self.proposer and Drafter(self.proposer, speculation, lambda: self.now),
        )
        self.received = {r.request_id: Received() for r in self.requests}
        self.aborted: set[str] = set()

    def random_draft_model(self, cache: CacheConfig) -> DraftModel:
        """Other seeds than the workload's own draw it: what is asked for stays the same."""
        rng = random.Random(-self.limits.num_blocks)
        limits = replace(
            self.limits,
            step_depth=0,
            num_blocks=rng.choice([self.limits.num_blocks, 5]),
            max_model_len=rng.choice([self.limits.max_model_len, 20]),
        )
        runner = Unsure(limits, rng.choice([0.0, 0.2, 0.5]))
        return DraftModel(runner, cache, VOCAB, 0.1, lambda: self.now)

    def random_request(self, number: int) -> GenerateRequest:
        rng = self.rng
        longest = self.limits.max_model_len
        num_prompt = rng.randint(1, longest - 1)
        shared = rng.randint(0, num_prompt)
        prompt = self.prefix[:shared] + [
            rng.randrange(1, VOCAB) for _ in range(num_prompt - shared)
        ]
        max_tokens = rng.choice([None, rng.randint(1, longest - num_prompt)])
        sampling = SamplingParams(
            max_tokens=max_tokens,
            seed=number * 1000 + rng.randrange(100),
            min_tokens=rng.randint(0, max_tokens) if max_tokens and rng.random() < 0.3 else 0,
            ignore_eos=rng.random() < 0.3,
            stop=tuple(rng.sample(["ab", "aa", "bcc", "ddeb", "cab"], rng.choice([0, 0, 1, 3]))),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 2]))),
            include_stop_str_in_output=rng.random() < 0.3,
        )
        request = GenerateRequest(
            request_id=f"r{number}",
            model="echo",
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            priority=rng.choice([0, 0, 1]),
            tenant=rng.choice(["", "t"]),
            deadline=self.now + rng.randint(1, 60) if rng.random() < 0.05 else None,
        )
        kind = rng.random()
        if kind < 0.25:
            return replace(request, n=rng.randint(2, 5))
        if kind < 0.35:
            return replace(request, exclusive=True)
        if kind < 0.4:
            return replace(request, output_kind=OutputKind.PROMPT_LOGPROBS)
        if kind < 0.45:
            return replace(request, output_kind=OutputKind.POOLED)
        if kind < 0.7:
            return self.resumed(request)
        return request

    def resumed(self, request: GenerateRequest) -> GenerateRequest:
        """The same request after its client received k tokens and some of their text."""
        whole = self.whole(request, 0)
        k = self.rng.randint(0, len(whole.token_ids))
        has_end = k == len(whole.token_ids)
        released = len(whole.text) if has_end else ([0, *whole.released])[k]
        return replace(
            request,
            output_token_ids=tuple(whole.token_ids[:k]),
            emitted_chars=self.rng.randint(0, released),
        )

    def whole(self, request: GenerateRequest, index: int) -> Expected:
        return expected(request, index, self.limits.max_model_len)

    def run(self) -> None:
        arrivals = [(self.rng.randint(0, 20), request) for request in self.requests]
        for tick in range(3000):
            for when, request in arrivals:
                if when == tick:
                    self.engine.add(request)
            if self.rng.random() < 0.02:
                victim = self.rng.choice(self.requests).request_id
                self.aborted.add(victim)
                self.engine.abort(victim)
            for output in self.engine.step():
                request = next(r for r in self.requests if r.request_id == output.request_id)
                self.received[output.request_id].add(output, len(request.output_token_ids))
            self.engine.check_integrity()
            scheduler = self.engine._scheduler
            ids = {seq.seq_id for seq in scheduler.running}
            self.draft_model.check_integrity(ids | set(scheduler.released))
            self.now += 1.0
            if tick > 20 and not self.engine.has_work:
                break
        assert not self.engine.has_work, "some sequence never finishes"

    def check(self) -> None:
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
        for plan in self.runner.plans:
            self.check_plan(plan)
        for request in self.requests:
            received = self.received[request.request_id]
            if request.request_id in self.aborted and received.last is None:
                continue  # aborted before it was added
            assert received.last is not None, f"{request.request_id} was never ended"
            if request.output_kind is OutputKind.POOLED:
                continue
            for index in range(request.n):
                self.check_choice(request, index, received)

    def check_plan(self, plan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(plan.sequences) <= self.config.max_num_seqs
        exclusive = {r.sampling.seed for r in self.requests if r.exclusive}
        if any(s.seed in exclusive for s in plan.sequences):
            assert len(plan.sequences) == 1, "an exclusive sequence shares its step"

    def check_choice(self, request: GenerateRequest, index: int, received: Received) -> None:
        whole = self.whole(request, index)
        resumed = len(request.output_token_ids)
        text = whole.text[request.emitted_chars :]
        tokens = whole.token_ids[resumed:]
        reason = received.reasons[index]
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert (
                request.request_id in self.aborted
                or request.deadline is not None
                or request.sampling.seed + index in self.poisoned
                or request.sampling.seed in self.poisoned
            )
            assert tokens[: len(received.token_ids[index])] == received.token_ids[index]
            return
        assert received.token_ids[index] == tokens
        assert received.texts[index] == text
        assert (reason, received.stop_reasons[index]) == (whole.finish_reason, whole.stop_reason)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_workloads_give_what_each_request_gives_alone(batch: int) -> None:
    share = NUM_WORKLOADS // BATCHES
    for seed in range(batch * share, (batch + 1) * share):
        try:
            workload = Workload(seed)
            workload.run()
            workload.check()
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error!r}") from error


def test_the_workloads_reach_what_they_are_for() -> None:
    """A property that never meets preemption, forks, hits or copies proves nothing."""
    accepted = rejected = preemptions = hits = copies = aborts = depth_one = by_model = 0
    mixed_hits = 0
    for seed in range(300):
        workload = Workload(seed)
        workload.run()
        stats = workload.engine.stats()
        preemptions += stats.num_preemptions
        hits += stats.num_prefix_hit_tokens
        copies += sum(len(plan.block_copies) for plan in workload.runner.plans)
        aborts += len(workload.aborted)
        depth_one += workload.limits.step_depth
        is_mixed = workload.limits.groups.num_full and workload.limits.groups.num_sliding
        mixed_hits += stats.num_prefix_hit_tokens if is_mixed else 0
        accepted += stats.num_accepted_tokens
        rejected += stats.num_draft_tokens - stats.num_accepted_tokens
        is_model = workload.proposer is workload.draft_model
        by_model += stats.num_accepted_tokens if is_model else 0
    assert min(preemptions, hits, copies, aborts, depth_one, accepted, rejected, by_model) > 50
    assert mixed_hits > 50


def test_resuming_at_every_token_gives_the_undisturbed_rest() -> None:
    limits = RuntimeLimits(64, 4, 120, VOCAB, (EOS,))
    for seed in range(40):
        sampling = SamplingParams(max_tokens=24, seed=seed, stop=("ddeb", "ab"), ignore_eos=True)
        request = GenerateRequest("r", "echo", (3, 1, 4, 1, 5), sampling)
        whole: Expected = expected(request, 0, limits.max_model_len)
        for k in range(len(whole.token_ids) + 1):
            is_whole = k == len(whole.token_ids)
            emitted = len(whole.text) if is_whole else [0, *whole.released][k]
            engine = Engine(
                EchoRunner(limits), LetterDetokenizer(), CacheConfig(), SchedulerConfig(), "a"
            )
            engine.add(
                replace(
                    request,
                    output_token_ids=tuple(whole.token_ids[:k]),
                    emitted_chars=emitted,
                )
            )
            text, tokens, usage = whole.text[:emitted], whole.token_ids[:k], None
            while engine.has_work:
                for output in engine.step():
                    usage = output.usage or usage
                    for delta in output.deltas:
                        text += delta.text
                        tokens += delta.token_ids
            assert (text, tokens) == (whole.text, whole.token_ids)
            assert usage is not None
            assert usage.completion_tokens == len(whole.token_ids)
