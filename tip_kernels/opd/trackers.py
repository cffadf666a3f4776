"""Where the rows of a run's log can go besides its file: TensorBoard, trackio or Weights & Biases. None unless asked.

A tracker is anything with `log(numbers, step)` and `close()`; each library is imported when it is asked for by name.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Protocol

from tip_kernels.inspect.usage import UsageError

PROJECT = "tip-kernels"


class Tracker(Protocol):
    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _None:
    def log(self, numbers: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, settings: dict, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        lines = (f"    {name}: {value}" for name, value in settings.items())
        self.writer.add_text("settings", "\n".join(lines), done)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Weights & Biases, which sends what it logs to its server unless WANDB_MODE=offline."""

    def __init__(self, folder: Path, settings: dict, done: int):
        import wandb  # pyright: ignore[reportMissingImports]  (an option of a user's)

        self.run = wandb.init(project=PROJECT, name=folder.name, dir=str(folder), config=settings)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """trackio, which keeps what it logs on this machine. It prints to stdout, which is the JSON line's."""

    def __init__(self, folder: Path, settings: dict, done: int):
        import trackio  # pyright: ignore[reportMissingImports]  (an option of a user's)

        with redirect_stdout(sys.stderr):
            self.run = trackio.init(project=PROJECT, name=folder.name, config=settings, embed=False)
        self.finish = trackio.finish  # not the run's own, after which trackio finishes it once more at exit

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.finish()


KINDS = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


def check(name: str | None) -> None:
    """Raises UsageError where the tracker's library is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UsageError(f"argument --tracker: {name} is not installed: pip install {name}")


def open_tracker(name: str | None, folder: Path, settings: dict, done: int) -> Tracker:
    """The tracker called `name`, for a run that has taken `done` steps; one that keeps nothing for None."""
    return _None() if name is None else KINDS[name](folder, settings, done)


def numbers_of(row: dict) -> dict[str, float]:
    """What of a log's row a tracker can draw: its finite numbers, the step aside."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
