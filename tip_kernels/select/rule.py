"""SELECT: which rows to learn from. A rule is a small frozen object, a pure function of TokenStats.

Every rule is one mechanism with another score:

    population   rows that are unmasked and not NaN in a statistic the rule reads
    scores       importance, larger is kept
    quota        max(min_rows, floor(keep m + 1e-6)) rows of every scope group, m = its population, never more than m

Rows are flat, in order b*T + t. Nothing here synchronises with the host, except reading `Kept.row_ids` and scope
"global". R-numbers are those of reference/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from tip_kernels._checks import expect, flat_rows, is_int, refuse
from tip_kernels.distributed import collectives
from tip_kernels.stats import STATISTICS, TOP_FIELDS, TokenStats, how_to_measure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Cut = float | tuple[str, float]  # a threshold: an absolute value, or ("quantile", q) over the population of the batch


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows that a rule chose.

    Attributes:
        mask: (N,) bool, on the device of the statistics; rows in the order b*T + t.
        scores: (N,) fp32, what the rule ranked by, larger is kept; -inf for rows outside its population.
        row_ids: (S,) int64, the kept rows, ascending. The first read synchronises.
        row_weights: (S,) fp32, one weight per entry of row_ids, or None. Reads row_ids.
    """

    mask: Tensor
    scores: Tensor
    _weights: Tensor | None = field(default=None, repr=False)  # (N,) fp32, 0 where not kept

    @cached_property
    def row_ids(self) -> Tensor:
        """(S,) int64, the kept rows, ascending. Its length depends on the data: the first read synchronises."""
        return self.mask.nonzero().squeeze(1)

    @cached_property
    def row_weights(self) -> Tensor | None:
        """(S,) fp32, one weight per entry of row_ids, or None where the rule has no weights. Reads row_ids."""
        return None if self._weights is None else self._weights[self.row_ids]

    def slots(self, capacity: int) -> tuple[Tensor, Tensor]:
        """row_ids in a length that the host knows: kept rows ascending, then spare ones. Never synchronises.

        Args:
            capacity: int in [0, N], at least the number of kept rows (`rule.capacity` bounds it), else the last are
                lost.

        Returns:
            ids (capacity,) int64, and valid (capacity,) bool, False for a spare row.

        Raises:
            ValueError: Naming the argument, for any other capacity.
        """
        n_rows = self.mask.numel()
        expect(is_int(capacity) and 0 <= capacity <= n_rows, "capacity", "an int in [0, {}]", capacity, n_rows)
        spare, ids = (~self.mask).sort(stable=True)
        return ids[:capacity], ~spare[:capacity]


