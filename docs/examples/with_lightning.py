"""The plain loop as a LightningModule; each training step samples its own rollouts."""

from __future__ import annotations

import lightning
import torch
from shared import Distance, load, prompts, rollouts

import tip_kernels as tip
from tip_kernels.hooks.transformers import distill_batch


class Distillation(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = load("student"), load("teacher").requires_grad_(False)

    def training_step(self, questions: list[str]) -> torch.Tensor:
        self.teacher.eval()  # Lightning may have put the whole module in training mode
        batch = rollouts(self.student, questions)
        return distill_batch(self.student, self.teacher, batch, select=tip.SoftOr(0.5)).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


module = Distillation()
module.student.train()  # from_pretrained leaves models in eval mode
distance = Distance(module.student, module.teacher)
loader = torch.utils.data.DataLoader(prompts(256, seed=100), batch_size=32)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
lightning.Trainer(max_epochs=1, accelerator="cpu", gradient_clip_val=1.0, **quiet).fit(module, loader)
distance.show(module.student)
