"""See which tokens matter: a page of rollouts, the report of a run, runs side by side. Needs the `opd` extra.

`save_statistics` writes what a training loop of your own has measured; `tip-kernels inspect FILE` shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tip_kernels.inspect.tokens import TokenTable, save_statistics

__all__ = ["TokenTable", "save_statistics"]


if not TYPE_CHECKING:  # a checker would take any name for one of the package's

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tip_kernels.inspect import tokens  # which loads torch

        return getattr(tokens, name)


def __dir__() -> list[str]:
    return __all__
