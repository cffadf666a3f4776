"""The environments in which the tests are run, each described once: `nox -s oldest-3.10 previous default newest-3.13`.

`oldest` and `previous` run CORE, the tests of what depends on versions; paths after `--` take its place, as in
`nox -s previous -- tests`. What PyPI has of torch are mostly CUDA builds of several gigabytes, which run on a CPU, too;
UV_TORCH_BACKEND=cpu takes smaller ones. What was run, and when: README.md, "Versions".
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["default"]

CORE = (
    "tests/test_versions.py",
    "tests/test_stats.py",
    "tests/test_divergences.py",
    "tests/test_losses.py",
    "tests/test_distill.py",
    "tests/test_backends.py",
    "tests/test_backward.py",
    "tests/test_compiled.py",
    "tests/test_kernels.py",
    "tests/test_parallel.py",
    "tests/test_hooks_transformers.py",
    "tests/test_hooks_trl.py",
    "tests/test_hooks_verl.py",
    "tests/test_compat.py",
    "tests/test_readme.py",
    "tests/test_examples.py",
    "tests/test_select.py",
    "tests/test_doctor.py",
    "tests/test_opd.py",
)
TESTS = re.search(r"<!-- tests -->\n```bash\n(.+)\n```", Path("README.md").read_text())[1]
PROJECT = nox.project.load_toml("pyproject.toml")["project"]


def floors(*extras: str) -> list[str]:
    """The oldest releases that the package and these extras of it ask for."""
    asked = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [line.replace(">=", "==") for line in asked if ">=" in line]


def run(session: nox.Session, pins: list[str], paths: tuple[str, ...] = ()) -> None:
    """README's test command, with pins beside what it installs and on paths alone."""
    *installs, tests = (shlex.split(step) for step in TESTS.split(" && "))
    for words in installs:
        asked = words[words.index("install") + 1 :]
        session.install(*asked, *([] if "--no-deps" in asked else pins))
    session.run("python", *tests[1:], *(session.posargs or paths))


@nox.session(python=["3.10", "3.11"])
def oldest(session: nox.Session) -> None:
    """Every floor; TRL 1.16 has no build for Python 3.10, and interpreters before Triton 3.7 need numpy below 2.4."""
    extras = ("opd",) if session.python == "3.10" else ("opd", "trl")
    run(session, [*floors(*extras), "numpy<2.4"], CORE)


@nox.session
def previous(session: nox.Session) -> None:
    """The release of torch before the newest, and its Triton."""
    run(session, ["torch==2.14.1", "triton==3.8.0"], CORE)


@nox.session(venv_backend="venv")
def default(session: nox.Session) -> None:
    """README's test command as it stands, by pip, with everything newest but a torch that has a CPU build."""
    session.install("torch==2.13.0")
    session.run("bash", "-euo", "pipefail", "-c", shlex.join(["echo", TESTS]) + "\n" + TESTS, external=True)


@nox.session
def types(session: nox.Session) -> None:
    """pyright, as pyproject.toml sets it up, with what the tests install."""
    *installs, _ = (shlex.split(step) for step in TESTS.split(" && "))
    for words in installs:
        session.install(*words[words.index("install") + 1 :])
    session.run("python", "-m", "pyright")


@nox.session(python=["3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """Everything newest."""
    run(session, [])
