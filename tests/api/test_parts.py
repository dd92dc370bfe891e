"""Parts of an answer: every way to cut its text gives the same reasoning, text and calls."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweave_ray.api.chat.answer import AnswerParser
from torchweave_ray.api.chat.call_parser import CallFormat, CallParser
from torchweave_ray.api.chat.formats import BARE, HERMES, LLAMA3, MISTRAL
from torchweave_ray.api.chat.parts import CallArguments, CallStart, Part, Reasoning, Text, join
from torchweave_ray.api.chat.reasoning import ReasoningSplitter

NAMES = frozenset({"get_weather", "add"})
FORMS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL, BARE)}
WEATHER = '{"name": "get_weather", "arguments": {"city": "Oslo \\"}{", "days": [1, {"a": 2}]}}'
OSLO = '{"city": "Oslo \\"}{", "days": [1, {"a": 2}]}'
ADD = '{"arguments":{"a":1},"name":"add"}'

Shown = list[tuple[str, ...]]


def show(parts: list[Part]) -> Shown:
    shown: Shown = []
    for part in join(parts):
        match part:
            case Text(text):
                shown.append(("text", text))
            case Reasoning(text):
                shown.append(("reasoning", text))
            case CallStart(_, _, name):
                shown.append(("call", name))
            case CallArguments(_, text):
                shown.append(("arguments", text))
    return shown


def read(
    pieces: list[str], form: CallFormat | None, thinks: bool | None, most: int | None = None
) -> Shown:
    """`thinks`: whether the prompt ends within the reasoning; None: there is none."""
    parser = AnswerParser(
        None if thinks is None else ReasoningSplitter(thinks),
        None if form is None else CallParser(form, NAMES, "answer", most),
    )
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return show([*parts, *parser.finish()])


CASES: list[tuple[str, str, Shown]] = [
    ("hermes", "Just text.\n", [("text", "Just text.\n")]),
    ("hermes", "a < b <tool> <tool_cal", [("text", "a < b <tool> <tool_cal")]),
    (
        "hermes",
        f"Let me look.\n<tool_call>\n{WEATHER}\n</tool_call>",
        [("text", "Let me look."), ("call", "get_weather"), ("arguments", OSLO)],
    ),
    (
        "hermes",
        f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>\nDone. ",
        [
            ("call", "get_weather"),
            ("arguments", OSLO),
            ("call", "add"),
            ("arguments", '{"a":1}'),
            ("text", "Done. "),
        ],
    ),
    (
        "hermes",
        f"<tool_call>[{WEATHER}, {ADD}]</tool_call>",
        [("call", "get_weather"), ("arguments", OSLO), ("call", "add"), ("arguments", '{"a":1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call> ok',
        [("text", '<tool_call>{"name": "rm", "arguments": {}}</tool_call> ok')],
    ),
    ("hermes", "<tool_call>oops</tool_call>!", [("text", "<tool_call>oops</tool_call>!")]),
    ("hermes", "<tool_call></tool_call>!", [("text", "<tool_call></tool_call>!")]),
    ("hermes", '<tool_call>{"name": "ad', [("text", '<tool_call>{"name": "ad')]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1',
        [("call", "add"), ("arguments", '{"a": 1')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [("call", "add"), ("arguments", '{"a": 1}')],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', [("call", "add"), ("arguments", "{}")]),
    (
        "llama3",
        '{"name": "add", "parameters": {"a": 1}}',
        [("call", "add"), ("arguments", '{"a": 1}')],
    ),
    (
        "llama3",
        '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "add", "parameters": {"b": 2}}',
        [("call", "add"), ("arguments", "{}"), ("call", "add"), ("arguments", '{"b": 2}')],
    ),
    ("llama3", '{"a": 1} is JSON', [("text", '{"a": 1} is JSON')]),
    ("llama3", "[1] Hello", [("text", "[1] Hello")]),
    ("llama3", f"Hello {ADD}", [("text", f"Hello {ADD}")]),
    ("llama3", "{never closed", [("text", "{never closed")]),
    (
        "mistral",
        f"[TOOL_CALLS] [{WEATHER}, {ADD}]",
        [("call", "get_weather"), ("arguments", OSLO), ("call", "add"), ("arguments", '{"a":1}')],
    ),
    (
        "mistral",
        '[TOOL_CALLS]add[ARGS]{"a": {"b": 1}}[TOOL_CALLS]get_weather{"city": "Rome"}',
        [
            ("call", "add"),
            ("arguments", '{"a": {"b": 1}}'),
            ("call", "get_weather"),
            ("arguments", '{"city": "Rome"}'),
        ],
    ),
    (
        "bare",
        f"[{WEATHER},\n{ADD}]",
        [("call", "get_weather"), ("arguments", OSLO), ("call", "add"), ("arguments", '{"a":1}')],
    ),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_calls_however_the_text_is_cut(form: str, text: str, expected: Shown) -> None:
    assert read([text], FORMS[form], None) == expected
    assert read(list(text), FORMS[form], None) == expected
    for size in (2, 3, 7, 13):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(pieces, FORMS[form], None) == expected


@pytest.mark.parametrize(
    ("thinks", "text", "expected"),
    [
        (
            False,
            "<think>\nhm\n\nso\n</think>\n\nYes.",
            [("reasoning", "hm\n\nso"), ("text", "Yes.")],
        ),
        (True, "hm</think>Yes.\n", [("reasoning", "hm"), ("text", "Yes.\n")]),
        (True, "\nhm </thin", [("reasoning", "hm </thin")]),
        (False, "<thi", [("text", "<thi")]),
        (False, "  No thought.", [("text", "  No thought.")]),
        (False, "<think>\n\n</think>\n\nYes", [("text", "Yes")]),
        (False, "a </think> b", [("text", "a </think> b")]),
        (
            False,
            f"<think><tool_call>{ADD}</tool_call></think><tool_call>{ADD}</tool_call>",
            [
                ("reasoning", f"<tool_call>{ADD}</tool_call>"),
                ("call", "add"),
                ("arguments", '{"a":1}'),
            ],
        ),
    ],
)
def test_reasoning_however_the_text_is_cut(thinks: bool, text: str, expected: Shown) -> None:
    for size in (1, 2, 3, 5, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(pieces, HERMES, thinks) == expected


def test_calls_beyond_the_allowed_ones_are_dropped() -> None:
    text = f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>"
    assert read([text], HERMES, None, 1) == [("call", "add"), ("arguments", '{"a":1}')]


def test_ids_are_as_the_templates_want_them() -> None:
    assert re.fullmatch("[A-Za-z0-9]{9}", MISTRAL.call_id("answer:0"))
    assert len({HERMES.call_id(f"answer:{i}") for i in range(100)}) == 100


PIECES = st.sampled_from(
    [
        *'<> \n{}"a[],:\\',
        "<tool_call>",
        "</tool_call>",
        "think>",
        "</think>",
        "<think>",
        WEATHER,
        ADD,
        "[TOOL_CALLS]",
        "name",
        "add",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=12),
    form=st.sampled_from([*FORMS.values(), None]),
    thinks=st.sampled_from([True, False, None]),
)
def test_cutting_changes_nothing_and_arguments_are_json(
    pieces: list[str], form: CallFormat | None, thinks: bool | None
) -> None:
    text = "".join(pieces)
    whole = read([text], form, thinks)
    assert read(list(text), form, thinks) == whole
    assert read(pieces, form, thinks) == whole
    if form is None and thinks is None:
        assert "".join(value for _, value in whole) == text
    for part in whole[:-1]:  # the last may be cut off
        if part[0] == "arguments":
            assert isinstance(json.loads(part[1]), dict)
