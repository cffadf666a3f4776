"""A run and its files: one writer a folder, nothing resumed that is not its own, no error that is not one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tip_kernels import __main__ as command
from tip_kernels.inspect.tokens import TokenTable
from tip_kernels.opd import checkpoint, cli, disk, pair
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task
from tip_kernels.opd.train import Loop

CPU = torch.device("cpu")
SMALL = ["--batch", "4", "--eval-prompts", "8", "--eval-every", "2", "--no-report", "--quiet"]


def opd(*arguments: object) -> int:
    return command.main(["opd", *map(str, arguments)])


def refused(capsys, *words: object, name: str = "opd") -> str:
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert command.main([name, *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"tip-kernels {name}: error: "), err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A run of two steps of copies of the packaged models on a file of prompts, which no test changes."""
    folder = tmp_path_factory.mktemp("ended")
    for role in ("teacher", "student"):
        shutil.copytree(PACKAGED / role, folder / role)
    write_prompts(folder)
    assert opd(*began_from(folder), "--steps", 2, *SMALL, "--output", folder / "run") == 0
    return folder


def write_prompts(folder: Path) -> None:
    rows = ({"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100, 140))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def began_from(folder: Path) -> list[str]:
    return [f"--{role}={folder / role}" for role in ("teacher", "student")] + [f"--task={folder / 'prompts.jsonl'}"]


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the run; what it began from stays where it is."""
    shutil.copytree(ended / "run", tmp_path / "run")
    return tmp_path / "run"


# One writer


def started(*arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "tip_kernels", "opd", *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def test_a_folder_that_a_run_writes_to_is_refused_until_that_run_is_gone(tmp_path, capsys):
    folder = tmp_path / "run"
    process = started("--steps", 500, *SMALL, "--output", folder)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "latest").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for again in (["--resume", "--quiet"], ["--overwrite", "--seed", 1, *SMALL]):
            line = refused(capsys, *again, "--output", folder)
            assert f"argument --output: expected a folder that no other run writes to, got '{folder}'" in line
        assert json.loads((folder / "run.json").read_text())["seed"] == 0 and process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    step = int(checkpoint.latest(folder).name[-6:])
    assert opd("--resume", "--steps", step + 1, "--quiet", "--output", folder) == 0


def test_of_two_runs_that_begin_together_in_a_new_folder_one_ends_with_a_line(tmp_path, capsys, monkeypatch):
    """Both found it new: the other takes it, or even ends there, while this one loads its models."""
    load = pair.load_pair
    for name, steps in (("under way", None), ("ended", 1)):
        folder, claim = tmp_path / name, disk.Claim(tmp_path / name)

        def meanwhile(*args, folder=folder, claim=claim, steps=steps):
            monkeypatch.setattr(pair, "load_pair", load)
            claim.take() if steps is None else opd("--steps", steps, "--seed", 7, *SMALL, "--output", folder)
            return load(*args)

        monkeypatch.setattr(pair, "load_pair", meanwhile)
        line = refused(capsys, "--steps", 1, *SMALL, "--output", folder)
        assert "argument --output: expected a " + ("new or empty" if steps else "folder that no other") in line
        claim.__exit__()
        if steps:
            assert json.loads((folder / "run.json").read_text())["seed"] == 7
            assert json.loads((folder / "summary.json").read_text())["seed"] == 7
        else:
            assert [path.name for path in folder.iterdir()] == [disk.LOCK]
            assert opd("--steps", 1, *SMALL, "--output", folder) == 0  # a lock that no one holds is no file of a run


def test_the_first_of_several_processes_claims_the_folder_for_all(tmp_path):
    with disk.Claim(tmp_path / "run") as claim:
        claim.take()
        launched = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "tip_kernels",
            "opd",
            "--device",
            "cpu",
        ]
        words = [sys.executable, *launched, "--steps", "1", *SMALL, "--output", str(tmp_path / "run")]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode != 0 and done.stderr.count("expected a folder that no other run writes to") == 1
    assert "Traceback" not in done.stderr.split("expected a folder")[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [disk.LOCK]


def test_retraining_and_a_run_do_not_meet_in_a_folder(tmp_path, capsys):
    with disk.Claim(tmp_path / "models") as claim:
        claim.take()
        line = refused(capsys, "--retrain", "--output", tmp_path / "models")
    assert "expected a folder that no other run writes to" in line


# What is resumed is the run's own


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGED = {
    "a prompt": ("task", lambda folder: replace_text(folder / "prompts.jsonl", '"100+100="', '"100+101="')),
    "an answer": ("task", lambda folder: replace_text(folder / "prompts.jsonl", '"200"', '"201"')),
    "the teacher": ("teacher", lambda folder: shift(folder / "teacher/model.safetensors")),
    "the student": ("student", lambda folder: shift(folder / "student/model.safetensors")),
    "a way to end": ("student", lambda f: replace_text(f / "student/generation_config.json", "{", '{"top_k": 7,')),
}


def shift(path: Path) -> None:
    """Another value in one weight."""
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("changed", CHANGED)
def test_a_run_whose_task_teacher_or_student_has_changed_is_not_resumed(changed, tmp_path, capsys):
    for role in ("teacher", "student"):
        shutil.copytree(PACKAGED / role, tmp_path / role)
    write_prompts(tmp_path)
    run = tmp_path / "run"
    assert opd(*began_from(tmp_path), "--steps", 1, *SMALL, "--output", run) == 0
    before = contents(run)
    role, change = CHANGED[changed]
    change(tmp_path)
    for words in (["opd", "--resume", "--steps", 2, "--output", run], ["inspect", run, "--prompts", 1]):
        line = refused(capsys, *words[1:], name=words[0])
        assert f"expected a run that goes on as it began, got {run}/checkpoint-000001, which began with another" in line
        assert f"another {role}\n" in line
    assert contents(run) == before


def test_a_checkpoint_of_another_step_is_not_resumed(run, capsys):
    (run / "checkpoint-000002").rename(run / "checkpoint-000001")
    (run / "latest").write_text("checkpoint-000001\n")
    line = refused(capsys, "--resume", "--steps", 3, "--output", run)
    assert f"expected the state of the step that {run}/checkpoint-000001 is named by, got that of 2" in line


def test_a_checkpoint_of_another_run_is_not_resumed(ended, run, tmp_path, capsys):
    words = [*began_from(ended), "--steps", 2, "--lr", 0.5, *SMALL]
    assert opd(*words, "--output", tmp_path / "other") == 0
    shutil.rmtree(run / "checkpoint-000002")
    shutil.copytree(tmp_path / "other/checkpoint-000002", run / "checkpoint-000002")
    assert "which began with lr 0.5, not 0.001" in refused(capsys, "--resume", "--steps", 3, "--output", run)
    edit(run / "run.json", lambda settings: settings.update(lr=0.5, seed=3))
    assert "which began with seed 0, not 3" in refused(capsys, "--resume", "--steps", 3, "--output", run)


def test_a_run_is_not_resumed_to_an_earlier_step(run, capsys):
    line = refused(capsys, "--resume", "--steps", 1, "--output", run)
    assert "argument --steps: expected at least the 2 that the run has taken, got 1" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(*fields: str) -> Callable[[Path], None]:
    """The optimizer's file without these of the first weight's moments."""

    def change(path: Path) -> None:
        moments = load_file(path)
        first = next(iter(moments)).rpartition(".")[0]
        save_file({key: x for key, x in moments.items() if key not in {f"{first}.{field}" for field in fields}}, path)

    return change


def of_other_shape(path: Path) -> None:
    save_file({key: x.flatten() for key, x in load_file(path).items()}, path)


def of_other_weights(path: Path) -> None:
    save_file({f"other.{key}": x for key, x in load_file(path).items()}, path)


OPTIMIZERS = {
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "of another kind": lambda path: path.write_text("{}"),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without a moment": without("exp_avg_sq"),
    "without a step": without("step"),
    "without all of a weight": without("step", "exp_avg", "exp_avg_sq"),
    "without any": lambda path: save_file({}, path),
    "of another shape": of_other_shape,
    "of other weights": of_other_weights,
}
NOT_SEEN_INSIDE = {"truncated", "gone", "a folder", "without all of a weight"}  # but by its sum; a weight may be unused


@pytest.mark.parametrize("damage", OPTIMIZERS)
@pytest.mark.parametrize("summed", [False, True], ids=["as found", "with a sum that fits"])
def test_an_incomplete_or_foreign_state_of_the_optimizer_is_not_resumed(damage, summed, run, capsys):
    path = run / "checkpoint-000002" / checkpoint.OPTIMIZER
    OPTIMIZERS[damage](path)
    if summed:
        if damage in NOT_SEEN_INSIDE - {"truncated"}:
            pytest.skip("has no sum that fits")
        edit(path.with_name("state.json"), lambda state: state["files"].update({path.name: disk.sha256_of(path)}))
    line = refused(capsys, "--resume", "--steps", 3, "--quiet", "--output", run)
    assert str(path if not summed else path.parent) in line and "argument --resume: expected " in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_weights_of_a_checkpoint_that_are_not_the_runs_are_not_resumed(name, run, capsys):
    """They are an ordinary student's, of the same shapes."""
    path = run / "checkpoint-000002" / name
    path.write_bytes((PACKAGED / "student" / name).read_bytes() + b"\n" * name.endswith("json"))
    assert f"expected {path} as the run wrote it" in refused(capsys, "--resume", "--steps", 3, "--output", run)


def test_a_file_that_came_to_a_checkpoint_later_is_not_resumed(run, capsys):
    path = run / "checkpoint-000002" / "adapter_config.json"
    path.write_text("{}")
    assert f"expected {path} as the run wrote it" in refused(capsys, "--resume", "--steps", 3, "--output", run)


TEXTS = {
    "empty": b"",
    "truncated": b'{"step": 2, "ski',
    "no JSON": b"hello\n",
    "no text": b"\xff\xfe\x00",
    "a list": b"[2]",
    "a number": b"2",
    "NaN": b'{"step": NaN}',
    "infinity": b'{"step": 1e999}',
    "nested": b'{"step": ' + b"[" * 100_000,
    "no step": b"{}",
    "a step of text": b'{"step": "2"}',
    "a negative step": b'{"step": -2}',
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["checkpoint-000002/state.json", "run.json", "latest", "log.jsonl"])
def test_a_truncated_or_foreign_file_of_a_run_is_one_line_that_names_it(name, text, run, capsys):
    if name == "run.json" and text == "no step":
        pytest.skip("an earlier version's settings")
    (run / name).write_bytes(TEXTS[text])
    line = refused(capsys, "--resume", "--steps", 3, "--quiet", "--output", run)
    assert "argument --resume: expected " in line and str(run / (name if name != "latest" else "")) in line


STATES = {
    "another counter": lambda state: state.update(mood=1),
    "a counter of text": lambda state: state.update(rows="many"),
    "a counter of truth": lambda state: state.update(kept=True),
    "a share for a counter": lambda state: state.update(skipped=0.5),
    "no sums": lambda state: state.pop("files"),
    "no origin": lambda state: state.pop("origin"),
    "an origin of text": lambda state: state.update(origin="here"),
    "an origin without sums": lambda state: state["origin"].pop("sha256"),
    "sums of nothing": lambda state: state["files"].clear(),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_of_another_make_is_not_resumed(damage, run, capsys):
    edit(run / "checkpoint-000002/state.json", STATES[damage])
    assert f"expected {'the state' if 'of nothing' not in damage else run}" in refused(
        capsys, "--resume", "--output", run
    )


def test_a_state_of_adakd_is_whole(tmp_path, capsys):
    run = tmp_path / "run"
    assert opd("--steps", 1, "--preset", "adakd", *SMALL, "--output", run) == 0
    for focus in (None, {}, {"keep": "most", "average": 0, "anchor": 0, "seen": 1}, {"keep": 1.0}):
        edit(run / "checkpoint-000001/state.json", lambda state, focus=focus: state.update(focus=focus))
        assert "argument --resume: expected the state of " in refused(capsys, "--resume", "--steps", 2, "--output", run)


SETTINGS = {
    "another setting": {"mood": "good"},
    "a rule of none": {"rule": "best"},
    "a batch of none": {"batch": 0},
    "a batch of nothing": {"batch": None},
    "a batch of text": {"batch": "4"},
    "a task of many": {"task": ["a", "b"]},
    "a rate of truth": {"lr": True},
    "a rate of text": {"lr": "fast"},
    "chat of one": {"chat": 1},
}


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_that_no_option_gives_are_not_resumed(change, run, capsys):
    edit(run / "run.json", lambda settings: settings.update(SETTINGS[change]))
    assert f"expected the settings of a run in {run}/run.json" in refused(capsys, "--resume", "--output", run)


LOGS = {
    "without the last row": lambda lines: lines[:-1],
    "without a row between": lambda lines: lines[:1] + lines[2:],
    "with the last row cut short": lambda lines: [*lines[:-1], lines[-1][:9]],
    "with a row twice": lambda lines: lines[:2] + lines[1:],
    "without any": lambda lines: [],
}


@pytest.mark.parametrize("damage", LOGS)
def test_a_log_without_a_row_of_each_step_is_not_resumed(damage, run, capsys):
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(LOGS[damage](lines)))
    before = contents(run)
    line = refused(capsys, "--resume", "--steps", 3, "--output", run)
    assert f"expected a row of each step from 0 to 2 in {run}/log.jsonl" in line and contents(run) == before


def test_what_follows_the_checkpoint_in_a_log_may_be_anything(run):
    kept = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(kept + b'{"step": 3}\n\x00\xff\x00{"st')
    assert opd("--resume", "--steps", 2, "--quiet", "--output", run) == 0
    assert (run / "log.jsonl").read_bytes() == kept


def test_a_run_that_goes_on_loses_the_end_that_it_had(run, monkeypatch):
    """Until it ends anew: run.json would name more steps than the student there has taken."""

    def stopped(loop, after_step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "train", stopped)
    assert (run / "student").is_dir() and (run / "summary.json").is_file()
    assert opd("--resume", "--steps", 4, "--quiet", "--output", run) == 130
    assert not (run / "student").exists() and not (run / "summary.json").exists()


# What is on the disk, and when


@pytest.fixture
def loop() -> Loop:
    models = pair.load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)
    return Loop(Settings(batch=2, lr=1e-2, warmup=0), models, load_task("addition", 1), CPU)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_a_checkpoint_is_on_the_disk_before_it_is_the_newest_and_that_before_the_older_one_goes(
    loop, tmp_path, monkeypatch
):
    calls: list[tuple[str, str]] = []

    def noted(module, name: str, told: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            calls.append((name, told(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    there = lambda path: str(Path(path).relative_to(tmp_path))  # noqa: E731
    (tmp_path / "log.jsonl").write_text("{}\n")
    checkpoint.save(tmp_path, loop)
    loop.counters.step = 1
    noted(os, "fsync", lambda descriptor: there(os.readlink(f"/proc/self/fd/{descriptor}")))
    noted(os, "replace", lambda old, new: f"{there(old)} {there(new)}")
    noted(shutil, "rmtree", lambda path, *_: there(path))
    checkpoint.save(tmp_path, loop)
    moved = calls.index(("replace", "partial checkpoint-000001"))
    files = {f"partial/{path.name}" for path in (tmp_path / "checkpoint-000001").iterdir()}
    place = {" ".join(call): i for i, call in enumerate(calls[:moved])}  # the last of each
    assert {f"fsync {path}" for path in (*files, "partial", "log.jsonl")} <= place.keys()
    assert place["fsync partial"] > max(place[f"fsync {path}"] for path in files)
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= {Path(path).name for path in files}
    assert calls[moved + 1 :] == [
        ("fsync", "."),
        ("fsync", "latest.partial"),
        ("replace", "latest.partial latest"),
        ("fsync", "."),
        ("rmtree", "checkpoint-000000"),
    ]


def test_the_student_at_the_end_is_whole_or_not_there(loop, tmp_path, monkeypatch):
    checkpoint.finish(tmp_path, loop)
    before = contents(tmp_path)
    monkeypatch.setattr(type(loop.pair.tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(checkpoint.UsageError):
        checkpoint.finish(tmp_path, loop)
    assert contents(tmp_path) == before


# Disks that are full, folders that may not be written to


@pytest.fixture
def limited(monkeypatch):
    """No file grows beyond so many bytes: the error of a full disk, where a test may not make one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 300, 3_000, 100_000, 600_000])
def test_a_disk_that_is_full_is_one_line_and_the_last_checkpoint_stays(size, limited, ended, run, tmp_path, capsys):
    """The settings, the log, the tokenizer, the student or the optimizer do not fit."""
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for words, folder in (
        (["--resume", "--steps", 4, "--quiet"], run),
        ([*began_from(ended), *SMALL], tmp_path / "new"),
    ):
        limited(size)
        line = refused(capsys, *words, "--output", folder)
        limited(soft)
        assert "argument --output: expected files that can be written, got " in line and str(folder) in line
        assert not (folder / "partial").exists()
    assert opd("--resume", "--steps", 4, "--quiet", "--output", run) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("name", ["log.jsonl", "run.json.partial", "latest.partial"])
def test_a_write_that_fails_late_is_one_line_too(name, run, capsys):
    """What is buffered fails when the file is closed, and that error has no file's name."""
    kept = (run / name).read_bytes() if (run / name).is_file() else b""
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/dev/full")
    if name == "log.jsonl":
        with pytest.raises(checkpoint.UsageError, match="No space left on device"):
            checkpoint.append_row(run, {"step": 3})
        (run / name).unlink()
        (run / name).write_bytes(kept)
    else:
        assert "No space left on device" in refused(capsys, "--resume", "--steps", 4, "--quiet", "--output", run)


def in_a_namespace(script: str) -> subprocess.CompletedProcess:
    """A script that may mount; skips where the system lets nobody but root."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    done = subprocess.run([unshare, "-rm", "sh", "-ec", script], capture_output=True, text=True, timeout=300)
    if "mount:" in done.stderr:
        pytest.skip(done.stderr)
    return done


def test_a_read_only_folder_is_one_line(run, tmp_path):
    new, page = tmp_path / "new", ["--quiet", "--prompts", "1"]
    commands = [
        ["opd", "--resume", "--steps", "3", "--quiet", "--output", str(run)],
        ["opd", "--overwrite", "--steps", "3", "--quiet", "--output", str(run)],
        ["opd", "--steps", "3", "--quiet", "--output", str(new)],
        ["opd", "--retrain", "--quiet", "--output", str(new)],
        ["inspect", str(run), *page],
        ["inspect", str(run), *page, "--output", "/dev/null", "--save", str(run / "x.safetensors")],
        ["compare", str(run), "--quiet", "--output", str(run / "x.html")],
    ]
    script = f"from tip_kernels.__main__ import main; print([main(words) for words in {commands!r}])"
    (tmp_path / "script.py").write_text(script)
    read_only = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,bind,ro {tmp_path}"
    done = in_a_namespace(f"{read_only}; PYTHONPATH={os.getcwd()} {sys.executable} {tmp_path}/script.py")
    assert done.stdout == f"{[2] * 7}\n", done
    lines = done.stderr.splitlines()
    assert len(lines) == 7 and all("Read-only file system" in line and str(tmp_path) in line for line in lines), lines


# Checkpoints that are not what they seem


def broken_weight(path: Path, value: float) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, path, metadata={"format": "pt"})


def sharded(folder: Path, place: object) -> None:
    """The weights behind a map that says where the last one is."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    places = dict.fromkeys(names, "model-1.safetensors") | {names[-1]: place}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda content: content.update(changes))


def as_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def outside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    sharded(folder, "../outside.safetensors")


FINITE, WITHIN, SHAPE = "finite weights in {}", "weight files within {}", "as config.json in {} says"
FOLDERS = {
    "a weight of NaN": (lambda f: broken_weight(f / "model.safetensors", float("nan")), FINITE),
    "an infinite weight": (lambda f: broken_weight(f / "model.safetensors", float("inf")), FINITE),
    "weights outside": (outside, WITHIN),
    "weights at the root": (lambda f: sharded(f, str(PACKAGED / "student/model.safetensors")), WITHIN),
    "weights above, as Windows has it": (lambda f: sharded(f, "..\\outside.safetensors"), WITHIN),
    "weights on a drive": (lambda f: sharded(f, "C:outside.safetensors"), WITHIN),
    "weights outside by the config": (config(transformers_weights="../x.safetensors"), WITHIN),
    "a shard that is not there": (lambda f: sharded(f, "model-2.safetensors"), "got no weights in safetensors"),
    "a place that is no name": (lambda f: sharded(f, 3), "a weight_map of file names in {}"),
    "a wider model": (config(hidden_size=256), SHAPE),
    "a larger vocabulary": (config(vocab_size=10**5), SHAPE),
    "a narrower MLP": (config(intermediate_size=100), SHAPE),
    "a layer more": (config(num_hidden_layers=3), "every weight in {}, got none for model.layers.2"),
    "a layer less": (config(num_hidden_layers=1), "no more layers than config.json in {} says, got model.layers.1"),
    "a thousand layers": (config(num_hidden_layers=1000), "num_hidden_layers that the weights in {} have"),
    "a million labels": (config(num_labels=10**6), "num_labels that the weights in {} have"),
    "truncated weights": (lambda f: cut(f / "model.safetensors"), "a causal language model in {}"),
    "weights of integers": (as_integers, "lm_head.weight in {} as floating-point numbers, got I8"),
    "a truncated config": (lambda f: cut(f / "config.json"), "a JSON object in {}"),
    "a truncated way to end": (lambda f: cut(f / "generation_config.json"), "a JSON object in {}"),
    "a truncated tokenizer": (lambda f: cut(f / "tokenizer.json"), "a causal language model in {}"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "a whole model in {}, got an adapter"),
    "an end of text": (
        lambda f: edit(f / "generation_config.json", lambda c: c.update(eos_token_id="$")),
        "eos_token_id",
    ),
}


SEEN_WHEN_READ = {"a weight of NaN", "an infinite weight", "a layer less", "a truncated tokenizer", "an end of text"}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_folder_that_is_not_the_model_that_it_says_is_one_line_that_names_it(damage, tmp_path, capsys, monkeypatch):
    """Before any of its weights is read, where headers tell."""
    folder, read = tmp_path / "student", pair.AutoModelForCausalLM.from_pretrained
    shutil.copytree(PACKAGED / "student", folder)
    change, message = FOLDERS[damage]
    change(folder)
    asked: list[Path] = []
    noted = lambda source, **options: (asked.append(source), read(source, **options))[1]  # noqa: E731
    monkeypatch.setattr(pair.AutoModelForCausalLM, "from_pretrained", noted)
    line = refused(capsys, "--student", folder, *SMALL, "--output", tmp_path / "run")
    assert "argument --student: expected " in line and message.format(folder) in line, line
    assert not (tmp_path / "run").exists() and (damage in SEEN_WHEN_READ or folder not in asked)


def test_a_model_in_shards_of_its_folder_is_read_as_one_in_a_file(tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(PACKAGED / "student", folder)
    weights = load_file(folder / "model.safetensors")
    parts = {f"model-{i}.safetensors": list(weights)[i::2] for i in (0, 1)}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    places = {key: name for name, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = pair.load_pair(PACKAGED / "teacher", folder, CPU).student.model.state_dict()
    assert all(torch.equal(read[key], weight.float()) for key, weight in weights.items())
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(none="model-1.safetensors"))
    with pytest.raises(checkpoint.UsageError, match=f"expected none in {folder}/model-1.safetensors"):
        pair.load_pair(PACKAGED / "teacher", folder, CPU)


def test_of_a_resumed_run_the_folder_named_is_the_checkpoints(run, ended):
    broken_weight(run / "checkpoint-000002/model.safetensors", float("nan"))
    with pytest.raises(checkpoint.UsageError, match=rf"argument --resume: .* in {run}/checkpoint-000002, got NaN"):
        pair.load_pair(ended / "teacher", ended / "student", CPU, run / "checkpoint-000002")


def test_a_missing_folder_of_a_run_that_is_inspected_is_named(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoint-000002")
    assert f"argument FILE: expected a run with a checkpoint, got '{run}'" in refused(capsys, run, name="inspect")


# Models that give no numbers


def overflowing(folder: Path, role: str) -> Path:
    """Finite weights of a model whose hidden states are not."""
    shutil.copytree(PACKAGED / role, folder / role)
    weights = {name: x.float() for name, x in load_file(folder / role / "model.safetensors").items()}
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / role / "model.safetensors", metadata={"format": "pt"})
    return folder / role


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_of_nan_ends_with_an_error_that_names_it(role, tmp_path, capsys):
    folder = overflowing(tmp_path, role)
    line = refused(capsys, f"--{role}", folder, *SMALL, "--output", tmp_path / "run")
    assert f"argument --{role}: expected a model of finite logits, got NaN after 0 steps\n" in line
    assert not (tmp_path / "run/student").exists() and not (tmp_path / "run/latest").exists()


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_teacher_of_nan_for_one_token_ends_a_run_at_that_token(micro_batch, loop, monkeypatch):
    teacher, loop.settings = loop.teacher, replace(loop.settings, micro_batch=micro_batch)

    def broken(rollouts):
        head = teacher(rollouts)
        head.hidden[0, 3] = float("nan")
        return head

    monkeypatch.setattr(loop, "teacher", broken)
    before = [weight.clone() for weight in loop.weights]
    with pytest.raises(checkpoint.UsageError, match="argument --teacher: expected a model of finite logits, got NaN"):
        loop.step()
    assert all(torch.equal(one, other) for one, other in zip(before, loop.weights, strict=True))


def test_a_student_that_diverges_ends_the_run_with_an_error_and_keeps_its_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    line = refused(capsys, "--lr", 1e30, "--warmup", 0, "--steps", 6, *SMALL, "--output", run)
    assert "argument --student (not given): expected a model of finite logits, got NaN after 1 steps" in line
    assert "(a smaller --lr?)" in line
    assert checkpoint.latest(run).name == "checkpoint-000000" and not (run / "student").exists()


# Readers


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["run.json", "log.jsonl"])
def test_a_truncated_or_foreign_run_is_not_compared(name, text, run, tmp_path, capsys):
    if name == "run.json" and text in ("no step", "a step of text", "a negative step"):
        pytest.skip("settings that a run may have")
    (run / name).write_bytes(TEXTS[text])
    line = refused(capsys, run, "--output", tmp_path / "page.html", name="compare")
    assert "argument RUN: expected " in line and str(run) in line
    assert not (tmp_path / "page.html").exists()


def test_runs_with_nothing_to_draw_are_not_compared(run, tmp_path, capsys):
    (run / "log.jsonl").write_text('{"step": 0}\n')
    line = refused(capsys, run, "--output", tmp_path / "page.html", name="compare")
    assert "argument RUN: expected runs with a value to draw in their logs, got run\n" in line


ROWS = {
    "accuracy": "high",
    "loss": [1],
    "eval_kl": {},
    "kept": None,
    "rows": "4",
    "seconds": True,
    "q3": "all",
    "kept_mass": 10**400,
    "entropy_histogram": {"top": 1},
}


@pytest.mark.parametrize("column", ROWS)
def test_a_log_of_other_values_is_not_compared(column, run, tmp_path, capsys):
    rows = (run / "log.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | {column: ROWS[column]})
    (run / "log.jsonl").write_text("\n".join(rows) + "\n")
    line = refused(capsys, run, "--output", tmp_path / "page.html", name="compare")
    assert f"argument RUN: expected a row of a run in {run}/log.jsonl, line 2, got: " in line


def table() -> TokenTable:
    statistics = {"entropy_s": torch.tensor([0.5, 0.1]), "kl_rev": torch.tensor([0.2, 0.0])}
    return TokenTable(torch.tensor([0, 1]), ["a", "b"], statistics, rollouts=[{"prompt": "p", "right": True}, {}])


TABLES = {
    "text of numbers": lambda t: setattr(t, "text", [1, 2]),
    "text of nothing": lambda t: setattr(t, "text", None),
    "rollouts of text": lambda t: setattr(t, "rollouts", ["a", "b"]),
    "a prompt of NaN": lambda t: t.rollouts[0].update(prompt=float("nan")),
    "a verdict of text": lambda t: t.rollouts[0].update(right="yes"),
    "a fact of no name": lambda t: t.rollouts[0].update(mood="good"),
    "about a list": lambda t: setattr(t, "about", ["a"]),
    "strings of numbers": lambda t: setattr(t, "strings", [1]),
    "a statistic of tables": lambda t: t.statistics.update(kl_rev=torch.zeros(2, 2)),
    "rollouts of tables": lambda t: setattr(t, "rollout", torch.zeros(2, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("damage", TABLES)
def test_a_table_of_another_make_is_one_line_that_names_its_file(damage, tmp_path, capsys):
    content, path = table(), tmp_path / "t.safetensors"
    TABLES[damage](content)
    content.save(path)
    line = refused(capsys, path, "--output", tmp_path / "page.html", name="inspect")
    assert "argument FILE: " in line and str(path) in line and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "columns",
    [
        {"rollout": [[1], [2]], "text": ["a", "b"], "entropy_s": [0.1, 0.2]},
        {"rollout": [0, 1], "text": [1, 2], "entropy_s": [0.1, 0.2]},
        {"rollout": [0, 1], "text": ["a", "b"], "entropy_s": [0.1, 0.2], "prompt": [1, 2]},
        {"rollout": [0, 1], "text": ["a", "b"], "entropy_s": [0.1, 0.2], "top_s": ["a", "b"], "top_s_p": [0.1, 0.2]},
    ],
)
def test_a_parquet_file_of_other_columns_is_one_line_that_names_it(columns, tmp_path, capsys):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table(columns), path)
    line = refused(capsys, path, "--output", tmp_path / "page.html", name="inspect")
    assert "argument FILE: " in line and str(path) in line


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_a_truncated_file_of_statistics_is_one_line_that_names_it(suffix, tmp_path, capsys):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"t{suffix}"
    table().save(path)
    cut(path)
    line = refused(capsys, path, "--output", tmp_path / "page.html", name="inspect")
    assert "argument FILE: " in line and str(path) in line


def test_an_error_of_a_file_that_no_one_looked_at_is_one_line(monkeypatch, capsys):
    def broken(*_):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(cli, "run", broken)
    assert "expected files that can be used, got [Errno 13] Permission denied: 'somewhere'" in refused(capsys)
