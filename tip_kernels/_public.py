"""Every public name of the package, which __init__.py loads when one of them is asked for."""

from tip_kernels import _versions

_versions.check("torch", "triton")

from tip_kernels.backends.choice import backend
from tip_kernels.distillation.distill import Distilled, distill
from tip_kernels.distillation.importance import token_importance
from tip_kernels.distillation.options import Execution, Plan
from tip_kernels.distillation.step_selection import StepSelection
from tip_kernels.learn.divergence_loss import divergence_loss
from tip_kernels.learn.divergences import (
    JSD,
    TVD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    HellingerSq,
    Jeffreys,
    Renyi,
    ReverseKL,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
)
from tip_kernels.learn.gated import Gated
from tip_kernels.learn.grad_filter import GradFilter
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.select import weights
from tip_kernels.select.adakd import AdaptiveFocus, TopHellinger, adakd, difficulty_temperature
from tip_kernels.select.papers import (
    CrossEntropyRatio,
    EntropyGap,
    GreedyAgreement,
    PositionPrefix,
    Teachability,
    TopMargin,
)
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rollouts import FilterRollouts, PositionSuffix, UntilDrift
from tip_kernels.select.rule import KeepAll, Kept, RandomRows, Rule, SoftOr, Threshold
from tip_kernels.select.tip import Overconfident, SampleEntropy, TopDivergence, TopEntropy
from tip_kernels.sources.pair import Head
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import TokenStats

__all__ = [
    "JSD",
    "TVD",
    "AdaptiveFocus",
    "AlphaBeta",
    "CrossEntropyRatio",
    "Distilled",
    "Divergence",
    "EntropyGap",
    "Execution",
    "FilterRollouts",
    "ForwardKL",
    "Gated",
    "GradFilter",
    "GreedyAgreement",
    "Head",
    "HellingerSq",
    "Jeffreys",
    "KeepAll",
    "Kept",
    "Overconfident",
    "Plan",
    "PositionPrefix",
    "PositionSuffix",
    "RandomRows",
    "Renyi",
    "ReverseKL",
    "Rule",
    "SampleEntropy",
    "SampledReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftOr",
    "StepSelection",
    "Teachability",
    "Threshold",
    "ToDi",
    "TokenStats",
    "TopDivergence",
    "TopEntropy",
    "TopHellinger",
    "TopK",
    "TopMargin",
    "UntilDrift",
    "adakd",
    "backend",
    "difficulty_temperature",
    "distill",
    "divergence_loss",
    "quadrants",
    "token_importance",
    "token_stats",
    "weights",
]
