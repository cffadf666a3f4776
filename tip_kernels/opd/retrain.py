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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tip_kernels.opd import addition
from tip_kernels.opd.rollout import sample
from tip_kernels.opd.task import load_task

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


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; anything outside addition.CHARACTERS is an error when a prompt is read."""
    vocab = {token: i for i, token in enumerate([PAD, *addition.CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=addition.END, padding_side="left", model_max_length=64
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's size with fresh weights (drawn from torch's global generator)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=recipe.width**-0.5 / 2,
    )
    return LlamaForCausalLM(config)


def batch_of(tokenizer, pairs, rng: random.Random, slip, unread: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), right-padded, and the labels: -100 on prompt, padding and, with `unread`, on slipped totals."""
    index = tokenizer.get_vocab()
    width = 8 + addition.LONGEST
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (a, b) in enumerate(pairs):
        completion, sound = addition.write(a, b, rng, slip)
        text = torch.tensor([index[character] for character in addition.prompt_of(a, b) + completion])
        ids[row, : len(text)] = text
        kept = torch.tensor(sound) if unread else torch.ones(len(sound), dtype=torch.bool)
        labels[row, 8 : len(text)] = torch.where(kept, text[8:], -100)
    return ids, labels


def read(recipe: Recipe, tokenizer, seed: int, slip, unread: bool, report=print) -> LlamaForCausalLM:
    """Train one model of `recipe` on fresh transcripts with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    held_out = frozenset(addition.held_out_pairs())
    model = new_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        pairs = addition.training_pairs(rng, recipe.batch, held_out)
        ids, labels = batch_of(tokenizer, pairs, rng, slip, unread)
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


def greedy_accuracy(model: LlamaForCausalLM, tokenizer) -> float:
    """On the first 512 held-out prompts, in fp32."""
    task = load_task("addition", 512)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in task.held_out]
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    out = sample(model, prompts, max_new_tokens=task.max_new_tokens, stop_ids=[stop], pad_id=pad, temperature=0)
    texts = [
        tokenizer.decode(text[own], skip_special_tokens=True)
        for text, own in zip(out.completions, out.mask, strict=True)
    ]
    return sum(task.judge(i, text, bool(out.ended[i])) for i, text in enumerate(texts)) / len(texts)


def retrain(output: Path, seed: int, report=print) -> dict:
    """Train both models and write output/{teacher,student} and output/retrain.json; returns what the JSON holds."""
    transformers.logging.disable_progress_bar()
    tokenizer = character_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained = {
            "teacher": read(TEACHER, tokenizer, seed, addition.any_slip, True, lambda line: report(f"teacher: {line}")),
            "student": read(
                STUDENT, tokenizer, seed, addition.students_slip, False, lambda line: report(f"student: {line}")
            ),
        }
        accuracies = {name: greedy_accuracy(model.eval(), tokenizer) for name, model in trained.items()}
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
