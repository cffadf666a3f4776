"""The programs of docs/examples run, each in under a minute of processor time, and their students come closer."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
NEEDS = {
    "with_accelerate": "accelerate",
    "with_lightning": "lightning",
    "with_trl": "trl",
    "with_trainer": "accelerate",
}
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "shared")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
ENVIRONMENT.pop("TRITON_INTERPRET", None)
SECONDS = 60


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_within_a_minute_and_its_student_comes_closer(name, tmp_path):
    pytest.importorskip("transformers")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    start = processor_seconds()
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert processor_seconds() - start < SECONDS
    assert not list(tmp_path.iterdir())
    if name == "before_after":
        whole, ours, _ = re.findall(r"loss (\S+)  gradient norm (\S+)", done.stdout)
        assert whole == ours
    else:
        first, last = re.search(r"KL\(student \|\| teacher\): (\S+) -> (\S+) nats", done.stdout).groups()
        assert float(last) < 0.8 * float(first)


def test_the_notebook_runs_in_ten_cells(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(EXAMPLES / "shared.py", tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("TRITON_INTERPRET", "MPLBACKEND"):  # the kernel draws into the notebook
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(EXAMPLES / "distil_inspect_plot.ipynb", as_version=4)
    assert len(notebook.cells) == 10 and not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "image/png" in shown and "nats a token" in shown
    assert "<!doctype html>" in (tmp_path / "tokens.html").read_text()


def test_every_program_is_on_the_page_of_examples():
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"]({path.name})" in page for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
