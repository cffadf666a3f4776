"""Inputs of the self-test, and how wrong a result is beside what float32 can attain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from tip_kernels.doctor import truth
from tip_kernels.sources.pair import Head

STATISTIC_FLOOR = 5e-6  # nats
GRADIENT_FLOOR = 2e-5  # relative
ULP = 2.0**-23
BANNED = 3  # tokens at the vocabulary's end, whose logits are -inf in both models
TOP_K = 5

Leaves = list[Tensor]


@dataclass(frozen=True)
class Compared:
    """A result beside the truth in float64 and the same formula in float32."""

    what: str
    ours: Tensor
    truth: Tensor
    eager: Tensor
    _: KW_ONLY
    is_gradient: bool = False
    grain: float = 0.0  # the relative step of a dtype that the result was rounded to

    def error_and_bound(self) -> tuple[float, float]:
        """The largest error, and what is allowed: four times that of float32, or a floor where that is larger.

        Statistics and losses by difference, gradients by the norm of the difference over that of the truth, choices by
        the number of entries that differ. A NaN or an infinity elsewhere than in the truth is an error of infinity.
        """
        ours = self.ours.detach().cpu()
        if ours.shape != self.truth.shape:
            return math.inf, 0.0
        if not self.truth.is_floating_point():
            return float((ours != self.truth).sum()), 0.0
        ours, finite = ours.double(), self.truth.isfinite()
        if not torch.equal(ours[~finite].nan_to_num(nan=7e77), self.truth[~finite].nan_to_num(nan=7e77)):
            return math.inf, 0.0
        right, ours, eager = (x[finite].double() for x in (self.truth, ours, self.eager))
        if self.is_gradient:
            size = float(right.norm())
            error, attained = (float((x - right).norm()) / (size or 1.0) for x in (ours, eager))
            floor = max(GRADIENT_FLOOR, self.grain)
        else:
            error, attained = (_largest(x - right) for x in (ours, eager.nan_to_num()))
            floor = STATISTIC_FLOOR + ULP * _largest(right)
        return math.inf if math.isnan(error) else error, max(4 * attained, floor)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def exact(what: str, ours: Tensor, expected: Tensor) -> Compared:
    """A choice, which is right or wrong."""
    return Compared(what, ours, expected, expected)


@dataclass(frozen=True)
class Source:
    """A student and a teacher on the CPU, as the public functions and as the formulas take them."""

    name: str
    leaves: Leaves  # of the student
    frozen: Leaves  # of the teacher
    scale: float = 1.0
    softcap: float | None = None

    def on(self, device: torch.device, grad: bool = False) -> tuple[Leaves, Tensor | Head, Tensor | Head]:
        """The student's leaves there, the student and the teacher."""
        leaves = [x.detach().to(device, copy=True).requires_grad_(grad) for x in self.leaves]
        frozen = [x.to(device) for x in self.frozen]
        if len(leaves) == 1:
            return leaves, leaves[0], frozen[0]
        return leaves, Head(*leaves, scale=self.scale, softcap=self.softcap), Head(*frozen)

    def logits(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        """Both models' (N, V) logits in the dtype of the leaves."""
        frozen = [x.to(leaves[0].dtype) for x in self.frozen]
        if len(leaves) == 1:
            return leaves[0], frozen[0]
        return truth.logits(*leaves, scale=self.scale, softcap=self.softcap), truth.logits(*frozen)

    @property
    def grain(self) -> float:
        """The relative step that gradients are rounded to."""
        return 0.0 if self.leaves[0].dtype == torch.float32 else torch.finfo(self.leaves[0].dtype).eps

    def beside(self, formula: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """formula(student's logits, teacher's) -> (N,) or (): [value, gradients of its sum] in float64 and float32."""
        found = []
        for dtype in (torch.float64, torch.float32):
            leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
            value = formula(*self.logits(leaves))
            found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
        return found[0], found[1]

    def compared(self, value: Tensor, leaves: Leaves, formula: Callable[..., Tensor]) -> list[Compared]:
        """A loss that has run backward, and its leaves' gradients, beside the formula."""
        names = ["value", *("gradient of " + name for name in ("hidden", "weight", "bias"))]
        if len(leaves) == 1:
            names = ["value", "gradient of logits"]
        right, eager = self.beside(formula)
        ours = [value, *(leaf.grad for leaf in leaves)]
        return [
            Compared(name, x, y, z, is_gradient=i > 0, grain=self.grain if i else 0.0)
            for i, (name, x, y, z) in enumerate(zip(names, ours, right, eager, strict=False))
        ]


@dataclass(frozen=True, eq=False)
class Case:
    """What the checks read. N rows in three rollouts, of four kinds: ordinary, near-equal, peaked and flat."""

    device: torch.device
    n_rows: int
    vocab: int
    sources: dict[str, Source]
    sampled: Tensor  # (N,) a token of each row
    labels: Tensor  # (N,) the same, some of them none
    mask: Tensor  # (N,) bool
    rollouts: Tensor  # (N,)
    temperature: Tensor  # (N,)
    weights: Tensor  # (N,) of the rows' losses

    @property
    def logits(self) -> Source:
        return self.sources["logits"]

    @property
    def head(self) -> Source:
        return self.sources["Head"]

    @property
    def with_ban(self) -> Source:
        """Logits of which the student bans a token that the teacher does not, in the first row."""
        z_s = self.logits.leaves[0].clone()
        z_s[0, 0] = -torch.inf
        return Source("logits with a banned token", [z_s], self.logits.frozen)

    def log_probs(self, z_s: Tensor, z_t: Tensor, temperature: bool = True) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities of the tokens that are not banned."""
        tau = self.temperature.to(z_s.dtype)[:, None] if temperature else 1.0
        lp_s, lp_t = ((z[:, ~z_t[0].isneginf()] / tau).log_softmax(1) for z in (z_s, z_t))
        return lp_s, lp_t


def case(device: torch.device, n_rows: int = 24, vocab: int = 2003) -> Case:
    """The inputs, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.arange(n_rows)
    kind = (rows % 4)[:, None]
    z_s, z_t = 3 * normal(n_rows, vocab), 3 * normal(n_rows, vocab)
    z_t = torch.where(kind == 1, z_s + 0.02 * normal(n_rows, vocab), z_t)
    z_s, z_t = (torch.where(kind == 3, 0.01 * z, z) for z in (z_s, z_t))
    z_s[rows[2::4], 7] += 20
    z_t[rows[2::4], torch.where(rows[2::4] % 8 == 2, 7, 11)] += 20
    for z in (z_s, z_t):
        z[:, -BANNED:] = -torch.inf
    head = [normal(n_rows, 24), 0.5 * normal(vocab, 24), normal(vocab)]
    other = [normal(n_rows, 40), 0.4 * normal(vocab, 40), normal(vocab)]
    half = [[x.bfloat16() for x in leaves[:2]] for leaves in (head, other)]
    sources = [
        Source("logits", [z_s], [z_t]),
        Source("Head", head, other, scale=1.25, softcap=9.0),
        Source("bfloat16 Head", half[0], half[1]),
    ]
    sampled = rows * 7919 % (vocab - BANNED)
    return Case(
        device,
        n_rows,
        vocab,
        {source.name: source for source in sources},
        sampled,
        sampled.masked_fill(rows % 5 == 0, -100),
        rows % 7 != 3,
        rows * 3 // n_rows,
        torch.linspace(0.5, 2.0, n_rows),
        torch.linspace(0.5, 1.5, n_rows),
    )
