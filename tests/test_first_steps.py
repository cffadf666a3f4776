"""What somebody meets who has never used the package: help texts, hints, warnings, and errors about what was typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tip_kernels as tip
from tip_kernels.__main__ import main
from tip_kernels.distillation import registry
from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd.options import parser

ROOT = Path(__file__).parent.parent


def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_the_help_of_opd_names_every_rule_with_its_class():
    text = help_of("tip_kernels", "opd")
    for name, kind in registry.CLASSES.items():
        assert f"{name} ({kind})" in text
        assert type(registry.RULES[name](0.5, None)) is getattr(tip, re.split(r"[ ,]", kind)[0])
    assert registry.CLASSES.keys() == registry.RULES.keys()
    assert "--overwrite" in text and "1.0 is every token" in text


def test_the_help_of_the_benches_exits_with_0():
    assert "bench/README.md" in help_of("bench")


@pytest.mark.parametrize("extra", ["opd", "tasks", "smollm2"])
def test_the_hint_for_an_extra_installs_from_the_checkout_and_the_extra_exists(extra):
    project = (ROOT / "pyproject.toml").read_text()
    assert f'-e ".[{extra}]"' in install(extra) and re.search(rf"^{extra} = \[", project, re.M)


def test_no_text_installs_the_package_by_name():
    texts = [*(ROOT / "tip_kernels").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert not [path for path in texts if re.search(r"pip install [\"']?tip-kernels", path.read_text())]


@pytest.mark.parametrize(("keep", "warned"), [("1", True), ("1.0", False), ("2", False), ("0.5", False)])
def test_one_token_a_rollout_is_warned_of(keep, warned, tmp_path, capsys):
    command = ["opd", "--keep", keep, "--output", str(tmp_path / "run"), "--teacher", str(tmp_path / "none"), "--quiet"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert ("warning: --keep 1 keeps one token of each rollout; --keep 1.0 keeps every token" in err) is warned


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out_and_not_as_what_was_typed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "opd"
    run.mkdir(parents=True)
    (run / "something").touch()
    assert main(["opd"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tip-kernels opd: error: argument --output (not given): expected a new or empty folder")
    assert all(way in err for way in ("--resume", "--overwrite", "another --output")) and err.count("\n") == 1
    assert main(["opd", "--output", str(run)]) == 2
    assert "argument --output: expected a new or empty folder" in capsys.readouterr().err


def test_an_error_says_of_an_option_whether_it_was_typed():
    error = UsageError("argument --max-new-tokens: expected less, got 'a: b'")
    assert error.beside({"max_new_tokens": 3}) == error.beside(None) == str(error)
    assert error.beside({}) == "argument --max-new-tokens (not given): expected less, got 'a: b'"
    for other in ("argument FILE: expected a run, got --x: y", "needs rich: pip"):
        assert UsageError(other).beside({}) == other


@pytest.mark.parametrize("option", ["--teacher", "--student"])
def test_the_name_of_a_hub_s_model_is_refused_with_the_way_out(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["opd", option, "Qwen/Qwen3-0.6B", "--output", "run"]) == 2
    err = capsys.readouterr().err
    assert f"argument {option}: expected the folder of a checkpoint" in err
    assert "hf download Qwen/Qwen3-0.6B --local-dir FOLDER" in err and err.count("\n") == 1
    assert main(["opd", option, "nowhere", "--output", "run"]) == 2
    assert "hf download" not in capsys.readouterr().err


def test_commands_are_silent_about_a_numpy_that_is_not_installed(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    command = ["plan", "--tokens", "64", "--vocab", "100", "--hidden-s", "8", "--hidden-t", "8", "--gpu", "h100"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    found = {}
    for way in ("tip_kernels", "torch"):
        run = ["-m", "tip_kernels", *command] if way == "tip_kernels" else ["-c", "import torch; torch.zeros(1)"]
        done = subprocess.run([sys.executable, *run], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[way] = "NumPy" in done.stderr
    assert found == {"tip_kernels": False, "torch": True}


def test_a_run_without_a_right_answer_points_at_the_kl(capsys):
    pytest.importorskip("rich")
    from tip_kernels.opd.report import print_table

    result = {
        "start_accuracy": 0.0, "end_accuracy": 0.0, "start_accuracy_se": 0.0, "end_accuracy_se": 0.0,
        "start_kl": 0.6, "end_kl": 0.5, "skipped_steps": 0, "steps": 5,
        "rule": "soft_or", "kept_share": 0.2, "seconds": 180.0, "peak_mib": 2861.4, "output": "runs/opd",
    }  # fmt: skip
    print_table(result, "chain_sum", 8, "")
    out = capsys.readouterr().out
    assert "no answer was right, before or after: the KL is the figure to look at" in out
    assert "peak memory of the process 2,861 MiB" in out
    print_table(result | {"end_accuracy": 0.5}, "chain_sum", 8, "")
    assert "no answer was right" not in capsys.readouterr().out


def test_the_parser_reads_keep_as_a_share_or_a_number():
    kept = [parser().parse_args(["--keep", text]).keep for text in ("1", "1.0", "0.2")]
    assert kept == [1, 1.0, 0.2] and [type(value) for value in kept] == [int, float, float]
