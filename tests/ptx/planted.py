"""Faults of kernels that the interpreter passes: each planted in a copy of the kernels, which are then run.

    python -m tests.ptx.planted FOLDER       as sm_90 code, or interpreted under TRITON_INTERPRET=1

Prints one line of JSON: for each fault what its sound form and the faulty one came to, "" where the result was right.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import reference as ref
import tip_kernels.backends.triton
from reference import divergences

KERNELS = Path(tip_kernels.backends.triton.__path__[0])
Load = Callable[[str], ModuleType]  # a module of the kernels by its name


class Planted(NamedTuple):
    """An edit of a file of the kernels or, where `file` is "ptx", of what they are compiled to."""

    file: str
    old: str
    new: str
    check: Callable[[Load], None]
    caught: str  # in what is said of it


def pair(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(3 * torch.randn(rows, columns, generator=generator) for _ in range(2))


def measures(load: Load, z_s: Tensor, z_t: Tensor) -> None:
    """Holds the statistics of the rows to float64."""
    stats, truth = load("row_stats").row_stats(z_s, z_t), ref.token_stats(z_s.double(), z_t.double())
    for name in ("lse_s", "entropy_t", "kl_fwd", "kl_rev"):
        torch.testing.assert_close(stats[name].double(), truth[name], rtol=1e-5, atol=1e-5)


def learns(load: Load, z_s: Tensor, z_t: Tensor) -> None:
    """Holds the gradient of reverse KL to float64."""
    stats, row_grad = load("row_stats").row_stats(z_s, z_t), load("row_grad")
    terms = [row_grad.Term(1.0, "reverse_kl", (), stats)]
    ours = row_grad.row_grad(z_s, z_t, torch.ones(len(z_s)), stats, terms)
    leaf = z_s.double().requires_grad_()
    divergences.reverse_kl(leaf, z_t.double()).sum().backward()
    torch.testing.assert_close(ours.double(), leaf.grad, rtol=1e-4, atol=1e-6)


def odd_stride(load: Load) -> None:
    measures(load, *pair(3, 1301))


def ragged_rows_with_gaps(load: Load) -> None:
    measures(load, *(z[:, :1300] for z in pair(3, 2000)))


def improbable_token(load: Load) -> None:
    z_s, z_t = pair(2, 1300)
    z_t[:, 7] = z_t.logsumexp(-1) - 92.0  # of probability 2^-133
    learns(load, z_s, z_t)


def four_warps(load: Load) -> None:
    row_stats = load("row_stats")
    config = {**row_stats.fold_config(False, False, True), "num_warps": 4, "maxnreg": None}
    with mock.patch.object(row_stats, "fold_config", lambda *_: config):
        measures(load, *pair(2, 2048))


def two_chunks(load: Load) -> None:
    learns(load, *pair(2, 8192 + 4096))


PLANTED = {
    "an alignment that is promised and not kept": Planted(
        "_launch.py", "return 8 if all(tile.stride(0) % 8 == 0 for tile in tiles) else 1", "return 8",
        odd_stride, "misaligned, for 16 bytes",
    ),
    "a mask forgotten in the ragged tile": Planted(
        "row_stats.py", "column + lane, mask=inside, other=0.0)", "column + lane)",
        ragged_rows_with_gaps, "out of bounds",
    ),
    "a logarithm of what is flushed to 0": Planted(
        "row_grad.py", "    p_t = tl.exp2(l_t)\n", "    p_t = tl.exp2(l_t)\n    l_t = tl.log2(p_t)\n",
        improbable_token, "Tensor-likes are not close",
    ),
    "a removed barrier": Planted("ptx", "bar.sync \t0;", "", four_warps, "several warps without a barrier"),
    "programs that overlap": Planted(
        "row_grad.py", "end = tl.minimum(begin + CHUNK, n_cols)", "end = tl.minimum(begin + CHUNK + TILE, n_cols)",
        two_chunks, "several programs",
    ),
}  # fmt: skip


def kernels(folder: Path, name: str, fault: Planted | None) -> Load:
    """A copy of the kernels of another name, whose ops are its own; with the fault in it."""
    package = folder / name
    shutil.copytree(KERNELS, package)
    for file in package.glob("*.py"):
        text = file.read_text()
        if fault and file.name == fault.file:
            assert text.count(fault.old) == 1, f"{fault.old!r} does not stand in {file.name} once"
            text = text.replace(fault.old, fault.new)
        file.write_text(text.replace("tip_kernels::", f"{name}::"))
    return lambda module: importlib.import_module(f"{name}.{module}")


def outcome(check: Callable[[Load], None], load: Load) -> str:
    try:
        check(load)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    removed = [("", "")]
    if not interpreted:
        from . import driver

        driver.install("sm_90", lambda ptx: ptx.replace(*removed[-1], 1))
    found = {}
    for i, (name, fault) in enumerate(PLANTED.items()):
        sound = outcome(fault.check, kernels(folder, f"sound_{i}", None))
        removed.append((fault.old, fault.new) if fault.file == "ptx" else ("", ""))
        found[name] = sound, outcome(fault.check, kernels(folder, f"planted_{i}", fault))
        removed.append(("", ""))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
