"""`tip-kernels <command>`, also `python -m tip_kernels <command>`. Commands are imported when they are called."""

from __future__ import annotations

import sys

USAGE = """usage: tip-kernels <command> [options]

commands:
  opd     on-policy distillation: a student samples, a teacher scores, the student learns from the tokens that matter

`tip-kernels <command> --help` lists a command's options."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 bad arguments, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv and argv[0] == "opd":
        from tip_kernels.opd import cli

        return cli.main(argv[1:])
    got = f"got {argv[0]!r}" if argv else "got nothing"
    print(f"tip-kernels: error: argument command: expected 'opd', {got} (see tip-kernels --help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
