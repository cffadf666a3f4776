"""The formulas of the self-test as plain torch over whole softmaxes: float64 is the truth, float32 what is attainable.

z are (N, V) logits, lp their log-probabilities, p probabilities; `_s` is the student and `_t` the teacher. Every
function takes and gives one dtype and knows nothing of the code that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """(N, V) of a head."""
    z = scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """sum of p x over the vocabulary, where 0 * inf is 0."""
    return torch.where(p > 0, p * x, 0.0).sum(1)


def statistics(z_s: Tensor, z_t: Tensor, labels: Tensor, k: int) -> dict[str, Tensor]:
    """Every field of TokenStats, (N,) each, of logits without ties."""
    lp_s, lp_t = z_s.log_softmax(1), z_t.log_softmax(1)
    p_s, p_t = lp_s.exp(), lp_t.exp()
    first_s, first_t = z_s.topk(k).indices, z_t.topk(k).indices
    two_s, two_t = z_s.topk(2).values, z_t.topk(2).values
    place = (first_t == first_s[:, :1]).int()
    none = labels < 0
    picked = [lp.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(none, torch.nan) for lp in (lp_s, lp_t)]
    return {
        "lse_s": z_s.logsumexp(1),
        "lse_t": z_t.logsumexp(1),
        "entropy_s": -_mean(p_s, lp_s),
        "entropy_t": -_mean(p_t, lp_t),
        "kl_fwd": _mean(p_t, lp_t - lp_s),
        "kl_rev": _mean(p_s, lp_s - lp_t),
        "hellinger_sq": ((lp_t / 2).exp() - (lp_s / 2).exp()).square().sum(1) / 2,
        "margin_s": two_s[:, 0] - two_s[:, 1],
        "margin_t": two_t[:, 0] - two_t[:, 1],
        "agree": first_s[:, 0] == first_t[:, 0],
        "logp_s": picked[0],
        "logp_t": picked[1],
        "mass_t_on_top_s": p_t.gather(1, first_s).sum(1),
        "rank_t_of_argmax_s": torch.where(place.any(1), place.argmax(1), k),
    }


def _jsd(s: Tensor, t: Tensor, w: float) -> Tensor:
    m = torch.logaddexp(t + math.log(w), s + math.log(1 - w))
    return w * (t.exp() * (t - m)).sum(1) + (1 - w) * (s.exp() * (s - m)).sum(1)


def _alpha_beta(s: Tensor, t: Tensor, a: float, b: float) -> Tensor:
    powers = (a * t + b * s).exp() - a / (a + b) * ((a + b) * t).exp() - b / (a + b) * ((a + b) * s).exp()
    return -powers.sum(1) / (a * b)


def _todi(s: Tensor, t: Tensor, beta: float) -> Tensor:
    w = torch.sigmoid(beta * (t - s)).detach()
    return (w * t.exp() * (t - s) + (1 - w) * s.exp() * (s - t)).sum(1)


def _forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return (t.exp() * (t - s)).sum(1)


def _reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return (s.exp() * (s - t)).sum(1)


def _sampled(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """k = log s[y] - log t[y], whose gradient is k d(log s[y])."""
    at_s, at_t = (lp.gather(1, labels[:, None])[:, 0] for lp in (s, t))
    k = (at_s - at_t).detach()
    return k + k * (at_s - at_s.detach())


# By the names and with the parameters of the public divergences: (lp_s, lp_t, sampled tokens) -> (N,)
DIVERGENCES: Mapping[str, tuple[tuple[float, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "ForwardKL": ((), lambda s, t, y: _forward_kl(s, t)),
    "ReverseKL": ((), lambda s, t, y: _reverse_kl(s, t)),
    "Jeffreys": ((), lambda s, t, y: _forward_kl(s, t) + _reverse_kl(s, t)),
    "JSD": ((0.3,), lambda s, t, y: _jsd(s, t, 0.3)),
    "SkewForwardKL": ((0.1,), lambda s, t, y: _forward_kl(torch.logaddexp(t + math.log(0.1), s + math.log(0.9)), t)),
    "SkewReverseKL": ((0.1,), lambda s, t, y: _reverse_kl(s, torch.logaddexp(t + math.log(0.9), s + math.log(0.1)))),
    "TVD": ((), lambda s, t, y: (t.exp() - s.exp()).abs().sum(1) / 2),
    "HellingerSq": ((), lambda s, t, y: ((t / 2).exp() - (s / 2).exp()).square().sum(1) / 2),
    "Renyi": ((0.5,), lambda s, t, y: (0.5 * t + 0.5 * s).logsumexp(1) / (0.5 - 1)),
    "AlphaBeta": ((0.2, 0.7), lambda s, t, y: _alpha_beta(s, t, 0.2, 0.7)),
    "ToDi": ((1.0,), lambda s, t, y: _todi(s, t, 1.0)),
    "SampledReverseKL": ((), _sampled),
}


def outcomes(z: Tensor, ids: Tensor) -> Tensor:
    """(N, K + 1) log-probabilities: those of K listed tokens of a row, then that of all the rest."""
    rest = z.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([z.gather(1, ids), rest], 1).log_softmax(1)


def listed_kl(lp_s: Tensor, lp_t: Tensor, tail: str) -> Tensor:
    """KL(t || s) over (N, K + 1) outcomes as `TopK` defines it for each tail."""
    if tail == "bucket":
        return _forward_kl(lp_s, lp_t)
    lp_s, lp_t = lp_s[:, :-1], lp_t[:, :-1]
    if tail == "ignore":
        return _forward_kl(lp_s, lp_t)
    return _forward_kl(lp_s.log_softmax(1), lp_t.log_softmax(1))


def quota(keep: float | int, m: int) -> int:
    """How many of m rows a rule keeps."""
    wanted = keep if isinstance(keep, int) else math.floor(keep * m + 1e-6)
    return min(m, max(1, wanted))


def best(
    scores: list[float], rows: list[int], eligible: list[bool], groups: list[int], keep: float | int
) -> list[bool]:
    """Which rows a quota keeps: sorts each group of `rows` by score; a tie goes to the earlier row."""
    kept = [False] * len(scores)
    for group in set(groups):
        mine = [i for i in rows if groups[i] == group]
        order = sorted((i for i in mine if eligible[i]), key=lambda i: (-scores[i], i))
        for i in order[: quota(keep, len(mine))]:
            kept[i] = True
    return kept


def shares_below(x: list[float], rows: list[int]) -> list[float]:
    """(rows with a smaller x) / (number of rows - 1)."""
    return [sum(x[j] < value for j in rows) / (len(rows) - 1) for value in x]


def between(x: list[float], low: float, high: float) -> list[float]:
    """(x - low) / (high - low), clipped to [0, 1]."""
    return [min(1.0, max(0.0, (value - low) / (high - low))) for value in x]


def quantile(x: list[float], rows: list[int], q: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(x[i] for i in rows)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
