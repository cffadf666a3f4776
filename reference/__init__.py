"""The specification of tip-kernels: eager, full softmax, float64-able. Formulas are numbered in README.md."""

from .stats import argmax, broken_rows, kl, log_probs, logits, token_stats, top_ids

__all__ = [
    "argmax",
    "broken_rows",
    "kl",
    "log_probs",
    "logits",
    "token_stats",
    "top_ids",
]
