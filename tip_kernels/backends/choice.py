"""Which code runs the sweeps: Triton kernels, or tiled torch ("eager")."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from tip_kernels._checks import expect


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # from an import hook that refuses it
        return False


NAMES = ("eager", "triton")
ENVIRONMENT = "TIP_KERNELS_BACKEND"
TRITON_IS_INSTALLED = _is_installed("triton")
_requested: str | None = None  # a plain global, whose change torch.compile notices; a context variable it cannot read


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Overrides, inside a with block and for all threads, the choice of backend by device.

    The environment variable TIP_KERNELS_BACKEND does the same for a whole process; the context manager wins over it.
    A backward runs on its forward's backend, wherever it is called. An explicit request never falls back. Triton on a
    CPU needs TRITON_INTERPRET=1 before the first import.

    Args:
        name: "eager", tiled torch, or "triton", the kernels.

    Raises:
        ValueError: For another name, and where the work starts if Triton cannot run there.
    """
    expect(name in NAMES, "backend", "'eager' or 'triton'", name)
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def backend_for(device: torch.device) -> str:
    """The name of the backend that work on this device takes now."""
    name = _requested or os.environ.get(ENVIRONMENT) or None
    expect(name in (None, *NAMES), ENVIRONMENT, "'eager' or 'triton'", name)
    if name is None:
        return "triton" if TRITON_IS_INSTALLED and device.type == "cuda" else "eager"
    if name == "triton":
        if not TRITON_IS_INSTALLED:
            raise ValueError("backend: 'triton' was asked for, but triton is not installed: pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "backend: 'triton' was asked for with tensors on the cpu, which needs TRITON_INTERPRET=1 set before "
                "triton is first imported (the interpreter is slow: for tests), or tensors on a GPU"
            )
    return name
