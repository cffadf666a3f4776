"""What breaks from outside: a write cut short, a process killed, a folder that is not to be trusted."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

from tip_kernels import __main__ as command
from tip_kernels.inspect.usage import UsageError
from tip_kernels.opd import checkpoint, disk
from tip_kernels.opd.pair import load_pair
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task
from tip_kernels.opd.train import Loop

CPU = torch.device("cpu")
SMALL = ["--batch", "4", "--eval-prompts", "8", "--eval-every", "2", "--no-report", "--quiet"]


def opd(*arguments: object) -> int:
    return command.main(["opd", *map(str, arguments)])


@pytest.fixture
def loop() -> Loop:
    pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)
    return Loop(Settings(batch=2, lr=1e-2, warmup=0), pair, load_task("addition", 1), CPU)


# A write cut short


class CutShort(Exception):
    pass


def failing(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """Every change of the file system counts; the one numbered `after` fails, half done where it can be."""
    count = [0]

    def broken(real: Callable, half: Callable) -> Callable:
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] - 1 == after:
                half(*args, **kwargs)
                raise CutShort
            return real(*args, **kwargs)

        return call

    def half_a_tree(path, *args, **kwargs):
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        for file in files[: len(files) // 2]:
            file.unlink()

    def half_a_text(path, text, *args, **kwargs):
        with builtins.open(path, "w") as file:
            file.write(text[: len(text) // 2])

    def half_a_file(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"\x40\x00\x00\x00")

    nothing = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(disk.shutil, "rmtree", broken(shutil.rmtree, half_a_tree))
    monkeypatch.setattr(disk.os, "replace", broken(os.replace, nothing))
    monkeypatch.setattr(checkpoint, "save_file", broken(checkpoint.save_file, half_a_file))
    monkeypatch.setattr(Path, "write_text", broken(Path.write_text, half_a_text))
    real = checkpoint.save_student
    monkeypatch.setattr(checkpoint, "save_student", broken(real, lambda folder, loop: Path(folder).mkdir()))
    return lambda: count[0]


def content(folder: Path) -> dict[str, object]:
    tensors = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
    return {name: x.tolist() for name, x in tensors.items()} | json.loads((folder / "state.json").read_text())


def test_an_interrupted_write_leaves_a_checkpoint_to_go_on_from(loop, tmp_path, monkeypatch):
    """Cut short at each of its changes in turn, then done again over what that left."""
    loop.step()
    loop.counters.step = 1
    first = content(checkpoint.save(tmp_path / "whole", loop)) if (tmp_path / "whole").mkdir() is None else None
    shutil.copytree(tmp_path / "whole", tmp_path / "first")
    loop.step()
    loop.counters.step = 2
    second = content(checkpoint.save(tmp_path / "whole", loop))
    assert first["step"] == 1 and second["step"] == 2 and first != second
    cuts = 0
    while True:
        folder = tmp_path / f"cut {cuts}"
        shutil.copytree(tmp_path / "first", folder)
        with monkeypatch.context() as patch:
            changes = failing(patch, cuts)
            try:
                checkpoint.save(folder, loop)
            except CutShort:
                done = False
            else:
                done = True
        assert content(checkpoint.latest(folder)) in (first, second), cuts
        if done:
            break
        assert changes() == cuts + 1
        again = checkpoint.save(folder, loop)
        assert content(again) == second and checkpoint.latest(folder) == again
        assert [path.name for path in folder.glob("checkpoint-*")] == [again.name]
        cuts += 1
    assert cuts >= 7


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL at any moment: here once a step after the first checkpoint stands in the log."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ["--steps", "6", *SMALL]
    assert opd(*arguments, "--output", whole) == 0
    process = subprocess.Popen([sys.executable, "-m", "tip_kernels", "opd", *arguments, "--output", str(broken)])
    log, deadline = broken / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert opd("--resume", "--quiet", "--output", broken) == 0
    for name in ("student/model.safetensors", "checkpoint-000006/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, broken)]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


# A folder that is not to be trusted


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_pickle_of_a_checkpoint_is_opened(tmp_path, capsys):
    folder, mark = tmp_path / "student", tmp_path / "mark"
    shutil.copytree(PACKAGED / "student", folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert opd("--student", folder, "--output", tmp_path / "run") == 2
    assert "argument --student: expected a causal language model" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_no_code_of_a_checkpoint_is_run(tmp_path, capsys):
    folder, mark = tmp_path / "student", tmp_path / "mark"
    shutil.copytree(PACKAGED / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    assert opd("--student", folder, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "argument --student: expected a causal language model" in error
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../elsewhere", "checkpoint-000001/../../elsewhere", "/etc", ".", "student"])
def test_a_pointer_out_of_the_folder_is_no_checkpoint(name, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-000001").mkdir(parents=True)
    (run / "student").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (run / "latest").write_text(name + "\n")
    with pytest.raises(UsageError, match=r"argument --resume: expected a run with a checkpoint"):
        checkpoint.latest(run)
    (run / "latest").write_text("checkpoint-000001\n")
    assert checkpoint.latest(run) == run / "checkpoint-000001"


def test_a_run_writes_and_removes_nothing_outside_its_folder(tmp_path, monkeypatch):
    """Also where an earlier run's folder holds links that lead out of it."""
    monkeypatch.chdir(tmp_path)
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    assert opd("--steps", "1", *SMALL, "--output", run) == 0
    for name in ("student", "checkpoint-000009", "partial"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).symlink_to(precious)
    before = {path.name for path in tmp_path.iterdir()}
    assert opd("--steps", "1", *SMALL, "--overwrite", "--output", run) in (0, 2)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert (precious / "thesis.txt").read_text() == "mine"
