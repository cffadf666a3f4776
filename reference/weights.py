"""Row weights that follow from statistics, as plain loops (README.md, W1 to W7).

`stats`, `row_mask` and `rollout_ids` are as in select.py. Every function gives (N,) float64: 0 on masked rows, NaN on
unmasked ones with a NaN in a statistic that is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .select import Stats, _column, _n_rows, groups, valid_rows


def _weights(stats: Stats, weights: dict[int, float], row_mask: Tensor | None) -> Tensor:
    out = torch.full((_n_rows(stats),), torch.nan, dtype=torch.float64)
    for i, w in weights.items():
        out[i] = w
    return out if row_mask is None else out.masked_fill(~row_mask, 0.0)


def _share(x: Sequence[float], i: int, largest: float) -> float:
    return x[i] / largest if largest > 0 else 0.0


def _gap(logp_s: float, logp_t: float) -> float:
    """logp_t - logp_s, 0 where both models ban the token."""
    return 0.0 if logp_s == logp_t else logp_t - logp_s


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def teacher_confidence(
    stats: Stats, row_mask: Tensor | None = None, *, floor: float = 0.1, zero_at: float | None = None
) -> Tensor:
    """W1."""
    h, valid = _column(stats, "entropy_t"), valid_rows(stats, ["entropy_t"], row_mask)
    zero_at = max((h[i] for i in valid), default=0.0) if zero_at is None else zero_at
    return _weights(stats, {i: max(floor, 1 - _share(h, i, zero_at)) for i in valid}, row_mask)


def confidence_product(
    stats: Stats, row_mask: Tensor | None = None, *, teacher: float = 1.0, student: float = 1.0
) -> Tensor:
    """W2."""
    valid = valid_rows(stats, ["entropy_s", "entropy_t"], row_mask)
    h_s, h_t = _column(stats, "entropy_s"), _column(stats, "entropy_t")
    top_s, top_t = (max((h[i] for i in valid), default=0.0) for h in (h_s, h_t))
    u = {i: (1 + teacher * (1 - _share(h_t, i, top_t))) * (1 + student * _share(h_s, i, top_s)) for i in valid}
    return _weights(stats, {i: x * len(u) / sum(u.values()) for i, x in u.items()}, row_mask)


def prefix_decay(
    stats: Stats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None, *, gamma: float = 0.5
) -> Tensor:
    """W3. A limit: as d grows without bound at the rows where it is +inf, alike."""
    valid = valid_rows(stats, ["logp_s", "logp_t"], row_mask)
    logp_s, logp_t = _column(stats, "logp_s"), _column(stats, "logp_t")
    weights = {}
    for rows in groups(valid, rollout_ids, "rollout"):
        d = [abs(_gap(logp_s[i], logp_t[i])) for i in rows]
        if math.inf in d:
            d = [float(x == math.inf) for x in d]
        for place, i in enumerate(rows):
            weights[i] = 1 + gamma * (1 - (sum(d[:place]) / sum(d) if sum(d) > 0 else 0.0))
    return _weights(stats, weights, row_mask)


def log_ratio_sigmoid(stats: Stats, row_mask: Tensor | None = None, *, beta: float = 10.0) -> Tensor:
    """W4."""
    logp_s, logp_t = _column(stats, "logp_s"), _column(stats, "logp_t")
    valid = valid_rows(stats, ["logp_s", "logp_t"], row_mask)
    return _weights(stats, {i: _sigmoid(beta * _gap(logp_s[i], logp_t[i])) if beta else 0.5 for i in valid}, row_mask)


def importance_ratio(
    stats: Stats, rollout_logp: Tensor, row_mask: Tensor | None = None, *, low: float = 0.0, high: float = 2.0
) -> Tensor:
    """W5."""
    stats = {**stats, "rollout_logp": rollout_logp}
    logp_s, sampled = _column(stats, "logp_s"), _column(stats, "rollout_logp")
    valid = valid_rows(stats, ["logp_s", "rollout_logp"], row_mask)
    gaps = {i: _gap(sampled[i], logp_s[i]) for i in valid}
    return _weights(stats, {i: min(high, max(low, math.exp(min(gap, 700)))) for i, gap in gaps.items()}, row_mask)


def position_decay(
    stats: Stats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None, *, half_life: float = 1024.0
) -> Tensor:
    """W6."""
    rollouts = groups(valid_rows(stats, [], row_mask), rollout_ids, "rollout")
    weights = {i: 0.5 ** (place / half_life) for rows in rollouts for place, i in enumerate(rows)}
    return _weights(stats, weights, row_mask)


def drift_decay(
    stats: Stats,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    *,
    threshold: float = 0.7,
    drop: float = 0.01,
    base: float = 0.5,
    by: str = "mass_t_on_top_s",
) -> Tensor:
    """W7."""
    x, weights = _column(stats, by), {}
    for rows in groups(valid_rows(stats, [by], row_mask), rollout_ids, "rollout"):
        for place, i in enumerate(rows):
            drifted = sum(x[j] < threshold for j in rows[: place + 1])
            weights[i] = base + max(0.0, 1 - drop * drifted)
    return _weights(stats, weights, row_mask)


def indicator(
    stats: Stats, row_mask: Tensor | None = None, *, by: str, above: float | None = None, below: float | None = None
) -> Tensor:
    """W8, of thresholds that are numbers."""
    x, valid = _column(stats, by), valid_rows(stats, [by], row_mask)
    inside = {i: float((above is None or x[i] > above) and (below is None or x[i] < below)) for i in valid}
    return _weights(stats, inside, row_mask)
