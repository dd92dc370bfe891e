"""Which format of calls, and whether reasoning, a model's chat template stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchweave_ray.api.chat.call_parser import CallFormat

HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = CallFormat("llama3", optional_opener="<|python_tag|>")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", has_short_ids=True, names_come_first=True)
BARE = CallFormat("bare")
"""Objects without markers: what a grammar makes of an answer that must be calls."""

_MARKS: Mapping[str, CallFormat] = {
    "[TOOL_CALLS]": MISTRAL,
    "<tool_call>": HERMES,
    "<|python_tag|>": LLAMA3,
    "ipython": LLAMA3,
}
_TOOLS = re.compile(r"\btools\b")


def call_format(template: str) -> CallFormat:
    """Hermes's where the template has none: it is the one that we describe in words."""
    return next((form for mark, form in _MARKS.items() if mark in template), HERMES)


def renders_tools(template: str) -> bool:
    return _TOOLS.search(template) is not None


def marks_reasoning(template: str) -> bool:
    return "</think>" in template
