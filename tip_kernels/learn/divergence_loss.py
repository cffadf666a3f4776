"""LEARN: a loss per row whose value is free, and whose backward is one sweep over the kept rows.

S kept rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels._checks import FLOATS, expect, flat_rows, row_temperature, workspace_bytes
from tip_kernels.backends.choice import backend_for
from tip_kernels.backends.eager import row_grad
from tip_kernels.backends.eager.online import Blend
from tip_kernels.learn.divergences import Divergence, ReverseKL
from tip_kernels.learn.gradient_sweep import TWICE, CrossEntropy, GradientSweep, LeafSweep, OutcomeSweep, Sweep
from tip_kernels.learn.head_gradients import GradFilter
from tip_kernels.measure.sweep import (
    IGNORE_LABEL,
    LABEL_FIELDS,
    LISTED_FIELDS,
    NORMALISER_FIELDS,
    measure,
)
from tip_kernels.select.rule import Kept
from tip_kernels.sources.rows import Head, LogitRows, Rows, pair_of
from tip_kernels.sources.topk import (
    PARTIAL,
    TopK,
    TopKRows,
    check_request,
    partial_divergence,
    student_outcomes,
)
from tip_kernels.stats import TokenStats


def divergence_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK,
    *,
    divergence: Divergence | None = None,
    kept: Kept | None = None,
    stats: TokenStats | None = None,
    temperature: float | Tensor = 1.0,
    row_weights: Tensor | None = None,
    grad_logits: str = "dense",
    workspace_mib: float = 256,
) -> Tensor:
    """The divergence of each kept row, (S,) fp32 in nats, differentiable in the student's source.

        row_loss[i] = row_weights[r] * D(teacher[r], student[r])          r = kept.row_ids[i]

    student, teacher  logits (N, V) or (B, T, V), or a Head; the teacher also a TopK. No gradient flows to the teacher
    divergence        ReverseKL() unless given
    kept              the rows to learn from, as a rule returned them; every row unless given
    stats             token_stats of the same sources: its values and normalisers are reused where it was measured at
                      this temperature and holds what the divergence needs; else the kept rows are measured again
    temperature       a positive float, or a float tensor (N,) or (B, T); divides both models' logits
    row_weights       float (N,) or (B, T), multiplies each row's loss; kept.row_weights is left to the caller
    grad_logits       how a student given as logits gets its gradient: "dense" (N, V); "compact", for an (N, V) leaf: a
                      sparse tensor whose indices are the row ids and whose values are (S, V); "inplace", into the
                      logits' own storage, which then no longer holds logits. A Head takes "dense" only
    workspace_mib     MiB that forward and backward may use beyond inputs, gradients and (N,) tensors; a Head's backward
                      holds d(hidden) of the kept rows once more, in fp32

    The caller reduces. Gradients come in each leaf's dtype: logits are projected and gradients accumulated in fp32. A
    leaf that needs no gradient costs nothing; a row whose upstream gradient is 0 is left out of the sweep. A row whose
    divergence is infinite keeps it. Backward may run repeatedly (retain_graph), but not twice through itself. Reads
    kept.row_ids, which synchronises on its first read.

    Raises ValueError naming the argument. Source of the gradients: eager/row_grad.py.
    """
    divergence = ReverseKL() if divergence is None else divergence
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    rows_s, rows_t = pair_of(student, teacher)
    check_listed(rows_t, divergence, temperature)
    temperature = row_temperature(temperature, rows_s.batch_shape, rows_s.device)
    _check_grad_logits(grad_logits, student)
    expect(kept is None or isinstance(kept, Kept), "kept", "what a selection rule returned, or None", kept)
    if kept is None:
        ids = torch.arange(rows_s.n_rows, device=rows_s.device)
    else:
        expect(kept.mask.numel() == rows_s.n_rows, "kept", "a choice among {} rows", kept.mask, rows_s.n_rows)
        ids = kept.mask.nonzero().squeeze(1) if torch.compiler.is_compiling() else kept.row_ids
    workspace = workspace_bytes(workspace_mib)
    if stats is None:
        at_rows = None
    else:
        expect(isinstance(stats, TokenStats), "stats", "what token_stats returned, or None", stats)
        matches = math.prod(stats._batch_shape) == rows_s.n_rows and stats._vocab == rows_s.vocab
        if not matches:
            raise ValueError(
                f"stats: expected those of {rows_s.batch_shape} rows and {rows_s.vocab} vocabulary entries, "
                f"got {stats._batch_shape} and {stats._vocab}"
            )
        at_rows = None if stats._partial else rows_of_stats(stats, rows_t, divergence, ids, temperature)
    labels = None if stats is None else stats._labels
    if divergence.needs & LABEL_FIELDS and labels is None:
        raise ValueError(
            f"stats: expected token_stats(..., labels=...), since {type(divergence).__name__} reads the sampled tokens"
        )
    if at_rows is None:
        at_rows = measure(
            rows_s,
            rows_t,
            needed(divergence, rows_t),
            rows=None if kept is None else ids,
            labels=labels,
            temperature=temperature,
            workspace=workspace,
        )
    loss = row_loss(
        rows_s, rows_t, RowTask(divergence, ids, at_rows, temperature, workspace, labels, grad_logits=grad_logits)
    )
    if row_weights is not None:
        loss = loss * flat_rows("row_weights", row_weights, rows_s.batch_shape, FLOATS, rows_s.device)[ids]
    return loss


def _check_grad_logits(mode: object, student: Tensor | Head) -> None:
    expect(mode in ("dense", "compact", "inplace"), "grad_logits", "'dense', 'compact' or 'inplace'", mode)
    if mode != "dense":
        expect(isinstance(student, Tensor), "grad_logits", "'dense', since the student is a Head", mode)
        ok = mode != "compact" or student.dim() == 2
        expect(ok, "grad_logits", "'dense' or 'inplace', since the student's logits are not (N, V)", mode)
        ok = mode != "compact" or student.is_leaf
        expect(ok, "grad_logits", "'dense' or 'inplace', since the student's logits are not a leaf", mode)
        ok = mode != "inplace" or student.is_contiguous()
        expect(ok, "grad_logits", "'dense' or 'compact', since the student's logits are not contiguous", mode)


def check_listed(teacher: Rows | TopKRows, divergence: Divergence, temperature: object) -> None:
    """Refuses what a TopK cannot serve; any other teacher serves all."""
    if isinstance(teacher, TopKRows):
        check_request(temperature)
        ok = not divergence.needs & LABEL_FIELDS
        expect(ok, "divergence", "one that reads no labels, since the teacher is a TopK", divergence)
        ok = teacher.tail != "ignore" or all(term.gradient in PARTIAL for _, term in divergence.terms)
        form = "ForwardKL, ReverseKL, Jeffreys, HellingerSq or a sum of them, since the TopK's tail is 'ignore'"
        expect(ok, "divergence", form, divergence)


def needed(divergence: Divergence, teacher: Rows | TopKRows) -> frozenset[str | Blend]:
    """The measured fields, beside the normalisers, that a loss is made from."""
    return LISTED_FIELDS if isinstance(teacher, TopKRows) else divergence.needs


def rows_of_stats(
    stats: TokenStats, teacher: Rows | TopKRows, divergence: Divergence, ids: Tensor, temperature: float | Tensor
) -> dict[str | Blend, Tensor] | None:
    """What the loss needs of stats at the rows ids, or None where not measured so, or at another temperature."""
    needs = needed(divergence, teacher)
    same = _same(temperature, stats._temperature) and _same(getattr(teacher, "ids", None), stats._listed_ids)
    fields = {name: stats._get(name) for name in needs | NORMALISER_FIELDS}
    if not same or any(value is None for value in fields.values()):
        return None
    return {name: value[ids] for name, value in fields.items()}


def _same(a: float | Tensor | None, b: float | Tensor | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device.type == "cpu" and torch.equal(a, b))  # elsewhere comparing would have to wait
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


@dataclass(frozen=True)
class RowTask:
    """Which loss of which rows: factor * divergence + ce.weight * cross-entropy."""

    divergence: Divergence
    ids: Tensor  # (S,) int64
    at_rows: Mapping[str | Blend, Tensor]  # (S,) shift and logsum of both models, and what the divergence needs
    temperature: float | Tensor  # a tensor is (N,)
    workspace: int
    labels: Tensor | None = None  # (N,)
    factor: float | Tensor = 1.0  # a tensor is (S,)
    ce: CrossEntropy | None = None
    grad_logits: str = "dense"
    weight_into: Tensor | None = None  # where d(weight) of a Head is added, instead of returned
    grad_filter: GradFilter | None = None

    @property
    def muted(self) -> bool:
        """Whether the label loss stands alone, so that a divergence of +inf must not matter: 0 * inf is NaN."""
        return not isinstance(self.factor, Tensor) and self.factor == 0


def row_loss(student: Rows, teacher: Rows | TopKRows, task: RowTask) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    if isinstance(teacher, TopKRows):
        return _outcome_loss(student, teacher, task)
    loss, gradient = differentiated(student, teacher, task)
    if torch.compiler.is_compiling():
        from tip_kernels.learn import ops as compiled

        return compiled.attach_gradient(loss, gradient, student, teacher)
    return _RowLoss.apply(loss, gradient, student, teacher, *student.leaves)


def differentiated(student: Rows, teacher: Rows, task: RowTask) -> tuple[Tensor, GradientSweep]:
    """The (S,) loss of rows whose statistics are known, without a graph, and the sweep that is its gradient."""
    tau = task.temperature[task.ids] if isinstance(task.temperature, Tensor) else task.temperature
    normalisers = {name: task.at_rows[name] for name in NORMALISER_FIELDS}
    sweep = Sweep(task.ids, normalisers, tau, task.workspace, backend_for(student.device))
    sums = sweep.row_sums(student, teacher, [term for _, term in task.divergence.terms if term.class_b])
    value, terms = 0.0, []
    for weight, term in task.divergence.terms:
        row = {**task.at_rows, **sums.get(term, {})}
        value = value + weight * term.value(row)
        terms.append(row_grad.Term(weight, term.gradient, term.params, term.scalars(row)))
    factor = task.factor if isinstance(task.factor, Tensor) else torch.full_like(value, task.factor)
    limit = task.divergence.max_per_row
    if task.muted:  # the divergence matters no more, but a NaN row stays one
        loss = 0.0 * (normalisers["logsum_s"] + normalisers["logsum_t"])
    elif limit is not None:
        loss = value.clamp(max=limit) * factor
        factor = torch.where(value > limit, 0.0, factor)
    else:
        loss = value * factor
    reads_labels = task.ce is not None or any("label_factor" in term.rows for term in terms)
    labels = task.labels[task.ids] if reads_labels else None
    if task.ce is not None:
        loss = loss - task.ce.weight * torch.where(labels == IGNORE_LABEL, 0.0, task.ce.at_rows["logp_s"])
    finite, clipped = torch.isfinite(loss), task.muted or limit is not None
    sinks = {"weight_into": task.weight_into, "grad_filter": task.grad_filter}
    return loss, GradientSweep(sweep, task.grad_logits, terms, factor, finite, labels, task.ce, clipped, **sinks)


def _outcome_loss(student: Rows, teacher: TopKRows, task: RowTask) -> Tensor:
    """The same against a TopK: a loss on the (S, K + 1) logits of the outcomes, whose gradient one sweep spreads."""
    rows = task.at_rows
    logits = student_outcomes(rows)
    labels = None if task.ce is None else task.labels[task.ids]
    if task.ce is not None:  # one column more: the label's logit
        label_logit = task.ce.at_rows["logp_s"] + rows["logsum_s"]
        logits = torch.cat([logits, torch.where(labels == IGNORE_LABEL, 0.0, label_logit).unsqueeze(1)], 1)
    rest = {"shift_rest": rows["shift_rest"], "logsum_rest": rows["logsum_rest"].nan_to_num(nan=torch.nan, neginf=0.0)}
    sweep = Sweep(task.ids, rest, 1.0, task.workspace, backend_for(student.device))
    sinks = {"weight_into": task.weight_into, "grad_filter": task.grad_filter}
    spread = OutcomeSweep(sweep, task.grad_logits, teacher.ids[task.ids], labels, **sinks)
    logits = _RowLoss.apply(logits, spread, student, teacher, *student.leaves)

    n_outcomes = teacher.ids.shape[1] + 1
    y = logits[:, :n_outcomes]
    lp_t = teacher.log_outcomes(task.ids, student.vocab, y[:, -1].isneginf())
    broken = (y.isnan() | lp_t.isnan().any(1, keepdim=True)).any(1)
    y, lp_t = (x.masked_fill(broken.unsqueeze(1), 0.0) for x in (y, lp_t))  # no NaN meets the 0 of its gradient
    if teacher.tail == "ignore":
        loss = sum(weight * partial_divergence(term.gradient, y, lp_t) for weight, term in task.divergence.terms)
        loss = loss if task.divergence.max_per_row is None else loss.clamp(max=task.divergence.max_per_row)
    else:
        pair = LogitRows(y[:, : lp_t.shape[1]]), LogitRows(lp_t)
        every = torch.arange(task.ids.numel(), device=y.device)
        at_rows = measure(*pair, task.divergence.needs, workspace=task.workspace)
        loss = row_loss(*pair, RowTask(task.divergence, every, at_rows, 1.0, task.workspace))
    loss = torch.zeros_like(loss) if task.muted else loss * task.factor
    if task.ce is not None:
        cross_entropy = y.logsumexp(1) - logits[:, n_outcomes]
        loss = loss + task.ce.weight * torch.where(labels == IGNORE_LABEL, 0.0, cross_entropy)
    return loss.masked_fill(broken, torch.nan)


class _RowLoss(torch.autograd.Function):
    """Gives values measured without a graph the gradient that one sweep computes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        sweep: LeafSweep,
        student: Rows,
        teacher: Rows | TopKRows,
        *leaves: Tensor,
    ) -> Tensor:
        # Saved tensors let autograd refuse a backward after an in-place change; those of inference mode cannot change.
        tensors = [*leaves, *teacher.leaves]
        ctx.save_for_backward(*(None if tensor.is_inference() else tensor for tensor in tensors))
        ctx.constants = [tensor if tensor.is_inference() else None for tensor in tensors]
        ctx.sweep, ctx.student, ctx.teacher = sweep, student.with_leaves(()), teacher.with_leaves(())
        return values.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[4:]
        tensors = tuple(
            saved if constant is None else constant
            for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
        )
        leaves = tensors[: len(need)]
        student, teacher = ctx.student.with_leaves(leaves), ctx.teacher.with_leaves(tensors[len(need) :])
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.sweep.run(student, teacher, upstream.detach(), need)
        if torch.is_grad_enabled():  # create_graph=True: a gradient of the gradient would pass for 0
            grads = [None if grad is None else Once.apply(grad, *leaves) for grad in grads]
        return (None, None, None, None, *grads)


class Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *leaves: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> Tensor:
        raise RuntimeError(TWICE)
