"""One loss twice: from whole logits, and by tip.distill; then on a fifth of the tokens."""

from __future__ import annotations

import time

import torch

import tip_kernels as tip

torch.manual_seed(0)
torch.set_num_threads(1)
N, H, V = 512, 128, 16_000
hidden_s, head_s = torch.randn(N, H, requires_grad=True), (torch.randn(V, H) / 8).requires_grad_()
hidden_t, head_t = torch.randn(N, H), torch.randn(V, H) / 8


def before() -> torch.Tensor:
    logp_s, logp_t = (hidden_s @ head_s.T).log_softmax(-1), (hidden_t @ head_t.T).log_softmax(-1)
    return (logp_s.exp() * (logp_s - logp_t)).sum(-1).mean()


def after(rule: tip.Rule) -> torch.Tensor:
    return tip.distill(tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t), select=rule).loss


for name, loss_of in {
    "whole logits": before,
    "tip-kernels, every token": lambda: after(tip.KeepAll()),
    "tip-kernels, 20 % by Soft-OR": lambda: after(tip.SoftOr(0.2)),
}.items():
    head_s.grad = None
    start = time.perf_counter()
    loss = loss_of()
    loss.backward()
    seconds = time.perf_counter() - start
    print(f"{name:30} loss {loss.item():.5f}  gradient norm {head_s.grad.norm():.5f}  {seconds:.2f} s")
