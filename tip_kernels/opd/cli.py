"""`tip-kernels opd` from its arguments to its exit code: checks before any work, the run, the table."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tip_kernels.inspect.usage import UsageError, install, pick_device
from tip_kernels.opd.options import parser
from tip_kernels.opd.settings import MODELS, Settings

if TYPE_CHECKING:
    import torch

    from tip_kernels.opd.disk import Claim
    from tip_kernels.opd.ranks import Ranks
    from tip_kernels.opd.task import Task
    from tip_kernels.opd.train import Loop

NEEDED = ("transformers", "tokenizers", "safetensors", "rich", "jinja2", "matplotlib")
NOT_SETTINGS = ("output", "resume", "overwrite", "json", "quiet", "retrain", "model", "no_report", "tracker", "timeout")
PATHS = ("teacher", "student", "task", "eval_task")  # options that may be one
LUCK = 0.05  # of nonsense answers that may be right: someone's answer may be "?"


class Interrupt:
    """Ctrl-C asks the loop to stop after this step; a second one stops at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked = ranks, False

    def __enter__(self) -> Interrupt:
        self.mine = threading.current_thread() is threading.main_thread()
        if self.mine:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self.mine:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.ranks.writes:
            print("\ntip-kernels opd: finishing this step; Ctrl-C again stops at once", file=sys.stderr)


def check_preset(given: dict, stored: dict) -> None:
    """A preset chooses the tokens itself, so neither --rule nor --keep can be given beside it."""
    preset = given.get("preset") or stored.get("preset")
    for name in ("rule", "keep"):
        if preset and name in given:
            raise UsageError(f"argument --{name}: expected none beside --preset {preset}, got {given[name]!r}")


READERS = {  # options that one rule or preset alone reads
    "entropy_below": "overconfident",
    "divergence_above": "overconfident",
    "alpha": "sample_entropy",
    "gamma": "sample_entropy",
    "median_of": "adakd",
    "reanchor": "adakd",
}


def check_readers(settings: Settings) -> None:
    """Refuses an option that nothing reads."""
    for name, reader in READERS.items():
        value = getattr(settings, name)
        if value is not None and reader != (settings.preset or settings.rule):
            other = f"--preset {settings.preset}" if settings.preset else f"--rule {settings.rule}"
            raise UsageError(f"argument --{name.replace('_', '-')}: expected none beside {other}, got {value!r}")


def check_evaluation(settings: Settings) -> None:
    """Greedy answers to a prompt are one and the same."""
    if settings.eval_samples > 1 and not settings.eval_temperature:
        wanted = "expected 1 beside --eval-temperature 0, which is greedy"
        raise UsageError(f"argument --eval-samples: {wanted}, got {settings.eval_samples}")


def check_teacher(settings: Settings) -> None:
    """A teacher of K tokens has neither temperatures nor the log-probability of every sampled token."""
    if not settings.teacher_topk:
        return
    if settings.preset:
        other = f"--preset {settings.preset}, whose temperatures need whole distributions"
    elif settings.samples_tokens:
        other = f"--divergence {settings.divergence}, which reads tokens that the teacher may not list"
    elif settings.loss_temperature != 1:
        other = f"--loss-temperature {settings.loss_temperature:g}, since it lists log-probabilities at 1"
    else:
        return
    raise UsageError(f"argument --teacher-topk: expected none beside {other}, got {settings.teacher_topk}")


def settings_of(options: dict, claim: Claim) -> tuple[Settings, Path | None]:
    """The settings, and on --resume the checkpoint to continue from; refuses an output folder that is taken.

    The folder of a run is claimed before it is read, a new one when it is made.
    """
    from tip_kernels.opd import checkpoint

    folder = claim.folder
    if (folder / "run.json").is_file():
        claim.take()
    given = {name: value for name, value in options.items() if name not in NOT_SETTINGS}
    check_preset(given, checkpoint.stored_settings(folder) if options.get("resume") else {})
    for name in PATHS:  # a run must find its files again from another folder
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    chosen = MODELS.get(options.get("model") or "", {})
    if not options.get("resume"):
        checkpoint.check_output(folder, options.get("overwrite", False))
        for name in PATHS:
            if folder.resolve() in Path(given.get(name, "packaged")).parents:
                raise UsageError(f"argument --output: expected a folder without the {name} in it, got {str(folder)!r}")
        return Settings(**(chosen | given)), None
    if options.get("overwrite"):
        raise UsageError("argument --resume: expected --resume or --overwrite, got both")
    models = {role: chosen[role] for role in ("teacher", "student") if role in chosen}
    return checkpoint.resumed_settings(folder, models | given), checkpoint.latest(folder)


