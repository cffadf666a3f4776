"""The statistics of a row, straight from the definitions (README.md, R1 to R8).

Logits are whole (N, V) tensors, in nats, already divided by the temperature. They keep the dtype they come in: float64
is the truth, float32 is "eager in the working dtype". `_s` is the student and `_t` the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that is none


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """R1: the (N, V) logits of (N, H) hidden states under a (V, H) head; the temperature is a number or (N,)."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)[:, None]
    return z / temperature


def broken_rows(z: Tensor) -> Tensor:
    """R2: (N,) bool, the rows that are no distribution: a NaN, a +inf, or nothing but -inf in them."""
    return z.isnan().any(-1) | z.isposinf().any(-1) | z.isneginf().all(-1)


def log_probs(z: Tensor) -> Tensor:
    """R2: (N, V) log-probabilities; -inf where the token is banned (its logit is -inf), NaN in broken rows."""
    return F.log_softmax(z, dim=-1).masked_fill(broken_rows(z)[:, None], torch.nan)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value` with 0 * inf = 0; NaN weights stay NaN."""
    return torch.where(weight == 0, 0.0, weight * value)


def argmax(z: Tensor) -> Tensor:
    """R6: (N,) id of the largest logit, the lower id where several are equal."""
    ids = torch.arange(z.shape[-1], device=z.device).expand_as(z)
    return torch.where(z == z.amax(-1, keepdim=True), ids, z.shape[-1]).amin(-1)


def kl(z_a: Tensor, z_b: Tensor) -> Tensor:
    """R4: (N,) KL(a || b), clamped at 0; +inf exactly where b bans a token that a does not."""
    logp_a, logp_b = log_probs(z_a), log_probs(z_b)
    # A banned token of a adds nothing. A token that only b bans is decided by the flag: exp(logp_a) may underflow to 0.
    skip = z_a.isneginf() | z_b.isneginf()
    terms = torch.where(skip, 0.0, logp_a.exp() * (logp_a - logp_b))
    outside = (z_b.isneginf() & ~z_a.isneginf()).any(-1)
    value = terms.sum(-1).clamp(min=0.0).masked_fill(outside, torch.inf)
    return value.masked_fill(broken_rows(z_a) | broken_rows(z_b), torch.nan)


def _lse(z: Tensor) -> Tensor:
    """R2."""
    return torch.logsumexp(z, dim=-1).masked_fill(broken_rows(z), torch.nan)


def _entropy(z: Tensor) -> Tensor:
    """R3."""
    logp = log_probs(z)
    return -times(logp.exp(), logp).sum(-1)


def _hellinger_sq(z_s: Tensor, z_t: Tensor) -> Tensor:
    """R5: half the squared distance of the root probabilities, which does not cancel as 1 - sum sqrt(p_s p_t) does."""
    root_s, root_t = (log_probs(z_s) / 2).exp(), (log_probs(z_t) / 2).exp()
    return ((root_s - root_t).square().sum(-1) / 2).clamp(0.0, 1.0)


def _margin(z: Tensor) -> Tensor:
    """R6: top-1 minus top-2 logit, +inf with fewer than two finite logits."""
    first_two = F.pad(z, (0, 1), value=-torch.inf).sort(-1, descending=True).values[:, :2]  # the pad serves V = 1
    return (first_two[:, 0] - first_two[:, 1]).masked_fill(broken_rows(z), torch.nan)


def _label_logp(z: Tensor, labels: Tensor) -> Tensor:
    """R7."""
    picked = log_probs(z).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(labels == IGNORE, torch.nan)


def top_ids(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """R8: (N, min(k, V)) ids of the largest logits, the lower id first on ties, and which of them are not banned."""
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k], ~values[:, :k].isneginf()


def _mass_t_on_top_s(z_s: Tensor, z_t: Tensor, k: int) -> Tensor:
    """R8."""
    ids, listed = top_ids(z_s, k)
    mass = (log_probs(z_t).exp().gather(-1, ids) * listed).sum(-1).clamp(max=1.0)
    return mass.masked_fill(broken_rows(z_s) | broken_rows(z_t), torch.nan)


def _rank_t_of_argmax_s(z_s: Tensor, z_t: Tensor, k: int) -> Tensor:
    """R8: position of the student's argmax in the teacher's list, 0 first; k where absent or a row is broken."""
    ids, listed = top_ids(z_t, k)
    hit = (ids == argmax(z_s)[:, None]) & listed  # at most one hit a row
    position = (hit * torch.arange(ids.shape[-1], device=ids.device)).sum(-1)
    absent = ~hit.any(-1) | broken_rows(z_s) | broken_rows(z_t)
    return position.masked_fill(absent, k)


def token_stats(
    z_s: Tensor,
    z_t: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    margins: bool = False,
    top_k: int = 0,
) -> dict[str, Tensor | None]:
    """R2 to R8: every public field of TokenStats as (N,) tensors of the logits' dtype; None where not asked for."""
    paired = z_t is not None
    broken = broken_rows(z_s) | broken_rows(z_t) if paired else broken_rows(z_s)
    return {
        "lse_s": _lse(z_s),
        "lse_t": _lse(z_t) if paired else None,
        "entropy_s": _entropy(z_s),
        "entropy_t": _entropy(z_t) if paired else None,
        "kl_fwd": kl(z_t, z_s) if paired else None,
        "kl_rev": kl(z_s, z_t) if paired else None,
        "hellinger_sq": _hellinger_sq(z_s, z_t) if paired else None,
        "margin_s": _margin(z_s) if margins else None,
        "margin_t": _margin(z_t) if margins and paired else None,
        "agree": (argmax(z_s) == argmax(z_t)) & ~broken if margins and paired else None,
        "logp_s": _label_logp(z_s, labels) if labels is not None else None,
        "logp_t": _label_logp(z_t, labels) if labels is not None and paired else None,
        "mass_t_on_top_s": _mass_t_on_top_s(z_s, z_t, top_k) if top_k and paired else None,
        "rank_t_of_argmax_s": _rank_t_of_argmax_s(z_s, z_t, top_k) if top_k and paired else None,
    }
