"""What the swapped calls share: a divergence by its beta, and the rows that count."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number
from tip_kernels.learn.divergences import JSD


def jsd(name: str, beta: float) -> JSD:
    """The divergence that TRL and Liger call beta: 0 is KL(teacher || student), 1 KL(student || teacher)."""
    expect(0 <= finite_number(name, beta) <= 1, name, "a number in [0, 1]", beta)
    return JSD(float(beta))


def counted(name: str, labels: Tensor | None, ignored: int, shape: torch.Size) -> tuple[Tensor | None, int]:
    """Which rows have a label, on the CPU, where distill leaves the others out of every sweep, and how many.

    Synchronises. None and all rows without labels.
    """
    if labels is None:
        return None, shape.numel()
    ok = isinstance(labels, Tensor) and labels.shape in (shape, (shape.numel(),))
    expect(ok, name, f"labels of shape {tuple(shape)}", labels)
    mask = (labels != ignored).cpu()
    return mask, int(mask.sum())