def warn_of_one(options: dict, command: str = "opd") -> None:
    """--keep 1 is a number of tokens, --keep 1.0 a share: who types the one may mean the other."""
    if options.get("keep") == 1 and isinstance(options["keep"], int) and os.environ.get("RANK", "0") == "0":
        line = "--keep 1 keeps one token of each rollout; --keep 1.0 keeps every token"
        print(f"tip-kernels {command}: warning: {line}", file=sys.stderr, flush=True)


def warn_of_judge(task: Task) -> None:
    """Before a run, of a task that takes anything for an answer. Warnings are said under --quiet, too."""
    lucky = task.nonsense_right()
    if lucky > LUCK:
        line = (
            f"{task.judged_on} counts {100 * lucky:.0f} % of nonsense answers as right, so accuracy on it says little"
        )
        print(f"tip-kernels opd: warning: {line}", file=sys.stderr, flush=True)


def warn_of_errors(task: Task, count: int, samples: int = 1) -> None:
    """After a run, of `count` answers at its last evaluation that the judge could not take."""
    if count:
        kinds = f" ({', '.join(sorted(task.errors))})" if task.errors else ""
        judged = f"{count} of the last {samples * len(task.held_out)} answers"
        line = f"{task.judged_on} raised an error{kinds} on {judged}, which count as wrong"
        print(f"tip-kernels opd: warning: {line}", file=sys.stderr, flush=True)


def run(options: dict) -> int:
    """One run, or one process of it; returns the exit code."""
    from tip_kernels.opd.ranks import joined

    with joined(pick_device(options.get("device", Settings.device)), options.get("timeout", 600.0)) as ranks:
        return run_joined(options, ranks)


def run_joined(options: dict, ranks: Ranks) -> int:
    """The same of a process that has joined the others."""
    from tip_kernels.opd.disk import Claim

    with Claim(Path(options.get("output", "runs/opd"))) as claim:
        return run_claimed(options, ranks, claim)


def load(settings: Settings, resumed: Path | None, device: torch.device, ranks: Ranks) -> tuple[Loop, dict]:
    """The loop, as a checkpoint left it where one is given, and what the run begins from, which is checked first."""
    from tip_kernels.opd import checkpoint
    from tip_kernels.opd.origin import origin_of, source_of
    from tip_kernels.opd.pair import load_pair
    from tip_kernels.opd.task import task_of
    from tip_kernels.opd.train import Loop

    task = ranks.each(lambda: task_of(settings))
    origin = ranks.each(lambda: origin_of(settings, task))
    first = ranks.decided(lambda: origin)
    ranks.each(lambda: checkpoint.check_same(origin, first, f"process {ranks.rank}"))
    counters = ranks.each(lambda: checkpoint.check(resumed, origin)) if resumed else None
    sources = source_of(settings, "teacher"), source_of(settings, "student")
    pair = ranks.each(lambda: load_pair(*sources, device, resumed))
    loop = ranks.each(lambda: Loop(settings, pair, task, device, ranks))
    if resumed and counters:
        if settings.steps < counters.step:
            raise UsageError(
                f"argument --steps: expected at least the {counters.step} that the run has taken, got {settings.steps}"
            )
        ranks.each(lambda: checkpoint.restore(resumed, loop, counters))
    return loop, origin


