"""MEASURE, SELECT and LEARN in one call: equal to the three verbs one by one, and what else it promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import reference as ref
import tip_kernels as tip
from tests._cases import (
    INF,
    NAN,
    HeadCase,
    Products,
    check_gradient,
    distill,
    head_case,
    leaf,
    no_worse,
    normal,
    ordinary,
    relative_error,
)
from tip_kernels.stats import STATISTICS

PUBLIC = STATISTICS
TEACHER = ("lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq")
VALUES = {tip.ForwardKL(): ref.forward_kl, tip.ReverseKL(): ref.reverse_kl, tip.Jeffreys(): ref.jeffreys}
N, V, WIDTH_S, WIDTH_T = 24, 1300, 48, 80


def student_case(n: int = N, **options) -> HeadCase:
    return head_case(n, V, WIDTH_S, seed=20, **options)


def teacher_case(n: int = N, **options) -> HeadCase:
    return head_case(n, V, WIDTH_T, seed=30, **options)


def check_loss(
    out: tip.Distilled,
    leaves: list[Tensor],
    weights: Tensor,
    normalizer: float,
    *,
    student: HeadCase | None = None,
    teacher: HeadCase | None = None,
    value: Callable[[Tensor, Tensor], Tensor] = ref.reverse_kl,
    temperature: float | Tensor = 1.0,
) -> None:
    """Holds loss and gradients to sum(weights * value) / normalizer of the reference; weights (N,), 0 if not kept."""
    student, teacher = student or student_case(), teacher or teacher_case()
    grads, losses = [], []
    for dtype in (torch.float64, torch.float32):
        case = student.to(dtype).leaves()
        values = value(case.logits(temperature), teacher.to(dtype).logits(temperature))
        loss = torch.where(weights != 0, weights.to(dtype) * values, 0.0).sum() / normalizer
        loss.backward()
        losses.append(loss.detach())
        grads.append([x.grad for x in case.tensors])
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    no_worse(out.loss.detach(), losses[1], losses[0], "loss")
    out.loss.backward()
    for x, eager, truth in zip(leaves, grads[1], grads[0], strict=True):
        check_gradient(x.grad, eager, truth, "leaf")


# The three verbs one by one


@pytest.mark.parametrize("divergence", VALUES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize(
    "rule",
    [
        tip.KeepAll(),
        tip.SoftOr(0.3),
        tip.TopEntropy(0.25),
        tip.TopDivergence(5, by="kl_fwd"),
        tip.TopHellinger(0.2),
        tip.TopMargin(0.5, by="margin_t"),
        tip.TopMargin(0.5, by="margin_s"),
        tip.Threshold("entropy_s", above=("quantile", 0.5)),
        tip.Overconfident(0.5, "kl_fwd", ("quantile", 0.6), ("quantile", 0.3)),
        tip.TopDivergence(0.5, by="agree"),
    ],
    ids=str,
)
def test_distill_is_the_three_verbs_one_by_one(rule, divergence):
    student, teacher = student_case().leaves(), teacher_case()
    out = distill(student.head, teacher.head, select=rule, divergence=divergence)
    stats = tip.token_stats(student.head, teacher.head, margins=True)
    kept = rule(stats)
    assert kept.mask.any() and torch.equal(out.kept.mask, kept.mask)
    assert out.plan.kept_rows == kept.mask.sum() and out.plan.dropped_rows == 0
    check_loss(out, student.tensors, kept.mask.float(), kept.mask.sum().item(), value=VALUES[divergence])
    for name in rule.needs:
        assert torch.equal(getattr(out.stats, name), getattr(stats, name)), name


def test_the_defaults_are_half_of_each_rollout_by_soft_or_and_the_reverse_kl():
    student, teacher = student_case().leaves(), teacher_case()
    out = distill(student.head, teacher.head)
    kept = tip.SoftOr(0.5)(tip.token_stats(student.head, teacher.head))
    assert torch.equal(out.kept.mask, kept.mask)
    check_loss(out, student.tensors, kept.mask.float(), 12)


@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_logits_distill_like_the_heads_they_came_from(shape):
    student, teacher = student_case(), teacher_case()
    z = leaf(student.logits().view(*shape, V))
    out = distill(z, teacher.logits().view(*shape, V), select=tip.SoftOr(0.25))
    assert out.kept.mask.shape == (24,)
    assert out.kept.row_ids.numel() == (6 if shape == (24,) else 4)  # a quota per rollout: floor(6 / 4) of each
    out.loss.backward()
    truth = student.to(torch.float64).leaves()
    values = ref.reverse_kl(truth.logits(), teacher.to(torch.float64).logits())
    no_worse(out.loss.detach(), out.loss.detach(), values.detach()[out.kept.mask].mean(), "loss")
    assert (z.grad.view(24, V).abs().sum(1) > 0).tolist() == out.kept.mask.tolist()


@pytest.mark.parametrize("rule", [tip.RandomRows, tip.SampleEntropy], ids=lambda r: r.__name__)
def test_random_rules_learn_from_the_rows_they_drew(rule):
    student, teacher = student_case().leaves(), teacher_case()
    out = distill(student.head, teacher.head, select=rule(0.25, generator=torch.Generator().manual_seed(3)))
    again = rule(0.25, generator=torch.Generator().manual_seed(3))(tip.token_stats(student.head))
    assert torch.equal(out.kept.mask, again.mask)
    check_loss(out, student.tensors, out.kept.mask.float(), 6)


def test_the_unbiased_weights_of_a_rule_weigh_its_rows():
    student, teacher = student_case().leaves(), teacher_case()
    rule = tip.SampleEntropy(0.25, unbiased=True, generator=torch.Generator().manual_seed(3))
    row_weights = torch.linspace(0.5, 2, N)
    out = distill(student.head, teacher.head, select=rule, row_weights=row_weights)
    weights = torch.zeros(N).index_copy(0, out.kept.row_ids, out.kept.row_weights) * row_weights
    assert (out.kept.row_weights >= 1).all() and out.kept.row_weights.max() > 1
    check_loss(out, student.tensors, weights, weights.double().sum().item())


def test_labels_reach_the_rules_that_read_them():
    student, teacher = student_case().leaves(), teacher_case()
    labels = torch.arange(N) * 31 % V
    labels[:4] = -100
    out = distill(student.head, teacher.head, select=tip.TopDivergence(5, by="logp_s"), labels=labels.view(N))
    stats = tip.token_stats(student.head, teacher.head, labels=labels)
    kept = tip.TopDivergence(5, by="logp_s")(stats)
    assert torch.equal(out.kept.mask, kept.mask) and not kept.mask[:4].any()
    no_worse(out.stats.logp_s, stats.logp_s, stats.logp_s.double(), "logp_s")
    check_loss(out, student.tensors, kept.mask.float(), 5)


@pytest.mark.parametrize("by", ["mass_t_on_top_s", "rank_t_of_argmax_s"])
def test_a_rule_whose_statistic_distill_cannot_measure_is_refused(by):
    student, teacher = student_case(), teacher_case()
    with pytest.raises(ValueError, match="top_k"):
        distill(student.head, teacher.head, select=tip.TopDivergence(0.5, by=by))


def test_a_rule_that_reads_labels_needs_them():
    student, teacher = student_case(), teacher_case()
    with pytest.raises(ValueError, match="labels"):
        distill(student.head, teacher.head, select=tip.TopDivergence(0.5, by="logp_s"))


# Rows: masks, rollouts, weights


MASK = torch.arange(N) % 3 != 1


@pytest.mark.parametrize("rule", [tip.SoftOr(0.3), tip.KeepAll(), tip.TopEntropy(0.3), tip.RandomRows(0.3)], ids=str)
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_masked_rows_are_neither_measured_nor_kept(rule, shape):
    student, teacher = student_case(), teacher_case()
    student.hidden[~MASK], teacher.hidden[~MASK] = NAN, INF  # a look at them would show
    case = student.leaves()
    heads = [tip.Head(c.hidden.view(*shape, c.hidden.shape[-1]), c.weight) for c in (case, teacher)]
    with Products() as products:
        out = distill(*heads, select=rule, row_mask=MASK.view(shape))
    assert products.macs <= MASK.sum() * 2 * V * (WIDTH_S + WIDTH_T)
    assert not (out.kept.mask & ~MASK).any() and out.kept.mask.any()
    for name in PUBLIC:
        value = out.stats._get(name)
        assert value is None or not value.is_floating_point() or value[~MASK].isnan().all(), name
    out.loss.backward()
    assert out.loss.isfinite() and out.plan.dropped_rows == 0
    assert all(x.grad.isfinite().all() for x in case.tensors)
    assert not case.hidden.grad[~MASK].any()


def test_a_mask_changes_nothing_for_the_rows_it_leaves():
    student, teacher = student_case(), teacher_case()
    masked = distill(student.head, teacher.head, row_mask=MASK, full_stats=True)
    rows = MASK.nonzero().squeeze(1)
    part = HeadCase(student.hidden[rows], student.weight), HeadCase(teacher.hidden[rows], teacher.weight)
    alone = distill(part[0].head, part[1].head, full_stats=True)
    assert torch.equal(masked.kept.mask[rows], alone.kept.mask)
    no_worse(masked.loss, alone.loss, alone.loss.double(), "loss")
    for name in ("lse_s", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        x, y = getattr(masked.stats, name)[rows], getattr(alone.stats, name)
        no_worse(x, y, y.double(), name)


def test_rollout_ids_and_the_batch_shape_say_where_quotas_are_filled():
    student, teacher = student_case(), teacher_case()
    ids = torch.arange(N) % 4
    out = distill(student.head, teacher.head, select=tip.TopEntropy(2), rollout_ids=ids)
    assert torch.bincount(ids[out.kept.mask]).tolist() == [2, 2, 2, 2]
    by_shape = [tip.Head(c.hidden.view(3, 8, -1), c.weight) for c in (student, teacher)]
    out = distill(*by_shape, select=tip.TopEntropy(2), row_mask=torch.ones(3, 8, dtype=torch.bool))
    assert out.kept.mask.view(3, 8).sum(1).tolist() == [2, 2, 2]
    out = distill(*by_shape, select=tip.TopEntropy(2), rollout_ids=ids.view(3, 8))
    assert torch.bincount(ids[out.kept.mask]).tolist() == [2, 2, 2, 2]
    out = distill(*by_shape, select=tip.TopEntropy(2, scope="batch"))
    assert out.kept.mask.sum() == 2


WEIGHTS = torch.linspace(0.0, 2.0, N)


@pytest.mark.parametrize("normalizer", ["kept", "all", 7, 3.5])
@pytest.mark.parametrize(
    "row_weights", [None, WEIGHTS, WEIGHTS.view(4, 6), WEIGHTS.bfloat16()], ids=["none", "flat", "BT", "bf16"]
)
def test_the_normalizer_divides_the_weighted_sum(normalizer, row_weights):
    student, teacher = student_case().leaves(), teacher_case()
    heads = [tip.Head(c.hidden.view(4, 6, c.hidden.shape[-1]), c.weight) for c in (student, teacher)]
    out = distill(*heads, select=tip.TopEntropy(3), row_mask=MASK, row_weights=row_weights, normalizer=normalizer)
    weights = out.kept.mask.float() * (1.0 if row_weights is None else row_weights.float().flatten())
    divisor = {"kept": weights.double().sum().item(), "all": MASK.sum().item()}.get(normalizer, normalizer)
    check_loss(out, student.tensors, weights, divisor)


# Temperatures


TAU = torch.linspace(0.5, 2.5, N)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [2.0, TAU, TAU.view(4, 6)], ids=["number", "per row", "per row of a batch"])
def test_a_temperature_is_measured_and_learned_at(temperature, squared):
    student, teacher = student_case().leaves(), teacher_case()
    heads = [tip.Head(c.hidden.view(4, 6, c.hidden.shape[-1]), c.weight) for c in (student, teacher)]
    out = distill(*heads, select=tip.SoftOr(0.5), temperature=temperature, temperature_sq=squared)
    tau = temperature.flatten() if isinstance(temperature, Tensor) else torch.tensor(temperature)
    stats = tip.token_stats(*heads, temperature=temperature)
    assert torch.equal(out.stats.kl_rev, stats.kl_rev)
    kept = tip.SoftOr(0.5)(stats).mask
    assert torch.equal(out.kept.mask, kept)
    check_loss(
        out, student.tensors, kept * (tau**2 if squared else 1.0), 12, temperature=tau if tau.dim() else temperature
    )


@pytest.mark.parametrize("squared", [False, True])
def test_a_callable_temperature_is_learned_at_and_measured_at_one(squared):
    student, teacher = student_case().leaves(), teacher_case()
    seen = []

    def temperature(stats: tip.TokenStats) -> Tensor:
        seen.append(stats)
        return (1.0 + stats.hellinger_sq).requires_grad_()

    out = distill(
        student.head, teacher.head, select=tip.TopHellinger(0.25), temperature=temperature, temperature_sq=squared
    )
    plain = tip.token_stats(student.head, teacher.head)
    assert len(seen) == 1 and all(hasattr(seen[0], name) for name in ("entropy_s", *TEACHER))
    for name in ("entropy_s", *TEACHER):
        assert torch.equal(getattr(out.stats, name), getattr(plain, name)), name
    tau = 1.0 + plain.hellinger_sq
    weights = out.kept.mask * (tau**2 if squared else 1.0)
    check_loss(out, student.tensors, weights, 6, temperature=tau)


def test_a_callable_temperature_may_be_nan_where_nothing_was_measured():
    student, teacher = student_case(), teacher_case()
    student.hidden[3] = NAN  # a broken row, never kept
    case = student.leaves()
    out = distill(case.head, teacher.head, row_mask=MASK, temperature=lambda stats: 1.0 + stats.entropy_s)
    out.loss.backward()
    assert out.loss.isfinite() and all(x.grad.isfinite().all() for x in case.tensors)


# What is measured, and what it costs


def test_a_rule_without_teacher_statistics_leaves_the_teachers_nan_where_it_did_not_keep():
    student, teacher = student_case(), teacher_case()
    out = distill(student.head, teacher.head, select=tip.TopEntropy(0.25), divergence=tip.Jeffreys())
    full = tip.token_stats(student.head, teacher.head)
    kept = out.kept.mask
    assert torch.equal(out.stats.entropy_s, full.entropy_s)
    for name in ("kl_fwd", "kl_rev"):
        ours, truth = getattr(out.stats, name), getattr(full, name)
        assert ours[~kept].isnan().all()
        no_worse(ours[kept], truth[kept], truth[kept].double(), name)


@pytest.mark.parametrize("rule", [tip.KeepAll(), tip.RandomRows(0.25), tip.TopEntropy(0.25), tip.SoftOr(0.25)], ids=str)
def test_full_stats_measures_every_row(rule):
    student, teacher = student_case(), teacher_case()
    out = distill(student.head, teacher.head, select=rule, full_stats=True)
    full = tip.token_stats(student.head, teacher.head)
    for name in ("lse_s", "entropy_s", *TEACHER):
        assert torch.equal(getattr(out.stats, name), getattr(full, name)), name
    assert not hasattr(out.stats, "margin_s") and not hasattr(out.stats, "logp_s")


def test_stats_of_distill_are_good_for_a_loss_of_the_same_rows():
    student, teacher = student_case().leaves(), teacher_case()
    out = distill(student.head, teacher.head, select=tip.SoftOr(0.25))
    loss = tip.divergence_loss(student.head, teacher.head, kept=out.kept, stats=out.stats)
    no_worse(out.loss.detach(), loss.mean().detach(), loss.mean().detach().double(), "loss")
    assert not any(getattr(out.stats, name).requires_grad for name in PUBLIC if hasattr(out.stats, name))


PLANS = {  # at equal widths: rule, options, frozen leaves, most products of N x H x V
    "soft or": (tip.SoftOr(0.25), {}, (), 2 + 4 / 4),
    "keep all": (tip.KeepAll(), {}, (), 2 + 4),
    "entropy": (tip.TopEntropy(0.25), {}, (), 1 + 6 / 4),
    "random": (tip.RandomRows(0.25), {}, (), 6 / 4),
    "masked": (tip.SoftOr(0.5), {"row_mask": torch.arange(N) < 12}, (), (2 + 4 / 2) / 2),
    "full stats": (tip.TopEntropy(0.25), {"full_stats": True}, (), 2 + 4 / 4),
    "frozen head": (tip.SoftOr(0.25), {}, ("weight",), 2 + 3 / 4),
    "frozen body": (tip.SoftOr(0.25), {}, ("hidden",), 2 + 3 / 4),
    "no gradient": (tip.SoftOr(0.25), {}, ("hidden", "weight"), 2),
    "adaptive": (tip.SoftOr(0.25), {"temperature": lambda stats: 1 + stats.hellinger_sq}, (), 2 + 6 / 4),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_counts_the_products_that_are_taken(case):
    rule, options, frozen, most = PLANS[case]
    student, teacher = head_case(N, V, 32, seed=20).leaves(), head_case(N, V, 32, seed=30)
    for name in frozen:
        getattr(student, name).requires_grad_(False)
    with Products() as products:
        out = distill(student.head, teacher.head, select=rule, **options)
        if out.loss.requires_grad:
            out.loss.backward()
    units = products.macs / (N * 32 * V)
    assert out.plan.units == pytest.approx(units)
    assert units <= most + 1e-9
    assert out.plan.strategy == "two sweeps" or units < most
    assert out.plan.workspace_mib == 256


# Nothing to learn from, and rows that are no good


@pytest.mark.parametrize("source", ["head", "logits"])
@pytest.mark.parametrize(
    "how",
    ["nothing kept", "everything masked", "no rows", "no rows in a batch", "no rows, all kept", "every row broken"],
)
def test_nothing_kept_is_a_zero_with_a_graph(how, source):
    n = 0 if how.startswith("no rows") else 6
    student, teacher = student_case(n), teacher_case(n)
    options = {"select": tip.SoftOr(0.5)}
    if how == "nothing kept":
        options["select"] = tip.Threshold("kl_rev", above=1e9)
    elif how == "everything masked":
        options["row_mask"] = torch.zeros(n, dtype=torch.bool)
    elif how == "no rows, all kept":
        options["select"] = tip.KeepAll()
    elif how == "every row broken":
        student.hidden[:] = NAN
    shape = (2, 0) if how == "no rows in a batch" else (n,)
    case = student.leaves()
    if source == "head":
        one, other = (tip.Head(c.hidden.view(*shape, c.hidden.shape[-1]), c.weight) for c in (case, teacher))
        leaves = case.tensors
    else:
        z = leaf(student.logits().view(*shape, V))
        one, other, leaves = z, teacher.logits().view(*shape, V), [z]
    for normalizer in ("kept", "all", 5):
        out = distill(one, other, normalizer=normalizer, **options)
        assert out.loss.item() == 0 and out.loss.requires_grad
        assert out.kept.row_ids.numel() == out.plan.kept_rows == out.plan.dropped_rows == 0
        out.loss.backward()
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def broken_pair() -> tuple[Tensor, Tensor]:
    """Row 1 has an infinite reverse KL, row 2 an infinite forward one; 3 is NaN in the student, 4 in the teacher."""
    s, t = ordinary(8, 200)
    t[1, 5], s[2, 5], s[3, 9], t[4, 9] = -INF, -INF, NAN, INF
    return s, t


def test_kept_rows_without_a_finite_loss_weigh_nothing_are_counted_and_warned_of():
    s, t = broken_pair()
    student = leaf(s)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        out = distill(student, t, select=tip.KeepAll())
    assert out.plan.kept_rows == 8 and out.plan.dropped_rows == 3
    good = torch.tensor([0, 2, 5, 6, 7])
    value = ref.reverse_kl(s.double(), t.double())[good].mean()
    no_worse(out.loss.detach(), value.float(), value, "loss")
    out.loss.backward()
    assert student.grad.isfinite().all()
    assert (student.grad.abs().sum(1) > 0).nonzero().squeeze(1).tolist() == good.tolist()


def test_an_infinite_row_ranks_first_and_is_dropped_from_the_loss():
    s, t = broken_pair()
    student = leaf(s)
    with pytest.warns(RuntimeWarning):
        out = distill(student, t, select=tip.TopDivergence(3))
    assert out.kept.mask[1] and not out.kept.mask[3:5].any()
    assert out.plan.kept_rows == 3 and out.plan.dropped_rows == 1
    rows = [i for i in out.kept.row_ids.tolist() if i != 1]
    value = ref.reverse_kl(s.double(), t.double())[rows].mean()
    no_worse(out.loss.detach(), value.float(), value, "loss")


def test_a_kept_row_whose_teacher_is_nan_is_dropped():
    student, teacher = student_case(), teacher_case()
    best = tip.token_stats(student.head).entropy_s.argmax()
    teacher.hidden[best] = NAN
    case = student.leaves()
    with pytest.warns(RuntimeWarning):
        out = distill(case.head, teacher.head, select=tip.TopEntropy(4))  # never looks at the teacher
    assert out.kept.mask[best] and out.plan.dropped_rows == 1
    weights = out.kept.mask.float().index_fill(0, best, 0.0)
    check_loss(out, case.tensors, weights, 3, teacher=teacher)


def test_the_normalizer_all_counts_unmasked_rows_that_are_not_nan():
    s, t = broken_pair()
    t[1, 5] = 0.0
    mask = torch.arange(8) != 7
    out = distill(s, t, select=tip.TopDivergence(2, by="entropy_t"), row_mask=mask, normalizer="all")
    value = ref.reverse_kl(s.double(), t.double())[out.kept.row_ids].sum() / 5  # 8 rows, one masked, two NaN
    no_worse(out.loss, value.float(), value, "loss")


def test_sound_batches_warn_of_nothing():
    student, teacher = student_case().leaves(), teacher_case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(student.head, teacher.head).loss.backward()


# Inputs, modes and memory


def test_distill_changes_no_input():
    case, teacher = student_case(bias=normal(V, seed=1)).leaves(), teacher_case()
    tau, mask, weights, ids = TAU.clone(), MASK.clone(), WEIGHTS.clone(), torch.arange(N) % 4
    labels = torch.zeros(N, dtype=torch.long)
    inputs = [*case.tensors, *teacher.tensors, tau, mask, weights, ids, labels]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    out = distill(
        case.head, teacher.head, row_mask=mask, rollout_ids=ids, labels=labels, row_weights=weights, temperature=tau
    )
    assert all(x.grad is None for x in case.tensors)
    out.loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


def test_distill_measures_only_without_grad():
    student, teacher = student_case(), teacher_case()
    assert not distill(student.head, teacher.head).loss.requires_grad
    case = student.leaves()
    with torch.no_grad():
        out = distill(case.head, teacher.head)
    assert out.loss.grad_fn is None
    with torch.inference_mode():
        again = distill(case.head, teacher.head)
    assert torch.equal(out.loss, again.loss)


def test_a_teacher_from_inference_mode_is_as_good_as_any():
    case, expected, teacher = student_case().leaves(), student_case().leaves(), teacher_case()
    distill(expected.head, teacher.head).loss.backward()
    with torch.inference_mode():
        hidden = teacher.hidden.clone()
    distill(case.head, tip.Head(hidden, teacher.weight)).loss.backward()
    assert torch.equal(case.weight.grad, expected.weight.grad)


def test_gradients_accumulate_and_a_retained_graph_runs_again():
    once, more, teacher = student_case().leaves(), student_case().leaves(), teacher_case()
    distill(once.head, teacher.head).loss.backward()
    loss = distill(more.head, teacher.head).loss
    loss.backward(retain_graph=True)
    loss.backward()
    distill(more.head, teacher.head).loss.backward()
    for x, y in zip(once.tensors, more.tensors, strict=True):
        check_gradient(y.grad / 3, x.grad, x.grad.double(), "three times")


def test_autocast_learns_in_its_dtype_and_returns_fp32():
    case, teacher = student_case().leaves(), teacher_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distill(case.head, teacher.head, select=tip.KeepAll())
    rounded = [c.to(torch.bfloat16).to(torch.float32) for c in (student_case(), teacher_case())]
    check_loss(out, case.tensors, torch.ones(N), N, student=rounded[0], teacher=rounded[1])
    assert all(x.grad.dtype == torch.float32 for x in case.tensors)


def test_a_tiny_workspace_gives_the_same_result():
    student, teacher = head_case(300, V, 384, seed=20), head_case(300, V, 256, seed=30)
    kept = tip.TopEntropy(0.2)(tip.token_stats(student.head)).mask
    for workspace_mib in (1, 512):
        case = student.leaves()
        out = distill(case.head, teacher.head, select=tip.TopEntropy(0.2), workspace_mib=workspace_mib)
        assert torch.equal(out.kept.mask, kept)
        check_loss(out, case.tensors, kept.float(), 60, student=student, teacher=teacher)


def peak_mib(work: Callable[[], object]) -> float:
    """The most memory that the CPU allocator held during work beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert events
    return most / 2**20


