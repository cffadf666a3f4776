"""SELECT: every rule against the reference's plain loops, and the claims that no single number shows."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tip_kernels as sel
from reference import select as ref
from tip_kernels.select.rule import QuotaRule
from tip_kernels.stats import TokenStats

INF, NAN = math.inf, math.nan
FIELDS = ("entropy_s", "kl_fwd", "kl_rev", "hellinger_sq", "margin_t", "logp_s")
INT64 = torch.iinfo(torch.int64)
checked = settings(deadline=None, max_examples=60, derandomize=True)

DETERMINISTIC = [
    sel.KeepAll(),
    sel.Threshold(above=0.25, below=2.0),
    sel.Threshold("logp_s", below=("quantile", 0.5)),
    sel.TopEntropy(0.5),
    sel.TopDivergence(0.5),
    sel.TopDivergence(3, by="logp_s"),
    sel.TopHellinger(0.5),
    sel.TopMargin(0.5),
    sel.SoftOr(0.5),
    sel.SoftOr(0.5, normalize="minmax"),
    sel.SoftOr(0.5, lowest=True),
    sel.Overconfident(0.5),
    sel.Overconfident(0.5, "kl_rev", ("quantile", 0.6), ("quantile", 0.3)),
]
RANDOM = [sel.RandomRows(0.5), sel.SampleEntropy(0.5), sel.SampleEntropy(0.5, gamma=1.0, unbiased=True)]
EVERY = DETERMINISTIC + RANDOM


def stats_of(shape=(), **columns) -> TokenStats:
    columns = {name: torch.as_tensor(values, dtype=torch.float32).flatten() for name, values in columns.items()}
    return TokenStats(**columns, _vocab=100, _batch_shape=shape)


def random_stats(*shape: int, seed: int = 0) -> TokenStats:
    """Continuous values, with some +inf divergences."""
    g = torch.Generator().manual_seed(seed)
    columns = {name: torch.rand(shape, generator=g) for name in FIELDS}
    columns["kl_fwd"][torch.rand(shape, generator=g) < 0.1] = INF
    columns["logp_s"] = -columns["logp_s"]
    return stats_of(shape, **columns)


def kept_ids(rule, stats, **where) -> list[int]:
    return rule(stats, **where).row_ids.tolist()


@st.composite
def batches(draw, least: int = 1):
    """A few rows with many ties, NaN, +inf, masked rows and rollouts that are not contiguous."""
    n = draw(st.integers(least, 24))
    grid = [k / 8 for k in range(17)]
    columns = {}
    for name in FIELDS:
        odd = [NAN, INF] if name.startswith("kl") else [NAN]
        values = st.sampled_from(grid[:9] if name == "hellinger_sq" else grid) | st.sampled_from(odd)
        columns[name] = draw(st.lists(values, min_size=n, max_size=n))
    where = {}
    if draw(st.booleans()):
        where["row_mask"] = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if draw(st.booleans()):
        names = st.sampled_from([0, 7, -3, INT64.max, INT64.min])
        where["rollout_ids"] = torch.tensor(draw(st.lists(names, min_size=n, max_size=n)))
    return stats_of(**columns), where


@st.composite
def quotas(draw):
    """keep, and the other arguments of a quota."""
    keep = draw(st.sampled_from([0.1, 0.29, 0.5, 2 / 3, 1.0, 1, 2, 5, 10**30]))
    least = draw(st.integers(0, 1 if isinstance(keep, int) else 3))
    return keep, {"scope": draw(st.sampled_from(["rollout", "batch"])), "min_rows": least}


def as_dict(stats: TokenStats) -> dict[str, torch.Tensor]:
    return {name: getattr(stats, name) for name in FIELDS}


def assert_same_up_to_rounding(mask, expected, scores, rollout_ids, scope) -> None:
    """The same number of rows a group, with the same scores: which of the tied rows are kept may hang on a rounding."""
    ids = rollout_ids if rollout_ids is not None and scope == "rollout" else torch.zeros(len(mask), dtype=torch.int64)
    for group in ids.unique():
        ours, theirs = (scores[m & (ids == group)].sort().values for m in (mask, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Against the reference


@checked
@given(batches(), quotas())
def test_top_rules_agree_with_the_reference(batch, quota):
    (stats, where), (keep, how) = batch, quota
    for rule, by in [
        (sel.TopEntropy(keep, **how), "entropy_s"),
        (sel.TopDivergence(keep, **how), "kl_rev"),
        (sel.TopDivergence(keep, by="kl_fwd", **how), "kl_fwd"),
        (sel.TopHellinger(keep, **how), "hellinger_sq"),
        (sel.TopMargin(keep, **how), "margin_t"),
    ]:
        kept = rule(stats, **where)
        expected = ref.select_top(as_dict(stats), keep, by=by, **where, **how)
        assert torch.equal(kept.mask, expected), rule
        scores = ref.top_scores(as_dict(stats), by, row_mask=where.get("row_mask")).nan_to_num(nan=-INF, posinf=INF)
        assert torch.equal(kept.scores, scores.float())


@checked
@given(batches(), quotas(), st.sampled_from(["rank", "minmax"]))
def test_soft_or_agrees_with_the_reference(batch, quota, normalize):
    (stats, where), (keep, how) = batch, quota
    kept = sel.SoftOr(keep, normalize, **how)(stats, **where)
    expected = ref.select_soft_or(as_dict(stats), keep, normalize, **where, **how)
    scores = ref.soft_or_scores(as_dict(stats), normalize, row_mask=where.get("row_mask"))
    torch.testing.assert_close(kept.scores, scores.nan_to_num(nan=-INF).float(), rtol=1e-6, atol=0)
    if normalize == "rank":
        assert torch.equal(kept.mask, expected)
    else:
        assert_same_up_to_rounding(kept.mask, expected, scores, where.get("rollout_ids"), how["scope"])


cuts = st.sampled_from([0.0, 0.25, 0.5, 1.0, ("quantile", 0), ("quantile", 0.3), ("quantile", 0.5), ("quantile", 1.0)])


@checked
@given(batches(), quotas(), cuts | st.none(), cuts | st.none(), st.sampled_from(["kl_fwd", "kl_rev"]))
def test_overconfident_agrees_with_the_reference(batch, quota, entropy, divergence, by):
    (stats, where), (keep, how) = batch, quota
    kept = sel.Overconfident(keep, by, entropy, divergence, **how)(stats, **where)
    expected = ref.select_overconfident(as_dict(stats), keep, by, entropy, divergence, **where, **how)
    scores = ref.overconfident_scores(as_dict(stats), by, row_mask=where.get("row_mask"))
    torch.testing.assert_close(kept.scores, scores.nan_to_num(nan=-INF, posinf=INF).float(), rtol=1e-6, atol=0)
    assert_same_up_to_rounding(kept.mask, expected, scores, where.get("rollout_ids"), how["scope"])


@checked
@given(batches(), cuts | st.none(), cuts | st.none(), st.sampled_from(FIELDS))
def test_threshold_agrees_with_the_reference(batch, above, below, by):
    stats, where = batch
    kept = sel.Threshold(by, above, below)(stats, **where)
    expected = ref.select_threshold(as_dict(stats), by, above=above, below=below, row_mask=where.get("row_mask"))
    assert torch.equal(kept.mask, expected)


@checked
@given(batches(), cuts, cuts)
def test_quadrants_agree_with_the_reference(batch, entropy, divergence):
    stats, where = batch
    row_mask = where.get("row_mask")
    ours = sel.quadrants(stats, row_mask, entropy=entropy, divergence=divergence)
    assert ours.dtype == torch.int8
    assert torch.equal(ours, ref.quadrants(as_dict(stats), row_mask, entropy=entropy, divergence=divergence))


@checked
@given(batches(), quotas())
def test_random_rules_keep_as_many_rows_of_every_rollout_as_the_reference(batch, quota):
    (stats, where), (keep, how) = batch, quota
    ids = where.get("rollout_ids", torch.zeros(stats.entropy_s.numel(), dtype=torch.int64))
    g = torch.Generator().manual_seed(0)
    for ours, theirs in [
        (sel.RandomRows(keep, g, **how), ref.select_random(as_dict(stats), keep, **where, **how)),
        (sel.SampleEntropy(keep, generator=g, **how), ref.select_top_entropy(as_dict(stats), keep, **where, **how)),
    ]:
        mask = ours(stats, **where).mask
        groups = ids.unique() if how["scope"] == "rollout" else []
        assert [int(mask[ids == i].sum()) for i in groups] == [int(theirs[ids == i].sum()) for i in groups]
        assert mask.sum() == theirs.sum()
        assert not (mask & ~where.get("row_mask", torch.ones_like(mask))).any()


# Hand examples


def test_top_entropy_keeps_the_largest_of_each_rollout():
    stats = stats_of((2, 4), entropy_s=[1.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    assert kept_ids(sel.TopEntropy(0.5), stats) == [1, 2, 4, 5]
    assert kept_ids(sel.TopEntropy(0.5, scope="batch"), stats) == [4, 5, 6, 7]
    assert kept_ids(sel.TopEntropy(0.5), stats_of(entropy_s=stats.entropy_s)) == [4, 5, 6, 7]
    assert kept_ids(sel.TopEntropy(0.5), stats, row_mask=torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()) == [2, 7]


def test_int_keep_is_a_row_budget_for_each_rollout():
    stats = stats_of((2, 3), entropy_s=[1.0, 2.0, 3.0, 6.0, 5.0, 4.0])
    assert kept_ids(sel.TopEntropy(1), stats) == [2, 3]
    assert kept_ids(sel.TopEntropy(2), stats) == [1, 2, 3, 4]
    assert kept_ids(sel.TopEntropy(2, scope="batch"), stats) == [3, 4]
    assert kept_ids(sel.TopEntropy(1, min_rows=2), stats) == [1, 2, 3, 4]
    assert kept_ids(sel.TopEntropy(100), stats) == [0, 1, 2, 3, 4, 5]


def test_fraction_of_one_keeps_everything_and_int_one_keeps_one_row():
    stats = stats_of(entropy_s=[3.0, 1.0, 2.0])
    assert kept_ids(sel.TopEntropy(1.0), stats) == [0, 1, 2]
    assert kept_ids(sel.TopEntropy(1), stats) == [0]


def test_quota_is_the_exact_floor_of_keep_times_the_population():
    sizes = torch.arange(1, 301)
    ids = sizes.repeat_interleave(sizes)
    stats = stats_of(entropy_s=torch.zeros(len(ids)))
    for percent in (1, 7, 10, 29, 33, 50, 57, 58, 70, 99, 100):
        mask = sel.TopEntropy(percent / 100, min_rows=0)(stats, rollout_ids=ids).mask
        kept = torch.zeros(301, dtype=torch.int64).index_add_(0, ids, mask.long())[1:]
        assert kept.tolist() == [math.floor(Fraction(percent * m, 100)) for m in sizes.tolist()]


def test_min_rows_of_zero_may_leave_a_rollout_empty():
    stats = stats_of(entropy_s=[1.0, 2.0, 3.0])
    assert kept_ids(sel.TopEntropy(0.1, min_rows=0), stats) == []
    assert kept_ids(sel.TopEntropy(0.1), stats) == [2]
    assert kept_ids(sel.TopEntropy(0.1, min_rows=5), stats) == [0, 1, 2]


def test_ties_go_to_the_earlier_token():
    flat = stats_of(entropy_s=[0.0, -0.0, 0.0, -0.0])
    assert kept_ids(sel.TopEntropy(0.5), flat) == [0, 1]
    assert not sel.TopEntropy(0.5)(flat).scores.signbit().any()
    assert kept_ids(sel.TopEntropy(0.5), flat, rollout_ids=torch.tensor([5, -5, 5, -5])) == [0, 1]
    # h and d change places in rows 0 and 2: their Soft-OR scores tie, below row 3's.
    stats = stats_of(entropy_s=[0.1, 0.0, 0.2, 0.3], kl_rev=[0.2, 0.0, 0.1, 0.3])
    assert kept_ids(sel.SoftOr(2), stats) == [0, 3]
    assert kept_ids(sel.SoftOr(2, "minmax"), stats_of(entropy_s=[0, 1, 3], kl_rev=[0, 3, 1])) == [1, 2]


def test_ties_of_products_of_ranks_go_to_the_earlier_token():
    # Of 7 rows, h = 5/6, d = 0 and h = 4/6, d = 3/6 both score 5/6.
    entropy, divergence = [5, 4, 6, 0, 1, 2, 3], [0, 3, 6, 1, 2, 4, 5]
    for rows in (slice(None), slice(None, None, -1)):
        stats = stats_of(entropy_s=entropy[rows], kl_rev=divergence[rows])
        scores = sel.SoftOr(1)(stats).scores
        first, second = (0, 1) if rows.step is None else (6, 5)
        assert scores[first] == scores[second] == torch.tensor(5 / 6)


def test_infinite_scores_rank_first_and_minus_infinite_ones_last_but_in_the_population():
    stats = stats_of(kl_rev=[1.0, INF, 2.0, INF], logp_s=[-INF, NAN, -1.0, -INF])
    assert kept_ids(sel.TopDivergence(2), stats) == [1, 3]
    assert kept_ids(sel.TopDivergence(3), stats) == [1, 2, 3]
    assert kept_ids(sel.TopDivergence(2, by="logp_s"), stats) == [0, 2]
    assert kept_ids(sel.TopDivergence(1.0, by="logp_s"), stats) == [0, 2, 3]


def test_bool_and_int_statistics_can_be_ranked():
    stats = TokenStats(agree=torch.tensor([False, True, True]), rank_t_of_argmax_s=torch.tensor([2, 0, 5]))
    assert kept_ids(sel.TopDivergence(1, by="agree"), stats) == [1]
    assert kept_ids(sel.TopDivergence(1, by="rank_t_of_argmax_s"), stats) == [2]
    assert kept_ids(sel.Threshold("agree", below=0.5), stats) == [0]


def test_soft_or_rank_by_hand():
    stats = stats_of(entropy_s=[0.0, 1.0, 1.0, 3.0, 9.0], kl_rev=[INF, 0.0, 2.0, 1.0, NAN])
    h, d = torch.tensor([0, 1, 1, 3]) / 3, torch.tensor([3, 0, 2, 1]) / 3
    scores = sel.SoftOr(0.5)(stats).scores
    torch.testing.assert_close(scores[:4], h + d - h * d)
    assert scores[4] == -INF
    assert sel.SoftOr(0.5)(stats_of(entropy_s=[2.0], kl_rev=[3.0])).scores.tolist() == [1.0]


def test_soft_or_minmax_clips_entropy_and_lets_infinity_be_one():
    entropy = torch.arange(101.0)
    divergence = torch.zeros(101)
    divergence[[3, 4, 5]] = torch.tensor([INF, 2.0, 4.0])
    scores = sel.SoftOr(0.5, "minmax")(stats_of(entropy_s=entropy, kl_rev=divergence)).scores
    h = entropy.clamp(max=98) / 98
    torch.testing.assert_close(scores[6:], h[6:])
    torch.testing.assert_close(scores[3:6], torch.stack([torch.tensor(1.0), (1 + h[4]) / 2, torch.tensor(1.0)]))


def test_soft_or_minmax_of_a_zero_range_is_zero():
    stats = stats_of(entropy_s=[2.0, 2.0, 2.0], kl_rev=[INF, 1.0, 1.0])
    assert sel.SoftOr(0.5, "minmax")(stats).scores.tolist() == [1.0, 0.0, 0.0]


def test_soft_or_minmax_keeps_small_scores_apart():
    tiny = torch.tensor([1e-12, 3e-12, 2e-12, 0.0])
    stats = stats_of(entropy_s=[0.0] * 5, kl_rev=[*tiny.tolist(), 1.0])
    kept = sel.SoftOr(3, "minmax")(stats)
    assert kept.row_ids.tolist() == [1, 2, 4]
    torch.testing.assert_close(kept.scores[:4], tiny, rtol=1e-6, atol=0)


def test_soft_or_rank_ignores_how_far_out_an_outlier_lies():
    stats = random_stats(40)
    far = stats_of(entropy_s=stats.entropy_s, kl_rev=stats.kl_rev.where(stats.kl_rev < stats.kl_rev.max(), 1e30))
    assert torch.equal(sel.SoftOr(0.3)(stats).scores, sel.SoftOr(0.3)(far).scores)
    assert not torch.equal(sel.SoftOr(0.3, "minmax")(stats).scores, sel.SoftOr(0.3, "minmax")(far).scores)


@pytest.mark.parametrize("normalize", ["rank", "minmax"])
def test_the_lowest_soft_or_is_the_other_half(normalize):
    stats = random_stats(4, 10)
    low, high = sel.SoftOr(0.5, normalize, lowest=True)(stats), sel.SoftOr(0.5, normalize)(stats)
    assert torch.equal(low.mask, ~high.mask) and torch.equal(low.scores, -high.scores)
    assert torch.equal(
        low.mask, ref.select_soft_or(as_dict(stats), 0.5, normalize, True, rollout_ids=torch.arange(40) // 10)
    )


def test_overconfident_is_the_papers_rule_in_four_lines():
    g = torch.Generator().manual_seed(20)
    for _ in range(200):
        batch, length = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 9), (1, 65)))
        entropy, kl_fwd = (5 * torch.rand(batch, length, generator=g) ** 3 for _ in range(2))
        keep = 0.05 + 0.95 * float(torch.rand((), generator=g))
        clipped = entropy.double().clamp(max=torch.quantile(entropy.double(), 0.98))
        h = ((clipped - clipped.min()) / (clipped.max() - clipped.min())).nan_to_num(0.0)
        best = (kl_fwd * (1 - h)).sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(keep * length))]
        expected = torch.zeros(batch, length, dtype=torch.bool).scatter_(1, best, True)
        kept = sel.Overconfident(keep)(stats_of((batch, length), entropy_s=entropy, kl_fwd=kl_fwd))
        assert torch.equal(kept.mask.reshape(batch, length), expected)


def test_overconfident_fills_its_quota_unless_it_has_thresholds():
    stats = stats_of(entropy_s=[0.1, 0.2, 5.0, 0.0, 0.0], kl_fwd=[1.0, 9.0, 9.0, 0.0, INF])
    assert kept_ids(sel.Overconfident(1.0), stats) == [0, 1, 2, 3, 4]
    assert kept_ids(sel.Overconfident(0.4), stats) == [1, 4]
    assert kept_ids(sel.Overconfident(1), stats) == [4]
    thresholds = {"entropy_below": 0.3, "divergence_above": 0.1}
    assert kept_ids(sel.Overconfident(1.0, **thresholds), stats) == [0, 1, 4]
    assert kept_ids(sel.Overconfident(0.4, **thresholds), stats) == [1, 4]
    assert kept_ids(sel.Overconfident(1.0, entropy_below=0.15), stats) == [0, 3, 4]
    assert kept_ids(sel.Overconfident(1.0, min_rows=4, divergence_above=100.0), stats) == [4]
    assert kept_ids(sel.Overconfident(0.2, entropy_below=-1.0), stats) == []
    assert kept_ids(sel.Overconfident(0.4, divergence_above=("quantile", 0.5)), stats) == [4]


def test_overconfident_score_is_infinite_where_the_divergence_is_even_at_the_highest_entropy():
    stats = stats_of(entropy_s=[0.0, 1.0], kl_fwd=[INF, INF])
    assert sel.Overconfident(0.5)(stats).scores.tolist() == [INF, INF]


def test_thresholds_are_strict_and_compared_in_fp32():
    stats = stats_of(entropy_s=[0.3, 0.0, 0.3], kl_rev=[0.1, 0.1, 0.2], kl_fwd=[0.1, 0.1, 0.2])
    assert kept_ids(sel.Threshold(above=0.1), stats) == [2]
    assert kept_ids(sel.Threshold(below=0.2), stats) == [0, 1]
    assert kept_ids(sel.Threshold(above=0.1, below=0.2), stats) == []
    assert kept_ids(sel.Threshold(), stats) == [0, 1, 2]
    assert kept_ids(sel.Threshold(above=("quantile", 0.0)), stats) == [2]
    assert kept_ids(sel.Overconfident(1.0, entropy_below=0.3, divergence_above=0.1), stats) == []
    assert sel.quadrants(stats).tolist() == [2, 4, 1]


def test_quadrants_by_hand():
    stats = stats_of((2, 3), entropy_s=[1.0, 1.0, 0.1, 0.1, NAN, 1.0], kl_rev=[1.0, 0.0, INF, 0.0, 1.0, NAN])
    assert sel.quadrants(stats).tolist() == [1, 2, 3, 4, 0, 0]
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert sel.quadrants(stats, mask).tolist() == [1, 0, 3, 4, 0, 0]
    assert sel.quadrants(stats, entropy=("quantile", 1.0), divergence=("quantile", 0.5)).tolist() == [1, 2, 3, 4, 0, 0]


def test_rows_that_are_nan_in_a_statistic_the_rule_reads_are_not_in_the_population():
    stats = stats_of(entropy_s=[NAN, 1.0, 2.0, 3.0], kl_rev=[1.0, NAN, 2.0, 3.0])
    assert kept_ids(sel.KeepAll(), stats) == [0, 1, 2, 3]
    assert kept_ids(sel.TopEntropy(1.0), stats) == [1, 2, 3]
    assert kept_ids(sel.TopDivergence(1.0), stats) == [0, 2, 3]
    assert kept_ids(sel.SoftOr(1.0), stats) == [2, 3]
    assert sel.SoftOr(1.0)(stats).scores.isneginf().tolist() == [True, True, False, False]
    assert kept_ids(sel.SoftOr(0.5), stats) == [3]


# What holds for every rule


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row_are_legal(rule, n):
    kept = rule(random_stats(n))
    assert kept.mask.shape == kept.scores.shape == (n,)
    assert kept.mask.dtype == torch.bool and kept.scores.dtype == torch.float32
    assert kept.row_ids.dtype == torch.int64 and kept.row_ids.numel() <= n
    ids, valid = kept.slots(rule.capacity(n, 1))
    assert torch.equal(ids[valid], kept.row_ids)
    assert rule(random_stats(3, 0)).mask.shape == (0,)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_everything_masked_or_nan_keeps_nothing(rule):
    stats = random_stats(2, 5)
    kept = rule(stats, row_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert not kept.mask.any() and kept.row_ids.shape == (0,) and kept.scores.isneginf().all()
    assert kept.row_weights is None or kept.row_weights.shape == (0,)
    if rule.needs:
        assert not rule(stats_of((2, 5), **{name: [NAN] * 10 for name in FIELDS})).mask.any()


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_masked_rows_are_as_if_they_were_not_there(rule):
    stats, mask = random_stats(4, 6), torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    ids = torch.arange(4).repeat_interleave(6)
    some = mask.flatten()
    poisoned = {name: value.where(some, 1e9) for name, value in as_dict(stats).items()}
    kept = rule(stats_of((4, 6), **poisoned), row_mask=mask)
    assert not kept.mask[~some].any() and kept.scores[~some].isneginf().all()
    if rule in DETERMINISTIC:
        alone = rule(stats_of(**{name: value[some] for name, value in as_dict(stats).items()}), rollout_ids=ids[some])
        assert torch.equal(kept.mask[some], alone.mask) and torch.equal(kept.scores[some], alone.scores)


@pytest.mark.parametrize("rule", DETERMINISTIC, ids=repr)
def test_rollouts_can_be_permuted_renamed_and_interleaved(rule):
    stats, order = random_stats(5, 7), torch.tensor([3, 1, 4, 0, 2])
    mask = rule(stats).mask.view(5, 7)

    def moved(to):
        return {name: to(value.view(5, 7)).flatten() for name, value in as_dict(stats).items()}

    assert torch.equal(rule(stats_of((5, 7), **moved(lambda x: x[order]))).mask.view(5, 7), mask[order])
    names = torch.tensor([INT64.min, -1, INT64.max, 0, 12])
    assert torch.equal(rule(stats, rollout_ids=names[:, None].expand(5, 7)).mask.view(5, 7), mask)
    woven = rule(stats_of(**moved(lambda x: x.T)), rollout_ids=names.repeat(7))
    assert torch.equal(woven.mask.view(7, 5), mask.T)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_batch_scope_is_one_rollout(rule):
    if isinstance(rule, QuotaRule):
        values = {name: getattr(rule, name) for name in rule.__match_args__}
        rule = type(rule)(**values | {"scope": "batch"})
    stats = random_stats(3, 8)
    flat = stats_of(**as_dict(stats))
    torch.manual_seed(0)
    kept = rule(stats, rollout_ids=torch.arange(24))
    torch.manual_seed(0)
    assert torch.equal(kept.mask, rule(flat).mask)
    assert kept.mask.sum() == 12 or not isinstance(rule, QuotaRule) or rule.keep == 3 or "Overc" in repr(rule)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_rules_are_frozen_pure_and_differentiate_nothing(rule):
    stats = random_stats(4, 5)
    before = {name: value.clone() for name, value in as_dict(stats).items()}
    for name in FIELDS:
        getattr(stats, name).requires_grad_()
    torch.manual_seed(0)
    first = rule(stats)
    torch.manual_seed(0)
    again = rule(stats)
    assert torch.equal(first.mask, again.mask) and torch.equal(first.scores, again.scores)
    assert not first.scores.requires_grad
    assert all(torch.equal(before[name], getattr(stats, name)) for name in FIELDS)
    with pytest.raises(FrozenInstanceError):
        rule.keep = 0.9
    assert isinstance(rule.needs, frozenset) and rule.needs <= set(FIELDS)


def test_rules_declare_what_they_read():
    assert sel.KeepAll().needs == sel.RandomRows(0.5).needs == frozenset()
    assert sel.SampleEntropy(0.5).needs == sel.TopEntropy(0.5).needs == {"entropy_s"}
    assert sel.SampleEntropy(0.5, gamma=0.5).needs == {"entropy_s", "hellinger_sq"}
    assert sel.SoftOr(0.5).needs == {"entropy_s", "kl_rev"}
    assert sel.Overconfident(0.5).needs == {"entropy_s", "kl_fwd"}
    assert sel.TopMargin(0.5, by="margin_s").needs == {"margin_s"}
    assert sel.TopDivergence(0.5, by="lse_t").needs == sel.Threshold("lse_t").needs == {"lse_t"}


# Kept


def test_kept_row_ids_ascend_and_are_read_once():
    kept = sel.TopEntropy(2)(stats_of((2, 3), entropy_s=[1.0, 3.0, 2.0, 9.0, 0.0, 5.0]))
    assert kept.row_ids.tolist() == [1, 2, 3, 5]
    assert kept.row_ids is kept.row_ids
    assert kept.row_weights is None


def test_slots_hold_the_kept_rows_first():
    kept = sel.TopEntropy(2)(stats_of(entropy_s=[1.0, 3.0, 2.0, 0.0]))
    for capacity in range(5):
        ids, valid = kept.slots(capacity)
        assert ids.tolist() == [1, 2, 0, 3][:capacity] and ids.dtype == torch.int64
        assert valid.tolist() == [True, True, False, False][:capacity]
    for bad in (-1, 5, 2.0, True):
        with pytest.raises(ValueError, match=r"capacity: expected an int in \[0, 4\]"):
            kept.slots(bad)


@checked
@given(batches(), quotas())
def test_capacity_bounds_the_kept_rows(batch, quota):
    (stats, where), (keep, how) = batch, quota
    n = stats.entropy_s.numel()
    n_groups = len(where["rollout_ids"].unique()) if "rollout_ids" in where else 1
    for rule in (sel.TopEntropy(keep, **how), sel.TopDivergence(keep, by="logp_s", **how), sel.RandomRows(keep, **how)):
        kept = int(rule(stats, **where).mask.sum())
        assert kept <= rule.capacity(n, n_groups) <= n
        assert kept <= rule.capacity(n) <= n
        assert kept <= rule.capacity(n, n) <= n


def test_capacity_is_tight():
    assert sel.KeepAll().capacity(100, 4) == sel.Threshold().capacity(100) == 100
    assert sel.TopEntropy(0.2).capacity(100, 1) == sel.TopEntropy(0.2, scope="batch").capacity(100) == 20
    assert sel.TopEntropy(0.2, min_rows=0).capacity(100, 4) == 20
    assert sel.TopEntropy(0.2).capacity(100, 4) == 23
    assert sel.TopEntropy(1 / 3 - 1e-7, min_rows=0).capacity(3, 1) == 1  # the quota's 1e-6 rounds 0.9999997 up
    assert sel.TopEntropy(3).capacity(100, 4) == 12
    assert sel.TopEntropy(3, min_rows=5).capacity(100, 4) == 20
    assert sel.TopEntropy(0.2).capacity(100) == sel.TopEntropy(3).capacity(100) == 100


# Sampling


@pytest.mark.parametrize("alpha, gamma", [(1.0, 0.0), (2.0, 0.0), (0.5, 1.0), (0.0, 0.0)])
def test_sample_entropy_includes_rows_as_often_as_draws_without_replacement(alpha, gamma):
    draws, entropy, hellinger = 40_000, [0.1, 1.0, 0.4, 2.0, 0.7], [0.5, 0.1, 1.0, 0.2, 0.3]
    stats = stats_of((draws, 5), entropy_s=torch.tensor(entropy * draws), hellinger_sq=torch.tensor(hellinger * draws))
    rule = sel.SampleEntropy(2, alpha, gamma, torch.Generator().manual_seed(3))
    often = rule(stats).mask.view(draws, 5).double().mean(0)
    weights = [h**alpha * d**gamma for h, d in zip(entropy, hellinger, strict=True)]
    expected = torch.tensor(ref.inclusion_probabilities(weights, 2), dtype=torch.float64)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((often - expected).abs() < 4.5 * sigma).all(), (often, expected)


def test_sample_entropy_draws_rows_of_zero_weight_last_and_uniformly():
    draws = 20_000
    stats = stats_of((draws, 5), entropy_s=torch.tensor([0.0, 1e-38, 0.0, 5.0, -1e-9] * draws))
    for alpha in (1.0, 50.0, 1e6):
        g = torch.Generator().manual_seed(0)
        often = sel.SampleEntropy(3, alpha, generator=g)(stats).mask.view(draws, 5).double().mean(0)
        assert often[1] == often[3] == 1
        assert ((often[[0, 2, 4]] - 1 / 3).abs() < 4.5 * (2 / 9 / draws) ** 0.5).all()
    for entropy, alpha in ([0.0, 0.0], 1.0), ([-1e-9, 3.0], 0.0):
        stats = stats_of((draws, 2), entropy_s=torch.tensor(entropy * draws))
        often = sel.SampleEntropy(1, alpha, generator=g)(stats).mask.view(draws, 2).double().mean(0)
        assert ((often - 0.5).abs() < 4.5 * (1 / 4 / draws) ** 0.5).all()


def test_sample_entropy_raises_each_statistic_to_its_power():
    """Scores of the same noise differ by gamma and alpha times the log of what they are powers of."""
    stats = random_stats(24)

    def scores(alpha: float, gamma: float) -> torch.Tensor:
        rule = sel.SampleEntropy(3, alpha=alpha, gamma=gamma, generator=torch.Generator().manual_seed(0))
        score = rule(stats).scores.double()
        return score - score[0]

    h, d = (getattr(stats, name).double().log() for name in ("entropy_s", "hellinger_sq"))
    torch.testing.assert_close(scores(1.0, 2.5) - scores(1.0, 0.5), 2 * (d - d[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(2.5, 0.5) - scores(0.5, 0.5), 2 * (h - h[0]), rtol=1e-4, atol=1e-4)


def test_sample_entropy_ignores_the_unit_of_entropy():
    stats = random_stats(200)
    scaled = stats_of(entropy_s=stats.entropy_s / 4)
    first, second = (
        sel.SampleEntropy(0.3, generator=torch.Generator().manual_seed(1), unbiased=True)(s) for s in (stats, scaled)
    )
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(first.row_weights, second.row_weights)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_unbiased_row_weights_average_to_one(alpha):
    draws, tokens = 40_000, 6
    entropy = torch.tensor([0.05, 1.0, 0.4, 2.0, 0.7, 0.3])
    stats = stats_of((draws, tokens), entropy_s=entropy.repeat(draws))
    kept = sel.SampleEntropy(0.5, alpha, generator=torch.Generator().manual_seed(5), unbiased=True)(stats)
    assert kept.row_weights.shape == kept.row_ids.shape and (kept.row_weights >= 1).all()
    weights = torch.zeros(draws * tokens).index_copy_(0, kept.row_ids, kept.row_weights).view(draws, tokens).double()
    # The weight of a rare row has a heavy tail: compare where 4.5 standard errors mean something.
    x = entropy.double().pow(alpha)
    total = weights @ x
    error = (total.mean() - x.sum()).abs()
    assert error < 4.5 * total.std() / draws**0.5
    assert ((weights[:, 1:].mean(0) - 1).abs() < 4.5 * weights[:, 1:].std(0) / draws**0.5).all()
    assert total.std() < 0.5 * x.sum()


def test_unbiased_row_weights_are_one_where_everything_is_kept():
    stats = random_stats(4, 3)
    kept = sel.SampleEntropy(1.0, unbiased=True)(stats)
    assert kept.row_weights.tolist() == [1.0] * 12
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    kept = sel.SampleEntropy(3, unbiased=True)(stats, rollout_ids=ids)
    assert (kept.row_weights[:3] > 1).all() and (kept.row_weights[3:] == 1).all()
    assert kept.row_ids.tolist()[3:] == [6, 7, 8, 9, 10, 11]


def test_unbiased_row_weights_follow_their_formula():
    stats = random_stats(1, 50)
    kept = sel.SampleEntropy(0.4, alpha=2.0, generator=torch.Generator().manual_seed(0), unbiased=True)(stats)
    kappa = kept.scores.sort(descending=True).values[20].double()
    log_w = 2 * stats.entropy_s.double().log()
    log_w = (log_w - log_w.max())[kept.row_ids]
    expected = 1 / (1 - torch.exp(-torch.exp(log_w - kappa)))
    torch.testing.assert_close(kept.row_weights, expected.float(), rtol=1e-5, atol=0)


def test_random_rows_are_uniform_and_follow_their_generator():
    draws = 30_000
    stats = stats_of((draws, 4), entropy_s=torch.zeros(4 * draws))
    first, second = (sel.RandomRows(0.5, torch.Generator().manual_seed(7))(stats).mask for _ in range(2))
    assert torch.equal(first, second)
    assert ((first.view(draws, 4).double().mean(0) - 0.5).abs() < 4.5 * (1 / 4 / draws) ** 0.5).all()
    rule = sel.RandomRows(0.5, torch.Generator().manual_seed(7))
    assert not torch.equal(rule(stats).mask, rule(stats).mask)


# No host synchronisation


SYNCHRONISING = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "argwhere"}
SYNCHRONISING |= {"unique_dim", "unique_consecutive", "is_nonzero", "equal", "bincount", "repeat_interleave"}


class NoSync(TorchDispatchMode):
    """Raises on operators whose result on the host, or whose shape, depends on data on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in SYNCHRONISING or by_mask:
            raise AssertionError(f"{func} synchronises")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.nonzero(),
        lambda x: x[x.argmax()],
    ],
)
def test_the_guard_against_synchronisation_sees_one(sync):
    with NoSync(), pytest.raises(AssertionError, match="synchronises"):
        sync(torch.ones(3))


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_no_rule_synchronises(rule):
    stats, mask, ids = random_stats(4, 6), torch.rand(4, 6) < 0.8, torch.randint(-3, 3, (24,))
    with NoSync():
        for where in ({}, {"row_mask": mask}, {"row_mask": mask, "rollout_ids": ids}):
            rule(stats, **where).slots(rule.capacity(24, 4))


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_every_rule_runs_without_any_data(rule):
    """On meta tensors, which have shapes only, whatever looks at a value fails."""
    stats = TokenStats(**{name: torch.empty(24, device="meta") for name in FIELDS}, _batch_shape=(4, 6))
    mask, ids = torch.empty(24, dtype=torch.bool, device="meta"), torch.empty(4, 6, dtype=torch.int64, device="meta")
    kept = rule(stats, row_mask=mask, rollout_ids=ids)
    assert kept.mask.shape == kept.scores.shape == (24,)
    assert kept.slots(5)[0].shape == (5,)


