"""What the scheduler promises, on EchoRunner: order, bounds, forks, exclusivity, refusals."""

from __future__ import annotations

import itertools

import pytest

from tests.echo import EOS, VOCAB, EchoRunner, LetterDetokenizer, expected
from torchweave_ray.config import CacheConfig, SchedulerConfig, StepCost
from torchweave_ray.engine.engine import Engine
from torchweave_ray.engine.plan import RuntimeLimits
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import FinishReason, GenerateRequest, OutputKind, Pooling, RequestOutput
from torchweave_ray.sampling_params import SamplingParams

LIMITS = RuntimeLimits(1024, 16, 8192, VOCAB, (EOS,))


def make_engine(
    limits: RuntimeLimits = LIMITS, cache: CacheConfig | None = None, **scheduler: object
) -> tuple[Engine, EchoRunner]:
    runner = EchoRunner(limits)
    config = SchedulerConfig(**scheduler)  # type: ignore[arg-type]
    engine = Engine(runner, LetterDetokenizer(), cache or CacheConfig(), config, "artifact")
    return engine, runner


def make_request(name: str, num_prompt: int, max_tokens: int = 4, **fields) -> GenerateRequest:
    sampling = fields.pop("sampling", None) or SamplingParams(
        max_tokens=max_tokens, seed=sum(name.encode()) * 100, ignore_eos=True
    )
    prompt = tuple(1 + (sum(name.encode()) * 7 + i) % (VOCAB - 1) for i in range(num_prompt))
    return GenerateRequest(name, "echo", prompt, sampling, **fields)


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def steps_to_first_token(engine: Engine, request_id: str) -> int:
    for steps in range(1, 10_000):
        if any(o.request_id == request_id for o in engine.step()):
            return steps
    raise AssertionError(f"{request_id} never answered")


def test_a_short_prompt_never_waits_behind_long_ones() -> None:
    engine, _ = make_engine(max_num_seqs=32, max_num_batched_tokens=512)
    for i in range(8):
        engine.add(make_request(f"long{i}", 4000))
    engine.step()
    engine.add(make_request("short", 100))
    assert steps_to_first_token(engine, "short") == 1


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    engine, _ = make_engine(max_num_seqs=32, max_num_batched_tokens=128, ageing_tokens_per_step=32)
    engine.add(make_request("long", 2000))
    for step in range(1000):
        engine.add(make_request(f"short{step}", 100, max_tokens=1))
        if any(o.request_id == "long" for o in engine.step()):
            break
    # Newcomers count ageing tokens more each step: after 2000 / 32 steps none goes before it.
    assert step <= 2000 / 32 + 2000 / 100 + 10


