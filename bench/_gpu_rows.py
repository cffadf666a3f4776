"""The timed stages of `python -m bench gpu`, run in a process of their own:

    python -m bench._gpu_rows STAGE ... --out FILE --seconds S [--first] [--quick] [--dry-run] [--ceilings JSON]

Each result is appended to FILE as one line of JSON, row by row, so a stage that is stopped keeps what it has. Before
anything is timed its result is held to a float64 truth (fp32 for sums over all rows) on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor

import reference as ref
import tip_kernels as tip
from bench import _peers
from bench._meter import Stopwatch, peak_above_mib

KEEP = 0.2
LOGITS, LOGITS_FEW = "statistics from logits", "statistics from logits, few rows, cold cache"
HIDDEN = "statistics from hidden states"
KEEP_FEW, KEEP_ALL = "distill, keep 0.2", "distill, keep 1.0"
MEMORY, UPDATE = "memory of a step, keep 0.2", "update of a Qwen3-shaped student, keep 0.2"
TUNE_FOLD, TUNE_GRAD = "tune fold_kernel", "tune grad_kernel"

# With --first: of each row only these.
FEWEST = {
    LOGITS: ("ours", "dense eager"),
    HIDDEN: ("ours", "ours, one fused kernel", "TRL (reverse KL, entropy)"),
    KEEP_FEW: ("ours, Soft-OR 0.2", "ours, all tokens", "TRL, all tokens", "Liger, all tokens"),
    MEMORY: ("ours, Soft-OR 0.2", "TRL, all tokens", "Liger, all tokens"),
}

# Largest relative error of a result that counts as right: ours, and of peers that keep logits or gradients in 16 bits.
OURS, PEERS = 0.02, 0.35


@dataclass(frozen=True)
class Sizes:
    rows: int
    few: int
    vocab: int
    hidden: int
    hidden_t: int
    memory_rows: int
    batch: tuple[int, int]
    dtype: torch.dtype


FULL = Sizes(8192, 32, 151_936, 2048, 4096, 32_768, (8, 1024), torch.bfloat16)
QUICK = Sizes(2048, 32, 151_936, 2048, 4096, 8192, (2, 1024), torch.bfloat16)
DRY = Sizes(5, 2, 300, 32, 64, 5, (1, 5), torch.float32)


@dataclass
class Contender:
    """One way to get a row's result. make() imports and returns the function to time."""

    name: str
    make: Callable[[], Callable[[], object]]
    error: Callable[[object], float]  # of what the function returned
    work: float = 0.0  # bytes, or FLOPs, that its way of computing needs
    limit: float = OURS


@dataclass
class Stage:
    sizes: Sizes
    device: str
    dry_run: bool
    ceilings: dict[str, float]
    emit: Callable[[dict], None]
    first: bool = False
    end: float = field(default_factory=lambda: time.monotonic() + 1e9)

    def left(self) -> float:
        return self.end - time.monotonic()

    def race(
        self,
        row: str,
        contenders: list[Contender],
        *,
        ceiling: str | None = None,
        before: Callable[[], object] = lambda: None,
        gradients_mib: float = 0.0,
        seconds: float = 8.0,
        timed: bool = True,
    ) -> None:
        """Checks each contender, measures its memory, then times all that are right in interleaved rounds."""
        alive: dict[str, Callable[[], object]] = {}
        found: dict[str, dict] = {}
        if self.first:
            contenders = [one for one in contenders if one.name in FEWEST.get(row, ())]
        for one in contenders:
            out = found[one.name] = {"row": row, "who": one.name}
            if self.left() <= 0:
                out["note"] = "left out: the stage's time is up"
                continue
            try:
                run = one.make()
                before()
                error = one.error(run())
                out |= {"error": error} if math.isfinite(error) else {}
                if not error <= one.limit:  # NaN too
                    out["note"] = "wrong"
                    continue
                before()
                out["peak_mib"] = peak_above_mib(run, self.device) - gradients_mib
                alive[one.name] = run
            except ImportError as why:
                out["note"] = f"not installed: {first_line(why)}"
            except torch.OutOfMemoryError:
                out["note"] = "out of memory"
            except Exception as why:
                out["note"] = f"failed: {type(why).__name__}: {first_line(why)}"
            finally:
                before()
                if not self.dry_run:
                    torch.cuda.empty_cache()
        if timed and alive:
            watch = Stopwatch(self.device)
            few = {"least": 1, "most": 1} if self.dry_run else {}
            seconds = max(1.0, min(seconds, self.left()))
            times = watch.rounds_ms(alive, seconds=seconds, before=before, **few)
            before()
            for one in contenders:
                if one.name in times:
                    found[one.name] |= self._speed(times[one.name], one.work, ceiling)
        for out in found.values():
            self.emit(out)

    def _speed(self, times_ms: list[float], work: float, ceiling: str | None) -> dict:
        median = statistics.median(times_ms)
        out = {"time_ms": median, "fastest_ms": min(times_ms), "repeats": len(times_ms)}
        if ceiling and work and self.ceilings.get(ceiling):
            out |= {"share_pct": 100 * work / (median * 1e-3) / self.ceilings[ceiling], "ceiling": ceiling}
        return out


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


