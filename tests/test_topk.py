"""A teacher of which K tokens a row are known: three tails against the float64 reference (T1 to T4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import reference as ref
import tip_kernels as tip
from tests._cases import (
    INF,
    NAN,
    PAIRS,
    check_gradient,
    distill,
    head_case,
    leaf,
    no_worse,
    normal,
    ordinary,
    relative_error,
)
from tip_kernels.hooks import verl
from tip_kernels.sources.topk import TopK

TAILS = ("bucket", "ignore", "renormalize")
REFERENCE = {
    "kl_fwd": ref.topk_forward_kl,
    "kl_rev": ref.topk_reverse_kl,
    "hellinger_sq": ref.topk_hellinger_sq,
    "entropy_t": ref.topk_entropy,
}
LOSSES = {"kl_fwd": tip.ForwardKL(), "kl_rev": tip.ReverseKL(), "hellinger_sq": tip.HellingerSq()}
N, V, K = 9, 2500, 7  # three tiles of a CPU, the last one ragged
BORDERS = [0, 1023, 1024, 2047, 2048, V - 1]


def log_softmax(z: Tensor) -> Tensor:
    """Log-probabilities as an engine gives them: fp32, here without an error beyond that rounding."""
    return z.double().log_softmax(-1).float()


def listed_by(z_list: Tensor, z_t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k tokens of z_list with the teacher's log-probabilities."""
    ids = z_list.topk(k, -1).indices
    return ids, log_softmax(z_t).gather(-1, ids)


