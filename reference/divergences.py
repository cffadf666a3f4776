"""The divergence of each row, differentiable in the student's logits (README.md, R9 to R21).

Every function takes (N, V) logits already divided by the temperature and returns (N,) nats. The teacher is a constant.
Autograd through these functions is the definition of the gradient. A row whose value is +inf or NaN has gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .stats import IGNORE, broken_rows


@dataclass
class _Rows:
    """Both models' rows with finite entries only, so that no branch of a `where` has an infinite derivative."""

    logp_s: Tensor  # (N, V), 0 where banned
    logp_t: Tensor
    p_s: Tensor  # (N, V), 0 where banned
    p_t: Tensor
    banned_s: Tensor  # (N, V) bool
    banned_t: Tensor
    broken: Tensor  # (N,) bool: a row of either model is no distribution

    @property
    def shared(self) -> Tensor:
        """(N, V) bool: tokens that neither model bans."""
        return ~self.banned_s & ~self.banned_t

    @property
    def t_outside_s(self) -> Tensor:
        """(N,) bool: the student bans a token that the teacher does not."""
        return (self.banned_s & ~self.banned_t).any(-1)

    @property
    def s_outside_t(self) -> Tensor:
        """(N,) bool: the teacher bans a token that the student does not."""
        return (self.banned_t & ~self.banned_s).any(-1)

    def shared_sum(self, terms: Tensor) -> Tensor:
        return torch.where(self.shared, terms, 0.0).sum(-1)

    def log_mixture(self, weight_t: float) -> Tensor:
        """R13: log(weight_t p_t + (1 - weight_t) p_s), as a log-sum-exp; of no meaning where both ban the token."""
        logp_t = self.logp_t.masked_fill(self.banned_t & ~self.banned_s, -torch.inf)
        logp_s = self.logp_s.masked_fill(self.banned_s & ~self.banned_t, -torch.inf)
        return torch.logaddexp(math.log(weight_t) + logp_t, math.log1p(-weight_t) + logp_s)

    def finish(self, value: Tensor, infinite: Tensor | None = None) -> Tensor:
        """R9: +inf on infinite rows, NaN on broken ones, gradient 0 on both."""
        if infinite is not None:
            value = value.masked_fill(infinite, torch.inf)
        return value.masked_fill(self.broken, torch.nan)


