"""Constrained sequences in random workloads: each output is the one computed alone, from the start
of its grammar for every token, whatever was preempted, forked, shared or resumed around it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, Expected, LetterDetokenizer, expected
from tests.echo_grammar import REGEXES, Meaning, letter_compiler, regex
from tests.properties.test_engine_properties import Workload
from torchweave_ray.config import CacheConfig, SchedulerConfig
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.outputs import GenerateRequest, OutputKind
from torchweave_ray.sampling_params import SamplingParams

NUM_WORKLOADS = 600
BATCHES = 4
MEANING = Meaning()
GRAMMARS = letter_compiler()


class GrammarWorkload(Workload):
    grammars = GRAMMARS

    def random_request(self, number: int) -> GenerateRequest:
        request = super().random_request(number)
        if request.output_kind is not OutputKind.TOKENS or self.rng.random() < 0.3:
            return request
        sampling = request.sampling
        if sampling.min_tokens:  # banned together, they could be all that a grammar allows
            sampling = replace(sampling, stop_token_ids=())
        constrained = replace(
            request,
            sampling=sampling,
            grammar=regex(self.rng.choice(REGEXES)),
            output_token_ids=(),
            emitted_chars=0,
        )
        is_resumed = bool(request.output_token_ids)
        return self.resumed(constrained) if is_resumed else constrained

    def whole(self, request: GenerateRequest, index: int) -> Expected:
        allowed = MEANING.of(request.grammar) if request.grammar is not None else None
        return expected(request, index, self.limits.max_model_len, allowed)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_workloads_give_what_each_constrained_request_gives_alone(batch: int) -> None:
    share = NUM_WORKLOADS // BATCHES
    for seed in range(batch * share, (batch + 1) * share):
        try:
            workload = GrammarWorkload(seed)
            workload.run()
            workload.check()
            assert not workload.engine._constraints, "a grammar was forgotten"
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error!r}") from error


def test_the_workloads_reach_what_they_are_for() -> None:
    preempted = forked = resumed = depth_one = free_beside = 0
    for seed in range(100):
        workload = GrammarWorkload(seed)
        workload.run()
        constrained = [r for r in workload.requests if r.grammar is not None]
        preempted += workload.engine.stats().num_preemptions * bool(constrained)
        forked += sum(r.n > 1 for r in constrained)
        resumed += sum(bool(r.output_token_ids) for r in constrained)
        depth_one += workload.limits.step_depth * bool(constrained)
        for plan in workload.runner.plans:
            if plan.bitmask is not None:
                is_free = (plan.bitmask == -1).all(axis=1)
                free_beside += bool(is_free.any() and not is_free.all())
    assert min(preempted, forked, resumed, depth_one, free_beside) > 20


@pytest.mark.parametrize("step_depth", [0, 1])
def test_resuming_at_every_token_gives_the_undisturbed_rest(step_depth: int) -> None:
    limits = RuntimeLimits(64, 4, 120, VOCAB, (EOS,), step_depth=step_depth)
    rng = random.Random(5)
    for text in REGEXES:
        sampling = SamplingParams(max_tokens=24, seed=rng.randrange(1000), min_tokens=3)
        request = GenerateRequest("r", "echo", (3, 1, 4, 1, 5), sampling, grammar=regex(text))
        whole = expected(request, 0, limits.max_model_len, MEANING.of(regex(text)))
        for k in range(len(whole.token_ids) + 1):
            is_whole = k == len(whole.token_ids)
            emitted = len(whole.text) if is_whole else [0, *whole.released][k]
            engine = Engine(
                EchoRunner(limits),
                LetterDetokenizer(),
                CacheConfig(),
                SchedulerConfig(),
                "a",
                grammars=GRAMMARS,
            )
            engine.add(
                replace(request, output_token_ids=tuple(whole.token_ids[:k]), emitted_chars=emitted)
            )
            received, tokens = whole.text[:emitted], whole.token_ids[:k]
            while engine.has_work:
                for output in engine.step():
                    for delta in output.deltas:
                        received += delta.text
                        tokens += delta.token_ids
            assert (received, tokens) == (whole.text, whole.token_ids), (text, k)
