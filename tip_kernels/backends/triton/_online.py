"""The one fold: sums over a vocabulary that can be cut anywhere and merged again, for one model or a pair.

Legend: s student, t teacher; z logits after scale, softcap and temperature (nats); c = 2 ln 2.
x = z / c is the logit in half-exponent units, k the shift (near the largest x), u = x - k, h = 2^u, e = h h, which is
exp(z - c k). With h at hand sqrt(e_s e_t) = h_s h_t costs no third exponential.

    mass     L   = sum e                       lse         = c k + ln L
    moment   A   = sum e u                     entropy     = ln L - c A / L
    drift_t  D_t = sum e_t (u_t - u_s)         KL(t || s)  = c D_t / L_t + log1p((L_s - L_t) / L_t)
    drift_s  D_s = sum e_s (u_t - u_s)         KL(s || t)  = -c D_s / L_s + log1p((L_t - L_s) / L_s)
    spread   Q   = sum (h_t - h_s)^2           1 - sum sqrt(p_s p_t) = (Q - (sqrt L_t - sqrt L_s)^2) / (2 sqrt(L_s L_t))

Every sum is small where the rows are close, so nothing cancels. A shift that moves by d = k_old - k_new carries the
sums exactly (`_moved`), which is all that merging needs. x at or below FLOOR is a banned token: it adds nothing, and
the KL that it makes infinite is marked by a flag, never guessed from a size. NaN and +inf make the mass NaN.

This file knows tiles and scalars; pointers and launches are in the files that use it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._constant import constant

# A power of two, so that FLOOR - FLOOR is exactly 0 whether or not a multiply-add is fused.
FLOOR = constant(-(2.0**100))
HALF_LOG2E = constant(0.7213475204444817)  # 1 / c
C = constant(1.3862943649291992)  # 2 ln 2 rounded to fp32 ...
C_TAIL = constant(-3.8093086e-09)  # ... and what the rounding left
# Shifts lie on a grid of 1/64: fine enough that two close rows get close shifts, coarse enough that c k in nats, once
# rounded to fp32, still determines k.
GRID = constant(64.0)
# A mass above this over a fixed shift costs moments their digits: u up to 6, or 8 nats.
GUARD = constant(2.0**12)
NOWHERE = constant(2**24)  # a column that no row has


class One(NamedTuple):
    """Sums of one model: scalars, lanes or rows."""

    shift: tl.tensor
    mass: tl.tensor
    moment: tl.tensor


class Pair(NamedTuple):
    """Sums that read both models. ban_s is 1.0 if the student bans a token that the teacher does not, else 0.0."""

    drift_t: tl.tensor
    drift_s: tl.tensor
    spread: tl.tensor
    ban_s: tl.tensor
    ban_t: tl.tensor


class Lanes(NamedTuple):
    """A pair's sums while they are vectors; far is the largest |u_t - u_s|, where a token banned in one model shows."""

    drift_t: tl.tensor
    drift_s: tl.tensor
    spread: tl.tensor
    far: tl.tensor


class Top(NamedTuple):
    """The two largest logits (before scale and temperature) and the column of the first."""

    first: tl.tensor
    second: tl.tensor
    column: tl.tensor


class Model(NamedTuple):
    """One model's row: where it starts, half-exponent units per unit of (capped) logit, and the factor inside tanh."""

    row: tl.tensor
    unit: tl.tensor
    inner: tl.tensor


