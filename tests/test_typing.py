"""A user's script over every public name runs; pyright (standard), where it is installed, passes it and the package.

Of the package it checks all but the Triton kernels, as pyproject.toml says, which `make types` and nox read, too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tip_kernels as tip

ROOT = Path(__file__).resolve().parents[1]
USER = ROOT / "tests/typing/user.py"
checked = pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")


def pyright(*files: Path) -> subprocess.CompletedProcess:
    """Of the files given, or of those that pyproject.toml names."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_script_uses_every_public_name():
    used = set(re.findall(r"\btip\.(\w+)", USER.read_text()))
    assert not set(tip.__all__) - used


def test_script_runs():
    command = [sys.executable, "-W", "error", str(USER)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr


@checked
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL, which a hook imports, is not installed")
def test_a_checker_passes_the_script_and_what_of_the_package_is_typed():
    ran = pyright()
    assert ran.returncode == 0, ran.stdout


@checked
@pytest.mark.parametrize(
    "line",
    [
        'tip.JSD("half")',
        "tip.token_stats(1)",
        "tip.no_such_name",
        "tip.distill(x, x, select=tip.ReverseKL())",
        "tip.distill(x, x, execution=tip.Execution(sweeps='two'))",
        "tip.token_stats(x, x).kl_rev.no_such_method()",
    ],
)
def test_a_checker_finds_what_is_wrong_in_a_users_line(line, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(f"import sys\nimport torch\nimport tip_kernels as tip\nx = torch.zeros(2, 3)\n{line}\n")
    ran = pyright(file)
    assert "error" in ran.stdout and "wrong.py:5:" in ran.stdout, ran.stdout
