"""The family of divergences: for each, its value from measured statistics and the name of its gradient.

A divergence adds up with others and takes factors: `0.5 * ForwardKL() + 0.5 * ReverseKL()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tip_kernels._checks import finite_number


class Divergence:
    """A per-row measure of how far the student's distribution is from the teacher's, in nats.

    needs     the TokenStats fields from which `value` is formed
    gradient  the name of d(value)/d(student logits) in each backend's row_grad
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gradient: ClassVar[str] = ""

    def value(self, stats: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        """The divergence as a weighted sum of those that have a gradient of their own."""
        return ((1.0, self),)

    def __add__(self, other: Divergence) -> Divergence:
        return WeightedSum(self.terms + other.terms) if isinstance(other, Divergence) else NotImplemented

    def __mul__(self, factor: float) -> Divergence:
        factor = finite_number("factor of a divergence", factor)
        return WeightedSum(tuple((factor * weight, term) for weight, term in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(Divergence):
    """sum of weight * divergence; made by + and *."""

    parts: tuple[tuple[float, Divergence], ...]

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return self.parts

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(term.needs for _, term in self.parts))

    def value(self, stats: Mapping[str, Tensor]) -> Tensor:
        return sum(weight * term.value(stats) for weight, term in self.parts)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum p_t (log p_t - log p_s): covers the teacher's mass."""

    needs: ClassVar[frozenset[str]] = frozenset({"kl_fwd"})
    gradient: ClassVar[str] = "forward_kl"

    def value(self, stats: Mapping[str, Tensor]) -> Tensor:
        return stats["kl_fwd"]


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum p_s (log p_s - log p_t): seeks the teacher's modes; the usual on-policy loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"kl_rev"})
    gradient: ClassVar[str] = "reverse_kl"

    def value(self, stats: Mapping[str, Tensor]) -> Tensor:
        return stats["kl_rev"]


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(teacher || student) + KL(student || teacher)."""

    needs: ClassVar[frozenset[str]] = frozenset({"kl_fwd", "kl_rev"})

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return ((1.0, ForwardKL()), (1.0, ReverseKL()))

    def value(self, stats: Mapping[str, Tensor]) -> Tensor:
        return stats["kl_fwd"] + stats["kl_rev"]
