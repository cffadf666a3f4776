"""Peak memory of one distill step above its inputs and gradients: is `workspace_mib` a promise kept?

python -m bench memory [--tokens N --hidden H --vocab V --keep r]
"""

from __future__ import annotations

import argparse

import torch

import tip_kernels as tip
from bench._meter import peak_transient_mib


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--keep", type=float, default=0.2)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    hidden_s, hidden_t = (torch.randn(args.tokens, args.hidden) for _ in range(2))
    weight_s, weight_t = (torch.randn(args.vocab, args.hidden) * 0.05 for _ in range(2))
    hidden_s.requires_grad_()
    weight_s.requires_grad_()
    gradients = (hidden_s.numel() + weight_s.numel()) * 4 / 2**20
    print(f"N={args.tokens} H={args.hidden} V={args.vocab} keep={args.keep}, fp32, SoftOr, ReverseKL")
    print(f"{'workspace_mib':>14} {'above inputs':>13} {'gradients':>10} {'transient':>10}  within")
    failed = 0
    for workspace in (16, 32, 64, 128):
        hidden_s.grad = weight_s.grad = None

        def step(workspace: int = workspace) -> object:
            student, teacher = tip.Head(hidden_s, weight_s), tip.Head(hidden_t, weight_t)
            out = tip.distill(student, teacher, select=tip.SoftOr(args.keep), workspace_mib=workspace)
            out.loss.backward()
            return out

        peak, _ = peak_transient_mib(step)
        transient = peak - gradients
        ok = transient <= workspace + 64 * args.tokens * 4 / 2**20  # O(N): at most 64 fp32 numbers a row
        failed += not ok
        print(f"{workspace:>14} {peak:>9.1f} MiB {gradients:>6.1f} MiB {transient:>6.1f} MiB  {'yes' if ok else 'NO'}")
    return int(failed > 0)
