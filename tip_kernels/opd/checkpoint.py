"""The folder of a run: what is in it, and how it is written so that a crash never costs the last good checkpoint.

    run.json                    the settings
    log.jsonl                   one row a step; row 0 is the evaluation before training
    checkpoint-000040/          the student as an ordinary checkpoint, optimizer.safetensors, state.json
    latest                      the name of the newest complete checkpoint
    student/                    the student at the end of the run
    summary.json                what --json prints
    report.html                 the run in curves, which curves.png and tokens.png hold as pictures
    inspect.html                where `tip-kernels inspect` puts its page

No pickle anywhere: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tip_kernels.opd import UsageError
from tip_kernels.opd.settings import MAY_CHANGE, Settings
from tip_kernels.opd.train import Counters, Loop


def check_output(folder: Path, overwrite: bool, marker: str = "run.json") -> None:
    """A folder that holds something needs `overwrite`, and must be one that this command made."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"argument --output: expected a folder, got {str(folder)!r}, which is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(
                f"argument --output: expected a new or empty folder, got {str(folder)!r}, which holds files:"
                " --resume continues a run, --overwrite replaces it, another --output leaves it alone"
            )
        if not (folder / marker).is_file():
            raise UsageError(
                f"argument --output: expected a folder that this command made, to overwrite it,"
                f" got {str(folder)!r} without {marker}"
            )


def begin(folder: Path, settings: Settings, resumed_at: int | None) -> None:
    """Make the folder ready.

    For a new run, what an earlier one left goes (check_output comes first), and nothing else. For one resumed at step
    `resumed_at`, the log's later rows go: those steps are taken again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"argument --output: expected a folder that can be made, got {error}") from None
    if resumed_at is not None:
        _trim_log(folder / "log.jsonl", resumed_at)
    else:
        for name in ("student", "partial", "tensorboard", *(old.name for old in folder.glob("checkpoint-*"))):
            _remove(folder / name)
        pages = ("report.html", "curves.png", "tokens.png", "inspect.html")
        for name in ("run.json", "log.jsonl", "latest", "summary.json", *pages):
            (folder / name).unlink(missing_ok=True)
    write_json(folder / "run.json", asdict(settings))


def stored_settings(folder: Path) -> dict:
    """The settings a run was started with."""
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(
            f"argument --resume: expected the folder of an earlier run, got {str(folder)!r} without run.json"
        )
    return json.loads(path.read_text())


def resumed_settings(folder: Path, given: dict) -> Settings:
    """The stored settings with what may change replaced; `given` holds the options that the user typed."""
    stored = asdict(Settings()) | stored_settings(folder)  # a run of an earlier version lacks newer settings
    for name, value in given.items():
        if name not in MAY_CHANGE and stored[name] != value:
            option = name.replace("_", "-")
            raise UsageError(
                f"argument --{option}: expected {stored[name]!r}, as the run to resume has it, got {value!r}"
            )
    return Settings(**(stored | given))


def latest(folder: Path) -> Path:
    """The newest complete checkpoint."""
    pointer = folder / "latest"
    name = pointer.read_text().strip() if pointer.is_file() else ""
    if not re.fullmatch(r"checkpoint-\d+", name) or not (folder / name).is_dir():  # never outside of the folder
        raise UsageError(
            f"argument --resume: expected a run with a checkpoint, got {str(folder)!r} without one (--overwrite?)"
        )
    return folder / name


def save(folder: Path, loop: Loop) -> Path:
    """Write a checkpoint: a new folder first, then the pointer to it, then the old one goes."""
    target = folder / f"checkpoint-{loop.counters.step:06d}"
    partial = folder / "partial"
    save_student(partial, loop)
    moments = {
        f"{i}.{name}": torch.as_tensor(value).cpu().contiguous()
        for i, state in loop.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    write_json(partial / "state.json", asdict(loop.counters))
    _remove(target)
    os.replace(partial, target)
    _write(folder / "latest", target.name + "\n")
    for old in folder.glob("checkpoint-*"):
        if old != target:
            _remove(old)
    return target


def restore(checkpoint: Path, loop: Loop) -> None:
    """Set optimizer, counters and AdaKD's focus; the student's weights were loaded from the same folder."""
    state: dict[int, dict] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    groups = loop.optimizer.state_dict()["param_groups"]
    loop.optimizer.load_state_dict({"state": state, "param_groups": groups})
    loop.counters = Counters(**json.loads((checkpoint / "state.json").read_text()))
    if loop.counters.focus:
        loop.focus.load_state_dict(loop.counters.focus)


def save_student(folder: Path, loop: Loop) -> None:
    """The student as an ordinary fp32 checkpoint, in place of what the folder held."""
    _remove(folder)
    loop.pair.student.model.save_pretrained(folder)
    loop.pair.tokenizer.save_pretrained(folder)


def append_row(folder: Path, row: dict) -> None:
    """One more line in log.jsonl."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(finite(row)) + "\n")


def _trim_log(path: Path, step: int) -> None:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut short
    _write(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def write_json(path: Path, content: dict) -> None:
    """Write or replace a JSON file in one go."""
    _write(path, json.dumps(finite(content), indent=2) + "\n")


def finite(content: dict) -> dict:
    """The same with null for numbers that JSON cannot write."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}


def _remove(folder: Path) -> None:
    """A folder and what is in it; of a link, the link alone."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
