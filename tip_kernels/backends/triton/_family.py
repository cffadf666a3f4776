"""The family of divergences, entry by entry: what each adds to the gradient and, where it needs them, its row sums.

l_s, l_t are log-probabilities in bits (log2 p) of a tile, p = 2^l; a banned token has l at most NEVER and p = 0. Row
scalars are per row, parameters per call. A gradient function returns g + w dD/dz_s. A sum function returns the two
summands whose sums over the vocabulary are row scalars of its gradient and make its value. ln x = LN2 log2 x.
"""

import triton
import triton.language as tl

from ._constant import constant

LN2 = constant(0.6931471805599453)
LOG2E = constant(1.4426950408889634)
# Finite, so that 0 * NEVER = 0; twice FLOOR, because bits are half of a half-exponent.
NEVER = constant(-(2.0**101))

FORWARD_KL = constant(0)
REVERSE_KL = constant(1)
HELLINGER_SQ = constant(2)
RENYI = constant(3)
ALPHA_BETA = constant(4)
JSD = constant(5)
SKEW_FORWARD_KL = constant(6)
SKEW_REVERSE_KL = constant(7)
TVD = constant(8)
TODI = constant(9)
LABEL_SCORE = constant(10)

# name: (kind, row scalars of the gradient in order, sums in order or () where measured statistics are enough)
KINDS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "forward_kl": (int(FORWARD_KL), (), ()),
    "reverse_kl": (int(REVERSE_KL), ("kl_rev",), ()),
    "hellinger_sq": (int(HELLINGER_SQ), ("hellinger_sq",), ()),
    "renyi": (int(RENYI), ("log_blend",), ()),
    "alpha_beta": (int(ALPHA_BETA), ("sum_g",), ("value", "sum_g")),
    "jsd": (int(JSD), ("kl_s",), ("kl_s", "kl_t")),
    "skew_forward_kl": (int(SKEW_FORWARD_KL), ("mean_share",), ("value", "mean_share")),
    "skew_reverse_kl": (int(SKEW_REVERSE_KL), ("value", "mean_share"), ("value", "mean_share")),
    "tvd": (int(TVD), ("mean_sign",), ("value", "mean_sign")),
    "todi": (int(TODI), ("sum_g",), ("value", "sum_g")),
    "label_score": (int(LABEL_SCORE), ("label_factor",), ()),
}


