"""On-policy distillation in plain PyTorch: sample, choose tokens, learn, repeat."""

from __future__ import annotations

import torch
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

student, teacher = load("student"), load("teacher").eval()
distance = Distance(student, teacher)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student.train()
for step in range(8):
    batch = rollouts(student, prompts(32, seed=100 + step))
    out = distill_batch(student, teacher, batch, select=tip.SoftOr(0.5))
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    kept = int(out.plan.kept_rows) / int((batch["labels"] != -100).sum())
    print(f"step {step}  loss {out.loss.item():.3f}  kept {kept:.0%}  gradient norm {norm:.2f}")
distance.show(student)
