"""Tools for templates that know of none: described in the system message, in Hermes's words.

Calls and their results become plain messages in the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def with_tools_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The same conversation in plain system, user and assistant messages."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            _add_result(plain, message["content"])
        else:
            plain.append(_plain(message))
    if tools:
        lines = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        described = f"{_BEFORE}{lines}{_AFTER}"
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{described}"
        else:
            plain.insert(0, {"role": "system", "content": described})
    return plain


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    if calls:
        rest["content"] = "\n".join([rest["content"], *calls] if rest["content"] else calls)
    return rest


def _add_result(plain: list[dict[str, Any]], content: str) -> None:
    """Results of one turn share a user message, as the templates that know them have it."""
    response = f"<tool_response>\n{content}\n</tool_response>"
    last = plain[-1] if plain else None
    if last is not None and last["role"] == "user" and last.get("content", "").endswith(_RESULT):
        last["content"] += f"\n{response}"
    else:
        plain.append({"role": "user", "content": response})


_RESULT = "</tool_response>"