def excess_mib(student: HeadCase, teacher: HeadCase, **options) -> float:
    """The peak of a step beyond the gradients and the fp32 accumulator of the kept rows' d(hidden)."""
    case, out = student.leaves(), []

    def step() -> None:
        out.append(distill(case.head, teacher.head, **options))
        out[0].loss.backward()

    peak = peak_mib(step)
    grads = sum(x.numel() * x.element_size() for x in case.tensors)
    if case.hidden.dtype != torch.float32:
        grads += 6 * out[0].kept.row_ids.numel() * case.hidden.shape[1]  # fp32, and its rounding into the leaf's dtype
    return peak - grads / 2**20


MEMORY = {  # rows, vocabulary, width of the student, of the teacher, keep
    "moderate": (1024, 8000, 128, 128, 0.2),
    "all kept": (1024, 8000, 128, 256, 1.0),
    "wide": (64, 600, 4096, 4096, 0.5),
    "wider than the workspace likes": (16, 300, 16384, 16384, 1.0),
    "large vocabulary": (300, 200_000, 16, 16, 0.2),
    "many rows": (20_000, 100, 16, 16, 0.2),
}


@pytest.mark.parametrize("case", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_stays_within_its_workspace(case, dtype):
    n, vocab, width_s, width_t, keep = MEMORY[case]
    student, teacher = (head_case(n, vocab, w, seed=20).to(dtype) for w in (width_s, width_t))
    excess = excess_mib(student, teacher, select=tip.SoftOr(keep, scope="batch"), workspace_mib=16)
    per_row = 300 * n / 2**20  # (N,) tensors: statistics, sorts, masks
    assert excess <= 16 + per_row


@pytest.mark.parametrize("layout", ["contiguous", "cut in time"])
@pytest.mark.parametrize("asked", [{}, {"margins": True, "top_k": 64}], ids=["plain", "lists"])
def test_measuring_logits_stays_within_its_workspace(asked, layout):
    s, t = torch.zeros(4, 257, 8000), torch.zeros(4, 257, 8000)  # 31 MiB each
    if layout == "contiguous":
        s, t = s[:, :-1].contiguous(), t[:, :-1].contiguous()
    else:
        s, t = s[:, :-1], t[:, :-1]  # what every causal model's labels need
    assert peak_mib(lambda: tip.token_stats(s, t, workspace_mib=16, **asked)) <= 17


def test_learning_from_logits_stays_within_its_workspace():
    s, t = torch.zeros(4, 257, 8000, requires_grad=True), torch.zeros(4, 257, 8000)
    out = []
    forward = peak_mib(lambda: out.append(distill(s[:, :-1], t[:, :-1], workspace_mib=16)))
    assert forward <= 17
    backward = peak_mib(lambda: out[0].loss.backward())
    assert backward <= 17 + 2 * 4 * s.numel() / 2**20  # the gradient, of the cut and then of the whole
    assert math.isfinite(out[0].loss.item())


# What a second reader found


def test_margins_of_the_student_are_its_own_beside_a_top_k_teacher():
    torch.manual_seed(0)
    student, logp = torch.randn(6, 50), torch.randn(6, 50).log_softmax(-1)
    top = logp.topk(3)
    out = distill(student, tip.TopK(top.indices, top.values), select=tip.TopMargin(2, by="margin_s"), full_stats=True)
    torch.testing.assert_close(out.stats.margin_s, tip.token_stats(student, margins=True).margin_s)


def test_statistics_of_another_top_k_teacher_are_measured_again():
    torch.manual_seed(0)
    student, logp = torch.randn(4, 50), torch.randn(4, 50).log_softmax(-1)
    five, three = (tip.TopK(top.indices, top.values) for top in (logp.topk(5), logp.topk(3)))
    stats = tip.token_stats(student, five)
    ours = tip.divergence_loss(student, three, stats=stats)
    torch.testing.assert_close(ours, tip.divergence_loss(student, three))


def test_the_label_loss_alone_does_not_read_an_infinite_divergence():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 30, requires_grad=True), torch.randn(5, 30)
    teacher[2, 4] = -torch.inf
    labels = torch.randint(0, 30, (5,))
    out = distill(student, teacher, select=tip.KeepAll(), labels=labels, ce_weight=1.0)
    expected = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (out.loss, expected)))
    assert out.plan.dropped_rows == 0


