"""The family of divergences, one record each: the statistics it needs, its value from them, and its gradient.

    single-pass   the value comes from measured statistics alone
    two-pass      it takes row scalars that exist only once both normalizers are known: one more sweep over kept rows

A divergence adds up with others and takes factors: `0.5 * ForwardKL() + 0.5 * ReverseKL()`. t and s below are the
teacher's and the student's probabilities, lp_t and lp_s their natural logarithms on a tile (R, C), which are not to be
overwritten; values are in nats unless the divergence is bounded by 1. S kept rows, R rows of a block, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number, refuse
from tip_kernels.backends.eager.online import FLOOR
from tip_kernels.measure.topk_teacher import PARTIAL
from tip_kernels.stats import LABEL_FIELDS, Blend

Row = Mapping[str | Blend, Tensor]
Scalars = Mapping[str, Tensor]
Gate = float | Tensor | Callable[..., Tensor]  # of (stats, row_mask, rollout_ids)
GATE = "@gate"  # among the row scalars of a term: what multiplies it in each row


def exp(x: Tensor) -> Tensor:
    """e^x by way of exp2, which torch evaluates nearly three times faster on a CPU."""
    return (x * (1 / math.log(2.0))).exp2_()


def log_s_over_mixture(lp_s: Tensor, lp_t: Tensor, weight_t: float) -> Tensor:
    """log(p_s / M), M = weight_t p_t + (1 - weight_t) p_s, from the log-ratio alone so that nothing underflows."""
    log_ratio = lp_t - lp_s
    return torch.logaddexp(log_ratio.add_(math.log(weight_t)), log_ratio.new_full((), math.log1p(-weight_t))).neg_()


def log_probabilities(z: Tensor, shift: Tensor, logsum: Tensor) -> Tensor:
    """log p of a tile (R, C) in place, from z / temperature; formed from shift and logsum (R, 1), never from lse."""
    return z.clamp_(min=FLOOR).sub_(shift).sub_(logsum)


def _exp_difference(y: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    """e^y - e^x, gap = y - x: by the gap where it is small, as the difference would cancel; y and gap are spent."""
    e_x = exp(x)
    near = gap.abs() < 1
    return torch.where(near, gap.clamp_(-1, 1).expm1_().mul_(e_x), exp(y.clamp_(min=FLOOR)).sub_(e_x))


class Divergence:
    """A per-row measure of how far the student's distribution is from the teacher's.

    One made outside of the package works everywhere by tiled torch; under torch.compile it is refused, since the ops of
    a graph hold names and numbers.

    Attributes:
        needs: The measured fields (or blends) that value and gradient read.
        sums: The names of the row sums that a two-pass divergence needs; () for a single-pass one.
        kernel: Its name in the Triton backend, or None: tiled torch then makes the gradient, on a GPU too.
        params: The parameters that the kernel takes; the class makes the same divergence of them, see of_params.
        max_per_row: The cap of a clipped one, or None.
        term_gates: What multiplies each of its terms in each row, () where nothing does: see Gated.
    """

    needs: frozenset[str | Blend] = frozenset()
    sums: ClassVar[tuple[str, ...]] = ()
    kernel: ClassVar[str | None] = None
    max_per_row: float | None = None
    term_gates: tuple[Gate, ...] = ()

    def __init_subclass__(cls) -> None:
        if ("gradient" in vars(cls) or "row_sums" in vars(cls)) and "kernel" not in vars(cls):
            cls.kernel = None  # that of the class above computes something else

    def _set_needs(self, needs: frozenset[str | Blend]) -> None:
        """What a frozen one needs by its own parameters."""
        object.__setattr__(self, "needs", needs)

    @property
    def params(self) -> tuple[float, ...]:
        return ()

    @classmethod
    def of_params(cls, *params: float) -> Divergence:
        """One with the same gradient, from `params`."""
        return cls(*params)

    def value(self, row: Row) -> Tensor:
        """(S,) fp32 from the needed fields and the row sums, by name."""
        raise NotImplementedError

    def scalars(self, row: Row) -> dict[str, Tensor]:
        """What the gradient reads beside the normalizers, {name: (S,)}."""
        return {}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """The summands of the row sums on a tile, {name: (R, C)}, names as in `sums`."""
        raise NotImplementedError

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """d(divergence)/d(the student's logits / temperature) on a tile, (R, C); rows are the scalars, (R, 1) each."""
        raise NotImplementedError

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        """The divergence as a weighted sum of those that have a gradient of their own."""
        return ((1.0, self),)

    def clipped(self, max_per_row: float) -> Divergence:
        """The same with each row's value capped at max_per_row, above which its gradient is 0.

        Args:
            max_per_row: In nats, above 0.

        Raises:
            ValueError: Naming the argument.
        """
        return WeightedSum(self.terms, finite_number("max_per_row", max_per_row, positive=True))

    def __add__(self, other: Divergence) -> Divergence:
        if not isinstance(other, Divergence):
            return NotImplemented
        if self.max_per_row is not None or other.max_per_row is not None:
            raise ValueError("divergence: a clipped divergence cannot be a part of a sum; clip the sum")
        if self.term_gates or other.term_gates:
            raise ValueError("divergence: a Gated cannot be a part of a sum; give it the other with a gate of 1")
        return WeightedSum(self.terms + other.terms)

    def __mul__(self, factor: float) -> Divergence:
        factor = finite_number("factor of a divergence", factor, positive=True)
        if self.max_per_row is not None:
            raise ValueError("divergence: a clipped divergence cannot be scaled; scale first, then clip")
        if self.term_gates:
            raise ValueError("divergence: a Gated cannot be scaled; scale what it gates")
        return WeightedSum(tuple((factor * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(Divergence):
    """sum of weight * divergence, perhaps clipped per row; made by +, * and clipped."""

    parts: tuple[tuple[float, Divergence], ...]
    max_per_row: float | None = None

    def __post_init__(self) -> None:
        self._set_needs(frozenset().union(*(term.needs for _, term in self.parts)))

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return self.parts


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(t||s) = sum t (log t - log s): covers the teacher's mass."""

    needs = frozenset({"kl_fwd"})
    kernel = "forward_kl"

    def value(self, row: Row) -> Tensor:
        return row["kl_fwd"]

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s - p_t"""
        return exp(lp_s).sub_(exp(lp_t))


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(s||t) = sum s (log s - log t): seeks the teacher's modes; the usual on-policy loss."""

    needs = frozenset({"kl_rev"})
    kernel = "reverse_kl"

    def value(self, row: Row) -> Tensor:
        return row["kl_rev"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"kl_rev": row["kl_rev"]}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s (log(p_s / p_t) - KL(s||t))"""
        return torch.sub(lp_s, lp_t).sub_(rows["kl_rev"]).mul_(exp(lp_s))


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(t||s) + KL(s||t)."""

    needs = frozenset({"kl_fwd", "kl_rev"})

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, ForwardKL()), (1.0, ReverseKL()))


@dataclass(frozen=True)
class JSD(Divergence):
    """w KL(t||M) + (1 - w) KL(s||M), M = w t + (1 - w) s: generalised Jensen-Shannon (GKD, arXiv 2306.13649).

    Args:
        teacher_weight: w in [0, 1]; 0 means ForwardKL and 1 ReverseKL, as in TRL.

    Raises:
        ValueError: Naming the argument.
    """

    teacher_weight: float = 0.5
    kernel = "jsd"
    sums = ("kl_s", "kl_t")

    def __post_init__(self) -> None:
        w = finite_number("teacher_weight", self.teacher_weight)
        expect(0 <= w <= 1, "teacher_weight", "a number in [0, 1]", self.teacher_weight)
        self._set_needs({0.0: ForwardKL.needs, 1.0: ReverseKL.needs}.get(w, frozenset()))

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.teacher_weight),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        ends: dict[float, Divergence] = {0.0: ForwardKL(), 1.0: ReverseKL()}
        return ((1.0, ends.get(self.teacher_weight, self)),)

    def value(self, row: Row) -> Tensor:
        w = self.teacher_weight
        return (w * row["kl_t"] + (1 - w) * row["kl_s"]).clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"kl_s": row["kl_s"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """kl_s, kl_t: p_s log(p_s / M) and p_t log(p_t / M)"""
        return {
            "kl_s": log_s_over_mixture(lp_s, lp_t, self.teacher_weight).mul_(exp(lp_s)),
            "kl_t": log_s_over_mixture(lp_t, lp_s, 1 - self.teacher_weight).mul_(exp(lp_t)),
        }

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """(1 - w) p_s (log(p_s / M) - KL(s||M))"""
        w = self.teacher_weight
        return log_s_over_mixture(lp_s, lp_t, w).sub_(rows["kl_s"]).mul_(exp(lp_s)).mul_(1 - w)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(t || a t + (1 - a) s) (DistiLLM, arXiv 2402.03898).

    Args:
        a: In [0, 1); 0 means ForwardKL.

    Raises:
        ValueError: Naming the argument.
    """

    a: float = 0.1
    kernel = "skew_forward_kl"
    sums = ("value", "mean_share")

    def __post_init__(self) -> None:
        expect(0 <= finite_number("a", self.a) < 1, "a", "a number in [0, 1)", self.a)
        self._set_needs(frozenset() if self.a else ForwardKL.needs)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, self if self.a else ForwardKL()),)

    def value(self, row: Row) -> Tensor:
        return row["value"].clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"mean_share": row["mean_share"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """value, mean_share: p_t log(p_t / M) and p_t r, r = (1 - a) p_s / M, M = a p_t + (1 - a) p_s"""
        p_t = exp(lp_t)
        share = exp(log_s_over_mixture(lp_s, lp_t, self.a)).mul_(1 - self.a)
        return {"value": log_s_over_mixture(lp_t, lp_s, 1 - self.a).mul_(p_t), "mean_share": share.mul_(p_t)}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s E_t[r] - p_t r"""
        share = exp(log_s_over_mixture(lp_s, lp_t, self.a)).mul_(1 - self.a)
        return exp(lp_s).mul_(rows["mean_share"]).sub_(share.mul_(exp(lp_t)))


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(s || (1 - a) t + a s) (DistiLLM, arXiv 2402.03898).

    Args:
        a: In [0, 1); 0 means ReverseKL.
        detach_mixture: Treats the mixture as a constant in the gradient (DistiLLM-2, arXiv 2503.07067).

    Raises:
        ValueError: Naming the argument.
    """

    a: float = 0.1
    detach_mixture: bool = False
    kernel = "skew_reverse_kl"
    sums = ("value", "mean_share")

    def __post_init__(self) -> None:
        expect(0 <= finite_number("a", self.a) < 1, "a", "a number in [0, 1)", self.a)
        expect(isinstance(self.detach_mixture, bool), "detach_mixture", "a bool", self.detach_mixture)
        self._set_needs(frozenset() if self.a else ReverseKL.needs)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a), float(self.detach_mixture))

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, self if self.a else ReverseKL()),)

    @classmethod
    def of_params(cls, *params: float) -> SkewReverseKL:
        return cls(params[0], bool(params[1]))

    def value(self, row: Row) -> Tensor:
        return row["value"].clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"value": row["value"], "mean_share": row["mean_share"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """value, mean_share: p_s log(p_s / M) and p_s r, r = a p_s / M, M = (1 - a) p_t + a p_s"""
        p_s = exp(lp_s)
        log_share = log_s_over_mixture(lp_s, lp_t, 1 - self.a)
        return {"value": log_share * p_s, "mean_share": exp(log_share).mul_(self.a).mul_(p_s)}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s (log(p_s / M) - r - (value - E_s[r])), without the r where the mixture is detached"""
        g = log_s_over_mixture(lp_s, lp_t, 1 - self.a)
        share = 0.0 if self.detach_mixture else exp(g).mul_(self.a).sub_(rows["mean_share"])
        return g.sub_(share).sub_(rows["value"]).mul_(exp(lp_s))


@dataclass(frozen=True)
class TVD(Divergence):
    """sum |t - s| / 2, in [0, 1]; the gradient takes sign 0 at a tie (f-distill, arXiv 2307.15190)."""

    kernel = "tvd"
    sums = ("value", "mean_sign")

    def value(self, row: Row) -> Tensor:
        return row["value"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"mean_sign": row["mean_sign"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """value, mean_sign: |p_s - p_t| / 2 and p_s sign(p_s - p_t), by the logarithms, finer near 1"""
        p_s = exp(lp_s)
        return {"value": (p_s - exp(lp_t)).abs_().mul_(0.5), "mean_sign": (lp_s - lp_t).sign_().mul_(p_s)}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s (sign(p_s - p_t) - E_s[sign]) / 2, with sign 0 at a tie"""
        return torch.sub(lp_s, lp_t).sign_().sub_(rows["mean_sign"]).mul_(exp(lp_s)).mul_(0.5)


@dataclass(frozen=True)
class HellingerSq(Divergence):
    """1 - sum sqrt(t s), the squared Hellinger distance, in [0, 1]."""

    needs = frozenset({"hellinger_sq"})
    kernel = "hellinger_sq"

    def value(self, row: Row) -> Tensor:
        return row["hellinger_sq"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"hellinger_sq": row["hellinger_sq"]}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """(p_s (1 - H2) - sqrt(p_s p_t)) / 2"""
        return exp(lp_s).mul_(1 - rows["hellinger_sq"]).sub_(exp(0.5 * (lp_s + lp_t))).mul_(0.5)


@dataclass(frozen=True)
class Renyi(Divergence):
    """log(sum t^alpha s^(1-alpha)) / (alpha - 1).

    With alpha in (0, 1) its gradient is that of TAID (arXiv 2501.16937) at t = alpha.

    Args:
        alpha: Above 0; 1 means ForwardKL.

    Raises:
        ValueError: Naming the argument.
    """

    alpha: float
    kernel = "renyi"

    def __post_init__(self) -> None:
        finite_number("alpha", self.alpha, positive=True)
        self._set_needs(ForwardKL.needs if self.alpha == 1 else frozenset({self._blend}))

    @property
    def _blend(self) -> Blend:
        return Blend(float(self.alpha), 1.0 - self.alpha)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.alpha),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, ForwardKL() if self.alpha == 1 else self),)

    def value(self, row: Row) -> Tensor:
        return (row[self._blend] / (self.alpha - 1)).clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"log_blend": row[self._blend]}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """p_s - p_t^alpha p_s^(1-alpha) / sum of the same"""
        a, log_blend = self.alpha, rows["log_blend"]
        gap = (lp_t - lp_s).mul_(a).sub_(log_blend)
        return _exp_difference((a * lp_t).add_(lp_s, alpha=1 - a).sub_(log_blend), lp_s, gap).neg_()


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum (t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)) (ABKD, arXiv 2505.04560).

    Args:
        a: Above 0.
        b: Above 0.

    Raises:
        ValueError: Naming the argument.
    """

    a: float = 0.2
    b: float = 0.7
    kernel = "alpha_beta"
    sums = ("value", "sum_g")

    def __post_init__(self) -> None:
        finite_number("a", self.a, positive=True)
        finite_number("b", self.b, positive=True)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a), float(self.b))

    def value(self, row: Row) -> Tensor:
        return row["value"].clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"sum_g": row["sum_g"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """value, sum_g: (a/(a+b) (p_t^(a+b) - p_s^(a+b)) - cross) / (ab) and -cross/a

        cross = p_t^a p_s^b - p_s^(a+b)
        """
        a, b = self.a, self.b
        d, power = lp_t - lp_s, (a + b) * lp_s
        cross = _exp_difference((a * lp_t).add_(lp_s, alpha=b), power, a * d)
        whole = _exp_difference((a + b) * lp_t, power, d.mul_(a + b))
        return {"value": whole.mul_(a / (a + b)).sub_(cross).div_(a * b), "sum_g": cross.div_(-a)}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """g - p_s sum g, g = (p_s^(a+b) - p_t^a p_s^b) / a"""
        a, b = self.a, self.b
        cross = _exp_difference((a * lp_t).add_(lp_s, alpha=b), (a + b) * lp_s, (lp_t - lp_s).mul_(a))
        return cross.div_(-a).sub_(exp(lp_s).mul_(rows["sum_g"]))


@dataclass(frozen=True)
class ToDi(Divergence):
    """sum w t log(t/s) + (1 - w) s log(s/t), w = sigmoid(beta log(t/s)) a constant per vocabulary entry.

    Forward KL where the student underestimates a token, reverse KL where it overestimates one (arXiv 2505.16297; the
    released code has beta = 1). The value at beta = 1 is that of Jeffreys, at 0 half of it; the gradient is ToDi's own.

    Args:
        beta: At least 0.

    Raises:
        ValueError: Naming the argument.
    """

    beta: float = 1.0
    needs = frozenset({"kl_fwd", "kl_rev"})  # tell which rows are infinite
    kernel = "todi"
    sums = ("value", "sum_g")

    def __post_init__(self) -> None:
        expect(finite_number("beta", self.beta) >= 0, "beta", "a number of at least 0", self.beta)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.beta),)

    def value(self, row: Row) -> Tensor:
        jeffreys = row["kl_fwd"] + row["kl_rev"]
        return torch.where(jeffreys.isinf(), jeffreys, row["value"].clamp(min=0.0))

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"sum_g": row["sum_g"]}

    def row_sums(self, lp_s: Tensor, lp_t: Tensor) -> dict[str, Tensor]:
        """value, sum_g: (w p_t - (1 - w) p_s) d and g = (1 - w) p_s (1 - d) - w p_t

        d = log(p_t / p_s), w = sigma(beta d)
        """
        d = lp_t - lp_s
        up, down = torch.sigmoid(self.beta * d).mul_(exp(lp_t)), torch.sigmoid(-self.beta * d).mul_(exp(lp_s))
        return {"value": (up - down).mul_(d), "sum_g": down.sub(up).sub_(down.mul_(d))}

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """g - p_s sum g, the weights w being constants"""
        p_s = exp(lp_s)
        d = lp_t - lp_s
        up, down = torch.sigmoid(self.beta * d).mul_(exp(lp_t)), torch.sigmoid(-self.beta * d).mul_(p_s)
        return down.sub(up).sub_(down.mul_(d)).sub_(p_s.mul_(rows["sum_g"]))


