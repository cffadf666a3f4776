"""Versions that cannot work are refused in one line, before anything is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tip_kernels import _versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("2.13.0a0+eb65b36914.nv26.02", (2, 13)), ("5.5.4", (5, 5, 4)), ("0.1rc1", (0, 1))],
)
def test_release_of_a_version_is_its_numbers(version, numbers):
    assert _versions.release(version) == numbers


@pytest.mark.parametrize("package", sorted(_versions.FLOORS))
def test_floor_and_anything_newer_pass_and_below_is_refused_naming_both(package):
    floor = _versions.FLOORS[package]
    assert _versions.fault(package, floor) is None
    assert _versions.fault(package, "99.0") is None
    assert not _versions.is_tested(package, "99.0")
    assert _versions.fault(package, "0.1").startswith(f"{package}: expected {floor} or newer, got 0.1")


def test_release_known_to_break_is_refused_with_its_reason(monkeypatch):
    bad = {"trl": (_versions.Broken("50.1", "50.3", "it loses a gradient"),)}
    monkeypatch.setattr(_versions, "KNOWN_BAD", bad)
    assert _versions.fault("trl", "50.2.7") == "trl: expected 50.3 or newer, got 50.2.7: it loses a gradient"
    assert _versions.fault("trl", "50.0.9") is None
    assert _versions.fault("trl", "50.3") is None


def test_floors_are_those_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    seen = set()
    for requirement in map(Requirement, project["dependencies"] + extras):
        floor = _versions.FLOORS.get(requirement.name)
        if floor is not None:
            seen.add(requirement.name)
            assert str(requirement.specifier) == f">={floor}", requirement
    assert seen == set(_versions.FLOORS)


@pytest.mark.parametrize("package", sorted(_versions.FLOORS))
def test_tested_versions_are_at_or_above_the_floor_and_dated(package):
    for version, day in _versions.TESTED[package].items():
        assert Version(version) >= Version(_versions.FLOORS[package])
        assert _versions.fault(package, version) is None
        assert len(day) == 10


def test_readme_states_the_versions_that_were_run():
    table = (ROOT / "README.md").read_text().partition("<!-- versions -->\n")[2].partition("\n\n")[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    stated: dict[str, dict[str, str]] = {}
    for row in (dict(zip(map(str.lower, head), cells, strict=True)) for cells in rows):
        assert row["result"].endswith("passed"), row
        for package in _versions.TESTED:
            if row[package]:
                days = stated.setdefault(package, {})
                days[row[package]] = max(days.get(row[package], ""), row["on"])
    assert stated == _versions.TESTED


def test_every_environment_is_in_a_workflow_and_runs_files_that_exist():
    described = (ROOT / "noxfile.py").read_text()
    files = re.findall(r'"(tests/\w+\.py)"', described)
    assert files and all((ROOT / file).is_file() for file in files)
    hosted = "".join(file.read_text() for file in (ROOT / ".github" / "workflows").glob("*.yml"))
    for options, name in re.findall(r"@nox\.session(.*)\ndef (\w+)", described):
        pythons = re.findall(r'"(3\.\d+)"', options)
        for session in [f"{name}-{python}" for python in pythons] or [name]:
            assert re.search(rf"session: \[.*\b{re.escape(session)}\b.*\]", hosted), session


def test_check_names_the_first_that_cannot_be_used_in_one_line(monkeypatch):
    found = {"torch": "2.13.0", "triton": None, "trl": "1.2.0"}
    monkeypatch.setattr(_versions, "installed", found.get)
    _versions.check("torch", "triton")
    with pytest.raises(ImportError) as error:
        _versions.check("torch", "triton", "trl")
    assert str(error.value) == (
        f"trl: expected {_versions.FLOORS['trl']} or newer, got 1.2.0: pip install --upgrade trl"
    )


def test_the_check_loads_nothing():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('versions', {str(ROOT / 'tip_kernels/_versions.py')!r})\n"
        "versions = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(versions)\n"
        "versions.check('torch', 'triton', 'transformers', 'trl')\n"
        "assert not {'torch', 'triton', 'transformers', 'trl'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def ran_with(found: dict[str, str], code: str) -> subprocess.CompletedProcess:
    """A Python of its own, in which these versions are found and afterwards nothing that they are of is loaded."""
    code = (
        "import sys\n"
        "from tip_kernels import _versions\n"
        f"_versions.installed = {found!r}.get\n"
        f"{code}\n"
        "assert not {'torch', 'triton', 'transformers', 'trl', 'accelerate'} & set(sys.modules)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_trl_hook_refuses_a_transformers_that_takes_a_part_of_the_gradient():
    code = "try:\n    import tip_kernels.hooks.trl\nexcept ImportError as error:\n    print(error)"
    ran = ran_with({"transformers": "5.5.3", "trl": "1.16.0"}, code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("transformers: expected "), ran.stdout
    assert "got 5.5.3: its Trainer takes 1/gradient_accumulation_steps of the gradient" in ran.stdout
    assert ran.stdout.count("\n") == 1


@pytest.mark.parametrize("command", ["opd --steps 1", "inspect", "plan"])
def test_command_says_in_one_line_which_version_it_cannot_use(command):
    ran = ran_with({"torch": "2.1.0"}, f"from tip_kernels.__main__ import main\nassert main({command.split()}) == 2")
    assert ran.returncode == 0, ran.stderr
    floor = _versions.FLOORS["torch"]
    name = command.split()[0]
    assert ran.stderr == (
        f"tip-kernels {name}: error: torch: expected {floor} or newer, got 2.1.0: pip install --upgrade torch\n"
    )


def test_public_name_is_refused_before_torch_is_loaded():
    code = "import tip_kernels as tip\ntry:\n    tip.distill\nexcept ImportError as error:\n    print(error)"
    ran = ran_with({"torch": "2.13.0", "triton": "3.0.0"}, code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"triton: expected {_versions.FLOORS['triton']} or newer, got 3.0.0")
