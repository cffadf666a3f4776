"""What these programs share: the packaged teacher and student, and batches of the student's own answers (rollouts)."""

from __future__ import annotations

import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch
from tip_kernels.opd import addition
from tip_kernels.opd.settings import PACKAGED

torch.manual_seed(0)
torch.set_num_threads(1)  # the packaged models are small
tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "student", padding_side="left")


def load(role: str) -> torch.nn.Module:
    """The packaged "student", which adds wrongly, or "teacher", which adds rightly."""
    return AutoModelForCausalLM.from_pretrained(PACKAGED / role, dtype=torch.float32)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Sums such as "864+394="."""
    rng = random.Random(seed)
    return [addition.prompt_of(rng.randint(100, 999), rng.randint(100, 999)) for _ in range(count)]


@torch.no_grad()
def rollouts(student: torch.nn.Module, questions: list[str]) -> dict[str, torch.Tensor]:
    """The student's answers as a collator's batch: input_ids, attention_mask, and labels that are -100 elsewhere."""
    encoded = tokenizer(questions, return_tensors="pt", padding=True)
    mode = student.training
    student.eval()
    tokens = student.generate(
        encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=True, top_k=0, max_new_tokens=48
    )
    student.train(mode)
    width = encoded["input_ids"].shape[1]
    end = tokens[:, width:] == tokenizer.convert_tokens_to_ids(addition.END)
    mine = end.cumsum(1) - end.long() == 0  # up to the token that ends the answer
    attention = torch.cat([encoded["attention_mask"], mine.long()], 1)
    labels = tokens.masked_fill(attention == 0, -100)
    labels[:, :width] = -100
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}


class Distance:
    """KL(student || teacher) in nats a token, on answers that are fixed when it is made; prints how it has fallen."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module):
        self.teacher, self.batch = teacher, rollouts(student, prompts(32, seed=1))
        self.start = self.of(student)

    @torch.no_grad()
    def of(self, student: torch.nn.Module) -> float:
        return distill_batch(student, self.teacher, self.batch, select=tip.KeepAll()).loss.item()

    def show(self, student: torch.nn.Module) -> None:
        print(f"KL(student || teacher): {self.start:.3f} -> {self.of(student):.3f} nats a token")