@dataclass(frozen=True)
class Rule:
    """A selection rule: `kept = rule(stats, row_mask=None, rollout_ids=None)`. Subclasses say what they read and score.

    Attributes:
        needs: frozenset of the TokenStats fields that the rule reads.
    """

    needs = frozenset()

    def __and__(self, other: Rule) -> Both:
        """`a & b` chooses by b among the rows that a keeps."""
        return Both(self, other) if isinstance(other, Rule) else NotImplemented

    def __init_subclass__(cls) -> None:
        cls.__hash__ = Rule.__hash__  # set, so that dataclass makes none

    def __hash__(self) -> int:
        """Of class and fields; torch.compile of 2.10 takes it of a rule that a graph has not given its fields yet."""
        return hash((type(self), *(getattr(self, f.name, None) for f in fields(self))))

    def __call__(self, stats: TokenStats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None) -> Kept:
        """Chooses rows, on the device and without synchronising.

        Args:
            stats: TokenStats with every field in `needs`, (N,) each.
            row_mask: bool (N,) or (B, T), True for trainable tokens; others are not in the population. None: all are.
            rollout_ids: int64 (N,) or (B, T), any values, in any order: the rollout of each row, for scope "rollout".
                None: (B, T) statistics hold B rollouts, (N,) statistics one.

        Returns:
            The rows chosen, as a Kept.

        Raises:
            ValueError: For a needed field that is None, and for a wrong shape, dtype or device.
        """
        with torch.no_grad():  # as a decorator of a method it would be beyond torch.compile
            return self._kept(stats, row_mask, rollout_ids)

    def _kept(self, stats: TokenStats, row_mask: Tensor | None, rollout_ids: Tensor | None) -> Kept:
        shape, device = layout(stats, row_mask)
        self._check(stats)
        population = unmasked(row_mask, shape, device)
        group = rollout_of_rows(rollout_ids, shape, device)
        values = {name: statistic(stats, name, type(self).__name__) for name in sorted(self.needs)}
        for value in values.values():
            population = population & ~value.isnan()
        values, population, group, mine = self._of_all_ranks(values, population, group, rollout_ids is not None)
        if population.numel() == 0:
            return Kept(population, torch.zeros(0, device=device))
        # + 0.0 because a sort may tell -0.0 from 0.0.
        scores = torch.where(population, self._scores(values, population), -torch.inf) + 0.0
        mask, weights = self._choose(scores, values, population, group)
        return Kept(mask[mine], scores[mine].float(), None if weights is None else weights[mine])

    def _of_all_ranks(
        self, values: dict[str, Tensor], population: Tensor, group: Tensor, named: bool
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, slice]:
        """values, population and group of the rows that the rule ranks, and which of them are those it was given."""
        return values, population, group, slice(None)

    def capacity(self, n_rows: int, n_groups: int | None = None) -> int:
        """An upper bound of the number of kept rows, from sizes alone.

        Args:
            n_rows: N.
            n_groups: The number of scope groups (rollouts, unless scope is "batch"); None if unknown.
        """
        return n_rows

    def _check(self, stats: TokenStats) -> None:
        """Refuses statistics that were measured in a way that does not fit the rule."""

    def _scores(self, values: dict[str, Tensor], population: Tensor) -> Tensor:
        """(N,) float, from the (N,) fp32 statistics in `needs`; anything outside the population."""
        (score,) = values.values()
        return score

    def _eligible(self, values: dict[str, Tensor], population: Tensor) -> Tensor:
        """(N,) bool, the rows of the population that may be kept."""
        return population

    def _choose(
        self, scores: Tensor, values: dict[str, Tensor], population: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """mask (N,) bool and weights (N,) fp32 or None. Without a quota every eligible row is kept."""
        return self._eligible(values, population), None


@dataclass(frozen=True)
class Both(Rule):
    """Chooses by the second rule among the rows that the first keeps; R43. Written `first & second`.

    The rows that the first keeps are the population of the second: its quotas and normalisations are of them alone, and
    the scores are its own. Weights of both are multiplied.

    Args:
        first: A rule of any scope but "global".
        second: The same.

    Raises:
        ValueError: Naming the argument, for anything else, and for two rules that read top k tokens of another k.
    """

    first: Rule
    second: Rule

    def __post_init__(self):
        for name in ("first", "second"):
            rule = getattr(self, name)
            if not isinstance(rule, Rule) or spans_ranks(rule):
                refuse(name, "a selection rule, of scope 'rollout' or 'batch'", rule)
        tops = [getattr(rule, "top_k", 0) for rule in (self.first, self.second) if rule.needs & TOP_FIELDS]
        if len(set(tops)) > 1:
            refuse("second", "a rule that reads the top_k of the first, {}", tops[1], tops[0])

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    @property
    def top_k(self) -> int:
        """The k of the statistics of top k tokens that either reads, 0 for none."""
        return next((getattr(rule, "top_k", 0) for rule in (self.first, self.second) if rule.needs & TOP_FIELDS), 0)

    def capacity(self, n_rows: int, n_groups: int | None = None) -> int:
        return min(self.first.capacity(n_rows, n_groups), self.second.capacity(n_rows, n_groups))

    def _kept(self, stats, row_mask, rollout_ids):
        among = self.first(stats, row_mask, rollout_ids)
        kept = self.second(stats, among.mask, rollout_ids)
        weights = [w for w in (among._weights, kept._weights) if w is not None]
        if not weights:
            return kept
        product = torch.where(kept.mask, math.prod(weights, start=torch.ones_like(weights[0])), 0.0)
        return Kept(kept.mask, kept.scores, product)


@dataclass(frozen=True)
class KeepAll(Rule):
    """Keeps every unmasked row. It reads no statistic, so NaN rows are kept too; every score is 0 (R29)."""

    def _scores(self, values, population):
        return torch.zeros_like(population, dtype=torch.float32)


@dataclass(frozen=True)
class Threshold(Rule):
    """Keeps the rows with above < x < below, both strict, x = stats[by]. It has no quota, and may keep nothing (R31).

    Args:
        by: Name of a TokenStats statistic; x is also the score.
        above: A finite float in the unit of `by`, or ("quantile", q) over the population of the batch, q in [0, 1];
            None is no bound.
        below: The same.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    by: str = "kl_rev"
    above: Cut | None = None
    below: Cut | None = None

    def __post_init__(self):
        check_statistic("by", self.by)
        for name in ("above", "below"):
            if getattr(self, name) is not None:
                check_cut(name, getattr(self, name))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by})

    def _eligible(self, values, population):
        return within(values[self.by], population, self.above, self.below)


@dataclass(frozen=True)
class QuotaRule(Rule):
    """A rule that keeps the best rows of every scope group, up to a quota (R23); a tie goes to the earlier token.

    Scope "global" chooses what one process would with the rows of all ranks, one rank's after the other's: a tie goes
    to the earlier rank, random rules draw from the first rank's generator. Every rank of the group makes the same
    calls, however many rows it has. It gathers what the rule reads, and synchronises once (distill: twice).

    Args:
        keep: A float in (0, 1], the fraction kept of each group's population, or an int of at least 1, its row budget
            (so 1.0 is every row and 1 is one row).
        scope: What the quota is filled in: "rollout", "batch" or "global", all ranks of `group`: there with
            rollout_ids each rollout has its quota, whose rows may lie on several ranks (context parallel), without
            them there is one. Normalisation is over the batch, with "global" over all ranks'.
        min_rows: int of at least 0, the least quota of a group that has that many rows; 0 is the paper's floor.
        group: torch.distributed process group whose ranks have rows of their own, for "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    keep: float | int
    scope: str = field(default="rollout", kw_only=True)
    min_rows: int = field(default=1, kw_only=True)
    group: ProcessGroup | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self):
        keep, min_rows = self.keep, self.min_rows
        ok = keep >= 1 if isinstance(keep, int) else isinstance(keep, float) and 0 < keep <= 1
        if not ok or isinstance(keep, bool):
            refuse("keep", "a fraction in (0, 1] as a float, or an int of at least 1", keep)
        if self.scope not in ("rollout", "batch", "global"):
            refuse("scope", "'rollout', 'batch' or 'global'", self.scope)
        if not isinstance(min_rows, int) or isinstance(min_rows, bool) or min_rows < 0:
            refuse("min_rows", "an int of at least 0", min_rows)
        if self.group is not None:
            check_group(self.group, self.scope == "global")

    @property
    def fills_quota(self) -> bool:
        """Whether every group keeps as many rows as its quota says, so that sizes alone tell how many are kept."""
        return type(self)._eligible is QuotaRule._eligible

    def _of_all_ranks(self, values, population, group, named):
        if self.scope != "global":
            return values, population, group, slice(None)
        if torch.compiler.is_compiling():
            raise ValueError("scope: expected 'rollout' or 'batch' under torch.compile, got 'global'")
        group = group if named else torch.zeros_like(group)
        request = f"{type(self).__name__}(keep={self.keep}, min_rows={self.min_rows}){' with rollout_ids' * named}"
        columns = [*values.values(), population, *([group] if named else [])]
        (*rest, last), mine = collectives.all_gather_rows(columns, request, self.group)
        population, group = (rest.pop(), last) if named else (last, torch.zeros_like(last, dtype=torch.int64))
        return dict(zip(values, rest, strict=True)), population, group, mine

    def _drawn(self, noise: Tensor) -> Tensor:
        """Noise that all ranks share."""
        return collectives.broadcast(noise, self.group) if self.scope == "global" else noise

    def capacity(self, n_rows: int, n_groups: int | None = None) -> int:
        if self.scope == "global" and not isinstance(self.keep, int):  # one rank may have all the best rows
            return n_rows
        if self.scope == "batch":
            n_groups = 1
        elif n_groups is None:
            n_groups = n_rows
        if isinstance(self.keep, int):
            return min(n_rows, n_groups * max(self.keep, self.min_rows))
        # A group of m rows keeps at most min_rows + keep (m - min_rows) + 1e-6: summed, and 1e-6 for the rounding here.
        bound = self.keep * n_rows + (1 - self.keep) * self.min_rows * n_groups + 1e-6 * (n_groups + 1)
        return min(n_rows, math.floor(bound))

    def _choose(self, scores, values, population, group):
        if self.scope == "batch":
            group = torch.zeros_like(group)
        eligible = self._eligible(values, population)
        mask, runner_up = best_of_groups(scores, eligible, population, group, self.keep, self.min_rows)
        return mask, self._weights(values, population, mask, runner_up)

    def _weights(self, values, population, mask, runner_up) -> Tensor | None:
        """(N,) fp32 row weights, or None; runner_up (N,) is the best score that was left out in the row's group."""
        return None


