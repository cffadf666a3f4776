"""`python -m bench NAME [options]` runs bench/NAME.py's main(argv)."""

import importlib
import pkgutil
import sys

import bench


def main(argv: list[str]) -> int:
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if not m.name.startswith(("_", "test_")))
    usage = f"usage: python -m bench {{{','.join(names)}}} [options]"
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{usage}\n\nWhat each one asks and how to read it: bench/README.md; its options: NAME --help")
        return 0
    if not argv or argv[0] not in names:
        print(usage, file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
