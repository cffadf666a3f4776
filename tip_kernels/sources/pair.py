"""Sources of logits, in memory or made from hidden states; a student and a teacher, checked at the border.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)        without the softcap where it is None

N rows (tokens), R rows of a block, V vocabulary, C columns of a tile, H hidden width. A source that holds a shard of
the vocabulary counts its own columns from 0; its column v is token first + v.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, finite_number, flat_rows, is_int, refuse
from tip_kernels.backends.choice import CHOSEN, backend_for
from tip_kernels.backends.products import mm
from tip_kernels.distributed.collectives import is_group
from tip_kernels.distributed.shards import Shard, own_shard, replicated, shard_of, whole
from tip_kernels.sources.topk import TopK, TopKRows, check_request
from tip_kernels.stats import IGNORE_LABEL, check_label_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PART = 8192  # columns that a program of the Triton fold reads, whose state is kept and sent on its own
# R and C of the largest tile. On a CPU it stays in the second-level cache; elsewhere it must fill the device.
LARGEST = {"cpu": (256, 1024)}
LARGEST_ELSEWHERE = (2048, PART)


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head that is applied tile by tile, so that its logits never exist as a whole.

        z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    A weight that is a DTensor is gathered here, once, and its gradient lands sharded, the mean over the ranks (FSDP2);
    with vocab_group it must be sharded on dim 0 over that group, and is not gathered. Does not synchronise; reading a
    Head with a vocab_group does, once.

    Args:
        hidden: (N, H) or (B, T, H), float32, bfloat16 or float16; the states that predict each row's next token.
        weight: (V, H), hidden's dtype (under autocast both are taken in autocast's dtype).
        bias: (V,) or None.
        scale: Logit scale above 0, as Cohere and Granite models have.
        softcap: Final logit softcapping, as Gemma 2 has; None is none.
        vocab_size: Use the first vocab_size rows of weight and bias (a view), where padding differs between models.
        vocab_group: torch.distributed process group whose ranks hold the same hidden states and, in rank order, each a
            part of weight's and bias's rows (vocabulary-parallel): parts may be uneven or empty, vocab_size is that of
            all of them together, labels are global ids. Every rank makes the same calls, backward included, gets the
            same statistics, rows and loss, the whole gradient of hidden, and that of its own part of weight and bias.
            As a teacher it goes with a student cut at the same tokens; a student's other teachers are whole on every
            rank, which uses its own columns of them.

    Raises:
        ValueError: Naming the argument.
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
        if self.vocab_group is not None and not is_group(self.vocab_group):
            refuse("vocab_group", "a process group that this rank is in, or None", self.vocab_group)
        h, w, b = self.hidden, self.weight, self.bias
        if hasattr(h, "full_tensor") or hasattr(w, "full_tensor") or hasattr(b, "full_tensor"):  # DTensors
            self._take_local()
        self._check_hidden_and_weight()
        self._check_the_rest()

    def _check_hidden_and_weight(self) -> None:
        h, w = self.hidden, self.weight
        if not (isinstance(h, Tensor) and h.dim() in (2, 3) and h.dtype in FLOATS):
            refuse("hidden", "a float32, bfloat16 or float16 tensor of shape (N, H) or (B, T, H)", h)
        if h.shape[-1] == 0:
            refuse("hidden", "a width H of at least 1", h)
        if not (isinstance(w, Tensor) and w.dim() == 2 and w.dtype in FLOATS and w.shape[1] == h.shape[-1]):
            refuse("weight", "a float tensor of shape (V, {})", w, h.shape[-1])
        if w.shape[0] == 0 and self.vocab_group is None:
            refuse("weight", "at least one vocabulary row", w)
        if w.device != h.device:
            refuse("weight", f"a tensor on hidden's device {h.device}", w)
        if w.dtype != h.dtype and not torch.is_autocast_enabled(h.device.type):
            refuse("weight", f"hidden's dtype {h.dtype}", w)

    def _check_the_rest(self) -> None:
        w, b, device = self.weight, self.bias, self.hidden.device
        shaped = b is None or (isinstance(b, Tensor) and b.shape == w.shape[:1])
        if not shaped or (b is not None and (b.dtype not in FLOATS or b.device != device)):
            refuse("bias", "a float tensor of shape ({},) on {}, or None", b, w.shape[0], device)
        if not isinstance(self.scale, float) or not 0.0 < self.scale < math.inf:
            finite_number("scale", self.scale, positive=True)
        if self.softcap is not None:
            finite_number("softcap", self.softcap, positive=True)
        rows, size = self.weight.shape[0], self.vocab_size
        if size is not None and not (is_int(size) and size >= 1 and (size <= rows or self.vocab_group is not None)):
            refuse("vocab_size", "an int from 1 to weight's {} rows", size, rows)

    def _take_local(self) -> None:
        """Puts plain tensors in the place of DTensors; the gradients find their way back."""
        object.__setattr__(self, "hidden", replicated(self.hidden))
        for name in ("weight", "bias"):
            x, group = getattr(self, name), self.vocab_group
            x = whole(x) if group is None else own_shard(name, x, group)
            object.__setattr__(self, name, x)


def is_one_matrix(x: Tensor) -> bool:
    """Whether a (B, T, V) tensor is a view of a (B * T, V) one."""
    return x.shape[0] <= 1 or x.shape[1] <= 1 or x.numel() == 0 or x.stride(0) == x.shape[1] * x.stride(1)


def rows_at(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows b * T + t of an (N, C) or (B, T, C) tensor, (R, C)."""
    if x.dim() == 2:
        return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return x[rows // x.shape[1], rows % x.shape[1]]


class Rows:
    """N rows of logits, in memory or made from hidden states."""

    width = 0  # H of a head
    scale: float = 1.0
    softcap: float | None = None
    leaves: tuple[Tensor, ...]  # what gradients are for

    def __init__(self, tensor: Tensor, vocab: int, shard: Shard | None = None) -> None:
        self.batch_shape = tuple(tensor.shape[:-1])  # (N,) or (B, T)
        self.n_rows, self.device = math.prod(self.batch_shape), tensor.device
        self.place(vocab, shard)

    def place(self, vocab: int, shard: Shard | None) -> None:
        """Says which columns of the vocabulary (that of all ranks) the source has: those of a shard, or all."""
        self.vocab, self.shard = vocab, shard
        self.columns = vocab if shard is None else shard.columns
        self.widest = vocab if shard is None else shard.widest  # columns of the rank that has most
        self.first = 0 if shard is None else shard.first

    def block(self, rows: slice | Tensor) -> Block:
        """Some rows, whose logits are then made tile by tile."""
        raise NotImplementedError

    def weight_tile(self, v0: int, v1: int) -> Tensor | None:
        """Rows v0 to v1 of a head in the dtype the products are taken in, (C, H); None without a head."""
        return None

    def cut(self, shard: Shard) -> Rows:
        """The shard's columns of the same rows, views."""
        raise NotImplementedError

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> Rows:
        """The same rows over other tensors of the same shape, or over none."""
        raise NotImplementedError

    @property
    def in_place(self) -> Tensor | None:
        """The (N, V) logits, where kernels can read them as they lie."""
        return None


class Block:
    """R rows of a source."""

    n_rows: int

    def tile(self, v0: int, v1: int, out: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits of columns v0 to v1, fp32 (R, C), written into out; weight is their weight_tile where it is in memory.

        An empty shard has one column, of banned tokens.
        """
        raise NotImplementedError


class LogitRows(Rows):
    """The rows of a materialized (N, V) matrix of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits, logits.shape[-1])
        if logits.dim() == 3 and is_one_matrix(logits):
            logits = logits.view(-1, self.vocab)
        self._hold(logits)

    def _hold(self, logits: Tensor) -> None:
        self.leaves = (logits,)
        # None: a batch cut in time, whose rows have two strides; flattening it would copy all of it
        self.matrix = logits if logits.dim() == 2 else None

    def block(self, rows: slice | Tensor) -> LogitBlock:
        return LogitBlock(self, rows)

    def cut(self, shard: Shard) -> LogitRows:
        whole = self.leaves[0].view(*self.batch_shape, self.vocab)
        other = LogitRows(whole[..., shard.first : shard.first + shard.columns])
        other.place(self.vocab, shard)
        return other

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> LogitRows:
        other = copy.copy(self)
        if leaves:
            other._hold(*leaves)
        else:
            other.leaves, other.matrix = (), None
        return other

    @property
    def in_place(self) -> Tensor | None:
        return self.matrix if self.matrix is not None and self.matrix.stride(1) == 1 else None


class LogitBlock(Block):
    """R rows of logits in memory."""

    def __init__(self, source: LogitRows, rows: slice | Tensor) -> None:
        self.source = source
        self.rows = rows
        self.n_rows = rows.stop - rows.start if isinstance(rows, slice) else rows.numel()

    def tile(self, v0: int, v1: int, out: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.source.columns == 0:
            return out.fill_(-torch.inf)
        columns = self.source.leaves[0].detach()[..., v0:v1]
        if isinstance(self.rows, Tensor) and columns.dim() == 2 and columns.dtype == torch.float32:
            return torch.index_select(columns, 0, self.rows, out=out)
        return out.copy_(rows_at(columns, self.rows))


class HeadRows(Rows):
    """The rows of a Head: hidden states and the weight that projects them."""

    def __init__(self, head: Head) -> None:
        hidden, weight, bias = head.hidden, head.weight, head.bias
        shard = None
        if head.vocab_group is not None:
            shard = shard_of(hidden, weight, bias, head.vocab_size, head.vocab_group)
        super().__init__(hidden, shard.vocab if shard else head.vocab_size or weight.shape[0], shard)
        self.width = hidden.shape[-1]
        self.scale, self.softcap = float(head.scale), head.softcap
        # A batch cut in time has rows with two strides; flattening it would copy all of it.
        self.hidden = hidden.view(-1, self.width) if hidden.dim() == 3 and is_one_matrix(hidden) else hidden
        self.weight, self.bias = weight, bias
        self.leaves = (self.hidden, weight) if bias is None else (self.hidden, weight, bias)
        autocast = torch.is_autocast_enabled(hidden.device.type)
        self.dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype  # of the products

    def block(self, rows: slice | Tensor) -> HeadBlock:
        return HeadBlock(self, rows)

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> HeadRows:
        other = copy.copy(self)
        other.leaves = leaves
        other.hidden, other.weight, other.bias = (*leaves, None, None, None)[:3]
        return other

    def cut(self, shard: Shard) -> HeadRows:
        part = slice(shard.first, shard.first + shard.columns)
        other = self.with_leaves((self.hidden, *(leaf[part] for leaf in self.leaves[1:])))
        other.place(self.vocab, shard)
        return other

    def weight_tile(self, v0: int, v1: int) -> Tensor:
        """Rows v0 to v1 of the weight in the dtype the products are taken in, (C, H)."""
        return self.operand(self.weight[v0:v1])

    def operand(self, x: Tensor) -> Tensor:
        """What a product takes of x."""
        # A CPU rounds its products of 16-bit operands to 16 bits, fast or not: upcast what the forward would have used.
        x = x.to(self.dtype)
        return x.float() if x.device.type == "cpu" else x


class HeadBlock(Block):
    """R rows of a Head with their hidden states (R, H) gathered once."""

    def __init__(self, source: HeadRows, rows: slice | Tensor) -> None:
        self.source = source
        self.hidden = source.operand(rows_at(source.hidden, rows))
        self.n_rows = self.hidden.shape[0]

    def tile(self, v0: int, v1: int, out: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits of columns v0 to v1, fp32 (R, C), written into out; weight is their weight_tile where it is in memory.

        An empty shard has one column, of banned tokens.
        """
        source = self.source
        if source.columns == 0:
            return out.fill_(-torch.inf)
        weight = source.weight_tile(v0, v1) if weight is None else weight
        if weight.dtype == torch.float32:
            mm(self.hidden, weight.t(), out=out)
        else:
            out.copy_(torch.mm(self.hidden, weight.t(), out_dtype=torch.float32))
        if source.bias is not None:
            out.add_(source.bias[v0:v1].to(source.dtype).float())
        if source.softcap is not None:
            out.mul_(source.scale / source.softcap).tanh_().mul_(source.softcap)
        elif source.scale != 1.0:
            out.mul_(source.scale)
        return out


class Pair:
    """A student, and perhaps a teacher, over the same N rows and V tokens."""

    def __init__(self, student: Rows, teacher: Rows | TopKRows | None = None) -> None:
        self.student, self.teacher = student, teacher
        self.topk = teacher if isinstance(teacher, TopKRows) else None
        self.sources = [student, teacher] if isinstance(teacher, Rows) else [student]  # those with logits
        self.n_rows, self.vocab, self.device, self.shard = student.n_rows, student.vocab, student.device, student.shard
        self.width = student.width if teacher is None else student.width + teacher.width
        # what runs the sweeps, decided here; beside a TopK it is tiled torch everywhere
        eager = "eager" if self.topk is not None else None
        self.backend = eager or CHOSEN.get(self.device.type) or backend_for(self.device)

    def with_leaves(self, student: tuple[Tensor, ...] = (), teacher: tuple[Tensor, ...] = ()) -> Pair:
        """The same over other tensors of the same shapes, or over none."""
        other = copy.copy(self)
        other.student = self.student.with_leaves(student)
        other.teacher = None if self.teacher is None else self.teacher.with_leaves(teacher)
        other.topk = other.teacher if isinstance(other.teacher, TopKRows) else None
        other.sources = [other.student, other.teacher] if isinstance(other.teacher, Rows) else [other.student]
        return other

    def tiling(
        self,
        n_rows: int,
        workspace: int,
        buffers: int,
        *,
        whole_parts: bool = False,
        slice_width: int = 0,
        row_words: int = 0,
    ) -> Tiling:
        """The tiles in which n_rows are walked, see tile_shape."""
        rows, columns = tile_shape(
            n_rows, self.student.widest, self.width, self.device.type, workspace, buffers, whole_parts=whole_parts,
            slice_width=slice_width, row_words=row_words,
        )  # fmt: skip
        parts = [slice(r0, min(r0 + rows, n_rows)) for r0 in range(0, n_rows, rows)]
        places = [torch.empty(rows * columns, device=self.device) for _ in self.sources]
        return Tiling(rows, columns, parts, columns_of(self.student.columns, columns), places)

    def blocks(self, rows: slice | Tensor) -> list[Block]:
        """Some rows of each source with logits."""
        return [source.block(rows) for source in self.sources]

    def weights(self, v0: int, v1: int) -> list[Tensor | None]:
        """Each source's rows v0 to v1 of its head, as `tile` takes them."""
        return [source.weight_tile(v0, v1) for source in self.sources]


class Tiling(NamedTuple):
    """How rows and columns are walked, and where the tiles of logits lie."""

    rows: int  # R
    columns: int  # C
    parts: list[slice]  # the blocks of rows
    slices: list[tuple[int, int]]  # the tiles [v0, v1) that cover the student's columns
    buffers: list[Tensor]  # one of each source, R * C

    def views(self, n_rows: int, v0: int, v1: int) -> list[Tensor]:
        """The buffers as (n_rows, v1 - v0) each."""
        return [buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0) for buffer in self.buffers]

    def tiles(self, blocks: Sequence[Block], weights: Sequence[Tensor | None], v0: int, v1: int) -> list[Tensor]:
        """Logit tiles (R, C) of each source in the buffers, after scale and softcap, at temperature 1."""
        places = self.views(blocks[0].n_rows, v0, v1)
        return [block.tile(v0, v1, place, weight) for block, place, weight in zip(blocks, places, weights, strict=True)]

    def walk(
        self, blocks: Sequence[Block], copies: Sequence[Tensor | None]
    ) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """(v0, each source's tile, room of the same shapes) of a block of rows, column after column.

        copies  (R, V) of each source that its tiles are left in, or None: they lie in the buffers
        """
        for v0, v1 in self.slices or [(0, 1)]:  # an empty shard has one column, of banned tokens
            views = self.views(blocks[0].n_rows, v0, v1)
            places = [view if copy is None else copy[:, v0:v1] for copy, view in zip(copies, views, strict=True)]
            yield v0, [b.tile(v0, v1, place) for b, place in zip(blocks, places, strict=True)], views


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
        rows_follow: bool = False,
    ) -> Request:
        """The request, or a ValueError that names the argument, the form expected and what was given.

        alone allows a student without a teacher; rows_follow leaves values to `check_values`.
        """
        rows_s = rows_of(student, "student")
        pair = Pair(rows_s) if teacher is None and alone else _pair_of(rows_s, teacher)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
            refuse("top_k", "an int of at least 0", top_k)
        if top_k > 0 and teacher is None:
            refuse("top_k", "0 without a teacher", top_k)
        if pair.topk is not None:
            check_request(temperature, margins=margins, top_k=top_k)
        shape, device = rows_s.batch_shape, rows_s.device
        temperature = row_temperature(temperature, shape, device, checked=False)
        if labels is not None:
            labels = flat_rows("labels", labels, shape, (torch.int64,), device).clone()  # the statistics keep it
        if row_mask is not None:
            row_mask = _checked_mask(row_mask, shape, device)
            if row_mask.device.type == "cpu":  # then masked rows are not even measured, whatever they hold
                labels, temperature = _of_rows_in_use(row_mask.to(device), labels, temperature)
        request = cls(pair, labels, temperature, row_mask, rollout_ids, workspace_bytes(workspace_mib), top_k)
        if not rows_follow:
            request.check_values(row_mask)
        return request

    def check_values(self, rows: Tensor | None) -> None:
        """Whether temperatures, labels and a listed teacher are sound in the given rows; on a CPU only."""
        if self.pair.device.type != "cpu":
            return
        if not torch.compiler.is_compiling():  # the compiled op looks at them when it runs
            check_temperatures(self.temperature, rows)
            if self.labels is not None:
                check_label_range(self.labels if rows is None else self.labels[rows], self.pair.vocab)
        if self.pair.topk is not None:
            self.pair.topk.check_values(self.pair.vocab, rows)


def _checked_mask(row_mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) bool, on the device or on a CPU."""
    on_cpu = isinstance(row_mask, Tensor) and row_mask.device.type == "cpu"
    return flat_rows("row_mask", row_mask, shape, (torch.bool,), row_mask.device if on_cpu else device)


def _of_rows_in_use(mask: Tensor, labels: Tensor | None, temperature: float | Tensor) -> tuple[Any, Any]:
    """Labels and temperatures with harmless ones in masked rows."""
    return (
        None if labels is None else labels.where(mask, IGNORE_LABEL),
        temperature.where(mask, 1.0) if isinstance(temperature, Tensor) else temperature,
    )


def rows_of(source: Tensor | Head | None, name: str) -> Rows:
    """The rows of a public source that has logits; name is the argument's, for the error."""
    if isinstance(source, Head):
        return HeadRows(source)
    if not (isinstance(source, Tensor) and source.dim() in (2, 3) and source.dtype in FLOATS):
        form = "float32, bfloat16 or float16 logits of shape (N, V) or (B, T, V), or a tip_kernels.Head"
        refuse(name, form, source)
    if source.shape[-1] == 0:
        refuse(name, "at least one vocabulary entry", source)
    return LogitRows(source)


def _pair_of(student: Rows, teacher: Tensor | Head | TopK | None) -> Pair:
    """The rows of both, which must have the same rows, vocabulary and device.

    Beside a student that holds a shard of the vocabulary, those of a whole teacher are its columns of that shard.
    """
    if isinstance(teacher, TopK):
        if torch.compiler.is_compiling():
            raise ValueError("teacher: expected logits or a Head under torch.compile, got a TopK")
        if student.shard is not None:
            form = "logits or a Head, since the student's vocab_group shares out the vocabulary"
            refuse("teacher", form, teacher)
        topk = TopKRows(teacher)
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
        if not ok:
            refuse("teacher", "the student's vocab_group, or none", f"{got} vocab_group")
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


def row_temperature(
    value: object,
    batch_shape: tuple[int, ...],
    device: torch.device,
    rows: Tensor | None = None,
    *,
    checked: bool = True,
) -> float | Tensor:
    """A temperature as a positive float, or as a detached fp32 (N,) tensor, checked in the given rows."""
    if isinstance(value, float) and 0.0 < value < math.inf:
        return float(value)
    if not isinstance(value, Tensor):
        return finite_number("temperature", value, positive=True)
    flat = flat_rows("temperature", value, batch_shape, FLOATS, device).detach().float().clone()
    if checked and not torch.compiler.is_compiling():  # the compiled op checks when it runs
        check_temperatures(flat, rows)
    return flat


def check_temperatures(value: float | Tensor, rows: Tensor | None) -> None:
    """Refuses temperatures (N,) of the given rows that are no finite number above 0; on a CPU only."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value if rows is None else value[rows]
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            refuse("temperature", "finite values above 0", value)


def workspace_bytes(value: object) -> int:
    """workspace_mib as bytes."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < 1e300:
        return int(value * 2**20)
    number = finite_number("workspace_mib", value)
    if number < 1:
        refuse("workspace_mib", "a number of MiB, at least 1", value)
    return int(number) * 2**20


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
    row_words: int = 0,
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
        row_words: fp32 numbers that are held for each row of a tile.
    """
    rows, columns = LARGEST.get(device, LARGEST_ELSEWHERE)
    rows = min(rows, max(workspace // (8 * row_words), 1)) if row_words else rows
    rows, columns = min(rows, max(n_rows, 1)), min(PART if whole_parts else columns, max(vocab, 1))

    def size(rows: int, columns: int) -> int:
        return 4 * (buffers * rows * columns + (2 * rows + columns) * width + columns * slice_width + rows * row_words)

    while size(rows, columns) > workspace and max(rows, columns) > 16:
        if columns >= rows and not whole_parts:
            columns = (columns + 1) // 2
        elif rows > 1:
            rows = (rows + 1) // 2
        else:
            break
    return rows, columns


def columns_of(vocab: int, columns: int) -> list[tuple[int, int]]:
    """The tiles [v0, v1) that cover the vocabulary."""
    return [(v0, min(v0 + columns, vocab)) for v0 in range(0, vocab, columns)]
