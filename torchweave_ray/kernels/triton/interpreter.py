"""Our Triton kernels on a CPU, slowly, by Triton's own interpreter: for tests and dry runs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def interpret() -> None:
    """Must be called before a module with kernels is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot
    if getattr(multiply, "reads_bfloat16", False):
        return

    def widened(handle: Any) -> Any:
        """Bfloat16 lies in uint16 there, and `create_dot` would multiply those."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return multiply(builder, widened(a), widened(b), d, *options)

    create_dot.reads_bfloat16 = True
    InterpreterBuilder.create_dot = create_dot
