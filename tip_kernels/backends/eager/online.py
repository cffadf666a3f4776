"""The accumulator: what one read of a row's logits must leave behind, and how two such states become one.

Half-exponent form, with z the logits, T the temperature, c = 2 ln 2: k = max z, u = (z - k) / (c T), h = 2^u, e = h^2

    L = 1 + M, M = sum e of all tokens but one of the largest        lse = k / T + log1p M
    A = sum e u                                                      entropy = log1p M - c A / L
    D_t = sum e_t (u_t - u_s) KL(t||s) = c D_t / L_t + ln(L_s / L_t)            D_s is the mirror
    Q = sum (h_t - h_s)^2     H = 1 - sum sqrt(p_t p_s) = (Q - (sqrt L_t - sqrt L_s)^2) / (2 sqrt(L_t L_s))

D and Q accumulate differences, so nearly equal rows do not cancel; k is subtracted before anything is rounded. M keeps
the digits of what a sure row leaves to the other tokens, which L rounds away: ln(L_s / L_t) near 0 is
log1p((M_s - M_t) / L_t). A state recentres exactly: when k grows by -c T d, with r = 2^d and a = r^2 (the L on the
right are the old ones)

    A <- a (A + d L)          D_t <- a_t (D_t + (d_t - d_s) L_t)                L <- a L

and M is the sum of the parts' new L, but of one with the largest k its M. H needs no shift: it is that of a part's own
distributions, p / (the part's share w^2 of p), and the whole has

    H = sum over parts of w_t w_s H + (w_t - w_s)^2 / 2

which cancels nowhere; Q of a whole row would, where one model is much flatter than the other. So states merge
associatively: recentre to the larger k, then add. A blend ln sum p_t^a p_s^b keeps a maximum of its own, of w = a u_t +
b u_s, which moves by a d_t + b d_s when the shifts do. A banned token (z = -inf) is clamped to FLOOR, so that its
differences are finite and 0 times them is 0; `ban_s` says that the student bans a token which the teacher allows, which
makes KL(t||s) infinite, whatever the token's probability. FLOOR is a power of two, so that products with it are exact.

R rows, C columns of a tile, P parts (tiles, splits or ranks) of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tip_kernels.stats import Blend

FLOOR = -(2.0**100)
SURE = 0.25  # a rest that is smaller loses digits beside the 1 of the largest token
NATS = 2.0 * math.log(2.0)  # nats per unit of u: the c above

State = dict  # field, Blend (its m) or ("sum", Blend) to fp32 (P, R) or, merged, (R,)


class Fold:
    """Folds pairs of logit tiles into states; holds the scratch buffers of one (R, C) tile size."""

    def __init__(
        self, n_rows: int, n_cols: int, n_models: int, want: frozenset[str | Blend], device: torch.device
    ) -> None:
        self.want = want
        self.blends = sorted(name for name in want if isinstance(name, Blend))
        self.entropy = {model: f"entropy_{model}" in want for model in "st"}
        scratch = 2 if "hellinger_sq" in want else 1
        self.buffers = [torch.empty(n_rows, n_cols, device=device) for _ in range(n_models + scratch)]

    def __call__(
        self, x_s: Tensor, x_t: Tensor | None, unit: float | Tensor, room: list[Tensor] | None = None
    ) -> State:
        """The state of one tile. x_s and x_t are logits (R, C), fp32; unit is 1 / (c T), maybe (R, 1).

        room  (R, C) of each model to work in; without it x_s and x_t are overwritten
        """
        banned = [_clamp_banned(x) for x in (x_s, x_t) if x is not None]
        scratch, *e = [b[: x_s.shape[0], : x_s.shape[1]] for b in self.buffers]
        state: State = {}
        w: list[Tensor] = []  # 2u: e = 2^(2u) takes no squaring
        for model, x, place, e_x, ban in zip("st", (x_s, x_t), room or (x_s, x_t), e, banned, strict=False):
            if x is not None:
                k = x.amax(1, keepdim=True)
                w.append(torch.sub(x, k, out=place).mul_(2.0 * unit))
                state |= {f"k_{model}": k.squeeze(1)} | self._sums_of_model(model, w[-1], e_x, ban, scratch)
        if "hellinger_sq" in self.want:
            torch.sqrt(e[0], out=e[2]).sub_(torch.sqrt(e[1], out=scratch))
            state["H"] = _hellinger_sq(e[2], state["L_s"], state["L_t"])
        if x_t is not None and (self.blends or self.want & {"kl_fwd", "kl_rev"}):
            state |= self._sums_of_pair(w, e, banned, scratch)
        return state

    def _sums_of_model(self, model: str, w: Tensor, e: Tensor, banned: Tensor | None, scratch: Tensor) -> State:
        """M, L and A of one model; leaves 2^w in e."""
        if banned is not None:
            w.clamp_(min=FLOOR)  # a small temperature would overflow it
        torch.exp2(w, out=e)
        rest = _sum_but_largest(e, w)
        state: State = {f"M_{model}": rest, f"L_{model}": 1 + rest}
        if self.entropy[model]:
            state[f"A_{model}"] = torch.mul(e, w, out=scratch).sum(1).mul_(0.5)
        return state

    def _sums_of_pair(self, w: list[Tensor], e: list[Tensor], banned: list[Tensor | None], scratch: Tensor) -> State:
        """D, the blends, and which model bans what the other allows; overwrites w."""
        ban_s = ban_t = None
        state: State = {name: w[0].new_zeros(w[0].shape[0]) for name in ("ban_s", "ban_t")}
        if any(b is not None for b in banned):
            ban_s, ban_t = (torch.zeros_like(w[0], dtype=torch.bool) if b is None else b for b in banned)
            state = {"ban_s": (ban_s & ~ban_t).any(1).float(), "ban_t": (ban_t & ~ban_s).any(1).float()}
        for blend in self.blends:
            state |= _fold_blend(blend, w[0], w[1], ban_s, ban_t, scratch)
        gap = w[1].sub_(w[0])  # finite, so that a banned token's e, which is 0, takes it out
        if "kl_fwd" in self.want:
            state["D_t"] = torch.mul(e[1], gap, out=scratch).sum(1).mul_(0.5)
        if "kl_rev" in self.want:
            state["D_s"] = torch.mul(e[0], gap, out=scratch).sum(1).mul_(-0.5)
        return state


def _hellinger_sq(gap: Tensor, mass_s: Tensor, mass_t: Tensor) -> Tensor:
    """(R,) of a tile's own distributions, from h_t - h_s up to its sign (R, C), which is overwritten, and both L."""
    root_s, root_t = mass_s.sqrt(), mass_t.sqrt()
    drift = (mass_t - mass_s) / (root_t + root_s)
    spread = gap.mul_(gap).sum(1) - drift * drift
    return (spread / (2 * root_s * root_t)).clamp_(0.0, 1.0)


