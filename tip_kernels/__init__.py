"""tip_kernels: measure, select, learn.

Its names are those of _public.py. They, and torch with them, are loaded when the first of them is asked for, so that
commands answer `--help` at once.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tip_kernels._public import *  # noqa: F403
    from tip_kernels._public import __all__ as __all__

    __version__: str

if not TYPE_CHECKING:  # a checker would take any name for one of the package's

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from tip_kernels import _versions

            globals()[name] = _versions.own()
            return globals()[name]
        # `from tip_kernels import NAME` looks for an attribute before it looks for a submodule
        private = name.startswith("_") and name != "__all__"
        if not private and importlib.util.find_spec(f"{__name__}.{name}") is None:
            from tip_kernels import _public

            globals().update({public: getattr(_public, public) for public in ("__all__", *_public.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from tip_kernels import _public

    return [*_public.__all__, "__version__"]
