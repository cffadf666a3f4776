"""Two processes, each with rollouts of its own, fill one quota and average their gradients (gloo, on a CPU).

python docs/examples/several_ranks.py            # starts both; under torchrun it joins those that are there
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

RANKS = 2


def work(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    student, teacher = load("student"), load("teacher").eval()
    distance = Distance(student, teacher)
    model = torch.nn.parallel.DistributedDataParallel(student.train())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(6):
        batch = rollouts(student, prompts(16, seed=100 + RANKS * step + rank))
        out = distill_batch(model, teacher, batch, select=tip.SoftOr(0.5, scope="global"))
        (out.loss * RANKS).backward()  # the ranks' losses add up to one; DDP averages gradients
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(RANKS)]
        dist.all_gather(counts, out.plan.kept_rows)
        if rank == 0:
            print(f"step {step}  kept by each rank {[int(count) for count in counts]}", flush=True)
    if rank == 0:
        distance.show(student)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]))
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        torch.multiprocessing.spawn(work, nprocs=RANKS)