def test_decodes_go_first_and_every_step() -> None:
    engine, runner = make_engine(max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(4):
        engine.add(make_request(f"stream{i}", 8, max_tokens=50))
    engine.step()
    engine.add(make_request("long", 2000))
    for _ in range(20):
        engine.step()
        decodes = [s for s in runner.plans[-1].sequences if s.num_tokens == 1]
        assert len(decodes) == 4
        assert runner.plans[-1].sequences[:4] == tuple(decodes)
        assert runner.plans[-1].num_tokens == 64


def test_the_millisecond_budget_bounds_prompt_chunks() -> None:
    cost = StepCost(a=2.0, b=0.1, c=0.0005)
    engine, runner = make_engine(max_num_batched_tokens=512, max_step_ms=20.0, step_cost=cost)
    engine.add(make_request("long", 4000))
    run(engine)
    chunks = [s for plan in runner.plans for s in plan.sequences if s.num_tokens > 1]
    for chunk in chunks:
        context = chunk.num_tokens * (chunk.start + chunk.num_tokens / 2)
        assert cost.predict(chunk.num_tokens, context) <= 20.0 or chunk.num_tokens <= 16
    assert chunks[0].num_tokens > 2 * chunks[-2].num_tokens, "later chunks have more context"


def test_a_prompt_slows_running_streams_by_a_bounded_factor() -> None:
    """Without a budget in milliseconds the cost of a lone decode is the measure."""
    cost = StepCost(a=8.0, b=0.5, c=0.0001)
    engine, runner = make_engine(max_num_seqs=64, max_num_batched_tokens=2048, step_cost=cost)

    def predicted() -> float:
        context = sum(
            s.num_tokens * (s.start + s.num_tokens / 2) for s in runner.plans[-1].sequences
        )
        return cost.predict(runner.plans[-1].num_tokens, context)

    engine.add(make_request("long", 4000))
    engine.step()
    assert 90 < predicted() <= 12 * 8.5, "alone it has the step to itself"
    engine.add(make_request("short", 20, max_tokens=60))
    while not any(s.start >= 20 and s.num_tokens == 1 for s in runner.plans[-1].sequences):
        engine.step()
    assert 28 < predicted() <= 4 * 8.5, "beside one stream"
    for number in range(40):
        engine.add(make_request(f"r{number}", 8, max_tokens=60))
    while sum(s.num_tokens == 1 for s in runner.plans[-1].sequences) < 41:
        engine.step()
    alone = cost.predict(41, 41 * 20)
    assert 2 * alone < predicted() <= 3.2 * alone, "beside many"


def test_higher_priority_goes_first() -> None:
    engine, runner = make_engine(max_num_seqs=1, max_num_batched_tokens=64)
    engine.add(make_request("low", 10, priority=0))
    engine.add(make_request("high", 40, priority=5))
    run(engine)
    assert runner.plans[0].sequences[0].num_prompt_tokens == 40


def test_choices_fork_from_one_computed_prompt() -> None:
    engine, runner = make_engine()
    request = make_request("fork", 50, max_tokens=6, n=4)
    engine.add(request)
    outputs = run(engine)["fork"]
    computed = sum(plan.num_tokens for plan in runner.plans)
    assert computed == 50 + 3 + 4 * 5, "the prompt once, its last token for each fork, decodes"
    assert [copy[0] for copy in runner.plans[1].block_copies] == [
        runner.plans[0].sequences[0].block_tables[0][3]
    ] * 3
    texts = ["".join(d.text for o in outputs for d in o.deltas if d.index == i) for i in range(4)]
    assert texts == [expected(request, i, LIMITS.max_model_len).text for i in range(4)]
    usage = outputs[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (50, 24, 0)


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine, runner = make_engine()
    engine.add(make_request("same", 100))
    run(engine)
    del runner.plans[:]
    engine.add(make_request("same", 100))
    usage = run(engine)["same"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 96
    assert runner.plans[0].num_tokens == 4


@pytest.mark.parametrize("field", ["tenant", "cache_salt"])
def test_prefixes_are_not_shared_across(field: str) -> None:
    engine, _ = make_engine()
    engine.add(make_request("same", 100))
    run(engine)
    engine.add(make_request("same", 100, **{field: "other"}))
    usage = run(engine)["same"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0


def test_an_exclusive_sequence_is_alone_and_alternates() -> None:
    engine, runner = make_engine()
    engine.add(make_request("batched", 20, max_tokens=12))
    engine.add(make_request("one", 20, max_tokens=6, exclusive=True))
    engine.add(make_request("two", 20, max_tokens=6, exclusive=True))
    outputs = run(engine)
    names = {make_request(n, 1).sampling.seed: n for n in ("batched", "one", "two")}
    steps = [[names[s.seed] for s in plan.sequences] for plan in runner.plans]
    assert all(len(step) == 1 for step in steps)
    flat = [step[0] for step in steps]
    assert flat.index("two") > max(i for i, n in enumerate(flat) if n == "one")
    both_run = flat[: flat.index("two")]
    assert all(a != b for a, b in itertools.pairwise(both_run)), "turn by turn"
    usage = outputs["two"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0


def test_a_failed_sequence_ends_alone() -> None:
    runner = EchoRunner(LIMITS, poisoned_seeds=frozenset([make_request("bad", 1).sampling.seed]))
    engine = Engine(runner, LetterDetokenizer(), CacheConfig(), SchedulerConfig(), "artifact")
    engine.add(make_request("bad", 30, n=2))
    engine.add(make_request("good", 30))
    outputs = run(engine)
    bad = outputs["bad"][-1]
    assert [(d.index, d.finish_reason, d.error) for d in bad.deltas] == [
        (0, FinishReason.ERROR, "poisoned"),
        (1, FinishReason.ERROR, "poisoned"),
    ]
    assert outputs["good"][-1].deltas[0].finish_reason is FinishReason.LENGTH
    assert engine.stats().num_failed == 1


def test_abort_frees_every_block_at_once() -> None:
    engine, _ = make_engine()
    engine.add(make_request("gone", 1000, max_tokens=100, n=3))
    for _ in range(5):
        engine.step()
    assert engine.stats().num_free_blocks < LIMITS.num_blocks
    engine.abort("gone")
    engine.abort("gone")
    assert engine.stats().num_free_blocks == LIMITS.num_blocks


def test_prompt_logprobs_cover_every_prompt_token() -> None:
    engine, _ = make_engine(max_num_batched_tokens=32)
    request = make_request("scored", 100, output_kind=OutputKind.PROMPT_LOGPROBS)
    engine.add(request)
    first = run(engine)["scored"][0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    scored = [entry.token_id for entry in first.prompt_logprobs[1:] if entry is not None]
    assert tuple(scored) == request.prompt_token_ids[1:]


def test_a_pooled_request_gives_one_vector_and_no_token() -> None:
    engine, _ = make_engine(max_num_batched_tokens=32)
    engine.add(make_request("pooled", 100, output_kind=OutputKind.POOLED))
    (output,) = run(engine)["pooled"]
    assert output.pooled is not None
    assert output.usage is not None
    assert output.usage.completion_tokens == 0


def test_a_mean_is_the_same_however_the_prompt_is_cut() -> None:
    means = []
    for budget in (33, 64, 200):
        engine, _ = make_engine(max_num_batched_tokens=budget)
        kind = {"output_kind": OutputKind.POOLED, "pooling": Pooling.MEAN}
        engine.add(make_request("pooled", 100, **kind))
        (output,) = run(engine)["pooled"]
        assert output.pooled is not None
        means.append(output.pooled[0])
    assert means == pytest.approx([means[0]] * 3)
    assert 0 < means[0] < 1000


def test_a_passed_deadline_ends_the_request() -> None:
    now = [100.0]
    engine = Engine(
        EchoRunner(LIMITS),
        LetterDetokenizer(),
        CacheConfig(),
        SchedulerConfig(),
        "artifact",
        lambda: now[0],
    )
    engine.add(make_request("late", 20, max_tokens=100, deadline=105.0))
    engine.step()
    now[0] = 106.0
    (output,) = engine.step()
    assert output.deltas[0].finish_reason is FinishReason.ERROR
    assert output.deltas[0].error == "the deadline passed"
    assert not engine.has_work


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request("r", 0), "prompt"),
        (make_request("r", 8192), "prompt"),
        (make_request("r", 8000, max_tokens=193), "max_tokens"),
        (make_request("r", 4, n=0), "n"),
        (make_request("r", 4, n=2, exclusive=True), "n"),
        (make_request("r", 4, grammar="root ::= x"), "grammar"),
        (make_request("r", 4, artifact_id="another"), "artifact_id"),
        (make_request("r", 4, output_token_ids=(VOCAB,)), "output_token_ids"),
        (make_request("r", 4, sampling=SamplingParams(temperature=float("nan"))), "temperature"),
        (make_request("r", 4, sampling=SamplingParams(top_k=-1)), "top_k"),
        (make_request("r", 4, sampling=SamplingParams(logit_bias={VOCAB: 1.0})), "logit_bias"),
        (make_request("r", 4, sampling=SamplingParams(stop=("",))), "stop"),
    ],
)
def test_what_can_never_be_served_is_refused_by_field(
    request_: GenerateRequest, param: str
) -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidRequest) as caught:
        engine.add(request_)
    assert caught.value.param == param
    assert not engine.has_work


def test_blocks_are_freed_behind_the_fence_of_the_step_in_flight() -> None:
    limits = RuntimeLimits(8, 16, 128, VOCAB, (EOS,), step_depth=1)
    engine, runner = make_engine(limits, CacheConfig(enable_prefix_caching=False))
    engine.add(make_request("gone", 40, max_tokens=20))
    engine.add(make_request("stays", 10, max_tokens=20))
    engine.step()
    engine.step()
    assert len(runner.queue) == 1, "one step is in flight"
    before = engine.stats().num_free_blocks
    engine.abort("gone")
    assert engine.stats().num_free_blocks == before, "the step in flight still writes there"
    engine.step()
    assert engine.stats().num_free_blocks == before + 3
