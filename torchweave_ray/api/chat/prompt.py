"""A conversation to the prompt that the model's template makes, and how to read the answer.

Protocols bring their messages in the form that templates read (docs/api.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchweave_ray.api.chat.answer import AnswerParser
from torchweave_ray.api.chat.call_parser import CallFormat, CallParser
from torchweave_ray.api.chat.formats import (
    BARE,
    HERMES,
    call_format,
    marks_reasoning,
    renders_tools,
)
from torchweave_ray.api.chat.reasoning import (
    CLOSER,
    OPENER,
    ReasoningSplitter,
    thinking_budget,
)
from torchweave_ray.api.chat.tools_in_words import with_tools_in_words
from torchweave_ray.api.grammar import tool_grammar
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.sampling_params import ThinkingBudget
from torchweave_ray.tokenizer import RESERVED_TEMPLATE_VARIABLES, Tokenizer
from torchweave_ray.tokenizer.grammar import GrammarSpec


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: Sequence[Mapping[str, Any]]
    """role, content (text), and tool_calls, tool_call_id, reasoning_content where there are."""
    tools: Sequence[Mapping[str, Any]] = ()
    """`{"type": "function", "function": {name, description, parameters}}`"""
    must_call: bool = False
    """The answer is a call of one of the tools, or several."""
    parallel_calls: bool = True
    is_strict: bool = False
    """Calls that the model chooses to make are as their functions want them."""
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template."""
    is_constrained: bool = False
    """The answer follows a grammar of the client's: there is no reasoning before it."""
    reasoning_effort: str | None = None
    shows_reasoning: bool = True
    thinking_token_budget: int | None = None
    """For templates that mark reasoning: how long it may be."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    text: str
    new_parser: Callable[[str], AnswerParser] | None
    """For each choice one, of a name of the choice; None: an answer is nothing but text."""
    keeps_special_tokens: bool
    """Markers that the parser looks for are special tokens."""
    grammar: GrammarSpec | None = None
    """What the answer has to be for its calls to be as their functions want them."""
    thinking: ThinkingBudget | None = None


def render(tokenizer: Tokenizer, conversation: Conversation) -> ChatPrompt:
    """Raises InvalidRequest naming what the template cannot take."""
    template = tokenizer.chat_template or ""
    budget = conversation.thinking_token_budget
    if budget is not None and not marks_reasoning(template):
        raise InvalidRequest(
            "thinking_token_budget: this model's template marks no reasoning",
            "thinking_token_budget",
            "unsupported_parameter",
        )
    text = _text(tokenizer, template, conversation)
    names = frozenset(tool["function"]["name"] for tool in conversation.tools)
    form = call_format(template) if names else None
    must_call = conversation.must_call
    if must_call and not _can_be_enforced(form, tokenizer):
        form = BARE
    is_free = not must_call and not conversation.is_constrained
    is_reasoning = marks_reasoning(template) and is_free
    markers = (form.markers if form else ()) + ((OPENER, CLOSER) if is_reasoning else ())
    has_begun = text.rstrip().endswith(OPENER)
    shows, parallel = conversation.shows_reasoning, conversation.parallel_calls

    def new_parser(choice: str) -> AnswerParser:
        return AnswerParser(
            ReasoningSplitter(has_begun) if is_reasoning else None,
            _call_parser(form, names, choice, parallel),
            shows,
        )

    is_plain = form is None and not is_reasoning
    keeps = any(map(tokenizer.is_special, markers))
    grammar = None
    if form is not None and (must_call or _is_strict(tokenizer, conversation)):
        tools = [tool["function"] for tool in conversation.tools]
        begin, end = (f"{HERMES.opener}\n", f"\n{HERMES.closer}") if form is HERMES else ("", "")
        grammar = tool_grammar(tools, begin, end, required=must_call, parallel=parallel)
    thinking = None
    if budget is not None and is_reasoning:
        thinking = thinking_budget(tokenizer, budget, has_begun)
    return ChatPrompt(text, None if is_plain else new_parser, keeps, grammar, thinking)


def lacks_strictness(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether a function is strict, but its calls are not held to its schema."""
    is_wanted = conversation.is_strict and not conversation.must_call
    return is_wanted and not _is_strict(tokenizer, conversation)


def _is_strict(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether calls that need not be are still held to their functions' schemas."""
    form = call_format(tokenizer.chat_template or "")
    is_free = not conversation.must_call and not conversation.is_constrained
    return conversation.is_strict and is_free and _can_be_enforced(form, tokenizer)


def _can_be_enforced(form: CallFormat | None, tokenizer: Tokenizer) -> bool:
    """Grammars know text, not special tokens, and calls by these two keys."""
    return form is HERMES and not any(map(tokenizer.is_special, form.markers))


def _call_parser(
    form: CallFormat | None, names: frozenset[str], choice: str, parallel: bool
) -> CallParser | None:
    return None if form is None else CallParser(form, names, choice, None if parallel else 1)


def _text(tokenizer: Tokenizer, template: str, conversation: Conversation) -> str:
    variables = _variables(template, conversation)
    messages, tools = conversation.messages, conversation.tools
    if tools and renders_tools(template):
        variables["tools"] = list(tools)
    elif not renders_tools(template):
        messages = with_tools_in_words(messages, tools)
    if conversation.continue_final_message:
        return tokenizer.render_chat(
            messages, add_generation_prompt=False, continue_final_message=True, **variables
        )
    return tokenizer.render_chat(messages, **variables)


def _variables(template: str, conversation: Conversation) -> dict[str, Any]:
    variables = dict(conversation.variables)
    if reserved := RESERVED_TEMPLATE_VARIABLES & variables.keys():
        raise InvalidRequest(
            f"a chat template variable cannot be named {min(reserved)!r}", "chat_template_kwargs"
        )
    effort = conversation.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in template:
        variables.setdefault("reasoning_effort", effort)
    elif "enable_thinking" in template:
        variables.setdefault("enable_thinking", effort != "none")
    else:
        raise InvalidRequest(
            "reasoning_effort: this model's template has no such setting",
            "reasoning_effort",
            "unsupported_parameter",
        )
    return variables