def by_teacher(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    return listed_by(z_t, z_t, K)


def by_student(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    return listed_by(z_s, z_t, K)


def with_absent(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """Row i has i absent entries of K + 2, with anything for a logp; so at least one is left."""
    ids, logp = listed_by(z_t, z_t, K + 2)
    absent = torch.arange(K + 2) < torch.arange(len(ids))[:, None] % (K + 2)
    return ids.masked_fill(absent, -1), torch.where(absent, torch.tensor([NAN, INF, -INF, 3.0, 0, 0, 1, 2, -7]), logp)


def at_borders(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """The first and last columns of every tile."""
    ids = torch.tensor(BORDERS).expand(len(z_s), -1).clone()
    return ids, log_softmax(z_t).gather(-1, ids)


LISTS = {f.__name__: f for f in (by_teacher, by_student, with_absent, at_borders)}


@dataclass
class Saturated:
    """A student that leaves e^-60 a token to all but the K listed ones, and a teacher that does not."""

    @staticmethod
    def pair(n: int, v: int) -> tuple[Tensor, Tensor]:
        z_s, z_t = normal(n, v, seed=11), normal(n, v, seed=12)
        ids = torch.arange(n)[:, None] * 13 % v + torch.arange(K) * 301 % v
        z_s = z_s.scatter_add(1, ids % v, torch.full((n, K), 60.0))
        return z_s, z_t.scatter_add(1, ids % v, torch.full((n, K), 6.0))


CASES = PAIRS | {"saturated": Saturated.pair}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("listing", LISTS)
@pytest.mark.parametrize("case", CASES)
def test_every_statistic_is_that_of_the_outcomes(case, listing, tail):
    z_s, z_t = CASES[case](N, V)
    ids, logp = LISTS[listing](z_s, z_t)
    stats = tip.token_stats(z_s, TopK(ids, logp, tail))
    plain = tip.token_stats(z_s)
    assert torch.allclose(stats.lse_s, plain.lse_s, rtol=1e-6, atol=1e-6)
    assert torch.allclose(stats.entropy_s, plain.entropy_s, rtol=1e-6, atol=2e-6)
    assert not hasattr(stats, "lse_t")
    for field, formula in REFERENCE.items():
        truth, eager = formula(z_s.double(), ids, logp, tail), formula(z_s, ids, logp, tail)
        if field.startswith("kl") and tail != "ignore":
            truth, eager = truth.clamp(min=0), eager.clamp(min=0)
        no_worse(getattr(stats, field), eager, truth, f"{field} of {case}, {listing}, {tail}")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("listing", LISTS)
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_the_outcomes(case, listing, tail):
    z_s, z_t = CASES[case](N, V)
    ids, logp = LISTS[listing](z_s, z_t)
    upstream = torch.linspace(0.5, 2, N)
    teacher = TopK(ids, logp, tail)
    stats = tip.token_stats(z_s, teacher)
    for field, divergence in LOSSES.items():
        ours, eager, truth = leaf(z_s), leaf(z_s), leaf(z_s.double())
        loss = tip.divergence_loss(ours, teacher, divergence=divergence, stats=stats)
        assert torch.equal(loss.isfinite(), getattr(stats, field).isfinite())
        finite = loss.detach().isfinite()
        torch.autograd.backward(loss, upstream)
        for x in (eager, truth):
            value = REFERENCE[field](x, ids, logp, tail)
            torch.autograd.backward(value, torch.where(finite, upstream, 0.0).to(value))
        what = f"{field} of {case}, {listing}, {tail}"
        check_gradient(ours.grad, eager.grad, truth.grad, what, largest_logit=z_s[z_s > -INF].abs().max(), row_weight=2)
        assert ours.grad.sum(1).abs().max() < 1e-5, f"{what}: the gradient must sum to 0 over the vocabulary"


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", CASES)
def test_all_tokens_listed_is_the_full_divergence(case, tail):
    v = 1100
    z_s, z_t = CASES[case](5, v)
    ids = torch.stack([torch.randperm(v, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    teacher = TopK(ids, log_softmax(z_t).gather(1, ids), tail)
    stats, full = tip.token_stats(z_s, teacher), tip.token_stats(z_s, z_t)
    for field, divergence in LOSSES.items():
        assert torch.allclose(getattr(stats, field), getattr(full, field), rtol=2e-6, atol=3e-6), field
        ours, whole = leaf(z_s), leaf(z_s)
        tip.divergence_loss(ours, teacher, divergence=divergence).nan_to_num(posinf=0).sum().backward()
        tip.divergence_loss(whole, z_t, divergence=divergence).nan_to_num(posinf=0).sum().backward()
        floor = 2e-7 * max(1.0, float(z_s[z_s > -INF].abs().max()))
        assert torch.allclose(ours.grad, whole.grad, rtol=1e-5, atol=floor), field


FAMILY = [tip.Jeffreys(), tip.JSD(0.3), tip.SkewForwardKL(), tip.SkewReverseKL(), tip.TVD(), tip.Renyi(0.5), tip.ToDi()]


@pytest.mark.parametrize("divergence", FAMILY, ids=lambda d: type(d).__name__)
def test_the_whole_family_takes_the_bucket_as_a_token(divergence):
    z_s, z_t = ordinary(5, 1100)
    ids = torch.arange(1100).repeat(5, 1)
    every = TopK(ids, log_softmax(z_t))
    ours, whole = leaf(z_s), leaf(z_s)
    loss, full = (tip.divergence_loss(x, t, divergence=divergence) for x, t in ((ours, every), (whole, z_t)))
    assert torch.allclose(loss, full, rtol=2e-6, atol=2e-6)
    loss.sum().backward()
    full.sum().backward()
    assert relative_error(ours.grad, whole.grad.double()) < 1e-5
    assert (tip.divergence_loss(z_s, TopK(*by_teacher(z_s, z_t)), divergence=divergence) <= full + 1e-5).all()


@pytest.mark.parametrize("k", [1, 5, 100, V - 1])
@pytest.mark.parametrize("case", PAIRS)
def test_the_bucketed_divergence_is_a_lower_bound_of_the_full_one(case, k):
    z_s, z_t = PAIRS[case](N, V)
    full = tip.token_stats(z_s, z_t)
    for z_list in (z_s, z_t):
        stats = tip.token_stats(z_s, TopK(*listed_by(z_list, z_t, k)))
        # t_rest is 1 less a sum rounded in fp32, and no less than 2^-24: log t_rest in kl_rev is off by its share
        _, logp = listed_by(z_list, z_t, k)
        rest_t = (1 - logp.double().exp().sum(1)).clamp(min=2.0**-24)
        for field in ("kl_fwd", "kl_rev", "hellinger_sq"):
            noise = 1e-5 + 2.0**-22 / rest_t if field == "kl_rev" else 1e-5
            bound = getattr(full, field) * (1 + 1e-6) + noise
            assert (getattr(stats, field) <= bound).all(), (field, getattr(stats, field) - getattr(full, field))


def test_a_tiny_rest_of_the_student_is_not_lost_in_cancellation():
    z_s = torch.full((1, V), -90.0)
    z_s[0, :K] = torch.arange(K).float()
    logp = torch.full((1, K), math.log(0.9 / K))
    ids = torch.arange(K)[None]
    stats = tip.token_stats(z_s, TopK(ids, logp))
    truth = ref.topk_forward_kl(z_s.double(), ids, logp)
    assert truth > 8  # a tenth of the teacher's mass where the student has e^-90
    assert stats.kl_fwd.item() == pytest.approx(truth.item(), rel=1e-6)
    x, y = leaf(z_s), leaf(z_s.double())
    tip.divergence_loss(x, TopK(ids, logp), divergence=tip.ForwardKL()).sum().backward()
    ref.topk_forward_kl(y, ids, logp).sum().backward()
    assert relative_error(x.grad[:, K:], y.grad[:, K:]) < 1e-5


def test_a_tiny_rest_of_the_teacher_is_not_lost_in_cancellation():
    """A rest of 8e-4 beside four large tokens: 1 less their sum in fp32 would be 4e-5 off, relatively."""
    logp = torch.tensor([[-0.2070, -1.7109, -5.4688, -6.8438, -8.3125]]).bfloat16()
    student, ids = torch.zeros(1, 57), torch.arange(5)[None]
    truth = ref.topk_reverse_kl(student.double(), ids, logp.double(), "bucket")
    assert (tip.token_stats(student, TopK(ids, logp)).kl_rev - truth).abs().item() < 1e-6 * truth.item()


def test_what_the_student_bans_is_infinite_forward_and_what_the_teacher_bans_reverse():
    z_s, z_t = ordinary(4, 50)
    ids, logp = listed_by(z_t, z_t, 3)
    z_s[1, ids[1, 0]] = -INF
    logp[2, 2] = -INF
    z_s[3] = z_s[3].masked_fill((torch.arange(50)[:, None] != ids[3]).all(1), -INF)  # all of the rest
    stats = tip.token_stats(z_s, TopK(ids, logp))
    assert stats.kl_fwd.isinf().tolist() == [False, True, False, True]
    assert stats.kl_rev.isinf().tolist() == [False, False, True, False]
    x = leaf(z_s)
    loss = tip.divergence_loss(x, TopK(ids, logp), divergence=tip.Jeffreys())
    loss.sum().backward()
    assert loss.isinf().tolist() == [False, True, True, True]
    assert x.grad[0].abs().sum() > 0 and (x.grad[1:] == 0).all()


def test_a_list_of_all_tokens_has_no_rest_however_short_of_one_its_mass():
    """Log-probabilities of an engine in 16 bits do not sum to one."""
    z_s, z_t = ordinary(3, 40)
    stats = tip.token_stats(z_s, TopK(torch.arange(40).expand(3, 40), log_softmax(z_t) - 1e-3))
    assert stats.kl_fwd.isfinite().all() and stats.kl_rev.isfinite().all()


def test_where_both_models_leave_nothing_to_the_rest_there_is_none():
    z = torch.full((1, 40), -INF)
    z[0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    stats = tip.token_stats(z, TopK(torch.arange(4)[None], log_softmax(z)[:, :4]))
    assert stats.kl_fwd.item() < 1e-6 and stats.kl_rev.item() < 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_a_nan_row_is_nan_and_its_neighbours_are_not(tail):
    z_s, z_t = ordinary(6, 60)
    ids, logp = by_teacher(z_s, z_t)
    clean = tip.token_stats(z_s, TopK(ids, logp, tail))
    ids[1], logp[2, 3] = -1, NAN  # nothing listed; a NaN in the list
    z_s[3, ids[3, 0]] = NAN
    z_s[4, z_t[4].argmin()] = INF
    stats = tip.token_stats(z_s, TopK(ids, logp, tail))
    assert stats.lse_s.isnan().tolist() == [False, False, False, True, True, False]
    for field in ("kl_fwd", "kl_rev", "hellinger_sq"):
        assert getattr(stats, field).isnan().tolist() == [False, True, True, True, True, False]
        assert torch.equal(getattr(stats, field)[::5], getattr(clean, field)[::5])
    assert stats.entropy_t.isnan().tolist()[:3] == [False, True, True]
    x = leaf(z_s)
    loss = tip.divergence_loss(x, TopK(ids, logp, tail))
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, True, True, False]
    assert (x.grad[1:5] == 0).all() and (x.grad[::5].abs().sum(1) > 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_sums_weights_and_clipping_compose(tail):
    z_s, z_t = ordinary(N, V)
    ids, logp = by_teacher(z_s, z_t)
    mixed = 0.25 * tip.ForwardKL() + 2 * tip.ReverseKL()
    values = 0.25 * ref.topk_forward_kl(z_s.double(), ids, logp, tail)
    values = values + 2 * ref.topk_reverse_kl(z_s.double(), ids, logp, tail)
    limit = values.median().item() + 0.1
    x, y = leaf(z_s), leaf(z_s.double())
    loss = tip.divergence_loss(x, TopK(ids, logp, tail), divergence=mixed.clipped(limit), row_weights=torch.arange(9.0))
    truth = 0.25 * ref.topk_forward_kl(y, ids, logp, tail) + 2 * ref.topk_reverse_kl(y, ids, logp, tail)
    truth = truth.clamp(max=limit) * torch.arange(9.0)
    loss.sum().backward()
    truth.sum().backward()
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    assert relative_error(x.grad, y.grad) < 1e-5
    assert 0 < (x.grad == 0).all(1).sum() < N - 1


def test_a_batch_keeps_its_shape_and_unwanted_rows_get_no_gradient():
    z_s, z_t = (z.view(2, 3, 60) for z in ordinary(6, 60))
    ids, logp = by_teacher(z_s, z_t)
    stats = tip.token_stats(z_s, TopK(ids, logp))
    truth = ref.topk_reverse_kl(z_s.flatten(0, 1).double(), ids.flatten(0, 1), logp.flatten(0, 1))
    assert torch.allclose(stats.kl_rev.double(), truth, rtol=1e-5)
    kept = tip.TopDivergence(1)(stats)
    x, y = leaf(z_s), leaf(z_s.flatten(0, 1).double())
    loss = tip.divergence_loss(x, TopK(ids, logp), kept=kept, stats=stats)
    assert torch.allclose(loss.double(), truth[kept.row_ids], rtol=1e-5)
    loss.sum().backward()
    ref.topk_reverse_kl(y, ids.flatten(0, 1), logp.flatten(0, 1))[kept.row_ids].sum().backward()
    assert x.grad.shape == (2, 3, 60) and relative_error(x.grad.flatten(0, 1), y.grad) < 1e-5


@pytest.mark.parametrize("mode", ["compact", "inplace"])
def test_every_way_to_give_the_gradient_of_logits_agrees(mode):
    z_s, z_t = ordinary(N, V)
    teacher = TopK(*by_teacher(z_s, z_t))
    kept = tip.TopEntropy(0.5)(tip.token_stats(z_s))
    dense, other = leaf(z_s), leaf(z_s)
    tip.divergence_loss(dense, teacher, kept=kept).sum().backward()
    tip.divergence_loss(other, teacher, kept=kept, grad_logits=mode).sum().backward()
    assert torch.equal(other.grad.to_dense(), dense.grad)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_head_gets_the_gradients_of_its_logits(dtype, tail):
    case = head_case(N, V, 24, seed=20, bias=normal(V, seed=22), scale=0.9, softcap=20.0).to(dtype)
    z_t = ordinary(N, V)[1]
    ids, logp = by_teacher(case.logits().float(), z_t)
    ours, eager, truth = case.leaves(), case.to(torch.float32).leaves(), case.to(torch.float64).leaves()
    loss = tip.divergence_loss(ours.head, TopK(ids, logp, tail), divergence=tip.Jeffreys(), workspace_mib=1)
    loss.sum().backward()
    for other in (eager, truth):
        z = other.logits()
        value = ref.topk_forward_kl(z, ids, logp, tail) + ref.topk_reverse_kl(z, ids, logp, tail)
        value.sum().backward()
    assert torch.allclose(loss.double(), value, rtol=1e-5, atol=1e-5)
    for name, x, e, y in zip(("hidden", "weight", "bias"), ours.tensors, eager.tensors, truth.tensors, strict=True):
        assert x.grad.dtype == dtype
        if dtype == torch.float32:
            check_gradient(x.grad, e.grad, y.grad, name)
        else:  # rounded once, when it is done
            assert relative_error(x.grad, y.grad) < 2**-8, name


def test_soft_or_selects_and_learns_from_a_list():
    case = head_case(12, V, 24, seed=30)
    z_t = ordinary(12, V)[1]
    ids, logp = by_teacher(case.logits(), z_t)
    ours, truth = case.leaves(), case.to(torch.float64).leaves()
    out = distill(ours.head, TopK(ids, logp), select=tip.SoftOr(0.5))
    stats = {"entropy_s": ref.token_stats(case.logits().double())["entropy_s"]}
    stats["kl_rev"] = ref.topk_reverse_kl(case.logits().double(), ids, logp)
    assert torch.equal(out.kept.mask, ref.select_soft_or(stats, 0.5))
    loss = ref.topk_reverse_kl(truth.logits(), ids, logp)[out.kept.row_ids].mean()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    out.loss.backward()
    loss.backward()
    for x, y in zip(ours.tensors, truth.tensors, strict=True):
        assert relative_error(x.grad, y.grad) < 1e-5
    assert out.plan.units == pytest.approx(1 + 3 * 0.5)  # no product of the teacher's


def test_a_rule_of_the_student_alone_measures_the_list_on_kept_rows():
    z_s, z_t = ordinary(N, V)
    teacher = TopK(*by_teacher(z_s, z_t))
    x = leaf(z_s)
    out = distill(x, teacher, select=tip.TopEntropy(4), divergence=tip.ForwardKL())
    full = tip.token_stats(z_s, teacher)
    assert torch.equal(out.stats.kl_fwd.isnan(), ~out.kept.mask)
    assert out.loss.item() == pytest.approx(full.kl_fwd[out.kept.row_ids].mean().item(), rel=1e-6)
    out.loss.backward()
    assert torch.equal((x.grad != 0).any(1), out.kept.mask)
    everything = distill(leaf(z_s), teacher, select=tip.TopEntropy(4), full_stats=True).stats
    assert torch.allclose(everything.hellinger_sq, full.hellinger_sq) and not hasattr(everything, "lse_t")


@pytest.mark.parametrize("tail", TAILS)
def test_the_label_loss_mixes_in_from_the_same_sweep(tail):
    case = head_case(N, V, 24, seed=40)
    z_t = ordinary(N, V)[1]
    ids, logp = by_teacher(case.logits(), z_t)
    labels = torch.tensor([*BORDERS, int(ids[6, 0]), int(ids[7, 3]), -100])
    ours, truth = case.leaves(), case.to(torch.float64).leaves()
    out = distill(ours.head, TopK(ids, logp, tail), select=tip.KeepAll(), labels=labels, ce_weight=0.3)
    z = truth.logits()
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    loss = (0.3 * ce + 0.7 * ref.topk_reverse_kl(z, ids, logp, tail)).mean()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    out.loss.backward()
    loss.backward()
    for x, y in zip(ours.tensors, truth.tensors, strict=True):
        assert relative_error(x.grad, y.grad) < 1e-5


def test_a_label_has_a_teacher_log_probability_where_it_is_listed():
    z_s, z_t = ordinary(4, V)
    ids, logp = by_teacher(z_s, z_t)
    unlisted = int(z_t[1].argmin())
    labels = torch.tensor([int(ids[0, 2]), unlisted, -100, int(ids[3, 6])])
    stats = tip.token_stats(z_s, TopK(ids, logp), labels=labels)
    assert stats.logp_t[0] == logp[0, 2] and stats.logp_t[3] == logp[3, 6]
    assert stats.logp_t[1:3].isnan().all()
    assert torch.allclose(stats.logp_s[:2], log_softmax(z_s)[[0, 1], labels[:2]], atol=1e-5)


def test_statistics_of_another_kind_of_teacher_are_not_used():
    z_s, z_t = ordinary(N, V)
    teacher = TopK(*by_teacher(z_s, z_t))
    of_logits, of_list = tip.token_stats(z_s, z_t), tip.token_stats(z_s, teacher)
    with_list = tip.divergence_loss(z_s, teacher, stats=of_logits)
    assert torch.equal(with_list, tip.divergence_loss(z_s, teacher))
    assert torch.equal(tip.divergence_loss(z_s, z_t, stats=of_list), tip.divergence_loss(z_s, z_t))


def test_a_second_backward_repeats_and_a_double_one_is_refused():
    z_s, z_t = ordinary(3, 50)
    x = leaf(z_s)
    loss = tip.divergence_loss(x, TopK(*by_teacher(z_s, z_t))).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grad.square().sum().backward()


def test_no_rows_give_an_empty_loss_that_is_connected():
    x = leaf(torch.zeros(0, 50))
    teacher = TopK(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    loss = tip.divergence_loss(x, teacher)
    assert loss.shape == (0,) and tip.token_stats(x, teacher).kl_rev.shape == (0,)
    loss.sum().backward()
    assert x.grad.shape == (0, 50)


def test_more_listed_tokens_than_a_tile_has_columns():
    z_s, z_t = ordinary(2, V)
    ids, logp = listed_by(z_t, z_t, 1500)
    stats = tip.token_stats(z_s, TopK(ids, logp), workspace_mib=1)
    assert torch.allclose(stats.kl_fwd.double(), ref.topk_forward_kl(z_s.double(), ids, logp), rtol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_the_triton_backend_gives_the_same(tail):
    pytest.importorskip("triton")
    z_s, z_t = ordinary(3, 300)
    teacher = TopK(*by_teacher(z_s, z_t), tail)
    eager, triton = leaf(z_s), leaf(z_s)
    tip.divergence_loss(eager, teacher, divergence=tip.Jeffreys()).sum().backward()
    with tip.backend("triton"):
        stats = tip.token_stats(triton, teacher)
        tip.divergence_loss(triton, teacher, divergence=tip.Jeffreys(), stats=stats).sum().backward()
    assert torch.allclose(stats.kl_rev, tip.token_stats(z_s, teacher).kl_rev, rtol=1e-5, atol=1e-6)
    assert torch.allclose(eager.grad, triton.grad, rtol=1e-4, atol=1e-6)


# The parser


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


def test_prompt_logprobs_become_rows_that_predict_the_next_token():
    entries = [None, {5: Logprob(-0.1), 9: Logprob(-2.5)}, {7: -0.5}, {"3": {"logprob": -1.5}, "4": {"logprob": -0.5}}]
    teacher = TopK.from_prompt_logprobs(entries, 2, tail="renormalize")
    assert teacher.tail == "renormalize"
    assert teacher.ids.tolist() == [[5, 9], [7, -1], [4, 3], [-1, -1]]
    assert torch.allclose(teacher.logp[:3], torch.tensor([[-0.1, -2.5], [-0.5, -INF], [-0.5, -1.5]]))
    z = normal(4, 12, seed=1)
    assert tip.token_stats(z, teacher).kl_rev.isnan().tolist() == [False, False, False, True]


def test_the_token_that_an_engine_adds_is_kept_where_there_is_room():
    entries = [None, {5: -0.2, 9: -2.5, 1: -9.0}]
    assert TopK.from_prompt_logprobs(entries, 2).ids.tolist() == [[5, 9], [-1, -1]]
    assert TopK.from_prompt_logprobs(entries, 3).ids[0].tolist() == [5, 9, 1]


def test_a_list_of_sequences_is_padded_to_the_longest():
    teacher = TopK.from_prompt_logprobs([[None, {1: -0.5}], [None, {2: -0.5}, {3: -0.1}], []], 1)
    assert teacher.ids.squeeze(2).tolist() == [[1, -1, -1], [2, 3, -1], [-1, -1, -1]]
    assert TopK.from_prompt_logprobs([], 4).ids.shape == (0, 4)


FOUND = {7: -0.5, 3: -1.5}  # of the second of two tokens


@pytest.mark.parametrize(
    "said",
    [
        [None, {7: Logprob(-0.5), 3: Logprob(-1.5)}],
        [{}, {7: Logprob(-0.5), 3: Logprob(-1.5)}],
        [None, {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -1.5, "rank": 2}}],
        [None, [(-0.5, 7, None), (-1.5, 3, None)]],
        [None, [[-0.5, 7, "a"], [-1.5, 3, "b"]]],
        SimpleNamespace(start_indices=[0, 0], end_indices=[0, 3], token_ids=[3, 7, 3], logprobs=[-1.5, -0.5, -1.5]),
        {
            "start_indices": [0, 0],
            "end_indices": [0, 2],
            "token_ids": [7, 3],
            "logprobs": [-0.5, -1.5],
            "ranks": [1, 2],
        },
    ],
    ids=[
        "vLLM engine",
        "vLLM engine, empty",
        "vLLM HTTP",
        "SGLang",
        "SGLang JSON",
        "vLLM flat",
        "vLLM flat, as a dict",
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_what_every_engine_says_is_read_alike(said, batched):
    teacher = TopK.from_prompt_logprobs([said, said] if batched else said, 2)
    for ids, logp in zip(teacher.ids, teacher.logp, strict=True) if batched else [(teacher.ids, teacher.logp)]:
        assert ids.tolist() == [[7, 3], [-1, -1]]
        assert logp[0].tolist() == [-0.5, -1.5]


def test_the_prompts_own_tokens_alone_are_a_list_of_one():
    """SGLang's input_token_logprobs."""
    teacher = TopK.from_prompt_logprobs([(None, 5, None), (-0.5, 7, None), (-0.25, 3, "x")], 1)
    assert teacher.ids.tolist() == [[7], [3], [-1]]
    both = TopK.from_prompt_logprobs([[(None, 5, None), (-0.5, 7, None)], [(None, 5, None), (-0.25, 3, None)]], 1)
    assert both.ids.tolist() == [[[7], [-1]], [[3], [-1]]]


def test_minus_9999_is_minus_infinity_as_vllms_server_means_it():
    z = torch.zeros(2, 4)
    truth, http = (
        tip.token_stats(z, TopK.from_prompt_logprobs([None, {"0": {"logprob": 0.0}, "1": {"logprob": low}}], 2))
        for low in (-INF, -9999.0)
    )
    assert truth.kl_rev[0] == INF
    assert torch.equal(http.kl_rev[:1], truth.kl_rev[:1]) and torch.equal(http.kl_fwd[:1], truth.kl_fwd[:1])


POSITION = {7: -0.5}


@pytest.mark.parametrize(
    ("said", "got"),
    [
        ([[None, POSITION], None], "NoneType None"),
        ([None, [None, POSITION]], "list"),
        ([POSITION, POSITION], "dict"),  # of a completion: its first position has log-probabilities
        ([[(-0.5, 7, None)], [(-0.25, 3, None)]], "list"),
        ([[[(-0.5, 7, None)], [(-0.25, 3, None)]]], "list"),
        ([(-0.5, 7, None), (-0.25, 3, None)], "tuple"),
        ([None, {-1: -0.5}], "tuple"),
        ([None, [(None, 7, None)]], "tuple"),
        ([None, {7: None}], "tuple"),
        ({"start_indices": [0], "end_indices": [1], "token_ids": [7], "logprobs": [-0.5]}, "dict"),
        ("[null]", "str"),
        (None, "NoneType"),
    ],
)
def test_what_no_engine_says_of_a_prompt_is_refused(said, got):
    with pytest.raises(ValueError, match=rf"^prompt_logprobs: expected .*, got {got}"):
        TopK.from_prompt_logprobs(said, 2)


def test_two_log_probabilities_of_one_token_are_refused():
    with pytest.raises(ValueError, match=r"^prompt_logprobs: expected one log-probability of token 7 at a position"):
        TopK.from_prompt_logprobs([None, [(-0.5, 7, None), (-0.6, 7, None)]], 2)


def test_the_old_spelling_is_the_new_one_and_says_so():
    with pytest.warns(FutureWarning, match="'renormalise' is spelled 'renormalize'"):
        teacher = TopK(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]]), "renormalise")
    assert teacher.tail == "renormalize"


# Bad input

JUNK = {  # a row of two entries that no teacher lists, and what is said of it
    "no token": ([-2, 1], [-1.0, -2.0], "got -2|got int -2"),
    "beyond the vocabulary": ([1, 40], [-1.0, -2.0], "below the student's vocabulary of 12 entries.* got int 40"),
    "twice": ([0, 0], [0.0, 0.0], "no id twice in a row, got 0 twice"),  # what verl pads with
    "logits": ([1, 2], [2.0, 1.0], "of log-probabilities, of sum at most 1 in a row, got a sum of 10.1"),
    "infinite": ([1, 2], [INF, 0.0], "of log-probabilities.* got a sum of inf"),
}


def junk_and_sound(junk):
    """A student (4, 12), and a teacher of two entries whose rows 1 and 3 are junk or, where that is None, sound."""
    z_s, z_t = ordinary(4, 12)
    ids, logp = listed_by(z_t, z_t, 2)
    if junk is not None:
        ids[1::2], logp[1::2] = torch.tensor(junk[0]), torch.tensor(junk[1])
    return leaf(z_s), TopK(ids, logp), torch.tensor([True, False, True, False])


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_what_masked_rows_hold_is_no_matter_in_any_entry_point(junk):
    """Neither lists nor labels, temperatures and weights of theirs are looked at."""

    def losses(junk, label, tau, weight):
        z, teacher, mask = junk_and_sound(junk)
        labels, taus, weights = (
            torch.full((4,), x).masked_fill(mask, y) for x, y in ((label, 3), (tau, 1.0), (weight, 1.0))
        )
        kept = tip.KeepAll()(tip.token_stats(z), mask)
        batch = {"labels": labels, "ce_weight": 0.5, "row_weights": weights}
        yield distill(z, teacher, select=tip.SoftOr(0.5), row_mask=mask, **batch).loss
        yield distill(z, z.detach() + 1, select=tip.KeepAll(), row_mask=mask, temperature=taus, **batch).loss
        yield tip.divergence_loss(z, teacher, kept=kept).sum()
        yield tip.divergence_loss(z, z.detach().roll(1), kept=kept, temperature=taus).sum()
        yield verl.select_rows(z, teacher, mask)[1]["tip/kl_rev"] + 0 * z.sum()
        yield (
            torch.autograd.grad(distill(z, teacher, row_mask=mask).loss, z)[0].sum(0) @ torch.arange(12.0) + 0 * z.sum()
        )

    with_junk = losses(junk, 99, NAN, 0.5)
    for ours, truth in zip(with_junk, losses(None, -100, 1.0, 0.5), strict=True):
        assert ours.isfinite() and torch.equal(ours, truth)


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_what_rows_in_use_hold_is_checked(junk):
    z, teacher, mask = junk_and_sound(junk)
    kept = tip.KeepAll()(tip.token_stats(z), ~mask)
    for call in (
        lambda: tip.token_stats(z, teacher),
        lambda: tip.divergence_loss(z, teacher),
        lambda: tip.divergence_loss(z, teacher, kept=kept),
        lambda: distill(z, teacher),
        lambda: distill(z, teacher, row_mask=~mask),
    ):
        with pytest.raises(ValueError, match=f"teacher: expected a TopK .*({junk[2]})"):
            call()


IDS, LOGP = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ids", lambda: TopK(IDS.int(), LOGP)),
        ("ids", lambda: TopK([[1, 2]], LOGP)),
        ("ids", lambda: TopK(IDS[0], LOGP[0])),
        ("ids", lambda: TopK(IDS[:, :0], LOGP[:, :0])),
        ("logp", lambda: TopK(IDS, LOGP[:, :1])),
        ("logp", lambda: TopK(IDS, LOGP.double())),
        ("tail", lambda: TopK(IDS, LOGP, "drop")),
        ("tail", lambda: TopK(IDS, LOGP, None)),
        ("k", lambda: TopK.from_prompt_logprobs([None], 0)),
        ("prompt_logprobs", lambda: TopK.from_prompt_logprobs({}, 1)),
        ("prompt_logprobs", lambda: TopK.from_prompt_logprobs([None, 3.0], 1)),
        ("prompt_logprobs", lambda: TopK.from_prompt_logprobs([None, {1: "likely"}], 1)),
    ],
)
def test_a_bad_list_is_refused_by_name(name, make):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()


Z = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("student", lambda t: tip.token_stats(t)),
        ("teacher", lambda t: tip.token_stats(torch.zeros(1, 2), t)),
        ("teacher", lambda t: tip.token_stats(torch.zeros(2, 4), t)),
        ("temperature", lambda t: tip.token_stats(Z, t, temperature=2.0)),
        ("temperature", lambda t: tip.token_stats(Z, t, temperature=torch.ones(1))),
        ("margins", lambda t: tip.token_stats(Z, t, margins=True)),
        ("top_k", lambda t: tip.token_stats(Z, t, top_k=2)),
        ("temperature", lambda t: tip.divergence_loss(Z, t, temperature=0.5)),
        ("divergence", lambda t: tip.divergence_loss(Z, t, divergence=tip.SampledReverseKL())),
        ("divergence", lambda t: tip.divergence_loss(Z, TopK(IDS, LOGP, "ignore"), divergence=tip.JSD())),
        ("divergence", lambda t: tip.divergence_loss(Z, TopK(IDS, LOGP, "ignore"), divergence=tip.TVD().clipped(1))),
        ("temperature", lambda t: distill(Z, t, temperature=lambda stats: stats.entropy_s)),
        ("select", lambda t: distill(Z, t, select=tip.TopMargin(0.5))),
        ("divergence", lambda t: distill(Z, t, divergence=tip.SampledReverseKL(), labels=torch.zeros(1).long())),
    ],
)
def test_what_a_list_cannot_serve_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call(TopK(IDS, LOGP))
