#!/usr/bin/env bash
# In Triton's interpreter `constant * tensor`, of a tl.constexpr on the left, is a constexpr that holds the tensor. In 3.7.1
# and 3.8.0 tl.store and tl.maximum refuse it with a TypeError; in 3.9.0 tl.store still does. 3.6.0 takes it, so does the
# compiler of every one of them (for sm_90, which needs no GPU), and `tensor * constant` is right everywhere. Seen on
# 2026-11-29 with torch 2.13.0, numpy 2.3.5 and Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
install=("$folder/env/bin/pip" install --quiet --disable-pip-version-check)
"${install[@]}" torch==2.13.0 numpy==2.3.5
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
    "${install[@]}" --no-deps --target "$folder/$version" triton==$version
done
cat >"$folder/seen.py" <<'PYTHON'
import os

import torch
import triton
import triton.language as tl

HALF = tl.constexpr(0.5)


@triton.jit
def left_stored(out, x):
    i = tl.arange(0, 8)
    tl.store(out + i, HALF * tl.load(x + i))


@triton.jit
def left_in_maximum(out, x):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.maximum(HALF * tl.load(x + i), 0.0))


@triton.jit
def right(out, x):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.maximum(tl.load(x + i) * HALF, 0.0))


def interpreted(kernel):
    x, out = torch.arange(8.0), torch.empty(8)
    try:
        kernel[(1,)](out, x)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return type(error).__name__
    return "right" if torch.equal(out, x / 2) else "wrong"


def compiled(kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature={"out": "*fp32", "x": "*fp32"})
    return "compiles" if "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm else "has no code"


run = interpreted if os.environ.get("TRITON_INTERPRET") == "1" else compiled
print(triton.__version__, run.__name__, *(f"{k.fn.__name__}: {run(k)}" for k in (left_stored, left_in_maximum, right)))
PYTHON
cat >"$folder/expected" <<'TEXT'
3.6.0 interpreted left_stored: right left_in_maximum: right right: right
3.6.0 compiled left_stored: compiles left_in_maximum: compiles right: compiles
3.7.1 interpreted left_stored: TypeError left_in_maximum: TypeError right: right
3.7.1 compiled left_stored: compiles left_in_maximum: compiles right: compiles
3.8.0 interpreted left_stored: TypeError left_in_maximum: TypeError right: right
3.8.0 compiled left_stored: compiles left_in_maximum: compiles right: compiles
3.9.0 interpreted left_stored: TypeError left_in_maximum: right right: right
3.9.0 compiled left_stored: compiles left_in_maximum: compiles right: compiles
TEXT
cd "$folder"
export TRITON_CACHE_DIR="$folder/cache"
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
    TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" env/bin/python seen.py
    TRITON_INTERPRET=0 PYTHONPATH="$folder/$version" env/bin/python seen.py
done 2>errors | tee seen || { cat errors; exit 1; }
diff expected seen
