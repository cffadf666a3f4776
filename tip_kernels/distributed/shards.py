"""Which part of a head a rank has: shards of a vocabulary-parallel group, and DTensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, overload

import torch
import torch.distributed as dist
from torch import Tensor

from tip_kernels.distributed.collectives import all_gather_ints

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shard:
    """Which columns of the vocabulary this rank has: [bounds[rank], bounds[rank + 1]), padding cut off.

    Autograd graphs hold shards, and torch aborts a process at whose exit a group is left: so a shard does not keep it.
    """

    group_ref: weakref.ref[ProcessGroup]
    rank: int
    bounds: tuple[int, ...]  # of all ranks, (P + 1,), ascending from 0 to the vocabulary

    @property
    def group(self) -> ProcessGroup:
        group = self.group_ref()
        if group is None:
            raise RuntimeError(
                "tip_kernels: expected the process group of vocab_group until the last backward of its losses, got one "
                "that destroy_process_group() has ended"
            )
        return group

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
    said = [DTYPES.index(hidden.dtype), -1 if vocab_size is None else vocab_size]
    ranks = all_gather_ints([weight.shape[0], *facts, *said], hidden.device, group)
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
    return Shard(weakref.ref(group), dist.get_rank(group), tuple(bounds))


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


@overload
def whole(x: Tensor) -> Tensor: ...
@overload
def whole(x: Tensor | None) -> Tensor | None: ...
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
