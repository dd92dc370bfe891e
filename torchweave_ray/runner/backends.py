"""Which attention a device gets: our Triton kernels where they run, else plain torch; and why.

The only place that imports triton, and only when it is chosen.
"""

from __future__ import annotations

import logging

import torch

from torchweave_ray.attention.base import AttentionBackend
from torchweave_ray.attention.torch_paged import TorchPagedAttention
from torchweave_ray.runner.device import why_no_triton

logger = logging.getLogger(__name__)


def choose_attention(device: torch.device) -> AttentionBackend:
    """Of the torch executor and of transformers' models; the native executor has its own."""
    reason = why_no_triton(device)
    if reason is None:
        from torchweave_ray.attention.triton_paged import TritonPagedAttention

        logger.info("[Attention] triton_paged: triton can run on %s", device)
        return TritonPagedAttention()
    level = logging.DEBUG if device.type == "cpu" else logging.WARNING
    logger.log(level, "[Attention] torch_paged: %s", reason)
    return TorchPagedAttention()
