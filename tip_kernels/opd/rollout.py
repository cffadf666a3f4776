"""Sample completions from a model with a KV cache.

A loop of our own, not `generate`: it draws from a generator that is handed in, so a resumed run samples what an
unbroken one would have, and it returns the masks that training needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rollouts:
    """B completions of at most L tokens after prompts that are left-padded to P tokens."""

    tokens: Tensor  # (B, P+L) int64
    attention: Tensor  # (B, P+L) int64: 0 on padding before the prompt and after the end
    mask: Tensor  # (B, L) bool: the completion's own tokens, the one that ends it included
    ended: Tensor  # (B,) bool: it ended by a stop token, not by running out of length

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.mask.shape[1]

    @property
    def completions(self) -> Tensor:
        """(B, L) int64."""
        return self.tokens[:, self.prompt_width :]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) token ids with the padding in front, and (B, P) attention, 0 on it."""
    width = max(len(prompt) for prompt in prompts)
    tokens = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attention = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(attention, device=device)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Complete every prompt: by sampling at `temperature`, or by the likeliest token where `temperature` is 0.

    `prompts` are B lists of token ids. A completion runs to the first of `stop_ids`, which belongs to it, or to
    `max_new_tokens`. Only the first `vocab_size` tokens are drawn, where it is given. Synchronises once a token, to
    stop when all have ended.
    """
    device = next(model.parameters()).device
    tokens, attention = left_pad(prompts, pad_id, device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    alive = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
    positions = (attention.cumsum(1) - 1).clamp_min(0)
    takes = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    step, cache, masks = tokens, None, []
    for _ in range(max_new_tokens):
        out = model(
            input_ids=step,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache, logits = out.past_key_values, out.logits[:, -1, :vocab_size].float()
        if temperature == 0:
            step = logits.argmax(-1, keepdim=True)
        else:
            step = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        step = torch.where(alive, step, pad_id)
        masks.append(alive)
        tokens = torch.cat([tokens, step], 1)
        attention = torch.cat([attention, alive.long()], 1)
        positions = positions[:, -1:] + 1
        alive = alive & ~torch.isin(step, stops)
        if not alive.any():
            break
    return Rollouts(tokens, attention, torch.cat(masks, 1), ~alive[:, 0])