def spans_ranks(rule: Rule | None) -> TypeGuard[QuotaRule]:
    """Whether the rule ranks the rows of other ranks, too."""
    return isinstance(rule, QuotaRule) and rule.scope == "global"


@dataclass(frozen=True)
class SoftOr(QuotaRule):
    """Keeps rows that are uncertain or wrong: score = h + d - h d = 1 - (1-h)(1-d), h of entropy_s and d of kl_rev.

    kl_rev = KL(student || teacher). Source: the TIP rule (arXiv 2604.14084); R32.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        normalize: How h and d are brought to [0, 1] over the population of the batch.
            "rank": (rows strictly lower) / (n - 1), ties share it; n = 1 gives 1. The default: an outlier of one axis
            leaves the other rows' ranks as they were.
            "minmax": the paper's; entropy is clipped at its 0.98 quantile, then (x - min) / (max - min) over finite
            values; +inf is 1 and a range of zero gives 0. One outlier of kl_rev flattens the rest of d.
        lowest: Keeps the rows of the smallest scores instead, which are then negated: the control of TIP.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    needs = frozenset({"entropy_s", "kl_rev"})
    normalize: str = "rank"
    lowest: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.normalize not in ("rank", "minmax"):
            refuse("normalize", "'rank' or 'minmax'", self.normalize)
        if not isinstance(self.lowest, bool):
            refuse("lowest", "a bool", self.lowest)

    def _scores(self, values, population):
        if self.normalize == "rank":
            h, d = (share_below(values[name], population) for name in ("entropy_s", "kl_rev"))
        else:
            h, d = clipped_entropy(values, population), min_max(values["kl_rev"], population)
        low, high = torch.minimum(h, d), torch.maximum(h, d)
        # Symmetric in h and d, accurate near 0, and rounded only here: rows that tie on paper tie in fp32.
        score = (high + low * (1 - high)).float()
        return -score if self.lowest else score


@dataclass(frozen=True)
class RandomRows(QuotaRule):
    """Keeps rows at random: score = uniform in [0, 1). The control that every other rule has to beat.

    It reads no statistic, so NaN rows may be kept; R34.

    Args:
        keep: Fraction in (0, 1] of each group's population, a float; or an int of at least 1, its row budget.
        generator: torch.Generator on the device of the statistics, advanced by each call; None is the device's default.
        scope: "rollout", "batch" or "global": what the quota is filled in; see QuotaRule.
        min_rows: The least quota of a group that has so many rows, an int of at least 0; 0 is the paper's floor.
        group: Process group of the ranks with rows of their own, for scope "global"; None is all ranks.

    Raises:
        ValueError: Naming the argument, for any other value.
    """

    generator: torch.Generator | None = None

    def __post_init__(self):
        super().__post_init__()
        check_generator(self.generator)

    def _scores(self, values, population):
        check_generator(self.generator, population.device)
        draw = torch.rand(population.shape, generator=self.generator, dtype=torch.float64, device=population.device)
        return self._drawn(draw)


def layout(stats: TokenStats, row_mask: Tensor | None = None) -> tuple[tuple[int, ...], torch.device]:
    """(N,) or (B, T), and the device of the statistics, or of the mask where nothing was measured."""
    if not isinstance(stats, TokenStats):
        refuse("stats", "TokenStats, as token_stats returns them", stats)
    shape = stats._batch_shape
    for name, value in stats._measured.items():
        if name in STATISTICS:
            return shape or (value.numel(),), value.device
    if not shape or not isinstance(row_mask, Tensor):
        refuse("stats", "at least one measured statistic", stats)
    return shape, row_mask.device


def check_measured_top_k(stats: TokenStats, top_k: int) -> None:
    """Refuses statistics of top k tokens of another k; 0 is of statistics that token_stats did not measure."""
    expect(stats._top_k in (0, top_k), "stats", f"statistics measured with top_k={top_k}", stats._top_k)


def unmasked(row_mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if row_mask is None:
        return torch.ones(math.prod(shape), dtype=torch.bool, device=device)
    return flat_rows("row_mask", row_mask, shape, (torch.bool,), device).clone()  # Kept.mask must not alias it


def rollout_of_rows(rollout_ids: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) int64, the rollout of each row."""
    if rollout_ids is not None:
        return flat_rows("rollout_ids", rollout_ids, shape, (torch.int64,), device)
    tokens = math.prod(shape[1:] or shape)
    return torch.arange(math.prod(shape), device=device) // max(tokens, 1)


