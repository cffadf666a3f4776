"""AdaKD: the hardest tokens by Hellinger distance, fewer of them as the loss falls, a temperature for each."""

from __future__ import annotations

import torch
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

student, teacher = load("student"), load("teacher").eval()
distance = Distance(student, teacher)
focus = tip.AdaptiveFocus(beta=0.5, warmup=2)  # for 8 steps; the paper: 0.99, and 5 % of the run
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student.train()
for step in range(8):
    batch = rollouts(student, prompts(32, seed=100 + step))
    mask = batch["labels"][:, 1:] != -100  # row t predicts token t + 1
    out = distill_batch(student, teacher, batch, divergence=tip.ReverseKL(), **tip.adakd(focus, row_mask=mask))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    focus.update(out.loss)  # once per optimizer step
    print(f"step {step}  loss {out.loss.item():.3f}  share kept from here on {focus.keep:.2f}")
distance.show(student)
