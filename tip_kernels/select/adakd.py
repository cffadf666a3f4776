"""AdaKD: keep fewer rows while the loss falls, and soften the easy ones (arXiv 2510.11615).

`AdaptiveFocus` holds the ratio of kept rows, `difficulty_temperature` gives every row its temperature, and `adakd`
joins both into arguments of `distill`, with any divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
import torch.distributed
from torch import Tensor

from tip_kernels._checks import expect, finite_number, is_int
from tip_kernels.distributed import collectives
from tip_kernels.select.rule import (
    Kept,
    QuotaRule,
    check_group,
    layout,
    rollout_of_rows,
    run_starts,
    statistic,
    unmasked,
)
from tip_kernels.stats import TokenStats


@dataclass(frozen=True)
class TopHellinger(QuotaRule):
    """Keeps the rows with the largest squared Hellinger distance: score = 1 - sum sqrt(p_s p_t), in [0, 1].

    Source: AdaKD's difficulty (arXiv 2510.11615), squared, which ranks the same; R30.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    needs = frozenset({"hellinger_sq"})


MEDIANS = ("batch", "rollout", "global")


class AdaptiveFocus:
    """The ratio of rows to keep: smaller while the loss falls, larger while it rises (AdaKD's LATF).

        average <- beta * average + (1 - beta) * loss         (at first: the first loss)
        keep <- max(floor, keep (1 - step))   if average < anchor (1 - tolerance)
                min(1, keep (1 + step))       if average > anchor (1 + tolerance)
        anchor <- average                     whenever keep has moved

    for every loss, in this order. During the first `warmup` losses keep stays 1 and the anchor follows the average.

    Source: arXiv 2510.11615, Eqs. 4 to 7, and its released code; R39.

    Args:
        beta: In [0, 1): how much of the average stays.
        tolerance: In [0, 1): how far the average may drift before keep moves.
        step: In (0, 1): by how much keep moves.
        floor: In (0, 1]: the smallest keep; the released code has it, the paper does not.
        warmup: int of at least 0: losses without a move, 5 % of the run in the paper.
        reanchor: "paper": the anchor moves when keep does. "release": as the released code, it moves whenever the
            average has left the band, though keep stays at floor or at 1 (so that keep leaves its floor as soon as the
            loss rises), and the loss after the warmup sets it without being compared.
        group: torch.distributed process group of the data-parallel ranks; None is all of them.

    Attributes:
        keep: The ratio, a float in [floor, 1] to be given to a rule.

    Raises:
        ValueError: Naming the argument.
    """

    def __init__(
        self,
        beta: float = 0.99,
        tolerance: float = 0.05,
        step: float = 0.05,
        floor: float = 0.1,
        warmup: int = 0,
        *,
        reanchor: str = "paper",
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        expect(0 <= finite_number("beta", beta) < 1, "beta", "a number in [0, 1)", beta)
        expect(0 <= finite_number("tolerance", tolerance) < 1, "tolerance", "a number in [0, 1)", tolerance)
        expect(0 < finite_number("step", step) < 1, "step", "a number in (0, 1)", step)
        expect(0 < finite_number("floor", floor) <= 1, "floor", "a number in (0, 1]", floor)
        ok = is_int(warmup) and warmup >= 0
        expect(ok, "warmup", "an int of at least 0", warmup)
        expect(reanchor in ("paper", "release"), "reanchor", "'paper' or 'release'", reanchor)
        ok = group is None or collectives.is_group(group)
        expect(ok, "group", "a process group that this rank is in, or None", group)
        self.beta, self.tolerance, self.step, self.floor, self.warmup = beta, tolerance, step, floor, warmup
        self.reanchor, self.group = reanchor, group
        self.keep = 1.0
        self._seen = 0
        self._average = self._anchor = math.nan

    def update(self, loss: float | Tensor) -> float:
        """Takes in the loss of one optimizer step and returns the new keep.

        Call it once per optimizer step. Under gradient accumulation give it the mean over the micro-batches; under data
        parallelism every rank calls it with its own loss and all get the same keep, from the mean over the ranks.
        A loss that is not finite (on any rank) leaves everything as it was. Skip the steps in which nothing was kept:
        their loss is 0. Reads a tensor's value: synchronises.

        Args:
            loss: The mean loss of the step, a float or a tensor of one element, in any unit.

        Returns:
            The new keep.

        Raises:
            ValueError: For anything but a number or a tensor of one element.
        """
        loss = self._mean_over_ranks(_as_float(loss))
        if not math.isfinite(loss):
            return self.keep
        if self._seen == 0:
            self._average = self._anchor = loss
        self._seen += 1
        self._average = self.beta * self._average + (1 - self.beta) * loss
        released = self.reanchor == "release"
        if self._seen <= self.warmup + released:
            self._anchor = self._average
            return self.keep
        fallen = self._average < self._anchor * (1 - self.tolerance)
        risen = self._average > self._anchor * (1 + self.tolerance)
        keep = self.keep
        if fallen:
            keep = max(self.floor, keep * (1 - self.step))
        elif risen:
            keep = min(1.0, keep * (1 + self.step))
        if keep != self.keep or (released and (fallen or risen)):
            self.keep, self._anchor = keep, self._average
        return self.keep

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint needs: keep, the average, its anchor and how many losses were seen; no settings."""
        return {"keep": self.keep, "average": self._average, "anchor": self._anchor, "seen": self._seen}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continues from a state_dict.

        Args:
            state: What state_dict returned.

        Raises:
            ValueError: For anything else.
        """
        names = ("keep", "average", "anchor", "seen")
        ok = isinstance(state, dict) and set(state) == set(names)
        expect(ok, "state", f"a dict of {', '.join(names)}, as state_dict returns it", state)
        self.keep, self._average, self._anchor, self._seen = (state[name] for name in names)

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={getattr(self, name)}" for name in ("beta", "tolerance", "step", "floor", "warmup", "reanchor")
        )
        return f"AdaptiveFocus({settings}, keep={self.keep:.4g})"

    def _mean_over_ranks(self, loss: float) -> float:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loss
        nccl = "nccl" in str(torch.distributed.get_backend(self.group))
        total = torch.tensor(loss, dtype=torch.float64, device="cuda" if nccl else "cpu")
        torch.distributed.all_reduce(total, group=self.group)
        return total.item() / torch.distributed.get_world_size(self.group)


