"""The family of divergences: which statistics each needs, its value from them, and the name of its gradient.

    class A   the value comes from measured statistics alone
    class B   it takes row scalars that exist only once both normalisers are known: one more sweep over kept rows

A divergence adds up with others and takes factors: `0.5 * ForwardKL() + 0.5 * ReverseKL()`. t and s below are the
teacher's and the student's probabilities; values are in nats unless the divergence is bounded by 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number
from tip_kernels.stats import Blend

Row = Mapping[str | Blend, Tensor]


class Divergence:
    """A per-row measure of how far the student's distribution is from the teacher's.

    needs     the measured fields (or blends) that value and gradient read
    gradient  the name of its gradient, and of its row sums where it is class B, in each backend's row_grad
    params    their parameters
    class_b   whether it needs those row sums
    """

    needs: frozenset[str | Blend] = frozenset()
    gradient: ClassVar[str] = ""
    class_b: ClassVar[bool] = False
    max_per_row: float | None = None

    @property
    def params(self) -> tuple[float, ...]:
        return ()

    def value(self, row: Row) -> Tensor:
        """(S,) fp32 from the needed fields and, in class B, the row sums by name."""
        raise NotImplementedError

    def scalars(self, row: Row) -> dict[str, Tensor]:
        """What the gradient reads beside the normalisers, {name: (S,)}."""
        return {}

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        """The divergence as a weighted sum of those that have a gradient of their own."""
        return ((1.0, self),)

    def clipped(self, max_per_row: float) -> Divergence:
        """The same with each row's value capped at max_per_row, above which its gradient is 0."""
        return WeightedSum(self.terms, finite_number("max_per_row", max_per_row, positive=True))

    def __add__(self, other: Divergence) -> Divergence:
        if not isinstance(other, Divergence):
            return NotImplemented
        if self.max_per_row is not None or other.max_per_row is not None:
            raise ValueError("divergence: a clipped divergence cannot be a part of a sum; clip the sum")
        return WeightedSum(self.terms + other.terms)

    def __mul__(self, factor: float) -> Divergence:
        factor = finite_number("factor of a divergence", factor, positive=True)
        if self.max_per_row is not None:
            raise ValueError("divergence: a clipped divergence cannot be scaled; scale first, then clip")
        return WeightedSum(tuple((factor * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(Divergence):
    """sum of weight * divergence, perhaps clipped per row; made by +, * and clipped."""

    parts: tuple[tuple[float, Divergence], ...]
    max_per_row: float | None = None

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return self.parts

    @property
    def needs(self) -> frozenset[str | Blend]:
        return frozenset().union(*(term.needs for _, term in self.parts))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(t||s) = sum t (log t - log s): covers the teacher's mass."""

    needs = frozenset({"kl_fwd"})
    gradient = "forward_kl"

    def value(self, row: Row) -> Tensor:
        return row["kl_fwd"]


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(s||t) = sum s (log s - log t): seeks the teacher's modes; the usual on-policy loss."""

    needs = frozenset({"kl_rev"})
    gradient = "reverse_kl"

    def value(self, row: Row) -> Tensor:
        return row["kl_rev"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"kl_rev": row["kl_rev"]}


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

    teacher_weight  w in [0, 1]; 0 means ForwardKL and 1 ReverseKL, as in TRL
    """

    teacher_weight: float = 0.5
    gradient = "jsd"
    class_b = True

    def __post_init__(self) -> None:
        w = finite_number("teacher_weight", self.teacher_weight)
        expect(0 <= w <= 1, "teacher_weight", "a number in [0, 1]", self.teacher_weight)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.teacher_weight),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        ends = {0: ForwardKL(), 1: ReverseKL()}
        return ((1.0, ends.get(self.teacher_weight, self)),)

    @property
    def needs(self) -> frozenset[str]:
        return {0: ForwardKL.needs, 1: ReverseKL.needs}.get(self.teacher_weight, frozenset())

    def value(self, row: Row) -> Tensor:
        w = self.teacher_weight
        return (w * row["kl_t"] + (1 - w) * row["kl_s"]).clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"kl_s": row["kl_s"]}


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(t || a t + (1 - a) s), a in [0, 1); 0 means ForwardKL (DistiLLM, arXiv 2402.03898)."""

    a: float = 0.1
    gradient = "skew_forward_kl"
    class_b = True

    def __post_init__(self) -> None:
        expect(0 <= finite_number("a", self.a) < 1, "a", "a number in [0, 1)", self.a)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, self if self.a else ForwardKL()),)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.a else ForwardKL.needs

    def value(self, row: Row) -> Tensor:
        return row["value"].clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"mean_share": row["mean_share"]}


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(s || (1 - a) t + a s), a in [0, 1); 0 means ReverseKL (DistiLLM, arXiv 2402.03898).

    detach_mixture  treats the mixture as a constant in the gradient (DistiLLM-2, arXiv 2503.07067)
    """

    a: float = 0.1
    detach_mixture: bool = False
    gradient = "skew_reverse_kl"
    class_b = True

    def __post_init__(self) -> None:
        expect(0 <= finite_number("a", self.a) < 1, "a", "a number in [0, 1)", self.a)
        expect(isinstance(self.detach_mixture, bool), "detach_mixture", "a bool", self.detach_mixture)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a), float(self.detach_mixture))

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, self if self.a else ReverseKL()),)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.a else ReverseKL.needs

    def value(self, row: Row) -> Tensor:
        return row["value"].clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"value": row["value"], "mean_share": row["mean_share"]}


@dataclass(frozen=True)
class TVD(Divergence):
    """sum |t - s| / 2, in [0, 1]; the gradient takes sign 0 at a tie (f-distill, arXiv 2307.15190)."""

    gradient = "tvd"
    class_b = True

    def value(self, row: Row) -> Tensor:
        return row["value"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"mean_sign": row["mean_sign"]}


@dataclass(frozen=True)
class HellingerSq(Divergence):
    """1 - sum sqrt(t s), the squared Hellinger distance, in [0, 1]."""

    needs = frozenset({"hellinger_sq"})
    gradient = "hellinger_sq"

    def value(self, row: Row) -> Tensor:
        return row["hellinger_sq"]

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"hellinger_sq": row["hellinger_sq"]}


@dataclass(frozen=True)
class Renyi(Divergence):
    """log(sum t^alpha s^(1-alpha)) / (alpha - 1), alpha > 0; 1 means ForwardKL.

    With alpha in (0, 1) its gradient is that of TAID (arXiv 2501.16937) at t = alpha.
    """

    alpha: float
    gradient = "renyi"

    def __post_init__(self) -> None:
        finite_number("alpha", self.alpha, positive=True)

    @property
    def _blend(self) -> Blend:
        return Blend(float(self.alpha), 1.0 - self.alpha)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.alpha),)

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, ForwardKL() if self.alpha == 1 else self),)

    @property
    def needs(self) -> frozenset[str | Blend]:
        return ForwardKL.needs if self.alpha == 1 else frozenset({self._blend})

    def value(self, row: Row) -> Tensor:
        return (row[self._blend] / (self.alpha - 1)).clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"log_blend": row[self._blend]}


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum (t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)), a and b above 0 (ABKD, arXiv 2505.04560)."""

    a: float = 0.2
    b: float = 0.7
    gradient = "alpha_beta"

    def __post_init__(self) -> None:
        finite_number("a", self.a, positive=True)
        finite_number("b", self.b, positive=True)

    @property
    def _blends(self) -> tuple[Blend, Blend, Blend]:
        total = self.a + self.b
        return Blend(float(self.a), float(self.b)), Blend(total, 0.0), Blend(0.0, total)

    @property
    def needs(self) -> frozenset[Blend]:
        return frozenset(self._blends)

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.a), float(self.b))

    def value(self, row: Row) -> Tensor:
        a, b = self.a, self.b
        cross, power_t, power_s = (row[blend].exp() for blend in self._blends)
        return ((a / (a + b) * power_t + b / (a + b) * power_s - cross) / (a * b)).clamp(min=0.0)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        cross, _, power_s = (row[blend].exp() for blend in self._blends)
        return {"sum_g": power_s - cross}