@triton.jit
def at_least_never(bits):
    """Log-probabilities clamped so that differences of two are finite; NaN stays."""
    return tl.maximum(bits, NEVER, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_over_mixture(l_s, l_t, weight_t):
    """(log2(p_s / M), log2(p_t / M)), M = weight_t p_t + (1 - weight_t) p_s, from the log-ratio d = l_t - l_s alone.

    M / p_s = 2^a + 2^(b + d) and M / p_t = 2^(a - d) + 2^b, a = log2(1 - weight_t), b = log2(weight_t).
    """
    d = at_least_never(l_t) - at_least_never(l_s)
    a = tl.log2(1.0 - weight_t)
    b = tl.log2(weight_t)
    rest = tl.log2(1.0 + tl.exp2(-tl.abs(a - b - d)))
    return -tl.maximum(a, b + d) - rest, -tl.maximum(a - d, b) - rest


@triton.jit
def sigmoid2(x):
    """1 / (1 + 2^-x)"""
    return 1.0 / (1.0 + tl.exp2(-x))


# ---- single-pass: row scalars are measured statistics


@triton.jit
def forward_kl(g, w, p_s, p_t):
    """KL(t || s): p_s - p_t"""
    return tl.fma(w, p_s - p_t, g)


@triton.jit
def reverse_kl(g, w, l_s, l_t, p_s, kl_rev):
    """KL(s || t): p_s (ln(p_s / p_t) - KL(s || t))"""
    return tl.fma(p_s, tl.fma(l_s - l_t, w * LN2, -w * kl_rev), g)


@triton.jit
def hellinger_sq(g, w, l_s, l_t, p_s, h2):
    """1 - sum sqrt(p_s p_t): (p_s (1 - H2) - sqrt(p_s p_t)) / 2"""
    return tl.fma(0.5 * w, tl.fma(p_s, 1.0 - h2, -tl.exp2(0.5 * (l_s + l_t))), g)


@triton.jit
def renyi(g, w, l_s, l_t, p_s, log_blend, alpha):
    """ln(sum p_t^alpha p_s^(1 - alpha)) / (alpha - 1): p_s - p_t^alpha p_s^(1 - alpha) / sum of the same"""
    bits = log_blend * LOG2E
    gap = tl.fma(alpha, at_least_never(l_t) - at_least_never(l_s), -bits)
    more = exp2_difference(tl.fma(alpha, l_t, (1.0 - alpha) * l_s) - bits, l_s, gap)
    return tl.fma(-w, tl.where(l_s > NEVER, more, 0.0), g)


@triton.jit
def label_score(g, w, p_s, label_factor):
    """k ln p_s[label], k a constant: -k p_s; the label's own k is added where its column is"""
    return tl.fma(-w * label_factor, p_s, g)


# ---- two-pass: row scalars take a sweep of their own


@triton.jit
def jsd(g, w, l_s, l_t, p_s, kl_s, weight_t):
    """v KL(t || M) + (1 - v) KL(s || M), M = v p_t + (1 - v) p_s: (1 - v) p_s (ln(p_s / M) - KL(s || M))"""
    ratio, _ = log2_over_mixture(l_s, l_t, weight_t)
    return tl.fma(p_s, tl.fma(ratio, w * (1.0 - weight_t) * LN2, -w * (1.0 - weight_t) * kl_s), g)


@triton.jit
def jsd_sums(l_s, l_t, p_s, p_t, weight_t):
    """KL(s || M), KL(t || M)"""
    ratio_s, ratio_t = log2_over_mixture(l_s, l_t, weight_t)
    return LN2 * p_s * ratio_s, LN2 * p_t * ratio_t


@triton.jit
def skew_forward_kl(g, w, l_s, l_t, p_s, p_t, mean_share, a):
    """KL(t || M), M = a p_t + (1 - a) p_s: p_s E_t[r] - p_t r, r = (1 - a) p_s / M"""
    share = (1.0 - a) * tl.exp2(log2_over_mixture(l_s, l_t, a)[0])
    return tl.fma(w, p_s * mean_share - p_t * share, g)


@triton.jit
def skew_forward_kl_sums(l_s, l_t, p_s, p_t, a):
    """KL(t || M), E_t[r]"""
    ratio_s, ratio_t = log2_over_mixture(l_s, l_t, a)
    return LN2 * p_t * ratio_t, p_t * (1.0 - a) * tl.exp2(ratio_s)


@triton.jit
def skew_reverse_kl(g, w, l_s, l_t, p_s, value, mean_share, a, detached):
    """KL(s || M), M = (1 - a) p_t + a p_s: p_s (ln(p_s / M) - r - (value - E_s[r])), r = a p_s / M, or 0 if detached"""
    ratio, _ = log2_over_mixture(l_s, l_t, 1.0 - a)
    share = (1.0 - detached) * (a * tl.exp2(ratio) - mean_share)
    return tl.fma(w * p_s, LN2 * ratio - share - value, g)


@triton.jit
def skew_reverse_kl_sums(l_s, l_t, p_s, a):
    """KL(s || M), E_s[r]"""
    ratio, _ = log2_over_mixture(l_s, l_t, 1.0 - a)
    return LN2 * p_s * ratio, a * p_s * tl.exp2(ratio)


@triton.jit
def expm1(v):
    """e^v - 1 for |v| up to 0.35, relative error below 4e-7: its series."""
    w = tl.fma(v, 1.0 / 6.0, 1.0)
    w = tl.fma(v * w, 1.0 / 5.0, 1.0)
    w = tl.fma(v * w, 1.0 / 4.0, 1.0)
    w = tl.fma(v * w, 1.0 / 3.0, 1.0)
    return v * tl.fma(v * w, 0.5, 1.0)


@triton.jit
def exp2_difference(y, x, gap):
    """2^y - 2^x, gap = y - x: by the gap where it is small, as the difference would cancel."""
    e = tl.exp2(x)
    near = tl.abs(gap) < 0.5
    return tl.where(near, e * expm1(tl.where(near, gap, 0.0) * LN2), tl.exp2(y) - e)


@triton.jit
def alpha_beta_cross(l_s, l_t, a, b):
    """p_t^a p_s^b - p_s^(a + b)"""
    d = at_least_never(l_t) - at_least_never(l_s)
    return exp2_difference(tl.fma(a, l_t, b * l_s), (a + b) * l_s, a * d)


@triton.jit
def alpha_beta(g, w, l_s, l_t, p_s, sum_g, a, b):
    """ABKD: g - p_s sum g, g = (p_s^(a + b) - p_t^a p_s^b) / a"""
    return tl.fma(-w, tl.fma(p_s, sum_g, alpha_beta_cross(l_s, l_t, a, b) / a), g)


@triton.jit
def alpha_beta_sums(l_s, l_t, a, b):
    """the value, sum g"""
    d = at_least_never(l_t) - at_least_never(l_s)
    cross = alpha_beta_cross(l_s, l_t, a, b)
    whole = exp2_difference((a + b) * l_t, (a + b) * l_s, (a + b) * d)
    return (a / (a + b) * whole - cross) / (a * b), -cross / a


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def tvd(g, w, l_s, l_t, p_s, mean_sign):
    """sum |p_s - p_t| / 2: p_s (sign(p_s - p_t) - E_s[sign]) / 2, with sign 0 at a tie, by the finer logarithms"""
    return tl.fma(0.5 * w * p_s, sign(at_least_never(l_s) - at_least_never(l_t)) - mean_sign, g)


@triton.jit
def tvd_sums(l_s, l_t, p_s, p_t):
    """the value, E_s[sign]"""
    return 0.5 * tl.abs(p_s - p_t), p_s * sign(at_least_never(l_s) - at_least_never(l_t))


@triton.jit
def todi_entry(l_s, l_t, p_s, p_t, beta):
    """(d, v p_t, (1 - v) p_s) with d = ln(p_t / p_s) and v = sigmoid(beta d)"""
    d = at_least_never(l_t) - at_least_never(l_s)
    return LN2 * d, sigmoid2(beta * d) * p_t, sigmoid2(-beta * d) * p_s


@triton.jit
def todi(g, w, l_s, l_t, p_s, p_t, sum_g, beta):
    """sum v p_t d - (1 - v) p_s d, v a constant: g - p_s sum g, g = (1 - v) p_s (1 - d) - v p_t"""
    d, up, down = todi_entry(l_s, l_t, p_s, p_t, beta)
    return tl.fma(w, down - up - down * d - p_s * sum_g, g)


@triton.jit
def todi_sums(l_s, l_t, p_s, p_t, beta):
    """the value, sum g"""
    d, up, down = todi_entry(l_s, l_t, p_s, p_t, beta)
    return (up - down) * d, down - up - down * d


# ---- by kind


@triton.jit
def add_gradient(KIND: tl.constexpr, R: tl.constexpr, P: tl.constexpr, g, w, l_s, l_t, p_s, p_t, rows, numbers):
    """g + w times one term's gradient: row scalars rows[R:], weight numbers[P], parameters numbers[P + 1:]."""
    w *= numbers[P]
    if KIND == FORWARD_KL:
        return forward_kl(g, w, p_s, p_t)
    elif KIND == REVERSE_KL:
        return reverse_kl(g, w, l_s, l_t, p_s, rows[R])
    elif KIND == HELLINGER_SQ:
        return hellinger_sq(g, w, l_s, l_t, p_s, rows[R])
    elif KIND == RENYI:
        return renyi(g, w, l_s, l_t, p_s, rows[R], numbers[P + 1])
    elif KIND == ALPHA_BETA:
        return alpha_beta(g, w, l_s, l_t, p_s, rows[R], numbers[P + 1], numbers[P + 2])
    elif KIND == JSD:
        return jsd(g, w, l_s, l_t, p_s, rows[R], numbers[P + 1])
    elif KIND == SKEW_FORWARD_KL:
        return skew_forward_kl(g, w, l_s, l_t, p_s, p_t, rows[R], numbers[P + 1])
    elif KIND == SKEW_REVERSE_KL:
        return skew_reverse_kl(g, w, l_s, l_t, p_s, rows[R], rows[R + 1], numbers[P + 1], numbers[P + 2])
    elif KIND == TVD:
        return tvd(g, w, l_s, l_t, p_s, rows[R])
    elif KIND == TODI:
        return todi(g, w, l_s, l_t, p_s, p_t, rows[R], numbers[P + 1])
    else:
        tl.static_assert(KIND == LABEL_SCORE, "no such divergence")
        return label_score(g, w, p_s, rows[R])


@triton.jit
def sum_terms(KIND: tl.constexpr, P: tl.constexpr, l_s, l_t, p_s, p_t, numbers):
    """The two summands of a two-pass divergence whose parameters are numbers[P:]."""
    if KIND == JSD:
        return jsd_sums(l_s, l_t, p_s, p_t, numbers[P])
    elif KIND == SKEW_FORWARD_KL:
        return skew_forward_kl_sums(l_s, l_t, p_s, p_t, numbers[P])
    elif KIND == SKEW_REVERSE_KL:
        return skew_reverse_kl_sums(l_s, l_t, p_s, numbers[P])
    elif KIND == TVD:
        return tvd_sums(l_s, l_t, p_s, p_t)
    elif KIND == ALPHA_BETA:
        return alpha_beta_sums(l_s, l_t, numbers[P], numbers[P + 1])
    else:
        tl.static_assert(KIND == TODI, "this divergence needs no sums")
        return todi_sums(l_s, l_t, p_s, p_t, numbers[P])
