"""The plain loop under accelerate: gradient accumulation, mixed precision and several processes are its settings."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
student, teacher = load("student"), load("teacher").eval().to(accelerator.device)
distance = Distance(student, teacher)
model, optimizer = accelerator.prepare(student.train(), torch.optim.AdamW(student.parameters(), lr=1e-3))
for step in range(12):
    batch = rollouts(accelerator.unwrap_model(model), prompts(16, seed=100 + step))
    with accelerator.accumulate(model), accelerator.autocast():
        loss = distill_batch(model, teacher, batch, select=tip.SoftOr(0.5)).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
distance.show(student)
