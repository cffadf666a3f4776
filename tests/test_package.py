"""What an installation gives: names that load when they are used, commands that answer at once."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import tip_kernels as tip
from tip_kernels import __main__ as command
from tip_kernels import _versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
for name in set(tip.__all__) - {{"weights"}}:
    assert not isinstance(getattr(tip, name), types.ModuleType), name
assert tip.weights.PositionDecay(2.0).half_life == 2.0
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


# ---- the files that are published


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs build: pip install build")
    folder = tmp_path_factory.mktemp("published")
    backend = all(importlib.util.find_spec(name) for name in ("hatchling", "hatch_fancy_pypi_readme"))
    isolation = ["--no-isolation"] if backend else []  # which would download the build backend
    subprocess.run(
        [sys.executable, "-m", "build", *isolation, "--outdir", str(folder), str(ROOT)], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def wheel(published) -> zipfile.ZipFile:
    with zipfile.ZipFile(*published.glob("*.whl")) as opened:
        yield opened


def tracked(*paths: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_wheel_holds_the_package_as_it_is_tracked_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == tracked("tip_kernels")
    assert {"tip_kernels/py.typed", "tip_kernels/opd/models/student/model.safetensors"} <= names


def test_wheel_holds_the_licence_of_all_that_is_not_ours(wheel):
    bundled = [name for name in tracked("tip_kernels/inspect/static") if name.endswith(".min.js")]
    notices = set(re.findall(r"\(c\) \d+ ([\w. ]+)", "".join((ROOT / name).read_text() for name in bundled)))
    assert notices == {"Chart.js Contributors", "Jukka Kurkela"}
    licences = {name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/licenses/" in name}
    assert len(licences) == 3
    for holder in notices:
        (text,) = (text for text in licences.values() if holder in text)
        assert "Permission is hereby granted" in text and 'PROVIDED "AS IS"' in text


def test_description_points_at_nothing_that_an_index_does_not_have(wheel):
    text = metadata_of(wheel).get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    assert "![" not in text and "its claim in bench/evidence.md" in text
    assert text.count("\n## ") == (ROOT / "README.md").read_text().count("\n## ")


def test_sdist_holds_what_builds_the_wheel_and_no_tests(published):
    with tarfile.open(*published.glob("*.tar.gz")) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    rest = names - tracked("tip_kernels")
    assert tracked("tip_kernels") <= names
    assert rest == {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}


def test_published_files_pass_the_index_check(published):
    pytest.importorskip("twine")
    files = map(str, published.iterdir())
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_metadata_names_what_a_reader_of_an_index_filters_by(wheel):
    about = metadata_of(wheel)
    assert about["Version"] == tip.__version__ and about["License-Expression"] == "MIT"
    assert "Typing :: Typed" in about.get_all("Classifier") and "distillation" in about["Keywords"]
    assert "bench" not in about.get_all("Provides-Extra")


@pytest.mark.parametrize(
    "words", [["--version"], ["opd", "--steps", "5", "--batch", "16", "--eval-prompts", "16"]], ids=str
)
def test_wheel_runs_away_from_the_checkout(published, tmp_path, words):
    if words[0] == "opd":
        pytest.importorskip("transformers")
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    with zipfile.ZipFile(*published.glob("*.whl")) as opened:
        opened.extractall(site)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    script = "import sys; from tip_kernels.__main__ import main, __file__ as f; print(f); sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=here, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "tip_kernels" / "__main__.py")
    if words[0] == "opd":
        assert (here / "runs/opd/report.html").is_file()
    else:
        assert done.stdout.splitlines()[1] == f"tip-kernels {tip.__version__}"


def test_editable_installation_is_a_path_that_type_checkers_can_follow(tmp_path):
    """An import hook, as some build backends write one, is invisible to them."""
    for needed in ("hatch_fancy_pypi_readme", "editables"):
        pytest.importorskip(needed)
    build = "from hatchling.build import build_editable as build; import sys; print(build(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(*tmp_path.glob("*.whl")) as opened:
        (path,) = (name for name in opened.namelist() if ".dist-info/" not in name)
        assert path.endswith(".pth") and opened.read(path).decode().strip() == str(ROOT)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_that_a_hint_or_a_page_names_exists():
    pages = [ROOT / name for name in tracked("*.md", "tip_kernels/*.py", "tip_kernels/**/*.py")]
    named = {
        extra.strip()
        for page in pages
        for extras in re.findall(r"(?:tip-kernels|\.)\[([a-z, ]+)\]", page.read_text())
        for extra in extras.split(",")
    }
    assert named and named <= project()["optional-dependencies"].keys()


def test_extra_of_the_main_job_holds_what_the_commands_after_it_need():
    names = {re.match(r"[\w-]+", need)[0] for need in project()["optional-dependencies"]["opd"]}
    assert {"accelerate", "transformers", "tokenizers", "safetensors", "rich", "jinja2", "matplotlib"} <= names
