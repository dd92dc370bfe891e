"""/v1/embeddings through the official client, whose default is base64."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.api.conftest import TOKENIZER, Api, Server
from tests.api.test_openai import connect
from torchweave_ray.outputs import OutputKind, Pooling

PATH = "/v1/embeddings"


def test_the_official_client(server: Server) -> None:
    client = connect(server)
    answer = client.embeddings.create(model="tiny", input=["a star", "b"])
    assert [item.index for item in answer.data] == [0, 1]
    for item in answer.data:
        assert item.embedding == pytest.approx([0.6, 0.8, 0.0])
    num = sum(len(TOKENIZER.encode(text)) for text in ("a star", "b"))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == num
    plain = client.embeddings.create(model="tiny", input=[5, 6], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx([0.6, 0.8, 0.0])
    assert server.backend.requests[-1].prompt_token_ids == (5, 6)
    with pytest.raises(openai.BadRequestError, match="hidden size"):
        client.embeddings.create(model="tiny", input="a", dimensions=2)


def test_pooling_and_length(api: Api) -> None:
    body = {"input": "a", "pooling": "mean", "normalize": False}
    assert api.post(PATH, body).json()["data"][0]["embedding"] == [3.0, 4.0, 1.0]
    (request,) = api.backend.requests
    assert (request.output_kind, request.pooling) == (OutputKind.POOLED, Pooling.MEAN)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": 5}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_bad_input(api: Api, body: Any, param: str) -> None:
    response = api.post(PATH, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
