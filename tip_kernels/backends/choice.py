"""Which code runs the sweeps: Triton kernels, or tiled torch ("eager")."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # from an import hook that refuses it
        return False


NAMES = ("eager", "triton")
ENVIRONMENT = "TIP_KERNELS_BACKEND"
TRITON_DEVICES = ("cuda", "xpu")  # a GPU of AMD is "cuda" to torch
TRITON_IS_INSTALLED = _is_installed("triton")
_requested: str | None = None  # a plain global, whose change torch.compile notices; a context variable it cannot read
# device type: the backend that work on it takes now, where one was asked for and can run there, or none was asked for.
# A plain table, so that to read it is no call, and torch.compile notices that it changed.
CHOSEN: dict[str, str] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Overrides, inside a with block and for all threads, the choice of backend by device.

    The environment variable TIP_KERNELS_BACKEND, read at the first import, does the same for a whole process; the
    context manager wins over it. A backward runs on its forward's backend, wherever it is called. An explicit request
    never falls back. Triton on a CPU needs TRITON_INTERPRET=1 before the first import.

    Args:
        name: "eager", tiled torch, or "triton", the kernels.

    Raises:
        ValueError: For another name, and where the work starts if Triton cannot run there.
    """
    _check_name("backend", name)
    global _requested
    before, _requested = _requested, name
    _choose()
    try:
        yield
    finally:
        _requested = before
        _choose()


def backend_for(device: torch.device) -> str:
    """The name of the backend that work on this device takes now."""
    name = _requested or os.environ.get(ENVIRONMENT) or None
    if name is not None:
        _check_name(ENVIRONMENT, name)
    if name is None:
        return "triton" if TRITON_IS_INSTALLED and device.type in TRITON_DEVICES else "eager"
    if name == "triton":
        if not TRITON_IS_INSTALLED:
            raise ValueError("backend: 'triton' was asked for, but triton is not installed: pip install triton")
        if device.type not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend: 'triton' was asked for with tensors on the {device.type}, which needs TRITON_INTERPRET=1 "
                "set before triton is first imported (the interpreter is slow: for tests), or tensors on a GPU"
            )
    return name


def _check_name(source: str, name: object) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: expected 'eager' or 'triton', got {type(name).__name__} {name!r}")


def _choose() -> None:
    """Brings CHOSEN up to date; what cannot run is left out, and refused where the work starts."""
    for kind in ("cpu", *TRITON_DEVICES):
        try:
            CHOSEN[kind] = backend_for(torch.device(kind))
        except ValueError:
            CHOSEN.pop(kind, None)


_choose()