def test_what_a_call_returns_does_not_alias_the_callers_mask():
    mask = torch.ones(12, dtype=torch.bool)
    out = distill(torch.randn(12, 30), torch.randn(12, 30), select=tip.KeepAll(), row_mask=mask)
    mask[:6] = False
    assert out.kept.mask.all()


def test_statistics_with_rows_left_out_are_measured_again():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 40), torch.randn(8, 40)
    out = distill(student, teacher, select=tip.TopEntropy(2))
    torch.testing.assert_close(
        tip.divergence_loss(student, teacher, stats=out.stats), tip.divergence_loss(student, teacher)
    )


def test_hidden_states_cut_in_time_are_not_copied_and_give_the_same_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    other_hidden, other_weight = torch.randn(3, 9, 8), torch.randn(40, 8)
    grads = []
    for cut in (lambda x: x[:, :-1], lambda x: x[:, :-1].contiguous()):
        out = distill(tip.Head(cut(hidden), weight), tip.Head(cut(other_hidden), other_weight), select=tip.SoftOr(4))
        grads.append(torch.autograd.grad(out.loss, (hidden, weight)))
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "divergence", [tip.SampledReverseKL(), tip.SampledReverseKL().clipped(5.0)], ids=["", "clipped"]
)
@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.filterwarnings("ignore:tip_kernels.distill")
def test_the_label_loss_alone_drops_broken_rows_and_no_others(divergence, sweeps):
    """Row 0 has no label, which is a loss of 0; row 1 has none and is NaN in the student, row 2 is in the teacher."""
    student, teacher = student_case(6), teacher_case(6)
    student.hidden[1], teacher.hidden[2] = NAN, NAN
    labels = torch.tensor([-100, -100, 3, 4, 5, 6])
    case = student.leaves()
    options = {"labels": labels, "ce_weight": 1.0, "select": tip.KeepAll(), "divergence": divergence}
    out = distill(case.head, teacher.head, sweeps=sweeps, **options)
    assert out.plan.dropped_rows == 2
    expected = torch.nn.functional.cross_entropy(student.logits()[3:], labels[3:], reduction="sum") / 4
    torch.testing.assert_close(out.loss.detach(), expected)
    out.loss.backward()
    assert all(x.grad.isfinite().all() for x in case.tensors)


