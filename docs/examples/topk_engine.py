"""A teacher behind a serving engine: its 8 likeliest tokens of each position, as vLLM returns prompt_logprobs."""

from __future__ import annotations

import torch
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

student, teacher = load("student"), load("teacher").eval()
K = 8


@torch.no_grad()
def ask_engine(tokens: torch.Tensor) -> list[list[dict[int, float] | None]]:
    """In place of a server: over positions, None and then {token id: log-probability}, prompt and answer together."""
    top = teacher(tokens).logits.log_softmax(-1).topk(K)
    pairs = [
        [dict(zip(ids, logp, strict=True)) for ids, logp in zip(ids, logp, strict=True)]
        for ids, logp in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [[None, *positions[:-1]] for positions in pairs]


distance = Distance(student, teacher)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student.train()
for step in range(8):
    batch = rollouts(student, prompts(32, seed=100 + step))
    answer = ask_engine(batch["input_ids"])
    out = distill_batch(student, tip.TopK.from_prompt_logprobs(answer, k=K), batch, select=tip.SoftOr(0.5))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {out.loss.item():.3f}")
distance.show(student)
