"""A divergence and a rule of 15 lines, made outside of the package, in every entry point that takes one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tip_kernels as tip
from tip_kernels.learn import gradient_sweep
from tip_kernels.learn.divergences import exp

N, V, H = 24, 200, 16


@dataclass(frozen=True)
class PearsonChiSq(tip.Divergence):
    """sum (t - s)^2 / s, two-pass."""

    sums = ("value", "mean")

    def value(self, row):
        return row["value"]

    def scalars(self, row):
        return {"mean": row["mean"]}

    def row_sums(self, lp_s, lp_t):
        square = exp(2 * lp_t - lp_s)
        return {"value": square - exp(lp_s), "mean": square}

    def gradient(self, lp_s, lp_t, rows):
        return exp(lp_s) * rows["mean"] - exp(2 * lp_t - lp_s)


@dataclass(frozen=True)
class HalfReverseKL(tip.ReverseKL):
    """KL(s||t) / 2, of measured statistics alone; it inherits the needs of ReverseKL, and not its kernel."""

    def value(self, row):
        return 0.5 * row["kl_rev"]

    def gradient(self, lp_s, lp_t, rows):
        return 0.5 * super().gradient(lp_s, lp_t, rows)


@dataclass(frozen=True)
class Surprised(tip.Rule):
    """Keeps rows whose label is unlikely and whose teacher is sure."""

    above: float = 6.0
    needs = frozenset({"logp_s", "entropy_t"})

    def _scores(self, values, population):
        return -values["logp_s"] - values["entropy_t"]

    def _eligible(self, values, population):
        return population & (-values["logp_s"] > self.above)


DIVERGENCES = [PearsonChiSq(), HalfReverseKL(), 0.5 * PearsonChiSq() + tip.ForwardKL()]


def tensors() -> list[Tensor]:
    made = torch.Generator().manual_seed(5)
    hidden, weight, hidden_t, weight_t = (
        torch.randn(*shape, generator=made) for shape in ((N, H), (V, H), (N, H + 8), (V, H + 8))
    )
    return [hidden.requires_grad_(), (0.2 * weight).requires_grad_(), hidden_t, 0.2 * weight_t]


def truth(divergence: tip.Divergence, z_s: Tensor, z_t: Tensor) -> Tensor:
    """(N,) in float64, by autograd."""
    lp_s, lp_t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    s, t = lp_s.exp(), lp_t.exp()
    if isinstance(divergence, PearsonChiSq):
        return ((t - s).square() / s).sum(-1)
    if isinstance(divergence, HalfReverseKL):
        return 0.5 * (s * (lp_s - lp_t)).sum(-1)
    return 0.5 * ((t - s).square() / s).sum(-1) + (t * (lp_t - lp_s)).sum(-1)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-4, atol=2e-5)


def expected_of(divergence: tip.Divergence) -> tuple[Tensor, list[Tensor]]:
    hidden, weight, hidden_t, weight_t = tensors()
    losses = truth(divergence, hidden @ weight.t(), hidden_t @ weight_t.t())
    return losses, list(torch.autograd.grad(losses.sum(), [hidden, weight]))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_made_outside_learns_through_logits_and_heads(divergence):
    losses, grads = expected_of(divergence)
    hidden, weight, hidden_t, weight_t = tensors()
    out = tip.divergence_loss(tip.Head(hidden, weight), tip.Head(hidden_t, weight_t), divergence=divergence)
    close(out, losses)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), [hidden, weight]), grads, strict=True):
        close(ours, theirs)
    out = tip.divergence_loss(hidden @ weight.t(), hidden_t @ weight_t.t(), divergence=divergence)
    close(out, losses)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), [hidden, weight]), grads, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("sweeps", [1, 2, None])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_made_outside_distills_in_one_sweep_and_in_two(divergence, sweeps):
    losses, grads = expected_of(divergence)
    hidden, weight, hidden_t, weight_t = tensors()
    heads = tip.Head(hidden, weight), tip.Head(hidden_t, weight_t)
    settings = {"select": tip.KeepAll(), "normalizer": 1.0, "execution": tip.Execution(sweeps=sweeps)}
    out = tip.distill(*heads, divergence=divergence, **settings)
    close(out.loss, losses.sum())
    for ours, theirs in zip(torch.autograd.grad(out.loss, [hidden, weight]), grads, strict=True):
        close(ours, theirs)
    quota = tip.distill(*heads, divergence=divergence, execution=tip.Execution(sweeps=sweeps))
    close(quota.loss, losses[quota.kept.row_ids].mean())


@pytest.mark.parametrize("divergence", DIVERGENCES[:2], ids=repr)
def test_a_divergence_made_outside_takes_a_topk_of_every_token_but_where_sums_stop(divergence):
    losses, _ = expected_of(divergence)
    hidden, weight, hidden_t, weight_t = tensors()
    logp, ids = (hidden_t @ weight_t.t()).log_softmax(-1).topk(V)
    close(tip.divergence_loss(tip.Head(hidden, weight), tip.TopK(ids, logp), divergence=divergence), losses)
    with pytest.raises(ValueError, match=r"divergence: expected ForwardKL, ReverseKL.*'ignore'"):
        tip.divergence_loss(tip.Head(hidden, weight), tip.TopK(ids, logp, "ignore"), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_without_a_kernel_is_tiled_torch_on_the_kernels_backend(divergence, monkeypatch):
    monkeypatch.setattr(gradient_sweep.GradientSweep, "_kernel", lambda *args, **kwargs: pytest.fail("took a kernel"))
    losses, grads = expected_of(divergence)
    with tip.backend("triton"):
        hidden, weight, hidden_t, weight_t = tensors()
        out = tip.divergence_loss(tip.Head(hidden, weight), tip.Head(hidden_t, weight_t), divergence=divergence)
    close(out, losses)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), [hidden, weight]), grads, strict=True):
        close(ours, theirs)


def test_a_divergence_made_outside_is_refused_by_name_in_a_graph():
    hidden, weight, hidden_t, weight_t = tensors()

    def loss(hidden: Tensor) -> Tensor:
        heads = tip.Head(hidden, weight), tip.Head(hidden_t, weight_t)
        return tip.divergence_loss(*heads, divergence=PearsonChiSq()).sum()

    with pytest.raises(Exception, match=r"divergence: expected one of tip_kernels' under torch\.compile"):
        torch.compile(loss, backend="eager", fullgraph=True)(hidden)


@pytest.mark.parametrize("sweeps", [2, None])
@pytest.mark.parametrize("as_logits", [False, True])
def test_a_rule_made_outside_chooses_in_every_entry_point(sweeps, as_logits):
    hidden, weight, hidden_t, weight_t = tensors()
    student, teacher = tip.Head(hidden, weight), tip.Head(hidden_t, weight_t)
    if as_logits:
        student, teacher = hidden @ weight.t(), hidden_t @ weight_t.t()
    labels = torch.arange(N) % V
    rule = Surprised()
    stats = tip.token_stats(student, teacher, labels=labels)
    kept = rule(stats)
    assert 0 < kept.row_ids.numel() < N
    assert torch.equal(kept.mask, -stats.logp_s > 6.0)
    out = tip.distill(student, teacher, select=rule, labels=labels, execution=tip.Execution(sweeps=sweeps))
    assert torch.equal(out.kept.mask, kept.mask)
    close(out.loss, tip.divergence_loss(student, teacher, kept=kept, stats=stats).mean())
