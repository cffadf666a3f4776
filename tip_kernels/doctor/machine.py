"""What is installed here and what will run."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess

import torch

from tip_kernels import _versions
from tip_kernels.backends.choice import ENVIRONMENT, TRITON_DEVICES, TRITON_IS_INSTALLED, backend_for
from tip_kernels.backends.products import LIBRARY

Facts = dict[str, object]


def packages() -> dict[str, Facts]:
    """Of each package that the project is tested with: the version found, those tested, and what follows."""
    found: dict[str, Facts] = {}
    for package, tested in _versions.TESTED.items():
        version = _versions.installed(package)
        if version is None:
            verdict = "not installed"
        elif fault := _versions.fault(package, version):
            verdict = fault
        else:
            verdict = "tested" if _versions.is_tested(package, version) else "untested"
        found[package] = {"found": version, "tested": sorted(tested, key=_versions.release), "verdict": verdict}
    return found


def system() -> Facts:
    return {
        "tip_kernels": _versions.own(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def device_facts(device: torch.device) -> Facts:
    facts: Facts = {"device": str(device)}
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    elif device.type == "cpu":
        facts["name"] = _cpu_name()
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
        facts["products"] = f"products by {LIBRARY['cpu']}"
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def backend_facts(device: torch.device) -> Facts:
    """Which code runs there, and why."""
    asked = os.environ.get(ENVIRONMENT)
    try:
        name = backend_for(device)
    except ValueError as error:
        return {"backend": None, "why": str(error)}
    if asked:
        why = f"{ENVIRONMENT}={asked}"
    elif device.type not in TRITON_DEVICES:
        why = f"Triton kernels run on {' and '.join(TRITON_DEVICES)} (AMD's is cuda, too), the device is {device.type}"
    else:
        why = "a GPU, and triton is installed" if TRITON_IS_INSTALLED else "triton is not installed"
    return {"backend": name, "why": why}


def compilers() -> dict[str, str | None]:
    """The first line that a C and a C++ compiler say of themselves: Triton's launchers need the one, Inductor on a CPU
    the other. None where there is none. The names are those that both look for."""
    choices = {"c": ("CC", ("gcc", "clang", "cc", "cl")), "c++": ("CXX", ("g++", "clang++", "c++", "cl"))}
    found: dict[str, str | None] = {}
    for language, (variable, names) in choices.items():
        words = shlex.split(os.environ.get(variable, "")) or [name for name in names if shutil.which(name)][:1]
        found[language] = _says(words) if words and shutil.which(words[0]) else None
    return found


def _says(words: list[str]) -> str:
    try:
        done = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return words[0]
    return (done.stdout.strip().splitlines() or [words[0]])[0]
