"""Rows of logits: what every source of them has, and logits that are in memory.

N rows (tokens), R rows of a block, V vocabulary, C columns of a tile. A source that holds a shard of the vocabulary
counts its own columns from 0; its column v is token first + v.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from tip_kernels.distributed.shards import Shard


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
    hidden: Tensor | None = None  # (R, H) of a head, gathered once

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
