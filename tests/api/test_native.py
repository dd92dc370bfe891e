"""/v1/generate to the byte, and text through its framing as an independent reader sees it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import Api
from tests.fakes import Script
from torchweave_ray.api.sse import data_event
from torchweave_ray.errors import Overloaded, Unavailable
from torchweave_ray.outputs import FinishReason

TIMINGS = {
    "queue_s": 0.001,
    "prefill_s": 0.001,
    "ttft_s": 0.002,
    "decode_s": 0.001,
    "total_s": 0.003,
}


def read_events(raw: bytes) -> list[tuple[str, str]]:
    """(event, data) by the WHATWG's rules, character by character; nothing of ours in it."""
    text = raw.decode("utf-8-sig")
    lines, line, skip_feed = [], "", False
    for char in text:
        if skip_feed and char == "\n":
            skip_feed = False
            continue
        skip_feed = char == "\r"
        if char in "\r\n":
            lines.append(line)
            line = ""
        else:
            line += char
    found, event, data = [], "", ""
    for line in lines:
        if not line:
            if data:
                found.append((event or "message", data[:-1]))
            event, data = "", ""
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if name == "event":
                event = value
            elif name == "data":
                data += value + "\n"
    return found


def text_of(events: list[tuple[str, str]]) -> str:
    parts = [json.loads(data)["text"] if event == "json" else data for event, data in events]
    return "".join(p for p, (e, _) in zip(parts, events, strict=True) if e in ("message", "json"))


def test_the_stream_to_the_byte(api: Api) -> None:
    api.backend.script = Script(pieces=[" One", "\ntwo\n", "a\rb"], stop_reason="\n\n")
    response = api.post("/v1/generate", {"prompt": "hi"})
    first, *blocks = response.content.split(b"\n\n")
    assert first.startswith(b"event: ttft\ndata: ")
    assert float(first.rpartition(b" ")[2]) > 0
    assert blocks[:3] == [
        b"data:  One",
        b"data: \ndata: two\ndata: ",
        b'event: json\ndata: {"text":"a\\rb"}',
    ]
    assert blocks[3].startswith(b"event: done\ndata: ")
    assert json.loads(blocks[3].partition(b"data: ")[2]) == {
        "finish_reason": "stop",
        "stop_reason": "\n\n",
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 11,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "timings": TIMINGS,
    }
    assert blocks[4:] == [b""]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


NASTY = [
    "\n",
    "\n\n",
    " ",
    "  x",
    "\r",
    "\r\n",
    "a\r",
    ":x",
    "data: x",
    "event: done",
    "\u2028",
    "\x85",
    "\x00",
    "👩‍👩‍👧",
    "\ufeff",
    "[DONE]",
    "你好",
    "\t\\n",
]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.sampled_from(NASTY) | st.text(min_size=1, max_size=8), max_size=8))
def test_any_text_survives_the_framing(pieces: list[str]) -> None:
    raw = "".join(map(data_event, pieces)).encode()
    assert text_of(read_events(raw)) == "".join(pieces)
    # Clients that split with str.splitlines see the same lines.
    assert raw.decode().splitlines() == raw.decode().split("\n")[:-1]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(st.sampled_from(NASTY), min_size=1, max_size=8))
def test_any_text_survives_the_endpoint(api: Api, pieces: list[str]) -> None:
    api.backend.script = Script(pieces=pieces)
    events = read_events(api.post("/v1/generate", {"prompt": "hi"}).content)
    assert text_of(events) == "".join(pieces)
    assert [events[0][0], events[-1][0]] == ["ttft", "done"]
    api.backend.script = Script(pieces=pieces)
    assert api.post("/v1/generate_nobatch", {"prompt": "hi"}).json()["text"] == "".join(pieces)


def test_nobatch_is_exclusive_and_generate_is_not(api: Api) -> None:
    answer = api.post("/v1/generate_nobatch", {"prompt": "hi"})
    assert answer.json()["text"] == "Gravity pulls."
    assert answer.json()["usage"]["completion_tokens"] == 9
    assert api.backend.requests[-1].exclusive
    assert not api.sent("/v1/generate", {"prompt": "hi"}).exclusive


def test_token_ids_are_a_prompt_too(api: Api) -> None:
    assert api.sent("/v1/generate", {"prompt": [5, 6]}).prompt_token_ids == (5, 6)


def test_a_refusal_is_a_status_and_a_later_failure_an_event(api: Api) -> None:
    api.backend.script = Script(refusal=Overloaded("full", None, "queue_full", 2.5))
    response = api.post("/v1/generate", {"prompt": "hi"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["code"] == "queue_full"

    api.backend.script = Script(pieces=["a"], failure=Unavailable("the replica was lost"))
    response = api.post("/v1/generate", {"prompt": "hi"})
    events = read_events(response.content)
    assert response.status_code == 200
    assert [event for event, _ in events] == ["ttft", "message", "error"]
    assert json.loads(events[-1][1])["error"] == {
        "message": "the replica was lost",
        "type": "service_unavailable_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/generate_nobatch"])
def test_a_failed_sequence(api: Api, path: str) -> None:
    api.backend.script = Script(pieces=["a"], error="no block left")
    response = api.post(path, {"prompt": "hi"})
    if path == "/v1/generate":
        event, data = read_events(response.content)[-1]
        assert event == "error"
    else:
        assert response.status_code == 500
        data = response.text
    assert json.loads(data)["error"]["message"] == "no block left"


def test_an_unexpected_failure_tells_nothing_of_the_inside(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.backend.script = Script(pieces=["a"], failure=ZeroDivisionError("secret detail"))
    streamed = api.post("/v1/generate", {"prompt": "hi"})
    whole = api.post("/v1/generate_nobatch", {"prompt": "hi"})
    assert (streamed.status_code, whole.status_code) == (200, 500)
    for response in (streamed, whole):
        assert "internal server error" in response.text
        assert "secret" not in response.text
        assert "Traceback" not in response.text
    assert caplog.text.count("secret detail") == 2


def test_one_line_in_the_log(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    api.backend.script = Script(finish_reason=FinishReason.LENGTH)
    api.post("/v1/generate", {"prompt": "hi"}, headers={"x-request-id": "find-me"})
    (line,) = [r.getMessage() for r in caplog.records if "[Request]" in r.getMessage()]
    assert "id=find-me model=tiny" in line
    assert "tokens=9" in line
    assert "finish=length" in line