def statistic(stats: TokenStats, name: str, reader: str) -> Tensor:
    """(N,) fp32."""
    value = stats._measured.get(name)
    if value is None:
        raise ValueError(f"stats: {reader} reads {name}, which was not measured: {how_to_measure(name)} in token_stats")
    return value.detach().float()


def clipped_entropy(values: dict[str, Tensor], population: Tensor) -> Tensor:
    """The paper's h: entropy_s clipped at its 0.98 quantile, then min-max, (N,) float64."""
    entropy = values["entropy_s"].double()
    return min_max(entropy.minimum(quantile(entropy, population, 0.98)), population)


def cut_at(cut: Cut, x: Tensor, rows: Tensor) -> Tensor | float:
    """A threshold as a number to compare fp32 x with."""
    return quantile(x, rows, cut[1]).float() if isinstance(cut, tuple) else float(cut)


def within(x: Tensor, rows: Tensor, above: Cut | None, below: Cut | None) -> Tensor:
    """(N,) bool: those of the rows with above < x < below."""
    inside = rows
    if above is not None:
        inside = inside & (x > cut_at(above, x, rows))
    if below is not None:
        inside = inside & (x < cut_at(below, x, rows))
    return inside


def check_statistic(name: str, value: object) -> None:
    expect(value in STATISTICS, name, f"a TokenStats statistic ({', '.join(STATISTICS)})", value)