@dataclass(frozen=True)
class ToDi(Divergence):
    """sum w t log(t/s) + (1 - w) s log(s/t), w = sigmoid(beta log(t/s)) a constant per vocabulary entry.

    Forward KL where the student underestimates a token, reverse KL where it overestimates one (arXiv 2505.16297; the
    released code has beta = 1). The value at beta = 1 is that of Jeffreys, at 0 half of it; the gradient is ToDi's own.

    beta  at least 0
    """

    beta: float = 1.0
    needs = frozenset({"kl_fwd", "kl_rev"})  # tell which rows are infinite
    gradient = "todi"
    class_b = True

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


@dataclass(frozen=True)
class SampledReverseKL(Divergence):
    """k = log s[y] - log t[y] of the sampled token y, with the gradient k d(log s[y]): the policy-gradient form.

    What most on-policy loops run: an estimate of KL(s||t) from one token, for comparison. Needs labels (the sampled
    tokens); a row without one is NaN.

    clip  caps k at +-clip, or None
    """

    clip: float | None = None
    needs = frozenset({"logp_s", "logp_t"})
    gradient = "label_score"

    def __post_init__(self) -> None:
        if self.clip is not None:
            finite_number("clip", self.clip, positive=True)

    def value(self, row: Row) -> Tensor:
        k = row["logp_s"] - row["logp_t"]
        return k if self.clip is None else k.clamp(-self.clip, self.clip)

    def scalars(self, row: Row) -> dict[str, Tensor]:
        return {"label_factor": torch.where(row["logp_s"].isfinite(), self.value(row), 0.0)}  # a banned token has none
