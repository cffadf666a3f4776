"""MEASURE: the statistics of every row in one pass over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per-row statistics of a student's and a teacher's next-token distributions.

    Every public field is a flat (N,) tensor in row order b*T + t, fp32 and in nats unless said, or None where it was
    not asked for. A row whose logits hold a NaN, a +inf, or nothing but -inf is NaN in every statistic that reads it.
    """

    lse_s: Tensor | None = None  # log of the sum of exponentials of the student's logits / temperature
    lse_t: Tensor | None = None  # the same of the teacher
    entropy_s: Tensor | None = None
    entropy_t: Tensor | None = None
    kl_fwd: Tensor | None = None  # KL(teacher || student), clamped at 0; +inf where the student bans a teacher token
    kl_rev: Tensor | None = None  # KL(student || teacher), clamped at 0
    hellinger_sq: Tensor | None = None  # 1 - sum sqrt(p_s p_t), in [0, 1], no unit
    margin_s: Tensor | None = None  # top-1 minus top-2 logit / temperature; +inf with fewer than two finite logits
    margin_t: Tensor | None = None
    agree: Tensor | None = None  # bool: both models have the same argmax (the lower id wins a tie)
    logp_s: Tensor | None = None  # log-probability of the label; NaN where the label is -100
    logp_t: Tensor | None = None
    mass_t_on_top_s: Tensor | None = None  # teacher probability on the student's top_k tokens, in [0, 1]
    rank_t_of_argmax_s: Tensor | None = None  # int64: the student's argmax in the teacher's top_k, 0 first; top_k if absent
    _shift_s: Tensor | None = field(default=None, repr=False)  # (N,) largest logit / temperature
    _shift_t: Tensor | None = field(default=None, repr=False)
    _logsum_s: Tensor | None = field(default=None, repr=False)  # (N,) lse - shift, formed before it is rounded into lse
    _logsum_t: Tensor | None = field(default=None, repr=False)
    _temperature: float | Tensor = field(default=1.0, repr=False)
    _vocab: int = field(default=0, repr=False)
    _batch_shape: tuple[int, ...] = field(default=(), repr=False)  # (N,) or (B, T)