@triton.jit
def widen(raw):
    """fp32 of a bf16, fp16 or fp32 tile, exactly. A shift is one instruction, a bf16 cast one and a half."""
    if raw.dtype == tl.bfloat16:
        return (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def tanh(v):
    """tanh(v): its series below 0.3, 1 - 2 / (1 + exp(2 |v|)) above.

    Its absolute error is below 3e-7, or 5e-7 where exp2 and rsqrt err by all that is documented.
    """
    w = tl.abs(v)
    root = tl.rsqrt(1.0 + tl.exp2(w * (4.0 * HALF_LOG2E)))  # a division takes eight instructions; 0 at infinity
    g = w * w
    near = tl.fma(g, tl.fma(g, tl.fma(g, tl.fma(g, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0), 1.0) * w
    w = tl.where(w < 0.3, near, tl.fma(-2.0 * root, root, 1.0))
    return tl.where(v < 0.0, -w, w)


@triton.jit
def capped(z, inner):
    """z, or tanh(inner z) where there is a softcap; the factor in front of the tanh is part of the unit."""
    if inner is None:
        return z
    else:
        return tanh(inner * z)


@triton.jit
def grid_ceil(x):
    """The smallest point of the shift grid that is no less than x; FLOOR stays FLOOR."""
    return tl.ceil(x * GRID) * (1.0 / GRID)  # a division is approximate, and would leave the grid


@triton.jit
def half_unit(outer, temperature):
    """Half-exponent units per unit of logit; the one place where a temperature enters. `/` would be approximate."""
    return tl.div_rn(outer * HALF_LOG2E, temperature)


@triton.jit
def _number(value: tl.constexpr):
    return tl.full((), value, tl.float32)


@triton.jit
def no_one():
    """The state of no column at all."""
    return One(_number(FLOOR), _number(0.0), _number(0.0))


@triton.jit
def no_pair():
    """The pair's state of no column at all."""
    return Pair(_number(0.0), _number(0.0), _number(0.0), _number(0.0), _number(0.0))


@triton.jit
def no_top():
    """The list of no column at all."""
    return Top(_number(FLOOR), _number(FLOOR), tl.full((), NOWHERE, tl.int32))


@triton.jit
def total(x, AXIS: tl.constexpr = 0):
    """The sum of a vector, or (AXIS 1) of each row of a block.

    Of a vector neighbours are added, then neighbours among those, down to 32; then halves. `tl.sum` alone adds in an
    order that follows the layout of the lanes, hence the dtype and alignment of what was loaded; a sum of two has none.
    """
    if AXIS == 1:
        return tl.sum(x, 1)
    elif x.shape[0] > 32:
        return total(tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1))
    elif x.shape[0] > 2:
        return total(tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), 0))
    else:
        return tl.sum(x)


# ---- fold: many columns into per-lane sums, where no column is banned


@triton.jit
def add_one(lanes, y, unit):
    """Adds a tile of logits y to one model's lanes. Returns (lanes, u, h, e)."""
    u = tl.fma(y, unit, -lanes.shift)
    h = tl.exp2(u)
    e = h * h
    return One(lanes.shift, tl.fma(h, h, lanes.mass), tl.fma(e, u, lanes.moment)), u, h, e


@triton.jit
def add_pair(lanes, u_s, h_s, e_s, u_t, h_t, e_t):
    """Adds a tile to a pair's lanes."""
    d = u_t - u_s
    g = h_t - h_s
    return Lanes(
        tl.fma(e_t, d, lanes.drift_t),
        tl.fma(e_s, d, lanes.drift_s),
        tl.fma(g, g, lanes.spread),
        tl.maximum(lanes.far, tl.abs(d)),
    )


@triton.jit
def add_top(top, y, column):
    """Adds one tile, whose first column is `column`, to per-lane two-largest lists; the earlier column wins a tie."""
    grew = y > top.first
    second = tl.maximum(top.second, tl.minimum(top.first, y))
    return Top(tl.where(grew, y, top.first), second, tl.where(grew, column, top.column))


@triton.jit
def top_of_lanes(top, lane):
    """Reduces per-lane lists to scalars; `lane` is each lane's offset from the tile's first column."""
    column = top.column + lane
    first = tl.max(top.first)
    winner = tl.min(tl.where(top.first == first, column, NOWHERE))
    second = tl.max(tl.where(column == winner, top.second, top.first))
    return Top(first, second, winner)


@triton.jit
def close_one(lanes):
    """(a model's lanes as scalars, whether they are exact).

    They are not where one of them overflowed or the moment is NaN; -inf, +inf and NaN among the logits all cause it.
    """
    one = One(lanes.shift, total(lanes.mass), total(lanes.moment))
    return one, (one.mass > 0.0) & (one.mass < float("inf")) & (tl.abs(one.moment) < float("inf"))


