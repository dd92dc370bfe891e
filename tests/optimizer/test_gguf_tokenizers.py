"""Tokenizers out of a GGUF beside the packages that they come from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models

from optimizer.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_config, tokenizer_json
from torchweave_ray.errors import ArtifactError

PIECES = (
    "the gravity of a planet and its stars", "  two  spaces", "Größe, naïve café", "你好世界",
    "привет", "😀", "def f(x):\n    return x + 1", "1234567890", "\t", "\n\n", "'ll 'T don't",
    "a\u0301", "\r\n", "",
)  # fmt: skip


def _texts(count: int) -> list[str]:
    draw = random.Random(0)
    mixed = ["".join(draw.choices(PIECES, k=draw.randint(1, 4))) for _ in range(count)]
    return [*PIECES, *mixed, *(text[draw.randrange(8) :] for text in mixed)]


def _sentencepiece(folder: Path, prefixed: bool) -> tuple[Any, dict[str, Any]]:
    """A trained model, and what a GGUF holds of it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_texts(200), *PIECES]),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=prefixed,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.99,
        user_defined_symbols=[] if prefixed else ["\n\n", "\u2581\u2581\u2581"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    ids = range(model.get_piece_size())
    kinds = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    types = [next((k for k, has in kinds.items() if has(i)), 1) for i in ids]
    symbols = {"\n\n", "\u2581\u2581\u2581"} if not prefixed else set()
    pieces = [model.id_to_piece(i) for i in ids]
    return model, {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [
            4 if piece in symbols else kind for piece, kind in zip(pieces, types, strict=True)
        ],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


@pytest.mark.parametrize("prefixed", [True, False], ids=["llama", "gemma"])
def test_ids_are_those_of_sentencepiece(tmp_path: Path, prefixed: bool) -> None:
    model, metadata = _sentencepiece(tmp_path, prefixed)
    document = tokenizer_json(metadata, model.get_piece_size())
    (tmp_path / "tokenizer.json").write_bytes(document)
    ours = Tokenizer.from_str(document.decode())
    for text in _texts(200):
        ids = model.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert ours.decode(ids) == text
    assert ours.encode("a").ids[0] == 1
    assert tokenizer_config(metadata)["add_prefix_space"] is prefixed


def test_a_vocabulary_without_scores_or_bytes_is_refused(tmp_path: Path) -> None:
    _, metadata = _sentencepiece(tmp_path, prefixed=True)
    size = len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ArtifactError, match="no score"):
        tokenizer_json({**metadata, "tokenizer.ggml.scores": None}, size)
    types = [1 if kind == 6 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    with pytest.raises(ArtifactError, match="0 byte tokens"):
        tokenizer_json({**metadata, "tokenizer.ggml.token_type": types}, size)


def test_qwen2_splits_as_transformers_does() -> None:
    from transformers.models.qwen2 import Qwen2Tokenizer

    backend = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    ours = Tokenizer(models.BPE())
    ours.pre_tokenizer = PRE_TOKENIZERS["qwen2"].build()
    for text in _texts(300):
        wanted = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert [p for p, _ in ours.pre_tokenizer.pre_tokenize_str(text)] == wanted
    assert backend.normalizer.normalize_str("a\u0301") == "\u00e1"
    assert PRE_TOKENIZERS["qwen2"].is_composed
