#!/usr/bin/env bash
# An extra that names another extra of the same project under a marker, `all = ["p[new]; python_version >= '3.99'"]`, loses
# the marker in a wheel of hatchling 1.33.0: it puts the other extra's lines in place of the name, as they are, and what
# was meant for some Pythons is asked for on all. setuptools 80.9.0 keeps the name and its marker. Seen on 2026-11-29 with
# Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check hatchling==1.33.0 setuptools==80.9.0 build==1.3.0
metadata() { # of a wheel by this backend
    mkdir -p "$folder/$1/p"
    touch "$folder/$1/p/__init__.py"
    cat >"$folder/$1/pyproject.toml" <<TOML
[build-system]
requires = ["$1"]
build-backend = "$2"
[project]
name = "p"
version = "0"
[project.optional-dependencies]
new = ["six>=1"]
all = ["p[new]; python_version >= '3.99'"]
TOML
    (cd "$folder/$1" && "$folder/env/bin/python" -m build --wheel --no-isolation . >/dev/null 2>&1)
    unzip -p "$folder/$1"/dist/*.whl '*/METADATA' | grep "extra == .all."
}
by_hatchling=$(metadata hatchling hatchling.build)
by_setuptools=$(metadata setuptools setuptools.build_meta)
printf 'hatchling: %s\nsetuptools: %s\n' "$by_hatchling" "$by_setuptools"
[ "$by_hatchling" = "Requires-Dist: six>=1; extra == 'all'" ] && grep -q "3.99" <<<"$by_setuptools"
