"""The gradient of each divergence with respect to the student's logits, element by element.

Each function takes natural log-probabilities of a tile (R, C), the student's probabilities, and row scalars (R, 1),
and returns d(divergence)/d(z_s), z_s being the logits already divided by the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tip_kernels.eager.online import FLOOR


def forward_kl(lp_s: Tensor, lp_t: Tensor, p_s: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """p_s - p_t"""
    return torch.sub(p_s, exp(lp_t))


def reverse_kl(lp_s: Tensor, lp_t: Tensor, p_s: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """p_s (log p_s - log p_t - KL(s||t))"""
    return torch.sub(lp_s, lp_t).sub_(rows["kl_rev"]).mul_(p_s)


GRADIENTS: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def log_probabilities(z: Tensor, shift: Tensor, logsum: Tensor) -> Tensor:
    """log p of a tile (R, C) in place, from z / temperature; formed from shift and logsum (R, 1), never from lse."""
    return z.clamp_(min=FLOOR).sub_(shift).sub_(logsum)


def exp(x: Tensor) -> Tensor:
    """e^x by way of exp2, which torch evaluates nearly three times faster on a CPU."""
    return (x * (1 / math.log(2.0))).exp2_()


def dlogits(z_s: Tensor, z_t: Tensor, terms: list[tuple[float, str]], rows: Mapping[str, Tensor]) -> Tensor:
    """d(sum of weight * divergence)/d(z_s) on a tile; z_s and z_t (R, C) are logits / temperature and are overwritten.

    rows holds (R, 1) columns: shift and logsum of both models, and the scalars that the named gradients read.
    """
    lp_s = log_probabilities(z_s, rows["shift_s"], rows["logsum_s"])
    lp_t = log_probabilities(z_t, rows["shift_t"], rows["logsum_t"])
    p_s = exp(lp_s)
    total: Tensor | None = None
    for weight, name in terms:
        g = GRADIENTS[name](lp_s, lp_t, p_s, rows)
        g = g if weight == 1.0 else g.mul_(weight)
        total = g if total is None else total.add_(g)
    return total
