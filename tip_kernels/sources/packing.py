"""Sources as a torch.library op takes them: lists of tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tip_kernels.sources.pair import Head, HeadRows, LogitRows, Pair, Rows


def packed(pair: Pair) -> tuple[object, ...]:
    """(leaves_s, leaves_t, [scale, softcap or 0 of each], V, dtype_s, dtype_t): what every op begins with."""
    teacher = pair.teacher
    assert teacher is None or isinstance(teacher, Rows)  # a TopK is refused under torch.compile
    (leaves_s, numbers_s, dtype_s), (leaves_t, numbers_t, dtype_t) = _packed(pair.student), _packed(teacher)
    return leaves_s, leaves_t, numbers_s + numbers_t, pair.vocab, dtype_s, dtype_t


def unpacked(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    numbers: Sequence[float],
    vocab: int,
    dtype_s: torch.dtype,
    dtype_t: torch.dtype,
) -> Pair:
    """The pair that `packed` took apart."""
    teacher_rows = _unpacked(teacher, numbers[2:], vocab, dtype_t) if teacher else None
    return Pair(_unpacked(student, numbers[:2], vocab, dtype_s), teacher_rows)


def _packed(rows: Rows | None) -> tuple[list[Tensor], list[float], torch.dtype]:
    """(leaves, [scale, softcap or 0], dtype of the products) of a source."""
    if rows is None:
        return [], [1.0, 0.0], torch.float32
    if rows.shard is not None:
        raise ValueError("vocab_group: expected None under torch.compile, whose ops hold no process group")
    dtype = rows.dtype if isinstance(rows, HeadRows) else rows.leaves[0].dtype
    return list(rows.leaves), [float(rows.scale), float(rows.softcap or 0.0)], dtype


def _unpacked(leaves: Sequence[Tensor], numbers: Sequence[float], vocab: int, dtype: torch.dtype) -> Rows:
    if len(leaves) == 1:
        return LogitRows(leaves[0])
    cast = any(leaf.dtype != dtype for leaf in leaves[:2])  # an autocast was active
    with torch.autocast(leaves[0].device.type, dtype=dtype if cast else None, enabled=cast):
        return HeadRows(Head(*leaves, scale=numbers[0], softcap=numbers[1] or None, vocab_size=vocab))
