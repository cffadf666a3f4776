"""How a workspace of so many bytes is divided into tiles: plain arithmetic, which the sweeps and the planner share.

R rows and C columns of a tile, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

PART = 8192  # columns that a program of the Triton fold reads, whose state is kept and sent on its own
SLACK = 1.25  # rows stashed per row of the quota
ROWS = {"cpu": (96, 256)}  # the fewest rows of a block that keep the products efficient, and the most that help
OTHER_ROWS = (512, 2048)
FILTER_COLUMNS = 1024  # narrow enough that rare tokens fill whole tiles
TILES_MIB = 16  # of the workspace for tiles, at most
# R and C of the largest tile. On a CPU it stays in the second-level cache; elsewhere it must fill the device.
LARGEST = {"cpu": (256, 1024)}
LARGEST_ELSEWHERE = (2048, PART)


def tile_shape(
    n_rows: int,
    vocab: int,
    width: int,
    device: str,
    workspace: int,
    buffers: int,
    *,
    whole_parts: bool = False,
    slice_width: int = 0,
) -> tuple[int, int]:
    """Rows and columns of a tile such that its buffers, gathered rows and upcast weights stay within the workspace.

    Args:
        n_rows: Rows to be walked.
        vocab: Columns of the rank that has most: the blocks are the same on every rank.
        width: H of all sources together, 0 for logits in memory.
        device: The device's type, "cpu" or another.
        workspace: Bytes.
        buffers: fp32 matrices of a tile's shape that are held at once.
        whole_parts: Columns come in multiples of what a program of the Triton fold reads.
        slice_width: H of an fp32 slice of d(weight), for each column.
    """
    rows, columns = LARGEST.get(device, LARGEST_ELSEWHERE)
    rows, columns = min(rows, max(n_rows, 1)), min(PART if whole_parts else columns, max(vocab, 1))

    def size(rows: int, columns: int) -> int:
        return 4 * (buffers * rows * columns + (2 * rows + columns) * width + columns * slice_width)

    while size(rows, columns) > workspace and max(rows, columns) > 16:
        if columns >= rows and not whole_parts:
            columns = (columns + 1) // 2
        elif rows > 1:
            rows = (rows + 1) // 2
        else:
            break
    return rows, columns


def columns_of(vocab: int, columns: int) -> Iterator[tuple[int, int]]:
    """The tiles [v0, v1) that cover the vocabulary."""
    for v0 in range(0, vocab, columns):
        yield v0, min(v0 + columns, vocab)


def parts_of(n_rows: int, rows: int) -> list[slice]:
    """The blocks of so many rows."""
    return [slice(r0, min(r0 + rows, n_rows)) for r0 in range(0, n_rows, rows)]


@dataclass(frozen=True)
class Layout:
    """How one sweep divides its workspace: a block of rows of logits, a stash, and tiles."""

    rows: int  # R
    slots: int  # C; 0: rows are learned as they come
    tiles: int  # bytes for tiles of logits
    reuse_grad_weight: bool = False  # the row blocks lie in d(weight) until it is written


def divided(
    workspace: int,
    n_rows: int,
    slots: int,
    vocab: int,
    widths: tuple[int, int],
    device: str,
    narrow_weight: bool,
    grad_weight_bytes: int = 0,
) -> Layout | None:
    """A workspace of so many bytes divided among row blocks, stash and tiles, or None where the blocks get too short.

    narrow_weight      d(weight) has 16 bits, so that a sum over several blocks needs an fp32 (V, H) beside it
    grad_weight_bytes  bytes of d(weight), which is written last and holds the row blocks until then
    """
    fewest, most = ROWS.get(device, OTHER_ROWS)
    tiles = min(workspace // 4, TILES_MIB * 2**20)
    left = workspace - tiles - 4 * slots * (vocab + 3 * widths[0])  # hidden rows, weighted, gradient
    if slots == 0 and n_rows > most and narrow_weight:
        left -= 4 * vocab * widths[0]
    most, gathered = min(most, max(n_rows, 1)), 12 * sum(widths)
    rows = min(left // (8 * vocab + gathered), most)
    reused = min(left // gathered, grad_weight_bytes // (8 * vocab), most)
    if max(rows, reused) < min(fewest, max(n_rows, 1)):
        return None
    return Layout(max(rows, reused), slots, tiles, reused >= rows and reused > 0)


def stash_slots(n_rows: int, capacity: int) -> int:
    """How many of n_rows rows to stash for a quota of at most `capacity` in all."""
    return min(n_rows, math.ceil(SLACK * capacity) + 1)
