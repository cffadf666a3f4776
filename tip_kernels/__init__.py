"""tip_kernels: measure, select, learn."""

from tip_kernels.backends import backend
from tip_kernels.distill import Distilled, Plan, distill
from tip_kernels.divergences import Divergence, ForwardKL, Jeffreys, ReverseKL
from tip_kernels.losses import divergence_loss
from tip_kernels.select import (
    KeepAll,
    Kept,
    Overconfident,
    RandomRows,
    Rule,
    SampleEntropy,
    SoftOr,
    Threshold,
    TopDivergence,
    TopEntropy,
    TopHellinger,
    TopMargin,
    quadrants,
)
from tip_kernels.sources import Head
from tip_kernels.stats import TokenStats, token_stats

__all__ = [
    "Distilled",
    "Divergence",
    "ForwardKL",
    "Head",
    "Jeffreys",
    "KeepAll",
    "Kept",
    "Overconfident",
    "Plan",
    "RandomRows",
    "ReverseKL",
    "Rule",
    "SampleEntropy",
    "SoftOr",
    "Threshold",
    "TokenStats",
    "TopDivergence",
    "TopEntropy",
    "TopHellinger",
    "TopMargin",
    "backend",
    "distill",
    "divergence_loss",
    "quadrants",
    "token_stats",
]