@triton.jit
def close_pair(lanes):
    """(a pair's lanes as scalars, whether they are exact): no token may be banned in one model only."""
    pair = Pair(total(lanes.drift_t), total(lanes.drift_s), total(lanes.spread), _number(0.0), _number(0.0))
    return pair, tl.max(lanes.far) < -0.5 * FLOOR


# ---- fold: one tile into scalars (AXIS 0), or a block of rows into one state a row (AXIS 1), whatever is in it


@triton.jit
def across(x, AXIS: tl.constexpr):
    """A number a row, ready to meet the tile."""
    if AXIS == 0:
        return x
    else:
        return x[:, None]


@triton.jit
def tile_one(y, unit, banned, AXIS: tl.constexpr = 0):
    """State of one model over one tile of logits y in units of 1/unit. Returns (One, u, h, e)."""
    most = tl.max(tl.maximum(tl.where(banned, FLOOR, y * across(unit, AXIS)), FLOOR), AXIS)
    shift = grid_ceil(most)
    u = tl.where(banned, FLOOR, tl.fma(y, across(unit, AXIS), -across(shift, AXIS)))
    h = tl.exp2(u)
    e = h * h
    return One(shift, total(e, AXIS), total(e * u, AXIS)), u, h, e


@triton.jit
def tile_pair(u_s, h_s, e_s, banned_s, u_t, h_t, e_t, banned_t, AXIS: tl.constexpr = 0):
    """State of a pair over one tile; a token banned in either model adds no drift, only its flag."""
    d = tl.where(banned_s | banned_t, 0.0, u_t - u_s)
    g = h_t - h_s
    ban_s = tl.max(tl.where(banned_s & (banned_t == 0), 1.0, 0.0), AXIS)
    ban_t = tl.max(tl.where(banned_t & (banned_s == 0), 1.0, 0.0), AXIS)
    return Pair(total(e_t * d, AXIS), total(e_s * d, AXIS), total(g * g, AXIS), ban_s, ban_t)


@triton.jit
def tile_top(y, column, lane):
    """The list of one tile; a banned token stands at FLOOR."""
    y = tl.maximum(y, FLOOR)
    return top_of_lanes(Top(y, tl.full(y.shape, FLOOR, tl.float32), column), lane)


# ---- merge: two states into one, as scalars or as rows


@triton.jit
def _moved(one, d):
    """Carries one model's sums to a shift larger by -d: A <- a (A + d L), L <- a L with a = 4^d."""
    a = tl.exp2(2.0 * d)
    return One(one.shift - d, a * one.mass, a * tl.fma(d, one.mass, one.moment))


@triton.jit
def _moved_pair(pair, s, t, d_s, d_t):
    """Carries a pair's sums along; s and t are the models' sums before they moved."""
    r_s = tl.exp2(d_s)
    r_t = tl.exp2(d_t)
    d = d_t - d_s
    return Pair(
        r_t * r_t * tl.fma(d, t.mass, pair.drift_t),
        r_s * r_s * tl.fma(d, s.mass, pair.drift_s),
        tl.fma(r_t * r_s, pair.spread, (r_t - r_s) * (r_t * t.mass - r_s * s.mass)),
        pair.ban_s,
        pair.ban_t,
    )


@triton.jit
def _sum_one(a, b, shift):
    return One(shift, a.mass + b.mass, a.moment + b.moment)


@triton.jit
def merge_one(a, b):
    """The state of two disjoint sets of columns, one model."""
    shift = tl.maximum(a.shift, b.shift)
    return _sum_one(_moved(a, a.shift - shift), _moved(b, b.shift - shift), shift)


@triton.jit
def merge(s, t, pair, s2, t2, pair2):
    """The state of two disjoint sets of columns, both models."""
    k_s = tl.maximum(s.shift, s2.shift)
    k_t = tl.maximum(t.shift, t2.shift)
    p = _moved_pair(pair, s, t, s.shift - k_s, t.shift - k_t)
    p2 = _moved_pair(pair2, s2, t2, s2.shift - k_s, t2.shift - k_t)
    pair = Pair(
        p.drift_t + p2.drift_t,
        p.drift_s + p2.drift_s,
        p.spread + p2.spread,
        tl.maximum(p.ban_s, p2.ban_s),
        tl.maximum(p.ban_t, p2.ban_t),
    )
    return merge_one(s, s2), merge_one(t, t2), pair


