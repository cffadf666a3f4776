"""What a run began from, as checksums: a task, a teacher or a student that has changed since is not that run's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from tip_kernels.opd import smollm2, weights
from tip_kernels.opd.disk import reading, sha256_of
from tip_kernels.opd.settings import MAY_CHANGE, PACKAGED, Settings
from tip_kernels.opd.task import Task

READ = (".json", ".safetensors", ".jinja", ".model", ".txt")  # what loading a checkpoint may read


def source_of(settings: Settings, role: str) -> Path | str:
    """The checkpoint folder of the "teacher" or the "student", or the name of a model that is no folder."""
    value = getattr(settings, role)
    if value == "packaged":
        return PACKAGED / role
    return value if smollm2.layers_of(value) is not None else Path(value)


def origin_of(settings: Settings, task: Task) -> dict[str, dict]:
    """{"settings": those that cannot change, "sha256": of task, teacher and student}."""
    sources = {role: source_of(settings, role) for role in ("teacher", "student")}
    lasting = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    sums = {"task": _of_task(settings, task)} | {role: _of_model(role, of) for role, of in sources.items()}
    return {"settings": lasting, "sha256": sums}


def _of_task(settings: Settings, task: Task) -> str:
    """Of the files, where tasks are ones, and of the prompts."""
    prompts, answers = json.dumps([task.held_out, task.listed]), ""
    for option, name in (("--task", settings.task), ("--eval-task", settings.eval_task)):
        path = Path(name or "")
        with reading(path, option):
            answers += sha256_of(path) if path.is_file() else ""
    return hashlib.sha256((answers + prompts).encode()).hexdigest()


def _of_model(role: str, source: Path | str) -> str:
    """Of the names and the bytes of all files that loading it may read."""
    if isinstance(source, Path):
        weights.check_folder(f"--{role}", source)
    with reading(Path(source), f"--{role}"):
        paths = [smollm2.file()] if isinstance(source, str) else sorted(p for p in source.iterdir() if p.suffix in READ)
        lines = [f"{path.name} {sha256_of(path)}" for path in paths if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
