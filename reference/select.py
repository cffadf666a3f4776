"""Which rows to learn from: every selection rule as a plain loop (README.md, R22 to R36).

`stats` is the dict of `token_stats`; `row_mask` (N,) bool says which rows are trainable (all of them without it);
`rollout_ids` (N,) int64 groups rows into rollouts, in any order (one rollout without them). Numbers are Python's, hence
float64. A `select_*` returns the (N,) bool mask of kept rows, a `*_scores` (N,) float64 scores, NaN on invalid rows.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Stats = dict[str, Tensor | None]
Cut = float | tuple[str, float]  # a threshold in the statistic's unit, or ("quantile", q) of the valid rows
Score = float | Fraction
CLIP_QUANTILE = 0.98  # the top 2 % of entropies are clipped (TIP)


def _column(stats: Stats, name: str) -> list[float]:
    values = stats.get(name)
    if values is None:
        raise ValueError(f"stats must hold {name!r}, got {sorted(k for k, v in stats.items() if v is not None)}")
    return values.double().tolist()


def _n_rows(stats: Stats) -> int:
    return len(next(v for v in stats.values() if v is not None))


def valid_rows(stats: Stats, reads: Sequence[str], row_mask: Tensor | None = None) -> list[int]:
    """R22: the rows that are unmasked and not NaN in a statistic the rule reads, ascending."""
    columns = [_column(stats, name) for name in reads]
    mask = [True] * _n_rows(stats) if row_mask is None else row_mask.tolist()
    return [i for i, wanted in enumerate(mask) if wanted and not any(math.isnan(c[i]) for c in columns)]


def quota(keep: float | int, m: int, min_rows: int = 1) -> int:
    """R23: how many of m valid rows a rule keeps."""
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return min(keep, m)
    if isinstance(keep, float) and 0 < keep <= 1:
        return min(max(min_rows, math.floor(keep * m + 1e-6)), m)
    raise ValueError(f"keep must be a fraction in (0, 1] or an int of at least 1, got {keep!r}")


def groups(valid: Sequence[int], rollout_ids: Tensor | None, scope: str) -> list[list[int]]:
    """R24: the valid rows, split into the groups that have a quota of their own."""
    if scope not in ("rollout", "batch", "global"):
        raise ValueError(f"scope must be 'rollout', 'batch' or 'global', got {scope!r}")
    if rollout_ids is None or scope != "rollout":  # "global" is "batch" on one rank
        return [list(valid)]
    ids = rollout_ids.tolist()
    members: dict[int, list[int]] = {}
    for i in valid:
        members.setdefault(ids[i], []).append(i)
    return list(members.values())


def _mask(n_rows: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(n_rows, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _scores(n_rows: int, scores: dict[int, Score]) -> Tensor:
    out = torch.full((n_rows,), torch.nan, dtype=torch.float64)
    for i, score in scores.items():
        out[i] = float(score)
    return out


def _keep_largest(
    stats: Stats,
    scores: dict[int, Score],
    keep: float | int,
    *,
    eligible: Sequence[int] | None = None,
    rollout_ids: Tensor | None = None,
    scope: str = "rollout",
    min_rows: int = 1,
) -> Tensor:
    """R25: in each group the quota of eligible rows with the largest scores; ties go to the earlier row."""
    candidates = scores.keys() if eligible is None else set(eligible)
    kept = []
    for group in groups(sorted(scores), rollout_ids, scope):
        ranked = sorted((i for i in group if i in candidates), key=lambda i: (-scores[i], i))
        kept += ranked[: quota(keep, len(group), min_rows)]
    return _mask(_n_rows(stats), kept)


def quantile(values: Sequence[float], q: float) -> float:
    """R26: the value at position q (n - 1) of the sorted values, linear between neighbours; values may be +inf."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low if low == high else low + (position - math.floor(position)) * (high - low)