def check_cut(name: str, cut: object) -> None:
    if isinstance(cut, tuple):
        ok = len(cut) == 2 and cut[0] == "quantile" and (isinstance(cut[1], float) or is_int(cut[1]))
        expect(ok and 0 <= cut[1] <= 1, name, "a finite number, or ('quantile', q) with q in [0, 1]", cut)
    else:
        ok = (isinstance(cut, float) or is_int(cut)) and math.isfinite(cut)
        expect(ok, name, "a finite number, or ('quantile', q) with q in [0, 1]", cut)


def check_group(group: object, spans: bool) -> None:
    """Refuses a group where nothing spans ranks, and what is none of this rank's."""
    if group is not None:
        expect(spans, "group", "None without scope 'global'", group)
        expect(collectives.is_group(group), "group", "a process group that this rank is in, or None", group)


def check_generator(generator: object, device: torch.device | None = None) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        refuse("generator", "a torch.Generator or None", generator)
    if device is not None:
        expect(generator.device.type == device.type, "generator", f"a torch.Generator on {device}", generator)


# ---- ranking N rows without a host synchronisation
#
# Sets of rows are (N,) bool masks, never index lists, so that every shape is known to the host. N is at least 1; values
# of rows outside the set may be anything. What is derived from counts is float64: N numbers cost nothing.


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
