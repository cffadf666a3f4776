"""SELECT, the rules of other papers: against the reference's plain loops, by hand, and on measured statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tip_kernels as tip
from reference import select as ref
from tests._cases import INF, NAN, distill, head_case, labels_for, ordinary
from tip_kernels.select.papers import CrossEntropyRatio, EntropyGap, GreedyAgreement, PositionPrefix, Teachability
from tip_kernels.select.rollouts import FilterRollouts, PositionSuffix, UntilDrift
from tip_kernels.select.rule import QuotaRule
from tip_kernels.select.tip import TopEntropy
from tip_kernels.stats import TOP_FIELDS

checked = settings(deadline=None, max_examples=60, derandomize=True)
FIELDS = ("entropy_s", "entropy_t", "kl_fwd", "kl_rev", "logp_s", "logp_t", "mass_t_on_top_s", "rank_t_of_argmax_s")

RULES = [
    EntropyGap(0.5),
    EntropyGap(0.5, weighted=True),
    CrossEntropyRatio(0.5),
    Teachability(0.5),
    Teachability(2, by="kl_rev"),
    GreedyAgreement(),
    GreedyAgreement(2, agreeing=False),
    GreedyAgreement(other_weight=0.25),
    PositionPrefix(3),
    PositionPrefix(0.5),
    PositionSuffix(3),
    FilterRollouts("kl_rev", 0.5),
    UntilDrift(0.5),
]
JOINED = [*RULES, PositionPrefix(0.8) & EntropyGap(0.5, weighted=True)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def stats_of(shape=(), **columns) -> tip.TokenStats:
    def column(name, values):
        return torch.as_tensor(values, dtype=torch.int64 if name.startswith("rank") else torch.float32).flatten()

    return tip.TokenStats(**{name: column(name, x) for name, x in columns.items()}, _batch_shape=shape)


def as_dict(stats: tip.TokenStats) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in FIELDS}


def random_stats(*shape: int) -> tip.TokenStats:
    g = torch.Generator().manual_seed(0)
    columns = {name: torch.rand(shape, generator=g) for name in FIELDS}
    columns |= {name: -columns[name] for name in ("logp_s", "logp_t")}
    columns["rank_t_of_argmax_s"] = torch.randint(0, 6, shape, generator=g)
    return stats_of(shape, **columns)


@st.composite
def batches(draw):
    """A few rows with ties, NaN, infinities, masked rows and rollouts that are not contiguous."""
    n = draw(st.integers(1, 24))
    grid = [k / 8 for k in range(9)]

    def column(values):
        return draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))

    columns = {
        **{name: column([*grid, NAN]) for name in ("entropy_s", "entropy_t", "mass_t_on_top_s")},
        **{name: column([*grid, NAN, INF]) for name in ("kl_fwd", "kl_rev")},
        **{name: column([-x for x in grid] + [NAN, -INF]) for name in ("logp_s", "logp_t")},
        "rank_t_of_argmax_s": column(list(range(7))),
    }
    where = {}
    if draw(st.booleans()):
        where["row_mask"] = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if draw(st.booleans()):
        where["rollout_ids"] = torch.tensor(draw(st.lists(st.sampled_from([0, 7, -3]), min_size=n, max_size=n)))
    return stats_of(**columns), where


@st.composite
def quotas(draw):
    keep = draw(st.sampled_from([0.1, 0.29, 0.5, 1.0, 1, 2, 5]))
    least = draw(st.integers(0, 1 if isinstance(keep, int) else 2))
    return keep, {"scope": draw(st.sampled_from(["rollout", "batch"])), "min_rows": least}


# Against the reference


@checked
@given(batches(), quotas())
def test_quota_rules_agree_with_the_reference(batch, quota):
    (stats, where), (keep, how) = batch, quota
    columns = as_dict(stats)
    for rule, expected in (
        (EntropyGap(keep, **how), ref.select_entropy_gap(columns, keep, **where, **how)),
        (PositionPrefix(keep, **how), ref.select_position_prefix(columns, keep, **where, **how)),
        (PositionSuffix(keep, **how), ref.select_position_suffix(columns, keep, **where, **how)),
    ):
        assert torch.equal(rule(stats, **where).mask, expected), rule


@checked
@given(batches(), st.sampled_from(["kl_rev", "entropy_s", "logp_s"]), st.sampled_from([0, 1, 2, 0.0, 0.4, 0.7]))
def test_rules_over_rollouts_agree_with_the_reference(batch, by, drop):
    stats, where = batch
    columns = as_dict(stats)
    for largest in (False, True):
        kept = FilterRollouts(by, drop, largest=largest)(stats, **where).mask
        assert torch.equal(kept, ref.filter_rollouts(columns, by, drop, largest=largest, **where))
    for n in (1, 3):
        kept = UntilDrift(0.4, by, n)(stats, **where).mask
        assert torch.equal(kept, ref.until_drift(columns, 0.4, by, n, **where))


@checked
@given(batches(), quotas(), st.sampled_from(JOINED), st.sampled_from(JOINED))
def test_two_rules_choose_by_the_second_among_the_rows_of_the_first(batch, quota, first, second):
    stats, where = batch
    if len({rule.top_k for rule in (first, second) if rule.needs & TOP_FIELDS}) > 1:
        with pytest.raises(ValueError, match=r"^second: expected a rule that reads the top_k of the first"):
            first & second
        return
    both, among = (first & second)(stats, **where), first(stats, **where)
    alone = second(stats, row_mask=among.mask, rollout_ids=where.get("rollout_ids"))
    assert torch.equal(both.mask, alone.mask) and torch.equal(both.scores, alone.scores)
    weights = torch.ones(len(alone.mask))
    for kept in (among, alone):
        weights = weights if kept._weights is None else weights * kept._weights
    assert both._weights is None or torch.equal(both._weights, torch.where(both.mask, weights, 0.0))
    assert (both._weights is None) == (among._weights is None and alone._weights is None)
    assert both.mask.sum() <= (first & second).capacity(len(alone.mask), 3)


def test_of_rollouts_whose_means_tie_the_earlier_stays():
    stats = stats_of(kl_rev=[1.0, 3.0, 2.0, 2.0, 4.0, 5.0])
    ids = torch.tensor([7, 7, 3, 3, 5, 5])
    for largest, left in ((False, [0, 1, 4, 5]), (True, [0, 1, 2, 3])):
        assert FilterRollouts("kl_rev", 1, largest=largest)(stats, rollout_ids=ids).row_ids.tolist() == left


def test_a_rule_is_joined_to_rules_of_one_process_alone():
    with pytest.raises(ValueError, match=r"^second: expected a selection rule, of scope 'rollout' or 'batch'"):
        PositionPrefix(3) & PositionPrefix(2, scope="global")
    with pytest.raises(TypeError):
        PositionPrefix(3) & 0.5


@pytest.mark.parametrize("sweeps", [None, 2])
def test_distill_learns_from_the_rows_that_two_rules_keep(sweeps):
    """Two rollouts of four, then half of their tokens; a rule over rollouts reads what distill measures for it."""
    student, teacher = (head_case(24, 50, 8, seed=seed) for seed in (1, 2))
    student = student.leaves()
    ids = torch.arange(24) // 6
    rule = FilterRollouts("kl_rev", 2) & TopEntropy(0.5)
    out = distill(student.head, teacher.head, select=rule, rollout_ids=ids, sweeps=sweeps, full_stats=True)
    assert torch.equal(out.kept.mask, rule(out.stats, rollout_ids=ids).mask)
    assert out.kept.mask.view(4, 6).sum(1).tolist().count(3) == 2 and int(out.plan.kept_rows) == 6
    out.loss.backward()
    assert torch.equal(student.hidden.grad.any(1), out.kept.mask)


@checked
@given(batches(), quotas(), st.sampled_from(["kl_fwd", "kl_rev"]))
def test_scores_of_ratios_and_products_agree_with_the_reference(batch, quota, by):
    """Masks are compared by score: which of two rows that tie on paper is kept may hang on a rounding."""
    (stats, where), (keep, how) = batch, quota
    columns, row_mask = as_dict(stats), where.get("row_mask")
    ids = where.get("rollout_ids", torch.zeros(stats.kl_fwd.numel(), dtype=torch.int64))
    if how["scope"] == "batch":
        ids = torch.zeros_like(ids)
    for rule, scores, expected in (
        (
            CrossEntropyRatio(keep, **how),
            ref.cross_entropy_ratio_scores(columns, row_mask=row_mask),
            ref.select_cross_entropy_ratio(columns, keep, **where, **how),
        ),
        (
            Teachability(keep, by=by, **how),
            ref.teachability_scores(columns, by, row_mask=row_mask),
            ref.select_teachability(columns, keep, by, **where, **how),
        ),
    ):
        kept = rule(stats, **where)
        torch.testing.assert_close(kept.scores, scores.nan_to_num(nan=-INF, posinf=INF).float(), rtol=1e-6, atol=1e-9)
        for group in ids.unique():
            ours, theirs = (scores[mask & (ids == group)].sort().values for mask in (kept.mask, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@checked
@given(batches(), st.integers(1, 7), st.booleans())
def test_greedy_agreement_agrees_with_the_reference(batch, top_k, agreeing):
    stats, where = batch
    mask = where.get("row_mask")
    expected = ref.select_greedy_agreement(as_dict(stats), top_k, agreeing, row_mask=mask)
    kept = GreedyAgreement(top_k, agreeing)(stats, **where)
    assert torch.equal(kept.mask, expected) and kept.row_weights is None
    weighted = GreedyAgreement(top_k, agreeing, other_weight=0.25)(stats, **where)
    assert torch.equal(weighted.row_weights, torch.where(expected, 1.0, 0.25)[weighted.row_ids])
    valid = ref.valid_rows(as_dict(stats), ["mass_t_on_top_s"], mask)
    assert weighted.row_ids.tolist() == valid


# By hand


def test_entropy_gap_keeps_rows_where_only_the_student_is_uncertain():
    stats = stats_of(entropy_s=[3.0, 3.0, 0.1, 2.0], entropy_t=[3.0, 0.5, 2.0, 0.0])
    kept = EntropyGap(2)(stats)
    assert kept.row_ids.tolist() == [1, 3] and kept.row_weights is None
    assert kept.scores.tolist() == pytest.approx([0.0, 2.5, -1.9, 2.0])
    weights = EntropyGap(1.0, weighted=True)(stats).row_weights
    assert weights.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (0.0, 2.5, -1.9, 2.0)])
    assert EntropyGap(2, weighted=True)(stats).row_weights.tolist() == pytest.approx(weights[[1, 3]].tolist())


def test_cross_entropy_ratio_ranks_what_the_teacher_knows_and_the_student_does_not():
    stats = stats_of(logp_s=[-2.0, -2.0, -1.0, 0.0, NAN, -INF], logp_t=[-4.0, 0.0, -1.0, 0.0, NAN, -INF])
    kept = CrossEntropyRatio(2)(stats)
    assert kept.row_ids.tolist() == [1, 5]
    assert kept.scores.tolist() == pytest.approx([0.5, 2e6, 1.0, 0.0, -INF, 1.0], rel=1e-5)
    assert CrossEntropyRatio(1.0, epsilon=1.0)(stats).scores[:4].tolist() == pytest.approx([0.4, 2.0, 0.5, 0.0])


def test_teachability_is_a_product_of_shares_between_two_quantiles():
    # 21 values 0..20: the quantiles are 1 and 19.
    kl = torch.arange(21.0)
    stats = stats_of(kl_fwd=kl, mass_t_on_top_s=(20 - kl) / 20)
    d = ((kl - 1) / 18).clamp(0, 1)
    scores = Teachability(0.2)(stats).scores
    torch.testing.assert_close(scores, d * d.flip(0))
    assert Teachability(3)(stats).row_ids.tolist() == [9, 10, 11]
    assert Teachability().keep == 0.05 and Teachability().top_k == 16


def test_teachability_of_infinite_divergences_and_of_no_range():
    stats = stats_of(kl_fwd=[0.0, INF, 1.0], mass_t_on_top_s=[1.0, 1.0, 0.0])
    assert Teachability(1)(stats).scores.tolist() == [0.0, 1.0, 0.0]
    flat = stats_of(kl_fwd=[2.0, 2.0, INF], mass_t_on_top_s=[0.0, 0.5, 1.0])
    assert Teachability(1)(flat).scores.tolist() == [0.0, 0.0, 1.0]
    assert Teachability(1)(stats_of(kl_fwd=[INF, INF], mass_t_on_top_s=[0.0, 1.0])).scores.tolist() == [0.0, 1.0]


def test_teachability_ignores_how_far_out_an_outlier_lies():
    stats = random_stats(100)
    far = stats.kl_fwd.clone()
    far[far.argmax()] = 1e30
    moved = tip.TokenStats(**as_dict(stats) | {"kl_fwd": far}, _batch_shape=(100,))
    assert torch.equal(Teachability(0.1)(stats).scores, Teachability(0.1)(moved).scores)


def test_a_position_prefix_is_the_first_trainable_rows_of_each_rollout():
    stats = random_stats(2, 5)
    mask = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    assert PositionPrefix(3)(stats, row_mask=mask).row_ids.tolist() == [1, 2, 3, 5, 6]
    assert PositionPrefix(0.5)(stats, row_mask=mask).row_ids.tolist() == [1, 2, 5]
    woven = torch.arange(10) % 2
    assert PositionPrefix(2)(stats, rollout_ids=woven).row_ids.tolist() == [0, 1, 2, 3]


# On measured statistics


def test_rules_that_need_a_k_carry_it_and_choose_what_the_logits_say():
    s, t = ordinary(60, 40)
    t[::2] = s[::2] + 0.5 * t[::2]
    rule = GreedyAgreement(3)
    agreeing = rule(tip.token_stats(s, t, top_k=rule.top_k)).mask
    expected = (t.topk(3).indices == s.argmax(1, keepdim=True)).any(1)
    assert torch.equal(agreeing, expected) and 10 < expected.sum() < 50
    assert torch.equal(rule(tip.token_stats(s, t, top_k=8)).mask, expected)
    assert torch.equal(GreedyAgreement(3, agreeing=False)(tip.token_stats(s, t, top_k=3)).mask, ~expected)
    rule = Teachability(0.2, top_k=4)
    stats = tip.token_stats(s, t, top_k=rule.top_k)
    mass = t.softmax(1).gather(1, s.topk(4).indices).sum(1)
    torch.testing.assert_close(stats.mass_t_on_top_s, mass)
    columns = {"kl_fwd": stats.kl_fwd, "mass_t_on_top_s": mass}
    torch.testing.assert_close(rule(stats).scores.double(), ref.teachability_scores(columns), rtol=1e-4, atol=1e-5)


def test_broken_rows_are_in_no_population_that_reads_them():
    s, t = ordinary(6, 40)
    s[1, 3], t[2, 3] = NAN, NAN
    stats = tip.token_stats(s, t, labels=torch.zeros(6, dtype=torch.int64), top_k=16)
    for rule in RULES:
        kept = rule(stats)
        reads_nothing = isinstance(rule, (PositionPrefix, PositionSuffix))
        broken = [False] * 6 if reads_nothing else [False, True, True, False, False, False]
        assert kept.scores.isneginf().tolist() == broken, rule
        assert not rule.needs or not kept.mask[1:3].any()


@pytest.mark.parametrize(
    "rule",
    [EntropyGap(0.5), EntropyGap(1.0, weighted=True), CrossEntropyRatio(0.5), PositionPrefix(3)],
    ids=repr,
)
def test_distill_learns_from_the_rows_of_a_rule(rule):
    s, t = ordinary(20, 60)
    labels = labels_for(20, 60)
    student = s.clone().requires_grad_()
    out = tip.distill(student, t, select=rule, labels=labels)
    kept = rule(tip.token_stats(s, t, labels=labels))
    assert torch.equal(out.kept.mask, kept.mask)
    loss = tip.divergence_loss(s, t, kept=kept)
    weights = torch.ones_like(loss) if kept.row_weights is None else kept.row_weights
    torch.testing.assert_close(out.loss.detach(), (weights * loss).sum() / weights.sum())
    out.loss.backward()
    assert torch.equal(student.grad.any(1), kept.mask)


# What holds for every rule


@every_rule
def test_rules_are_values_that_say_what_they_read(rule):
    assert isinstance(rule.needs, frozenset) and rule.needs <= set(FIELDS)
    assert ("mass_t_on_top_s" in rule.needs) == hasattr(rule, "top_k")
    with pytest.raises(AttributeError):
        rule.keep = 0.9
    stats = random_stats(4, 6)
    assert torch.equal(rule(stats).mask, rule(stats).mask)
    for name in rule.needs:
        rest = tip.TokenStats(**{field: x for field, x in as_dict(stats).items() if field != name}, _batch_shape=(4, 6))
        with pytest.raises(ValueError, match=f"{type(rule).__name__} reads {name}, which was not measured"):
            rule(rest)


@every_rule
def test_masked_rows_are_as_if_they_were_not_there(rule):
    stats, mask = random_stats(4, 6), torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    some = mask.flatten()
    ids = torch.arange(4).repeat_interleave(6)
    poisoned = {name: x.where(some, 77) for name, x in as_dict(stats).items()}
    kept = rule(tip.TokenStats(**poisoned, _batch_shape=(4, 6)), row_mask=mask)
    alone = rule(
        tip.TokenStats(**{name: x[some] for name, x in as_dict(stats).items()}, _batch_shape=(int(some.sum()),)),
        rollout_ids=ids[some],
    )
    assert torch.equal(kept.mask[some], alone.mask) and torch.equal(kept.scores[some], alone.scores)
    assert not kept.mask[~some].any() and kept.scores[~some].isneginf().all()
    assert (kept.row_weights is None) == (alone.row_weights is None)
    assert kept.row_weights is None or torch.equal(kept.row_weights, alone.row_weights)


@every_rule
def test_everything_masked_no_rows_and_one_row_are_legal(rule):
    stats = random_stats(2, 5)
    kept = rule(stats, row_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert not kept.mask.any() and kept.scores.isneginf().all()
    for n in (0, 1):
        kept = rule(random_stats(n))
        assert kept.mask.shape == kept.scores.shape == (n,) and kept.mask.sum() <= rule.capacity(n, 1)


@every_rule
def test_no_rule_looks_at_the_data_from_the_host(rule):
    """On meta tensors, which have shapes only, whatever looks at a value fails."""
    dtypes = {"rank_t_of_argmax_s": torch.int64}
    columns = {name: torch.empty(24, dtype=dtypes.get(name, torch.float32), device="meta") for name in FIELDS}
    mask, ids = torch.empty(24, dtype=torch.bool, device="meta"), torch.empty(4, 6, dtype=torch.int64, device="meta")
    kept = rule(tip.TokenStats(**columns, _batch_shape=(4, 6)), row_mask=mask, rollout_ids=ids)
    assert kept.mask.shape == kept.scores.shape == (24,)
    assert kept.slots(5)[0].shape == (5,)


@every_rule
def test_the_capacity_bounds_the_kept_rows(rule):
    stats = random_stats(4, 6)
    assert rule(stats).mask.sum() <= rule.capacity(24, 4) <= 24
    if isinstance(rule, QuotaRule):
        assert rule.capacity(24, 4) < 24


@pytest.mark.parametrize(
    "make, argument",
    [
        *[
            (lambda rule=rule, keep=keep: rule(keep), "keep")
            for rule in (EntropyGap, PositionPrefix)
            for keep in (0, 1.5)
        ],
        (lambda: EntropyGap(0.5, weighted=1), "weighted"),
        *[(lambda e=e: CrossEntropyRatio(0.5, epsilon=e), "epsilon") for e in (0.0, -1.0, NAN)],
        *[(lambda k=k: Teachability(0.5, top_k=k), "top_k") for k in (0, -1, 2.0, True)],
        (lambda: Teachability(0.5, by="kl"), "by"),
        (lambda: GreedyAgreement(0), "top_k"),
        (lambda: GreedyAgreement(5, agreeing=1), "agreeing"),
        *[(lambda w=w: GreedyAgreement(other_weight=w), "other_weight") for w in (0.0, 1.0, -0.5, NAN, "x")],
        (lambda: CrossEntropyRatio(0.5, scope="all"), "scope"),
        (lambda: Teachability(0.5, min_rows=-1), "min_rows"),
    ],
)
def test_a_bad_rule_is_refused_when_it_is_made(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
        make()


@pytest.mark.parametrize("rule", [tip.GreedyAgreement(3), tip.Teachability(0.2, top_k=4)])
def test_distill_measures_the_top_k_that_a_rule_reads(rule):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 30, 100, requires_grad=True), torch.randn(2, 30, 100)
    out = tip.distill(student, teacher, select=rule)
    expected = rule(tip.token_stats(student.detach(), teacher, top_k=rule.top_k))
    assert torch.equal(out.kept.mask, expected.mask)


def test_statistics_of_another_top_k_are_refused():
    stats = tip.token_stats(torch.randn(5, 40), torch.randn(5, 40), top_k=2)
    for rule in (tip.GreedyAgreement(3), tip.Teachability(0.2, top_k=4)):
        with pytest.raises(ValueError, match="stats: expected statistics measured with"):
            rule(stats)
