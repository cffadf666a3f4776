"""A student and a teacher over the same rows and vocabulary, and what is checked of them at the border.

N rows, R rows of a block, C columns of a tile, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, flat_rows, is_int, row_temperature, workspace_bytes
from tip_kernels.sources.head import Head, HeadRows
from tip_kernels.sources.logits import Block, LogitRows, Rows
from tip_kernels.sources.topk import TopK, TopKRows, check_request
from tip_kernels.stats import check_label_range
from tip_kernels.workspace import tile_shape


class Pair:
    """A student, and perhaps a teacher, over the same N rows and V tokens."""

    def __init__(self, student: Rows, teacher: Rows | TopKRows | None = None) -> None:
        self.student, self.teacher = student, teacher
        self.topk = teacher if isinstance(teacher, TopKRows) else None
        self.sources = [student, teacher] if isinstance(teacher, Rows) else [student]  # those with logits
        self.n_rows, self.vocab, self.device, self.shard = student.n_rows, student.vocab, student.device, student.shard
        self.width = sum([source.width for source in self.sources])

    def with_leaves(self, student: tuple[Tensor, ...] = (), teacher: tuple[Tensor, ...] = ()) -> Pair:
        """The same over other tensors of the same shapes, or over none."""
        other = None if self.teacher is None else self.teacher.with_leaves(teacher)
        return Pair(self.student.with_leaves(student), other)

    def tile_shape(
        self, n_rows: int, workspace: int, buffers: int, *, whole_parts: bool = False, slice_width: int = 0
    ) -> tuple[int, int]:
        """Rows and columns of the tiles in which n_rows are walked, see workspace.py."""
        widest, device = self.student.widest, self.device.type
        parts = {"whole_parts": whole_parts, "slice_width": slice_width}
        return tile_shape(n_rows, widest, self.width, device, workspace, buffers, **parts)

    def blocks(self, rows: slice | Tensor) -> list[Block]:
        """Some rows of each source with logits."""
        return [source.block(rows) for source in self.sources]


@dataclass(frozen=True)
class Request:
    """What was asked for, checked: nothing below raises for the user."""

    pair: Pair
    labels: Tensor | None  # (N,) int64
    temperature: float | Tensor  # a tensor is (N,) fp32
    row_mask: Tensor | None  # (N,) bool, where the caller has it
    rollout_ids: Tensor | None  # as given: rules check it
    workspace: int  # bytes
    top_k: int

    @classmethod
    def checked(
        cls,
        student: Tensor | Head,
        teacher: Tensor | Head | TopK | None,
        *,
        labels: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        row_mask: Tensor | None = None,
        rollout_ids: Tensor | None = None,
        workspace_mib: float = 256,
        top_k: int = 0,
        margins: bool = False,
        alone: bool = False,
    ) -> Request:
        """The request, or a ValueError that names the argument, the form expected and what was given.

        alone allows a student without a teacher.
        """
        rows_s = rows_of(student, "student")
        pair = Pair(rows_s) if teacher is None and alone else _pair_of(rows_s, teacher)
        expect(is_int(top_k) and top_k >= 0, "top_k", "an int of at least 0", top_k)
        expect(top_k == 0 or teacher is not None, "top_k", "0 without a teacher", top_k)
        if pair.topk is not None:
            check_request(temperature, margins=margins, top_k=top_k)
        shape, device = rows_s.batch_shape, rows_s.device
        temperature = row_temperature(temperature, shape, device)
        if labels is not None:
            labels = flat_rows("labels", labels, shape, (torch.int64,), device)
            if not torch.compiler.is_compiling():  # the compiled op looks at them when it runs
                check_label_range(labels, pair.vocab)
            labels = labels.clone()  # the statistics keep it, the caller may change it
        if row_mask is not None:
            on_cpu = isinstance(row_mask, Tensor) and row_mask.device.type == "cpu"
            row_mask = flat_rows("row_mask", row_mask, shape, (torch.bool,), row_mask.device if on_cpu else device)
        return cls(pair, labels, temperature, row_mask, rollout_ids, workspace_bytes(workspace_mib), top_k)


def rows_of(source: Tensor | Head | None, name: str) -> Rows:
    """The rows of a public source that has logits; name is the argument's, for the error."""
    if isinstance(source, Head):
        return HeadRows(source)
    ok = isinstance(source, Tensor) and source.dim() in (2, 3) and source.dtype in FLOATS
    expect(ok, name, "float32, bfloat16 or float16 logits of shape (N, V) or (B, T, V), or a tip_kernels.Head", source)
    expect(source.shape[-1] > 0, name, "at least one vocabulary entry", source)
    return LogitRows(source)


def _pair_of(student: Rows, teacher: Tensor | Head | TopK | None) -> Pair:
    """The rows of both, which must have the same rows, vocabulary and device.

    Beside a student that holds a shard of the vocabulary, those of a whole teacher are its columns of that shard.
    """
    if isinstance(teacher, TopK):
        ok = student.shard is None
        expect(ok, "teacher", "logits or a Head, since the student's vocab_group shares out the vocabulary", teacher)
        topk = TopKRows(teacher)
        topk.check_vocab(student.vocab)
        _check_rows(student, topk)
        return Pair(student, topk)
    rows_t = rows_of(teacher, "teacher")
    _check_vocabulary(student, rows_t)
    _check_rows(student, rows_t)
    return Pair(student, rows_t.cut(student.shard) if student.shard is not None and rows_t.shard is None else rows_t)


def _check_vocabulary(student: Rows, teacher: Rows) -> None:
    shard_s, shard_t = student.shard, teacher.shard
    if shard_t is not None:
        ok = shard_s is not None and shard_s.group == shard_t.group
        got = "another" if shard_s is not None else "one beside a student without"
        expect(ok, "teacher", "the student's vocab_group, or none", f"{got} vocab_group")
    if student.vocab != teacher.vocab:
        raise ValueError(
            f"teacher: expected the student's vocabulary of {student.vocab} entries, got {teacher.vocab}; where only "
            f"the padding differs, give both heads vocab_size={min(student.vocab, teacher.vocab)} (logits: slice both)"
        )
    if shard_s is not None and shard_t is not None and shard_s.bounds != shard_t.bounds:
        raise ValueError(
            f"teacher: expected its vocabulary cut where the student's is, at tokens {list(shard_s.bounds)}, got "
            f"{list(shard_t.bounds)}"
        )


def _check_rows(student: Rows, teacher: Rows | TopKRows) -> None:
    if student.batch_shape != teacher.batch_shape:
        raise ValueError(f"teacher: expected the student's rows {student.batch_shape}, got {teacher.batch_shape}")
    if student.device != teacher.device:
        raise ValueError(f"teacher: expected the student's device {student.device}, got {teacher.device}")
