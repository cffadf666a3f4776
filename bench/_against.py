"""Steps of this package as it stands beside another commit's, in one process each and in turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHILD = """
import sys, time
import torch
import tip_kernels as tip
tokens, hidden, vocab, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
h, w = torch.randn(tokens, hidden), torch.randn(vocab, hidden).mul_(2 / hidden**0.5)
s, w_s = (h + 0.3 * torch.randn(tokens, hidden)).requires_grad_(), w.clone().requires_grad_()
known = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.2
steps = {
    "Soft-OR 0.2": {"select": tip.SoftOr(0.2)},
    "entropy 0.2": {"select": tip.TopEntropy(0.2)},
    "all tokens": {"select": tip.KeepAll()},
    "0.2 known beforehand": {"select": tip.KeepAll(), "row_mask": known},
}
print(*steps, sep="|", flush=True)
for line in sys.stdin:
    s.grad = w_s.grad = None
    start = time.perf_counter()
    loss = tip.distill(tip.Head(s, w_s), tip.Head(h, w), divergence=tip.ReverseKL(), **steps[line.strip()]).loss
    loss.backward()
    print(time.perf_counter() - start, float(loss.detach()), float(w_s.grad.norm()), flush=True)
"""


class Build:
    """A checkout whose steps run in a process of their own."""

    def __init__(self, tree: Path, *sizes: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment,
        )  # fmt: skip
        self.steps = self._line().split("|")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.process.args[0]}: ended with code {self.process.wait()}")
        return line

    def run(self, step: str) -> tuple[float, float, float]:
        """(seconds, loss, norm of d(weight))."""
        assert self.process.stdin is not None
        print(step, file=self.process.stdin, flush=True)
        seconds, loss, norm = map(float, self._line().split())
        return seconds, loss, norm


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of the commit, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def compared(commit: str, rounds: int, *sizes: int) -> list[dict]:
    """A row a step: seconds of both builds, the median of ratios within a round and the quartiles around it."""
    with checkout(commit) as tree:
        builds = {"before": Build(tree, *sizes), "now": Build(ROOT, *sizes)}
        steps = builds["now"].steps
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for i in range(rounds + 1):
            for step in steps:
                for name in sorted(builds, reverse=bool(i % 2)):
                    found.setdefault((name, step), []).append(builds[name].run(step))
        for build in builds.values():
            build.process.kill()
            build.process.communicate()  # closes its pipes
    rows = []
    for step in steps:
        before, now = (found[name, step][1:] for name in ("before", "now"))  # the first round warms up
        ratios = [b[0] / a[0] for a, b in zip(before, now, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "step": step,
                "before_ms": min(x[0] for x in before) * 1e3,
                "now_ms": min(x[0] for x in now) * 1e3,
                "least_ratio": min(x[0] for x in now) / min(x[0] for x in before),
                "median_ratio": middle,
                "quartiles": (low, high),
                "loss_gap": abs(now[-1][1] / before[-1][1] - 1),
                "gradient_gap": abs(now[-1][2] / before[-1][2] - 1),
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    print(f"{'step':<22} {'before':>9} {'now':>9} {'minima':>7} {'median of rounds':>17} {'(quartiles)':>14}")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['step']:<22} {row['before_ms']:>6.0f} ms {row['now_ms']:>6.0f} ms {row['least_ratio']:>7.3f} "
            f"{row['median_ratio']:>17.3f} ({low:.3f}-{high:.3f})"
        )
        if max(row["loss_gap"], row["gradient_gap"]) > 1e-4:
            print(f"{'':<22} loss {row['loss_gap']:.1e} and gradient {row['gradient_gap']:.1e} apart")
