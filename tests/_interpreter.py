"""Triton's interpreter as the tests need it: a multiply-add rounds once, as on every GPU."""

from __future__ import annotations

import numpy as np


def fuse_multiply_adds() -> None:
    """Gives the interpreter a fused tl.fma where its own rounds twice, as those before Triton 3.9 do.

    The kernels count on one rounding: without it rows of logits near +-120 are a few 1e-6 off.
    """
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return

    def handle(number: float) -> TensorHandle:
        return TensorHandle(np.array([number], np.float32), tl.float32)

    def create_fma(self, x, y, z):
        with np.errstate(all="ignore"):  # a product of two fp32 is exact in fp64
            exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    small = InterpreterBuilder().create_fma(handle(1 + 2**-12), handle(1 + 2**-12), handle(-1 - 2**-11))
    if small.data[0] == 0:  # 2^-24 was rounded away before the addition
        InterpreterBuilder.create_fma = create_fma
