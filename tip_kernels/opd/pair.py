"""A teacher and a student of one vocabulary, loaded from two checkpoint folders.

Only ordinary transformers checkpoints in safetensors are read; no code from a checkpoint is run. A model is split into
the backbone, whose hidden states we differentiate through, and the output head, by hooks/transformers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tip_kernels._checks import not_none
from tip_kernels.hooks.transformers import head_of
from tip_kernels.inspect.usage import UsageError
from tip_kernels.opd import smollm2, weights
from tip_kernels.opd.data import Prompt
from tip_kernels.opd.rollout import sample
from tip_kernels.sources.pair import Head


@dataclass(frozen=True)
class Side:
    """One model and how much of its vocabulary both share."""

    model: PreTrainedModel  # or DDP around it, whose forward is the same
    vocab_size: int | None = None
    takes_positions: bool = True  # as position_ids; some models count for themselves

    @property
    def tokens(self) -> int:
        """How many tokens the head tells apart."""
        return self.vocab_size or not_none(self.model.get_output_embeddings()).weight.shape[0]

    def head(self, tokens: Tensor, attention: Tensor, first: int = 0) -> Head:
        """The logits from place `first` on, unformed; tokens (B, T) are left-padded, attention (B, T) is 0 there."""
        positions = {"position_ids": (attention.cumsum(1) - 1).clamp_min(0)} if self.takes_positions else {}
        return head_of(
            self.model,
            input_ids=tokens,
            attention_mask=attention,
            vocab_size=self.vocab_size,
            logits_to_keep=slice(first, None),
            **positions,
        )


@dataclass(frozen=True)
class Pair:
    """Teacher, student, and the tokenizer both agree on."""

    teacher: Side
    student: Side
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]  # tokens that end a completion
    pad_id: int
    longest: int  # positions that both models have

    def encode(self, prompts: Sequence[Prompt], chat: bool = False) -> list[list[int]]:
        """Token ids of each prompt; a prompt that the vocabulary cannot write is an error.

        Messages, and with `chat` texts, too, are wrapped in the tokenizer's chat template.
        """
        encoded = []
        for prompt in prompts:
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if chat else None
            if turns and not self.tokenizer.chat_template:
                option = "--chat" if isinstance(prompt, str) else "--task"
                raise UsageError(
                    f"argument {option}: expected a tokenizer with a chat template beside prompts that need one,"
                    f" got none in the student's files and {prompt!r}"
                )
            try:
                text = prompt
                if turns:
                    text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
                ids = self.tokenizer(str(text), add_special_tokens=not turns)["input_ids"]
            except Exception as error:  # tokenizers raises bare Exceptions
                raise UsageError(
                    f"argument --task: expected prompts that the vocabulary can write, got {prompt!r} ({error})"
                ) from None
            if not ids:
                raise UsageError(f"argument --task: expected prompts of at least one token, got {prompt!r}")
            if max(ids) >= self.student.tokens:
                raise UsageError(
                    f"argument --task: expected prompts of the models' {self.student.tokens} tokens,"
                    f" got {prompt!r}, which has token {max(ids)}"
                )
            encoded.append(ids)
        return encoded


def load_pair(teacher: Path | str, student: Path | str, device: torch.device, resumed: Path | None = None) -> Pair:
    """Load both models in fp32 and check that they can be distilled; `resumed` holds the student's later weights.

    Each is the folder of a checkpoint, or a name that smollm2.py knows.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models, tokenizers, whole = {}, {}, None
    for name, source in (("teacher", teacher), ("student", student)):
        later = resumed if name == "student" else None
        layers = smollm2.layers_of(source) if isinstance(source, str) else None
        if layers is None:
            models[name], tokenizers[name] = _checkpoint(name, Path(source), later)
        elif later:
            models[name], tokenizers[name] = _checkpoint(name, later)
        else:
            whole = whole or smollm2.read()
            models[name], tokenizers[name] = smollm2.first_layers(whole[0], layers), whole[1]
        models[name].to(device).eval().requires_grad_(name == "student")
    if tokenizers["teacher"].get_vocab() != tokenizers["student"].get_vocab():
        raise UsageError(
            f"argument --teacher: expected the student's vocabulary ({len(tokenizers['student'])} tokens, {student}),"
            f" got another ({len(tokenizers['teacher'])} tokens, {teacher})"
        )
    rows = {model.config.get_text_config().vocab_size for model in models.values()}
    shared = min(rows) if len(rows) == 2 else None  # heads padded to different sizes
    sides = {name: _side(name, model, shared) for name, model in models.items()}
    tokenizer = tokenizers["student"]
    stop_ids = _stop_ids(models["student"], tokenizer)
    pad_id = _pad_id(tokenizer, stop_ids, min(rows))
    limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models.values()]
    longest = min((limit for limit in limits if limit), default=2**31)
    return Pair(sides["teacher"], sides["student"], tokenizer, stop_ids, pad_id, longest)


def _checkpoint(name: str, folder: Path, later: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder; `later` holds weights to read in place of the folder's."""
    argument, source = f"--{name}", folder
    try:
        weights.check(argument, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **weights.OWN)
        if later:
            argument, source = "--resume", later
            weights.check(argument, later)
        model, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  (a pair)
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **weights.OWN
        )
        weights.check_read(argument, source, model, loading)
    except UsageError:
        raise
    except Exception as error:  # whatever a broken checkpoint can raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"argument {argument}: expected a causal language model in {source}, got: {reason}") from None
    return model, tokenizer


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    listed: Any = model.generation_config.eos_token_id if model.generation_config else None
    listed = tokenizer.eos_token_id if listed is None else listed
    ids = () if listed is None else tuple(listed) if isinstance(listed, list | tuple) else (listed,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UsageError(f"argument --student: expected an eos_token_id of token ids in its files, got {listed!r}")
    return ids


def _pad_id(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], rows: int) -> int:
    """A token that both models have a row of: a GPU looks that row up even behind a mask."""
    own: Any = tokenizer.pad_token_id
    return next(i for i in (own, *stop_ids, 0) if i is not None and i < rows)


def _side(name: str, model: PreTrainedModel, vocab_size: int | None) -> Side:
    """A model that is found, on a few tokens, to generate and to have a readable head."""
    side, kind = Side(model, vocab_size), type(model).__name__
    ids = [i % side.tokens for i in range(1, 7)]
    try:
        rollouts = sample(model, [ids[:2], ids], max_new_tokens=2, stop_ids=(), pad_id=0, temperature=0)
        return _counting(side, rollouts.tokens, rollouts.attention)
    except Exception as error:  # whatever a forward can raise that is not a decoder's
        reason = " ".join(str(error).split())[:400]
        raise UsageError(f"argument --{name}: expected a decoder-only transformer, got {kind}: {reason}") from None


@torch.no_grad()
def _counting(side: Side, tokens: Tensor, attention: Tensor) -> Side:
    """The side as its forward takes positions."""
    try:
        side.head(tokens, attention)
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        side = replace(side, takes_positions=False)
        side.head(tokens, attention)
    return side
