"""What commands say of a wrong word: one line, and exit code 2. Loads nothing."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


class UsageError(ValueError):
    """What the user can mend: shown as one line, exit code 2."""

    def beside(self, given: Collection[str] | None) -> str:
        """The line; of an option that it names and that is not among those typed it says so. None: they are unknown."""
        name, _, rest = str(self).partition(":")
        option = name.removeprefix("argument --")
        if given is None or option == name or not option or option.replace("-", "_") in given:
            return str(self)
        return f"{name} (not given):{rest}"


def install(extra: str) -> str:
    """How to install what an extra brings; the package is on no index."""
    return f'python3 -m pip install -e ".[{extra}]" in a checkout of tip-kernels'


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def pick_device(name: str) -> torch.device:
    """The torch device called `name`, if this machine has it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"argument --device: expected auto, cpu, or a device of this machine, got {name!r}") from None
    return device
