"""One operation a benchmark, for `pytest bench --benchmark-only`: save, compare and plot runs with pytest-benchmark.

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare

Logits (256, 8000) and heads (256, 128) -> 8000, fp32, on whatever device torch finds; TIP_KERNELS_BACKEND overrides the
backend.
"""

from __future__ import annotations

import pytest
import torch

import tip_kernels as tip

N, V, H = 256, 8000, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCES = ("logits", "head")
DIVERGENCES = (tip.ReverseKL(), tip.Jeffreys(), tip.JSD(0.5), tip.ToDi(), tip.TVD(), tip.HellingerSq(), tip.Renyi(0.5))
RULES = (tip.TopEntropy(0.2), tip.SoftOr(0.2), tip.SoftOr(0.2, normalize="minmax"), tip.Overconfident(0.2))


def pair(kind: str) -> tuple[torch.Tensor | tip.Head, torch.Tensor | tip.Head]:
    """A student that wants a gradient, and its teacher."""
    torch.manual_seed(0)
    if kind == "logits":
        student, teacher = (2 * torch.randn(N, V, device=DEVICE) for _ in range(2))
        return student.requires_grad_(), teacher
    hidden_s, hidden_t = (torch.randn(N, H, device=DEVICE) for _ in range(2))
    weight_s, weight_t = (torch.randn(V, H, device=DEVICE) * 2 / H**0.5 for _ in range(2))
    return tip.Head(hidden_s.requires_grad_(), weight_s.requires_grad_()), tip.Head(hidden_t, weight_t)


def synchronised(run):
    """run, and then a wait for the device, so that its time is all there."""

    def call():
        out = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    return call


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("asked", [{}, {"margins": True}, {"top_k": 16}], ids=["plain", "margins", "top-k"])
def test_token_stats(benchmark, kind, asked):
    student, teacher = pair(kind)
    benchmark(synchronised(lambda: tip.token_stats(student, teacher, **asked)))


@pytest.mark.parametrize("kind", SOURCES)
def test_student_alone(benchmark, kind):
    student, _ = pair(kind)
    benchmark(synchronised(lambda: tip.token_stats(student)))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule(benchmark, rule):
    torch.manual_seed(0)
    rows = torch.rand(65_536, device=DEVICE)
    stats = tip.TokenStats(entropy_s=rows, kl_rev=rows.flip(0), kl_fwd=rows.roll(7), _batch_shape=(65_536,))
    benchmark(synchronised(lambda: rule(stats)))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_loss_and_backward(benchmark, kind, divergence):
    student, teacher = pair(kind)
    benchmark(synchronised(lambda: tip.divergence_loss(student, teacher, divergence=divergence).mean().backward()))


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("rule", [tip.KeepAll(), tip.SoftOr(0.2), tip.TopEntropy(0.2)], ids=str)
def test_distill(benchmark, rule, sweeps):
    student, teacher = pair("head")
    if DEVICE == "cuda" and sweeps == 1 and not isinstance(rule, tip.KeepAll):
        pytest.skip("one sweep speculates on a CPU only")
    how = tip.Execution(sweeps=sweeps)
    benchmark(synchronised(lambda: tip.distill(student, teacher, select=rule, execution=how).loss.backward()))
