"""Numbers that kernels share."""

from typing import Any

import triton
import triton.language as tl


def constant(number: float) -> Any:
    """A module-level number that kernels may read: a constexpr where they are compiled, itself where interpreted.

    The interpreters of Triton 3.6 to 3.8 keep `constexpr * tensor` a constexpr, which tl.maximum, tl.store and others
    refuse. A constexpr argument is a plain number under every interpreter, and so is this.
    """
    return number if triton.knobs.runtime.interpret else tl.constexpr(number)
