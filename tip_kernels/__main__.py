"""`tip-kernels <command>`, also `python -m tip_kernels <command>`. Commands are imported when they are called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

USAGE = """usage: tip-kernels <command> [options]

commands:
  opd      on-policy distillation: a student samples, a teacher scores, the student learns from the tokens that matter
  inspect  see which tokens matter: a page of rollouts, of a run, of two checkpoints or of saved statistics
  compare  several runs on one page
  plan     what a step costs by strategy and peer, before it is run
  doctor   what is installed, what will run, and whether every operation's numbers are right on this machine

`tip-kernels <command> --help` lists a command's options, `tip-kernels --version` says which version this is."""


def _opd(argv: list[str]) -> int:
    from tip_kernels.opd import cli

    return cli.main(argv)


def _inspect(argv: list[str]) -> int:
    from tip_kernels.opd import inspect_cli as cli

    return cli.main("inspect", argv)


def _compare(argv: list[str]) -> int:
    from tip_kernels.opd import inspect_cli as cli

    return cli.main("compare", argv)


def _plan(argv: list[str]) -> int:
    from tip_kernels.plan import costs

    return costs.main(argv)


def _doctor(argv: list[str]) -> int:
    from tip_kernels.doctor import cli

    return cli.main(argv)


# What each command loads; the doctor reports what it finds.
NEEDS = {
    "opd": ("torch", "triton", "transformers"),
    "inspect": ("torch", "triton", "transformers"),
    "plan": ("torch", "triton"),
}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "opd": _opd,
    "inspect": _inspect,
    "compare": _compare,
    "plan": _plan,
    "doctor": _doctor,
}


def _wrong_version(command: str) -> str | None:
    """What is installed in a version that the command cannot use, in one line."""
    from tip_kernels import _versions

    try:
        _versions.check(*NEEDS.get(command, ()))
    except _versions.VersionError as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 bad arguments, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv and argv[0] == "--version":
        from tip_kernels import _versions

        print(f"tip-kernels {_versions.own()}")
        return 0
    # torch's, where numpy is not installed; no command here needs it that does not ask for it by name
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    if argv and argv[0] in COMMANDS:
        wrong = None if {"-h", "--help"} & set(argv) else _wrong_version(argv[0])
        if wrong:
            print(f"tip-kernels {argv[0]}: error: {wrong}", file=sys.stderr)
            return 2
        return COMMANDS[argv[0]](argv[1:])
    got = f"got {argv[0]!r}" if argv else "got nothing"
    known = ", ".join(repr(name) for name in COMMANDS)
    print(f"tip-kernels: error: argument command: expected {known}, {got} (see tip-kernels --help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
