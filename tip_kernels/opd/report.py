"""What a run shows: a live view or plain lines, the final table, the JSON line, the page and its pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from tip_kernels.opd.settings import Settings
from tip_kernels.opd.train import Counters

LEVELS = "▁▂▃▄▅▆▇█"
TREND = 40  # latest values in a row of levels
QUADRANTS = {"q3": "dark_orange3", "q1": "orange1", "q2": "sky_blue2", "q4": "green4"}  # near Okabe and Ito's


class Progress:
    """A view that renews itself on a terminal; elsewhere a plain line at each evaluation; nothing when quiet.

    All of it goes to stderr: stdout is for the table and the JSON line.
    """

    def __init__(self, settings: Settings, done: int, quiet: bool):
        self.settings, self.quiet = settings, quiet
        self.accuracy: float | None = None
        self.row: dict = {}
        self.trends: dict[str, list[float]] = {"accuracy": [], "eval_kl": [], "loss": []}
        console = Console(stderr=True)
        self.live: Live | None = None
        if not quiet and console.is_terminal:
            columns = (TextColumn("[bold]opd"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("opd", total=settings.steps, completed=done)
            self.live = Live(get_renderable=self.view, console=console, refresh_per_second=8)

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str) -> None:
        """A line of its own."""
        if self.live:
            self.live.console.print(line, highlight=False, markup=False)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show(self, row: dict) -> None:
        """A row of the log."""
        self.accuracy = row.get("accuracy", self.accuracy)
        for name, trend in self.trends.items():
            if row.get(name) is not None:
                trend.append(row[name])
        if row["step"] == 0:
            self.say(f"start  accuracy {_percent(self.accuracy)}  KL {_number(row['eval_kl'])}")
            return
        self.row = row
        if self.live:
            self.bar.update(self.task, completed=row["step"])
        elif "eval_kl" in row:
            self.say(f"step {row['step']}/{self.settings.steps}  accuracy {_percent(self.accuracy)}  {_facts(row)}")

    def view(self) -> Group:
        """The bar; a line a figure with its first value, its latest and its course; quadrants; what is kept."""
        table = Table.grid(padding=(0, 2))
        forms = {"accuracy": ("accuracy", _percent), "eval_kl": ("KL, nats", _number), "loss": ("loss", _number)}
        for name, (label, form) in forms.items():
            if trend := self.trends[name]:
                table.add_row(label, f"{form(trend[0])} → {form(trend[-1])}", Text(_levels(trend[-TREND:]), "cyan"))
        if self.row:
            table.add_row("quadrants", _shares(self.row), _stripe(self.row))
            mass = self.row.get("kept_mass")
            ratio = f", ratio {self.row['keep']:.2f}" if "keep" in self.row else ""
            carried = "" if mass is None else f"with {_percent(mass)} of the KL"
            table.add_row("kept", _percent(self.row["kept_share"]) + ratio, carried)
        return Group(self.bar, table)


def _levels(values: list[float]) -> str:
    """A row of blocks between the smallest and the largest of the values."""
    low, high = min(values), max(values)
    unit = (high - low) / (len(LEVELS) - 1) or 1.0
    return "".join(LEVELS[round((value - low) / unit)] for value in values)


def _shares(row: dict) -> str:
    return "  ".join(f"{name.upper()} {100 * row[name]:.0f} %" for name in QUADRANTS)


def _stripe(row: dict, width: int = 40) -> Text:
    """The quadrants' shares as a stripe; one that is there at all has at least one cell."""
    stripe = Text()
    for name, colour in QUADRANTS.items():
        stripe.append("█" * (max(1, round(width * row[name])) if row[name] else 0), colour)
    return stripe


def _facts(row: dict) -> str:
    quadrants = " ".join(f"{100 * row[f'q{i}']:.0f}" for i in (1, 2, 3, 4))
    ratio = f" (ratio {row['keep']:.2f})" if "keep" in row else ""
    return (
        f"loss {_number(row['loss'])}  entropy {row['entropy']:.2f}  kept {_percent(row['kept_share'])}{ratio}"
        f"  Q1-4 {quadrants} %  grad {_number(row['grad_norm'])}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} MiB"


def peak_mib(device: torch.device) -> float:
    """The largest memory so far, in MiB: what CUDA allocated, else what the process held (NaN where no one says)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def summary(counters: Counters, settings: Settings, device: torch.device, output: Path, seconds: float) -> dict:
    """What --json prints; `seconds` is the whole run's wall clock, loading included."""
    peak = peak_mib(device)
    return {
        "start_accuracy": counters.start_accuracy,
        "start_accuracy_se": counters.start_accuracy_se,
        "end_accuracy": counters.end_accuracy,
        "end_accuracy_se": counters.end_accuracy_se,
        "start_kl": counters.start_kl,
        "end_kl": counters.end_kl,
        "judge_errors": counters.judge_errors,
        "eval_task": settings.eval_task,
        "judge": settings.judge,
        "eval_samples": settings.eval_samples,
        "eval_temperature": settings.eval_temperature,
        "kept_share": counters.kept / counters.rows if counters.rows else None,
        "steps": counters.step,
        "skipped_steps": counters.skipped,
        "seconds": round(seconds, 2),
        "peak_mib": round(peak, 1) if peak == peak else None,
        "rule": settings.preset or settings.rule,
        "keep": (counters.focus or {"keep": 1.0})["keep"] if settings.preset else settings.keep,
        "divergence": settings.divergence,
        "teacher_topk": settings.teacher_topk,
        "seed": settings.seed,
        "output": str(output),
    }


def write_report(folder: Path, result: dict) -> None:
    """report.html alone, with a link to inspect.html where that is there."""
    from tip_kernels.inspect import curves, page

    content = curves.report(curves.Run.load(folder), result, (folder / "inspect.html").is_file())
    page.write(folder / "report.html", page.curves_page(content["title"], content))


def write_pages(folder: Path, result: dict) -> None:
    """report.html, curves.png and tokens.png of a finished run, from its log."""
    from tip_kernels.inspect import curves

    write_report(folder, result)
    curves.draw_report(folder, curves.Run.load(folder))


def print_table(result: dict, task: str, prompts: int, pages: str) -> None:
    """Start and end side by side."""
    from tip_kernels.inspect.curves import decoding, scored

    table = Table(title=f"{task}: {prompts} held-out prompts, {decoding(result)}", title_justify="left")
    table.add_column("", justify="left")
    table.add_column("start", justify="right")
    table.add_column("end", justify="right")
    if result["end_accuracy"] is not None:
        table.add_row(scored(result), _percent(result["start_accuracy"]), _percent(result["end_accuracy"]))
        errors = (result[f"{end}_accuracy_se"] for end in ("start", "end"))
        table.add_row("its standard error over prompts", *map(_percent, errors))
    table.add_row("KL(student || teacher), nats a token", _number(result["start_kl"]), _number(result["end_kl"]))
    console = Console(soft_wrap=True)
    console.print(table)
    if result["start_accuracy"] == result["end_accuracy"] == 0:
        console.print("no answer was right, before or after: the KL is the figure to look at", highlight=False)
    skipped = f", {result['skipped_steps']} skipped" if result["skipped_steps"] else ""
    console.print(
        f"{result['steps']} steps{skipped}; rule {result['rule']} kept {_percent(result['kept_share'])} of the tokens; "
        f"{result['seconds']:.0f} s; peak memory of the process {_mib(result['peak_mib'])}; "
        f"student{pages} in {result['output']}; its tokens, as inspect.html: tip-kernels inspect {result['output']}",
        highlight=False,
        markup=False,
    )
