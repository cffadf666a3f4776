"""The four quadrants of TIP: which tokens are uncertain, and which wrong (arXiv 2604.14084)."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels.select.rule import Cut, check_cut, cut_at, layout, statistic, unmasked
from tip_kernels.stats import TokenStats


@torch.no_grad()
def quadrants(
    stats: TokenStats, row_mask: Tensor | None = None, *, entropy: Cut = 0.3, divergence: Cut = 0.1
) -> Tensor:
    """The TIP quadrant of every row: (N,) int8, on the device and without synchronising.

        1  entropy high, divergence high: uncertain and wrong      2  high, low: uncertain, agrees with the teacher
        3  entropy low, divergence high: overconfident and wrong   4  low, low: solved            0  masked or NaN

    low entropy: entropy_s < entropy; high divergence: kl_rev = KL(student || teacher) > divergence; both strict.
    Source: TIP (arXiv 2604.14084), which gives no numeric thresholds: these are for looking at tokens. No rule chooses
    by them; `Overconfident`, TIP's Q3-only rule, ranks every row and has no thresholds; R36.

    Args:
        stats: TokenStats with entropy_s and kl_rev.
        row_mask: bool (N,) or (B, T), True for rows that count; None: all do.
        entropy: A finite float in nats, or ("quantile", q) over the rows that count, q in [0, 1].
        divergence: The same.

    Returns:
        (N,) int8, 0 to 4.

    Raises:
        ValueError: Naming the argument.
    """
    check_cut("entropy", entropy)
    check_cut("divergence", divergence)
    shape, device = layout(stats)
    h, d = (statistic(stats, name, "quadrants") for name in ("entropy_s", "kl_rev"))
    rows = unmasked(row_mask, shape, device) & ~h.isnan() & ~d.isnan()
    if rows.numel() == 0:
        return rows.to(torch.int8)
    low_entropy = h < cut_at(entropy, h, rows)
    low_divergence = ~(d > cut_at(divergence, d, rows))
    return torch.where(rows, 1 + 2 * low_entropy.to(torch.int8) + low_divergence.to(torch.int8), 0).to(torch.int8)
