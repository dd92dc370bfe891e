"""What requests can ask for beside text: the prompt's scores, token ids, usage as it grows."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.api.conftest import TOKENIZER, Api, Server
from tests.api.test_openai import MESSAGES, chunks_of, connect
from tests.fakes import Script
from torchweave_ray.errors import Unavailable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "a star"
PROMPT_IDS = TOKENIZER.encode(PROMPT)
ANSWER_IDS = [i for piece in ("Gravity", " pulls", ".") for i in TOKENIZER.encode(piece)]


def test_echo_with_logprobs_scores_the_prompt(server: Server) -> None:
    answer = connect(server).completions.create(
        model="tiny", prompt=PROMPT, echo=True, logprobs=1, n=2
    )
    for choice in answer.choices:
        assert choice.text == f"{PROMPT}Gravity pulls."
        shown = choice.logprobs
        assert shown is not None
        assert shown.tokens is not None
        assert "".join(shown.tokens) == choice.text
        num = len(PROMPT_IDS)
        assert shown.token_logprobs == [None, *[-2.0] * (num - 1), *[-0.25] * len(ANSWER_IDS)]
        starts = [len("".join(shown.tokens[:i])) for i in range(len(shown.tokens))]
        assert shown.text_offset == starts
        assert shown.top_logprobs is not None
        assert shown.top_logprobs[0] is None
        assert shown.top_logprobs[1]["!"] == -1.5


@pytest.mark.parametrize("logprobs", [None, 1])
def test_streamed_pieces_join_to_the_whole(api: Api, logprobs: int | None) -> None:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "echo": True,
        "logprobs": logprobs,
        "return_token_ids": True,
        "n": 2,
        "seed": 1,
    }
    whole = api.post(COMPLETIONS, body).json()["choices"]
    chunks = chunks_of(api.post(COMPLETIONS, body | {"stream": True}).text)
    for index, expected in enumerate(whole):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == expected["text"]
        assert own[0]["prompt_token_ids"] == expected["prompt_token_ids"] == PROMPT_IDS
        ids = [i for c in own for i in c.get("token_ids", ())]
        assert ids == expected["token_ids"] == ANSWER_IDS
        if logprobs is not None:
            for name, values in expected["logprobs"].items():
                assert [v for c in own if c["logprobs"] for v in c["logprobs"][name]] == values


def test_a_prompt_is_scored_without_an_answer(api: Api) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = api.post(COMPLETIONS, body).json()
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None] + [-2.0] * (len(PROMPT_IDS) - 1)
    assert answer["usage"]["completion_tokens"] == 0
    assert api.backend.requests[-1].sampling.max_tokens == 1
    chunks = chunks_of(api.post(COMPLETIONS, body | {"stream": True}).text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == PROMPT


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs_by_position(api: Api, path: str) -> None:
    body = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    answer = api.post(path, body | {"prompt_logprobs": 2}).json()
    scores = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
    ids = api.backend.requests[-1].prompt_token_ids
    assert scores[0] is None
    assert len(scores) == len(ids)
    for token_id, entry in zip(ids[1:], scores[1:], strict=True):
        shown = entry[str(token_id)]
        assert (shown["logprob"], shown["rank"]) == (-2.0, 9)
        assert {"3", "4"} <= entry.keys()
        assert entry["4"] == {"logprob": -2.5, "rank": 2, "decoded_token": '"'}


def test_the_likeliest_of_several_is_the_answer(api: Api) -> None:
    from torchweave_ray.api.generation import Choice
    from torchweave_ray.api.openai.text_shapes import likeliest
    from torchweave_ray.outputs import ChoiceDelta, TokenLogprobs

    choices = []
    for index, scores in enumerate(([-1.0, -1.0], [-0.5], [-3.0], [-0.5, -0.5])):
        choice = Choice()
        entries = tuple(TokenLogprobs(5, score, 1) for score in scores)
        choice.add(ChoiceDelta(index, 0, (5,) * len(scores), str(index), entries))
        choices.append(choice)
    assert [choice.text for choice in likeliest(choices, 3)] == ["1", "3", "0"]
    answer = api.post(COMPLETIONS, {"prompt": ["a", "b"], "best_of": 3, "n": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 3 * len(ANSWER_IDS)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_grows_with_every_chunk(api: Api, path: str) -> None:
    body: dict[str, Any] = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = api.post(path, body | {"stream": True, "stream_options": options})
    *chunks, last = chunks_of(response.text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == len(ANSWER_IDS)
    prompt = {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]}
    assert prompt == {len(api.backend.requests[-1].prompt_token_ids)}
    text = "".join(
        c["choices"][0].get("text", "") or c["choices"][0].get("delta", {}).get("content", "")
        for c in chunks
    )
    assert text == "Gravity pulls."


def test_chat_token_ids(server: Server) -> None:
    extra = {"return_token_ids": True}
    client = connect(server).chat.completions
    whole = client.create(model="tiny", messages=MESSAGES, extra_body=extra).model_dump()
    (request,) = server.backend.requests
    assert whole["prompt_token_ids"] == list(request.prompt_token_ids)
    assert whole["choices"][0]["token_ids"] == ANSWER_IDS
    stream = client.create(model="tiny", messages=MESSAGES, stream=True, extra_body=extra)
    chunks = [chunk.model_dump() for chunk in stream]
    assert chunks[0]["prompt_token_ids"] == list(request.prompt_token_ids)
    ids = [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids", ())]
    assert ids == ANSWER_IDS


def test_an_interval_holds_back_no_end_and_no_failure(api: Api) -> None:
    body = {"prompt": "a", "stream": True, "stream_interval": 1024}
    pieces = ["a", "b", "c"]
    api.backend.script = Script(pieces=pieces)
    chunks = chunks_of(api.post(COMPLETIONS, body).text)
    assert [c["choices"][0]["text"] for c in chunks] == ["a", "bc", ""]
    api.backend.script = Script(pieces=pieces, failure=Unavailable("lost"))
    chunks = chunks_of(api.post(COMPLETIONS, body).text)
    assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["a", "bc"]
    assert chunks[-1]["error"]["message"] == "lost"


def test_a_suffix_is_refused_with_the_reason(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="fill in the middle") as caught:
        connect(server).completions.create(model="tiny", prompt="a", suffix="b")
    assert caught.value.code == "unsupported_parameter"