def minmax(values: Sequence[float]) -> list[float]:
    """R27: (x - min) / (max - min) over the finite values; +inf is 1, and 0 where the range is 0."""
    finite = [x for x in values if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def scaled(x: float) -> float:
        if x == math.inf:
            return 1.0
        return (x - low) / (high - low) if high > low else 0.0

    return [scaled(x) for x in values]


def normal_entropy(entropies: Sequence[float]) -> list[float]:
    """R27: entropies clipped at their 0.98 quantile, then min-max."""
    if not entropies:
        return []
    top = quantile(entropies, CLIP_QUANTILE)
    return minmax([min(x, top) for x in entropies])


def rank_share(values: Sequence[float]) -> list[Fraction]:
    """R28: (values strictly lower) / (n - 1), exactly; equal values share it, and a single value gets 1."""
    ordered = sorted(values)
    n = len(ordered)
    return [Fraction(bisect_left(ordered, x), n - 1) if n > 1 else Fraction(1) for x in values]


def _cut(cut: Cut, stats: Stats, name: str, valid: Iterable[int]) -> float:
    """R26: a threshold as a number, rounded to the statistic's dtype so that a row can sit on it exactly."""
    if isinstance(cut, tuple):
        kind, q = cut
        if kind != "quantile" or not 0 <= q <= 1:
            raise ValueError(f"a threshold must be a number or ('quantile', q) with q in [0, 1], got {cut!r}")
        column = _column(stats, name)
        values = [column[i] for i in valid]
        cut = quantile(values, q) if values else math.nan
    return torch.tensor(cut, dtype=stats[name].dtype).item()


def select_all(stats: Stats, *, row_mask: Tensor | None = None) -> Tensor:
    """R29, KeepAll: every unmasked row; it reads no statistic, so NaN rows too."""
    return _mask(_n_rows(stats), valid_rows(stats, [], row_mask))


def top_scores(stats: Stats, by: str, *, row_mask: Tensor | None = None) -> Tensor:
    """R30: the statistic itself."""
    column = _column(stats, by)
    return _scores(len(column), {i: column[i] for i in valid_rows(stats, [by], row_mask)})


def select_top(stats: Stats, keep: float | int, by: str, *, row_mask: Tensor | None = None, **scope) -> Tensor:
    """R30: the rows with the largest values of one statistic; `scope` is rollout_ids, scope and min_rows."""
    column = _column(stats, by)
    return _keep_largest(stats, {i: column[i] for i in valid_rows(stats, [by], row_mask)}, keep, **scope)


def select_top_entropy(stats: Stats, keep: float | int, **scope) -> Tensor:
    """R30, TopEntropy."""
    return select_top(stats, keep, by="entropy_s", **scope)


def select_top_divergence(stats: Stats, keep: float | int, by: str = "kl_rev", **scope) -> Tensor:
    """R30, TopDivergence."""
    return select_top(stats, keep, by=by, **scope)


def select_top_hellinger(stats: Stats, keep: float | int, **scope) -> Tensor:
    """R30, TopHellinger."""
    return select_top(stats, keep, by="hellinger_sq", **scope)


def select_top_margin(stats: Stats, keep: float | int, **scope) -> Tensor:
    """R30, TopMargin: the rows where the teacher's first token leads its second by most."""
    return select_top(stats, keep, by="margin_t", **scope)


def select_threshold(
    stats: Stats,
    by: str,
    *,
    above: Cut | None = None,
    below: Cut | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """R31, Threshold: every valid row with above < statistic < below; no quota."""
    valid = valid_rows(stats, [by], row_mask)
    column = _column(stats, by)
    low = None if above is None else _cut(above, stats, by, valid)
    high = None if below is None else _cut(below, stats, by, valid)
    kept = [i for i in valid if (low is None or column[i] > low) and (high is None or column[i] < high)]
    return _mask(len(column), kept)


def _soft_or(stats: Stats, normalize: str, row_mask: Tensor | None) -> dict[int, Score]:
    valid = valid_rows(stats, ["entropy_s", "kl_rev"], row_mask)
    entropies, divergences = ([_column(stats, name)[i] for i in valid] for name in ("entropy_s", "kl_rev"))
    if normalize == "rank":
        h, d = rank_share(entropies), rank_share(divergences)
    elif normalize == "minmax":
        h, d = normal_entropy(entropies), minmax(divergences)
    else:
        raise ValueError(f"normalize must be 'rank' or 'minmax', got {normalize!r}")
    # As 1 - (1 - h)(1 - d), an h or a d of 1 gives exactly 1: these rows tie, whatever the rounding.
    return {i: 1 - (1 - h_i) * (1 - d_i) for i, h_i, d_i in zip(valid, h, d, strict=True)}


def soft_or_scores(stats: Stats, normalize: str = "rank", *, row_mask: Tensor | None = None) -> Tensor:
    """R32: h + d - h d, with entropy and reverse KL normalised over the valid rows of the batch."""
    return _scores(_n_rows(stats), _soft_or(stats, normalize, row_mask))


def select_soft_or(
    stats: Stats,
    keep: float | int,
    normalize: str = "rank",
    lowest: bool = False,
    *,
    row_mask: Tensor | None = None,
    **scope,
) -> Tensor:
    """R32, SoftOr: normalised over the batch, chosen per scope; rank scores compare exactly, as fractions."""
    scores = _soft_or(stats, normalize, row_mask)
    return _keep_largest(stats, {i: -x for i, x in scores.items()} if lowest else scores, keep, **scope)


def _overconfident(stats: Stats, by: str, row_mask: Tensor | None) -> dict[int, Score]:
    valid = valid_rows(stats, ["entropy_s", by], row_mask)
    entropy, divergence = _column(stats, "entropy_s"), _column(stats, by)
    h = normal_entropy([entropy[i] for i in valid])
    return {
        i: math.inf if divergence[i] == math.inf else divergence[i] * (1 - h_i) for i, h_i in zip(valid, h, strict=True)
    }


def overconfident_scores(stats: Stats, by: str = "kl_fwd", *, row_mask: Tensor | None = None) -> Tensor:
    """R33: divergence times (1 - normalised entropy); +inf stays +inf."""
    return _scores(_n_rows(stats), _overconfident(stats, by, row_mask))


def select_overconfident(
    stats: Stats,
    keep: float | int,
    by: str = "kl_fwd",
    entropy_below: Cut | None = None,
    divergence_above: Cut | None = None,
    *,
    row_mask: Tensor | None = None,
    **scope,
) -> Tensor:
    """R33, Overconfident: the largest scores; where thresholds are given, among the rows within them, and the quota,
    which counts every valid row, may then go unfilled."""
    scores = _overconfident(stats, by, row_mask)
    entropy, divergence = _column(stats, "entropy_s"), _column(stats, by)
    eligible = list(scores)
    if entropy_below is not None:
        below = _cut(entropy_below, stats, "entropy_s", scores)
        eligible = [i for i in eligible if entropy[i] < below]
    if divergence_above is not None:
        above = _cut(divergence_above, stats, by, scores)
        eligible = [i for i in eligible if divergence[i] > above]
    return _keep_largest(stats, scores, keep, eligible=eligible, **scope)


def select_random(
    stats: Stats,
    keep: float | int,
    *,
    generator: torch.Generator | None = None,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    scope: str = "rollout",
    min_rows: int = 1,
) -> Tensor:
    """R34, RandomRows: each set of the quota's size is equally likely; it reads no statistic."""
    kept = []
    for group in groups(valid_rows(stats, [], row_mask), rollout_ids, scope):
        order = torch.randperm(len(group), generator=generator).tolist()
        kept += [group[j] for j in order[: quota(keep, len(group), min_rows)]]
    return _mask(_n_rows(stats), kept)


def sample_entropy_weights(
    stats: Stats, alpha: float = 1.0, gamma: float = 0.0, *, row_mask: Tensor | None = None
) -> Tensor:
    """R35: entropy^alpha hellinger_sq^gamma, up to the constant (ln V)^-alpha; NaN on invalid rows."""
    reads = ["entropy_s", "hellinger_sq"] if gamma else ["entropy_s"]
    entropy = _column(stats, "entropy_s")
    hellinger = _column(stats, "hellinger_sq") if gamma else [1.0] * len(entropy)
    # The floor at 0 is for rounding: an entropy of -1e-9 has no power.
    weight = {i: max(entropy[i], 0.0) ** alpha * hellinger[i] ** gamma for i in valid_rows(stats, reads, row_mask)}
    return _scores(len(entropy), weight)


def _draw_chances(weights: Sequence[float], drawn: Sequence[int]) -> list[float]:
    """R35: the chance of each index to be drawn next; without weight left, all that are left are equally likely."""
    left = [0.0 if i in drawn else w for i, w in enumerate(weights)]
    if sum(left) == 0:
        left = [0.0 if i in drawn else 1.0 for i in range(len(weights))]
    return [w / sum(left) for w in left]


def select_sample_entropy(
    stats: Stats,
    keep: float | int,
    alpha: float = 1.0,
    gamma: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    scope: str = "rollout",
    min_rows: int = 1,
) -> Tensor:
    """R35, SampleEntropy: the quota drawn one by one, without replacement, in proportion to the weights."""
    weights = sample_entropy_weights(stats, alpha, gamma, row_mask=row_mask).tolist()
    kept = []
    for group in groups([i for i, w in enumerate(weights) if not math.isnan(w)], rollout_ids, scope):
        drawn: list[int] = []
        for _ in range(quota(keep, len(group), min_rows)):
            chances = torch.tensor(_draw_chances([weights[i] for i in group], drawn), dtype=torch.float64)
            drawn.append(int(torch.multinomial(chances, 1, generator=generator)))
        kept += [group[j] for j in drawn]
    return _mask(_n_rows(stats), kept)


def inclusion_probabilities(weights: Sequence[float], count: int) -> list[float]:
    """R35: the chance of each row of a tiny group to be among `count` draws, by enumerating every order."""
    included = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), count):
        chance = math.prod(_draw_chances(weights, order[:j])[i] for j, i in enumerate(order))
        for i in order:
            included[i] += chance
    return included