def run_claimed(options: dict, ranks: Ranks, claim: Claim) -> int:
    """The same with the folder that it may write to. Every argument is checked before anything is written."""
    from tip_kernels.opd import checkpoint, disk, report, smollm2, trackers

    began, folder = time.perf_counter(), claim.folder
    quiet = options.get("quiet", False) or not ranks.writes
    settings, resumed = ranks.decided(lambda: settings_of(options, claim))
    check_readers(settings)
    check_teacher(settings)
    check_evaluation(settings)
    trackers.check(options.get("tracker"))
    device = ranks.device if ranks.count > 1 else pick_device(settings.device)
    if any(smollm2.layers_of(name) is not None for name in (settings.teacher, settings.student)):
        smollm2.file()  # a missing package is named before anything is loaded
    loop, origin = load(settings, resumed, device, ranks)
    task, earlier = loop.task, loop.counters.seconds

    def begin() -> None:
        claim.take()
        if not resumed:  # another run may have ended here meanwhile
            checkpoint.check_output(folder, options.get("overwrite", False))
        checkpoint.begin(folder, settings, loop.counters.step if resumed else None)

    ranks.decided(begin)
    if ranks.writes and not resumed:
        warn_of_judge(task)
    named = options.get("tracker") if ranks.writes else None
    with (
        closing(trackers.open_tracker(named, folder, asdict(settings), loop.counters.step)) as tracker,
        Interrupt(ranks) as interrupt,
        report.Progress(settings, loop.counters.step, quiet) as progress,
    ):

        def write(row: dict) -> None:
            checkpoint.append_row(folder, row)
            with disk.writing(folder):
                tracker.log(trackers.numbers_of(row), row["step"])
            progress.show(row)
            if interrupt.asked or "eval_kl" in row:
                checkpoint.save(folder, loop, origin)

        def after_step(row: dict) -> bool:
            interrupt.asked = bool(ranks.total([interrupt.asked])[0])  # all stop after the same step
            ranks.decided(lambda: write(row))
            return not interrupt.asked

        going = True
        if not resumed:
            where = f"{ranks.count} x {device.type}" if ranks.count > 1 else device
            progress.say(f"{task.said()}, {settings.steps} steps on {where}")
            going = after_step({"step": 0} | loop.evaluate())
        if going:
            loop.train(after_step)
    step, seconds = loop.counters.step, earlier + time.perf_counter() - began
    if interrupt.asked and step < settings.steps:
        again = f"--resume --output {folder} continues"
        if ranks.writes:
            print(f"tip-kernels opd: interrupted after step {step} of {settings.steps}; {again}", file=sys.stderr)
        return 130
    return end(options, loop, folder, seconds) if ranks.writes else 0


def end(options: dict, loop: Loop, folder: Path, seconds: float) -> int:
    """What a run leaves and says at its end; returns the exit code."""
    from tip_kernels.opd import checkpoint, report

    warn_of_errors(loop.task, loop.counters.judge_errors, loop.settings.eval_samples)
    checkpoint.finish(folder, loop)
    result = report.summary(loop.counters, loop.settings, loop.device, folder, seconds)
    checkpoint.write_json(folder / "summary.json", result)
    pages = "" if options.get("no_report") else ", report.html"
    if pages:
        report.write_pages(folder, result)
    if not options.get("quiet"):
        report.print_table(result, loop.task.judged_on, len(loop.task.held_out), pages)
    if options.get("json"):
        print(json.dumps(checkpoint.finite(result)), flush=True)
    return 0


def make_models(options: dict) -> int:
    """--retrain; returns the exit code."""
    from tip_kernels.opd import checkpoint, disk
    from tip_kernels.opd.retrain import retrain

    allowed = {"retrain", "output", "overwrite", "seed", "json", "quiet"}
    if wrong := sorted(set(options) - allowed):
        raise UsageError(
            f"argument --retrain: expected no other option than --output, --overwrite, --seed, got --{wrong[0]}"
        )
    folder, overwrite = Path(options.get("output", "runs/opd-models")), options.get("overwrite", False)
    say = (lambda line: None) if options.get("quiet") else (lambda line: print(line, file=sys.stderr))
    with disk.Claim(folder) as claim, disk.writing(folder):
        checkpoint.check_output(folder, overwrite, marker="retrain.json")
        claim.take()
        checkpoint.check_output(folder, overwrite, marker="retrain.json")  # another may have ended here meanwhile
        record = retrain(folder, options.get("seed", 0), say)
    if options.get("json"):
        print(json.dumps(record), flush=True)
    return 0


def main(argv: list[str]) -> int:
    """Exit code of `tip-kernels opd`: 0 done, 2 bad arguments, 130 interrupted."""
    options = None
    try:
        options = vars(parser().parse_args(argv))
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise UsageError(f"needs {', '.join(missing)}: {install('opd')}")
        warn_of_one(options)
        return make_models(options) if options.get("retrain") else run(options)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes each has the same error
            print(f"tip-kernels opd: error: {error.beside(options)}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file that no one looked at more closely
        print(f"tip-kernels opd: error: expected files that can be used, got {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "tip-kernels opd: interrupted; --resume continues from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return 130
