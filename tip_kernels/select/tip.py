"""SELECT: the rules of TIP, Token Importance in on-Policy distillation (arXiv 2604.14084), beside SoftOr.

R-numbers are those of reference/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tip_kernels._checks import expect, finite_number
from tip_kernels.select.rule import (
    Cut,
    QuotaRule,
    check_cut,
    check_generator,
    check_statistic,
    clipped_entropy,
    cut_at,
)


@dataclass(frozen=True)
class TopEntropy(QuotaRule):
    """Keeps the rows with the largest student entropy: score = entropy_s, in nats.

    Source: TIP's entropy axis (arXiv 2604.14084), there sampled: see SampleEntropy; R30.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    needs = frozenset({"entropy_s"})


@dataclass(frozen=True)
class TopDivergence(QuotaRule):
    """Keeps the rows with the largest stats[by]: score = kl_rev = KL(student || teacher) by default, in nats.

    Source: the divergence-only rule of TIP (arXiv 2604.14084); R30.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        by: Name of any TokenStats statistic, for instance "kl_fwd" = KL(teacher || student).
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    by: str = "kl_rev"

    def __post_init__(self):
        super().__post_init__()
        check_statistic("by", self.by)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})


@dataclass(frozen=True)
class Overconfident(QuotaRule):
    """Keeps rows that are confident and wrong (Q3): score = stats[by] * (1 - h), h as in SoftOr's "minmax".

    A divergence of +inf scores +inf. The paper has no thresholds. With any, only rows on the right side of it are
    chosen from; the quota still counts the whole population, so fewer rows may be kept, also none: min_rows forces no
    row in.

    Source: the Q3-only rule of TIP (arXiv 2604.14084); R33.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        by: Name of a TokenStats statistic, "kl_fwd" = KL(teacher || student) by default: it sees teacher mass that the
            student ignores.
        entropy_below: None, or only rows of a smaller entropy_s: a finite float in nats, or ("quantile", q) over the
            population of the batch, q in [0, 1].
        divergence_above: None, or only rows of a larger stats[by], likewise.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    by: str = "kl_fwd"
    entropy_below: Cut | None = None
    divergence_above: Cut | None = None

    def __post_init__(self):
        super().__post_init__()
        check_statistic("by", self.by)
        for name in ("entropy_below", "divergence_above"):
            if getattr(self, name) is not None:
                check_cut(name, getattr(self, name))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy_s", self.by})

    @property
    def fills_quota(self) -> bool:
        return self.entropy_below is None and self.divergence_above is None

    def _scores(self, values, population):
        d = values[self.by]
        return torch.where(d.isinf(), d, d * (1 - clipped_entropy(values, population))).float()

    def _eligible(self, values, population):
        entropy, d, eligible = values["entropy_s"], values[self.by], population
        if self.entropy_below is not None:
            eligible = eligible & (entropy < cut_at(self.entropy_below, entropy, population))
        if self.divergence_above is not None:
            eligible = eligible & (d > cut_at(self.divergence_above, d, population))
        return eligible


@dataclass(frozen=True)
class SampleEntropy(QuotaRule):
    """Samples rows without replacement, each draw with p proportional to w = (entropy_s/ln V)^alpha hellinger_sq^gamma.

        score = log w + Gumbel noise, the largest first. Rows with w = 0 are drawn last, uniformly.

    hellinger_sq replaces the Jensen-Shannon divergence / ln 2 of the authors' code, which no single pass can measure:
    ln2 H2 <= JSD <= H2. 0^0 is 1. Constant factors of w cancel, so ln V is left out and the largest w counts as 1.

    Source: TIP (arXiv 2604.14084) and its code; Gumbel top-k of Kool et al. 2019 (arXiv 1903.06059); weights of
    priority sampling, Duffield et al. 2007; R35.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        alpha: A finite float of at least 0.
        gamma: The same; hellinger_sq is read, and a teacher needed, only if gamma > 0.
        generator: torch.Generator on the device of the statistics, advanced by each call; None is the device's default.
        unbiased: Adds row_weights 1 / (1 - exp(-exp(log w - kappa))), kappa the best score left out in the group (its
            (quota + 1)-th largest); 1 where nothing was left out. Then sum(row_weights * x) over the kept rows is on
            average the sum of x over the population, apart from rows with w = 0.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    alpha: float = 1
    gamma: float = 0
    generator: torch.Generator | None = None
    unbiased: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha", "gamma"):
            value = finite_number(name, getattr(self, name))
            expect(value >= 0, name, "a finite number of at least 0", value)
        check_generator(self.generator)
        expect(isinstance(self.unbiased, bool), "unbiased", "a bool", self.unbiased)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy_s", "hellinger_sq"} if self.gamma > 0 else {"entropy_s"})

    def _log_weights(self, values, population):
        log_w = torch.xlogy(self.alpha, values["entropy_s"].double().clamp(min=0))
        if self.gamma > 0:
            log_w = log_w + torch.xlogy(self.gamma, values["hellinger_sq"].double().clamp(min=0))
        largest = torch.where(population, log_w, -torch.inf).amax()
        # Logs of two positive fp32 numbers differ by less than 200, Gumbel noise in float64 by less than 64.
        zero = -200.0 * (self.alpha + self.gamma) - 64.0
        return torch.where(log_w > -torch.inf, log_w - largest, zero)

    def _scores(self, values, population):
        check_generator(self.generator, population.device)
        log_w = self._log_weights(values, population)
        return log_w - self._drawn(torch.empty_like(log_w).exponential_(generator=self.generator)).log()

    def _weights(self, values, population, mask, runner_up):
        if not self.unbiased:
            return None
        inclusion = -torch.expm1(-torch.exp(self._log_weights(values, population) - runner_up))
        return torch.where(mask, 1 / inclusion, 0.0).float()
