"""How a distill call does its work, and how it did it; never what it computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tip_kernels._checks import expect, finite_number, flag, is_int
from tip_kernels.learn.grad_filter import GradFilter


@dataclass(frozen=True, eq=False)
class Execution:
    """How `distill` does its work: settings that change time, memory and where gradients go.

    Args:
        sweeps: None chooses. 2: measure, and project the kept rows again in backward. 1: gradients are made while the
            logits are in memory, which saves two products of every kept row and keeps whole rows of logits in the
            workspace; the gradient then exists before backward, which hands it over.
        full_stats: Measure both lse, entropies and KLs and hellinger_sq of every row, also where nothing needs them.
        grad_filter: GradFilter(tolerance): leaves tiles of small gradients out of a Head's two gradient products; None
            is exact.
        backward: True runs backward at once and returns a loss without a graph. A weight that is a leaf then gets its
            gradient added to its main_grad, where it has one, or to its .grad, without a second (V, H) buffer; not for
            weights whose gradients a wrapper (DDP, FSDP) waits to see.
        grad_scale: A positive number or () tensor that multiplies the gradients of that backward, not the loss.

    Raises:
        ValueError: Naming the argument.
    """

    sweeps: int | None = None
    full_stats: bool = False
    grad_filter: GradFilter | None = None
    backward: bool = False
    grad_scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        sweeps, scale = self.sweeps, self.grad_scale
        expect(sweeps is None or (is_int(sweeps) and sweeps in (1, 2)), "sweeps", "1, 2 or None", sweeps)
        flag("full_stats", self.full_stats)
        ok = self.grad_filter is None or isinstance(self.grad_filter, GradFilter)
        expect(ok, "grad_filter", "a GradFilter or None", self.grad_filter)
        flag("backward", self.backward)
        if isinstance(scale, Tensor):
            expect(scale.dim() == 0 and self.backward, "grad_scale", "a () tensor with backward=True", scale)
        else:
            expect(self.backward or scale == 1, "grad_scale", "1 without backward=True", scale)
            finite_number("grad_scale", scale, positive=True)


@dataclass(frozen=True)
class Plan:
    """How a distill call did its work.

    Attributes:
        strategy: "one sweep": gradients are made while the logits are in memory. "two sweeps": measure, then one
            gradient sweep over kept rows in backward. "two sweeps, the second by rows": the kept rows are projected
            once more, measured and learned from at a time, where that saves a third sweep.
        units: Products of N x H x V that forward and a full backward take, by the rows of each sweep; with a
            vocab_group V is this rank's share.
        workspace_mib: What the call may use beyond inputs, gradients and (N,) tensors.
        kept_rows: () int64 on the device: how many rows were kept.
        dropped_rows: () int64 on the device: kept rows of weight 0 because their loss is NaN or infinite.
        weight: () fp32 on the device: the sum of the weights of the other kept rows, without weights their number.
        products: What made the fp32 products: "torch" (torch.mm), or "onednn", the faster one on a CPU of AMD's; the
            environment variable TIP_KERNELS_PRODUCTS, read at the first import, chooses.
    """

    strategy: str
    units: float
    workspace_mib: float
    kept_rows: Tensor
    dropped_rows: Tensor
    weight: Tensor
    products: str = "torch"
