"""One distillation step beside its peers, in one process, interleaved: time in units of one N x H x V product, memory.

    python -m bench step [--tokens N --hidden H --vocab V --repeats R --threads T --json FILE --only NAME ...]

A unit is one torch.mm of (N, H) by (H, V) into a preallocated buffer, timed in the same rounds. Times are minima over
the rounds, with the median in brackets; a peer's ratio is its time over ours at the same line's keep.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import tip_kernels as tip
from bench import _peers
from bench._meter import peak_transient_mib

KEEP = 0.2


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", help="parts of names of steps to run")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    problem = _peers.Problem.random(args.tokens, args.hidden, args.vocab)
    steps, missing = _peers.available(
        {
            "ours, Soft-OR 0.2": lambda: _peers.ours(tip.SoftOr(KEEP)),
            "ours, entropy 0.2": lambda: _peers.ours(tip.TopEntropy(KEEP)),
            "ours, all tokens": lambda: _peers.ours(tip.KeepAll()),
            "dense eager": lambda: _peers.dense,
            "dense torch.compile": _peers.compiled_dense,
            "TRL, all tokens": _peers.trl_all,
            "TRL, scored then 0.2": lambda: _peers.trl_twice(KEEP),
            "Liger, all tokens": _peers.liger,
        }
    )
    if args.only:
        steps = {name: step for name, step in steps.items() if any(part in name for part in args.only)}
    unit_out = torch.empty(args.tokens, args.vocab)

    def unit(p: _peers.Problem) -> torch.Tensor:
        return torch.mm(p.hidden_s.detach(), p.weight_s.detach().t(), out=unit_out)

    times: dict[str, list[float]] = {name: [] for name in ("unit", *steps)}
    losses = {}
    for name, step in steps.items():  # warm up and compile
        problem.clear()
        losses[name] = float(step(problem))
    for _ in range(args.repeats):
        for name, step in {"unit": unit, **steps}.items():
            problem.clear()
            start = time.perf_counter()
            step(problem)
            times[name].append(time.perf_counter() - start)
    rows = []
    base = min(times["unit"])
    for name, step in steps.items():
        problem.clear()
        peak, _ = peak_transient_mib(lambda step=step: step(problem))
        ours = min(times.get("ours, Soft-OR 0.2", times[name]))
        rows.append(
            {
                "step": name,
                "loss": losses[name],
                "time_ms": min(times[name]) * 1e3,
                "median_ms": statistics.median(times[name]) * 1e3,
                "units": min(times[name]) / base,
                "over_ours_at_0.2": min(times[name]) / ours,
                "transient_mib": peak - problem.gradients_mib(),
            }
        )
    print(f"N={args.tokens} H={args.hidden} V={args.vocab} fp32, {args.threads} thread(s), torch {torch.__version__}")
    print(f"one unit: {base * 1e3:.0f} ms (median {statistics.median(times['unit']) * 1e3:.0f})")
    print(f"{'step':<22} {'time':>8} {'(median)':>9} {'units':>6} {'x ours':>7} {'transient':>11} {'loss':>8}")
    for row in rows:
        median = f"({row['median_ms']:.0f})"
        print(
            f"{row['step']:<22} {row['time_ms']:>5.0f} ms {median:>9} {row['units']:>6.2f} "
            f"{row['over_ours_at_0.2']:>7.2f} {row['transient_mib']:>7.0f} MiB {row['loss']:>8.4f}"
        )
    for name, why in missing.items():
        print(f"{name:<22} not installed: {why}")
    if args.json:
        setting = {"device": "cpu", "threads": args.threads, "torch": torch.__version__, "unit_ms": base * 1e3}
        args.json.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
    return 0