@pytest.mark.parametrize("n", [60, 230, 300])
def test_a_16_bit_head_that_takes_several_blocks_counts_its_wide_sum(n):
    """An fp32 (V, H) beside the gradient, whatever makes the blocks several."""
    student, teacher = (head_case(n, 20_000, 256, seed=20).to(torch.bfloat16) for _ in range(2))
    excess = excess_mib(student, teacher, select=tip.KeepAll(), workspace_mib=16)
    assert excess <= 16 + 0.1


@pytest.mark.parametrize("normalizer", ["kept", 3.0])
@pytest.mark.parametrize("select", [tip.KeepAll(), tip.SoftOr(0.2)], ids=["all", "quota"])
def test_backward_at_once_makes_no_second_sum_beside_an_existing_gradient(select, normalizer):
    student, teacher = head_case(64, 20_000, 256, seed=20), head_case(64, 20_000, 256, seed=30)
    case = student.leaves()
    case.weight.grad = torch.zeros_like(case.weight)
    options = {"select": select, "normalizer": normalizer, "workspace_mib": 12, "backward": True}
    peak = peak_mib(lambda: distill(case.head, teacher.head, **options))
    assert peak <= 12 + 3 * 64 * 256 * 4 / 2**20


def test_many_rows_of_few_tokens_are_not_ranked_again_after_every_block():
    student, teacher = head_case(20_000, 128, 32, seed=20), head_case(20_000, 128, 32, seed=30)
    plans = [distill(student.leaves().head, teacher.head, sweeps=sweeps).plan for sweeps in (None, 1)]
    assert [plan.strategy for plan in plans] == ["two sweeps", "one sweep"]
    wide = head_case(1024, 32_000, 64, seed=20), head_case(1024, 32_000, 64, seed=30)
    assert distill(wide[0].leaves().head, wide[1].head).plan.strategy == "one sweep"


