"""How close an executor's predictions are to a reference's, on a text of our own.

`prose.txt`, and `calibration.txt` that weights are rounded by, were written for this project: plain
English of several kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from optimizer.measuring.model import MeasuredModel, make_inputs

WINDOW = 256
MAX_TOKENS = 1024
MAX_CALIBRATION_TOKENS = 4096
_TEXT = Path(__file__).with_name("prose.txt")
_CALIBRATION = Path(__file__).with_name("calibration.txt")


@dataclass(frozen=True, slots=True)
class Quality:
    num_tokens: int
    """Predictions that were compared."""
    executor: str
    kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions from the reference's."""
    max_kl: float
    top1: float
    """Share of positions with the same most likely token."""
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


def text_windows(tokenizer: Path, max_length: int) -> list[Tensor]:
    """Token ids of the text that models are judged by, in pieces of at most `WINDOW` and at least
    two."""
    return _windows(_TEXT, tokenizer, max_length, MAX_TOKENS)


def calibration_windows(tokenizer: Path, max_length: int) -> list[Tensor]:
    """Of another text, which shares no sentence with the one that models are judged by."""
    return _windows(_CALIBRATION, tokenizer, max_length, MAX_CALIBRATION_TOKENS)


def _windows(text: Path, tokenizer: Path, max_length: int, max_tokens: int) -> list[Tensor]:
    ids = Tokenizer.from_file(str(tokenizer)).encode(text.read_text()).ids[:max_tokens]
    length = min(WINDOW, max_length)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def window_logits(model: MeasuredModel, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """[T, vocab_size] of each window, which is one sequence from its first position on."""
    longest = max(window.shape[0] for window in windows)
    cache = model.cache(longest)
    for ids in windows:
        inputs = make_inputs([(0, ids.shape[0])], ids, longest, every_row=True)
        yield model.executor.forward(inputs, cache)


@torch.inference_mode()
def compare(
    reference: Iterable[Tensor],
    candidate: Iterable[Tensor],
    windows: Sequence[Tensor],
    executor: str,
) -> Quality:
    """Of the logits of each window by two models, the second of them run by `executor`."""
    divergences: list[Tensor] = []
    losses: list[tuple[Tensor, Tensor]] = []
    num_agreeing = 0
    wanted, given = iter(reference), iter(candidate)
    for ids in windows:  # an executor may give the next logits in the same memory
        expected = next(wanted)[:-1].log_softmax(dim=-1)
        actual = next(given)[:-1].log_softmax(dim=-1)
        divergences.append((expected.exp() * (expected - actual)).sum(dim=-1))
        num_agreeing += int((expected.argmax(dim=-1) == actual.argmax(dim=-1)).sum())
        following = ids[1:, None]
        losses.append((expected.gather(1, following), actual.gather(1, following)))
    kl = torch.cat(divergences).double()
    means = [torch.cat(parts).double().mean().item() for parts in zip(*losses, strict=True)]
    return Quality(
        num_tokens=kl.shape[0],
        executor=executor,
        kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1=num_agreeing / kl.shape[0],
        perplexity=math.exp(-means[1]),
        reference_perplexity=math.exp(-means[0]),
    )
