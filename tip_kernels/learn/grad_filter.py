"""Which tiles of small gradients a Head's two gradient products may leave out, r rows and C columns each."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tip_kernels._checks import finite_number


@dataclass
class GradFilter:
    """Leaves tiles of d(logits) out of both products where every entry is below a tolerance, and says how many.

    A row of d(logits) sums to 0, which dropping entries breaks: d(hidden) gets (dropped sum) x (mean row of the head)
    in their place. With W_v the head's rows and M their mean, h_i the hidden rows and w_i the loss's weights

        |error of d(hidden)_i| <= w_i * (sum of |g| dropped of row i) * max_v |W_v - M|
        |error of d(weight)_v| <= tolerance * sum_i w_i |h_i|         |error of d(bias)_v| <= tolerance * sum_i w_i

    Args:
        tolerance: Above 0, of the gradient of a row's loss with respect to its logits, before weights and the
            normaliser.

    Attributes:
        share: Of the entries of d(logits), those left out of the products, after backward.
        mass: Sum of |g| left out over sum of |g|, after backward.

    Raises:
        ValueError: Naming the argument.
    """

    tolerance: float
    entries: int = field(default=0, init=False, repr=False)
    skipped: int = field(default=0, init=False, repr=False)
    total: float = field(default=0.0, init=False, repr=False)
    dropped: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        finite_number("tolerance", self.tolerance, positive=True)

    @property
    def share(self) -> float:
        return self.skipped / max(self.entries, 1)

    @property
    def mass(self) -> float:
        return self.dropped / self.total if self.total else 0.0

    def drops(self, g: Tensor, row_scale: Tensor | None) -> bool:
        """Whether the tile g (r, C) is left out; row_scale (r,) are the weights in it. Waits for the device."""
        size = g.abs()
        mass = float(size.sum())
        bound = self.tolerance if row_scale is None else self.tolerance * row_scale.abs()
        out = bool((size.amax(1) < bound).all())
        self.entries, self.total = self.entries + g.numel(), self.total + mass
        if out:
            self.skipped, self.dropped = self.skipped + g.numel(), self.dropped + mass
        return out
