"""AdaKD: token difficulty, its temperature, and the adaptive ratio of kept tokens (README.md, R37 to R40)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .select import Stats, groups, select_top_hellinger, valid_rows
from .stats import token_stats


def difficulty(stats: Stats) -> Tensor:
    """R37: (N,) in [0, 1], the Hellinger distance of both models at temperature 1."""
    return stats["hellinger_sq"].sqrt()


def difficulty_temperature(
    stats: Stats,
    row_mask: Tensor | None = None,
    strength: float = 0.5,
    base: float = 1.0,
    *,
    rollout_ids: Tensor | None = None,
) -> Tensor:
    """R38: (N,) detached temperatures base exp(-strength tanh(log(difficulty / its median))); `base` on invalid rows.

    The median is over the valid rows of the batch, or of each rollout where `rollout_ids` are given.
    """
    s = difficulty(stats).detach()
    tau = torch.full_like(s, base)
    for rows in groups(valid_rows(stats, ["hellinger_sq"], row_mask), rollout_ids, "rollout"):
        if not rows:
            continue
        relative = s[rows] / s[rows].median()  # the lower of two middle values
        relative = torch.where(relative.isnan(), 1.0, relative)  # 0 / 0: as hard as the median
        tau[rows] = base * torch.exp(-strength * torch.tanh(torch.log(relative)))
    return tau


def adaptive_focus(
    losses: Sequence[float],
    *,
    warmup: int = 0,
    smoothing: float = 0.99,
    tolerance: float = 0.05,
    step: float = 0.05,
    floor: float = 0.1,
    reanchor: str = "paper",
) -> list[float]:
    """R39: the ratio of kept tokens after each loss of a run, replayed from the start; R39' with reanchor "release"."""
    warmup += reanchor == "release"  # the loss after the warm-up sets the anchor, and is compared with nothing
    ratio, ratios = 1.0, []
    average = anchor = losses[0] if losses else 0.0  # the loss of the untrained student
    for t, loss in enumerate(losses, start=1):
        average = smoothing * average + (1 - smoothing) * loss
        if t <= warmup:
            anchor = average
        else:
            moved, drifted = ratio, True
            if average < anchor * (1 - tolerance):
                moved = max(floor, ratio * (1 - step))
            elif average > anchor * (1 + tolerance):
                moved = min(1.0, ratio * (1 + step))
            else:
                drifted = False
            if moved != ratio or (drifted and reanchor == "release"):
                ratio, anchor = moved, average
        ratios.append(ratio)
    return ratios


def whole_criterion(
    z_s: Tensor,
    z_t: Tensor,
    labels: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    kept: Tensor,
    *,
    ce_weight: float,
) -> Tensor:
    """R41: (1 - w) mean of the divergence over kept rows + w mean of the cross-entropy over all labelled rows."""
    labelled = labels != -100
    ce = torch.nn.functional.cross_entropy(z_s[labelled], labels[labelled])
    return (1 - ce_weight) * divergence(z_s[kept], z_t[kept]).mean() + ce_weight * ce


def adakd_loss(
    z_s: Tensor,
    z_t: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    keep: float,
    strength: float = 0.5,
    base: float = 1.0,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    scope: str = "rollout",
) -> Tensor:
    """R40: the mean over the hardest rows of tau^2 divergence(z_s / tau, z_t / tau); a connected 0 if none is kept."""
    stats = token_stats(z_s.detach(), z_t.detach())
    kept = select_top_hellinger(stats, keep, row_mask=row_mask, rollout_ids=rollout_ids, scope=scope)
    tau = difficulty_temperature(stats, row_mask, strength, base)[kept]
    z_s, z_t = z_s[kept] / tau[:, None], z_t[kept] / tau[:, None]
    return (tau.square() * divergence(z_s, z_t)).sum() / max(int(kept.sum()), 1)
