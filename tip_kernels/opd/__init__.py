"""The on-policy loop: `tip-kernels opd`. Everything here needs the `opd` extra; nothing else imports it."""

from collections.abc import Collection


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
