"""What an installation gives: names that load when they are used, commands that answer at once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tip_kernels as tip
from tip_kernels import __main__ as command
from tip_kernels import _versions

ROOT = Path(__file__).parents[1]
COMMANDS = ([], *([name] for name in command.COMMANDS))


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds this checkout's package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True, **options
    )


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "tip-kernels")
def test_help_answers_without_loading_torch(words):
    script = f"""
import sys
from tip_kernels.__main__ import main
try:
    code = main({words!r} + ["--help"])
except SystemExit as exit:
    code = exit.code
assert code == 0
heavy = {{"torch", "triton", "transformers", "numpy", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    assert "usage: tip-kernels" in python("-c", script).stdout


def test_help_of_the_main_job_answers_in_less_than_a_third_of_a_second():
    def seconds() -> float:
        began = time.perf_counter()
        python("-m", "tip_kernels", "opd", "--help")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize(
    "first",
    [
        "import tip_kernels.distillation.distill",
        "from tip_kernels.distillation.distill import Plan",
        "from tip_kernels.hooks.transformers import distill_batch",
        "from tip_kernels import distill",
        "from tip_kernels import *",
        "import tip_kernels",
    ],
)
def test_every_public_name_is_there_whatever_was_imported_first(first):
    script = f"""
{first}
import sys, types
import tip_kernels as tip
for name in tip.__all__:
    assert not isinstance(getattr(tip, name), types.ModuleType), name
assert isinstance(sys.modules["tip_kernels.distillation.distill"], types.ModuleType)
"""
    python("-c", script)


def test_star_import_binds_the_public_names_and_no_other():
    names: dict[str, object] = {}
    exec("from tip_kernels import *", names)
    assert names.keys() - {"__builtins__"} == set(tip.__all__)


def test_dir_lists_what_there_is():
    assert set(dir(tip)) == {*tip.__all__, "__version__"}
    assert all(hasattr(tip, name) for name in dir(tip))


@pytest.mark.parametrize("name", ["nothing", "_nothing", "__wrapped__"])
def test_name_that_does_not_exist_is_an_attribute_error_that_says_which(name):
    with pytest.raises(AttributeError, match=f"module 'tip_kernels' has no attribute '{name}'"):
        getattr(tip, name)


@pytest.mark.parametrize(
    "value",
    [tip.SoftOr(0.5), tip.JSD(0.3), tip.distill, tip.TokenStats],
    ids=["rule", "divergence", "function", "class"],
)
def test_public_objects_survive_pickling_into_a_process_that_has_loaded_nothing(value):
    script = f"import pickle; print(repr(pickle.loads({pickle.dumps(value)!r})))"
    shown = python("-c", script).stdout.strip()
    assert shown.split(" at 0x")[0] == repr(value).split(" at 0x")[0]


def test_version_is_that_of_the_metadata():
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    assert line == f'version = "{tip.__version__}"'
    assert python("-m", "tip_kernels", "--version").stdout == f"tip-kernels {tip.__version__}\n"


def test_version_of_an_installed_package_is_its_metadatas(tmp_path, monkeypatch):
    monkeypatch.setattr(_versions, "__file__", str(tmp_path / "tip_kernels" / "_versions.py"))
    monkeypatch.setattr(_versions, "installed", {"tip-kernels": "7.1"}.get)
    assert _versions.own() == "7.1"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "3.0"\n')
    assert _versions.own() == "7.1"
    monkeypatch.setattr(_versions, "installed", {}.get)
    assert _versions.own() == "0+unknown"
