"""Gradients that one sweep computes, given to values that were measured without a graph."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels.learn.gradient_sweep import LeafSweep
from tip_kernels.measure.ops import NO_DOUBLE_BACKWARD
from tip_kernels.sources.pair import Pair


def with_gradient(values: Tensor, sweep: LeafSweep, pair: Pair) -> Tensor:
    """values (S, ...) as they are; backward runs the sweep."""
    return _WithGradient.apply(values, sweep, pair, *pair.student.leaves)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, sweep: LeafSweep, pair: Pair, *leaves: Tensor) -> Tensor:
        save(ctx, pair)
        ctx.sweep = sweep
        return values.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[3:]
        pair = saved(ctx)
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.sweep.run(pair, upstream.detach(), need)
        return None, None, None, *once(grads, pair.student.leaves)


def save(ctx: FunctionCtx, pair: Pair) -> None:
    """Keeps a pair's tensors for backward, as autograd wants them kept."""
    # Saved tensors let autograd refuse a backward after an in-place change; those of inference mode cannot change.
    tensors = [*pair.student.leaves, *(pair.teacher.leaves if pair.teacher is not None else ())]
    ctx.save_for_backward(*[None if tensor.is_inference() else tensor for tensor in tensors])
    ctx.constants = [tensor if tensor.is_inference() else None for tensor in tensors]
    ctx.n_leaves, ctx.pair = len(pair.student.leaves), pair.with_leaves()


def saved(ctx: FunctionCtx) -> Pair:
    """The pair that `save` kept."""
    both = zip(ctx.saved_tensors, ctx.constants, strict=True)
    tensors = tuple([tensor if constant is None else constant for tensor, constant in both])
    return ctx.pair.with_leaves(tensors[: ctx.n_leaves], tensors[ctx.n_leaves :])


def once(grads: list[Tensor | None], leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients that cannot be differentiated again; with create_graph=True one of them would pass for 0."""
    if not torch.is_grad_enabled():
        return grads
    return [None if grad is None else _NoDoubleBackward.apply(grad, *leaves) for grad in grads]


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *leaves: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> NoReturn:
        raise RuntimeError(NO_DOUBLE_BACKWARD)
