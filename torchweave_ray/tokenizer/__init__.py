"""Text to token ids and back. The engine sees only the two protocols below.

`load_tokenizer` reads an artifact's tokenizer files without torch; only rendering a chat template
needs transformers (its renderer, loaded at first use), and only the ingress does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from torchweave_ray.errors import ArtifactError, InvalidRequest
from torchweave_ray.tokenizer.decoders import ByteDecoder, TokenBytes, WindowDecoder

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
"""What `Tokenizer.from_files` reads; only the first must exist."""

_TEMPLATE_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
RESERVED_TEMPLATE_VARIABLES = frozenset(
    {
        "self",
        "messages",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)
"""Names that a user's own template variables cannot have: the renderer takes them."""


class TokenDecoder(Protocol):
    """Incremental text of one sequence."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class Detokenizer(Protocol):
    """Makes decoders; all the engine knows of a tokenizer."""

    def decoder(self, skip_special_tokens: bool) -> TokenDecoder: ...


class Tokenizer:
    """One model's tokenizer and chat template; a `Detokenizer` by shape. Safe to share."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        eos_token_ids: tuple[int, ...] = (),
        tokenizer_json: bytes | None = None,
    ) -> None:
        """`config` is tokenizer_config.json's content; `tokenizer_json` what `backend` is of."""
        backend.no_truncation()
        backend.no_padding()
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special_texts = frozenset(token.content for token in added.values() if token.special)
        self._json = tokenizer_json
        self._token_bytes = TokenBytes.of(backend)
        self._template = _chat_template(config)
        self._template_tokens = _template_tokens(config)
        bos = self._template_tokens.get("bos_token")
        wants_bos = config.get("add_bos_token") is True
        self._bos_id = backend.token_to_id(bos) if wants_bos and bos is not None else None

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """From the bytes of `TOKENIZER_FILES`; raises ArtifactError naming an unreadable one."""
        if TOKENIZER_FILE not in files:
            raise ArtifactError(f"{TOKENIZER_FILE} is missing")
        try:
            backend = tokenizers.Tokenizer.from_buffer(files[TOKENIZER_FILE])
        except BaseException as error:  # tokenizers raises nothing narrower, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ArtifactError(f"{TOKENIZER_FILE} is not a tokenizer: {error}") from error
        parsed = {name: _json_object(name, files.get(name)) for name in TOKENIZER_FILES[1:]}
        config = parsed["tokenizer_config.json"]
        model, generation = parsed["config.json"], parsed["generation_config.json"]
        eos = _ids(generation.get("eos_token_id", model.get("eos_token_id")))
        named = backend.token_to_id(_template_tokens(config).get("eos_token", ""))
        if named is not None and named not in eos:
            eos += (named,)
        return cls(backend, config, eos, files[TOKENIZER_FILE])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A rendered chat holds its special tokens: encode it without adding them.

        Releases the GIL, so a long text may be encoded in a thread. Raises InvalidRequest for
        text that no UTF-8 has (a lone surrogate).
        """
        try:
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest("the text is not valid Unicode", "prompt") from error
        ids: list[int] = batch[0].ids
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text that a stream of these ids shows: all steps of a `decoder` and its flush."""
        decoder = self.decoder(skip_special_tokens)
        return "".join(map(decoder.step, token_ids)) + decoder.flush()

    def decoder(self, skip_special_tokens: bool) -> TokenDecoder:
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        if self._token_bytes is None:
            return WindowDecoder(self._backend, skipped)
        return ByteDecoder(self._token_bytes, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """What this token adds to a text, special tokens included; b"" for an unknown id."""
        if self._token_bytes is not None:
            return self._token_bytes[token_id]
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def to_json(self) -> str:
        """tokenizer.json's content. Kept where it came from a file: writing it takes 0.1 s."""
        text: str = self._json.decode() if self._json is not None else self._backend.to_str()
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def is_special(self, text: str) -> bool:
        """Whether this is a special token, which a text leaves out by default."""
        return text in self._special_texts

    @property
    def chat_template(self) -> str | None:
        """Its Jinja source."""
        return self._template

    def warm(self) -> None:
        """Load the template renderer and compile the template now (about a second)."""
        if self._template is not None:
            from transformers.utils import chat_template_utils

            chat_template_utils._compile_jinja_template(self._template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt that the model's template makes; `kwargs` are its variables.

        Raises InvalidRequest when there is no template or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **{**self._template_tokens, **kwargs},
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", "messages"
            ) from error
        text: str = rendered[0]
        return text


def read_tokenizer_files(artifact_dir: Path) -> dict[str, bytes]:
    """By name, for `Tokenizer.from_files`."""
    paths = (artifact_dir / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def load_tokenizer(artifact_dir: Path) -> Tokenizer:
    """The tokenizer of an artifact; raises ArtifactError naming the file at fault."""
    try:
        return Tokenizer.from_files(read_tokenizer_files(artifact_dir))
    except ArtifactError as error:
        raise ArtifactError(f"{artifact_dir}: {error}") from error


def _json_object(name: str, raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text of a token
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is not a JSON object")
    return value


def _ids(value: object) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ArtifactError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def _template_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, as text: a template may write them."""
    found = {}
    for name in _TEMPLATE_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(config: Mapping[str, Any]) -> str | None:
    """The template, or the one named "default" of several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None
