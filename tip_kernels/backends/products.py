"""Products of fp32 matrices, on a CPU by the library that is the faster one there.

torch.mm is MKL's, which takes a slow path on AMD's CPUs: in all three products of a step (logits, d(hidden), d(weight))
oneDNN's takes 0.42 to 0.54 of its time there (torch 2.13 and 2.14), but 1.1 to 1.3 of it where MKL is at home. The
choice follows the CPU's maker alone, so that a machine gives the same bits in every process; both sum in fp32.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("torch", "onednn")
ENVIRONMENT = "TIP_KERNELS_PRODUCTS"  # chooses one of them for a process; read at the first import
BLOCK = 2**19  # entries of a result of oneDNN's, which is always fresh memory: 2 MiB stay in a core's cache
DEPTH = 512  # terms of a sum of oneDNN's: these err by 1.2 times MKL's (rms), 4,096 would by 3 times


def chosen() -> str:
    """The library for a CPU: as the environment says, else oneDNN on a CPU of AMD's where torch has both."""
    asked = os.environ.get(ENVIRONMENT) or None
    if asked is not None and asked not in NAMES:
        raise ValueError(f"{ENVIRONMENT}: expected {' or '.join(map(repr, NAMES))}, got {asked!r}")
    at_hand = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if asked == "onednn" and not at_hand:
        raise ValueError(f"{ENVIRONMENT}: expected 'torch', since this build of torch has no oneDNN, got 'onednn'")
    return asked or ("onednn" if at_hand and torch.backends.mkl.is_available() and _is_amd() else "torch")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not a Linux
        return "AuthenticAMD" in platform.processor()


LIBRARY = {"cpu": chosen()}  # by type of device; torch on all others


def _mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """torch.mm of (M, K) and (K, N) in fp32, of any strides; on a CPU by oneDNN."""
    return _by_onednn(out, a, b, fresh=True) if _is_for_onednn(a, b) else torch.mm(a, b, out=out)


def _addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out.addmm_(a, b), likewise."""
    return _by_onednn(out, a, b, fresh=False) if _is_for_onednn(a, b) else out.addmm_(a, b)


def _is_for_onednn(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and a.numel() > 0 and b.numel() > 0


def _by_onednn(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> Tensor:
    along = 0 if out.shape[0] > out.shape[1] else 1
    step = max(1, BLOCK // out.shape[1 - along])
    depth = -(-a.shape[1] // -(-a.shape[1] // DEPTH))
    for part, x in zip(out.split(step, along), (b if along else a).split(step, along), strict=True):
        left, right = (a, x) if along else (x, b)
        for i, (x_k, y_k) in enumerate(zip(left.split(depth, 1), right.split(depth), strict=True)):
            product = torch.ops.mkldnn._linear_pointwise(x_k, y_k.t(), None, "none", [], "")
            part.copy_(product) if fresh and i == 0 else part.add_(product)
    return out


# torch's own are called as they are.
mm, addmm_ = (torch.mm, Tensor.addmm_) if LIBRARY["cpu"] == "torch" else (_mm, _addmm_)
