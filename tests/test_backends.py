"""Both backends give the same statistics, losses and gradients, for every divergence and kind of source."""

from __future__ import annotations

import os

import pytest
import torch

import tip_kernels as tip

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILY = [
    tip.ForwardKL(),
    tip.ReverseKL(),
    tip.Jeffreys(),
    tip.JSD(0.3),
    tip.SkewForwardKL(),
    tip.SkewReverseKL(),
    tip.SkewReverseKL(detach_mixture=True),
    tip.TVD(),
    tip.HellingerSq(),
    tip.Renyi(0.5),
    tip.Renyi(2.0),
    tip.AlphaBeta(),
    tip.ToDi(),
    tip.ToDi(0.5),
    tip.SampledReverseKL(2.0),
    0.5 * tip.ForwardKL() + 2.0 * tip.JSD(),
    tip.ReverseKL().clipped(1.0),
]
N, V, H = 6, 301, 16


def problem(source: str) -> tuple[list[torch.Tensor], object, object]:
    """(leaves, student, teacher) of a source, not too far apart."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    near = [hidden + 0.2 * torch.randn(N, H), weight + 0.1 * torch.randn(V, H)]
    if source == "logits":
        leaves = [(near[0] @ near[1].T).to(DEVICE).requires_grad_()]
        return leaves, leaves[0], (hidden @ weight.T).to(DEVICE)
    leaves = [x.to(DEVICE).requires_grad_() for x in near]
    softcap = 8.0 if source == "capped head" else None
    return leaves, tip.Head(*leaves, softcap=softcap), tip.Head(hidden.to(DEVICE), weight.to(DEVICE), scale=0.9)


def learn(backend: str, source: str, divergence: tip.Divergence, **settings) -> tuple[torch.Tensor, ...]:
    leaves, student, teacher = problem(source)
    labels = torch.arange(N, device=DEVICE) * 50
    with tip.backend(backend):
        out = tip.distill(student, teacher, select=tip.SoftOr(4), divergence=divergence, labels=labels, **settings)
        grads = torch.autograd.grad(out.loss, leaves)
    return out.loss.detach(), *grads


@pytest.mark.parametrize("source", ["logits", "head", "capped head"])
@pytest.mark.parametrize("divergence", FAMILY, ids=str)
def test_backends_agree_on_loss_and_gradients(divergence, source):
    for ours, eager in zip(learn("triton", source, divergence), learn("eager", source, divergence), strict=True):
        assert torch.linalg.norm(ours - eager) <= 2e-5 * torch.linalg.norm(eager) + 1e-6


@pytest.mark.parametrize("source", ["logits", "head"])
def test_backends_agree_with_a_label_loss_and_row_temperatures(source):
    settings = {"ce_weight": 0.3, "temperature": torch.linspace(0.5, 2.0, N, device=DEVICE), "temperature_sq": True}
    runs = (learn(backend, source, tip.JSD(), **settings) for backend in ("triton", "eager"))
    for ours, eager in zip(*runs, strict=True):
        assert torch.linalg.norm(ours - eager) <= 2e-5 * torch.linalg.norm(eager) + 1e-6


@pytest.mark.parametrize("mode", ["dense", "compact", "inplace"])
def test_backends_agree_on_every_form_of_a_logit_gradient(mode):
    grads = []
    for backend in ("triton", "eager"):
        leaves, _, teacher = problem("logits")
        logits = leaves[0].detach().clone().requires_grad_()
        with tip.backend(backend):
            stats = tip.token_stats(logits.detach(), teacher)
            kept = tip.TopEntropy(3)(stats)
            tip.divergence_loss(logits, teacher, kept=kept, stats=stats, grad_logits=mode).sum().backward()
        grads.append(logits.grad.to_dense() if mode == "compact" else logits.grad)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-7)


def test_equal_fp32_logits_give_the_same_bits_from_a_head_as_from_logits():
    torch.manual_seed(2)
    hidden, weight_s, weight_t = (torch.randn(n, H, device=DEVICE) for n in (N, 9001, 9001))
    with tip.backend("triton"):
        heads = tip.token_stats(tip.Head(hidden, weight_s), tip.Head(hidden, weight_t))
        # The products a Head takes: columns in multiples of what one program of the fold reads.
        tiles = [torch.cat([hidden @ w[:8192].T, hidden @ w[8192:].T], 1) for w in (weight_s, weight_t)]
        logits = tip.token_stats(*tiles)
    for field in ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        assert torch.equal(getattr(heads, field), getattr(logits, field)), field