def select_entropy_gap(stats: Stats, keep: float | int, *, row_mask: Tensor | None = None, **scope) -> Tensor:
    """EntropyGap (TSD-KD, arXiv 2603.13260): the largest entropy_s - entropy_t; the weight of a row is its sigmoid."""
    h_s, h_t = _column(stats, "entropy_s"), _column(stats, "entropy_t")
    gap = {i: h_s[i] - h_t[i] for i in valid_rows(stats, ["entropy_s", "entropy_t"], row_mask)}
    return _keep_largest(stats, gap, keep, **scope)


def cross_entropy_ratio_scores(stats: Stats, epsilon: float = 1e-6, *, row_mask: Tensor | None = None) -> Tensor:
    """CrossEntropyRatio (SE-KD, arXiv 2602.01395): CE_s / (CE_t + epsilon) of the labels, 1 where both are +inf."""
    ce_s, ce_t = ([-x for x in _column(stats, name)] for name in ("logp_s", "logp_t"))
    ratio = {
        i: 1.0 if ce_s[i] == ce_t[i] == math.inf else ce_s[i] / (ce_t[i] + epsilon)
        for i in valid_rows(stats, ["logp_s", "logp_t"], row_mask)
    }
    return _scores(len(ce_s), ratio)


def select_cross_entropy_ratio(
    stats: Stats, keep: float | int, epsilon: float = 1e-6, *, row_mask: Tensor | None = None, **scope
) -> Tensor:
    """CrossEntropyRatio: the largest ratios."""
    scores = cross_entropy_ratio_scores(stats, epsilon, row_mask=row_mask).tolist()
    return _keep_largest(stats, {i: x for i, x in enumerate(scores) if not math.isnan(x)}, keep, **scope)


