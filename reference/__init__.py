"""The specification of tip-kernels: eager, full softmax, float64-able. Formulas are numbered in README.md."""

from .divergences import (
    alpha_beta,
    forward_kl,
    hellinger_sq,
    jeffreys,
    jsd,
    renyi,
    reverse_kl,
    sampled_reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    todi,
    tvd,
)
from .stats import argmax, broken_rows, kl, log_probs, logits, token_stats, top_ids

__all__ = [
    "alpha_beta",
    "argmax",
    "broken_rows",
    "forward_kl",
    "hellinger_sq",
    "jeffreys",
    "jsd",
    "kl",
    "log_probs",
    "logits",
    "renyi",
    "reverse_kl",
    "sampled_reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "todi",
    "token_stats",
    "top_ids",
    "tvd",
]
