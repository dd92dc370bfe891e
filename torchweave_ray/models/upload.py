"""Weights to a GPU: through two pieces of pinned memory, one filled while the other is copied.

A mapped file cannot be pinned, and a copy straight from it waits for the disk and the bus in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 64 << 20
"""Bytes."""


class Uploader:
    """Of one model. The copies it gave are whole after `finish`."""

    def __init__(self, device: torch.device, piece: int = PIECE) -> None:
        self._device = device
        self._is_gpu = device.type != "cpu"
        self._stages: list[Tensor] = []
        self._events: list[torch.Event] = []
        self._piece = piece
        self._num_pieces = 0

    def move(self, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device, in this dtype (None: its own); on the CPU itself where it can be."""
        if not self._is_gpu or source.device.type != "cpu":
            return source.to(self._device, dtype)
        moved = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self.copy(source, moved)
        return moved.to(dtype) if dtype is not None else moved

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Byte by byte, in pieces."""
        whole = source.contiguous().view(-1).view(torch.uint8)
        into = destination.view(-1).view(torch.uint8)
        for start in range(0, whole.numel(), self._piece):
            piece = whole[start : start + self._piece]
            stage = self._next_stage()[: piece.numel()]
            stage.copy_(piece)
            into[start : start + self._piece].copy_(stage, non_blocking=True)
            if self._is_gpu:
                self._events[(self._num_pieces - 1) % 2].record()

    def finish(self) -> None:
        for event in self._events:
            event.synchronize()
        self._stages.clear()
        self._events.clear()

    def _next_stage(self) -> Tensor:
        """One whose last copy is done."""
        turn = self._num_pieces % 2
        self._num_pieces += 1
        if turn == len(self._stages):
            self._stages.append(
                torch.empty(self._piece, dtype=torch.uint8, pin_memory=self._is_gpu)
            )
            if self._is_gpu:
                self._events.append(torch.Event(self._device))
        elif self._is_gpu:
            self._events[turn].synchronize()
        return self._stages[turn]
