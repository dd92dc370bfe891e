"""The OpenAI endpoints: through the official client over a socket, and to the byte."""

from __future__ import annotations

import http.client
import json
from typing import Any

import openai
import pytest

from tests.api.conftest import Api, Server
from tests.fakes import Script
from torchweave_ray.errors import Overloaded, Unavailable
from torchweave_ray.outputs import FinishReason

MESSAGES: Any = [{"role": "user", "content": "What is gravity?"}]
CHAT = {"messages": MESSAGES, "stream": True}


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; the stream must end with [DONE]."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_chat(server: Server) -> None:
    answer = connect(server).chat.completions.create(model="tiny", messages=MESSAGES, seed=1)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Gravity pulls."
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.system_fingerprint == "fp_numerics-1"


def test_the_answer_can_be_sent_back(server: Server) -> None:
    client = connect(server)
    first = client.chat.completions.create(model="tiny", messages=MESSAGES)
    again: Any = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model="tiny", messages=again).choices


def test_chat_streamed(server: Server) -> None:
    stream = connect(server).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        stream=True,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    texts, roles, finish, bytes_ = ["", ""], [], [], b""
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] * (choice.delta.role is not None)
            finish += [choice.finish_reason] * (choice.finish_reason is not None)
            if choice.logprobs is not None and choice.index == 0:
                for token in choice.logprobs.content or ():
                    bytes_ += bytes(token.bytes or ())
                    assert token.logprob == -0.25
                    assert [top.logprob for top in token.top_logprobs] == [-0.5, -1.5]
    assert texts == ["Gravity pulls."] * 2
    assert roles == ["assistant"] * 2
    assert finish == ["stop"] * 2
    assert bytes_ == b"Gravity pulls."
    assert usage is not None
    assert usage.completion_tokens == 18


def test_completions(server: Server) -> None:
    client = connect(server)
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, logprobs=1, max_tokens=5, stop=["x"], user="me"
    )
    assert [choice.text for choice in answer.choices] == ["Gravity pulls."] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == "Gravity pulls."
    assert logprobs.text_offset == [0, 1, 3, 6, 7, 9, 10, 12, 13]
    assert logprobs.token_logprobs == [-0.25] * 9
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"G": -0.25, "!": -0.5}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    streamed = client.completions.create(model="tiny", prompt=[5, 6], logprobs=0, stream=True)
    pieces = [choice for chunk in streamed for choice in chunk.choices]
    assert "".join(choice.text for choice in pieces) == "Gravity pulls."
    offsets = [o for c in pieces if c.logprobs for o in c.logprobs.text_offset or ()]
    assert offsets == logprobs.text_offset
    assert pieces[-1].finish_reason == "stop"


def test_models(server: Server) -> None:
    client = connect(server)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "torchweave"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own_types(server: Server) -> None:
    client = connect(server)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="x")
    server.backend.script = Script(refusal=Overloaded("full", None, None, 2.0))
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert full.value.response.headers["retry-after"] == "2"
    server.backend.script = Script(pieces=["a"], failure=Unavailable("the replica was lost"))
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the replica was lost"):
        list(stream)


def test_closing_the_stream_aborts_the_request(server: Server) -> None:
    server.backend.script = Script(pieces=["x"] * 2_000_000)
    stream = connect(server).completions.create(model="tiny", prompt="a", stream=True)
    assert next(iter(stream)).choices[0].text == "x"
    stream.close()
    for _ in range(500):
        if server.backend.aborted:
            return
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/livez")
        assert connection.getresponse().status == 200
        connection.close()
    raise AssertionError("the request was not aborted")


def test_chat_chunks_to_the_byte(api: Api) -> None:
    api.backend.script = Script(pieces=['say "hi"\n', "日", "\u2028"], stop_reason=2)
    body = CHAT | {"stream_options": {"include_usage": True}}
    response = api.post("/v1/chat/completions", body)
    events = response.text.split("\n\n")
    head = chunks_of(response.text)[0]
    start = (
        f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk","created":{head["created"]},'
        '"model":"tiny","system_fingerprint":"fp_numerics-1","choices":[{"index":0,'
    )
    end = '}],"usage":null}'
    plain = '"logprobs":null,"finish_reason":null'
    assert events[0] == f'{start}"delta":{{"role":"assistant","content":""}},{plain}{end}'
    assert events[1] == f'{start}"delta":{{"content":"say \\"hi\\"\\n"}},{plain}{end}'
    assert events[2] == f'{start}"delta":{{"content":"日"}},{plain}{end}'
    assert events[3] == f'{start}"delta":{{"content":"\\u2028"}},{plain}{end}'
    assert events[4] == (
        f'{start}"delta":{{}},"logprobs":null,"finish_reason":"stop","stop_reason":2{end}'
    )
    last = json.loads(events[5].removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == (
        last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    )
    seconds = last["timings"]
    assert seconds == {
        "queue_s": 0.001,
        "prefill_s": 0.001,
        "ttft_s": 0.002,
        "decode_s": 0.001,
        "total_s": 0.003,
    }
    assert events[6:] == ["data: [DONE]", ""]


def test_without_include_usage_no_chunk_has_it(api: Api) -> None:
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "a", "stream": True}),
    ):
        chunks = chunks_of(api.post(path, body).text)
        assert not any("usage" in chunk for chunk in chunks)
        assert all(len(chunk["choices"]) == 1 for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_a_held_back_piece_makes_no_chunk_unless_it_has_logprobs(api: Api) -> None:
    api.backend.script = Script(pieces=["", "a", ""], finish_reason=FinishReason.LENGTH)
    body = {"prompt": "x", "stream": True}
    choices = [c["choices"][0] for c in chunks_of(api.post("/v1/completions", body).text)]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [("a", None), ("", "length")]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_failed_sequence_ends_its_choice_and_then_the_stream(api: Api, path: str) -> None:
    api.backend.script = Script(pieces=["a"], error="no block left")
    body: dict[str, Any] = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
    response = api.post(path, body | {"n": 2, "stream": True})
    chunks = chunks_of(response.text)
    ends = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["finish_reason"]]
    assert [(c["index"], c["finish_reason"]) for c in ends] == [(0, "error"), (1, "stop")]
    assert chunks[-1]["error"]["message"] == "no block left"
    whole = api.post(path, body)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "generation_failed"


def test_a_part_of_a_character_shows_its_bytes_in_logprobs(api: Api) -> None:
    api.backend.script = Script(pieces=["日"])
    shown = api.post("/v1/completions", {"prompt": "x", "logprobs": 0}).json()
    assert shown["choices"][0]["logprobs"]["tokens"] == [
        "bytes:\\xe6",
        "bytes:\\x97",
        "bytes:\\xa5",
    ]
    chat = {"messages": MESSAGES, "logprobs": True}
    content = api.post("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert bytes(b for token in content for b in token["bytes"]).decode() == "日"
