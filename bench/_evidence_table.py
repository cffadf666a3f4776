"""What results/evidence.jsonl says: intervals over seeds, paired differences, the tables of evidence.md, the figure.

Nothing is drawn at random: with so few seeds a bootstrap can take every resample there is.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from bench.tables import RESULTS, markdown, rewritten

TEXT = Path(__file__).parent / "evidence.md"
FIGURE = RESULTS / "evidence.png"
SETUP = RESULTS / "evidence.json"  # what the runs and the figure were made with
MEAN_OVER = (10, 20, 30, 40, 50)  # steps; the primary measure is the mean accuracy at these
SAME = 0.02  # of accuracy: what counts as no difference
SHARE = 0.9  # of the teacher's accuracy
LEVEL = 0.05

LR = 1e-3  # of all cells but a few
A21, A5, A40, SORTING = "addition_21", "addition_5", "addition_40", "sorting"


class Cell(NamedTuple):
    """What the runs of all seeds share."""

    task: str
    rule: str
    mode: str  # "topk" keeps the best rows, "sample" draws rows without replacement, each with p proportional to score
    keep: float = 1.0
    divergence: str = "reverse_kl"
    lr: float = LR

    @classmethod
    def of(cls, task: str, name: str, *rest, **other) -> Cell:
        """`rule` is its top-k, `rule/sample` its draw; whoever has neither is written as top-k."""
        rule, _, mode = name.partition("/")
        return cls(task, rule, mode or "topk", *rest, **other)

    @classmethod
    def in_record(cls, record: dict) -> Cell:
        return cls(*(record[name] for name in cls._fields))


@dataclass(frozen=True)
class Measured:
    """One cell: each array has a number a seed, in the seeds' order."""

    seeds: tuple[int, ...]
    mean: np.ndarray  # accuracy, over MEAN_OVER
    final: np.ndarray
    tokens: np.ndarray  # learned from until SHARE of the teacher's accuracy, +inf where it was not reached
    seconds: np.ndarray  # likewise, of one core, training alone
    skipped: np.ndarray
    kept: np.ndarray  # share of the tokens that were learned from
    kept_kl: np.ndarray  # their share of KL(student || teacher), over the first ten steps


def measure(records: Sequence[dict], teachers: dict[str, float]) -> dict[Cell, Measured]:
    """The measures of every cell; teachers is each task's accuracy to aim at."""
    cells: dict[Cell, list[dict]] = {}
    for record in records:
        cells.setdefault(Cell.in_record(record), []).append(record)
    measured = {}
    for cell, runs in cells.items():
        runs.sort(key=lambda run: run["seed"])
        aim = SHARE * teachers[cell[0]]
        reached = [next((look for look in run["looks"] if look["accuracy"] >= aim), None) for run in runs]
        measured[cell] = Measured(
            tuple(run["seed"] for run in runs),
            np.array([_mean_accuracy(run) for run in runs]),
            np.array([run["looks"][-1]["accuracy"] for run in runs]),
            np.array([look["tokens"] if look else math.inf for look in reached]),
            np.array([look["seconds"] if look else math.inf for look in reached]),
            np.array([run["skipped"] for run in runs]),
            np.array([run["kept_share"] for run in runs]),
            np.array([run["kept_mass"] for run in runs], dtype=float),
        )
    return measured


def _mean_accuracy(run: dict) -> float:
    return float(np.mean([look["accuracy"] for look in run["looks"] if look["step"] in MEAN_OVER]))


def interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean of x (n,), over all n^n resamples."""
    means = np.sort(x[np.array(list(itertools.product(range(len(x)), repeat=len(x))))].mean(1))
    cut = int(len(means) * LEVEL / 2)
    return float(means[cut]), float(means[-1 - cut])


@dataclass(frozen=True)
class Difference:
    """`one` minus `other`, paired by seed, in the primary measure."""

    question: str
    one: Cell
    other: Cell
    mean: float
    low: float
    high: float
    p: float  # of a paired t-test
    adjusted: float = math.nan  # after the correction for the number of comparisons

    @property
    def verdict(self) -> str:
        if self.adjusted < LEVEL:
            return "better" if self.mean > 0 else "worse"
        return "same" if max(-self.low, self.high) < SAME else "open"


def difference(measured: dict[Cell, Measured], question: str, one: Cell, other: Cell) -> Difference:
    a, b = measured[one], measured[other]
    if a.seeds != b.seeds:
        raise ValueError(f"expected the same seeds in both cells, got {a.seeds} of {one} and {b.seeds} of {other}")
    gap = a.mean - b.mean
    p = float(stats.ttest_1samp(gap, 0.0).pvalue) if gap.std() > 0 else float(gap.mean() == 0)
    return Difference(question, one, other, float(gap.mean()), *interval(gap), p)


def corrected(differences: list[Difference], holm: bool) -> list[Difference]:
    """With p-values adjusted over the whole list: Holm (any false verdict) or Benjamini-Hochberg (their share)."""
    p = np.array([each.p for each in differences])
    if holm:
        order, count = np.argsort(p, kind="stable"), len(p)
        adjusted = np.empty(count)
        adjusted[order] = np.maximum.accumulate(p[order] * (count - np.arange(count)))
    else:
        adjusted = stats.false_discovery_control(p)
    return [replace(d, adjusted=min(1.0, float(q))) for d, q in zip(differences, adjusted, strict=True)]


def questions() -> Iterator[tuple[str, Cell, Cell]]:  # noqa: C901
    """The comparisons of evidence.md, in its order: a list to read from top to bottom, loop after loop."""

    cell = Cell.of
    additions = (A5, A21, A40)
    for task in additions:
        for name in ("entropy/sample", "entropy"):
            yield "T1", cell(task, name, 0.5), cell(task, "full")
    yield "T1", cell(SORTING, "entropy", 0.5), cell(SORTING, "full")
    for keep in (0.1, 0.05):
        for name in ("overconfident", "overconfident_quantile"):
            yield "T2", cell(A21, name, keep), cell(A21, "full")
            yield "T2", cell(A21, name, keep), cell(A21, "random", keep)
    yield "T2", cell(A21, "overconfident", 0.1, lr=3e-4), cell(A21, "full", lr=3e-4)
    for keep in (0.5, 0.2, 0.1, 0.05):
        yield "T3", cell(A21, "soft_or_rank", keep), cell(A21, "entropy", keep)
    for task in (A5, A40, SORTING):
        yield "T3", cell(task, "soft_or_rank", 0.2), cell(task, "entropy", 0.2)
    for task in (*additions, SORTING):
        yield "T3", cell(task, "soft_or_rank/sample", 0.2), cell(task, "entropy/sample", 0.2)
    for keep in (0.5, 0.2):
        yield "T4", cell(A21, "soft_or_minmax", keep), cell(A21, "entropy/sample", keep)
        yield "T4", cell(A21, "soft_or_minmax", keep), cell(A21, "entropy", keep)
        yield "T4", cell(A21, "soft_or_minmax/sample", keep), cell(A21, "entropy/sample", keep)
        for name in ("entropy", "soft_or_minmax", "soft_or_rank", "divergence"):
            yield "T4", cell(A21, name, keep), cell(A21, f"{name}/sample", keep)
    for task, keep in ((A21, 0.5), (A21, 0.2), (A21, 0.1), (A5, 0.2), (A40, 0.2)):
        yield "T5", cell(task, "soft_or_minmax", keep), cell(task, "soft_or_rank", keep)
    for task in (*additions, SORTING):
        yield "T6", cell(task, "soft_or_rank", 0.2), cell(task, "random", 0.2)
        yield "T6", cell(task, "soft_or_rank", 0.2), cell(task, "full")
        yield "T6", cell(task, "divergence", 0.2), cell(task, "random", 0.2)
        yield "T6", cell(task, "divergence", 0.2), cell(task, "full")
    for keep in (0.2, 0.1, 0.05):
        yield "T7", cell(A21, "hellinger", keep), cell(A21, "divergence", keep)
        yield "T7", cell(A21, "teachability", keep), cell(A21, "divergence", keep)
    for other in ("reverse_kl", "forward_kl", "jeffreys", "jsd"):
        yield "D1", cell(A21, "full", 1.0, "todi"), cell(A21, "full", 1.0, other)
    for other in ("reverse_kl", "forward_kl"):
        yield "D1", cell(SORTING, "full", 1.0, "todi"), cell(SORTING, "full", 1.0, other)
    for name in ("adakd_focus", "adakd_temperature", "adakd_both"):
        yield "A1", cell(A21, name), cell(A21, "full")
    for name in ("adakd_focus", "adakd_temperature"):
        yield "A1", cell(A21, "adakd_both"), cell(A21, name)


def beside_controls(measured: dict[Cell, Measured]) -> tuple[list[Difference], list[Difference]]:
    """Every cell beside its full one, and beside random at the same keep; corrected over both together."""
    to_full, to_random = [], []
    for cell in measured:
        task, rule, _, keep, *rest = cell
        full, control = (task, "full", "topk", 1.0, *rest), (task, "random", "topk", keep, *rest)
        if cell != full:
            to_full.append(difference(measured, "full", cell, full))
        if control in measured and rule != "random":
            to_random.append(difference(measured, "random", cell, control))
    both = corrected(to_full + to_random, holm=False)
    return both[: len(to_full)], both[len(to_full) :]


def signed(x: float) -> str:
    """+0.012, and +0.000 for what rounds to none."""
    return f"{round(x, 3) + 0.0:+.3f}"


def text(records: Sequence[dict], teachers: dict[str, float]) -> str:
    """evidence.md with its two tables as the records have them."""
    measured = measure(records, teachers)
    answers = corrected([difference(measured, *each) for each in questions()], holm=True)
    rows = [
        (
            d.question,
            d.one.task,
            _name(d.one),
            _name(d.other),
            signed(d.mean),
            f"{signed(d.low)} to {signed(d.high)}",
            f"{d.adjusted:.4f}",
            d.verdict,
        )
        for d in answers
    ]
    head = ("claim", "task", "this", "against", "difference", "95 % interval", "p, corrected", "verdict")
    found = {"answers": markdown(head, rows)}
    to_full, to_random = ({d.one: d for d in each} for each in beside_controls(measured))
    rows = []
    for cell, m in measured.items():
        low, high = interval(m.mean)
        accuracy = f"{m.mean.mean():.3f} ({low:.3f} to {high:.3f})"
        shares = (f"{100 * m.kept.mean():.1f} %", f"{100 * np.nanmean(m.kept_kl):.0f} %")
        rest = (_middle(m.tokens, 1e-3, "k"), _middle(m.seconds, 1, " s"), _beside(to_full.get(cell)))
        rest += (_beside(to_random.get(cell)), f"{m.skipped.sum():.0f}" if m.skipped.any() else "")
        rows.append((cell[0], _name(cell), *shares, accuracy, f"{m.final.mean():.3f}", *rest))
    head = (
        "task",
        "cell",
        "kept",
        "of the KL",
        "mean accuracy",
        "last",
        "tokens to 90 %",
        "time to 90 %",
        "to full",
        "to random",
        "skipped",
    )
    found["cells"] = markdown(head, rows)
    return rewritten(TEXT.read_text(), {name: lambda name=name: found[name] for name in found})


def _name(cell: Cell) -> str:
    _, rule, mode, keep, divergence, lr = cell
    name = f"{rule}, drawn" if mode == "sample" else rule
    amount = "" if rule == "full" or rule.startswith("adakd") else f" {keep:g}"
    name += amount + ("" if divergence == "reverse_kl" else f", {divergence}")
    return name + ("" if lr == LR else f", rate {lr:g}")


def _beside(d: Difference | None) -> str:
    return f"{signed(d.mean)} {d.verdict}" if d else ""


def _middle(x: np.ndarray, factor: float, unit: str) -> str:
    """The median over seeds, and how many seeds have one."""
    reached, middle = int(np.isfinite(x).sum()), float(np.median(x))
    if not math.isfinite(middle):
        return f"{reached} of {len(x)}"
    return f"{middle * factor:.1f}{unit}" + (f" ({reached} of {len(x)})" if reached < len(x) else "")


def teachers_of(setup: dict) -> dict[str, float]:
    return {model["task"]: model["accuracy"] for model in setup["models"] if model["side"] == "teacher"}


def write(records: Sequence[dict]) -> None:
    """The tables into evidence.md, the figure beside the runs."""
    import matplotlib

    setup = json.loads(SETUP.read_text())
    teachers = teachers_of(setup)
    TEXT.write_text(text(records, teachers))
    FIGURE.write_bytes(figure(records, teachers))
    SETUP.write_text(json.dumps(setup | {"matplotlib": matplotlib.__version__}, indent=1) + "\n")
    print(f"{TEXT} and {FIGURE}, from {len(records)} runs")


QUOTAS = (0.05, 0.1, 0.2, 0.5)


def figure(records: Sequence[dict], teachers: dict[str, float]) -> bytes:
    """PNG: mean accuracy against the share of tokens kept, a panel a task; the same bytes for the same records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = measure(records, teachers)
    tasks = (A21, A5, A40, SORTING)
    colours = {
        "random": "#888888",
        "entropy": "#1f77b4",
        "soft_or_rank": "#d62728",
        "soft_or_minmax": "#ff9896",
        "divergence": "#2ca02c",
        "hellinger": "#9467bd",
        "teachability": "#8c564b",
        "overconfident": "#e377c2",
        "overconfident_quantile": "#bcbd22",
    }
    whole = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(whole)
    grid = whole.add_gridspec(3, 2, width_ratios=(1.7, 1))
    panels = [whole.add_subplot(grid[:, 0]), *(whole.add_subplot(grid[i, 1]) for i in range(3))]
    for panel, task in zip(panels, tasks, strict=True):
        low, high = interval(measured[task, "full", "topk", 1.0, "reverse_kl", LR].mean)
        panel.axhspan(low, high, color="#cccccc", lw=0)
        panel.axhline(measured[task, "full", "topk", 1.0, "reverse_kl", LR].mean.mean(), color="black", lw=1)
        for place, (rule, mode) in enumerate(itertools.product(colours, ("topk", "sample"))):
            points = sorted(
                (c[3], m.mean) for c, m in measured.items() if c == (task, rule, mode, c[3], "reverse_kl", LR)
            )
            if not points:
                continue
            # Rules side by side within a quota, so that no point hides another.
            keeps = np.array([QUOTAS.index(keep) + 0.044 * (place - len(colours) + 0.5) for keep, _ in points])
            means = np.array([x.mean() for _, x in points])
            ends = np.array([interval(x) for _, x in points]).T
            panel.errorbar(
                keeps,
                means,
                np.abs(ends - means),
                color=colours[rule],
                ls="-" if mode == "topk" else ":",
                marker="o" if mode == "topk" else "D",
                ms=4,
                lw=0.7,
                elinewidth=1.2,
                label=rule + (", drawn" if mode == "sample" else ""),
            )
        panel.set_xticks(range(len(QUOTAS)), [f"{keep:.0%}" for keep in QUOTAS])
        panel.set_xlim(-0.5, len(QUOTAS) - 0.5)
        for edge in range(1, len(QUOTAS)):
            panel.axvline(edge - 0.5, color="#dddddd", lw=1)
        panel.set_title(task, loc="left")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_xlabel("quota, a share of the tokens; line and band: every token")
    panels[0].set_ylabel("accuracy, mean over steps 10 to 50; bars: 95 % over 5 students")
    whole.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    buffer = io.BytesIO()
    whole.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def compare(records: Sequence[dict], new: Sequence[dict], again: int) -> int:
    """Prints whether new runs land in the old ones' intervals; the run of seed `again` has to repeat its line."""
    failed = 0
    for cell in dict.fromkeys(map(Cell.in_record, new)):
        old = np.array([_mean_accuracy(run) for run in records if Cell.in_record(run) == cell])
        fresh = np.array([_mean_accuracy(run) for run in new if Cell.in_record(run) == cell and run["seed"] != again])
        spread = old.std(ddof=1) * math.sqrt(1 / len(old) + 1 / len(fresh))
        reach = float(stats.t.ppf(1 - LEVEL / 2, len(old) - 1) * spread)
        inside = abs(fresh.mean() - old.mean()) <= reach
        one, other = (
            [
                [look["accuracy"] for look in run["looks"]]
                for run in runs
                if Cell.in_record(run) == cell and run["seed"] == again
            ]
            for runs in (records, new)
        )
        failed += (not inside) + (one != other)
        low, high = interval(old)
        print(
            f"{cell[0]} {_name(cell)}: fresh {fresh.mean():.3f} of {len(fresh)} students, expected "
            f"{old.mean() - reach:.3f} to {old.mean() + reach:.3f} ({'inside' if inside else 'OUTSIDE'}; "
            f"bootstrap {low:.3f} to {high:.3f}); seed {again} {'repeats' if one == other else 'DIFFERS from'} its line"
        )
    return int(failed > 0)