def robust_share(values: Sequence[float]) -> list[float]:
    """(x - q05) / (q95 - q05), clipped to [0, 1]; quantiles (R26) of finite values; +inf is 1, a range of 0 gives 0."""
    finite = [x for x in values if math.isfinite(x)]
    low, high = (quantile(finite, q) for q in (0.05, 0.95)) if finite else (0.0, 0.0)

    def share(x: float) -> float:
        if x == math.inf:
            return 1.0
        return min(max((x - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    return [share(x) for x in values]


def teachability_scores(stats: Stats, by: str = "kl_fwd", *, row_mask: Tensor | None = None) -> Tensor:
    """Teachability (TA-OPD, arXiv 2605.26844): a divergence times the teacher's mass on the student's top-k tokens."""
    valid = valid_rows(stats, [by, "mass_t_on_top_s"], row_mask)
    wrong, reachable = (robust_share([_column(stats, name)[i] for i in valid]) for name in (by, "mass_t_on_top_s"))
    return _scores(_n_rows(stats), {i: d * c for i, d, c in zip(valid, wrong, reachable, strict=True)})


def select_teachability(
    stats: Stats, keep: float | int = 0.05, by: str = "kl_fwd", *, row_mask: Tensor | None = None, **scope
) -> Tensor:
    """Teachability: the largest scores, normalised over the batch."""
    scores = teachability_scores(stats, by, row_mask=row_mask).tolist()
    return _keep_largest(stats, {i: x for i, x in enumerate(scores) if not math.isnan(x)}, keep, **scope)


def select_greedy_agreement(
    stats: Stats, top_k: int = 5, agreeing: bool = True, *, row_mask: Tensor | None = None
) -> Tensor:
    """GreedyAgreement (SelecTKD, arXiv 2510.24021): the student's argmax is (not) in the teacher's top_k."""
    rank = _column(stats, "rank_t_of_argmax_s")
    valid = valid_rows(stats, ["rank_t_of_argmax_s", "mass_t_on_top_s"], row_mask)
    return _mask(len(rank), [i for i in valid if (rank[i] < top_k) == agreeing])


def select_position_prefix(stats: Stats, keep: float | int, *, row_mask: Tensor | None = None, **scope) -> Tensor:
    """PositionPrefix (Fast OPD, arXiv 2602.15260): the earliest unmasked rows; it reads no statistic."""
    return _keep_largest(stats, {i: -i for i in valid_rows(stats, [], row_mask)}, keep, **scope)


def select_position_suffix(stats: Stats, keep: float | int, *, row_mask: Tensor | None = None, **scope) -> Tensor:
    """R45: the latest unmasked rows; it reads no statistic."""
    return _keep_largest(stats, {i: i for i in valid_rows(stats, [], row_mask)}, keep, **scope)


def filter_rollouts(
    stats: Stats,
    by: str,
    drop: float | int,
    *,
    largest: bool = False,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
) -> Tensor:
    """R44: the rows of rollouts whose mean is not among the lowest (or largest)."""
    x, bound = _column(stats, by), 2.0**16
    rollouts = groups(valid_rows(stats, [by], row_mask), rollout_ids, "rollout")
    rollouts = [rows for rows in rollouts if rows]
    means = [Fraction(sum(Fraction(max(-bound, min(bound, x[i]))) for i in rows)) / len(rows) for rows in rollouts]
    some = len(rollouts)
    count = max(0, min(drop, some - 1)) if isinstance(drop, int) else math.floor(drop * some + 1e-6)
    order = sorted(range(len(rollouts)), key=lambda r: (-means[r] if largest else means[r], -rollouts[r][0]))
    return _mask(len(x), [i for r in order[count:] for i in rollouts[r]])


def until_drift(
    stats: Stats,
    threshold: float,
    by: str,
    n: int = 1,
    *,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
) -> Tensor:
    """R46: of each rollout, the rows before its n-th one below the threshold."""
    x, kept = _column(stats, by), []
    for rows in groups(valid_rows(stats, [by], row_mask), rollout_ids, "rollout"):
        seen = 0
        for i in rows:
            seen += x[i] < threshold
            if seen < n:
                kept.append(i)
    return _mask(len(x), kept)


def quadrants(stats: Stats, row_mask: Tensor | None = None, *, entropy: Cut = 0.3, divergence: Cut = 0.1) -> Tensor:
    """R36: (N,) int8, 1 uncertain and wrong, 2 uncertain, 3 overconfident and wrong, 4 solved, 0 masked or NaN."""
    valid = valid_rows(stats, ["entropy_s", "kl_rev"], row_mask)
    h, d = _column(stats, "entropy_s"), _column(stats, "kl_rev")
    h_cut, d_cut = _cut(entropy, stats, "entropy_s", valid), _cut(divergence, stats, "kl_rev", valid)
    out = torch.zeros(len(h), dtype=torch.int8)
    for i in valid:
        low_entropy, high_divergence = h[i] < h_cut, d[i] > d_cut
        out[i] = {(False, True): 1, (False, False): 2, (True, True): 3, (True, False): 4}[low_entropy, high_divergence]
    return out
