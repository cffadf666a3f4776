"""Past one device: what the ranks of a process group tell each other. All collectives of the package are here.

    vocabulary-parallel   ranks hold the same rows and a shard of the head each: states of the accumulator, d(hidden)
    data-parallel         ranks hold rows of their own: what a rule with scope "global" reads, and counts

Results are the same bits on every rank: what is gathered is merged in rank order. A rank that dies, or that does not
come before the group's time-out (init_process_group(timeout=...)), is a RuntimeError on the others, never a hang.

P ranks, R rows of a block.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tip_kernels._checks import FLOATS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Fields = dict[Hashable, Tensor]  # (R, ...) of float32 or int64


@dataclass(frozen=True)
class Shard:
    """Which columns of the vocabulary this rank has: [bounds[rank], bounds[rank + 1]), padding cut off."""

    group: ProcessGroup
    rank: int
    bounds: tuple[int, ...]  # of all ranks, (P + 1,), ascending from 0 to the vocabulary

    @property
    def first(self) -> int:
        return self.bounds[self.rank]

    @property
    def columns(self) -> int:
        return self.bounds[self.rank + 1] - self.first

    @property
    def vocab(self) -> int:
        return self.bounds[-1]

    @property
    def widest(self) -> int:
        """Columns of the rank that has most: what shapes common to all ranks are made from."""
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))


def shard_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None, group: ProcessGroup) -> Shard:
    """The shard that this rank's weight is; every rank sees what all have, and raises the same error. Synchronises."""
    if torch.compiler.is_compiling():
        raise ValueError("vocab_group: expected None under torch.compile, whose ops hold no process group")
    facts = [*hidden.shape, *[0] * (3 - hidden.dim()), int(hidden.requires_grad), int(bias is not None)]
    said = [FLOATS.index(hidden.dtype), -1 if vocab_size is None else vocab_size]
    ranks = told([weight.shape[0], *facts, *said], hidden.device, group)
    names = ("shape", "shape", "shape", "requires_grad", "bias", "dtype", "vocab_size")
    for name, values in zip(names, list(zip(*ranks, strict=True))[1:], strict=True):
        if len(set(values)) > 1:
            what = f"the same {name} of the head" if name in ("bias", "vocab_size") else f"hidden of the same {name}"
            raise ValueError(f"vocab_group: expected {what} on all ranks, got {list(values)} by rank")
    rows = [rank[0] for rank in ranks]
    vocab = sum(rows) if vocab_size is None else vocab_size
    if vocab > sum(rows):
        raise ValueError(
            f"vocab_size: expected an int from 1 to the {sum(rows)} weight rows of all ranks, got {vocab_size}"
        )
    if vocab == 0:
        raise ValueError("weight: expected at least one vocabulary row on any rank, got none")
    bounds = [0]
    for count in rows:
        bounds.append(min(bounds[-1] + count, vocab))
    return Shard(group, dist.get_rank(group), tuple(bounds))


def is_group(group: object) -> bool:
    """Whether it is a process group that this process belongs to."""
    known = dist.is_available() and isinstance(group, dist.ProcessGroup)
    return known and dist.get_rank(group) >= 0


# ---- DTensor


def is_dtensor(x: object) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def whole(x: Tensor | None) -> Tensor | None:
    """The whole of a DTensor, gathered here and now; any other tensor as it is.

    Its gradient is the mean over the ranks and lands sharded, as FSDP2 has it for other weights. Where the ranks hold
    the same rows (tensor parallel) that mean is each rank's own.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def own_shard(name: str, x: Tensor | None, group: ProcessGroup) -> Tensor | None:
    """This rank's rows of a DTensor that is sharded on dim 0 over the group; any other tensor as it is."""
    if not is_dtensor(x):
        return x
    mesh, split = x.device_mesh, [i for i, p in enumerate(x.placements) if not p.is_replicate()]
    ok = len(split) == 1 and x.placements[split[0]].is_shard(0)
    ok = ok and dist.get_process_group_ranks(mesh.get_group(split[0])) == dist.get_process_group_ranks(group)
    if not ok:
        raise ValueError(
            f"{name}: expected a DTensor sharded on dim 0 over the ranks of vocab_group "
            f"{dist.get_process_group_ranks(group)} and nothing else, got placements {x.placements} on {mesh}"
        )
    return x.to_local(grad_placements=x.placements)


