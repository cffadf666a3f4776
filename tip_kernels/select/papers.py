"""SELECT: rules of other papers and of practice. Each names its source.

A rule whose statistics depend on a k carries it as `top_k`, for whoever measures: token_stats(top_k=rule.top_k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number, is_int
from tip_kernels.select.rule import QuotaRule, Rule, check_measured_top_k, check_statistic, quantile
from tip_kernels.select.tip import TopDivergence


@dataclass(frozen=True)
class TopMargin(TopDivergence):
    """Keeps the rows with the largest margin: score = top-1 minus top-2 logit, of the teacher by default.

    Source: known in practice as `logit_diff`; R30.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        by: "margin_t" or "margin_s"; measured with margins=True.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    by: str = "margin_t"

    def __post_init__(self):
        super().__post_init__()
        expect(self.by in ("margin_t", "margin_s"), "by", "'margin_t' or 'margin_s'", self.by)


@dataclass(frozen=True)
class EntropyGap(QuotaRule):
    """Keeps the rows where the student is more uncertain than the teacher: score = entropy_s - entropy_t, in nats.

    Source: TSD-KD (arXiv 2603.13260), which weights, and selects nothing by it.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        weighted: Adds row_weights sigmoid(score); with keep=1.0 this is the paper's own weighting of all rows.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    needs = frozenset({"entropy_s", "entropy_t"})
    weighted: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect(isinstance(self.weighted, bool), "weighted", "a bool", self.weighted)

    def _scores(self, values, population):
        return values["entropy_s"] - values["entropy_t"]

    def _weights(self, values, population, mask, runner_up):
        return torch.where(mask, torch.sigmoid(self._scores(values, population)), 0.0) if self.weighted else None


@dataclass(frozen=True)
class CrossEntropyRatio(QuotaRule):
    """Keeps the rows whose label surprises the student most beside the teacher: score = CE_s / (CE_t + epsilon).

        CE = -logp of the label, in nats

    A row without a label is not in the population. Where both CE are +inf the score is 1. Source: the `ce_ratio` of
    SE-KD (arXiv 2602.01395) and its code.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        epsilon: A positive float, in nats.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    needs = frozenset({"logp_s", "logp_t"})
    epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        finite_number("epsilon", self.epsilon, positive=True)

    def _scores(self, values, population):
        ce_s, ce_t = (-values[name].double() for name in ("logp_s", "logp_t"))
        return torch.where(ce_s.isinf() & ce_t.isinf(), 1.0, ce_s / (ce_t + self.epsilon)).float()


@dataclass(frozen=True)
class Teachability(QuotaRule):
    """Keeps rows that are wrong, but where the teacher's choice is within the student's reach: score = d c.

        d = stats[by], c = mass_t_on_top_s, the teacher's probability on the student's top_k tokens, both first brought
        to [0, 1]: (x - q05) / (q95 - q05), clipped, with the 0.05 and 0.95 quantiles over the finite values of the
        batch's population; +inf is 1 and a range of zero gives 0

    Source: TA-OPD (arXiv 2605.26844).

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget. 5 %
            unless given, as the paper recommends.
        top_k: An int of at least 1; statistics must be measured with this very top_k.
        by: Name of a TokenStats statistic, "kl_fwd" = KL(teacher || student) by default.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    keep: float | int = 0.05
    top_k: int = 16
    by: str = "kl_fwd"

    def __post_init__(self):
        super().__post_init__()
        _check_top_k(self.top_k)
        check_statistic("by", self.by)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by, "mass_t_on_top_s"})

    def _check(self, stats):
        check_measured_top_k(stats, self.top_k)

    def _scores(self, values, population):
        d, c = (_between_quantiles(values[name], population) for name in (self.by, "mass_t_on_top_s"))
        return (d * c).float()


@dataclass(frozen=True)
class GreedyAgreement(Rule):
    """Keeps the rows where the student's first choice is among the teacher's top_k; it has no quota.

        score = 1 if rank_t_of_argmax_s < top_k, else 0

    Source: the greedy top-k form of SelecTKD (arXiv 2510.24021).

    Args:
        top_k: An int of at least 1; statistics may be measured with a larger one.
        agreeing: False keeps the other rows instead: those where the student's first choice is none of the teacher's.
        other_weight: None drops the rows that were not chosen. A number in (0, 1) keeps them, with this as their weight
            beside row_weights of 1, as the paper does with 0.01; it divides by the number of all rows: in `distill`
            that is normalizer="all".

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    # The mass is NaN on a broken row, where the rank, an int, cannot be.
    needs = frozenset({"rank_t_of_argmax_s", "mass_t_on_top_s"})
    top_k: int = 5
    agreeing: bool = True
    other_weight: float | None = None

    def __post_init__(self):
        _check_top_k(self.top_k)
        expect(isinstance(self.agreeing, bool), "agreeing", "a bool", self.agreeing)
        if self.other_weight is not None:
            inside = 0 < finite_number("other_weight", self.other_weight) < 1
            expect(inside, "other_weight", "None or a number in (0, 1)", self.other_weight)

    def _check(self, stats):
        ok = stats._top_k == 0 or stats._top_k >= self.top_k  # 0: statistics that were not measured here
        expect(ok, "stats", f"statistics measured with a top_k of at least {self.top_k}", stats._top_k)

    def _scores(self, values, population):
        accepted = values["rank_t_of_argmax_s"] < self.top_k
        return (accepted == self.agreeing).float()

    def _choose(self, scores, values, population, group):
        chosen = population & (scores > 0)
        if self.other_weight is None:
            return chosen, None
        return population, torch.where(chosen, 1.0, self.other_weight) * population


@dataclass(frozen=True)
class PositionPrefix(QuotaRule):
    """Keeps the first rows of every rollout: every score is 0, and a tie goes to the earlier token.

    It reads no statistic, so NaN rows may be kept. Source: Fast OPD (arXiv 2602.15260).

    Args:
        keep: An int: that many rows of each rollout (the paper's training length, which it lets grow by 256); or a
            fraction of its unmasked rows, a float in (0, 1].
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    def _scores(self, values, population):
        return torch.zeros_like(population, dtype=torch.float32)


def _between_quantiles(x: Tensor, rows: Tensor) -> Tensor:
    """(x - q05) / (q95 - q05) of the finite values of rows, clipped to [0, 1], (N,) float64; +inf is 1, no range 0."""
    x = x.double()
    finite = rows & x.isfinite()
    low, high = quantile(x, finite, 0.05), quantile(x, finite, 0.95)
    inside = torch.where(high > low, ((x - low) / (high - low)).clamp(0.0, 1.0), 0.0)
    return torch.where(x.isposinf(), 1.0, inside)


def _check_top_k(top_k: object) -> None:
    expect(is_int(top_k) and top_k >= 1, "top_k", "an int of at least 1", top_k)
