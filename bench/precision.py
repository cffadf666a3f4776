"""How far from float64 each implementation's gradient is, as the student nears its teacher.

    python -m bench precision [--tokens N --hidden H --vocab V --json FILE]

Reverse KL over all tokens, at a mean divergence of about 5, 0.6 and 0.02 nats. Every implementation gets the same
values, which bfloat16 represents, as fp32 or as bfloat16 tensors; the truth is dense float64 on them. The error is
|ours - truth| / |truth| over the whole gradient, the larger of d(hidden) and d(weight). "before rounding" are fp32
leaves that hold bfloat16 values: what a bfloat16 leaf's gradient is rounded from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import tip_kernels as tip
from bench import _peers

DIVERGENCES = (5.0, 0.6, 0.02)
TARGETS = {"fp32": 1e-5, "bf16": 3e-3}  # of ours, at the smallest divergence


def problem(n: int, h: int, v: int, divergence: float) -> _peers.Problem:
    """A student whose mean reverse KL is about the given one, in values that bfloat16 represents."""
    noise = divergence**0.5 * 0.7
    for _ in range(12):  # KL grows as the square of the noise, at first
        found = _peers.Problem.random(n, h, v, dtype=torch.bfloat16, noise=noise)
        wide = found.to(torch.float64)
        kl = float(_peers.reverse_kl(wide.hidden_s, wide.weight_s, wide.hidden_t, wide.weight_t).detach())
        if abs(kl / divergence - 1) < 0.05:
            break
        noise *= min(2.0, max(0.5, (divergence / kl) ** 0.5))
    return found


def relative_error(grads: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((g.double() - t).norm() / t.norm()) for g, t in zip(grads, truth, strict=True))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench precision", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    steps, missing = _peers.available(
        {
            "ours, two sweeps": lambda: _peers.ours(tip.KeepAll(), sweeps=2),
            "ours, one sweep": lambda: _peers.ours(tip.KeepAll(), sweeps=1),
            "dense eager": lambda: _peers.dense,
            "TRL": _peers.trl_all,
            "Liger": _peers.liger,
        }
    )
    rows = [{"step": name, "dtype": dtype} for name in steps for dtype in ("fp32", "bf16")]
    for divergence in DIVERGENCES:
        values = problem(args.tokens, args.hidden, args.vocab, divergence)
        exact = values.to(torch.float64)
        _peers.dense(exact)
        truth = [exact.hidden_s.grad, exact.weight_s.grad]
        for row in rows:
            trial = values.to(torch.float32 if row["dtype"] == "fp32" else torch.bfloat16)
            steps[row["step"]](trial)
            row[f"kl_{divergence:g}"] = relative_error([trial.hidden_s.grad, trial.weight_s.grad], truth)
    print(f"N={args.tokens} H={args.hidden} V={args.vocab}, relative error of the gradient, torch {torch.__version__}")
    print(f"{'step':<18} {'leaves':>6}" + "".join(f" {f'KL {d:g}':>10}" for d in DIVERGENCES))
    for row in rows:
        print(f"{row['step']:<18} {row['dtype']:>6}" + "".join(f" {row[f'kl_{d:g}']:>10.1e}" for d in DIVERGENCES))
    for name, why in missing.items():
        print(f"{name:<18} not installed: {why}")
    failed = 0
    for row in rows:
        if row["step"].startswith("ours"):
            worst, target = row[f"kl_{DIVERGENCES[-1]:g}"], TARGETS[row["dtype"]]
            failed += worst > target
            which = "before rounding" if row["dtype"] == "fp32" else "after rounding"
            verdict = "met" if worst <= target else "MISSED"
            print(f"{row['step']} at KL {DIVERGENCES[-1]:g}, {which}: {worst:.1e}, target {target:.0e}: {verdict}")
    if args.json:
        args.json.write_text(json.dumps({"device": "cpu", "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return int(failed > 0)
