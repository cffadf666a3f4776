"""What a distillation step costs before it is run: products, bytes, workspace and time of each strategy and each peer.

A unit is one product of N rows by a head, 2 N H V operations. S = keep N rows are learned from.

    two sweeps             measure all rows (1 + 1 units), project the kept ones again and make both gradients
    one sweep              make the gradients while the logits are in memory
    entropy rule           the teacher's head on kept rows only
    dense, TRL, Liger      learn from all rows; masked rows cost the same
    TRL twice              score all rows, then call again on the gathered ones

Time is operations / rate + bytes / bandwidth. On a CPU both are measured on the spot, and how often a strategy touches
an entry was fitted to `python -m bench step`, which prints these predictions beside its times. On a GPU the rates are
70 % of the peak for products and 90 % for bytes, and the bytes are those that tiles of logits move; no GPU has checked
them. On R ranks what wire.py counts comes on top, at 80 % of the link's bandwidth and 5 us a hop, none of it hidden.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tip_kernels.plan.wire import Collective


@dataclass(frozen=True)
class Device:
    """How fast a device multiplies and moves."""

    name: str
    flops: float  # a second, of large products
    touch_s: float  # seconds to touch one fp32 entry of a tile in memory
    fresh_s: float  # seconds to touch one entry of a matrix that was just allocated
    kind: str = "cuda"


def _gpu(name: str, peak_tflops: float, gbps: float) -> Device:
    return Device(name, 0.7e12 * peak_tflops, 4 / (0.9e9 * gbps), 4 / (0.9e9 * gbps))


GPUS = {  # dense bf16 peak and memory bandwidth, as the makers give them
    "a100": _gpu("a100", 312, 2039),
    "h100": _gpu("h100", 989, 3350),
    "h200": _gpu("h200", 989, 4800),
    "b200": _gpu("b200", 2250, 8000),
    "mi300x": _gpu("mi300x", 1307, 5300),
}


LINKS_GBPS = {  # GB/s that one GPU sends, as the makers give it
    "ndr": 50,  # one 400 Gb/s InfiniBand port a GPU
    "nvlink3": 300,
    "nvlink4": 450,
    "nvlink5": 900,
}
HOP_S = 5e-6
RANKING_BYTES = 100  # that ranking takes of each row of all ranks, measured on 4 M rows


def this_cpu(width: int, repeats: int = 15) -> Device:
    """The CPU that runs this, on torch's present number of threads; takes a second."""
    import torch

    from tip_kernels.backends.products import mm

    rows, columns = 256, 8192
    a, b, out = torch.randn(rows, width), torch.randn(columns, width), torch.empty(rows, columns)
    tile, matrix = torch.rand(256, 1024), torch.rand(1024, 16_384)
    product = _least(lambda: mm(a, b.t(), out=out), repeats)
    touch = _least(lambda: tile.mul_(1.0), 20 * repeats)
    fresh = _least(lambda: matrix * 1.0, repeats)
    return Device("cpu", 2 * rows * columns * width / product, touch / tile.numel(), fresh / matrix.numel(), kind="cpu")


