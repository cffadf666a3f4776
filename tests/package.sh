#!/usr/bin/env bash
# Builds what is published, checks it, and runs the main job from it in an empty environment away from the checkout.
# tests/package.sh [STEPS]; needs an index of packages. PYTHON is the interpreter (python3).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet --disable-pip-version-check build twine
"$folder/tools/bin/python" -m build --outdir "$folder/dist" "$root" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
"$folder/tools/bin/twine" check --strict "$folder"/dist/*

"${PYTHON:-python3}" -m venv "$folder/empty"
wheel=("$folder"/dist/*.whl)
"$folder/empty/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "${wheel[0]}[opd]"
mkdir "$folder/elsewhere"
cd "$folder/elsewhere"
export PATH="$folder/empty/bin:$PATH"
tip-kernels --version
tip-kernels doctor --only token_stats
tip-kernels opd --steps "${1:-5}"
python -c "from importlib.metadata import files; assert any('chart.LICENSE' in str(f) for f in files('tip-kernels'))"