@triton.jit
def merge_top(a, b):
    """The two largest of both lists; the lower column wins a tie."""
    column = tl.where(
        a.first == b.first, tl.minimum(a.column, b.column), tl.where(a.first > b.first, a.column, b.column)
    )
    second = tl.maximum(tl.minimum(a.first, b.first), tl.maximum(a.second, b.second))
    return Top(tl.maximum(a.first, b.first), second, column)


@triton.jit
def _settling(one):
    """The step that brings the mass within a hundredth of 1; 0 where there is no mass or a NaN."""
    step = tl.floor(tl.log2(tl.where(one.mass > 0.0, one.mass, 1.0)) * (0.5 * GRID) + 0.5) * (1.0 / GRID)
    return tl.where(one.mass > 0.0, -step, 0.0)


@triton.jit
def settle_one(s):
    """Moves the shift so that the mass is about 1 and ln L rounds finely."""
    return _moved(s, _settling(s))


@triton.jit
def settle(s, t, pair):
    """`settle_one` for both models of a pair."""
    d_s = _settling(s)
    d_t = _settling(t)
    return _moved(s, d_s), _moved(t, d_t), _moved_pair(pair, s, t, d_s, d_t)


# ---- finish: sums into statistics, as rows


@triton.jit
def shift_in_nats(k):
    """(c k rounded to fp32, what the rounding left)."""
    shift = C * k
    return shift, tl.fma(k, C, -shift) + k * C_TAIL


@triton.jit
def shift_from_nats(shift):
    """The grid point k that `shift_in_nats` made this shift from."""
    return tl.floor(shift * (HALF_LOG2E * GRID) + 0.5) * (1.0 / GRID)


@triton.jit
def alive(one):
    """False for a row with a NaN or +inf (its mass is NaN) or nothing but -inf (its shift is FLOOR)."""
    return (one.shift > FLOOR) & (one.mass > 0.0)


@triton.jit
def log1p(v):
    """ln(1 + v) with full relative accuracy near 0 (Kahan): ln(w) v / (w - 1), w = 1 + v."""
    w = 1.0 + v
    exact = w == 1.0
    return tl.where(exact, v, tl.log(w) * (v / tl.where(exact, 1.0, w - 1.0)))


@triton.jit
def finish_one(one):
    """(shift, ln L to go with it, lse, entropy) in nats; NaN for a row that is not alive."""
    ok = alive(one)
    nan = float("nan")
    shift, rest = shift_in_nats(one.shift)
    mass = tl.where(ok, one.mass, 1.0)
    log_mass = tl.log(mass)
    logsum = tl.where(ok, log_mass + rest, nan)
    entropy = tl.where(ok, tl.maximum(log_mass - C * (one.moment / mass), 0.0), nan)
    return tl.where(ok, shift, nan), logsum, shift + logsum, entropy


@triton.jit
def finish_pair(s, t, pair):
    """(KL(t || s), KL(s || t), 1 - sum sqrt(p_s p_t)); +inf where a flag says so, NaN where either row is not alive."""
    ok = alive(s) & alive(t)
    nan = float("nan")
    mass_s = tl.where(ok, s.mass, 1.0)
    mass_t = tl.where(ok, t.mass, 1.0)
    kl_fwd = tl.maximum(C * (pair.drift_t / mass_t) + log1p((mass_s - mass_t) / mass_t), 0.0)
    kl_rev = tl.maximum(log1p((mass_t - mass_s) / mass_s) - C * (pair.drift_s / mass_s), 0.0)
    root = tl.sqrt(mass_t) - tl.sqrt(mass_s)
    distance = (pair.spread - root * root) / (2.0 * tl.sqrt(mass_s * mass_t))
    distance = tl.minimum(tl.maximum(distance, 0.0), 1.0)
    kl_fwd = tl.where(pair.ban_s > 0.0, float("inf"), kl_fwd)
    kl_rev = tl.where(pair.ban_t > 0.0, float("inf"), kl_rev)
    return tl.where(ok, kl_fwd, nan), tl.where(ok, kl_rev, nan), tl.where(ok, distance, nan)
