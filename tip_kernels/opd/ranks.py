"""The processes of one run: torchrun or accelerate launch starts them, torch.distributed joins them.

Each has rollouts of its own; gradients are averaged by DistributedDataParallel; the first alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tip_kernels.distributed import collectives
from tip_kernels.inspect.usage import UsageError

CPU = torch.device("cpu")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def total(self, numbers: list[float]) -> list[float]:
        """Their sums over all processes."""
        if self.count == 1:
            return numbers
        return collectives.all_reduce_sum_(
            torch.tensor(numbers, dtype=torch.float64, device=self.device), None
        ).tolist()

    def each(self, find: Callable[[], Found]) -> Found:
        """What this process finds by itself; the first UsageError of any process on all."""
        try:
            outcome, trouble = [find()], None
        except UsageError as error:
            outcome, trouble = [], str(error)
        troubles = [trouble] * self.count
        if self.count > 1:
            dist.all_gather_object(troubles, trouble)
        if of_any := [trouble for trouble in troubles if trouble is not None]:
            raise UsageError(of_any[0])
        (found,) = outcome
        return found

    def apart(self, model: Any) -> AbstractContextManager:
        """Inside, gradients of the model add up in this process and are not averaged yet."""
        return model.no_sync() if self.count > 1 else nullcontext()

    def decided(self, decide: Callable[[], Found]) -> Found:
        """What the first process decides, or its UsageError, on all."""
        if self.count == 1:
            return decide()
        said: list[Any] = [None]
        if self.writes:
            try:
                said = [(decide(), None)]
            except UsageError as error:
                said = [(None, str(error))]
        dist.broadcast_object_list(said, src=0, device=self.device)
        found, trouble = said[0]
        if trouble is not None:
            raise UsageError(trouble)
        return found


@contextmanager
def joined(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """This process's place, by the variables that launchers set; one that waits longer for another is an error."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield Ranks(dist.get_rank(), count, device)
    except RuntimeError as error:  # of a collective that DistributedDataParallel made
        if isinstance(error, dist.DistError) or (str(error).startswith("[") and "gloo" in str(error)):
            raise collectives.collective_error(f"average gradients within {timeout_s:g} s", None, error) from error
        raise
    finally:
        dist.destroy_process_group()
