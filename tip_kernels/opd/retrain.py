"""Train the packaged teacher and student from nothing: `tip-kernels opd --retrain`.

Both read the addition scratchpad (addition.py) by plain next-token training. The teacher reads true sums, with the odd
slip that it is not asked to predict but must carry on from; the student reads slips that distillation is to correct.
The weights are stored in fp16 as ordinary transformers checkpoints, beside a retrain.json with the seed and every
file's sha256. Training runs on one thread, about three minutes, so the same seed gives the same files with the same
versions and kind of CPU; on another kind a GEMM may round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tip_kernels._checks import not_none
from tip_kernels.opd import addition
from tip_kernels.opd.rollout import sample
from tip_kernels.opd.task import Task, load_task

PAD = "<pad>"


@dataclass(frozen=True)
class Recipe:
    """The size of a model and how long it reads."""

    width: int
    hidden_mlp: int
    layers: int
    steps: int
    batch: int = 64
    lr: float = 4e-3
    heads: int = 4


TEACHER = Recipe(width=96, hidden_mlp=256, layers=3, steps=800)
STUDENT = Recipe(width=64, hidden_mlp=160, layers=2, steps=600)


def character_tokenizer(characters: str = addition.CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character, addition.END ends a text; any other character is an error when a prompt is read."""
    vocab = {token: i for i, token in enumerate([PAD, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=addition.END, padding_side="left", model_max_length=64
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's size with fresh weights (drawn from torch's global generator)."""
    stop: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
        initializer_range=recipe.width**-0.5 / 2,
    )
    return LlamaForCausalLM(config)


class Transcript(NamedTuple):
    """What a model reads: a prompt, its completion, and for each character of that whether it is to be predicted."""

    prompt: str
    completion: str
    learned: list[bool]


Draw = Callable[[random.Random, int], list[Transcript]]  # so many fresh ones


def additions(slip, unread: bool, fillers: tuple[int, int, int] = (3, 3, 3)) -> Draw:
    """Additions that no run is judged on; with `unread` slipped totals are read but not learned."""
    held_out = frozenset(addition.held_out_pairs())

    def draw(rng: random.Random, count: int) -> list[Transcript]:
        transcripts = []
        for a, b in addition.training_pairs(rng, count, held_out):
            completion, sound = addition.write(a, b, rng, slip, fillers)
            learned = sound if unread else [True] * len(sound)
            transcripts.append(Transcript(addition.prompt_of(a, b), completion, learned))
        return transcripts

    return draw


def batch_of(tokenizer, transcripts: list[Transcript]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), right-padded, and the labels: -100 on prompts, padding and what is not to be learned."""
    index = tokenizer.get_vocab()
    width = max(len(one.prompt + one.completion) for one in transcripts)
    ids = torch.full((len(transcripts), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion, learned) in enumerate(transcripts):
        text = torch.tensor([index[character] for character in prompt + completion])
        ids[row, : len(text)] = text
        labels[row, len(prompt) : len(text)] = torch.where(torch.tensor(learned), text[len(prompt) :], -100)
    return ids, labels


def read(recipe: Recipe, tokenizer, seed: int, draw: Draw, report=print) -> LlamaForCausalLM:
    """Train one model of `recipe` on what `draw` writes, with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        ids, labels = batch_of(tokenizer, draw(rng, recipe.batch))
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps:
            report(f"step {step}/{recipe.steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
    return model


def greedy_accuracy(model: LlamaForCausalLM, tokenizer, task: Task) -> float:
    """The share of the task's held-out prompts whose likeliest completion is right, in fp32."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in task.held_out]
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    out = sample(model, prompts, max_new_tokens=task.max_new_tokens, stop_ids=[stop], pad_id=pad, temperature=0)
    texts = [
        tokenizer.decode(text[own], skip_special_tokens=True)
        for text, own in zip(out.completions, out.mask, strict=True)
    ]
    return sum(not_none(task.judge)(i, text, bool(out.ended[i])) for i, text in enumerate(texts)) / len(texts)


def retrain(output: Path, seed: int, report=print) -> dict:
    """Train both models and write output/{teacher,student} and output/retrain.json; returns what the JSON holds."""
    transformers.logging.disable_progress_bar()
    tokenizer = character_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = {
            name: read(recipe, tokenizer, seed, draw, lambda line, name=name: report(f"{name}: {line}"))
            for name, recipe, draw in (
                ("teacher", TEACHER, additions(addition.any_slip, unread=True)),
                ("student", STUDENT, additions(addition.students_slip, unread=False)),
            )
        }
        task = load_task("addition", 512)
        accuracies = {name: greedy_accuracy(model.eval(), tokenizer, task) for name, model in trained.items()}
    finally:
        torch.set_num_threads(threads)
    record = {"seed": seed, "torch": torch.__version__, "transformers": transformers.__version__, "models": {}}
    for name, model in trained.items():
        report(f"{name}: accuracy {100 * accuracies[name]:.1f} %")
        model.half().save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        files = sorted(path for path in (output / name).iterdir() if path.is_file())
        record["models"][name] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "accuracy": accuracies[name],
            "recipe": asdict(TEACHER if name == "teacher" else STUDENT),
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        }
    (output / "retrain.json").write_text(json.dumps(record, indent=2) + "\n")
    return record
