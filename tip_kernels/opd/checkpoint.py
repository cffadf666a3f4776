"""The folder of a run: what is in it, and how it is written so that a crash never costs the last good checkpoint.

    run.json                    the settings
    run.lock                    held by the run that writes here
    log.jsonl                   one row a step; row 0 is the evaluation before training
    checkpoint-000040/          the student as an ordinary checkpoint, optimizer.safetensors, state.json
    latest                      the name of the newest complete checkpoint
    student/                    the student at the end of the run
    summary.json                what --json prints
    report.html                 the run in curves, which curves.png and tokens.png hold as pictures
    inspect.html                where `tip-kernels inspect` puts its page

No pickle anywhere: tensors are safetensors, the rest is JSON. A state.json holds, beside the counters, the sha256 of
the files it stands with and of what the run began from, so that no other run's files are taken for its own.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tip_kernels.inspect.objects import parse_object, read_object, read_text
from tip_kernels.inspect.usage import UsageError
from tip_kernels.opd import disk
from tip_kernels.opd.options import parser
from tip_kernels.opd.origin import origin_of
from tip_kernels.opd.settings import MAY_CHANGE, Settings
from tip_kernels.opd.train import Counters, Loop

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight, beside its step
ENDS = ("summary.json", "report.html", "curves.png", "tokens.png")  # files of a run that has ended


def check_output(folder: Path, overwrite: bool, marker: str = "run.json") -> None:
    """A folder that holds something needs `overwrite`, and must be one that this command made."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"argument --output: expected a folder, got {str(folder)!r}, which is a file")
    with disk.writing(folder):
        taken = folder.is_dir() and any(path.name != disk.LOCK for path in folder.iterdir())
    if taken and not overwrite:
        raise UsageError(
            f"argument --output: expected a new or empty folder, got {str(folder)!r}, which holds files:"
            " --resume continues a run, --overwrite replaces it, another --output leaves it alone"
        )
    if taken and not (folder / marker).is_file():
        raise UsageError(
            f"argument --output: expected a folder that this command made, to overwrite it,"
            f" got {str(folder)!r} without {marker}"
        )


def begin(folder: Path, settings: Settings, resumed_at: int | None) -> None:
    """Make the folder, which the caller has claimed, ready.

    For a new run, what an earlier one left goes (check_output comes first), and nothing else. For one resumed at step
    `resumed_at`, the log's later rows go, as those steps are taken again, and what the run's earlier end left.
    """
    with disk.writing(folder):
        log = None if resumed_at is None else _log_until(folder / "log.jsonl", resumed_at)
        gone = ["student", "partial"]
        if log is None:
            (folder / "latest").unlink(missing_ok=True)  # before what it names
            gone += ["tensorboard", *(old.name for old in folder.glob("checkpoint-*"))]
        for name in gone:
            disk.remove(folder / name)
        for name in ENDS if log is not None else ("log.jsonl", "inspect.html", *ENDS):
            (folder / name).unlink(missing_ok=True)
        if log is not None:
            disk.write_text(folder / "log.jsonl", log)
        write_json(folder / "run.json", asdict(settings))


def stored_settings(folder: Path, argument: str = "--resume") -> dict:
    """The settings a run was started with, each as its option would have been read."""
    path, defaults = folder / "run.json", asdict(Settings())
    if not path.is_file():
        raise UsageError(
            f"argument {argument}: expected the folder of an earlier run, got {str(folder)!r} without run.json"
        )
    stored = read_object(path, argument)
    words = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in stored.items()
        if value is not None and value is not False
    ]
    try:
        read = defaults | vars(parser().parse_args(words))
    except UsageError as error:
        raise UsageError(f"argument {argument}: expected the settings of a run in {path}, got {error}") from None
    for name, value in stored.items():
        if name not in defaults or read[name] != value:
            raise UsageError(f"argument {argument}: expected the settings of a run in {path}, got {name} {value!r}")
    return stored


