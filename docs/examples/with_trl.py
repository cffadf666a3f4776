"""TRL's DistillationTrainer with the loss on chosen tokens: two names and the tip_ settings are the only change."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from shared import Distance, load, prompts, tokenizer

from tip_kernels.hooks.trl import TIPDistillationConfig, TIPDistillationTrainer

student, teacher = load("student"), load("teacher")
distance = Distance(student, teacher)
with tempfile.TemporaryDirectory() as folder:
    args = TIPDistillationConfig(
        folder,
        tip_rule="soft_or",
        tip_keep=0.5,
        learning_rate=1e-3,
        max_grad_norm=1.0,  # the mean over kept tokens has larger gradients than that over all: see the guide "Learn"
        max_completion_length=48,
        per_device_train_batch_size=32,
        max_steps=6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    dataset = Dataset.from_dict({"prompt": prompts(192, seed=100)})
    trainer = TIPDistillationTrainer(student, teacher, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
distance.show(student)
