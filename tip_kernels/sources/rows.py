"""Where logits come from: the only place that turns hidden states into logit tiles.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)        without the softcap where it is None

N rows (tokens), R rows of a block, V vocabulary, C columns of a tile, H hidden width. A source that holds a shard of
the vocabulary counts its own columns from 0; its column v is token first + v.
"""

from __future__ import annotations

import copy
import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, is_int
from tip_kernels.distributed import collectives as parallel
from tip_kernels.sources.topk import TopK, TopKRows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head that is applied tile by tile, so that its logits never exist as a whole.

        z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    hidden      (N, H) or (B, T, H), float32, bfloat16 or float16; the states that predict each row's next token
    weight      (V, H), hidden's dtype (under autocast both are taken in autocast's dtype)
    bias        (V,) or None
    scale       logit scale above 0, as Cohere and Granite models have
    softcap     final logit softcapping, as Gemma 2 has; None is none
    vocab_size  use the first vocab_size rows of weight and bias (a view), where padding differs between models
    vocab_group torch.distributed process group whose ranks hold the same hidden states and, in rank order, each a part
                of weight's and bias's rows (vocabulary-parallel): parts may be uneven or empty, vocab_size is that of
                all of them together, labels are global ids. Every rank makes the same calls, backward included, gets
                the same statistics, rows and loss, the whole gradient of hidden, and that of its own part of weight
                and bias. As a teacher it goes with a student cut at the same tokens; a student's other teachers
                are whole on every rank, which uses its own columns of them

    A weight that is a DTensor is gathered here, once, and its gradient lands sharded, the mean over the ranks (FSDP2);
    with vocab_group it must be sharded on dim 0 over that group, and is not gathered.

    Raises ValueError naming the argument. Does not synchronise; reading a Head with a vocab_group does, once.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    vocab_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if (group := self.vocab_group) is not None:
            expect(parallel.is_group(group), "vocab_group", "a process group that this rank is in, or None", group)
        if any(parallel.is_dtensor(x) for x in (self.hidden, self.weight, self.bias)):
            self._take_local()
        h, w, b = self.hidden, self.weight, self.bias
        ok = isinstance(h, Tensor) and h.dim() in (2, 3) and h.dtype in FLOATS
        expect(ok, "hidden", "a float32, bfloat16 or float16 tensor of shape (N, H) or (B, T, H)", h)
        expect(h.shape[-1] > 0, "hidden", "a width H of at least 1", h)
        ok = isinstance(w, Tensor) and w.dim() == 2 and w.dtype in FLOATS and w.shape[1] == h.shape[-1]
        expect(ok, "weight", "a float tensor of shape (V, {})", w, h.shape[-1])
        expect(w.shape[0] > 0 or group is not None, "weight", "at least one vocabulary row", w)
        expect(w.device == h.device, "weight", f"a tensor on hidden's device {h.device}", w)
        autocast = torch.is_autocast_enabled(h.device.type)
        expect(w.dtype == h.dtype or autocast, "weight", f"hidden's dtype {h.dtype}", w)
        if b is not None:
            ok = isinstance(b, Tensor) and b.shape == w.shape[:1] and b.dtype in FLOATS and b.device == h.device
            expect(ok, "bias", "a float tensor of shape ({},) on {}, or None", b, w.shape[0], h.device)
        finite_number("scale", self.scale, positive=True)
        if self.softcap is not None:
            finite_number("softcap", self.softcap, positive=True)
        if (v := self.vocab_size) is not None:
            ok = is_int(v) and v >= 1 and (v <= w.shape[0] or group is not None)
            expect(ok, "vocab_size", "an int from 1 to weight's {} rows", v, w.shape[0])

    def _take_local(self) -> None:
        """Puts plain tensors in the place of DTensors; the gradients find their way back."""
        object.__setattr__(self, "hidden", parallel.replicated(self.hidden))
        for name in ("weight", "bias"):
            x, group = getattr(self, name), self.vocab_group
            x = parallel.whole(x) if group is None else parallel.own_shard(name, x, group)
            object.__setattr__(self, name, x)


def _collapses(x: Tensor) -> bool:
    """Whether a (B, T, V) tensor is a view of a (B * T, V) one."""
    return x.shape[0] <= 1 or x.shape[1] <= 1 or x.numel() == 0 or x.stride(0) == x.shape[1] * x.stride(1)


