"""Rows where the student is all but sure of a token: what it leaves to the others keeps its digits.

The truth is float64 with the sure token's entry from the sum of the others, since float64 cancels there, too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tip_kernels as tip
from reference import divergences
from tests._cases import distill, leaf, normal
from tip_kernels.learn import gradient_sweep

N, V, SURE = 4, 300, 7
MARGINS = (8, 12, 16, 20, 24, 30, 40)
DIVERGENCES = {
    "ReverseKL": (tip.ReverseKL(), divergences.reverse_kl),
    "ForwardKL": (tip.ForwardKL(), divergences.forward_kl),
    "HellingerSq": (tip.HellingerSq(), divergences.hellinger_sq),
    "AlphaBeta": (tip.AlphaBeta(), lambda z_s, z_t: divergences.alpha_beta(z_s, z_t, 0.2, 0.7)),
    "TVD": (tip.TVD(), divergences.tvd),
    "Renyi": (tip.Renyi(0.5), lambda z_s, z_t: divergences.renyi(z_s, z_t, 0.5)),
    "JSD": (tip.JSD(0.5), lambda z_s, z_t: divergences.jsd(z_s, z_t, 0.5)),
    "Jeffreys": (tip.Jeffreys(), lambda z_s, z_t: divergences.forward_kl(z_s, z_t) + divergences.reverse_kl(z_s, z_t)),
}
SOURCES = ("logits", "logits by kernels", "head", "head, softcap", "one sweep")


def sure_pair(margin: float, right: bool) -> tuple[Tensor, Tensor]:
    """Logits of a student that is sure of SURE by so many nats, and of a teacher that agrees or knows nothing of it."""
    z_s, z_t = 0.5 * normal(N, V, seed=1), 2 * normal(N, V, seed=2)
    z_s[:, SURE] = z_s.amax(1) + margin
    if right:
        z_t[:, SURE] = z_t.amax(1) + margin - 2
    return z_s, z_t


def balanced(z: Tensor, loss) -> Tensor:
    """The gradient of a float64 loss, the sure entry from the others."""
    (g,) = torch.autograd.grad(loss(z).sum(), z)
    g[:, SURE] = 0
    g[:, SURE] = -g.sum(1)
    return g


def check(g: Tensor, truth: Tensor) -> None:
    error = (g.double() - truth).norm(dim=1) / truth.norm(dim=1)
    rest = g.double().sum(1).abs() / g.double().abs().sum(1)
    assert error.max() <= 1e-5, error
    assert rest.max() <= 1e-6, rest


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_sure_rows_are_those_of_float64(divergence, source, right):
    ours, formula = DIVERGENCES[divergence]
    # Beyond, float64 takes two sure tokens for a tie; the mass of the kernels' statistics does at 2^-24.
    tvd = MARGINS[:3] if source == "logits by kernels" and right else MARGINS[:5]
    for margin in tvd if divergence == "TVD" else MARGINS:
        z_s, z_t = sure_pair(margin, right)
        truth = balanced(z_s.double().requires_grad_(), lambda z, z_t=z_t: formula(z, z_t.double()))
        if source.startswith("logits"):
            student = leaf(z_s)
            with tip.backend("eager" if source == "logits" else "triton"):
                tip.divergence_loss(student, z_t, divergence=ours).sum().backward()
            check(student.grad, truth)
            continue
        weight = leaf(z_s.t().contiguous())  # beside one-hot hidden states: its gradient is that of the logits
        cap = 100.0 if source == "head, softcap" else None
        if cap:
            z = (cap * (z_s.double() / cap).tanh()).requires_grad_()
            truth = balanced(z, lambda z, z_t=z_t: formula(z, z_t.double())) * (1 - (z.detach() / cap) ** 2)
        heads = tip.Head(torch.eye(N), weight, softcap=cap), tip.Head(torch.eye(N), z_t.t().contiguous())
        if source == "one sweep":
            distill(*heads, select=tip.KeepAll(), divergence=ours, normalizer=1.0, sweeps=1).loss.backward()
        else:
            tip.divergence_loss(*heads, divergence=ours).sum().backward()
        if cap is None:
            check(weight.grad.t(), truth)
        else:  # which rounds logits by 100 ULP of 1
            assert (weight.grad.t().double() - truth).norm() <= 4e-5 * truth.norm()


@pytest.mark.parametrize("step", [1, 3, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sure_rows_entry_reaches_both_leaves_of_a_16_bit_head(dtype, step, monkeypatch):
    """Rows share their sure token, whose sum is made in fp32 and rounded once, in however many steps."""
    monkeypatch.setattr(gradient_sweep, "ENTRY_ROWS", step)
    z_s, z_t = sure_pair(16.0, True)
    z_s[-1, SURE] = 0.0  # a row that is not sure has an entry of its own there
    hidden, weight = torch.eye(N).repeat(2, 1), z_s.t().contiguous()
    student = leaf(hidden.to(dtype)), leaf(weight.to(dtype))
    teacher = tip.Head(hidden.to(dtype), z_t.t().contiguous().to(dtype))
    loss = tip.divergence_loss(tip.Head(*student), teacher, divergence=tip.ForwardKL())
    (2.0**10 * loss.sum()).backward()
    z, t = student[1].detach().double().t(), teacher.weight.double().t()
    truth = balanced(z.clone().requires_grad_(), lambda z: divergences.forward_kl(z, t))
    assert truth[-1, SURE].abs() > 1e-3
    unit = torch.finfo(dtype).eps
    wanted = 2 * 2.0**10 * truth.t()
    assert (student[1].grad.double() - wanted).norm() <= unit * wanted.norm()
    assert ((student[1].grad[SURE].double() - wanted[SURE]).abs() <= unit * wanted[SURE].abs()).all()
    through = 2.0**10 * (truth @ student[1].detach().double())
    assert (student[0].grad[:N].double() - through).norm() <= 2 * unit * through.norm()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("margin", MARGINS)
def test_entropy_and_log_probability_of_sure_rows_keep_their_digits(margin, parts):
    z, _ = sure_pair(margin, False)
    z = torch.cat([z, torch.full((N, (parts - 1) * 20_000), -60.0)], 1)
    stats = tip.token_stats(z, labels=torch.full((N,), SURE), workspace_mib=1)
    gap = z.double() - z.double()[:, SURE : SURE + 1]
    others = gap.exp().index_fill_(1, torch.tensor(SURE), 0.0)
    logp = -others.sum(1).log1p()
    entropy = (others * -gap).sum(1) / (1 + others.sum(1)) - logp
    for ours, truth in ((stats.logp_s, logp), (stats.entropy_s, entropy)):
        assert ((ours.double() - truth) / truth).abs().max() <= 1e-6


@pytest.mark.parametrize("spoilt", [None, 0, 200])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_tvd_of_a_solved_row_has_no_gradient_whatever_other_rows_weigh(sweeps, spoilt):
    """Its sign at the sure token is rounding: another product of the same row may turn it."""
    n, vocab, width = 257, 500, 16
    for seed in range(6):
        hidden, weight, other = (normal(*size, seed=seed) for size in ((n, width), (vocab, width), (vocab, width)))
        other = other.roll(1, 0)
        other[3] = weight[3]
        hidden[-1] = 24 * weight[3] / weight[3].norm() ** 2
        weights = torch.ones(n)
        if spoilt is not None:
            weights[spoilt] = 0.0
        student = leaf(hidden), leaf(weight)
        out = distill(
            tip.Head(*student), tip.Head(hidden, other), select=tip.KeepAll(), divergence=tip.TVD(),
            row_weights=weights, normalizer=1.0, sweeps=sweeps,
        )  # fmt: skip
        out.loss.backward()
        z_s, z_t = (hidden[-1].double() @ w.double().t() for w in (weight, other))
        truth = balanced_tvd(z_s, z_t) @ weight.double()
        assert (student[0].grad[-1].double() - truth).norm() <= 1e-6, seed
        assert (student[0].grad[0] == 0).all() == (spoilt == 0)


def balanced_tvd(z_s: Tensor, z_t: Tensor) -> Tensor:
    """The gradient of one row in float64."""
    z = z_s.clone().requires_grad_()
    (g,) = torch.autograd.grad(0.5 * (z.softmax(0) - z_t.softmax(0)).abs().sum(), z)
    return g


def test_tvd_of_one_row_of_two_is_that_of_both():
    hidden, weight, other = normal(2, 16, seed=1), normal(500, 16, seed=2), normal(500, 16, seed=3)
    grads = []
    for rows in ([0], [0, 1]):
        student = leaf(hidden), leaf(weight)
        loss = tip.divergence_loss(tip.Head(*student), tip.Head(hidden, other), divergence=tip.TVD())
        loss[rows].sum().backward()
        grads.append(student[0].grad[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "size", [(1000, 1.0, 0.014, 0.1, 0.1), (2, 0.01, 1e-3, 0.2, 0.7), (1000, 1.0, 0.014, 0.2, 0.7)]
)
def test_alpha_beta_near_equality_is_made_of_differences(size):
    vocab, spread, apart, a, b = size
    z_s = spread * normal(8, vocab, seed=1)
    z_t = z_s + apart * normal(8, vocab, seed=2)
    student, exact = leaf(z_s), z_s.double().requires_grad_()
    loss = tip.divergence_loss(student, z_t, divergence=tip.AlphaBeta(a, b))
    truth = divergences.alpha_beta(exact, z_t.double(), a, b)
    loss.sum().backward()
    truth.sum().backward()
    assert (loss.double() - truth).norm() <= 2e-4 * truth.norm()
    assert (student.grad.double() - exact.grad).norm() <= 5e-5 * exact.grad.norm()


@pytest.mark.parametrize("divergence", [tip.JSD(), tip.ReverseKL()], ids=str)
@pytest.mark.parametrize("broken", ["hidden", "teacher"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_broken_row_spoils_no_entry_of_another(softcap, broken, divergence):
    hidden, weight, other = normal(3, 8, seed=1), normal(40, 8, seed=2), normal(3, 40, seed=3)
    (hidden if broken == "hidden" else other)[1] = torch.nan
    student = leaf(hidden), leaf(weight)
    tip.divergence_loss(tip.Head(*student, softcap=softcap), other, divergence=divergence)[[0, 2]].sum().backward()
    assert all(x.grad.isfinite().all() for x in student)
    assert (student[0].grad[1] == 0).all()