def _read(z_s: Tensor, z_t: Tensor) -> _Rows:
    """R2, R9."""
    broken = broken_rows(z_s) | broken_rows(z_t)

    def one(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        banned = z.isneginf()
        logp = F.log_softmax(z.masked_fill(broken[:, None], 0.0), dim=-1).masked_fill(banned, 0.0)
        return logp, logp.exp().masked_fill(banned, 0.0), banned

    logp_s, p_s, banned_s = one(z_s)
    logp_t, p_t, banned_t = one(z_t.detach())
    return _Rows(logp_s, logp_t, p_s, p_t, banned_s, banned_t, broken)


def _need(holds: bool, argument: str, form: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{argument} must be {form}, got {came}")


def forward_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R10: KL(teacher || student) = sum p_t (log p_t - log p_s)."""
    r = _read(z_s, z_t)
    return r.finish(r.shared_sum(r.p_t * (r.logp_t - r.logp_s)), infinite=r.t_outside_s)


def reverse_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R11: KL(student || teacher) = sum p_s (log p_s - log p_t)."""
    r = _read(z_s, z_t)
    return r.finish(r.shared_sum(r.p_s * (r.logp_s - r.logp_t)), infinite=r.s_outside_t)


def jeffreys(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R12: KL(teacher || student) + KL(student || teacher) = sum (p_t - p_s)(log p_t - log p_s)."""
    r = _read(z_s, z_t)
    return r.finish(
        r.shared_sum((r.p_t - r.p_s) * (r.logp_t - r.logp_s)),
        infinite=r.t_outside_s | r.s_outside_t,
    )


def jsd(z_s: Tensor, z_t: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """R13: w KL(t || M) + (1 - w) KL(s || M), M = w t + (1 - w) s; by convention w = 0 is R10 and w = 1 is R11."""
    w = teacher_weight
    _need(0 <= w <= 1, "teacher_weight", "in [0, 1]", w)
    if w == 0:
        return forward_kl(z_s, z_t)
    if w == 1:
        return reverse_kl(z_s, z_t)
    r = _read(z_s, z_t)
    logp_m = r.log_mixture(w)
    kl_t = (r.p_t * (r.logp_t - logp_m)).sum(-1)
    kl_s = (r.p_s * (r.logp_s - logp_m)).sum(-1)
    return r.finish(w * kl_t + (1 - w) * kl_s)


def skew_forward_kl(z_s: Tensor, z_t: Tensor, a: float = 0.1) -> Tensor:
    """R14: KL(t || a t + (1 - a) s); a = 0 is R10."""
    _need(0 <= a < 1, "a", "in [0, 1)", a)
    if a == 0:
        return forward_kl(z_s, z_t)
    r = _read(z_s, z_t)
    return r.finish((r.p_t * (r.logp_t - r.log_mixture(a))).sum(-1))


def skew_reverse_kl(z_s: Tensor, z_t: Tensor, a: float = 0.1, detach_mixture: bool = False) -> Tensor:
    """R15: KL(s || (1 - a) t + a s), the mixture a constant where `detach_mixture`; a = 0 is R11."""
    _need(0 <= a < 1, "a", "in [0, 1)", a)
    if a == 0:
        return reverse_kl(z_s, z_t)
    r = _read(z_s, z_t)
    logp_m = r.log_mixture(1 - a)
    if detach_mixture:
        logp_m = logp_m.detach()
    return r.finish((r.p_s * (r.logp_s - logp_m)).sum(-1))


def tvd(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R16: half the sum of |t - s|, with derivative 0 where t = s."""
    r = _read(z_s, z_t)
    return r.finish((r.p_t - r.p_s).abs().sum(-1) / 2)


def hellinger_sq(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R17: 1 - sum sqrt(t s), as half the sum of (sqrt t - sqrt s)^2."""
    r = _read(z_s, z_t)
    root_s = (r.logp_s / 2).exp().masked_fill(r.banned_s, 0.0)
    root_t = (r.logp_t / 2).exp().masked_fill(r.banned_t, 0.0)
    return r.finish((root_t - root_s).square().sum(-1) / 2)


def renyi(z_s: Tensor, z_t: Tensor, alpha: float) -> Tensor:
    """R18: log(sum t^alpha s^(1 - alpha)) / (alpha - 1), alpha > 0; the limit alpha = 1 is R10."""
    _need(alpha > 0, "alpha", "positive", alpha)
    if alpha == 1:
        return forward_kl(z_s, z_t)
    r = _read(z_s, z_t)
    disjoint = ~r.shared.any(-1)
    exponents = (alpha * r.logp_t + (1 - alpha) * r.logp_s).masked_fill(~r.shared, -torch.inf)
    log_sum = torch.logsumexp(exponents.masked_fill(disjoint[:, None], 0.0), dim=-1)
    return r.finish(log_sum / (alpha - 1), infinite=disjoint if alpha < 1 else r.t_outside_s)


def alpha_beta(z_s: Tensor, z_t: Tensor, a: float, b: float) -> Tensor:
    """R19: -1/(ab) sum (t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)), a > 0 and b > 0."""
    _need(a > 0, "a", "positive", a)
    _need(b > 0, "b", "positive", b)
    r = _read(z_s, z_t)
    cross = r.shared_sum((a * r.logp_t + b * r.logp_s).exp())
    power_t = ((a + b) * r.logp_t).exp().masked_fill(r.banned_t, 0.0).sum(-1)
    power_s = ((a + b) * r.logp_s).exp().masked_fill(r.banned_s, 0.0).sum(-1)
    return r.finish(-(cross - a / (a + b) * power_t - b / (a + b) * power_s) / (a * b))


def todi(z_s: Tensor, z_t: Tensor, beta: float = 1.0) -> Tensor:
    """R20: sum w t log(t/s) + (1 - w) s log(s/t), w = sigmoid(beta log(t/s)) a constant."""
    r = _read(z_s, z_t)
    log_ratio = r.logp_t - r.logp_s
    w = torch.sigmoid(beta * log_ratio).detach()
    terms = w * r.p_t * log_ratio - (1 - w) * r.p_s * log_ratio
    # A token that one model bans: w tends to 1 (0) as fast as the ratio grows, and only beta < 0 makes the term vanish.
    infinite = (r.t_outside_s | r.s_outside_t) if beta >= 0 else None
    return r.finish(r.shared_sum(terms), infinite=infinite)


def sampled_reverse_kl(z_s: Tensor, z_t: Tensor, labels: Tensor, clip: float | None = None) -> Tensor:
    """R21: k = log p_s[y] - log p_t[y] of the sampled token y, clamped to +-clip; the gradient is k grad log p_s[y].

    NaN where the label is -100.
    """
    r = _read(z_s, z_t)
    y = labels.clamp(min=0)[:, None]

    def at_label(x: Tensor) -> Tensor:
        return x.gather(-1, y)[:, 0]

    true_s = at_label(r.logp_s.masked_fill(r.banned_s, -torch.inf)).detach()
    true_t = at_label(r.logp_t.masked_fill(r.banned_t, -torch.inf))
    k = true_s - true_t
    if clip is not None:
        _need(clip > 0, "clip", "positive", clip)
        k = k.clamp(-clip, clip)
    logp_s = at_label(r.logp_s)
    score = torch.where(k.isfinite(), k, 0.0) * (logp_s - logp_s.detach())  # value 0, gradient k grad log p_s[y]
    return r.finish(k + score).masked_fill(labels == IGNORE, torch.nan)


def gated(values: Sequence[Tensor], gates: Sequence[Tensor], broken: Tensor) -> Tensor:
    """R42: (N,) from as many (N,) values and gates, the latter constants; broken (N,) bool is R2's, of either model."""
    total = torch.zeros_like(values[0])
    for value, gate in zip(values, gates, strict=True):
        total = total + torch.where(gate == 0, 0.0, gate.to(value.dtype) * value)
    return total.masked_fill(broken, torch.nan)