def _least(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Touches:
    """Entries touched per (row, token) pair: of tiles in memory, and of matrices just allocated."""

    tile: float = 0.0
    fresh: float = 0.0


# On a CPU fitted to `python -m bench step`; on a GPU 4-byte words moved to and from memory.
MEASURE = {"cpu": Touches(tile=68), "cuda": Touches(tile=4)}
LEARN = {"cpu": Touches(tile=120), "cuda": Touches(tile=6)}
DENSE = {"cpu": Touches(fresh=12), "cuda": Touches(tile=22)}
TRL_FORWARD = {"cpu": Touches(fresh=13), "cuda": Touches(tile=4)}
TRL_BACKWARD = {"cpu": Touches(fresh=22), "cuda": Touches(tile=14)}
LIGER = {"cpu": Touches(fresh=4), "cuda": Touches(tile=18)}


@dataclass(frozen=True)
class Cost:
    """One strategy's price for one step."""

    strategy: str
    units: float  # of the student's head
    tflop: float
    touched_gib: float  # logits and gradients of logits, written and read
    workspace_mib: float  # beyond inputs and gradients
    predicted_ms: float


def costs(
    tokens: int,
    vocab: int,
    hidden_s: int,
    hidden_t: int,
    keep: float,
    device: Device,
    *,
    workspace_mib: float = 256,
    weight_bytes: int = 4,
) -> list[Cost]:
    """The price of each strategy and peer for a step on both models' hidden states, cheapest first.

    tokens, vocab, hidden_s, hidden_t  N, V and both hidden widths
    keep                               fraction of rows kept, in (0, 1]
    device                             from GPUS, or this_cpu(hidden_s)
    workspace_mib                      as `distill` takes it
    weight_bytes                       of an entry of the student's head
    """
    from tip_kernels.distillation.one_sweep import divided, stash_slots

    n, rho = float(tokens), keep
    kept, kind, workspace = max(1, int(keep * tokens)), device.kind, int(workspace_mib * 2**20)
    matrix_mib = 4 * tokens * vocab / 2**20
    student, teacher = 2.0 * hidden_s * vocab, 2.0 * hidden_t * vocab  # operations a row

    def cost(name: str, by_student: float, by_teacher: float, touched: dict[Touches, float], mib: float) -> Cost:
        """by_student and by_teacher are products over all N rows; touched gives the rows of each kind of touch."""
        flops = n * (by_student * student + by_teacher * teacher)
        tile = sum(t.tile * rows for t, rows in touched.items()) * vocab
        fresh = sum(t.fresh * rows for t, rows in touched.items()) * vocab
        seconds = flops / device.flops + tile * device.touch_s + fresh * device.fresh_s
        units = flops / (n * student)
        return Cost(name, units, flops / 1e12, 4 * (tile + fresh) / 2**30, mib, seconds * 1e3)

    def ours(name: str, slots: int, rows: int, by_student: float, by_teacher: float, measured: float) -> Cost | None:
        plan = divided(
            workspace, rows, slots, vocab, (hidden_s, hidden_t), kind, lambda blocks: weight_bytes < 4 and blocks > 1
        )
        if plan is None or (slots and kind != "cpu"):
            return None
        used = plan.tiles + 4 * plan.slots * vocab + 8 * plan.rows * vocab
        touched = {MEASURE[kind]: measured, LEARN[kind]: float(kept)}
        return cost(name, by_student, by_teacher, touched, min(used / 2**20, workspace_mib))

    tiles = 4.0 if kind == "cpu" else min(workspace_mib, 512.0)
    both = {MEASURE[kind]: n + rho * n, LEARN[kind]: float(kept)}
    found = [
        cost("two sweeps", 1 + 3 * rho, 1 + rho, {MEASURE[kind]: n, LEARN[kind]: float(kept)}, tiles),
        cost("two sweeps, entropy rule", 1 + 4 * rho, 2 * rho, both, tiles),
        ours("one sweep", stash_slots(tokens, kept), tokens, 1 + 2 * rho, 1, n),
        ours("one sweep, entropy rule", stash_slots(tokens, kept), tokens, 1 + 2 * rho, rho, (1 + rho) / 2 * n),
        ours("one sweep, rows known", 0, kept, 3 * rho, rho, float(kept)),
        cost("dense autograd, all rows", 3, 1, {DENSE[kind]: n}, 4.5 * matrix_mib),
        cost("TRL, all rows", 4, 2, {TRL_FORWARD[kind]: n, TRL_BACKWARD[kind]: n}, min(11 * matrix_mib, 1400)),
        cost(
            "TRL twice",
            1 + 4 * rho,
            1 + 2 * rho,
            {TRL_FORWARD[kind]: n + kept, TRL_BACKWARD[kind]: float(kept)},
            min(7.5 * matrix_mib, 1400),
        ),
        cost("Liger, all rows", 3, 1, {LIGER[kind]: n}, 3 * 4 * 256 * vocab / 2**20),
    ]
    return sorted((c for c in found if c is not None), key=lambda c: c.predicted_ms)


@dataclass(frozen=True)
class RankCost:
    """What one rank does, holds and sends in one step."""

    strategy: str
    collectives: list[Collective]
    memory_mib: float  # heads, hidden states, their gradients and the workspace; nothing of the backbones
    compute_ms: float
    wire_ms: float


def rank_costs(
    tokens: int,
    vocab: int,
    hidden_s: int,
    hidden_t: int,
    keep: float,
    device: Device,
    *,
    world: int,
    vocab_parallel: int = 1,
    link_gbps: float = LINKS_GBPS["ndr"],
    workspace_mib: float = 256,
    weight_bytes: int = 4,
) -> list[RankCost]:
    """The price of a step on `world` ranks, the selection of scope "global" and both heads cut over `vocab_parallel`.

    tokens          N of all ranks; world / vocab_parallel of them have rows of their own
    vocab_parallel  P, a divisor of world; the peers keep whole heads and are left out where it is not 1
    link_gbps       GB/s that a rank sends
    The other arguments are those of `costs`.
    """
    from tip_kernels.plan.wire import collectives

    data_parallel = world // vocab_parallel
    rows, columns = math.ceil(tokens / data_parallel), math.ceil(vocab / vocab_parallel)
    sizes = {"workspace_mib": workspace_mib, "weight_bytes": weight_bytes}
    kept = max(1, int(keep * rows))
    found = []
    for cost in costs(rows, columns, hidden_s, hidden_t, keep, device, **sizes):
        ours = cost.strategy.startswith("two sweeps")
        if not ours and (vocab_parallel > 1 or cost.strategy.startswith("one sweep")):  # none with a global quota
            continue
        sent = collectives(
            tokens, vocab, hidden_s, hidden_t, keep, data_parallel=data_parallel, vocab_parallel=vocab_parallel,
            kind=device.kind, entropy_rule="entropy" in cost.strategy, **sizes,
        )  # fmt: skip
        if not ours:
            sent = sent[-1:]  # the head's gradient
        held = weight_bytes * ((columns + rows) * (hidden_s + hidden_t) + (columns + rows) * hidden_s)
        held += 4 * kept * hidden_s if ours else 0
        for c in sent:  # what was gathered is there beside what it is unpacked to
            gathered = c.payload // c.calls * c.ranks if c.op == "all-gather" else 0
            held += 2 * gathered + (RANKING_BYTES * rows * data_parallel if c.name == "scores" else 0)
        wire_s = sum(c.sent for c in sent) / (0.8e9 * link_gbps) + HOP_S * sum(c.hops for c in sent)
        found.append(RankCost(cost.strategy, sent, held / 2**20 + cost.workspace_mib, cost.predicted_ms, 1e3 * wire_s))
    return sorted(found, key=lambda c: c.compute_ms + c.wire_ms)


def parser() -> argparse.ArgumentParser:
    """The options of `tip-kernels plan`."""
    p = argparse.ArgumentParser(
        prog="tip-kernels plan", description="what a distillation step costs, by strategy and peer, before it is run"
    )
    p.add_argument("--tokens", type=int, required=True, help="rows N of a step, all rollouts together")
    p.add_argument("--vocab", type=int, required=True, help="vocabulary V")
    p.add_argument("--hidden-s", type=int, required=True, help="hidden width of the student")
    p.add_argument("--hidden-t", type=int, required=True, help="hidden width of the teacher")
    p.add_argument("--keep", type=float, default=0.2, help="fraction of tokens kept, in (0, 1]; 0.2")
    p.add_argument("--gpu", choices=sorted(GPUS), help="a GPU's published rates; without it this CPU is measured")
    p.add_argument("--workspace-mib", type=float, default=256)
    p.add_argument("--world", type=int, help="ranks R: what one of them does, holds and sends")
    p.add_argument(
        "--vocab-parallel", type=int, default=1, help="ranks that share a head's vocabulary, a divisor of R; 1"
    )
    p.add_argument("--link", help=f"{', '.join(LINKS_GBPS)}, or the GB/s that a rank sends; ndr (50)")
    return p


def main(argv: list[str]) -> int:
    """`tip-kernels plan`: prints the table."""
    options = parser()
    args = options.parse_args(argv)
    link = _checked(options, args)
    device = GPUS[args.gpu] if args.gpu else this_cpu(args.hidden_s)
    if args.world is None:
        _print_costs(args, device)
    else:
        _print_ranks(args, device, link)
    return 0


def _checked(options: argparse.ArgumentParser, args: argparse.Namespace) -> float:
    """Ends with a usage error where an argument is wrong; returns the GB/s of the link."""
    for name in ("tokens", "vocab", "hidden_s", "hidden_t"):
        if getattr(args, name) < 1:
            options.error(f"argument --{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 < args.keep <= 1:
        options.error(f"argument --keep: expected a fraction in (0, 1], got {args.keep}")
    if not 1 <= args.workspace_mib < math.inf:
        options.error(f"argument --workspace-mib: expected a number of MiB, at least 1, got {args.workspace_mib}")
    world = 1 if args.world is None else args.world
    if world < 1:
        options.error(f"argument --world: expected at least 1, got {world}")
    if args.vocab_parallel < 1 or world % args.vocab_parallel or args.vocab_parallel > args.vocab:
        options.error(
            f"argument --vocab-parallel: expected a divisor of the {world} ranks of --world, at most --vocab, "
            f"got {args.vocab_parallel}"
        )
    if args.link is not None and args.world is None:
        options.error(f"argument --link: expected beside --world, got {args.link}")
    link = _gbps(args.link or "ndr")
    if not 0 < link < math.inf:
        options.error(f"argument --link: expected {', '.join(LINKS_GBPS)}, or a number of GB/s, got {args.link}")
    return link


def _print_costs(args: argparse.Namespace, device: Device) -> None:
    table = costs(
        args.tokens,
        args.vocab,
        args.hidden_s,
        args.hidden_t,
        args.keep,
        device,
        workspace_mib=args.workspace_mib,
        weight_bytes=2 if args.gpu else 4,
    )
    print(
        f"N={args.tokens} V={args.vocab} H={args.hidden_s}/{args.hidden_t} keep={args.keep:g} on {device.name}: "
        f"{device.flops / 1e12:.3g} TFLOP/s of products"
    )
    print(f"{'strategy':<26} {'units':>6} {'TFLOP':>9} {'logits moved':>13} {'workspace':>11} {'predicted':>11}")
    for c in table:
        print(
            f"{c.strategy:<26} {c.units:>6.2f} {c.tflop:>9.3f} {c.touched_gib:>9.2f} GiB {c.workspace_mib:>7.0f} MiB "
            f"{c.predicted_ms:>8.1f} ms"
        )


def _gbps(link: str) -> float:
    """What the link sends, NaN for what is none."""
    try:
        return LINKS_GBPS.get(link) or float(link)
    except ValueError:
        return math.nan


def _print_ranks(args: argparse.Namespace, device: Device, link_gbps: float) -> None:
    world, vocab_parallel = args.world, args.vocab_parallel
    found = rank_costs(
        args.tokens, args.vocab, args.hidden_s, args.hidden_t, args.keep, device, world=world,
        vocab_parallel=vocab_parallel, link_gbps=link_gbps, workspace_mib=args.workspace_mib,
        weight_bytes=2 if args.gpu else 4,
    )  # fmt: skip
    print(
        f"N={args.tokens} V={args.vocab} H={args.hidden_s}/{args.hidden_t} keep={args.keep:g} on {world} ranks of "
        f"{device.name}: {world // vocab_parallel} data-parallel x {vocab_parallel} vocabulary-parallel, "
        f"{link_gbps:g} GB/s a rank"
    )
    print(f"{'strategy':<26} {'memory':>11} {'sent':>11} {'sent a token':>13} {'products':>11} {'wire':>10}")
    for c in found:
        sent = sum(x.sent for x in c.collectives)
        print(
            f"{c.strategy:<26} {c.memory_mib:>7.0f} MiB {sent / 2**20:>7.1f} MiB {sent * world / args.tokens:>11.1f} B "
            f"{c.compute_ms:>8.1f} ms {c.wire_ms:>7.1f} ms"
        )
    ours = next(c for c in found if c.strategy == "two sweeps")
    if ours.collectives:
        print(f"\n{'two sweeps sends':<26} {'collective':<11} {'ranks':>5} {'calls':>6} {'a rank sends':>16}")
    for x in ours.collectives:
        print(f"{x.name:<26} {x.op:<11} {x.ranks:>5} {x.calls:>6} {x.sent / 2**20:>12.3f} MiB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