def test_quadrants_do_not_synchronise():
    stats, mask = random_stats(4, 6), torch.rand(24) < 0.8
    with NoSync():
        sel.quadrants(stats, mask, entropy=("quantile", 0.5), divergence=0.1)


# Bad input

BAD_RULES = [
    *[(lambda keep=keep: sel.SoftOr(keep), "keep") for keep in (0, 0.0, 1.5, -1, -0.5, NAN, INF, True, "x", None)],
    (lambda: sel.RandomRows(False), "keep"),
    (lambda: sel.TopEntropy(0.5, scope="sequence"), "scope"),
    (lambda: sel.TopEntropy(0.5, scope="world"), "scope: expected 'rollout', 'batch' or 'global'"),
    (lambda: sel.TopEntropy(0.5, group=1), "group: expected None without scope 'global'"),
    (lambda: sel.TopEntropy(0.5, scope="global", group=1), "group: expected a process group that this rank is in"),
    (lambda: sel.TopEntropy(0.5, min_rows=-1), "min_rows"),
    (lambda: sel.TopEntropy(0.5, min_rows=True), "min_rows"),
    (lambda: sel.TopEntropy(0.5, min_rows=1.0), "min_rows"),
    (lambda: sel.SoftOr(0.5, "max"), "normalize"),
    (lambda: sel.TopDivergence(0.5, by="kl"), "by: expected .*kl_fwd"),
    (lambda: sel.TopDivergence(0.5, by="_vocab"), "by"),
    (lambda: sel.TopMargin(0.5, by="kl_rev"), "by"),
    (lambda: sel.Threshold(by=3), "by"),
    (lambda: sel.Threshold(above=NAN), "above"),
    (lambda: sel.Threshold(below=True), "below"),
    (lambda: sel.Threshold(below=("quantile", 1.5)), "below"),
    (lambda: sel.Threshold(above=("quantile", NAN)), "above"),
    (lambda: sel.Threshold(above=("median", 0.5)), "above"),
    (lambda: sel.Overconfident(0.5, entropy_below=INF), "entropy_below"),
    (lambda: sel.Overconfident(0.5, divergence_above="big"), "divergence_above"),
    (lambda: sel.Overconfident(0.5, by="bits"), "by"),
    (lambda: sel.SampleEntropy(0.5, alpha=-1.0), "alpha"),
    (lambda: sel.SampleEntropy(0.5, gamma=NAN), "gamma"),
    (lambda: sel.SampleEntropy(0.5, generator=3), "generator"),
    (lambda: sel.RandomRows(0.5, 0), "generator"),
    (lambda: sel.SampleEntropy(0.5, unbiased=1), "unbiased"),
]


