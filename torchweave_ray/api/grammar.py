"""Fields that say what an answer must be, under OpenAI's and vLLM's names, as one `GrammarSpec`.

Also the grammar of tool calls. Nothing is compiled here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from llguidance import StructTag
from pydantic import ConfigDict, Field, ValidationError

from torchweave_ray.api.errors import invalid_body
from torchweave_ray.api.schema import Body
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.tokenizer.grammar import (
    JSON_WHITESPACE,
    GrammarSpec,
    choice_spec,
    json_spec,
)

JsonSchema = dict[str, Any] | bool


class Wanted(NamedTuple):
    """What a client wants its answer to be."""

    spec: GrammarSpec
    param: str
    """The field that says so, for the 400 of one that cannot be used."""


class JsonSchemaFormat(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the schema is enforced either way")


class TagStructure(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    begin: str = Field(min_length=1)
    schema_: JsonSchema = Field(alias="schema")
    end: str


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TagStructure] | None = Field(None, description="of a structural_tag")
    triggers: list[str] | None = Field(None, description="of a structural_tag")

    def spec(self) -> GrammarSpec | None:
        if self.type == "json_object":
            return json_spec({"type": "object"})
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise InvalidRequest("json_schema.schema is required", "json_schema")
            return json_spec(self.json_schema.schema_)
        if self.type == "structural_tag":
            return _tags(self.structures or [], self.triggers or [])
        return None


class StructuredOutputs(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    json_: JsonSchema | str | None = Field(None, alias="json", description="a JSON schema")
    json_object: bool | None = Field(None, description="any JSON object")
    regex: str | None = Field(None, description="the whole answer matches it")
    choice: list[str] | None = Field(None, description="one of these texts")
    grammar: str | None = Field(None, description="Lark or GBNF")

    def wanted(self) -> list[Wanted]:
        found = _wanted("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            found.append(Wanted(json_spec({"type": "object"}), "structured_outputs.json_object"))
        return found


class GrammarFields(Body):
    """What every generating endpoint accepts alike; at most one of them."""

    response_format: ResponseFormat | None = Field(
        None, description="text, json_object, json_schema or structural_tag"
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="one of json, json_object, regex, choice, grammar"
    )
    guided_json: JsonSchema | str | None = Field(None, description="structured_outputs.json")
    guided_regex: str | None = Field(None, description="structured_outputs.regex")
    guided_choice: list[str] | None = Field(None, description="structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="structured_outputs.grammar")

    def wanted(self) -> Wanted | None:
        """Raises InvalidRequest when there are several, or one that says nothing."""
        found = _wanted(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )
        if self.structured_outputs is not None:
            of_vllm = self.structured_outputs.wanted()
            if not of_vllm:
                raise InvalidRequest(
                    "structured_outputs needs one of json, json_object, regex, choice, grammar",
                    "structured_outputs",
                )
            found += of_vllm
        if self.response_format is not None:
            try:
                spec = self.response_format.spec()
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"response_format: {error.message}", "response_format", error.code
                ) from None
            if spec is not None:
                found.append(Wanted(spec, "response_format"))
        if len(found) > 1:
            first, second = found[:2]
            raise InvalidRequest(
                f"{first.param} and {second.param} cannot be combined", second.param
            )
        return found[0] if found else None


def wanted_of(fields: Mapping[str, Any]) -> Wanted | None:
    """Of `GrammarFields` that come from Python; raises InvalidRequest."""
    try:
        return GrammarFields.model_validate(fields).wanted()
    except ValidationError as error:
        raise invalid_body(error) from None


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    begin: str = "",
    end: str = "",
    *,
    required: bool = True,
    parallel: bool = False,
    separator: str = "\n",
) -> GrammarSpec:
    """Calls of these functions (`{"name", "parameters": schema}`), each as
    `begin{"name": ..., "arguments": {...}}end`.

    `required`: nothing but one call, or with `parallel` one or several. Not `required`: any text,
    and behind each `begin` in it a call (`begin` must not be empty then).
    """
    call = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ],
        "x-guidance": {"whitespace_pattern": JSON_WHITESPACE},
    }
    # References in a tool's parameters are written from the root of its own schema.
    call = _with_local_references(call, tools)
    if not required:
        return _lark_of_tags([StructTag(trigger=begin, begin=begin, grammar=call, end=end)])
    parts = (_quoted(begin), f"%json {json.dumps(call)}", _quoted(end))
    one = " ".join(part for part in parts if part)
    more = f" ({_quoted(separator)} call)*" if parallel else ""
    return GrammarSpec("grammar", f"%llguidance {{}}\nstart: call{more}\ncall: {one}\n")


def _with_local_references(
    call: dict[str, Any], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        parameters = tool.get("parameters") or {}
        if '"$ref"' in json.dumps(parameters):
            key = f"tool_{index}"
            definitions[key] = _moved(parameters, f"#/$defs/{key}")
            call["anyOf"][index]["properties"]["arguments"] = {"$ref": f"#/$defs/{key}"}
    return {**call, "$defs": definitions} if definitions else call


def _moved(schema: Any, root: str) -> Any:
    """The schema with its references to itself under a new root."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def _wanted(
    prefix: str,
    schema: JsonSchema | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[Wanted]:
    found = []
    try:
        if schema is not None:
            param = f"{prefix}json"
            found.append(Wanted(json_spec(_parsed(schema, param)), param))
        if regex is not None:
            param = f"{prefix}regex"
            found.append(Wanted(GrammarSpec("regex", regex), param))
        if choice is not None:
            param = f"{prefix}choice"
            if not choice or not all(choice):
                raise InvalidRequest(f"{param} needs texts to choose from, none empty", param)
            found.append(Wanted(choice_spec(choice), param))
        if grammar is not None:
            param = f"{prefix}grammar"
            found.append(Wanted(GrammarSpec("grammar", grammar), param))
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param, error.code) from None
    return found


def _parsed(schema: JsonSchema | str, param: str) -> JsonSchema:
    if not isinstance(schema, str):
        return schema
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise InvalidRequest(f"{param} is not JSON: {error}", param) from None
    if not isinstance(parsed, dict | bool):
        raise InvalidRequest(f"{param} must be a JSON schema", param)
    return parsed


def _tags(structures: Sequence[TagStructure], triggers: Sequence[str]) -> GrammarSpec:
    if not structures:
        raise InvalidRequest("a structural_tag needs structures and triggers", "response_format")
    tags = []
    for tag in structures:
        begun = [trigger for trigger in triggers if trigger and tag.begin.startswith(trigger)]
        if not begun:
            raise InvalidRequest(f"no trigger begins {tag.begin!r}", "response_format")
        schema = tag.schema_ if isinstance(tag.schema_, dict) else {"anyOf": [tag.schema_]}
        tags.append(StructTag(trigger=begun[0], begin=tag.begin, grammar=schema, end=tag.end))
    return _lark_of_tags(tags)


def _lark_of_tags(tags: list[StructTag]) -> GrammarSpec:
    """Any text, and behind each trigger what its tags demand."""
    return GrammarSpec("grammar", StructTag.to_grammar(tags, assume_special=False))


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""
