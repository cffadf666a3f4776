"""What a run is asked to do, and the rules and divergences by their command-line names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import tip_kernels as tip

RULES = {
    "all": lambda keep, generator: tip.KeepAll(),
    "entropy": lambda keep, generator: tip.TopEntropy(keep),
    "sample_entropy": lambda keep, generator: tip.SampleEntropy(keep, generator=generator),
    "soft_or": lambda keep, generator: tip.SoftOr(keep),
    "soft_or_minmax": lambda keep, generator: tip.SoftOr(keep, normalize="minmax"),
    "overconfident": lambda keep, generator: tip.Overconfident(keep),
    "divergence": lambda keep, generator: tip.TopDivergence(keep),
    "hellinger": lambda keep, generator: tip.TopHellinger(keep),
    "random": lambda keep, generator: tip.RandomRows(keep, generator=generator),
}
DIVERGENCES = {"reverse_kl": tip.ReverseKL, "forward_kl": tip.ForwardKL, "jeffreys": tip.Jeffreys}
PACKAGED = Path(__file__).parent / "models"  # teacher/ and student/, made by retrain.py
MAY_CHANGE = ("steps", "eval_every", "device")  # on --resume; everything else must be as the run began


@dataclass(frozen=True)
class Settings:
    """One field per option of `tip-kernels opd` that shapes the result; JSON-able, stored beside the run."""

    teacher: str = "packaged"  # or the path of a checkpoint folder
    student: str = "packaged"
    task: str = "addition"
    chat: bool = False
    rule: str = "soft_or"
    keep: float | int = 0.2
    divergence: str = "reverse_kl"
    steps: int = 50
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 5
    seed: int = 0
    device: str = "auto"
    threads: int | None = None  # None: one where both models are small, else as torch chose
    temperature: float = 1.0
    max_new_tokens: int | None = None  # None: as the task says
    eval_prompts: int | None = None  # None: 512, or a fifth of a shorter list
    eval_every: int = 10
    workspace_mib: float = 256.0

    def make_rule(self, generator: torch.Generator):
        """The selection rule, which draws from `generator` where it draws at all."""
        return RULES[self.rule](self.keep, generator)