# Weights of rows, and gradients that are scaled afterwards


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("normalizer", ["kept", "all", 3.0])
@pytest.mark.parametrize("sweeps", [1, 2, None])
def test_a_row_of_a_weight_that_is_not_finite_is_dropped_and_counted(sweeps, normalizer, bad):
    student, teacher = head_case(12, 300, 16, seed=20), head_case(12, 300, 24, seed=30)
    weights = torch.linspace(0.5, 2.0, 12)
    results = []
    for value in (0.0, bad):
        case, w = student.leaves(), weights.clone()
        w[4] = value
        how = {"select": tip.KeepAll(), "normalizer": normalizer, "sweeps": sweeps, "row_weights": w}
        if value == 0.0:
            out = distill(case.head, teacher.head, **how)
        else:
            with pytest.warns(RuntimeWarning, match="a NaN or infinite loss or weight and got weight 0"):
                out = distill(case.head, teacher.head, **how)
            assert int(out.plan.dropped_rows) == 1
        out.loss.backward()
        results.append([out.loss.detach(), *(x.grad for x in case.tensors)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_weights_of_masked_rows_may_hold_anything():
    student, teacher = head_case(12, 300, 16, seed=20), head_case(12, 300, 24, seed=30)
    weights, mask = torch.ones(12), torch.arange(12) != 4
    weights[4] = NAN
    for sweeps in (1, 2):
        out = distill(student.leaves().head, teacher.head, row_weights=weights, row_mask=mask, sweeps=sweeps)
        assert out.loss.isfinite() and int(out.plan.dropped_rows) == 0


@pytest.mark.parametrize("normalizer", ["kept", "all", 3.0])
@pytest.mark.parametrize("select", [tip.KeepAll(), tip.SoftOr(0.5)], ids=["all", "quota"])
def test_weights_get_the_same_gradient_in_one_sweep_as_in_two(select, normalizer):
    student, teacher = head_case(12, 300, 16, seed=20), head_case(12, 300, 24, seed=30)
    grads = []
    for sweeps in (1, 2):
        case, weights = student.leaves(), leaf(torch.linspace(0.5, 2.0, 12))
        out = distill(case.head, teacher.head, select=select, normalizer=normalizer, row_weights=weights, sweeps=sweeps)
        out.loss.backward()
        assert weights.grad.abs().max() > 0
        grads.append([weights.grad, *(x.grad for x in case.tensors)])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n", [40, 4096])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_fp16_gradients_are_rounded_after_the_loss_scale(sweeps, n):
    student, teacher = head_case(n, 300, 16, seed=20).to(torch.float16), head_case(n, 300, 24, seed=30)
    exact, case = student.to(torch.float64).leaves(), student.leaves()
    divergence = ref.divergences.reverse_kl(exact.logits(), teacher.to(torch.float16).to(torch.float64).logits())
    (2.0**14 * divergence.sum() / 2**22).backward()
    how = {"normalizer": 2.0**22, "sweeps": sweeps}
    out = distill(case.head, teacher.to(torch.float16).head, select=tip.KeepAll(), **how)
    (2.0**14 * out.loss).backward()
    for ours, truth in zip(case.tensors, exact.tensors, strict=True):
        assert relative_error(ours.grad, truth.grad) <= 5e-4


def test_a_wider_main_grad_gets_the_sum_before_it_is_rounded():
    student, teacher = head_case(200, 300, 16, seed=20).to(torch.bfloat16), head_case(200, 300, 24, seed=30)
    exact = student.to(torch.float64).leaves()
    teacher = teacher.to(torch.bfloat16)
    ref.divergences.reverse_kl(exact.logits(), teacher.to(torch.float64).logits()).mean().backward()
    for sweeps in (1, 2):
        case = student.leaves()
        case.weight.main_grad = torch.zeros(300, 16)
        distill(case.head, teacher.head, select=tip.KeepAll(), sweeps=sweeps, backward=True)
        assert relative_error(case.weight.main_grad, exact.weight.grad) <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, torch.linspace(0.5, 2.0, 12)], ids=["one", "per row"])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_label_loss_alone_keeps_rows_whose_divergence_is_infinite(sweeps, temperature):
    student, teacher = head_case(12, 300, 16, seed=20), head_case(12, 300, 24, seed=30)
    bias = torch.zeros(300)
    bias[5] = -INF  # the student bans what the teacher allows
    student.bias = bias
    labels = torch.arange(12) + 10
    case = student.leaves()
    out = distill(
        case.head, teacher.head, select=tip.KeepAll(), divergence=tip.ForwardKL(), labels=labels, ce_weight=1.0,
        temperature=temperature, temperature_sq=True, sweeps=sweeps,
    )  # fmt: skip
    truth = torch.nn.functional.cross_entropy(student.logits().double(), labels)
    assert int(out.plan.dropped_rows) == 0
    assert abs(out.loss.double() - truth) <= 1e-5
