"""A teacher of which only some tokens are known (README.md, T1 to T4).

The student is (N, V) logits at temperature 1; the teacher (N, K) ids, -1 where absent, and log-probabilities. Plain
sums over the vocabulary: autograd through the divergences is the definition of their gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .stats import broken_rows

LEAST_REST, NO_REST = 2.0**-24, 2.0**-17


@dataclass
class _Outcomes:
    """The probabilities that a tail compares: of listed tokens in their columns, of the rest in a last one."""

    p_s: Tensor  # (N, K + 1), or (N, K) without a bucket
    p_t: Tensor
    banned_s: Tensor  # bool: the outcome cannot happen; decided by -inf, not by underflow
    banned_t: Tensor
    broken_s: Tensor  # (N,) bool
    broken_t: Tensor

    @property
    def skip(self) -> Tensor:
        return self.banned_s | self.banned_t

    def finish(self, value: Tensor, infinite: Tensor | None = None) -> Tensor:
        """R9."""
        if infinite is not None:
            value = value.masked_fill(infinite.any(1), math.inf)
        return value.masked_fill(self.broken_s | self.broken_t, math.nan)


def _outcomes(z_s: Tensor, ids: Tensor, logp: Tensor, tail: str) -> _Outcomes:
    """T1."""
    present, vocab = ids >= 0, z_s.shape[1]
    listed = (torch.arange(vocab) == ids[:, :, None]).any(1)  # (N, V)
    z = z_s.masked_fill(broken_rows(z_s)[:, None], 0.0)
    p = torch.softmax(z, -1)
    banned_s = (z.isneginf()).gather(1, ids.clamp(min=0)) | ~present
    p_s = p.gather(1, ids.clamp(min=0)).masked_fill(banned_s, 0.0)
    banned_t = logp.isneginf() | ~present
    p_t = logp.to(z.dtype).exp().masked_fill(banned_t, 0.0)
    broken_s, broken_t = broken_rows(z_s), ~present.any(1) | (present & logp.isnan()).any(1)
    if tail == "bucket":
        rest_s = p.masked_fill(listed, 0.0).sum(1)
        no_rest_s = (z.isneginf() | listed).all(1)
        rest_t = 1 - p_t.sum(1)
        no_rest_t = (present.sum(1) == vocab) | (no_rest_s & (rest_t <= NO_REST))
        rest_t = rest_t.clamp(min=LEAST_REST).masked_fill(no_rest_t, 0.0)
        p_s, banned_s = torch.cat([p_s, rest_s[:, None]], 1), torch.cat([banned_s, no_rest_s[:, None]], 1)
        p_t, banned_t = torch.cat([p_t, rest_t[:, None]], 1), torch.cat([banned_t, no_rest_t[:, None]], 1)
    if tail != "ignore":  # a bucketed teacher sums to 1 but for the roundings of its logp
        broken_s, broken_t = broken_s | banned_s.all(1), broken_t | banned_t.all(1)
        p_s = p_s / p_s.sum(1, keepdim=True).masked_fill(banned_s.all(1, keepdim=True), 1.0)
        p_t = p_t / p_t.sum(1, keepdim=True).masked_fill(banned_t.all(1, keepdim=True), 1.0)
    return _Outcomes(p_s, p_t, banned_s, banned_t, broken_s, broken_t)


def _log(p: Tensor, skip: Tensor) -> Tensor:
    return p.masked_fill(skip, 1.0).log()


def topk_forward_kl(z_s: Tensor, ids: Tensor, logp: Tensor, tail: str = "bucket") -> Tensor:
    """T2: sum t (log t - log s) over the outcomes."""
    o = _outcomes(z_s, ids, logp, tail)
    terms = o.p_t * (_log(o.p_t, o.skip) - _log(o.p_s, o.skip))
    return o.finish(terms.masked_fill(o.skip, 0.0).sum(1), infinite=o.banned_s & ~o.banned_t)


def topk_reverse_kl(z_s: Tensor, ids: Tensor, logp: Tensor, tail: str = "bucket") -> Tensor:
    """T2: sum s (log s - log t) over the outcomes."""
    o = _outcomes(z_s, ids, logp, tail)
    terms = o.p_s * (_log(o.p_s, o.skip) - _log(o.p_t, o.skip))
    return o.finish(terms.masked_fill(o.skip, 0.0).sum(1), infinite=o.banned_t & ~o.banned_s)


def topk_hellinger_sq(z_s: Tensor, ids: Tensor, logp: Tensor, tail: str = "bucket") -> Tensor:
    """T3: 1 - sum sqrt(t s) over the outcomes."""
    o = _outcomes(z_s, ids, logp, tail)
    roots = ((_log(o.p_s, o.skip) + _log(o.p_t, o.skip)) / 2).exp()
    return o.finish(1 - roots.masked_fill(o.skip, 0.0).sum(1))


def topk_entropy(z_s: Tensor, ids: Tensor, logp: Tensor, tail: str = "bucket") -> Tensor:
    """T4: - sum t log t over the teacher's outcomes."""
    o = _outcomes(z_s, ids, logp, tail)
    return -(o.p_t * _log(o.p_t, o.banned_t)).sum(1).masked_fill(o.broken_t, math.nan)