@dataclass(frozen=True)
class SampledReverseKL(Divergence):
    """k = log s[y] - log t[y] of the sampled token y, with the gradient k d(log s[y]): the policy-gradient form.

    What most on-policy loops run: an estimate of KL(s||t) from one token, for comparison. Needs labels (the sampled
    tokens); a row without one is NaN.

    Args:
        clip: Caps k at +-clip, in nats above 0; None for no cap.

    Raises:
        ValueError: Naming the argument.
    """

    clip: float | None = None
    needs = frozenset({"logp_s", "logp_t"})
    kernel = "label_score"

    def __post_init__(self) -> None:
        if self.clip is not None:
            finite_number("clip", self.clip, positive=True)

    def value(self, row: Row) -> Tensor:
        k = row["logp_s"] - row["logp_t"]
        return k if self.clip is None else k.clamp(-self.clip, self.clip)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"label_factor": torch.where(row["logp_s"].isfinite(), self.value(row), 0.0)}  # a banned token has none

    def gradient(self, lp_s: Tensor, lp_t: Tensor, rows: Scalars) -> Tensor:
        """-k p_s, the dense part of k d(log p_s[label]); the label's own +k is added where its column is"""
        return exp(lp_s).mul_(-rows["label_factor"])


class Term(NamedTuple):
    """One divergence of a weighted sum, with its row scalars."""

    weight: float
    divergence: Divergence
    rows: Scalars  # (S,) each, or (R, 1); GATE among them where the term has one


