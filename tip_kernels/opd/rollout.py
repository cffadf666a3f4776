"""Sample completions by the model's own `generate`, and the masks that training needs.

What is drawn depends on the weights, the prompts, the settings and the seed alone: `generate` draws from torch's global
generators, so they are forked and seeded around it, and a resumed run samples what an unbroken one would have. A
checkpoint's generation_config, which may cut or bend the distribution, is set aside meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel


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

    def parts(self, size: int) -> list[Rollouts]:
        """The same in runs of so many completions."""
        columns = (self.tokens, self.attention, self.mask, self.ended)
        return [Rollouts(*part) for part in zip(*(column.split(size) for column in columns), strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) token ids with the padding in front, and (B, P) attention, 0 on it."""
    width = max(len(prompt) for prompt in prompts)
    tokens = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attention = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(attention, device=device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    rollouts_per_prompt: int = 1,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Rollouts:
    """Complete every prompt: by sampling at `temperature`, or by the likeliest token where `temperature` is 0.

    model                a transformers model that generates; it runs in eval mode and is left as it was
    prompts              lists of token ids; B is their number times `rollouts_per_prompt`, those of a prompt together
    max_new_tokens       the longest completion; one ends before at the first of `stop_ids`, which belongs to it
    top_p, top_k         draw among the likeliest tokens alone: at most `top_k`, and as many as it takes to reach the
                         probability `top_p`; 0 and 1 are all: the distribution is then softmax(logits / temperature)
    seed                 the same one draws the same; torch's global generators are then as they were. None goes on with
                         these as they are
    vocab_size           only the first so many tokens are drawn
    """
    device = next(model.parameters()).device
    tokens, attention = left_pad(prompts, pad_id, device)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    config = GenerationConfig(
        do_sample=bool(drawn),
        max_new_tokens=max_new_tokens,
        num_return_sequences=rollouts_per_prompt,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **drawn,
    )
    processors = LogitsProcessorList([] if vocab_size is None else [_FirstTokens(vocab_size)])
    with _unbiased(model), nullcontext() if seed is None else _seeded(seed, device):
        tokens = model.generate(  # pyright: ignore[reportCallIssue]  (GenerationMixin's, which causal models have)
            tokens, attention_mask=attention, generation_config=config, logits_processor=processors
        )
    completions = tokens[:, attention.shape[1] :]
    stops = torch.isin(completions, torch.tensor(list(stop_ids), dtype=torch.int64, device=device))
    mask = stops.cumsum(1) - stops.long() == 0  # no stop before it
    attention = attention.repeat_interleave(rollouts_per_prompt, 0)
    return Rollouts(tokens, torch.cat([attention, mask.long()], 1), mask, stops.any(1))


class _FirstTokens(LogitsProcessor):
    """The first `count` logits are all there are."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:, : self.count]


@contextmanager
def _unbiased(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode and without generation settings of its own, such as a top_k or a repetition penalty."""
    training, own = [module for module in model.modules() if module.training], model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators start at `seed`, and the CPU's and a GPU's are afterwards as they were."""
    forked = [] if device.type in ("cpu", "mps") else [device]  # fork_rng cannot fork mps
    with torch.random.fork_rng(forked, device_type=device.type):
        torch.manual_seed(seed)
        yield