def resumed_settings(folder: Path, given: dict, argument: str = "--resume") -> Settings:
    """The stored settings with what may change replaced; `given` holds the options that the user typed."""
    stored = asdict(Settings()) | stored_settings(folder, argument)  # an earlier version's run lacks newer settings
    fixed = ("steps",) if stored["schedule"] == "cosine" else ()  # its learning rates follow from their number
    for name, value in given.items():
        if (name in fixed or name not in MAY_CHANGE) and stored[name] != value:
            option = name.replace("_", "-")
            raise UsageError(
                f"argument --{option}: expected {stored[name]!r}, as the run to resume has it, got {value!r}"
            )
    return Settings(**(stored | given))


def latest(folder: Path, argument: str = "--resume") -> Path:
    """The newest complete checkpoint."""
    pointer = folder / "latest"
    name = read_text(pointer, argument).strip() if pointer.is_file() else ""
    if not re.fullmatch(r"checkpoint-\d+", name) or not (folder / name).is_dir():  # never outside of the folder
        raise UsageError(
            f"argument {argument}: expected a run with a checkpoint, got {str(folder)!r} without one (--overwrite?)"
        )
    return folder / name


def save(folder: Path, loop: Loop, origin: dict | None = None) -> Path:
    """Write a checkpoint: a new folder first, then the pointer to it, then the old one goes.

    Each is on the disk, log and names included, before the next begins. Where the disk is full, what was written goes.
    `origin` is what origin_of says of the run; None asks it.
    """
    target, partial = folder / f"checkpoint-{loop.counters.step:06d}", folder / "partial"
    try:
        save_student(partial, loop)
        with disk.writing(partial / OPTIMIZER):
            save_file(_moments(loop), partial / OPTIMIZER)
            sums = {path.name: disk.sha256_of(path) for path in sorted(partial.iterdir())}
        origin = origin or origin_of(loop.settings, loop.task)
        write_json(partial / STATE, asdict(loop.counters) | {"files": sums, "origin": origin})
        if (folder / "log.jsonl").is_file():
            with disk.writing(folder / "log.jsonl"):
                disk.sync(folder / "log.jsonl")
        disk.publish(partial, target)
    except UsageError:
        disk.remove(partial)
        raise
    disk.write_text(folder / "latest", target.name + "\n")
    for old in folder.glob("checkpoint-*"):
        if old != target:
            disk.remove(old)
    return target


def _moments(loop: Loop) -> dict[str, torch.Tensor]:
    names = _names(loop)
    return {
        f"{names[i]}.{field}": torch.as_tensor(value).cpu().contiguous()
        for i, state in loop.optimizer.state_dict()["state"].items()
        for field, value in state.items()
    }


def _names(loop: Loop) -> list[str]:
    """Of the optimizer's weights, in its order."""
    return [name for name, weight in loop.pair.student.model.named_parameters() if weight.requires_grad]


def check(checkpoint: Path, origin: dict, argument: str = "--resume") -> Counters:
    """The counters of a checkpoint whose files are as they were written, by a run that began from `origin`."""
    wanted = f"argument {argument}: expected"
    state = read_object(checkpoint / STATE, argument)
    files, begun = state.pop("files", None), state.pop("origin", None)
    begun = begun if isinstance(begun, dict) else {}
    if not (_are_counters(state) and all(isinstance(of, dict) for of in (files, *map(begun.get, origin)))):
        raise UsageError(f"{wanted} the state of a run in {checkpoint / STATE}, got another JSON object")
    if state["step"] != int(checkpoint.name.rpartition("-")[2]):
        raise UsageError(f"{wanted} the state of the step that {checkpoint} is named by, got that of {state['step']}")
    if changed := _changed(begun, origin):
        raise UsageError(f"{wanted} a run that goes on as it began, got {checkpoint}, which began with {changed}")
    with disk.reading(checkpoint, argument):
        there = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")} - {STATE}
        sums = {name: disk.sha256_of(checkpoint / name) for name in there}
    for name in sorted(sums.keys() | files.keys() | {OPTIMIZER, "config.json"}):
        if name not in sums or files.get(name) != sums[name]:
            raise UsageError(
                f"{wanted} {checkpoint / name} as the run wrote it, got a broken file, another one or none"
            )
    return Counters(**state)


