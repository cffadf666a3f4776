"""Versions of the packages underneath: the oldest that work, those known to break, those that were run.

Data, and one check made before any of them is loaded: it reads installed metadata only and imports nothing.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Broken(NamedTuple):
    """Versions from `since` up to but without `until` break what `reason` says."""

    since: str
    until: str
    reason: str


FLOORS = {"torch": "2.10", "triton": "3.6", "transformers": "5.5.4", "trl": "1.16"}
KNOWN_BAD: dict[str, tuple[Broken, ...]] = {
    "transformers": (Broken("5.0", "5.5.4", "its Trainer takes 1/gradient_accumulation_steps of the gradient"),),
}
# package: {version: the day on which the suite or its core last passed with it}
TESTED: dict[str, dict[str, str]] = {
    "torch": {"2.13.0": "2026-11-29", "2.10.0": "2026-11-29"},
    "triton": {"3.9.0": "2026-11-29", "3.6.0": "2026-11-29"},
    "transformers": {"5.24.0": "2026-11-29", "5.5.4": "2026-11-29"},
    "trl": {"1.16.0": "2026-11-29"},
}


class VersionError(ImportError):
    """A package is installed in a version that cannot work; the message is one line."""


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version without trailing zeros: (2, 13) for "2.13.0+cpu", and for "2.13.0a0+git1"."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    if found is None:
        raise ValueError(f"version: expected numbers and dots first, got {version!r}")
    numbers = [int(number) for number in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def installed(package: str) -> str | None:
    """The version installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own() -> str:
    """The version of tip-kernels: of a checkout that its folder lies in, else as installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file() and (
        found := re.search(r'^name = "tip-kernels"\nversion = "(.+)"$', project.read_text(), re.M)
    ):
        return found[1]
    return installed("tip-kernels") or "0+unknown"


def fault(package: str, version: str) -> str | None:
    """Why a version cannot be used, in one line that names package, version found and version needed; None if it can.

    A pre-release counts as its release: builds from source and vendors' own are named so.
    """
    found = release(version)
    for since, until, reason in KNOWN_BAD.get(package, ()):
        if release(since) <= found < release(until):
            return f"{package}: expected {until} or newer, got {version}: {reason}"
    floor = FLOORS.get(package)
    if floor is not None and found < release(floor):
        return f"{package}: expected {floor} or newer, got {version}"
    return None


def is_tested(package: str, version: str) -> bool:
    """Whether the suite or its core was run with this version; local parts ("+cpu") do not count."""
    return release(version) in map(release, TESTED.get(package, {}))


def check(*packages: str) -> None:
    """Raises VersionError, an ImportError, for the first package installed in a version that cannot be used.

    One that is not installed is no matter of this check, and one newer than any that was tested passes.
    """
    for package in packages:
        version = installed(package)
        message = version and fault(package, version)
        if message:
            raise VersionError(f"{message}: pip install --upgrade {package}")
