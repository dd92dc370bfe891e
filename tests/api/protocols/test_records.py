"""The records of streams: how long they are kept, and how many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchweave_ray.api.streams.records import StreamRecords
from torchweave_ray.outputs import GenerateRequest
from torchweave_ray.sampling_params import SamplingParams
from torchweave_ray.stream_origin import StreamOrigin


def test_records_expire_and_are_bounded() -> None:
    now = 0.0
    records = StreamRecords(max_records=3, max_bytes=100_000, clock=lambda: now)

    def request(call_id: str, body: bytes = b"", **more: Any) -> GenerateRequest:
        origin = StreamOrigin(call_id, "/v1/generate", body, 0, 10.0, 0, 1, call_id, 2, 7)
        params = SamplingParams(seed=7)
        return GenerateRequest(call_id, "m", (1,), params, n=2, origin=origin, **more)

    with records.keep(request("a")):
        now = 100.0
        assert [each.request_id for each in records.recall("a")] == ["a"]
    now = 109.0
    assert records.recall("a")
    now = 110.0
    assert not records.recall("a")

    choice = request("b", output_token_ids=(5, 6), emitted_chars=3)
    choice = replace(choice, request_id="b.1.1", n=1, sampling=SamplingParams(seed=8))
    with records.keep(choice), records.keep(choice):
        pass
    assert records.recall("b") == [request("b")]  # as it was first asked

    with records.keep(request("c")), records.keep(request("d")):
        with records.keep(request("e")):
            assert not records.recall("b")  # one that has ended goes first
        with records.keep(request("f", body=b"x" * 99_000)):
            assert not records.recall("c")
        assert not records.recall("e")
