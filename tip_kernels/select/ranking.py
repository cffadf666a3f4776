"""Ranking N rows without a host synchronisation: normalise over a set of rows, and pick the best rows of every group.

Sets of rows are (N,) bool masks, never index lists, so that every shape is known to the host. N is at least 1 here.
Values of rows outside the set may be anything. What is derived from counts is float64: N numbers cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantile(x: Tensor, rows: Tensor, q: float) -> Tensor:
    """The q-quantile of x over rows, linear between order statistics: () float64; +inf where there are no rows."""
    ordered = torch.where(rows, x, torch.inf).double().sort().values
    position = (q * (rows.sum().double() - 1)).clamp(min=0)
    lower, upper = position.floor(), position.ceil()
    # take, because indexing with a () tensor reads it on the host.
    below, above = ordered.take(lower.long()), ordered.take(upper.long())
    part = position - lower
    return torch.where(below == above, below, (1 - part) * below + part * above)


def min_max(x: Tensor, rows: Tensor) -> Tensor:
    """(x - min) / (max - min) over the finite values of rows, (N,) float64; +inf is 1 and a range of zero gives 0."""
    x = x.double()
    finite = rows & x.isfinite()
    low = torch.where(finite, x, torch.inf).amin()
    width = torch.where(finite, x, -torch.inf).amax() - low
    return torch.where(x.isposinf(), 1.0, torch.where(width > 0, (x - low) / width, 0.0))


def share_below(x: Tensor, rows: Tensor) -> Tensor:
    """(number of rows strictly lower) / (n - 1) among the n rows, (N,) float64; n = 1 gives 1."""
    ordered, order = torch.where(rows, x, torch.inf).sort()
    below = torch.empty_like(order).scatter_(0, order, run_starts(ordered))
    n = rows.sum()
    return torch.where(n > 1, below.double() / (n - 1), 1.0)


def best_of_groups(
    scores: Tensor, eligible: Tensor, population: Tensor, group: Tensor, keep: float | int, min_rows: int
) -> tuple[Tensor, Tensor]:
    """The quota of every group, filled with its best eligible rows; a tie goes to the earlier row.

        quota = min(m, max(min_rows, floor(keep m + 1e-6))), or min(m, max(min_rows, keep)) for an int keep

    where m is the population of the group.

    scores                (N,) float
    eligible, population  (N,) bool, the first within the second
    group                 (N,) int64, any values

    Returns mask (N,) bool and runner_up (N,): the best score left out in the row's group, -inf where none was.
    """
    n_rows = scores.numel()
    order = scores.argsort(descending=True, stable=True)
    order = order[(~eligible[order]).argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]  # group by group, eligible rows first, best first

    start = run_starts(group[order])
    m = torch.zeros_like(start).scatter_add_(0, start, population[order].long()).take(start)
    wanted = m.clamp(max=min(keep, n_rows)) if isinstance(keep, int) else (m.double() * keep + 1e-6).floor().long()
    quota = wanted.clamp(min=min(min_rows, n_rows)).minimum(m)

    kept = (torch.arange(n_rows, device=scores.device) - start < quota) & eligible[order]
    next_best = torch.where(eligible, scores, -torch.inf)[order].take((start + quota).clamp(max=n_rows - 1))
    next_best = torch.where(quota < m, next_best, -torch.inf)
    return torch.empty_like(kept).scatter_(0, order, kept), torch.empty_like(next_best).scatter_(0, order, next_best)


def run_starts(ordered: Tensor) -> Tensor:
    """For every position of an ordered (N,) tensor, the position at which its run of equal values starts."""
    position = torch.arange(ordered.numel(), device=ordered.device)
    same = torch.zeros_like(position, dtype=torch.bool)
    same[1:] = ordered[1:] == ordered[:-1]
    return torch.where(same, 0, position).cummax(0).values
