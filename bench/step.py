"""One distillation step beside its peers, in one process, interleaved: time in units of one N x H x V product, memory.

    python -m bench step [--tokens N --hidden H --vocab V --repeats R --threads T --json FILE --only NAME ...]
    python -m bench step --against COMMIT [--tokens N ...]

A unit is one torch.mm of (N, H) by (H, V) into a preallocated buffer, timed in the same rounds. Times are minima over
the rounds, with the median in brackets; a peer's ratio is its time over ours at Soft-OR 0.2. "planned" is what
`tip-kernels plan` predicts from rates measured in the same run. The targets below the table are for the default sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import tip_kernels as tip
from bench import _against, _peers
from bench._meter import peak_transient_mib
from tip_kernels.plan import costs

KEEP = 0.2
SMALL_MIB = 48
SOFT_OR, ENTROPY, ALL = "ours, Soft-OR 0.2", "ours, entropy 0.2", "ours, all tokens"
TWO_SWEEPS, SMALL = "ours, two sweeps", f"ours, {SMALL_MIB} MiB"
DENSE, TRL, TRL_TWICE, LIGER = "dense eager", "TRL, all tokens", "TRL, scored then 0.2", "Liger, all tokens"
KNOWN, UNSLOTH = "ours, 0.2 known", "unsloth-zoo, all"
UNSLOTH_KNOWN, LABELS = "unsloth-zoo, 0.2 known", "ours, labels alone"
TORCH_LABELS = "torch, labels alone"
PLANNED = {  # step: (keep, strategy of `tip-kernels plan`)
    SOFT_OR: (KEEP, "one sweep"),
    ENTROPY: (KEEP, "one sweep, entropy rule"),
    ALL: (1.0, "one sweep, rows known"),
    TWO_SWEEPS: (KEEP, "two sweeps"),
    DENSE: (KEEP, "dense autograd, all rows"),
    TRL: (KEEP, "TRL, all rows"),
    TRL_TWICE: (KEEP, "TRL twice"),
    LIGER: (KEEP, "Liger, all rows"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", help="parts of names of steps to run")
    parser.add_argument("--against", metavar="COMMIT", help="ours alone, in turns with another commit's build")
    args = parser.parse_args(argv)
    if args.against:
        sizes = args.tokens, args.hidden, args.vocab, args.threads
        rows = _against.compared(args.against, args.repeats, *sizes)
        _against.print_rows(rows)
        if args.json:
            args.json.write_text(json.dumps({"against": args.against, "rows": rows}, indent=1) + "\n")
        return 0
    torch.set_num_threads(args.threads)
    problem = _peers.Problem.random(args.tokens, args.hidden, args.vocab)
    steps, missing = _peers.available(
        {
            SOFT_OR: lambda: _peers.ours(tip.SoftOr(KEEP)),
            ENTROPY: lambda: _peers.ours(tip.TopEntropy(KEEP)),
            ALL: lambda: _peers.ours(tip.KeepAll()),
            TWO_SWEEPS: lambda: _peers.ours(tip.SoftOr(KEEP), sweeps=2),
            SMALL: lambda: _peers.ours(tip.SoftOr(KEEP), SMALL_MIB),
            DENSE: lambda: _peers.dense,
            "dense torch.compile": _peers.compiled_dense,
            TRL: _peers.trl_all,
            TRL_TWICE: lambda: _peers.trl_twice(KEEP),
            LIGER: _peers.liger,
            KNOWN: lambda: _peers.ours_known(KEEP),
            UNSLOTH: _peers.unsloth,
            UNSLOTH_KNOWN: lambda: _peers.unsloth(KEEP),
            LABELS: _peers.ours_labels,
            TORCH_LABELS: _peers.linear_cross_entropy,
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
    least = {name: min(values) * 1e3 for name, values in times.items()}
    planned = _planned(args, least["unit"])
    rows = []
    for name, step in steps.items():
        problem.clear()
        peak, _ = peak_transient_mib(lambda step=step: step(problem))
        rows.append(
            {
                "step": name,
                "loss": losses[name],
                "time_ms": least[name],
                "median_ms": statistics.median(times[name]) * 1e3,
                "units": least[name] / least["unit"],
                "over_ours_at_0.2": least[name] / least.get(SOFT_OR, least[name]),
                "transient_mib": peak - problem.gradients_mib(),
                "planned_ms": planned.get(name),
            }
        )
    setting = {"device": "cpu", "threads": args.threads, "torch": torch.__version__, "unit_ms": least["unit"]}
    setting |= {"tokens": args.tokens, "hidden": args.hidden, "vocab": args.vocab}
    print(f"N={args.tokens} H={args.hidden} V={args.vocab} fp32, {args.threads} thread(s), torch {torch.__version__}")
    print(f"one unit: {least['unit']:.0f} ms (median {statistics.median(times['unit']) * 1e3:.0f})")
    print(f"{'step':<22} {'time':>8} {'(median)':>9} {'planned':>8} {'units':>6} {'x ours':>7} {'transient':>11}")
    for row in rows:
        median = f"({row['median_ms']:.0f})"
        plan = f"{row['planned_ms']:.0f}" if row["planned_ms"] else "-"
        print(
            f"{row['step']:<22} {row['time_ms']:>5.0f} ms {median:>9} {plan:>8} {row['units']:>6.2f} "
            f"{row['over_ours_at_0.2']:>7.2f} {row['transient_mib']:>7.0f} MiB"
        )
    for name, why in missing.items():
        print(f"{name:<22} not installed: {why}")
    verdicts = targets({row["step"]: row for row in rows})
    for v in verdicts:
        sign = "at most" if v["at_most"] else "at least"
        print(f"{v['target']:<66} {v['value']:>7.2f}, {sign} {v['bound']:g}: {'met' if v['met'] else 'MISSED'}")
    if args.json:
        args.json.write_text(json.dumps({**setting, "rows": rows, "targets": verdicts}, indent=1) + "\n")
    return 0


def _planned(args: argparse.Namespace, unit_ms: float) -> dict[str, float]:
    """Predicted times; products at the rate of the unit timed here."""
    cpu = costs.this_cpu(args.hidden)
    flops = 2.0 * args.tokens * args.hidden * args.vocab / (unit_ms / 1e3)
    device = costs.Device("cpu", flops, cpu.touch_s, cpu.fresh_s, kind="cpu")
    found = {}
    for name, (keep, strategy) in PLANNED.items():
        table = costs.costs(args.tokens, args.vocab, args.hidden, args.hidden, keep, device)
        found[name] = next(c.predicted_ms for c in table if c.strategy == strategy)
    return found


def targets(rows: dict[str, dict]) -> list[dict]:
    """Each target whose steps were run, with its value and verdict."""

    def ratio(a: str, b: str, key: str = "time_ms") -> float | None:
        return rows[a][key] / rows[b][key] if a in rows and b in rows else None

    def units(name: str, of: float) -> float | None:
        return rows[name]["units"] / of if name in rows else None

    wanted = [
        ("Soft-OR 0.2 in one sweep, time / (2 + 2 rho) units", units(SOFT_OR, 2 + 2 * KEEP), True, 1.25),
        ("Soft-OR 0.2 in two sweeps, time / (2 + 4 rho) units", units(TWO_SWEEPS, 2 + 4 * KEEP), True, 1.45),
        ("entropy 0.2, time / (1 + 3 rho) units", units(ENTROPY, 1 + 3 * KEEP), True, 1.4),
        ("TRL, all tokens, over ours at 0.2", ratio(TRL, SOFT_OR), False, 8),
        ("TRL scored then 0.2, over ours at 0.2", ratio(TRL_TWICE, SOFT_OR), False, 2.4),
        ("Liger over ours at 0.2", ratio(LIGER, SOFT_OR), False, 3),
        ("Liger over ours at keep 1.0", ratio(LIGER, ALL), False, 1.0),
        ("dense eager over ours at 0.2", ratio(DENSE, SOFT_OR), False, 4),
        ("unsloth-zoo, all tokens, over ours at 0.2", ratio(UNSLOTH, SOFT_OR), False, 3),
        ("a mask known beforehand, ours over unsloth-zoo's", ratio(KNOWN, UNSLOTH_KNOWN), True, 1),
        (f"dense eager's memory over ours in {SMALL_MIB} MiB", ratio(DENSE, SMALL, "transient_mib"), False, 12),
        (f"TRL's memory over ours in {SMALL_MIB} MiB", ratio(TRL, SMALL, "transient_mib"), False, 20),
        ("worst |planned / measured - 1|", _worst_plan(rows), True, 0.25),
    ]  # fmt: skip
    return [
        {"target": name, "value": value, "at_most": at_most, "bound": bound, "met": (value <= bound) == at_most}
        for name, value, at_most, bound in wanted
        if value is not None
    ]


def _worst_plan(rows: dict[str, dict]) -> float | None:
    errors = [abs(row["planned_ms"] / row["time_ms"] - 1) for row in rows.values() if row["planned_ms"]]
    return max(errors) if errors else None