@pytest.mark.parametrize("make, message", BAD_RULES)
def test_a_bad_rule_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}.*got") as error:
        make()
    assert "tensor(" not in str(error.value)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize(
    "where",
    [
        {"row_mask": torch.ones(6)},
        {"row_mask": torch.ones(5, dtype=torch.bool)},
        {"row_mask": torch.ones(3, 2, dtype=torch.bool)},
        {"row_mask": torch.ones(6, dtype=torch.bool, device="meta")},
        {"row_mask": [True] * 6},
        {"rollout_ids": torch.ones(6)},
        {"rollout_ids": torch.ones(6, dtype=torch.int32)},
        {"rollout_ids": torch.ones(2, dtype=torch.int64)},
        {"rollout_ids": torch.ones(2, 3, dtype=torch.int64, device="meta")},
    ],
    ids=lambda where: str({name: getattr(value, "shape", value) for name, value in where.items()}),
)
def test_a_bad_mask_or_rollout_id_is_refused(rule, where):
    (name,) = where
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        rule(random_stats(2, 3), **where)
    if name == "row_mask":
        with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
            sel.quadrants(random_stats(2, 3), **where)


@pytest.mark.parametrize(
    "rule, message",
    [
        (sel.SoftOr(0.5), "SoftOr reads kl_rev, which was not measured: pass a teacher"),
        (sel.TopMargin(0.5), "TopMargin reads margin_t, which was not measured: pass a teacher and margins=True"),
        (sel.TopDivergence(0.5, by="logp_s"), "TopDivergence reads logp_s, which was not measured: pass labels"),
        (sel.Threshold("mass_t_on_top_s"), "Threshold reads mass_t_on_top_s, which was not measured: .* top_k"),
        (sel.quadrants, "quadrants reads kl_rev"),
    ],
)
def test_a_statistic_that_was_not_measured_is_named(rule, message):
    with pytest.raises(ValueError, match=message):
        rule(stats_of(entropy_s=[1.0]))


def test_other_bad_inputs_of_a_call_are_named():
    with pytest.raises(ValueError, match="stats: expected TokenStats"):
        sel.KeepAll()({"entropy_s": torch.ones(3)})
    with pytest.raises(ValueError, match="stats: expected at least one"):
        sel.KeepAll()(TokenStats())
    with pytest.raises(ValueError, match="entropy: expected a finite number"):
        sel.quadrants(random_stats(3), entropy=NAN)
    with pytest.raises(ValueError, match="divergence: expected a finite number"):
        sel.quadrants(random_stats(3), divergence=("quantile", -1))
