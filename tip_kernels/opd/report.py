"""What a run shows: a live bar or plain lines, the final table, and the JSON line."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tip_kernels.opd.settings import Settings
from tip_kernels.opd.train import Counters


class Progress:
    """One line that renews itself on a terminal; elsewhere a plain line at each evaluation; nothing when quiet.

    All of it goes to stderr: stdout is for the table and the JSON line.
    """

    def __init__(self, settings: Settings, done: int, quiet: bool):
        self.settings, self.quiet = settings, quiet
        live = not quiet and sys.stderr.isatty()
        self.bar = (
            tqdm(total=settings.steps, initial=done, desc="opd", unit="step", dynamic_ncols=True) if live else None
        )
        self.accuracy: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show(self, row: dict) -> None:
        """A row of the log."""
        self.accuracy = row.get("accuracy", self.accuracy)
        if row["step"] == 0:
            self.say(f"start  accuracy {_percent(self.accuracy)}  KL {_number(row['eval_kl'])}")
            return
        text = f"accuracy {_percent(self.accuracy)}  {_facts(row)}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif "eval_kl" in row:
            self.say(f"step {row['step']}/{self.settings.steps}  {text}")


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
        "end_accuracy": counters.end_accuracy,
        "start_kl": counters.start_kl,
        "end_kl": counters.end_kl,
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


def print_table(result: dict, task: str, prompts: int) -> None:
    """Start and end side by side."""
    table = Table(title=f"{task}: {prompts} held-out prompts, greedy decoding", title_justify="left")
    for column, justify in (("", "left"), ("start", "right"), ("end", "right")):
        table.add_column(column, justify=justify)
    if result["end_accuracy"] is not None:
        table.add_row("accuracy", _percent(result["start_accuracy"]), _percent(result["end_accuracy"]))
    table.add_row("KL(student || teacher), nats a token", _number(result["start_kl"]), _number(result["end_kl"]))
    console = Console(soft_wrap=True)
    console.print(table)
    skipped = f", {result['skipped_steps']} skipped" if result["skipped_steps"] else ""
    console.print(
        f"{result['steps']} steps{skipped}; rule {result['rule']} kept {_percent(result['kept_share'])} of the tokens; "
        f"{result['seconds']:.0f} s; peak {_number(result['peak_mib'])} MiB; student in {result['output']}/student",
        highlight=False,
        markup=False,
    )
