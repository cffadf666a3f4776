"""The family: every divergence against float64 autograd of the reference, and the identities that tie them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import reference as ref
import tip_kernels as tip
from tests._cases import (
    INF,
    NAN,
    PAIRS,
    STATISTIC_FLOOR,
    check_gradient,
    head_case,
    labels_for,
    leaf,
    no_worse,
    normal,
    ordinary,
)

Value = Callable[[Tensor, Tensor], Tensor]

FAMILY: dict[str, tuple[tip.Divergence, Value]] = {
    "forward": (tip.ForwardKL(), ref.forward_kl),
    "reverse": (tip.ReverseKL(), ref.reverse_kl),
    "jeffreys": (tip.Jeffreys(), ref.jeffreys),
    "jsd": (tip.JSD(), ref.jsd),
    "jsd .9": (tip.JSD(0.9), lambda s, t: ref.jsd(s, t, 0.9)),
    "skew forward": (tip.SkewForwardKL(), ref.skew_forward_kl),
    "skew forward .7": (tip.SkewForwardKL(0.7), lambda s, t: ref.skew_forward_kl(s, t, 0.7)),
    "skew reverse": (tip.SkewReverseKL(), ref.skew_reverse_kl),
    "skew reverse detached": (
        tip.SkewReverseKL(0.4, detach_mixture=True),
        lambda s, t: ref.skew_reverse_kl(s, t, 0.4, detach_mixture=True),
    ),
    "tvd": (tip.TVD(), ref.tvd),
    "hellinger": (tip.HellingerSq(), ref.hellinger_sq),
    "renyi .3": (tip.Renyi(0.3), lambda s, t: ref.renyi(s, t, 0.3)),
    "renyi 2": (tip.Renyi(2), lambda s, t: ref.renyi(s, t, 2)),
    "alpha-beta": (tip.AlphaBeta(), lambda s, t: ref.alpha_beta(s, t, 0.2, 0.7)),
    "alpha-beta 1.5, .8": (tip.AlphaBeta(1.5, 0.8), lambda s, t: ref.alpha_beta(s, t, 1.5, 0.8)),
    "todi": (tip.ToDi(), ref.todi),
    "todi 0": (tip.ToDi(0.0), lambda s, t: ref.todi(s, t, 0.0)),
    "todi 3": (tip.ToDi(3.0), lambda s, t: ref.todi(s, t, 3.0)),
    "sum": (
        0.3 * tip.ForwardKL() + tip.JSD() * 2 + 0.5 * (tip.ToDi() + tip.Renyi(0.5)),
        lambda s, t: 0.3 * ref.forward_kl(s, t) + 2 * ref.jsd(s, t) + 0.5 * (ref.todi(s, t) + ref.renyi(s, t, 0.5)),
    ),
}
every_divergence = pytest.mark.parametrize("name", FAMILY)
# What a value multiplies its rounded sums over the vocabulary with: a weighted sum's weights, alpha-beta's 1 / (a b).
SCALE = {"sum": 3.3, "alpha-beta": 1 / (0.2 * 0.7)}


# Inputs beside those of _cases.py


def identical(n: int, v: int) -> tuple[Tensor, Tensor]:
    s = 3 * normal(n, v, seed=7)
    return s, s.clone()


def far(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 12 * normal(n, v, seed=11), 12 * normal(n, v, seed=12)


def saturated(n: int, v: int) -> tuple[Tensor, Tensor]:
    """One token leads by 20 to 300 nats; the models agree about which in every other row."""
    s, t = normal(n, v, seed=13), normal(n, v, seed=14)
    rows, lead = torch.arange(n), torch.linspace(20, 300, n)
    s[rows, rows % v] += lead
    t[rows, (rows + rows % 2) % v] += lead.flip(0)
    return s, t


def disjoint_modes(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Each model puts its mass on a half of the vocabulary that the other gives about e^-30."""
    s, t = normal(n, v, seed=15), normal(n, v, seed=16)
    s[:, : v // 2] += 30
    t[:, v // 2 :] += 30
    return s, t


def nothing_in_common(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Each model bans every token that the other allows."""
    s, t = ordinary(n, v)
    s[:, : v // 2], t[:, v // 2 :] = -INF, -INF
    return s, t


CASES = PAIRS | {f.__name__: f for f in (identical, far, saturated, disjoint_modes, nothing_in_common)}


def at_temperature(z: Tensor, tau: float | Tensor) -> Tensor:
    return z / (tau.to(z.dtype)[:, None] if isinstance(tau, Tensor) else tau)


def through_reference(
    s: Tensor, t: Tensor, value: Value, upstream: Tensor, tau: float | Tensor = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Row values and d(sum of upstream * value)/d(s) over the finite ones (R9), in float64 and in float32."""
    out = []
    for dtype in (torch.float64, torch.float32):
        z = leaf(s.to(dtype))
        values = value(at_temperature(z, tau), at_temperature(t.to(dtype), tau))
        values.backward(torch.where(values.isfinite(), upstream.to(dtype), 0.0))
        out.append((values.detach(), z.grad))
    return out


def loss_and_gradient(
    s: Tensor, t: Tensor, divergence: tip.Divergence, upstream: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    student = leaf(s)
    loss = tip.divergence_loss(student, t, divergence=divergence, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), student.grad


def check_value(loss: Tensor, eager: Tensor, truth: Tensor, name: str = "") -> None:
    """A relative error of at most 1e-5, or twice eager fp32's worst, or below the floor of a statistic."""
    near = truth.isfinite() & ((loss.double() - truth).abs() <= 1e-5 * truth.abs())
    no_worse(torch.where(near, truth, loss), eager, truth, "loss", STATISTIC_FLOOR * SCALE.get(name, 1.0))


def check(s: Tensor, t: Tensor, name: str, **options) -> None:
    """Holds values and gradient of a member of the family to the bounds, rows weighted from 1/2 to 2."""
    divergence, value = FAMILY[name]
    upstream = torch.linspace(0.5, 2.0, s.shape[0])
    loss, grad = loss_and_gradient(s, t, divergence, upstream, **options)
    truth, eager = through_reference(s, t, value, upstream, options.get("temperature", 1.0))
    check_value(loss, eager[0], truth[0], name)
    check_gradient(
        grad, eager[1], truth[1], "gradient", largest_logit=largest_logit(s, t), row_weight=2.0 * SCALE.get(name, 1.0)
    )


def largest_logit(*logits: Tensor) -> float:
    return max(1.0, *(z[z.isfinite()].abs().amax().item() for z in logits))


# Against the truth


@every_divergence
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_no_worse_than_eager_fp32(case, name):
    check(*CASES[case](8, 1100), name)


@every_divergence
@pytest.mark.parametrize("vocab", [1, 2, 127, 1025])
def test_vocabularies_of_any_size(vocab, name):
    check(*ordinary(3, vocab), name)


@every_divergence
def test_a_temperature_per_row(name):
    check(*ordinary(8, 1100), name, temperature=torch.linspace(0.4, 3.0, 8))


@every_divergence
def test_gradients_reach_every_leaf_of_a_head_with_bias_scale_and_softcap_at_a_temperature_per_row(name):
    ours, value = FAMILY[name]
    tau, upstream = torch.linspace(0.4, 3.0, 12), torch.linspace(0.5, 2.0, 12)
    student = head_case(12, 1100, 24, seed=20, scale=1.5, softcap=9.0, bias=normal(1100, seed=40))
    teacher = head_case(12, 1100, 40, seed=30, scale=0.5, softcap=7.0, spread=4.0)
    case = student.leaves()
    loss = tip.divergence_loss(case.head, teacher.head, divergence=ours, temperature=tau)
    loss.backward(upstream)
    truths = []
    for dtype in (torch.float64, torch.float32):
        other = student.to(dtype).leaves()
        values = value(other.logits(tau), teacher.to(dtype).logits(tau))
        values.backward(upstream.to(dtype))
        truths.append((values.detach(), [x.grad for x in other.tensors]))
    (truth, truth_grads), (eager, eager_grads) = truths
    check_value(loss.detach(), eager, truth, name)
    for leaf_name, x, e, g in zip(("hidden", "weight", "bias"), case.tensors, eager_grads, truth_grads, strict=True):
        check_gradient(x.grad, e, g, leaf_name)


@every_divergence
@pytest.mark.parametrize("case", ["ordinary", "near_equal", "peaked", "disjoint_modes", "banned_in_both"])
def test_every_row_of_a_gradient_sums_to_zero(case, name):
    s, t = CASES[case](8, 1100)
    _, grad = loss_and_gradient(s, t, FAMILY[name][0])
    floor = 1e-7 * largest_logit(s, t) * SCALE.get(name, 1.0)
    assert (grad.double().sum(1).abs() <= 1e-5 * grad.double().abs().sum(1) + floor).all()


@every_divergence
@pytest.mark.parametrize("case", ["identical", "banned in both", "peaked", "head"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(case, name):
    s, _ = {"banned in both": PAIRS["banned_in_both"], "peaked": PAIRS["peaked"]}.get(case, identical)(8, 1100)
    if case == "head":
        teacher = head_case(8, 1100, 24, seed=20)
        student = teacher.leaves()
        loss = tip.divergence_loss(student.head, teacher.head, divergence=FAMILY[name][0])
        loss.sum().backward()
        grad = student.hidden.grad
    else:
        loss, grad = loss_and_gradient(s, s.clone(), FAMILY[name][0])
    assert (loss >= 0).all() and (loss <= STATISTIC_FLOOR * SCALE.get(name, 1.0)).all()
    assert (grad.abs() <= 1e-7 * largest_logit(s) * SCALE.get(name, 1.0)).all()


def test_values_are_finite_exactly_where_the_mathematics_is():
    """Rows: the student bans a teacher's token; the mirror; both ban it; neither allows what the other does."""
    s, t = torch.zeros(4, 4), torch.zeros(4, 4)
    s[0, 0] = t[1, 0] = s[2, 0] = t[2, 0] = -INF
    s[3, :2], t[3, 2:] = -INF, -INF
    infinite = {
        "forward": [True, False, False, True],
        "reverse": [False, True, False, True],
        "renyi .3": [False, False, False, True],
        "renyi 2": [True, False, False, True],
        **{key: [True, True, False, True] for key in ("jeffreys", "todi", "todi 0", "todi 3", "sum")},
    }
    for name, (ours, _) in FAMILY.items():
        loss, grad = loss_and_gradient(s, t, ours)
        assert loss.isposinf().tolist() == infinite.get(name, [False] * 4), name
        assert not loss.isnan().any() and grad.isfinite().all(), name
        assert not grad[loss.isinf()].any(), name


@every_divergence
def test_a_broken_row_of_either_model_is_nan_with_gradient_zero_and_spoils_no_other(name):
    s, t = ordinary(6, 300)
    s[1, 7], t[2, 8], s[3, 9], t[4] = NAN, NAN, INF, -INF
    loss, grad = loss_and_gradient(s, t, FAMILY[name][0])
    assert loss.isnan().tolist() == [False, True, True, True, True, False]
    assert not grad[1:5].any()
    alone, grad_alone = loss_and_gradient(s[[0, 5]], t[[0, 5]], FAMILY[name][0])
    no_worse(loss[[0, 5]], alone, alone.double(), "loss")
    check_gradient(grad[[0, 5]], grad_alone, grad_alone.double(), "gradient", largest_logit=15, row_weight=1.0)


@every_divergence
def test_kept_rows_of_measured_statistics_give_what_all_rows_give(name):
    ours = FAMILY[name][0]
    s, t = ordinary(10, 700)
    stats = tip.token_stats(s, t)
    kept = tip.TopEntropy(0.4)(stats)
    rows = kept.row_ids
    upstream = torch.zeros(10).index_fill_(0, rows, 1.0)
    every, grad_every = loss_and_gradient(s, t, ours, upstream)
    for options in ({}, {"stats": stats}):
        loss, grad = loss_and_gradient(s, t, ours, kept=kept, **options)
        no_worse(loss, every[rows], every[rows].double(), "loss")
        check_gradient(grad, grad_every, grad_every.double(), "gradient", largest_logit=12, row_weight=1.0)
        assert not grad[upstream == 0].any()


# Sums, clipping, labels


def test_a_sum_is_linear_and_its_order_does_not_matter():
    s, t = ordinary(6, 500)
    parts = [(0.25, tip.ForwardKL()), (3.0, tip.TVD()), (1.5, tip.AlphaBeta())]
    each = [loss_and_gradient(s, t, d) for _, d in parts]
    expected = [sum(w * x[i] for (w, _), x in zip(parts, each, strict=True)) for i in (0, 1)]
    a, b, c = (w * d for w, d in parts)
    for total in (a + b + c, c + (a + b), 0.5 * (2 * a + b * 2) + c):
        loss, grad = loss_and_gradient(s, t, total)
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-7)


@every_divergence
def test_a_clipped_row_keeps_the_limit_and_has_no_gradient(name):
    ours, value = FAMILY[name]
    s, t = ordinary(8, 500)
    s[0, 3] = -INF  # an infinite row is clipped, too
    limit = float(between_the_middle_two(value(s.double(), t.double())))
    clipped, grad = loss_and_gradient(s, t, ours.clipped(limit))
    loss, full = loss_and_gradient(s, t, ours)
    over = loss > limit
    assert 2 <= over.sum() <= 6
    assert (clipped[over] == limit).all() and not grad[over].any()
    assert torch.equal(clipped[~over], loss[~over]) and torch.equal(grad[~over], full[~over])


def between_the_middle_two(values: Tensor) -> Tensor:
    ordered = values.sort().values
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


@every_divergence
@pytest.mark.parametrize("source", ["logits", "head"])
def test_a_label_loss_mixes_in_at_temperature_one(source, name):
    """0.3 CE + 0.7 D of the kept rows, D at temperature 2 and CE at 1, against autograd of the definition."""
    ours, value = FAMILY[name]
    labels = labels_for(10, 700)
    student = head_case(10, 700, 24, seed=20, softcap=9.0)
    teacher = head_case(10, 700, 24, seed=30)
    options = {"select": tip.KeepAll(), "labels": labels, "ce_weight": 0.3, "temperature": 2.0}
    if source == "head":
        case = student.leaves()
        out = tip.distill(case.head, teacher.head, divergence=ours, **options)
        leaves = case.tensors
    else:
        leaves = [leaf(student.logits())]
        out = tip.distill(leaves[0], teacher.logits(), divergence=ours, **options)
    out.loss.backward()
    grads, losses = [], []
    for dtype in (torch.float64, torch.float32):
        case = student.to(dtype).leaves()
        z_s = case.logits() if source == "head" else leaf(student.logits().to(dtype))
        z_t = teacher.to(dtype).logits() if source == "head" else teacher.logits().to(dtype)
        ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="none", ignore_index=-100)
        loss = (0.3 * ce + 0.7 * value(z_s / 2, z_t / 2)).mean()
        loss.backward()
        losses.append(loss.detach())
        grads.append([x.grad for x in case.tensors] if source == "head" else [z_s.grad])
    check_value(out.loss.detach(), losses[1], losses[0], name)
    for x, e, g in zip(leaves, grads[1], grads[0], strict=True):
        check_gradient(x.grad, e, g, source, largest_logit=12, row_weight=0.1)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("tau", [1.0, torch.linspace(0.5, 2.0, 12)], ids=["one", "per row"])
def test_sampled_reverse_kl_is_the_score_function_form(tau, clip):
    ours = tip.SampledReverseKL(clip)
    s, t = ordinary(12, 700)
    labels = labels_for(12, 700)
    t[4, labels[4]] = -INF  # the teacher bans this sample
    if clip is None:
        s[3, labels[3]] = -INF
    upstream = torch.where(labels == -100, 0.0, torch.linspace(0.5, 2.0, 12))
    for stats in (tip.token_stats(s, t, labels=labels, temperature=tau), tip.token_stats(s, t, labels=labels)):
        loss, grad = loss_and_gradient(s, t, ours, upstream, stats=stats, temperature=tau)
        truth, eager = through_reference(s, t, lambda a, b: ref.sampled_reverse_kl(a, b, labels, clip), upstream, tau)
        assert torch.equal(loss.isnan(), labels == -100)
        check_value(loss, eager[0], truth[0])
        check_gradient(grad, eager[1], truth[1], "gradient", largest_logit=14, row_weight=2.0)


def test_a_sample_that_the_student_bans_has_the_clipped_value_and_no_gradient():
    s, t = ordinary(2, 60)
    labels = torch.tensor([7, 8])
    s[0, 7] = -INF
    stats = tip.token_stats(s, t, labels=labels)
    loss, grad = loss_and_gradient(s, t, tip.SampledReverseKL(0.5), stats=stats)
    assert loss[0] == -0.5 and not grad[0].any() and grad[1].any()


def test_sampled_reverse_kl_is_on_average_the_reverse_kl_with_its_gradient():
    """All V samples of each row, weighted by their probability."""
    v = 9
    s, t = ordinary(4, v)
    expected, grad_expected = loss_and_gradient(s, t, tip.ReverseKL())
    labels = torch.arange(v).repeat(4)
    rows_s, rows_t = s.repeat_interleave(v, 0), t.repeat_interleave(v, 0)
    stats = tip.token_stats(rows_s, rows_t, labels=labels)
    chances = stats.logp_s.exp()
    loss, grad = loss_and_gradient(rows_s, rows_t, tip.SampledReverseKL(), chances, stats=stats)
    torch.testing.assert_close((chances * loss).view(4, v).sum(1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.view(4, v, v).sum(1), grad_expected, rtol=1e-5, atol=1e-6)


def test_sampled_reverse_kl_without_labels_is_refused():
    s, t = ordinary(3, 50)
    with pytest.raises(ValueError, match=r"^stats: expected token_stats.*labels.*SampledReverseKL"):
        tip.divergence_loss(s, t, divergence=tip.SampledReverseKL())
    with pytest.raises(ValueError, match=r"^labels: expected .*SampledReverseKL"):
        tip.distill(s, t, divergence=tip.SampledReverseKL())


# Identities, through the package alone

IDENTITY_CASES = ["flat", "ordinary", "near_equal", "peaked", "far", "saturated", "disjoint_modes", "banned_in_both"]
every_case = pytest.mark.parametrize("case", IDENTITY_CASES)


def same(a: tip.Divergence, b: tip.Divergence, s: Tensor, t: Tensor, factor: float = 1.0, gradient: bool = True):
    """Asserts a = factor * b, up to rounding."""
    (loss, grad), (other, grad_other) = (loss_and_gradient(s, t, d) for d in (a, b))
    torch.testing.assert_close(loss, factor * other, rtol=2e-5, atol=4e-6 * max(factor, 1.0))
    if gradient:
        floor = 2e-7 * largest_logit(s, t) * max(factor, 1.0)
        torch.testing.assert_close(grad, factor * grad_other, rtol=1e-4, atol=floor)


@every_case
def test_todi_has_the_value_of_jeffreys_at_one_and_half_of_it_at_zero(case):
    s, t = CASES[case](8, 700)
    same(tip.ToDi(1.0), tip.Jeffreys(), s, t, gradient=False)
    same(tip.ToDi(0.0), tip.Jeffreys(), s, t, factor=0.5)


@pytest.mark.parametrize("case", ["ordinary", "far", "disjoint_modes", "banned_in_both"])
def test_todi_in_the_limit_of_large_beta_takes_the_larger_of_both_terms_of_each_token(case):
    s, t = CASES[case](8, 300)
    logp_s, logp_t = (ref.log_probs(z.double()) for z in (s, t))
    d = torch.where(s.isneginf(), 0.0, logp_t - logp_s)
    expected = torch.where(d > 0, logp_t.exp() * d, -logp_s.exp() * d).sum(1)
    loss, _ = loss_and_gradient(s, t, tip.ToDi(1e4))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


@every_case
def test_jsd_and_skew_end_in_the_two_kls(case):
    s, t = CASES[case](8, 700)
    for end, kl in (
        (tip.JSD(0), tip.ForwardKL()),
        (tip.JSD(1), tip.ReverseKL()),
        (tip.SkewForwardKL(0), tip.ForwardKL()),
        (tip.SkewReverseKL(0), tip.ReverseKL()),
        (tip.Renyi(1), tip.ForwardKL()),
    ):
        (loss, grad), (expected, grad_expected) = (loss_and_gradient(s, t, d) for d in (end, kl))
        assert torch.equal(loss, expected) and torch.equal(grad, grad_expected), end


def test_near_their_ends_divergences_tend_to_the_two_kls():
    s, t = (0.1 * z for z in ordinary(8, 700))  # KL about 0.09
    kl_fwd, kl_rev = (loss_and_gradient(s, t, d)[0] for d in (tip.ForwardKL(), tip.ReverseKL()))
    w = 1e-3
    for near, limit in (
        ((1 / w) * tip.JSD(w), kl_fwd),
        ((1 / w) * tip.JSD(1 - w), kl_rev),
        (tip.SkewForwardKL(w), kl_fwd),
        (tip.SkewReverseKL(w), kl_rev),
        (tip.Renyi(1 - w), kl_fwd),
        (tip.Renyi(1 + w), kl_fwd),
    ):
        loss, _ = loss_and_gradient(s, t, near)
        torch.testing.assert_close(loss, limit, rtol=0.02, atol=0)


@every_case
def test_jsd_is_symmetric_with_mirrored_weights(case):
    s, t = CASES[case](8, 700)
    for w in (0.5, 0.2):
        torch.testing.assert_close(
            loss_and_gradient(s, t, tip.JSD(w))[0], loss_and_gradient(t, s, tip.JSD(1 - w))[0], rtol=1e-5, atol=1e-6
        )
    for forward, reverse in ((tip.ForwardKL(), tip.ReverseKL()), (tip.SkewForwardKL(0.3), tip.SkewReverseKL(0.3))):
        mirrored = loss_and_gradient(t, s, reverse)[0]
        torch.testing.assert_close(loss_and_gradient(s, t, forward)[0], mirrored, rtol=1e-5, atol=1e-6)


@every_case
def test_bounded_divergences_bound_each_other(case):
    """ln2 H2 <= JSD <= H2 <= TVD <= sqrt(H2 (2 - H2)) <= 1, and JSD <= ln 2, row by row."""
    s, t = CASES[case](8, 700)
    h2, jsd, tvd = (loss_and_gradient(s, t, d)[0].double() for d in (tip.HellingerSq(), tip.JSD(), tip.TVD()))
    chain = [math.log(2) * h2, jsd, h2, tvd, (h2 * (2 - h2)).sqrt(), torch.ones_like(h2)]
    for i, (low, high) in enumerate(pairwise(chain)):
        assert (low <= high + 1e-6).all(), i
    assert (jsd <= math.log(2) + 1e-6).all()


@every_case
def test_hellinger_is_behind_renyi_and_alpha_beta_of_one_half(case):
    s, t = CASES[case](8, 700)
    h2 = loss_and_gradient(s, t, tip.HellingerSq())[0].double()
    same(tip.AlphaBeta(0.5, 0.5), tip.HellingerSq(), s, t, factor=4.0)
    renyi = loss_and_gradient(s, t, tip.Renyi(0.5))[0].double()
    inside = h2 < 1 - 1e-3  # 1 - H2 has no digits left nearer to 1
    torch.testing.assert_close(renyi[inside], -2 * torch.log1p(-h2[inside]), rtol=1e-4, atol=4e-6)


@every_case
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_renyi_has_the_gradient_of_taid(alpha, case):
    """TAID: the forward KL to softmax((1 - alpha) z_s + alpha z_t), the blend held constant."""
    s, t = CASES[case](8, 700)
    blend = torch.where(s.isneginf(), -INF, (1 - alpha) * s + alpha * t)
    _, grad = loss_and_gradient(s, t, tip.Renyi(alpha))
    _, taid = loss_and_gradient(s, blend, tip.ForwardKL())
    torch.testing.assert_close(grad, taid, rtol=1e-4, atol=2e-7 * largest_logit(s, t))


@every_case
def test_renyi_does_not_fall_as_alpha_grows(case):
    s, t = CASES[case](8, 700)
    values = [loss_and_gradient(s, t, tip.Renyi(alpha))[0] for alpha in (0.1, 0.5, 0.9, 1, 1.5)]
    for low, high in pairwise(values):
        assert (low <= high * (1 + 1e-5) + 2e-6).all()


def test_detaching_the_mixture_changes_the_gradient_only():
    s, t = ordinary(6, 300)
    (loss, grad), (other, detached) = (
        loss_and_gradient(s, t, tip.SkewReverseKL(0.4, detach_mixture=d)) for d in (False, True)
    )
    assert torch.equal(loss, other) and not torch.allclose(grad, detached, rtol=1e-2)


# Bad input

BAD = [
    *[(lambda w=w: tip.JSD(w), "teacher_weight") for w in (-0.1, 1.1, NAN, "half", None, True)],
    *[(lambda d=d, a=a: d(a), "a") for d in (tip.SkewForwardKL, tip.SkewReverseKL) for a in (1.0, -0.1, INF, None)],
    (lambda: tip.SkewReverseKL(0.1, detach_mixture=1), "detach_mixture"),
    *[(lambda alpha=alpha: tip.Renyi(alpha), "alpha") for alpha in (0, -1.0, INF, "one")],
    (lambda: tip.AlphaBeta(0.0, 0.5), "a"),
    (lambda: tip.AlphaBeta(0.5, -0.5), "b"),
    *[(lambda beta=beta: tip.ToDi(beta), "beta") for beta in (-1.0, NAN, None)],
    *[(lambda clip=clip: tip.SampledReverseKL(clip), "clip") for clip in (0.0, -1.0, INF, "x")],
    *[(lambda f=f: f * tip.ForwardKL(), "factor of a divergence") for f in (0.0, -1.0, NAN, "x")],
    *[(lambda m=m: tip.TVD().clipped(m), "max_per_row") for m in (0.0, -1.0, NAN, None)],
]


@pytest.mark.parametrize("make, argument", BAD)
def test_a_bad_divergence_is_refused_when_it_is_made(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
        make()


def test_a_clipped_divergence_is_no_part_of_another():
    clipped = tip.ForwardKL().clipped(3.0)
    for make in (lambda: clipped + tip.TVD(), lambda: tip.TVD() + clipped, lambda: 2.0 * clipped):
        with pytest.raises(ValueError, match=r"^divergence: a clipped divergence .*cannot"):
            make()
    with pytest.raises(TypeError):
        tip.TVD() + 3.0


def test_divergences_are_values():
    assert tip.JSD(0.3) == tip.JSD(0.3) != tip.JSD(0.4)
    assert hash(tip.Renyi(0.5)) == hash(tip.Renyi(0.5))
    assert replace(tip.SkewReverseKL(0.2), detach_mixture=True) == tip.SkewReverseKL(0.2, detach_mixture=True)
