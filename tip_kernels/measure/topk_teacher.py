"""The outcomes of a row beside a TopK: its K tokens, and one that stands for the remaining mass.

For the student the outcomes' logits are z_1 .. z_K and the log of the sum of exp z over the rest; so a divergence on
outcomes is a divergence on logits, with a vocabulary of K + 1. R rows of a block, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tip_kernels.stats import Blend, Fields


def student_outcomes(measured: Mapping[str | Blend, Tensor]) -> Tensor:
    """(R, K + 1) logits of the outcomes, less the row's largest logit, from measured fields; NaN in a NaN row."""
    rest = (measured["shift_rest"] - measured["shift_s"]) + measured["logsum_rest"]
    return torch.cat([measured["topk_logits"], rest.unsqueeze(1)], 1) + 0.0 * measured["logsum_s"].unsqueeze(1)


# Sums that stop at the listed tokens, each (R,) from log-probabilities (R, K), both 0 where either model bans
PARTIAL = {
    "forward_kl": lambda lp_s, lp_t, shared: (lp_t.exp() * (lp_t - lp_s)).sum(1),
    "reverse_kl": lambda lp_s, lp_t, shared: (lp_s.exp() * (lp_s - lp_t)).sum(1),
    "hellinger_sq": lambda lp_s, lp_t, shared: 1 - ((0.5 * (lp_s + lp_t)).exp() * shared).sum(1),
}
PARTIAL_FIELDS = {"kl_fwd": "forward_kl", "kl_rev": "reverse_kl", "hellinger_sq": "hellinger_sq"}


def partial_divergence(name: str, y: Tensor, lp_t: Tensor) -> Tensor:
    """A divergence whose sum stops at S, (R,), differentiable in the outcomes' logits y (R, K + 1); lp_t is (R, K)."""
    lp_s = (y - y.logsumexp(1, keepdim=True))[:, :-1]
    banned_s, banned_t = lp_s.detach().isneginf(), lp_t.isneginf()
    shared = ~(banned_s | banned_t)
    value = PARTIAL[name](lp_s.masked_fill(~shared, 0.0), lp_t.masked_fill(~shared, 0.0), shared)
    outside = {"forward_kl": banned_s & ~banned_t, "reverse_kl": banned_t & ~banned_s}.get(name)
    if outside is not None:
        value = value.masked_fill(outside.any(1) & ~value.detach().isnan(), torch.inf)
    return value


def partial_entropy(lp_t: Tensor) -> Tensor:
    """- sum_S t log t, (R,)."""
    return -(lp_t.exp() * lp_t.clamp(min=torch.finfo(lp_t.dtype).min)).sum(1)


def partial_fields(y: Tensor, lp_t: Tensor) -> Fields:
    """What compares the student's outcomes y (R, K + 1) with a teacher's K tokens, where the sums stop at those."""
    zero, invalid = torch.zeros_like(y[:, 0]), lp_t.isnan().any(1)
    fields: Fields = {name: partial_divergence(term, y, lp_t) for name, term in PARTIAL_FIELDS.items()}
    fields |= {"entropy_t": partial_entropy(lp_t), "logsum_t": zero}
    return {name: value.masked_fill(invalid, torch.nan) for name, value in fields.items()} | {"shift_t": zero}


def _place(ids: Tensor, v0: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Each id's column in the tile that starts at v0, and whether it has one; both (R, K)."""
    place = ids - v0
    inside = (place >= 0) & (place < tile.shape[1])
    return place.clamp(0, tile.shape[1] - 1), inside


def take_columns(tile: Tensor, ids: Tensor, v0: int, out: Tensor) -> Tensor:
    """out (R, K) with the tile's values where its columns are among the ids (R, K)."""
    place, inside = _place(ids, v0, tile)
    return torch.where(inside, tile.gather(1, place), out)


def hide_columns(tile: Tensor, ids: Tensor, v0: int) -> None:
    """Bans in the tile, in place, the columns that are among the ids (R, K)."""
    place, inside = _place(ids, v0, tile)
    tile.scatter_reduce_(1, place, torch.where(inside, -torch.inf, torch.inf).to(tile), "amin")


def add_columns(tile: Tensor, ids: Tensor, v0: int, values: Tensor) -> None:
    """tile[i, ids[i, k]] += values[i, k], in place, where that column is in the tile; ids and values are (R, K)."""
    place, inside = _place(ids, v0, tile)
    tile.scatter_add_(1, place, torch.where(inside, values, 0.0))
