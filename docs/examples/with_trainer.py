"""transformers' Trainer on answers that the student wrote beforehand: its compute_loss is the only change."""

from __future__ import annotations

import tempfile

import transformers
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch

student, teacher = load("student"), load("teacher").eval()
distance = Distance(student, teacher)
batch = rollouts(student, prompts(256, seed=100))
dataset = [{name: values[i] for name, values in batch.items()} for i in range(256)]


class Distiller(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rule, items = tip.SoftOr(0.5), num_items_in_batch
        loss = distill_batch(model, teacher, inputs, select=rule, num_items_in_batch=items).loss
        loss = loss if items is None else loss * self.accelerator.num_processes  # items are those of all ranks
        return (loss, None) if return_outputs else loss


with tempfile.TemporaryDirectory() as folder:
    settings = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    Distiller(student, settings, train_dataset=dataset).train()
distance.show(student)
