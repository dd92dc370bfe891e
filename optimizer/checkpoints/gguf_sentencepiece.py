"""A GGUF's SentencePiece vocabulary (tokenizer "llama": Llama 2, Mistral, Gemma, Phi-3) as a BPE.

SentencePiece joins the two neighbours whose piece has the highest score; merges in order of their
piece's score do the same. Compared with the sentencepiece package, text by text, in tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from torchweave_ray.errors import ArtifactError

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def sentencepiece_tokenizer(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    """Raises ArtifactError for a vocabulary that cannot say every text."""
    kinds = list(zip(tokens, types, strict=True))
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ArtifactError("GGUF tokenizer 'llama' has no score for each of its tokens")
    if types.count(_BYTE) != 256:
        raise ArtifactError(f"GGUF tokenizer 'llama' has {types.count(_BYTE)} byte tokens, not 256")
    if unknown := set(types) - set(range(_NORMAL, _BYTE + 1)):
        raise ArtifactError(f"GGUF token type {unknown.pop()} is not one of SentencePiece")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    normal = {
        t: float(s) for t, s, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL
    }
    unknowns = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(normal),
            unk_token=unknowns[0] if unknowns else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = adds_space(metadata)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [t for t, kind in kinds if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    # Symbols with spaces in them are found in the text as it is normalised; a prefix would be
    # put before them, too, and there are none beside one.
    symbols = [t for t, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=not prefixed) for t in symbols])
    return tokenizer


def adds_space(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that it has not."""
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best pieces first; of one piece in any order: they
    give the same."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, left, right))
    found.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in found]