def replicated(x: Tensor) -> Tensor:
    """The rows of a DTensor of which every rank has all; any other tensor as it is."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"hidden: expected a plain tensor, or a DTensor that is replicated, got placements {x.placements}; "
            "hidden.to_local() gives this rank's rows"
        )
    return x.to_local(grad_placements=x.placements)


# ---- collectives


@contextmanager
def _collective(what: str, group: ProcessGroup | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise lost(what, group, error) from error


def lost(what: str, group: ProcessGroup | None, error: RuntimeError) -> RuntimeError:
    """What to raise where a collective failed."""
    return RuntimeError(
        f"tip_kernels: rank {dist.get_rank(group)} of {dist.get_world_size(group)} could not {what}: another rank "
        "died, raised an error of its own, made another call, or came later than the group's time-out "
        f"(init_process_group(timeout=...)): {error}"
    )


def gathering(x: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Begins to gather x, which has the same shape on all ranks, and returns what waits for it: (P, *x.shape)."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    what, work = f"gather {x.numel() * x.element_size()} bytes of every rank", None
    if x.numel():
        with _collective(what, group):
            work = dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group, async_op=True)

    def gathered() -> Tensor:
        if work is not None:
            with _collective(what, group):
                work.wait()
        return out

    return gathered


def all_gathered(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(P, *x.shape): x of every rank, which has the same shape on all."""
    return gathering(x, group)()


def added_up(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x, in place the sum over the ranks; the same bits on all."""
    if x.numel():
        with _collective(f"add up {x.numel() * x.element_size()} bytes", group):
            dist.all_reduce(x, group=group)
    return x


def n_ranks(group: ProcessGroup | None) -> int:
    """How many ranks a group has, None being all of them; 1 where torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone:
        raise ValueError(
            f"scope: expected torch.distributed.init_process_group before 'global', as WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}, got none"
        )
    return 1


def total(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of x over the ranks, in float64 on the way."""
    return x if n_ranks(group) == 1 else added_up(x.double(), group).to(x.dtype)


def first_says(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The first rank's x, which has the same shape on all."""
    if n_ranks(group) > 1 and x.numel():
        with _collective(f"hear {x.numel() * x.element_size()} bytes of the first", group):
            dist.broadcast(x, group=group, group_src=0)
    return x


def concatenated(columns: list[Tensor], request: str, group: ProcessGroup | None) -> tuple[list[Tensor], slice]:
    """The rows of all ranks, one rank's after the other's, and which are this one's.

    columns  (N,) fp32, bool or int64 each, N being any number, also 0, on any rank
    request  what is gathered for, in words: an error on every rank where not all have the same

    Synchronises: how many rows there are decides the shapes.
    """
    if n_ranks(group) == 1:
        return columns, slice(None)
    n_rows, device = columns[0].numel(), columns[0].device
    ranks = told([n_rows, len(columns), zlib.crc32(request.encode())], device, group)
    if len({(width, sort) for _, width, sort in ranks}) > 1:
        raise ValueError(f"scope: expected 'global' selections of one kind on all ranks, got on this one {request}")
    counts = [rank[0] for rank in ranks]
    widths = [x.element_size() // 4 or 1 for x in columns]
    words = [x.int() if x.dtype == torch.bool else x.contiguous().view(torch.int32) for x in columns]
    words = [x.view(n_rows, width) for x, width in zip(words, widths, strict=True)]
    padded = words[0].new_zeros(max(counts), sum(widths))
    padded[:n_rows] = torch.cat(words, 1)
    rows = torch.cat([part[:count] for part, count in zip(all_gathered(padded, group), counts, strict=True)])
    found = []
    for x, part in zip(columns, rows.split(widths, 1), strict=True):
        part = part.contiguous().flatten()
        found.append(part.bool() if x.dtype == torch.bool else part.view(x.dtype))
    first = sum(counts[: dist.get_rank(group)])
    return found, slice(first, first + n_rows)


def told(numbers: Sequence[int], device: torch.device, group: ProcessGroup | None) -> list[list[int]]:
    """The numbers that every rank tells, as many as here, in rank order. Synchronises."""
    return all_gathered(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()


def merging(mine: list[Fields], shard: Shard | None) -> Callable[[], list[list[Fields]]]:
    """Begins to gather the fields of every rank by one collective, and returns what waits for them, in rank order.

    All ranks have the same names and shapes. What is computed before the wait hides the collective.
    """
    if shard is None:
        return lambda: [mine]
    flat = [x.contiguous() for fields in mine for x in fields.values()]
    words = [x.view(torch.int32).flatten() for x in flat]
    gathered = gathering(torch.cat(words), shard.group)

    def merged() -> list[list[Fields]]:
        ranks = []
        for row in gathered():
            parts = iter(row.split([w.numel() for w in words]))
            shapes = iter(flat)
            ranks.append([{name: _like(next(shapes), next(parts)) for name in fields} for fields in mine])
        return ranks

    return merged


def _like(x: Tensor, words: Tensor) -> Tensor:
    """The words as a tensor of x's shape and dtype."""
    return words.clone().view(x.dtype).view(x.shape)
