"""Cost of a step against the number of tokens and the size of the vocabulary, with the fitted exponents.

    python -m bench scale [--repeats R --threads T --json FILE --png FILE]

Soft-OR 0.2, reverse KL, fp32, one rollout, workspace_mib=64. Time is the minimum over interleaved rounds, memory the
peak above inputs and gradients. The exponent is the slope of log time over log size by least squares.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

import tip_kernels as tip
from bench import _peers
from bench._meter import peak_transient_mib

WORKSPACE_MIB = 64
HIDDEN = 128
AXES = {
    "tokens": [(n, 8_000) for n in (1_024, 2_048, 4_096, 8_192, 16_384)],
    "vocabulary": [(512, v) for v in (8_000, 16_000, 32_000, 64_000, 128_000, 256_000)],
}
EXPONENT = (0.95, 1.1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", type=int, default=len(AXES["vocabulary"]), help="sizes of each axis to run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"H={HIDDEN} fp32, Soft-OR 0.2, workspace_mib={WORKSPACE_MIB}, {args.threads} thread(s)")
    results, failed = [], 0
    for axis, sizes in AXES.items():
        for sweeps in (2, None):
            rows = _measured(sizes[: args.largest], sweeps, args.repeats)
            slope = _slope([r["size"] for r in rows], [r["time_ms"] for r in rows])
            most = max(r["transient_mib"] - r["per_row_mib"] for r in rows)
            ok = EXPONENT[0] <= slope <= EXPONENT[1] and most <= WORKSPACE_MIB
            failed += not ok
            results.append({"axis": axis, "sweeps": sweeps or "chosen", "exponent": slope, "rows": rows})
            print(f"\n{axis}, sweeps {sweeps or 'chosen'}")
            print(f"{'N':>7} {'V':>8} {'time':>10} {'transient':>11} {'strategy':>12}")
            for r in rows:
                size = f"{r['n']:>7} {r['v']:>8}"
                print(f"{size} {r['time_ms']:>7.0f} ms {r['transient_mib']:>7.1f} MiB {r['strategy']:>12}")
            target = f"exponent {EXPONENT[0]:g} to {EXPONENT[1]:g}, within {WORKSPACE_MIB} MiB + O(N)"
            print(f"exponent {slope:.2f}, most memory {most:.1f} MiB; target {target}: {'met' if ok else 'MISSED'}")
    if args.json:
        setting = {"device": "cpu", "threads": args.threads, "torch": torch.__version__, "hidden": HIDDEN}
        args.json.write_text(json.dumps({**setting, "curves": results}, indent=1) + "\n")
    if args.png:
        _draw(results, args.png)
    return int(failed > 0)


def _measured(sizes: list[tuple[int, int]], sweeps: int | None, repeats: int) -> list[dict]:
    problems = [_peers.Problem.random(n, HIDDEN, v) for n, v in sizes]
    step = _peers.ours(tip.SoftOr(0.2), WORKSPACE_MIB, sweeps)
    times: list[list[float]] = [[] for _ in sizes]
    for round_ in range(repeats + 1):  # the first is to warm up
        for problem, seconds in zip(problems, times, strict=True):
            problem.clear()
            start = time.perf_counter()
            step(problem)
            if round_:
                seconds.append(time.perf_counter() - start)
    rows = []
    for (n, v), problem, seconds in zip(sizes, problems, times, strict=True):
        problem.clear()
        peak, _ = peak_transient_mib(lambda problem=problem: step(problem))
        heads = (tip.Head(problem.hidden_s, problem.weight_s), tip.Head(problem.hidden_t, problem.weight_t))
        how = tip.Execution(sweeps=sweeps)
        plan = tip.distill(*heads, select=tip.SoftOr(0.2), workspace_mib=WORKSPACE_MIB, execution=how).plan
        rows.append(
            {
                "n": n,
                "v": v,
                "size": n * v,
                "time_ms": min(seconds) * 1e3,
                "transient_mib": peak - problem.gradients_mib(),
                # statistics, sorts and masks; and, in fp32, hidden states of kept rows and their gradient
                "per_row_mib": (300 * n + 4 * 3 * HIDDEN * 0.2 * n) / 2**20,
                "strategy": plan.strategy,
            }
        )
    return rows


def _slope(sizes: list[float], times: list[float]) -> float:
    """Of log time over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _draw(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    for column, axis in enumerate(AXES):
        for curve in (c for c in results if c["axis"] == axis):
            x = [row["n" if axis == "tokens" else "v"] for row in curve["rows"]]
            label = f"sweeps {curve['sweeps']}: exponent {curve['exponent']:.2f}"
            axes[0, column].loglog(x, [row["time_ms"] for row in curve["rows"]], "o-", label=label)
            axes[1, column].semilogx(x, [row["transient_mib"] for row in curve["rows"]], "o-", label=label)
        axes[0, column].legend()
        axes[1, column].set_xlabel(axis)
        axes[1, column].set_ylim(0, 1.3 * WORKSPACE_MIB)
        axes[1, column].axhline(WORKSPACE_MIB, color="0.6", linestyle=":")
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("transient memory, MiB")
    figure.savefig(path, dpi=120)
