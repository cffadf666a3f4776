"""Logits made from hidden states: the only place where they are.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)        without the softcap where it is None

N rows (tokens), R rows of a block, V vocabulary, C columns of a tile, H hidden width. A source that holds a shard of
the vocabulary counts its own columns from 0; its column v is token first + v.
"""

from __future__ import annotations

import copy
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, is_int
from tip_kernels.distributed.collectives import is_group
from tip_kernels.distributed.shards import Shard, is_dtensor, own_shard, replicated, shard_of, whole
from tip_kernels.sources.logits import Block, Rows, is_one_matrix, rows_at

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
            expect(is_group(group), "vocab_group", "a process group that this rank is in, or None", group)
        if any(is_dtensor(x) for x in (self.hidden, self.weight, self.bias)):
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
        object.__setattr__(self, "hidden", replicated(self.hidden))
        for name in ("weight", "bias"):
            x, group = getattr(self, name), self.vocab_group
            x = whole(x) if group is None else own_shard(name, x, group)
            object.__setattr__(self, name, x)


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
        # CPU products of 16-bit operands are slow and cannot come out in fp32: upcast what the forward would have used.
        x = x.to(self.dtype)
        return x.float() if x.device.type == "cpu" else x


class HeadBlock(Block):
    """R rows of a Head with their hidden states gathered once."""

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
