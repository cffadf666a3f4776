from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import _gpu_rows, _peers, _small, gpu, step
from bench._meter import peak_above_mib

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT)


EVERY_ROW = (*gpu.TARGETS, "tune fold_kernel", "tune grad_kernel")
FIRST_ROWS = (_gpu_rows.LOGITS, _gpu_rows.HIDDEN, _gpu_rows.KEEP_FEW, _gpu_rows.KEEP_ALL, _gpu_rows.MEMORY)


@pytest.mark.parametrize(("options", "rows"), [([], EVERY_ROW), (["--first"], FIRST_ROWS)], ids=["all", "first"])
def test_dry_run_goes_through_every_row_and_leaves_no_result(options, rows):
    before = sorted((file, file.stat().st_mtime_ns) for file in gpu.RESULTS.iterdir())
    run = bench("gpu", "--dry-run", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted((file, file.stat().st_mtime_ns) for file in gpu.RESULTS.iterdir()) == before
    assert run.stdout.startswith("dry run")
    assert [row for row in EVERY_ROW if f"\n{row}  " in run.stdout or f"\n{row}\n" in run.stdout] == list(rows)
    assert "every kernel on small shapes: passed" in run.stdout
    for row in rows:
        table = run.stdout.split(f"\n{row}", 1)[1].split("\n", 2)[2]
        ours = table.split("\n", 1)[0].split()
        assert ours[-5:-1] == ["-"] * 4, ours  # no time, ratio, share or memory
        assert float(ours[-1]) <= _gpu_rows.OURS


def test_gpu_bench_without_a_gpu_says_so_in_one_line():
    run = bench("gpu", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stdout == ""
    assert re.fullmatch(r"python -m bench gpu: no GPU found[^\n]*\n", run.stderr), run.stderr


def test_bench_lists_its_commands():
    run = bench()
    assert run.returncode == 2
    for name in ("compile", "gpu", "memory", "step"):
        assert name in run.stderr
    assert "_" not in run.stderr.split("{")[1].split("}")[0]


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_peak_is_the_highest_point_above_the_start(device):
    def mib(count: int) -> torch.Tensor:
        return torch.empty(count * 2**20, dtype=torch.int8, device=device)

    def run() -> torch.Tensor:
        first, second = mib(4), mib(8)
        del first
        third = mib(3)
        del second, third
        return mib(2)

    held = mib(16)
    assert peak_above_mib(run, device) == pytest.approx(12, abs=0.01)
    del held


def racer(emit: list[dict]) -> _gpu_rows.Stage:
    return _gpu_rows.Stage(_gpu_rows.DRY, "cpu", True, {"copy": 1e9}, emit.append)


def test_only_a_right_result_gets_a_time():
    def missing() -> None:
        raise ImportError("No module named 'peer'")

    def broken() -> None:
        raise RuntimeError("two\nlines")

    def large() -> None:
        raise torch.OutOfMemoryError

    rows: list[dict] = []
    right, wrong, nan = (lambda error=error: lambda: error for error in (0.001, 0.5, float("nan")))
    makers = {"right": right, "wrong": wrong, "nan": nan, "missing": missing, "broken": lambda: broken}
    makers["large"] = lambda: large
    contenders = [_gpu_rows.Contender(name, make, lambda error: error, work=1e6) for name, make in makers.items()]
    racer(rows).race("a row", contenders, ceiling="copy")
    found = {row["who"]: row for row in rows}
    assert found["right"]["share_pct"] == pytest.approx(100 * 1e6 / (found["right"]["time_ms"] * 1e-3) / 1e9)
    assert {name: row["note"] for name, row in found.items() if name != "right"} == {
        "wrong": "wrong",
        "nan": "wrong",
        "missing": "not installed: No module named 'peer'",
        "broken": "failed: RuntimeError: two",
        "large": "out of memory",
    }
    assert not [row for row in rows if "time_ms" in row and row["who"] != "right"]


def test_a_wrong_step_is_found():
    p = _peers.Problem.random(12, 16, 40)
    truth = _gpu_rows.StepTruth(p)

    def error(keep: float = 1.0, loss_factor: float = 1.0, hidden: float = 1.0, weight: float = 1.0) -> float:
        p.clear()
        loss = _peers.dense(p) * loss_factor
        p.hidden_s.grad *= hidden
        p.weight_s.grad *= weight
        return truth.error(p, loss, keep)

    assert error() < 1e-5
    for fault in ({"loss_factor": 1.1}, {"hidden": 0.9}, {"weight": 1.1}):
        assert error(**fault) == pytest.approx(0.1, abs=1e-3), fault
    assert error(weight=0.0) == pytest.approx(1.0)
    assert error(hidden=0.0) == error(keep=0.5) == float("inf")


def test_wrong_statistics_are_found():
    z_s, z_t = torch.randn(8, 30), torch.randn(8, 30)
    right = _gpu_rows.truth_of_logits(z_s, z_t)
    stats = _peers.dense_stats(z_s, z_t)
    assert right(stats) < 1e-5
    for name in stats:
        assert right(stats | {name: stats[name] * 1.1}) > 0.02, name
        assert right(stats | {name: torch.full_like(stats[name], torch.nan)}) == float("inf"), name


def test_every_kernel_goes_through_the_sanitizers():
    source = "\n".join(file.read_text() for file in (ROOT / "tip_kernels" / "backends" / "triton").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    assert kernels
    assert kernels <= {name for case in _small.cases() for name in case.split(":")[0].split()}


@pytest.mark.parametrize("name", _small.cases())
def test_the_self_test_of_a_gpu_finds_every_kernel_right(name):
    """Interpreted here, or as it is compiled: `python -m tests.ptx` runs it, too."""
    case = _small.cases(dry_run=DEVICE == "cpu")[name]
    assert case(lambda x: x.to(DEVICE), _small.VOCABS_DRY[0]) <= _small.TOLERANCE


def test_a_stage_is_stopped_at_its_time_limit():
    ran = gpu.child([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], 1.5, os.environ)
    assert ran.code is None
    assert not ran.ok
    assert ran.output == "begun"
    assert ran.seconds < 10


def test_ratios_are_to_the_first_of_ours_in_the_row():
    rows = [
        {"row": "a", "who": "TRL", "time_ms": 6.0},
        {"row": "a", "who": "ours", "time_ms": 2.0},
        {"row": "a", "who": "ours, other", "time_ms": 1.0},
        {"row": "a", "who": "Liger", "note": "wrong"},
        {"row": "b", "who": "TRL", "time_ms": 1.0},
    ]
    ratios = [row.get("x_ours") for row in gpu.with_ratios(rows)]
    assert ratios == [3.0, 1.0, 0.5, None, None]


class FakeGpu:
    """Stands in for the children of a run on a GPU; commands with a word of `failing` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: Path, failing: tuple[str, ...] = ()) -> None:
        self.failing, self.commands, self.output = failing, [], "output"
        self.who = {"who": "ours", "time_ms": 1.0, "share_pct": 91.0, "ceiling": "copy", "error": 1e-6}
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "RESULTS", results)
        monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}" if "/" not in name else None)
        monkeypatch.setattr(gpu, "child", self.child)

    def child(self, command: list[object], seconds: float, environment: dict[str, str]) -> gpu.Ran:
        assert "TRITON_INTERPRET" not in environment
        words = [str(word) for word in command]
        self.commands.append(words)
        if "--out" in words:
            lines: list[dict] = [{"about": {"device": "NVIDIA H200", "torch": "2"}}]
            if "ceilings" in words:
                lines.append({"ceilings": {"copy": 4e12, "matmul": 7e14}})
            else:
                assert json.loads(words[words.index("--ceilings") + 1]) == {"copy": 4e12, "matmul": 7e14}
                lines.append({"row": next(row for row in gpu.TARGETS if "logits" in row), **self.who})
            Path(words[words.index("--out") + 1]).write_text("\n".join(map(json.dumps, lines)))
        failed = any(word in self.failing for word in words)
        return gpu.Ran(9 if failed else 0, self.output, 1.0)


def test_a_whole_run_is_written_by_device(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch, tmp_path)
    assert gpu.main([]) == 0
    report = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert report["device"] == "NVIDIA H200"
    assert report["rows"][0]["share_pct"] == 91.0
    assert report["sanitizer"]["present"]
    assert "91.0 % copy" in capsys.readouterr().out
    checks = {words[words.index("--tool") + 1] for words in fake.commands if "--tool" in words}
    assert checks == {"memcheck", "racecheck"}
    assert not any("tune" in words for words in fake.commands)


def test_calls_of_at_most_five_minutes_make_a_whole_run():
    assert all(sum(map(gpu.SECONDS.get, stages)) <= 300 for stages in gpu.CALLS.values())
    assert {stage for stages in gpu.CALLS.values() for stage in stages} == {*gpu.SECONDS}
    for options, stages in gpu.CALLS.items():
        words = options.split()
        args = SimpleNamespace(first="--first" in words, only=words[1:], tune=False, dry_run=False)
        assert gpu.chosen(args) == list(stages)


def test_calls_add_to_one_file_where_a_row_is_of_one_run(monkeypatch, tmp_path):
    fake = FakeGpu(monkeypatch, tmp_path)
    assert gpu.main(["--first"]) == 0
    timed = [words for words in fake.commands if "--out" in words]
    assert [words[3] for words in timed] == ["ceilings", "logits", "hidden", "distill", "memory"]
    assert all("--first" in words for words in timed) and fake.commands[0][2] == "bench._small"
    assert gpu.main(["--only", "tests"]) == 0
    fake.who = {"who": "ours, later", "time_ms": 2.0}
    assert gpu.main(["--only", "logits", "--json", str(tmp_path / "part.json")]) == 0
    report = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert {*report["stages"]} == {*gpu.FIRST, "tests"} and report["tests"]["ok"] and report["selftest"]["ok"]
    assert [row["who"] for row in report["rows"]] == ["ours, later"]
    assert {*json.loads((tmp_path / "part.json").read_text())["stages"]} == {"ceilings", "logits"}


def test_a_stage_that_failed_and_then_passed_is_not_said_to_fail(monkeypatch, tmp_path):
    FakeGpu(monkeypatch, tmp_path, failing=("hidden", "memory"))
    assert gpu.main(["--first"]) == 1
    FakeGpu(monkeypatch, tmp_path)
    assert gpu.main(["--only", "hidden"]) == 0
    assert json.loads((tmp_path / "nvidia-h200.json").read_text())["failed"] == ["memory: failed (9), 1 s"]


def test_one_failed_test_does_not_hide_the_rest(monkeypatch, tmp_path):
    fake = FakeGpu(monkeypatch, tmp_path, failing=("pytest",))
    fake.output = "tests/test_a.py::one PASSED\nFAILED tests/test_a.py::two - assert 0\nFAILED tests/test_b.py::three"
    assert gpu.main(["--only", "tests"]) == 1
    assert "-x" not in fake.commands[0]
    report = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert report["tests"]["failed"] == ["tests/test_a.py::two", "tests/test_b.py::three"]


@pytest.mark.parametrize("failing", ["racecheck", "pytest", "hidden"])
def test_a_failure_is_reported_and_the_next_stage_runs(monkeypatch, tmp_path, capsys, failing):
    fake = FakeGpu(monkeypatch, tmp_path, failing=(failing,))
    assert gpu.main([]) == 1
    assert "update" in fake.commands[-1]
    assert "FAILED: " in capsys.readouterr().out


def test_the_tables_of_the_readmes_are_those_of_the_results():
    run = bench("tables", "--check")
    assert run.returncode == 0, run.stdout


def test_step_measures_ours_and_holds_it_to_its_targets(tmp_path):
    sizes = ["--tokens", "64", "--hidden", "16", "--vocab", "600", "--repeats", "1"]
    run = bench("step", *sizes, "--only", "ours", "dense eager", "--json", str(tmp_path / "step.json"))
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "step.json").read_text())
    rows = {row["step"]: row for row in found["rows"]}
    assert len(rows) == 8 and all(row["time_ms"] > 0 for row in rows.values())
    assert rows["ours, all tokens"]["loss"] == pytest.approx(rows["dense eager"]["loss"], rel=1e-5)
    assert {"dense eager over ours at 0.2", "worst |planned / measured - 1|"} <= {v["target"] for v in found["targets"]}
    for v in found["targets"]:
        assert v["met"] == (v["value"] <= v["bound"] if v["at_most"] else v["value"] >= v["bound"])


def test_precision_finds_ours_within_its_targets(tmp_path):
    pytest.importorskip("transformers")
    run = bench("precision", "--tokens", "16", "--hidden", "16", "--vocab", "300", "--json", str(tmp_path / "p.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    dense = next(row for row in rows if row["step"] == "dense eager" and row["dtype"] == "bf16")
    assert dense["kl_0.02"] > 1e-2  # what bfloat16 logits cost


def test_scale_fits_an_exponent_for_each_axis(tmp_path):
    run = bench("scale", "--largest", "3", "--repeats", "1", "--json", str(tmp_path / "scale.json"))
    curves = json.loads((tmp_path / "scale.json").read_text())["curves"]
    assert [c["axis"] for c in curves] == ["tokens", "tokens", "vocabulary", "vocabulary"], run.stderr
    assert all(0.3 < c["exponent"] < 2 for c in curves)
    assert all(r["transient_mib"] < 64 + r["per_row_mib"] for c in curves for r in c["rows"])


def test_a_step_is_timed_in_turns_with_another_commits_build(tmp_path, capsys):
    """Here with the last commit's: the same losses and gradients, and no worktree is left behind."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a checkout")
    file = tmp_path / "rows.json"
    sizes = ["--tokens", "24", "--hidden", "8", "--vocab", "300", "--repeats", "2"]
    assert step.main(["--against", "HEAD", *sizes, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == ["Soft-OR 0.2", "entropy 0.2", "all tokens", "0.2 known beforehand"]
    assert all(row["before_ms"] > 0 and row["loss_gap"] < 1e-3 and row["gradient_gap"] < 1e-3 for row in rows)
    assert capsys.readouterr().out.count("\n") == 5
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "/tree " not in listed
