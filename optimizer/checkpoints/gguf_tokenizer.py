"""tokenizer.json and tokenizer_config.json out of a GGUF's vocabulary, merges and flags.

A GGUF names its pre-tokenizer but doesn't define it. Names whose split we have compared with
another implementation, text by text, are known; any other is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from optimizer.checkpoints.gguf_sentencepiece import adds_space, sentencepiece_tokenizer
from torchweave_ray.errors import ArtifactError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
SENTENCEPIECE = "llama"
"""`tokenizer.ggml.model`"""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a GGUF means by the name of a pre-tokenizer."""

    build: Callable[[], Any]
    ignore_merges: bool = False
    """A piece that is a token as a whole is not cut, even if no merges lead to it."""
    add_bos: bool = False
    """Where the file's own flag is absent."""
    is_composed: bool = False
    """A text is brought to Unicode's NFC first."""


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> Any:
    """Each digit alone, then GPT-2's split. Digits first: `a  1` gives `a`, two spaces, `1`."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> Any:
    return _split(_LLAMA3_SPLIT)


def _qwen2() -> Any:
    """Llama 3's, but each digit alone."""
    return _split(_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"))


def _split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "smollm": PreTokenizer(_smollm),
        "gpt-2": PreTokenizer(_gpt2),
        "llama-bpe": PreTokenizer(_llama3, ignore_merges=True, add_bos=True),
        "qwen2": PreTokenizer(_qwen2, is_composed=True),
    }
)


def tokenizer_json(metadata: Mapping[str, Any], vocab_size: int) -> bytes:
    """Raises ArtifactError for a tokenizer or pre-tokenizer that we have not tested."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not len(tokens) == len(set(tokens)) == len(types) == vocab_size:
        raise ArtifactError(
            f"GGUF vocabulary of {len(tokens)} tokens ({len(set(tokens))} different ones, "
            f"{len(types)} types) does not fit the embedding's {vocab_size} rows"
        )
    if metadata.get("tokenizer.ggml.model") == SENTENCEPIECE:
        tokenizer = sentencepiece_tokenizer(metadata, tokens, types)
    else:
        tokenizer = _byte_level_bpe(metadata, tokens, types)
    if (template := _template(metadata, tokens)) is not None:
        tokenizer.post_processor = template
    document: str = tokenizer.to_str()
    return document.encode()


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    pre_tokenizer = _pre_tokenizer(metadata)
    if unknown := set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise ArtifactError(f"GGUF token type {unknown.pop()} is not one of a byte-level BPE")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [_merge(merge) for merge in metadata.get("tokenizer.ggml.merges") or []]
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
    except Exception as error:  # the Rust library raises plain Exception
        raise ArtifactError(f"GGUF merges do not fit its vocabulary: {error}") from error
    tokenizer = Tokenizer(bpe)
    if pre_tokenizer.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in kinds if k == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' PreTrainedTokenizerFast reads, with the chat template."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds(metadata, "bos"),
        "add_eos_token": _adds(metadata, "eos"),
        "add_prefix_space": _is_sentencepiece(metadata) and adds_space(metadata),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            values[f"{name}_token"] = _token(tokens, token_id, key)
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        values["chat_template"] = template
    return values


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    model, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ArtifactError(
            f"GGUF tokenizer {model!r} is not supported; supported: 'gpt2' (byte-level BPE) and "
            f"{SENTENCEPIECE!r} (SentencePiece). "
            "Stage the model's Hugging Face folder instead"
        )
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        tested = ", ".join(repr(known) for known in PRE_TOKENIZERS)
        raise ArtifactError(
            f"GGUF pre-tokenizer {name!r} has not been tested; tested ones: {tested}. "
            "Stage the model's Hugging Face folder instead"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise ArtifactError("GGUF key tokenizer.ggml.add_space_prefix = true is not supported")
    return PRE_TOKENIZERS[name]


def _is_sentencepiece(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.model") == SENTENCEPIECE)


def _merge(text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise ArtifactError(f"GGUF merge {text!r} is not two tokens with a space between")
    return left, right


def _template(metadata: Mapping[str, Any], tokens: list[str]) -> Any | None:
    """Puts begin and end tokens around a text if the flags ask for it."""
    ends: dict[str, tuple[str, int]] = {}
    for name in ("bos", "eos"):
        if _adds(metadata, name):
            token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
            ends[name] = (_token(tokens, token_id, name), int(token_id or 0))
    if not ends:
        return None
    before = [f"{ends['bos'][0]}:0"] if "bos" in ends else []
    after = [f"{ends['eos'][0]}:0"] if "eos" in ends else []
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, "$B:0", *after],
        special_tokens=list(dict.fromkeys(ends.values())),
    )


def _token(tokens: list[str], token_id: Any, key: str) -> str:
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise ArtifactError(f"GGUF key tokenizer.ggml.{key}_token_id = {token_id!r} is no token")
    return tokens[token_id]


def _adds(metadata: Mapping[str, Any], name: str) -> bool:
    """Whether a text gets the begin or end token."""
    default = name == "bos" and (_is_sentencepiece(metadata) or _pre_tokenizer(metadata).add_bos)
    return bool(metadata.get(f"tokenizer.ggml.add_{name}_token", default))
