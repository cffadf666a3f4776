"""What is learned of each kept row, and where its gradients go.

N rows, S kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tip_kernels.learn.divergences import Divergence
from tip_kernels.learn.head_gradients import GradFilter
from tip_kernels.stats import LISTED_FIELDS, NORMALIZER_FIELDS, Blend, Fields


@dataclass(frozen=True)
class GradOptions:
    """How gradients are made and where they go; never what they are."""

    workspace: int  # bytes
    layout: str = "dense"  # of a gradient of logits: "dense", "compact" or "inplace"
    weight_into: Tensor | None = None  # (V, H) where d(weight) of a Head is added, instead of returned
    grad_filter: GradFilter | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a row: (1 - ce_weight) * tau^2 * divergence + ce_weight * cross-entropy, tau^2 only where asked."""

    divergence: Divergence
    temperature: float | Tensor = 1.0  # a tensor is (N,)
    labels: Tensor | None = None  # (N,)
    ce_weight: float = 0.0
    temperature_sq: bool = False

    def at(self, temperature: float | Tensor) -> Objective:
        return replace(self, temperature=temperature)

    @property
    def divergence_weight_is_zero(self) -> bool:
        """Whether the label loss stands alone, so that a divergence of +inf must not matter: 0 * inf is NaN."""
        return self.ce_weight == 1

    def temperature_at(self, ids: Tensor) -> float | Tensor:
        """The temperature of the rows ids, a float or (S,)."""
        return self.temperature[ids] if isinstance(self.temperature, Tensor) else self.temperature

    def factor(self, ids: Tensor) -> float | Tensor:
        """What multiplies the divergence of the rows ids."""
        if not self.temperature_sq:
            return 1.0 - self.ce_weight
        return (1.0 - self.ce_weight) * self.temperature_at(ids) ** 2

    def needs(self, beside_topk: bool) -> frozenset[str | Blend]:
        """The measured fields, beside the normalizers, that the divergence is made from."""
        return LISTED_FIELDS if beside_topk else self.divergence.needs


@dataclass(frozen=True)
class RowsToLearn:
    """Kept rows, and what was measured of them."""

    ids: Tensor  # (S,) int64
    measured: Fields  # (S,) shift and logsum of both models, and what the objective needs
    at_one: Fields | None = None  # (S,) shift_s, logsum_s and logp_s at temperature 1, for a label loss

    @property
    def normalizers(self) -> dict[str, Tensor]:
        return {name: self.measured[name] for name in NORMALIZER_FIELDS}
