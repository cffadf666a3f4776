"""Rules over rollouts: whole ones by their mean, and windows of each. R-numbers are those of reference/README.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number, flag, is_int, refuse
from tip_kernels.select.rule import QuotaRule, Rule, check_measured_top_k, check_statistic
from tip_kernels.select.weights import FIXED_POINT, sums_of_groups
from tip_kernels.stats import TOP_FIELDS, TokenStats

LARGEST = 2.0**16  # of a statistic in the sum of a rollout; beyond, +-inf included, rollouts tie


@dataclass(frozen=True)
class FilterRollouts(Rule):
    """Keeps every token of a rollout but of those rollouts whose mean of a statistic is lowest; R44.

    The mean is over the rows that are unmasked and not NaN in the statistic; others are not kept. A tie keeps the
    earlier rollout. What is left can be chosen from by another rule: `FilterRollouts("kl_rev", 0.25) & SoftOr(0.2)`.

    Args:
        by: Name of a TokenStats statistic; its mean is the score of each row.
        drop: A float in [0, 1), the fraction of the batch's rollouts that goes, floor(drop R + 1e-6) of R that have
            such a row; or an int of at least 0, their number, of which one always stays.
        largest: Drops those of the largest mean instead.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    by: str = "kl_rev"
    drop: float | int = 0.25
    largest: bool = False

    def __post_init__(self):
        check_statistic("by", self.by)
        ok = self.drop >= 0 if is_int(self.drop) else isinstance(self.drop, float) and 0 <= self.drop < 1
        if not ok:
            refuse("drop", "a fraction in [0, 1) as a float, or an int of at least 0", self.drop)
        flag("largest", self.largest)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})

    def _choose(self, scores, values, population, group):
        x = values[self.by].double().nan_to_num(nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)
        x = torch.where(population, x * FIXED_POINT, 0.0).round().long()
        before, size = sums_of_groups(population.long(), group)
        mean = sums_of_groups(x, group)[1].double() / size.clamp(min=1)
        first = population & (before == 0)  # a row for each rollout
        count = first.sum()
        if is_int(self.drop):
            drop = (count - 1).clamp(min=0, max=self.drop)
        else:
            drop = torch.floor(self.drop * count.double() + 1e-6).long()
        key = torch.where(first, -mean if self.largest else mean, torch.inf)
        order = key.flip(0).argsort(stable=True)  # the later of a tie goes first
        rank = torch.empty_like(order).scatter_(0, len(order) - 1 - order, torch.arange(len(order), device=key.device))
        dropped = sums_of_groups((first & (rank < drop)).long(), group)[1] > 0
        return population & ~dropped, None

    def _scores(self, values, population):
        return values[self.by]


@dataclass(frozen=True)
class PositionSuffix(QuotaRule):
    """Keeps the last rows of every rollout: score = the row's place among those; R45.

    It reads no statistic, so NaN rows may be kept.

    Args:
        keep: An int: that many rows of each rollout; or a fraction of its unmasked rows, a float in (0, 1].
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    def _scores(self, values, population):
        return population.double().cumsum(0)


@dataclass(frozen=True)
class UntilDrift(Rule):
    """Keeps a rollout's tokens until the models have drifted apart: those before its n-th token of x < threshold; R46.

    x = stats[by] is also the score. Rows that are masked or NaN in it are neither kept nor counted. Source: the window
    of Prune-OPD (arXiv 2605.07804), whose weight is `tip.weights.DriftDecay`.

    Args:
        threshold: A finite number in the unit of `by`.
        by: Name of a TokenStats statistic; by default the teacher's probability on the student's top k.
        n: An int of at least 1: the token of that count is the first that is left out.
        top_k: An int of at least 1: the k of mass_t_on_top_s.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    threshold: float = 0.7
    by: str = "mass_t_on_top_s"
    n: int = 1
    top_k: int = 16

    def __post_init__(self):
        finite_number("threshold", self.threshold)
        check_statistic("by", self.by)
        for name in ("n", "top_k"):
            value = getattr(self, name)
            expect(is_int(value) and value >= 1, name, "an int of at least 1", value)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})

    def _check(self, stats: TokenStats) -> None:
        if self.by in TOP_FIELDS:
            check_measured_top_k(stats, self.top_k)

    def _choose(self, scores, values, population, group):
        drifted = population & (values[self.by] < self.threshold)
        before, _ = sums_of_groups(drifted.long(), group)
        return population & (before + drifted.long() < self.n), None

    def _scores(self, values, population) -> Tensor:
        return values[self.by]