def _are_counters(state: dict) -> bool:
    kinds = {field.name: str(field.type) for field in fields(Counters)}
    return "step" in state and all(name in kinds and _fits(value, kinds[name]) for name, value in state.items())


def _fits(value: object, kind: str) -> bool:
    if value is None:
        return kind.endswith("None")
    if kind.startswith("dict"):
        return isinstance(value, dict) and all(type(v) in (int, float, type(None)) for v in value.values())
    return (type(value) is int and value >= 0) or (type(value) is float and kind.startswith("float"))


def check_same(origin: dict, first: dict, process: str) -> None:
    """UsageError where a process of a run has another task, teacher or student than the first one."""
    if changed := _changed(origin, first):
        raise UsageError(
            f"argument --output: expected processes that begin from the same files, got {changed} in {process}"
        )


def _changed(begun: dict, origin: dict) -> str:
    """What of an origin is not as it was, in words; "" where all is."""
    for name, now in origin["settings"].items():
        was = begun["settings"].get(name, now)  # an earlier version's run lacks newer settings
        if was != now:
            return f"{name} {was!r}, not {now!r}"
    return "".join(f"another {name}" for name, now in origin["sha256"].items() if begun["sha256"].get(name) != now)


def restore(checkpoint: Path, loop: Loop, counters: Counters) -> None:
    """Set optimizer, counters and AdaKD's focus; the student's weights were loaded from the same folder."""
    weights = dict(zip(_names(loop), loop.weights, strict=True))
    state: dict[str, dict] = {name: {} for name in weights}
    try:
        for key, value in load_file(checkpoint / OPTIMIZER).items():
            name, _, field = key.rpartition(".")
            state[name][field] = value
        whole = [name for name, of in state.items() if of and _is_whole(of, weights[name])]
        if len(whole) != sum(map(bool, state.values())) or (not whole and counters.step > counters.skipped):
            raise ValueError("moments that are not those of its weights")
        if loop.focus and counters.step > counters.skipped:
            if counters.focus is None:
                raise ValueError("no ratio of AdaKD")
            loop.focus.load_state_dict(counters.focus)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(
            f"argument --resume: expected the state of the optimizer in {checkpoint}, got {error}"
        ) from None
    groups = loop.optimizer.state_dict()["param_groups"]
    moments = {i: of for i, of in enumerate(state.values()) if of}
    loop.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    loop.counters = counters


def _is_whole(state: dict[str, torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether it is what AdamW keeps of a weight."""
    return state.keys() == {"step", *MOMENTS} and all(state[name].shape == weight.shape for name in MOMENTS)


def save_student(folder: Path, loop: Loop) -> None:
    """The student as an ordinary fp32 checkpoint, in place of what the folder held."""
    disk.remove(folder)
    with disk.writing(folder):
        loop.pair.student.model.save_pretrained(folder)
        try:
            loop.pair.tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise OSError(str(error)) from error


def finish(folder: Path, loop: Loop) -> None:
    """Write student/, all of it or none."""
    try:
        save_student(folder / "partial", loop)
        disk.publish(folder / "partial", folder / "student")
    except UsageError:
        disk.remove(folder / "partial")
        raise


def append_row(folder: Path, row: dict) -> None:
    """One more line in log.jsonl."""
    with disk.writing(folder / "log.jsonl"), (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(finite(row)) + "\n")


def _log_until(path: Path, step: int) -> str:
    """The log's lines of the steps 0 to `step`; UsageError where it lacks one. What follows may be cut short."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else ():
        try:
            whole = line.endswith("\n") and parse_object(line).get("step") == len(kept)
        except ValueError:
            whole = False
        if not whole or len(kept) > step:
            break
        kept.append(line)
    if len(kept) <= step:
        raise UsageError(
            f"argument --resume: expected a row of each step from 0 to {step} in {path}, got {len(kept)} of them"
        )
    return "".join(kept)


def write_json(path: Path, content: dict) -> None:
    """Write or replace a JSON file in one go."""
    disk.write_text(path, json.dumps(finite(content), indent=2) + "\n")


def finite(content: dict) -> dict:
    """The same with null for numbers that JSON cannot write."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
