"""Gradients that exist before backward is called: it scales them and hands them over.

S kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels.learn.autograd import once, save, saved
from tip_kernels.learn.dense_loss import differentiated
from tip_kernels.learn.head_gradients import HeadGradients
from tip_kernels.learn.objective import GradOptions, Objective, RowsToLearn
from tip_kernels.sources.pair import Pair


@dataclass
class PrecomputedGradients:
    """Gradients of sum of weights * row loss / divisor, and how to make them again for a second backward."""

    gradients: HeadGradients | None  # until they are handed over
    divisor: Tensor | float
    objective: Objective
    rows: RowsToLearn
    options: GradOptions

    def attach(self, loss: Tensor, weights: Tensor, total: Tensor | float, pair: Pair) -> Tensor:
        """The loss () with its gradients attached: sum of weights * row loss / total, of weights (S,)."""
        self.weights, self.scale = weights / total, self.divisor / total
        return _AttachPrecomputed.apply(loss, self, pair, *pair.student.leaves)

    def times(self, upstream: Tensor, pair: Pair, need: tuple[bool, ...]) -> list[Tensor | None]:
        """The gradients of the student's leaves times upstream ()."""
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            _, sweep = differentiated(pair, self.objective, self.rows, self.options)
            return sweep.run(pair, self.weights * upstream, need)
        factor, weight_into = upstream * self.scale, self.options.weight_into
        sums = gradients.finished(None if factor.device.type == "cpu" and factor == 1 else factor)
        if weight_into is not None and sums[1] is not None:
            weight_into += sums[1]
            sums[1] = None
        return [x if wanted else None for x, wanted in zip(sums, need, strict=True)]


class _AttachPrecomputed(torch.autograd.Function):
    """Gives a loss measured without a graph the gradients that exist already, times the upstream scalar."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, made: PrecomputedGradients, pair: Pair, *leaves: Tensor) -> Tensor:
        save(ctx, pair)
        ctx.made = made
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pair = saved(ctx)
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.made.times(upstream.detach(), pair, ctx.needs_input_grad[3:])
        return None, None, None, *once(grads, pair.student.leaves)