@torch.no_grad()
def difficulty_temperature(
    stats: TokenStats,
    row_mask: Tensor | None = None,
    strength: float = 0.5,
    base: float = 1.0,
    *,
    scope: str = "batch",
    rollout_ids: Tensor | None = None,
    kept: Kept | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """A temperature for every row, low where the models are far apart and high where they agree (AdaKD's IDTS).

        tau = base exp(-strength (h - m) / (h + m)) = base exp(-strength tanh(ln(s / median s)))

    with h = hellinger_sq, s = sqrt(h) and m = (median s)^2, so that tau lies in base e^(+-strength) and the median row
    gets base. Where h and m are both 0, and in rows that are masked or NaN, tau is base. The median of an even number
    of rows is the lower one. To be used on both models' logits, with the loss times tau^2: `adakd` sets both. Does not
    synchronise. Source: arXiv 2510.11615, Eqs. 9 and 10.

    Args:
        stats: TokenStats with hellinger_sq, measured at temperature 1.
        row_mask: bool (N,) or (B, T), True for rows that count; None: all do.
        strength: A finite float; the paper's c, best at 0.5. Below 0 hard rows get the high temperatures.
        base: A positive float, the temperature of the median row.
        scope: Where the median is taken: "batch" (the paper), "rollout", or "global": the batches of all ranks.
        rollout_ids: int64 (N,) or (B, T), the rollout of each row; without them a (B, T) batch holds B rollouts.
        kept: What a rule returned: the median is then over its kept rows (the released code), not all that count.
        group: Process group for "global", which synchronises; None is all ranks.

    Returns:
        (N,) fp32, detached: the released code lets a gradient through, the paper does not.

    Raises:
        ValueError: Naming the argument.
    """
    strength, base = finite_number("strength", strength), finite_number("base", base, positive=True)
    expect(scope in MEDIANS, "scope", "'batch', 'rollout' or 'global'", scope)
    shape, device = layout(stats)
    h = statistic(stats, "hellinger_sq", "difficulty_temperature")
    rows = unmasked(row_mask, shape, device) & ~h.isnan()
    rollouts = rollout_of_rows(rollout_ids, shape, device)
    check_group(group, scope == "global")
    if h.numel() == 0 and scope != "global":
        return h
    rollouts = rollouts if scope == "rollout" else torch.zeros_like(rollouts)
    population = rows
    if kept is not None:
        ok = isinstance(kept, Kept) and kept.mask.numel() == h.numel()
        expect(ok, "kept", f"what a rule returned for {h.numel()} rows, or None", kept)
        population = rows & kept.mask
    m = _median_of_all_ranks(h, population, group) if scope == "global" else _lower_median(h, population, rollouts)
    hardness = torch.where(rows & (h + m > 0), (h - m) / (h + m), 0.0)
    return base * torch.exp(-strength * hardness)


@dataclass(frozen=True, eq=False)
class DifficultyTemperature:
    """`difficulty_temperature` as `distill` calls it."""

    strength: float
    base: float
    scope: str
    kept_by: TopHellinger | None  # the median is over the rows that it keeps
    row_mask: Tensor | None = None
    rollout_ids: Tensor | None = None
    group: torch.distributed.ProcessGroup | None = None

    def __call__(self, stats: TokenStats) -> Tensor:
        mask = (
            None if self.row_mask is None else self.row_mask.to(layout(stats)[1])
        )  # distill takes one on the CPU, too
        kept = None if self.kept_by is None else self.kept_by(stats, mask, self.rollout_ids)
        where = {"scope": self.scope, "rollout_ids": self.rollout_ids, "group": self.group}
        return difficulty_temperature(stats, mask, self.strength, self.base, **where, kept=kept)

    def over(self, row_mask: Tensor, rollout_ids: Tensor | None) -> DifficultyTemperature:
        """The same of other rows."""
        return replace(self, row_mask=row_mask, rollout_ids=rollout_ids)


class AdaKDArguments(TypedDict):
    """The arguments of `distill` that `adakd` returns."""

    select: TopHellinger
    temperature: Callable[[TokenStats], Tensor]
    temperature_sq: bool
    normalizer: str
    row_mask: Tensor | None
    rollout_ids: Tensor | None


def adakd(
    focus: AdaptiveFocus | float = 1.0,
    *,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    strength: float = 0.5,
    base: float = 1.0,
    scope: str = "rollout",
    median_scope: str = "batch",
    median_of: str = "valid",
    min_rows: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> AdaKDArguments:
    """The arguments with which `distill` learns as AdaKD does, for any divergence.

        loss = 1/|S| sum_S tau_i^2 D(teacher_i at tau_i, student_i at tau_i)    S: the rows of largest hellinger_sq

    A training loop:

        focus = AdaptiveFocus(warmup=100)
        for batch in batches:
            out = distill(student, teacher, divergence=ReverseKL(), **adakd(focus, row_mask=mask))
            out.loss.backward()
            optimizer.step()
            focus.update(out.loss)                           # once per optimizer step, with its mean loss

    Source: arXiv 2510.11615.

    Args:
        focus: An AdaptiveFocus, or a fraction in (0, 1] that stays; 1.0 keeps all rows (temperatures only).
        row_mask: bool (N,) or (B, T), True for trainable tokens; given here because the median is over them, too.
        rollout_ids: int64 (N,) or (B, T), the rollout of each row; likewise.
        strength: A finite float: of the temperatures; 0 leaves them at base (focus only).
        base: A positive float, the temperature of the median row.
        scope: What keep is a fraction of: each "rollout" (the paper), the "batch" (the released code) or "global", as
            a rule's.
        median_scope: "batch" (the paper), "rollout" or "global": the batches of all ranks.
        median_of: "valid": over all trainable rows (the paper), "kept": over the kept ones (the released code).
        min_rows: As a rule's; 0 is the paper's floor.
        group: Process group for "global"; None is all ranks.

    Returns:
        A dict of select, temperature, temperature_sq, normalizer, row_mask and rollout_ids: `distill(..., **adakd())`.

    Raises:
        ValueError: Naming the argument.
    """
    keep = focus.keep if isinstance(focus, AdaptiveFocus) else focus
    ok = isinstance(keep, float) and 0 < keep <= 1
    expect(ok, "focus", "an AdaptiveFocus, or a fraction in (0, 1] as a float", focus)
    finite_number("strength", strength)
    finite_number("base", base, positive=True)
    expect(median_scope in MEDIANS, "median_scope", "'batch', 'rollout' or 'global'", median_scope)
    expect(median_of in ("valid", "kept"), "median_of", "'valid' or 'kept'", median_of)
    check_group(group, "global" in (scope, median_scope))
    rule = TopHellinger(keep, scope=scope, min_rows=min_rows, group=group if scope == "global" else None)
    temperature = DifficultyTemperature(
        strength,
        base,
        median_scope,
        rule if median_of == "kept" else None,
        row_mask,
        rollout_ids,
        group if median_scope == "global" else None,
    )
    return {
        "select": rule,
        "temperature": temperature,
        "temperature_sq": True,
        "normalizer": "kept",
        "row_mask": row_mask,
        "rollout_ids": rollout_ids,
    }


def _median_of_all_ranks(x: Tensor, rows: Tensor, ranks: torch.distributed.ProcessGroup | None) -> Tensor:
    """(N,) the lower median of x over the rows of all ranks."""
    (every, counted), mine = collectives.all_gather_rows([x, rows], "a median of hellinger_sq", ranks)
    return _lower_median(every, counted, torch.zeros_like(every, dtype=torch.int64))[mine] if every.numel() else every


def _lower_median(x: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """(N,) the lower median of x over the rows of each row's group; NaN where the group has none."""
    x = torch.where(rows, x, torch.nan)  # sorted last
    order = x.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    start = run_starts(group[order])
    count = torch.zeros_like(start).scatter_add_(0, start, rows[order].long()).take(start)
    middle = x[order].take(start + (count - 1).clamp(min=0) // 2)
    return torch.empty_like(middle).scatter_(0, order, middle)


def _as_float(loss: float | Tensor) -> float:
    if isinstance(loss, Tensor):
        expect(loss.numel() == 1, "loss", "a number or a tensor of one element", loss)
        return loss.item()
    expect(isinstance(loss, (int, float)) and not isinstance(loss, bool), "loss", "a number", loss)
    return float(loss)
