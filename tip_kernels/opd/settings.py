"""What a run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tip_kernels.distillation.registry import RULES, cut_of, divergence_of

if TYPE_CHECKING:
    import torch

    from tip_kernels.select.adakd import AdaptiveFocus
    from tip_kernels.select.rule import Rule

PRESETS = ("adakd",)
MODELS = {  # --model NAME: what it means where nothing else was typed
    "smollm2": {
        "teacher": "smollm2",  # all 30 layers; smollm2.py
        "student": "smollm2:15",
        "task": "reasoning_gym:chain_sum",
        "chat": True,
        "steps": 5,
        "batch": 4,
        "lr": 1e-4,
        "warmup": 1,
        "max_new_tokens": 48,
        "eval_prompts": 8,
        "eval_every": 5,
    }
}
PACKAGED = Path(__file__).parent / "models"  # teacher/ and student/, made by retrain.py
MAY_CHANGE = ("steps", "eval_every", "device")  # on --resume; everything else must be as the run began


@dataclass(frozen=True)
class Settings:
    """One field per option of `tip-kernels opd` that shapes the result; JSON-able, stored beside the run."""

    teacher: str = "packaged"  # or the path of a checkpoint folder, or smollm2, smollm2:15
    student: str = "packaged"
    task: str = "addition"
    chat: bool = False
    rule: str = "soft_or"
    keep: float | int = 0.2
    scope: str = "rollout"
    min_rows: int = 1
    alpha: float | None = None  # of sample_entropy
    gamma: float | None = None
    entropy_below: str | None = None  # of the overconfident
    divergence_above: str | None = None
    divergence: str = "reverse_kl"
    loss_temperature: float = 1.0
    preset: str | None = None  # takes the place of rule and keep
    median_of: str | None = None  # of adakd
    reanchor: str | None = None
    teacher_topk: int | None = None  # None: the teacher's whole distribution
    steps: int = 50
    batch: int = 128
    micro_batch: int | None = None  # rollouts a forward; None: all of a process
    lr: float = 1e-3
    warmup: int = 5
    schedule: str = "constant"
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int | None = None  # None: one where both models are small, else as torch chose
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rollouts_per_prompt: int = 1
    max_new_tokens: int | None = None  # None: as the task says
    eval_task: str | None = None  # None: held-out prompts of task
    judge: str | None = None  # None: the task's own
    eval_prompts: int | None = None  # None: 512, or a fifth of a shorter list; of eval_task every row of a file
    eval_samples: int = 1
    eval_temperature: float = 0.0
    eval_every: int = 10
    workspace_mib: float = 256.0

    def lr_at(self, step: int) -> float:
        """The learning rate of the optimizer step after `step` of them: up to lr, and with "cosine" down towards 0."""
        lr = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "constant" or step < self.warmup:
            return lr
        return lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1)))

    def make_rule(self, generator: torch.Generator) -> Rule:
        """The selection rule, which draws from `generator` where it draws at all."""
        from tip_kernels.select.rule import QuotaRule

        rule = RULES[self.rule](self.keep, generator)
        if self.rule == "overconfident":
            cuts = {"entropy_below": self.entropy_below, "divergence_above": self.divergence_above}
            rule = replace(rule, **{name: None if cut is None else cut_of(cut) for name, cut in cuts.items()})
        powers = {"alpha": self.alpha, "gamma": self.gamma}
        rule = replace(rule, **{name: value for name, value in powers.items() if value is not None})
        return replace(rule, scope=self.scope, min_rows=self.min_rows) if isinstance(rule, QuotaRule) else rule

    @property
    def samples_tokens(self) -> bool:
        """Whether the divergence reads the sampled tokens, not distributions alone."""
        return bool(divergence_of(self.divergence).needs & {"logp_s", "logp_t"})

    def make_focus(self) -> AdaptiveFocus | None:
        """AdaKD's ratio of kept rows; it starts to move when the learning rate has risen, whatever --steps says."""
        from tip_kernels.select.adakd import AdaptiveFocus

        return AdaptiveFocus(warmup=self.warmup, reanchor=self.reanchor or "paper") if self.preset == "adakd" else None
