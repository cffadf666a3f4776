"""Row weights that follow from statistics: methods that weigh tokens where a rule would choose among them.

    weight = tip.weights.PrefixDecay()
    tip.distill(student, teacher, labels=tokens, row_weights=weight)             # measured for it, in the same sweeps
    weight(stats, row_mask, rollout_ids)                                         # (N,) fp32, of statistics at hand

A weight is a small frozen object, a pure function of TokenStats. Valid rows are unmasked and not NaN in a statistic it
reads; a masked row weighs 0, any other NaN. Sums over a rollout are of integers: exact in whatever order. W-numbers are
those of reference/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flat_rows, is_int
from tip_kernels.select.rule import (
    Cut,
    check_cut,
    check_measured_top_k,
    check_statistic,
    layout,
    rollout_of_rows,
    run_starts,
    statistic,
    unmasked,
    within,
)
from tip_kernels.stats import TOP_FIELDS, TokenStats

__all__ = [
    "ConfidenceProduct",
    "DriftDecay",
    "ImportanceRatio",
    "Indicator",
    "LogRatioSigmoid",
    "PositionDecay",
    "PrefixDecay",
    "TeacherConfidence",
    "Weight",
]

FIXED_POINT = 2.0**24  # of sums of log-ratios: a resolution of 6e-8 nats, below the noise of fp32 log-probabilities
LARGEST = 2.0**20  # nats of a finite log-ratio in such a sum


@dataclass(frozen=True)
class Weight:
    """A row weight: `w = weight(stats, row_mask=None, rollout_ids=None)`. Subclasses say what they read and compute.

    Attributes:
        needs: frozenset of the TokenStats fields that the weight reads; `distill` measures them.
    """

    needs = frozenset()

    def __call__(self, stats: TokenStats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None) -> Tensor:
        """Weighs rows, on the device, without a graph and without synchronising.

        Args:
            stats: TokenStats with every field in `needs`, (N,) each.
            row_mask: bool (N,) or (B, T), True for trainable tokens. None: all are.
            rollout_ids: int64 (N,) or (B, T), any values, in any order. None: (B, T) statistics hold B rollouts, (N,)
                statistics one.

        Returns:
            (N,) fp32: 0 where masked, NaN where a statistic is.

        Raises:
            ValueError: For a needed field that was not measured, and for a wrong shape, dtype or device.
        """
        with torch.no_grad():
            shape, device = layout(stats, row_mask)
            self._check(stats)
            unmasked_rows = unmasked(row_mask, shape, device)
            group = rollout_of_rows(rollout_ids, shape, device)
            values = {name: statistic(stats, name, type(self).__name__) for name in sorted(self.needs)}
            values |= self._own(shape, device)
            valid = unmasked_rows
            for value in values.values():
                valid = valid & ~value.isnan()
            if valid.numel() == 0:
                return torch.zeros(0, device=device)
            weights = torch.where(valid, self._weigh(values, valid, group).float(), torch.nan)
            return torch.where(unmasked_rows, weights, 0.0)

    def _check(self, stats: TokenStats) -> None:
        """Refuses statistics that were measured in a way that does not fit the weight."""

    def _own(self, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """(N,) columns of the weight's own."""
        return {}

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        """(N,) float, from the (N,) fp32 columns, at least one row; anything where not valid.

        valid  (N,) bool
        group  (N,) int64, the rollout of each row
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TeacherConfidence(Weight):
    """Less where the teacher is unsure, but never nothing: w = max(floor, 1 - entropy_t / zero_at); W1.

    Source: the confidence gate of EGRSD (arXiv 2605.13255), which falls in the teacher's entropy to a floor above 0;
    linear here.

    Args:
        floor: In [0, 1]: the least weight.
        zero_at: The entropy in nats, above 0, at which the weight would be 0 without a floor; None is the largest among
            the valid rows of the batch.

    Raises:
        ValueError: Naming the argument.
    """

    floor: float = 0.1
    zero_at: float | None = None
    needs = frozenset({"entropy_t"})

    def __post_init__(self) -> None:
        expect(0 <= finite_number("floor", self.floor) <= 1, "floor", "a number in [0, 1]", self.floor)
        if self.zero_at is not None:
            finite_number("zero_at", self.zero_at, positive=True)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        entropy = values["entropy_t"].double()
        share = share_of_largest(entropy, valid) if self.zero_at is None else entropy / self.zero_at
        return (1 - share).clamp(min=self.floor)


@dataclass(frozen=True)
class ConfidenceProduct(Weight):
    """More where the teacher is sure and the student is not, 1 in the mean over the batch's valid rows; W2.

        u = (1 + teacher (1 - entropy_t / max entropy_t)) (1 + student entropy_s / max entropy_s)       w = u / mean u

    Both maxima are over the valid rows of the batch; one of 0 makes its quotient 0. Source: the soft token weights of
    FiRe-OPD (arXiv 2606.02684).

    Args:
        teacher: At least 0: what the teacher's confidence adds at most.
        student: At least 0: what the student's uncertainty adds at most.

    Raises:
        ValueError: Naming the argument.
    """

    teacher: float = 1.0
    student: float = 1.0
    needs = frozenset({"entropy_s", "entropy_t"})

    def __post_init__(self) -> None:
        for name in ("teacher", "student"):
            value = getattr(self, name)
            expect(finite_number(name, value) >= 0, name, "a number of at least 0", value)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        sure_t = 1 - share_of_largest(values["entropy_t"].double(), valid)
        unsure_s = share_of_largest(values["entropy_s"].double(), valid)
        product = (1 + self.teacher * sure_t) * (1 + self.student * unsure_s)
        return product * valid.sum() / torch.where(valid, product, 0.0).sum()


@dataclass(frozen=True)
class PrefixDecay(Weight):
    """Less the more both models have disagreed before in the rollout: w_i = 1 + gamma (1 - sum_{j<i} d_j / sum_j d_j).

        d = abs(logp_t - logp_s) of the sampled token, in nats; from 1 + gamma at first to 1; W3

    Sums are over the valid rows of the rollout; where they are 0 every w is 1 + gamma. A token that one model alone
    bans outweighs all finite d; one that both ban has d = 0. Needs labels: the sampled tokens. Source: IW-OPD (arXiv
    2606.22600).

    Args:
        gamma: At least 0.

    Raises:
        ValueError: Naming the argument.
    """

    gamma: float = 0.5
    needs = frozenset({"logp_s", "logp_t"})

    def __post_init__(self) -> None:
        expect(finite_number("gamma", self.gamma) >= 0, "gamma", "a number of at least 0", self.gamma)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        d = torch.where(valid, log_ratio(values).abs(), 0.0)
        infinite = d.isinf()
        fixed = (d.double().masked_fill(infinite, 0.0).clamp(max=LARGEST) * FIXED_POINT).round().long()
        shares = []
        for amount in (fixed, infinite.long()):
            before, total = sums_of_groups(amount, group)
            shares.append((total > 0, before.double() / total.clamp(min=1).double()))
        (_, share), (banned, share_of_banned) = shares
        return 1 + self.gamma * (1 - torch.where(banned, share_of_banned, share))


@dataclass(frozen=True)
class LogRatioSigmoid(Weight):
    """More where the teacher likes the sampled token better than the student: w = sigmoid(beta (logp_t - logp_s)); W4.

    A token that both models ban weighs 1/2. Needs labels: the sampled tokens. Source: the gate of SDAR (arXiv
    2605.15155).

    Args:
        beta: At least 0, per nat.

    Raises:
        ValueError: Naming the argument.
    """

    beta: float = 10.0
    needs = frozenset({"logp_s", "logp_t"})

    def __post_init__(self) -> None:
        expect(finite_number("beta", self.beta) >= 0, "beta", "a number of at least 0", self.beta)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        if self.beta == 0:  # 0 * inf
            return torch.full_like(values["logp_s"], 0.5)
        return torch.sigmoid(self.beta * log_ratio(values).double())


@dataclass(frozen=True, eq=False)
class ImportanceRatio(Weight):
    """Corrects for tokens that an older or another policy sampled: w = clip(exp(logp_s - rollout_logp), low, high); W5.

    Both log-probabilities are of the sampled token, at the same temperature: logp_s at the one that `distill` measures
    at. Needs labels: the sampled tokens. Source: truncated importance sampling (Ionides 2008), as trainers do for the
    log-probabilities of their rollout engines.

    Args:
        rollout_logp: float (N,) or (B, T), what the sampling policy gave; NaN where unknown.
        low: At least 0: the least ratio.
        high: Above low: the largest ratio.

    Raises:
        ValueError: Naming the argument; for rollout_logp's shape and device when called.
    """

    rollout_logp: Tensor
    low: float = 0.0
    high: float = 2.0
    needs = frozenset({"logp_s"})

    def __post_init__(self) -> None:
        ok = isinstance(self.rollout_logp, Tensor) and self.rollout_logp.dtype in FLOATS
        expect(ok, "rollout_logp", "a float32, bfloat16 or float16 tensor (N,) or (B, T)", self.rollout_logp)
        expect(finite_number("low", self.low) >= 0, "low", "a number of at least 0", self.low)
        expect(finite_number("high", self.high) > self.low, "high", "a number above low", self.high)

    def _own(self, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        return {"rollout_logp": flat_rows("rollout_logp", self.rollout_logp, shape, FLOATS, device).detach().float()}

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        ratio = (values["logp_s"].double() - values["rollout_logp"]).exp()
        return torch.where(ratio.isnan(), 1.0, ratio).clamp(self.low, self.high)  # NaN: both ban it


@dataclass(frozen=True)
class PositionDecay(Weight):
    """Less for later tokens: w = 0.5^(position / half_life), of the unmasked rows of each rollout, from 0; W6.

    It reads no statistic. Source: the position bias of on-policy distillation (arXiv 2606.22600) met by position alone.

    Args:
        half_life: Above 0, in tokens.

    Raises:
        ValueError: Naming the argument.
    """

    half_life: float = 1024.0

    def __post_init__(self) -> None:
        finite_number("half_life", self.half_life, positive=True)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        before, _ = sums_of_groups(valid.long(), group)
        return torch.exp2(-before.double() / self.half_life)


@dataclass(frozen=True)
class DriftDecay(Weight):
    """Less after every token at which the models have drifted apart: w = base + max(0, 1 - drop n); W7.

        n = the valid rows of the rollout, up to and with this one, of stats[by] < threshold

    Source: Prune-OPD (arXiv 2605.07804) and its code, which compare the share of common tokens among both models' top
    k. `by` is, unless said, the teacher's probability on the student's top k: the same overlap, in which a token counts
    by the teacher's probability.

    Args:
        threshold: A finite number in the unit of `by`.
        drop: Above 0: what each such token takes.
        base: At least 0: what is left at last.
        by: Name of a TokenStats statistic.
        top_k: An int of at least 1: the k of mass_t_on_top_s.

    Raises:
        ValueError: Naming the argument.
    """

    threshold: float = 0.7
    drop: float = 0.01
    base: float = 0.5
    by: str = "mass_t_on_top_s"
    top_k: int = 16

    def __post_init__(self) -> None:
        finite_number("threshold", self.threshold)
        finite_number("drop", self.drop, positive=True)
        expect(finite_number("base", self.base) >= 0, "base", "a number of at least 0", self.base)
        check_statistic("by", self.by)
        expect(is_int(self.top_k) and self.top_k >= 1, "top_k", "an int of at least 1", self.top_k)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})

    def _check(self, stats: TokenStats) -> None:
        if self.by in TOP_FIELDS:
            check_measured_top_k(stats, self.top_k)

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        drifted = (valid & (values[self.by] < self.threshold)).long()
        before, _ = sums_of_groups(drifted, group)
        return self.base + (1 - self.drop * (before + drifted).double()).clamp(min=0.0)


@dataclass(frozen=True)
class Indicator(Weight):
    """1 where above < x < below, both strict, x = stats[by]; 0 elsewhere; W8.

    The hard gate of entropy-aware OPD (arXiv 2603.07079) is `Indicator("entropy_t", above=0.8)`: see Gated.

    Args:
        by: Name of a TokenStats statistic.
        above: A finite float in the unit of `by`, or ("quantile", q) over the valid rows of the batch, q in [0, 1];
            None is no bound.
        below: The same.

    Raises:
        ValueError: Naming the argument.
    """

    by: str
    above: Cut | None = None
    below: Cut | None = None

    def __post_init__(self) -> None:
        check_statistic("by", self.by)
        for name in ("above", "below"):
            if getattr(self, name) is not None:
                check_cut(name, getattr(self, name))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})

    def _weigh(self, values: dict[str, Tensor], valid: Tensor, group: Tensor) -> Tensor:
        return within(values[self.by], valid, self.above, self.below)


def log_ratio(values: dict[str, Tensor]) -> Tensor:
    """(N,) logp_t - logp_s; 0 where both models ban the token."""
    logp_s, logp_t = values["logp_s"], values["logp_t"]
    return torch.where(logp_s == logp_t, 0.0, logp_t - logp_s)


def share_of_largest(x: Tensor, valid: Tensor) -> Tensor:
    """(N,) x / (the largest x of the valid rows); 0 where that is 0."""
    largest = torch.where(valid, x, 0.0).amax()
    return torch.where(largest > 0, x / largest, 0.0)


def sums_of_groups(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 sums of x (N,) int64 over a row's group: of the rows before it, and of all."""
    order = group.argsort(stable=True)
    ordered, start = x[order], run_starts(group[order])
    last = (start.numel() - 1 - run_starts(group[order].flip(0))).flip(0)
    sums = ordered.cumsum(0)
    until = sums - ordered
    before, total = until - until.take(start), sums.take(last) - until.take(start)
    return torch.empty_like(x).scatter_(0, order, before), torch.empty_like(x).scatter_(0, order, total)
