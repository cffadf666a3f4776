#!/usr/bin/env bash
# The wheel of verl 0.9.1 installs a top-level package `tests` of its own, with an __init__.py. A project whose tests/ has
# none is then a namespace package that Python finds second, though its folder stands first in sys.path: the project's
# `from tests.helper import ...` ends with "No module named 'tests.helper'", only where verl is installed. With an empty
# tests/__init__.py it works. Seen on 2026-11-29 with Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
mkdir -p "$folder/project/tests"
echo "answer = 42" >"$folder/project/tests/helper.py"
cd "$folder/project"
ask() { "$folder/env/bin/python" -c "from tests.helper import answer; print(answer)" 2>&1 | tail -n 1 || true; }
alone=$(ask)
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps verl==0.9.1
beside=$(ask)
touch tests/__init__.py
mended=$(ask)
printf 'alone: %s\nbeside verl: %s\nwith tests/__init__.py: %s\n' "$alone" "$beside" "$mended"
[ "$alone" = 42 ] && [ "$beside" = "ModuleNotFoundError: No module named 'tests.helper'" ] && [ "$mended" = 42 ]