class EagerMoments:
    """The accumulator of a block of rows: its tiles, folded."""

    def __init__(self, fold: Fold, temperature: float | Tensor) -> None:
        self.fold, self.temperature, self.unit = fold, temperature, 1 / (NATS * temperature)
        self.parts: list[State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        unit = self.unit.unsqueeze(1) if isinstance(self.unit, Tensor) else self.unit
        self.parts.append(self.fold(tiles[0], tiles[1] if len(tiles) == 2 else None, unit, scratch))

    def state(self) -> State:
        return merge(self.parts, self.unit)

    def finish(self, states: list[State], fields: dict) -> dict:
        return finish(merge(states, self.unit), self.temperature)


def _sum_but_largest(e: Tensor, w: Tensor) -> Tensor:
    """(R,) the sum of e = 2^w (R, C) without one entry of the largest w, which is 0 and whose e is 1."""
    rest = e.sum(1) - 1
    sure = rest < SURE
    if e.device.type != "cpu":  # choosing rows would have to wait for the device
        return torch.where(sure, e.scatter(1, w.argmax(1, keepdim=True), 0.0).sum(1), rest)
    rows = sure.nonzero().squeeze(1)
    if rows.numel():
        rest[rows] = e[rows].scatter_(1, w[rows].argmax(1, keepdim=True), 0.0).sum(1)
    return rest


def _fold_blend(
    blend: Blend, w_s: Tensor, w_t: Tensor, ban_s: Tensor | None, ban_t: Tensor | None, scratch: Tensor
) -> State:
    w = torch.mul(w_t, 0.5 * blend.a, out=scratch).add_(w_s, alpha=0.5 * blend.b)
    if ban_s is not None and ban_t is not None:  # what either bans adds nothing; an infinite sum is known by its flag
        zero = torch.zeros_like(ban_s)
        w.masked_fill_((ban_t if blend.a else zero) | (ban_s if blend.b else zero), FLOOR)
    m = w.amax(1, keepdim=True)
    total = w.sub_(m).mul_(2.0).exp2_().sum(1)
    return {blend: m.squeeze(1), ("sum", blend): total}


def _clamp_banned(x: Tensor) -> Tensor | None:
    """Clamps x to FLOOR and tells where it was banned; None if nowhere, which only a CPU can ask without waiting."""
    if x.numel() == 0:
        return None
    if x.device.type == "cpu" and bool(x.amin() > FLOOR):  # False with a NaN, so that its neighbours are still clamped
        return None
    mask = x <= FLOOR
    x.clamp_(min=FLOOR)
    return mask


def merge(parts: list[State], unit: float | Tensor) -> State:
    """One state from the states of a row's parts, in their order; associative. unit is 1 / (c T), or (R,)."""
    if len(parts) == 1:
        return parts[0]
    p = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    out: State = {}
    d, r, a = {}, {}, {}
    for model in "st":
        if f"k_{model}" in p:
            k = p[f"k_{model}"]
            out[f"k_{model}"], first = k.max(0)
            d[model] = ((k - out[f"k_{model}"]) * unit).clamp(min=FLOOR)
            r[model] = torch.exp2(d[model])
            a[model] = r[model] * r[model]
            masses = a[model] * p[f"L_{model}"]
            first = first.unsqueeze(0)
            rest = masses.scatter(0, first, p[f"M_{model}"].gather(0, first)).sum(0)
            out[f"M_{model}"], out[f"L_{model}"] = rest, 1 + rest
            if f"A_{model}" in p:
                out[f"A_{model}"] = (a[model] * (p[f"A_{model}"] + d[model] * p[f"L_{model}"])).sum(0)
    for model, other in (("t", "s"), ("s", "t")):
        if f"D_{model}" in p:
            shifted = p[f"D_{model}"] + (d[model] - d[other]) * p[f"L_{model}"]
            out[f"D_{model}"] = (a[model] * shifted).sum(0)
    if "H" in p:
        w_s, w_t = (r[model] * (p[f"L_{model}"] / out[f"L_{model}"]).sqrt() for model in "st")
        out["H"] = (w_t * w_s * p["H"] + 0.5 * (w_t - w_s).square()).sum(0)
    for flag in ("ban_s", "ban_t"):
        if flag in p:
            out[flag] = p[flag].amax(0)
    for name in p:
        if isinstance(name, Blend):
            moved = p[name] + name.a * d["t"] + name.b * d["s"]
            m = torch.where(p[name] > FLOOR, moved, FLOOR)
            out[name] = m.amax(0)
            out["sum", name] = (torch.exp2(2.0 * (m - out[name])) * p["sum", name]).sum(0)
    return out


def finish(state: State, temperature: float | Tensor) -> dict[str | Blend, Tensor]:
    """The statistics of merged states: every TokenStats field whose sums are there, with shift and logsum."""
    out: dict[str | Blend, Tensor] = {}
    for model in "st":
        if f"k_{model}" in state:
            k, total = state[f"k_{model}"], state[f"L_{model}"]
            log_mass = state[f"M_{model}"].log1p()
            logsum = torch.where(k > FLOOR, log_mass, torch.nan)  # k = FLOOR: nothing but banned tokens
            out[f"shift_{model}"], out[f"logsum_{model}"] = k / temperature, logsum
            out[f"lse_{model}"] = k / temperature + logsum
            if f"A_{model}" in state:
                out[f"entropy_{model}"] = logsum - NATS * state[f"A_{model}"] / total
    for field, model, other in (("kl_fwd", "t", "s"), ("kl_rev", "s", "t")):
        if f"D_{model}" in state:
            total, grown = state[f"L_{model}"], state[f"M_{other}"] - state[f"M_{model}"]
            log_ratio = torch.log(state[f"L_{other}"] / total)
            log_ratio = torch.where(grown.abs() < 0.5 * total, torch.log1p(grown / total), log_ratio)
            kl = (NATS * state[f"D_{model}"] / total + log_ratio).clamp_(min=0.0)
            kl = torch.where(state[f"ban_{other}"] > 0, torch.inf, kl)
            out[field] = torch.where(torch.isnan(out["lse_s"] + out["lse_t"]), torch.nan, kl)
    if "H" in state:
        hellinger_sq = state["H"].clamp(0.0, 1.0)
        out["hellinger_sq"] = torch.where(torch.isnan(out["lse_s"] + out["lse_t"]), torch.nan, hellinger_sq)
    for blend in [name for name in state if isinstance(name, Blend)]:
        logs = blend.a * out["logsum_t"] + blend.b * out["logsum_s"]
        value = NATS * state[blend] + state["sum", blend].log() - logs
        value = torch.where(state[blend] > FLOOR, value, -torch.inf)
        for power, flag in ((blend.a, "ban_t"), (blend.b, "ban_s")):
            value = torch.where(state[flag] > 0, torch.inf, value) if power < 0 else value
        out[blend] = torch.where(torch.isnan(logs), torch.nan, value)
    return out


def label_field(model: str, z: Tensor, temperature: float | Tensor, out: dict) -> dict:
    """The log-probability of a label from its logit z (R,) at temperature 1, NaN for none."""
    logp = (z / temperature - out[f"shift_{model}"]) - out[f"logsum_{model}"]
    return {f"logp_{model}": torch.where(z <= FLOOR, -torch.inf, logp) + 0.0 * out[f"logsum_{model}"]}