def _taken(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows b * T + t of an (N, C) or (B, T, C) tensor, (R, C)."""
    if x.dim() == 2:
        return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return x[rows // x.shape[1], rows % x.shape[1]]


class _Columns:
    """Which columns of a vocabulary a source has: those of a shard, or all."""

    vocab: int  # of all ranks
    shard: parallel.Shard | None = None

    @property
    def columns(self) -> int:
        return self.vocab if self.shard is None else self.shard.columns

    @property
    def widest(self) -> int:
        """The columns of the rank that has most."""
        return self.vocab if self.shard is None else self.shard.widest

    @property
    def first(self) -> int:
        return 0 if self.shard is None else self.shard.first


class LogitRows(_Columns):
    """The rows of a materialised (N, V) matrix of logits."""

    scale, softcap, width = 1.0, None, 0

    def __init__(self, logits: Tensor) -> None:
        self.batch_shape = tuple(logits.shape[:-1])
        self.vocab = logits.shape[-1]
        self.n_rows, self.device = math.prod(self.batch_shape), logits.device
        if logits.dim() == 3 and _collapses(logits):
            logits = logits.view(-1, self.vocab)
        self._hold(logits)

    def _hold(self, logits: Tensor) -> None:
        self.leaves = (logits,)
        # None: a batch cut in time, whose rows have two strides; flattening it would copy all of it
        self.matrix = logits if logits.dim() == 2 else None

    def block(self, rows: slice | Tensor) -> LogitBlock:
        return LogitBlock(self, rows)

    def cut(self, shard: parallel.Shard) -> LogitRows:
        """The shard's columns of the same rows, views."""
        other = LogitRows(
            self.leaves[0].view(*self.batch_shape, self.vocab)[..., shard.first : shard.first + shard.columns]
        )
        other.vocab, other.shard = self.vocab, shard
        return other

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> LogitRows:
        """The same rows over other tensors of the same shape, or over none."""
        other = copy.copy(self)
        if leaves:
            other._hold(*leaves)
        else:
            other.leaves, other.matrix = (), None
        return other


class LogitBlock:
    def __init__(self, source: LogitRows, rows: slice | Tensor) -> None:
        self.source = source
        self.rows = rows
        self.n_rows = rows.stop - rows.start if isinstance(rows, slice) else rows.numel()

    def tile(self, v0: int, v1: int, out: Tensor, weight: None = None) -> Tensor:
        """Logits of columns v0 to v1, fp32 (R, C), written into out; an empty shard has one, of banned tokens."""
        if self.source.columns == 0:
            return out.fill_(-torch.inf)
        columns = self.source.leaves[0].detach()[..., v0:v1]
        if isinstance(self.rows, Tensor) and columns.dim() == 2 and columns.dtype == torch.float32:
            return torch.index_select(columns, 0, self.rows, out=out)
        return out.copy_(_taken(columns, self.rows))


class HeadRows(_Columns):
    """The rows of a Head: hidden states and the weight that projects them."""

    def __init__(self, head: Head) -> None:
        self.batch_shape = tuple(head.hidden.shape[:-1])
        self.width = head.hidden.shape[-1]
        if head.vocab_group is None:
            self.vocab = head.vocab_size or head.weight.shape[0]
        else:
            self.shard = parallel.shard_of(head.hidden, head.weight, head.bias, head.vocab_size, head.vocab_group)
            self.vocab = self.shard.vocab
        hidden = head.hidden
        # A batch cut in time has rows with two strides; flattening it would copy all of it.
        self.hidden = hidden.view(-1, self.width) if hidden.dim() == 3 and _collapses(hidden) else hidden
        self.weight, self.bias = head.weight, head.bias
        self.scale, self.softcap = float(head.scale), head.softcap
        self.leaves = (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)
        device = head.hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else head.hidden.dtype

    @property
    def n_rows(self) -> int:
        return math.prod(self.batch_shape)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def block(self, rows: slice | Tensor) -> HeadBlock:
        return HeadBlock(self, rows)

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> HeadRows:
        """The same rows over other tensors of the same shape, or over none."""
        other = copy.copy(self)
        other.leaves = leaves
        other.hidden, other.weight, other.bias = (*leaves, None, None, None)[:3]
        return other

    def cut(self, shard: parallel.Shard) -> HeadRows:
        """The same rows over the shard's part of the head, views."""
        part = slice(shard.first, shard.first + shard.columns)
        other = self.with_leaves((self.hidden, *(leaf[part] for leaf in self.leaves[1:])))
        other.shard = shard
        return other

    def weight_tile(self, v0: int, v1: int) -> Tensor:
        """Rows v0 to v1 of the weight in the dtype the products are taken in, (C, H)."""
        return self._operand(self.weight[v0:v1])

    def _operand(self, x: Tensor) -> Tensor:
        # CPU products of 16-bit operands are slow and cannot come out in fp32: upcast what the forward would have used.
        x = x.to(self.dtype)
        return x.float() if x.device.type == "cpu" else x


class HeadBlock:
    """R rows of a Head with their hidden states gathered once."""

    def __init__(self, source: HeadRows, rows: slice | Tensor) -> None:
        hidden = _taken(source.hidden, rows)
        self.source = source
        self.hidden = source._operand(hidden)
        self.n_rows = hidden.shape[0]

    def tile(self, v0: int, v1: int, out: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits of columns v0 to v1, fp32 (R, C), written into out; weight is their weight_tile where at hand.

        An empty shard has one column, of banned tokens.
        """
        source = self.source
        if source.columns == 0:
            return out.fill_(-torch.inf)
        weight = source.weight_tile(v0, v1) if weight is None else weight
        if weight.dtype == torch.float32:
            torch.mm(self.hidden, weight.t(), out=out)
        else:
            out.copy_(torch.mm(self.hidden, weight.t(), out_dtype=torch.float32))
        if source.bias is not None:
            out.add_(source.bias[v0:v1].to(source.dtype).float())
        if source.softcap is not None:
            out.mul_(source.scale / source.softcap).tanh_().mul_(source.softcap)
        elif source.scale != 1.0:
            out.mul_(source.scale)
        return out


Rows = LogitRows | HeadRows


def rows_of(source: Tensor | Head, name: str) -> Rows:
    """The rows of a public source that has logits; name is the argument's, for the error."""
    if isinstance(source, Head):
        return HeadRows(source)
    ok = isinstance(source, Tensor) and source.dim() in (2, 3) and source.dtype in FLOATS
    expect(ok, name, "float32, bfloat16 or float16 logits of shape (N, V) or (B, T, V), or a tip_kernels.Head", source)
    expect(source.shape[-1] > 0, name, "at least one vocabulary entry", source)
    return LogitRows(source)


def teacher_rows(source: Tensor | Head | TopK) -> Rows | TopKRows:
    """The rows of a teacher."""
    return TopKRows(source) if isinstance(source, TopK) else rows_of(source, "teacher")


def pair_of(student: Tensor | Head, teacher: Tensor | Head | TopK) -> tuple[Rows, Rows | TopKRows]:
    """The rows of both sources, which must have the same rows, vocabulary and device.

    Beside a student that holds a shard of the vocabulary, those of a whole teacher are its columns of that shard.
    """
    rows_s, rows_t = rows_of(student, "student"), teacher_rows(teacher)
    _check_pair(rows_s, rows_t)
    if rows_s.shard is not None and rows_t.shard is None:
        rows_t = rows_t.cut(rows_s.shard)
    return rows_s, rows_t


def _check_pair(student: Rows, teacher: Rows | TopKRows) -> None:
    shard_s, shard_t = student.shard, None if isinstance(teacher, TopKRows) else teacher.shard
    ok = shard_s is None or not isinstance(teacher, TopKRows)
    expect(ok, "teacher", "logits or a Head, since the student's vocab_group shares out the vocabulary", teacher)
    if shard_t is not None:
        ok = shard_s is not None and shard_s.group == shard_t.group
        got = "another" if shard_s is not None else "one beside a student without"
        expect(ok, "teacher", "the student's vocab_group, or none", f"{got} vocab_group")
    if isinstance(teacher, TopKRows):
        teacher.check_vocab(student.vocab)
    elif student.vocab != teacher.vocab:
        raise ValueError(
            f"teacher: expected the student's vocabulary of {student.vocab} entries, got {teacher.vocab}; where only "
            f"the padding differs, give both heads vocab_size={min(student.vocab, teacher.vocab)} (logits: slice both)"
        )
    elif shard_t is not None and shard_s.bounds != shard_t.bounds:
        raise ValueError(
            f"teacher: expected its vocabulary cut where the student's is, at tokens {list(shard_s.bounds)}, got "
            f"{list(shard_t.bounds)}"
        )
    same = student.batch_shape == teacher.batch_shape
    if not same:
        raise ValueError(f"teacher: expected the student's rows {student.batch_shape}, got {teacher.batch_shape}")
    if student.device != teacher.device:
        raise ValueError(f"teacher: expected the student's device {student.device}, got {teacher.device}")
