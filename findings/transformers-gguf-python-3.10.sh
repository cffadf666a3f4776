#!/usr/bin/env bash
# On Python 3.10, transformers 5.5.4 cannot tell the version of an installed gguf 0.19.0: `is_gguf_available()`, and so
# every from_pretrained(gguf_file=...), ends with packaging's InvalidVersion: 'N/A'. Python 3.10's metadata names a
# distribution's modules from top_level.txt alone, which the wheel of gguf lacks, and gguf has no __version__, where
# transformers looks next. On Python 3.11 it answers True. Seen on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ask() {
    "$1" -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --disable-pip-version-check transformers==5.5.4 gguf==0.19.0
    "$folder/$1/bin/python" -c "from transformers.utils import is_gguf_available; print(is_gguf_available())" 2>&1 |
        tail -n 1 || true
}
old=$(ask python3.10)
new=$(ask python3.11)
printf 'Python 3.10: %s\nPython 3.11: %s\n' "$old" "$new"
[ "$old" = "packaging.version.InvalidVersion: Invalid version: 'N/A'" ] && [ "$new" = True ]