# ---- truths


def stats_error(z: Callable[[Tensor], tuple[Tensor, Tensor]], n: int) -> Callable[[dict[str, Tensor]], float]:
    """Of (N,) statistics: the largest relative error in four rows, whose float64 logits z(ids) gives."""
    ids = torch.tensor(sorted({0, n // 3, n // 2, n - 1}))
    truth = ref.token_stats(*z(ids))

    def error(ours: dict[str, Tensor] | tip.TokenStats) -> float:
        read = ours.get if isinstance(ours, dict) else lambda name: getattr(ours, name, None)  # of what was measured
        worst = 0.0
        for name, value in truth.items():
            x = read(name)
            if x is None or value is None or not value.is_floating_point():
                continue
            difference = (x[ids.to(x.device)].double() - value).abs() / (value.abs() + 1e-2)
            worst = max(worst, difference.nan_to_num(nan=torch.inf).amax().item())
        return worst

    return error


class StepTruth:
    """The reverse KL of every row of a Problem in fp32, and from it what a step's loss and gradients must be."""

    def __init__(self, p: _peers.Problem) -> None:
        self.weights = p.weight_s.detach(), p.weight_t
        done = []
        for r0 in range(0, p.hidden_s.shape[0], 512):
            done.append(self.rows(p, slice(r0, r0 + 512), torch.float32)[2])
        self.kl = torch.cat(done)

    def rows(self, p: _peers.Problem, ids: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(p_s, log p_s - log p_t, KL(s || t)) of the given rows."""
        pairs = zip((p.hidden_s.detach()[ids], p.hidden_t[ids]), self.weights, strict=True)
        logp_s, logp_t = ((h.to(dtype) @ w.to(dtype).t()).log_softmax(-1) for h, w in pairs)
        p_s, gap = logp_s.exp(), logp_s - logp_t
        return p_s, gap, (p_s * gap).sum(-1)

    def error(self, p: _peers.Problem, loss: Tensor, keep: float) -> float:
        """The largest of: the loss's relative error, and those of two rows of d(hidden) and two of d(weight).

        Rows learned from are those whose gradient is not 0; infinite if their number is not keep's.
        """
        kept = p.hidden_s.grad.ne(0).any(1).nonzero().squeeze(1)
        if abs(kept.numel() - keep * self.kl.numel()) > 1:
            return torch.inf
        errors = [relative(loss.double(), self.kl[kept].double().mean())]
        ids = kept[[0, -1]]
        p_s, gap, kl = self.rows(p, ids, torch.float64)
        dlogits = p_s * (gap - kl[:, None]) / kept.numel()
        columns = dlogits.abs().argmax(1)
        errors.append(relative(p.hidden_s.grad[ids].double(), dlogits @ self.weights[0].double()))
        dweight = torch.zeros(columns.numel(), p.hidden_s.shape[1], dtype=torch.float64, device=dlogits.device)
        for part in kept.split(512):
            p_s, gap, kl = self.rows(p, part, torch.float32)
            at = p_s[:, columns] * (gap[:, columns] - kl[:, None]) / kept.numel()
            dweight += at.double().t() @ p.hidden_s.detach()[part].double()
        errors.append(relative(p.weight_s.grad[columns].double(), dweight))
        return max(errors)


def relative(x: Tensor, truth: Tensor) -> float:
    value = ((x - truth).norm() / truth.norm()).item()
    return value if value == value else torch.inf


# ---- stages


def ceilings(stage: Stage) -> None:
    """Bytes a second of a large copy, read plus written, and FLOPs a second of the vendor's 16-bit product."""
    if stage.dry_run:
        stage.emit({"ceilings": {}})
        return
    watch = Stopwatch(stage.device)
    source = torch.randn(2**30, dtype=torch.bfloat16, device=stage.device)
    target = torch.empty_like(source)
    copy = statistics.median(watch.rounds_ms({"": lambda: target.copy_(source)}, seconds=2, most=20)[""])
    rate = 0.0
    for n, h, v in ((8192, 8192, 8192), (8192, 4096, 32_768)):
        a, b = source[: n * h].view(n, h), source[-v * h :].view(v, h).t()
        out = torch.empty(n, v, dtype=torch.bfloat16, device=stage.device)
        times = watch.rounds_ms({"": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, seconds=2, least=20)[""]
        rate = max(rate, 2e3 * n * h * v / statistics.median(times))
    stage.emit({"ceilings": {"copy": 2 * source.nbytes / (copy * 1e-3), "matmul": rate}})


def pair_of_logits(stage: Stage, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(stage.device).manual_seed(0)
    settings = {"dtype": stage.sizes.dtype, "device": stage.device, "generator": generator}
    z_s = torch.randn(n, stage.sizes.vocab, **settings).mul_(2)
    return z_s, torch.randn(n, stage.sizes.vocab, **settings).mul_(0.5).add_(z_s)


def truth_of_logits(z_s: Tensor, z_t: Tensor) -> Callable[[dict[str, Tensor]], float]:
    return stats_error(lambda ids: (z_s[ids.to(z_s.device)].double(), z_t[ids.to(z_s.device)].double()), z_s.shape[0])


def logits(stage: Stage) -> None:
    for row, n in ((LOGITS, stage.sizes.rows), (LOGITS_FEW, stage.sizes.few))[: 1 if stage.first else 2]:
        z_s, z_t = pair_of_logits(stage, n)
        right = truth_of_logits(z_s, z_t)
        runs = {
            "ours": lambda z_s=z_s, z_t=z_t: lambda: tip.token_stats(z_s, z_t),
            "dense eager": lambda z_s=z_s, z_t=z_t: lambda: _peers.dense_stats(z_s, z_t),
            "dense torch.compile": lambda z_s=z_s, z_t=z_t: compiled(_peers.dense_stats, z_s, z_t),
        }
        contenders = [Contender(name, make, right, z_s.nbytes + z_t.nbytes) for name, make in runs.items()]
        stage.race(row, contenders, ceiling="copy")
        for name in ("TRL", "Liger"):
            stage.emit({"row": row, "who": name, "note": "has no operation that measures logits in memory"})
        del contenders, runs, right, z_s, z_t


def compiled(function: Callable, *inputs: object) -> Callable[[], object]:
    run = torch.compile(function, dynamic=False)
    return lambda: run(*inputs)


def hidden(stage: Stage) -> None:
    n, v, h_s, h_t = stage.sizes.rows, stage.sizes.vocab, stage.sizes.hidden, stage.sizes.hidden_t
    problem = _peers.Problem.random(n, h_s, v, dtype=stage.sizes.dtype, device=stage.device)
    generator = torch.Generator(stage.device).manual_seed(1)
    draw = {"dtype": stage.sizes.dtype, "device": stage.device, "generator": generator}
    hidden_t, weight_t = torch.randn(n, h_t, **draw), torch.randn(v, h_t, **draw).mul_(2 / h_t**0.5)
    p = _peers.Problem(problem.hidden_s.detach(), problem.weight_s.detach(), hidden_t, weight_t)
    flops = 2.0 * n * v * (h_s + h_t)

    def truth(ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids.to(stage.device)
        pairs = ((p.hidden_s, p.weight_s), (p.hidden_t, p.weight_t))
        return tuple(h[ids].double() @ w.double().t() for h, w in pairs)

    def ours() -> Callable[[], object]:
        return lambda: tip.token_stats(tip.Head(p.hidden_s, p.weight_s), tip.Head(p.hidden_t, p.weight_t))

    def fused() -> Callable[[], object]:
        from tip_kernels.backends.triton.linear_stats import linear_stats

        return lambda: linear_stats(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t)

    def trl() -> Callable[[], object]:
        measure = _peers.trl_stats()
        return lambda: measure(p)

    right = stats_error(truth, n)
    contenders = [
        Contender("ours", ours, right, flops),
        Contender("ours, one fused kernel", fused, right, flops),
        Contender("dense eager", lambda: lambda: _peers.dense_stats_of_hidden(p), right, flops, PEERS),
        Contender("dense torch.compile", lambda: compiled(_peers.dense_stats_of_hidden, p), right, flops, PEERS),
        Contender("TRL (reverse KL, entropy)", trl, right, flops, PEERS),
    ]
    with torch.no_grad():
        stage.race(HIDDEN, contenders, ceiling="matmul")
    stage.emit({"row": HIDDEN, "who": "Liger", "note": "measures only while computing a gradient"})


# name -> (maker, fraction learned from, products of N x H x V that its way needs)
STEPS: dict[str, tuple[Callable[[], _peers.Step], float, float]] = {
    "ours, Soft-OR 0.2": (lambda: _peers.ours(tip.SoftOr(KEEP)), KEEP, 2 + 4 * KEEP),
    "ours, entropy 0.2": (lambda: _peers.ours(tip.TopEntropy(KEEP)), KEEP, 1 + 5 * KEEP),
    "ours, all tokens": (lambda: _peers.ours(tip.KeepAll()), 1.0, 6.0),
    "TRL, all tokens": (_peers.trl_all, 1.0, 6.0),
    "TRL, scored then 0.2": (lambda: _peers.trl_twice(KEEP), KEEP, 2 + 6 * KEEP),
    "Liger, all tokens": (_peers.liger, 1.0, 4.0),
    "dense eager": (lambda: _peers.dense, 1.0, 4.0),
    "dense torch.compile": (_peers.compiled_dense, 1.0, 4.0),
}


def step_contenders(p: _peers.Problem, names: list[str]) -> list[Contender]:
    truth = StepTruth(p)
    n, h = p.hidden_s.shape
    unit = 2.0 * n * h * p.weight_s.shape[0]

    def contender(name: str) -> Contender:
        make, keep, units = STEPS[name]

        def bound() -> Callable[[], object]:
            step = make()
            return lambda: step(p)

        limit = OURS if name.startswith("ours") else PEERS
        return Contender(name, bound, lambda loss: truth.error(p, loss, keep), units * unit, limit)

    return [contender(name) for name in names]


def distill(stage: Stage) -> None:
    """Timed once, interleaved; the report reads both rows of targets from it."""
    p = _peers.Problem.random(
        stage.sizes.rows, stage.sizes.hidden, stage.sizes.vocab, dtype=stage.sizes.dtype, device=stage.device
    )
    results: list[dict] = []
    emit, stage.emit = stage.emit, results.append
    stage.race(
        KEEP_FEW,
        step_contenders(p, list(STEPS)),
        ceiling="matmul",
        before=p.clear,
        gradients_mib=p.gradients_mib(),
        seconds=12,
    )
    stage.emit = emit
    for row, absent in ((KEEP_FEW, "ours, all tokens"), (KEEP_ALL, "0.2")):
        for result in results:
            if absent not in result["who"]:
                stage.emit(result | {"row": row})


def memory(stage: Stage) -> None:
    p = _peers.Problem.random(
        stage.sizes.memory_rows, stage.sizes.hidden, stage.sizes.vocab, dtype=stage.sizes.dtype, device=stage.device
    )
    names = ["ours, Soft-OR 0.2", "ours, entropy 0.2", "TRL, all tokens", "Liger, all tokens", "dense eager"]
    contenders = step_contenders(p, names)
    stage.race(MEMORY, contenders, before=p.clear, gradients_mib=p.gradients_mib(), timed=False)


def update(stage: Stage) -> None:
    names = ["ours, Soft-OR 0.2", "TRL, all tokens", "Liger, all tokens", "dense eager"]
    try:
        student = _peers.Update(*stage.sizes.batch, small=stage.dry_run, dtype=stage.sizes.dtype, device=stage.device)
    except ImportError as error:
        for name in names:
            stage.emit({"row": UPDATE, "who": name, "note": f"not installed: {first_line(error)}"})
        return

    def contender(name: str) -> Contender:
        make, keep, _ = STEPS[name]
        step = None

        def bound() -> Callable[[], object]:
            nonlocal step
            step = make()
            return lambda: student.run(step)

        def error(_: object) -> float:
            p = student.problem()
            return StepTruth(p).error(p, step(p), keep)

        return Contender(name, bound, error, limit=OURS if name.startswith("ours") else PEERS)

    stage.race(UPDATE, [contender(name) for name in names], before=student.clear, seconds=10)


def tune(stage: Stage) -> None:
    """Times settings of the two kernels that read logits; those in use are marked, and nothing is changed."""
    from tip_kernels.backends.triton import row_grad, row_stats
    from tip_kernels.backends.triton._launch import warp

    n = 2 if stage.dry_run else stage.sizes.rows // 4
    z_s, z_t = pair_of_logits(stage, n)
    right = truth_of_logits(z_s, z_t)
    pinned = row_stats.fold_config(False, False, True)
    grids = ([8192], [1, 4], [1], [8]) if stage.dry_run else ([4096, 8192, 16_384], [1, 2, 4], [1, 2, 4], [8, 16])
    contenders = []
    for part, tiles, warps, columns in product(*grids):
        config = pinned | {"TILE": columns * warp() * warps, "TILES": tiles, "num_warps": warps}
        mark = " *" if (part, config) == (row_stats.PART, pinned) else ""
        name = f"PART={part} TILES={tiles} warps={warps} columns a lane={columns}{mark}"

        def fold(part: int = part, config: dict = config) -> object:
            with (
                mock.patch.object(row_stats, "PART", part),
                mock.patch.object(row_stats, "fold_config", lambda *_: config),
            ):
                return row_stats.row_stats(z_s, z_t)

        contenders.append(Contender(name, lambda fold=fold: fold, right, z_s.nbytes + z_t.nbytes))
    stage.race(TUNE_FOLD, contenders, ceiling="copy", seconds=25)

    stats = row_stats.row_stats(z_s, z_t)
    upstream, out = torch.ones(n, device=stage.device), torch.empty_like(z_s)
    terms = [row_grad.Term(1.0, "reverse_kl", (), stats)]
    logp_s, logp_t = (z[:1].double().log_softmax(-1) for z in (z_s, z_t))
    truth = logp_s.exp() * (logp_s - logp_t - (logp_s.exp() * (logp_s - logp_t)).sum())
    pinned = row_grad.grad_config()
    grids = ([8192], [2], [1, 4], [8]) if stage.dry_run else ([4096, 8192, 16_384], [1, 2, 4], [1, 4, 8], [8])
    contenders = []
    for chunk, tiles, warps, columns in product(*grids):
        config = pinned | {"TILE": columns * warp() * warps, "TILES": tiles, "num_warps": warps}
        mark = " *" if (chunk, config) == (row_grad.CHUNK, pinned) else ""
        name = f"CHUNK={chunk} TILES={tiles} warps={warps} columns a lane={columns}{mark}"

        def grad(chunk: int = chunk, config: dict = config) -> Tensor:
            with (
                mock.patch.object(row_grad, "CHUNK", chunk),
                mock.patch.object(row_grad, "grad_config", lambda: config),
            ):
                return row_grad.row_grad(z_s, z_t, upstream, stats, terms, out=out)

        work = z_s.nbytes + z_t.nbytes + out.nbytes
        contenders.append(Contender(name, lambda grad=grad: grad, lambda g: relative(g[:1].double(), truth), work))
    stage.race(TUNE_GRAD, contenders, ceiling="copy", seconds=15)


STAGES = {f.__name__: f for f in (ceilings, logits, hidden, distill, memory, update, tune)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench._gpu_rows", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ceilings", type=json.loads, default={})
    args = parser.parse_args(argv)
    start = time.monotonic()
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:
        torch.set_num_threads(1)

    def emit(line: dict) -> None:
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    about = {"torch": torch.__version__, "triton": triton.__version__}
    if not args.dry_run:
        about |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or torch.version.hip}
    emit({"about": about})
    sizes = DRY if args.dry_run else QUICK if args.quick else FULL
    failed = 0
    for name in args.stages:
        stage = Stage(sizes, device, args.dry_run, args.ceilings, emit, args.first, start + 0.8 * args.seconds)
        try:
            STAGES[name](stage)
        except Exception as error:  # the next stage may still be able to run
            emit({"failed": f"{name}: {type(error).__name__}: {first_line(error)}"})
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