def tile_log_probabilities(z_s: Tensor, z_t: Tensor, rows: Scalars) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of a tile, in place."""
    lp_s = log_probabilities(z_s, rows["shift_s"], rows["logsum_s"])
    return lp_s, log_probabilities(z_t, rows["shift_t"], rows["logsum_t"])


def sums_of_tile(
    z_s: Tensor, z_t: Tensor, divergences: Sequence[Divergence], normalizers: Scalars
) -> list[dict[str, Tensor]]:
    """What a tile adds to the row sums of each two-pass divergence, {name: (R,)}; overwrites z_s and z_t."""
    lp_s, lp_t = tile_log_probabilities(z_s, z_t, normalizers)
    tiles = [divergence.row_sums(lp_s, lp_t) for divergence in divergences]
    return [{name: tile.sum(1) for name, tile in sums.items()} for sums in tiles]


def gradient_of_tile(z_s: Tensor, z_t: Tensor, terms: Sequence[Term], part: slice, normalizers: Scalars) -> Tensor:
    """d(sum of weight * divergence)/d(z_s) on a tile (R, C) of the rows part; overwrites z_s and z_t.

    z_s and z_t are logits / temperature. normalizers are shift and logsum of both models, (R, 1).
    """
    lp_s, lp_t = tile_log_probabilities(z_s, z_t, normalizers)
    total: Tensor | None = None
    for weight, divergence, scalars in terms:
        columns = {name: value[part].unsqueeze(1) for name, value in scalars.items()}
        g = divergence.gradient(lp_s, lp_t, columns)
        g = g if weight == 1.0 else g.mul_(weight)
        gate = columns.get(GATE)
        g = g if gate is None else g.mul_(gate).masked_fill_(gate == 0, 0.0)
        total = g if total is None else total.add_(g)
    assert total is not None
    return total


def check_beside_topk(divergence: Divergence, tail: str) -> None:
    """Refuses what a TopK of that tail cannot serve; any other teacher serves all."""
    if divergence.needs & LABEL_FIELDS:
        refuse("divergence", "one that reads no labels, since the teacher is a TopK", divergence)
    if tail == "ignore" and not all(term.kernel in PARTIAL for _, term in divergence.terms):
        form = "ForwardKL, ReverseKL, Jeffreys, HellingerSq or a sum of them, since the TopK's tail is 'ignore'"
        refuse("divergence", form, divergence)
