"""What a run is asked to do, and the rules, divergences and presets by their command-line names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import tip_kernels as tip
from tip_kernels.adaptive import AdaptiveFocus

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
DIVERGENCES = {  # name: the divergence, and its parameters where `name:1,2` does not say others
    "reverse_kl": (tip.ReverseKL, ()),
    "forward_kl": (tip.ForwardKL, ()),
    "jeffreys": (tip.Jeffreys, ()),
    "jsd": (tip.JSD, (0.5,)),
    "skew_forward_kl": (tip.SkewForwardKL, (0.1,)),
    "skew_reverse_kl": (tip.SkewReverseKL, (0.1,)),
    "tvd": (tip.TVD, ()),
    "hellinger_sq": (tip.HellingerSq, ()),
    "renyi": (tip.Renyi, (0.5,)),
    "alpha_beta": (tip.AlphaBeta, (0.2, 0.7)),
    "todi": (tip.ToDi, (1.0,)),
    "sampled_reverse_kl": (tip.SampledReverseKL, (None,)),
}
PRESETS = ("adakd",)
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
    preset: str | None = None  # takes the place of rule and keep
    teacher_topk: int | None = None  # None: the teacher's whole distribution
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

    @property
    def samples_tokens(self) -> bool:
        """Whether the divergence reads the sampled tokens, not distributions alone."""
        return bool(divergence_of(self.divergence).needs & {"logp_s", "logp_t"})

    def make_focus(self) -> AdaptiveFocus | None:
        """AdaKD's ratio of kept rows; it starts to move when the learning rate has risen, whatever --steps says."""
        return AdaptiveFocus(warmup=self.warmup) if self.preset == "adakd" else None


def divergence_of(text: str) -> tip.Divergence:
    """The divergence called "jsd", or with parameters "jsd:0.1". Raises ValueError where it is none."""
    name, colon, listed = text.partition(":")
    if name not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise ValueError(f"expected one of {known}, some with parameters as in jsd:0.1, got {text!r}")
    kind, parameters = DIVERGENCES[name]
    if colon:
        count = len(parameters)
        try:
            given = tuple(float(number) for number in listed.split(","))
        except ValueError:
            given = ()
        if not count or len(given) != count:
            form = ":" + ",".join(["NUMBER"] * count) if count else ""
            raise ValueError(f"expected {name}{form}, got {text!r}")
        parameters = given
    return kind(*parameters)
