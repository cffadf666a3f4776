"""What the ranks of a process group send each other. All collectives of the package are here.

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
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Fields = dict[Hashable, Tensor]  # (R, ...) of float32 or int64


def is_group(group: object) -> bool:
    """Whether it is a process group that this process belongs to."""
    return dist.is_available() and isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0


@contextmanager
def _collective(what: str, group: ProcessGroup | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise collective_error(what, group, error) from error


def collective_error(what: str, group: ProcessGroup | None, error: RuntimeError) -> RuntimeError:
    """What to raise where a collective failed."""
    return RuntimeError(
        f"tip_kernels: rank {dist.get_rank(group)} of {dist.get_world_size(group)} could not {what}: another rank "
        "died, raised an error of its own, made another call, or came later than the group's time-out "
        f"(init_process_group(timeout=...)): {error}"
    )


def all_gather_async(x: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
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


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(P, *x.shape): x of every rank, which has the same shape on all."""
    return all_gather_async(x, group)()


def all_reduce_sum_(x: Tensor, group: ProcessGroup | None) -> Tensor:
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
    return x if n_ranks(group) == 1 else all_reduce_sum_(x.double(), group).to(x.dtype)


def broadcast(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The first rank's x, which has the same shape on all."""
    if n_ranks(group) > 1 and x.numel():
        with _collective(f"hear {x.numel() * x.element_size()} bytes of the first", group):
            dist.broadcast(x, group=group, group_src=0)
    return x


def all_gather_rows(columns: list[Tensor], request: str, group: ProcessGroup | None) -> tuple[list[Tensor], slice]:
    """The rows of all ranks, one rank's after the other's, and which are this one's.

    columns  (N,) fp32, bool or int64 each, N being any number, also 0, on any rank
    request  what is gathered for, in words: an error on every rank where not all have the same

    Synchronises: how many rows there are decides the shapes.
    """
    if n_ranks(group) == 1:
        return columns, slice(None)
    n_rows, device = columns[0].numel(), columns[0].device
    ranks = all_gather_ints([n_rows, len(columns), zlib.crc32(request.encode())], device, group)
    if len({(width, sort) for _, width, sort in ranks}) > 1:
        raise ValueError(f"scope: expected 'global' selections of one kind on all ranks, got on this one {request}")
    counts = [rank[0] for rank in ranks]
    widths = [x.element_size() // 4 or 1 for x in columns]
    words = [x.int() if x.dtype == torch.bool else x.contiguous().view(torch.int32) for x in columns]
    words = [x.view(n_rows, width) for x, width in zip(words, widths, strict=True)]
    padded = words[0].new_zeros(max(counts), sum(widths))
    padded[:n_rows] = torch.cat(words, 1)
    rows = torch.cat([part[:count] for part, count in zip(all_gather(padded, group), counts, strict=True)])
    found = []
    for x, part in zip(columns, rows.split(widths, 1), strict=True):
        part = part.contiguous().flatten()
        found.append(part.bool() if x.dtype == torch.bool else part.view(x.dtype))
    first = sum(counts[: dist.get_rank(group)])
    return found, slice(first, first + n_rows)


def all_gather_ints(numbers: Sequence[int], device: torch.device, group: ProcessGroup | None) -> list[list[int]]:
    """The numbers that every rank tells, as many as here, in rank order. Synchronises."""
    return all_gather(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()


def gather_states(mine: list[Fields], group: ProcessGroup | None) -> Callable[[], list[list[Fields]]]:
    """Begins to gather the fields of every rank by one collective, and returns what waits for them, in rank order.

    All ranks have the same names and shapes. What is computed before the wait hides the collective.
    """
    flat = [x.contiguous() for fields in mine for x in fields.values()]
    words = [x.view(torch.int32).flatten() for x in flat]
    gathered = all_gather_async(torch.cat(words), group)

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
