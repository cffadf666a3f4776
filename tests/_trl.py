"""Trainers of the packaged models whose rollouts are written beforehand, so that two trainers see the same tokens."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import transformers
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from tip_kernels.hooks.trl import TIPDistillationConfig, TIPDistillationTrainer
from tip_kernels.opd import addition
from tip_kernels.opd.settings import PACKAGED

TOKENIZER = transformers.AutoTokenizer.from_pretrained(PACKAGED / "student", padding_side="left")
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}


def load(role):
    return transformers.AutoModelForCausalLM.from_pretrained(PACKAGED / role, dtype=torch.float32)


def stubborn():
    """The teacher with its head's rows in another order and four times as sure: 50 nats from the student."""
    teacher = load("teacher")
    head = teacher.get_output_embeddings()
    order = torch.randperm(head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    head.weight = torch.nn.Parameter(4 * head.weight.detach()[order])
    return teacher


def rollouts_of(count):
    """Prompts, and for each a completion cut to a length of its own, of 5 to 40 tokens."""
    rng = random.Random(0)
    pairs = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(count)]
    completions = {}
    for a, b in pairs:
        text, _ = addition.write(a, b, rng, slip=lambda x, y, total, rng: total + rng.choice((0, 0, 1)))
        ids = TOKENIZER(text[: rng.randrange(5, 41)])["input_ids"]
        completions[tuple(TOKENIZER(addition.prompt_of(a, b))["input_ids"])] = ids
    return [addition.prompt_of(a, b) for a, b in pairs], completions


def made(
    folder,
    kind=TIPDistillationTrainer,
    *,
    teacher=None,
    student=None,
    prompts=8,
    peft_config=None,
    loss=None,
    **settings,
):
    """A trainer of the packaged models whose completions are written, not sampled."""
    config = DistillationConfig if kind is DistillationTrainer else TIPDistillationConfig
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    texts, completions = rollouts_of(prompts)
    trainer = kind(
        model=load("student") if student is None else student,
        teacher_model=load("teacher") if teacher is None else teacher,
        args=config(str(folder), **(defaults | settings)),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        eval_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=TOKENIZER,
        peft_config=peft_config,
        **(loss or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: [completions[tuple(ids)] for ids in prompt_ids]
    return trainer


def trained(*args, **settings):
    """The trainer after its steps, and its logs."""
    trainer = made(*args, **settings)
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def weights_of(trainer):
    return {name: weight.detach().double().clone() for name, weight in trainer.model.named_parameters()}
