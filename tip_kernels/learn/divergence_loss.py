"""LEARN: a loss per row whose value is free, and whose backward is one sweep over the kept rows.

S kept rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, flat_rows
from tip_kernels.learn import ops
from tip_kernels.learn.autograd import with_gradient
from tip_kernels.learn.dense_loss import differentiated
from tip_kernels.learn.divergences import Divergence, ReverseKL
from tip_kernels.learn.objective import GradOptions, Objective, RowsToLearn
from tip_kernels.learn.topk_loss import outcome_loss
from tip_kernels.measure.ops import measure
from tip_kernels.measure.topk_teacher import PARTIAL
from tip_kernels.select.rule import Kept
from tip_kernels.sources.head import Head
from tip_kernels.sources.pair import Pair, Request
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import LABEL_FIELDS, NORMALIZER_FIELDS, Fields, TokenStats


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
    request = Request.checked(student, teacher, temperature=temperature, workspace_mib=workspace_mib)
    pair = request.pair
    check_divergence(divergence, pair)
    _check_layout(grad_logits, student)
    ids = _checked_ids(kept, pair)
    labels = _checked_labels(stats, divergence, pair)
    objective = Objective(divergence, request.temperature, labels)
    measured = None if stats is None or stats._partial else measured_at(stats, pair, objective, ids)
    if measured is None:
        measured = measure(
            pair, objective.needs(pair.topk is not None), rows=None if kept is None else ids, labels=labels,
            temperature=request.temperature, workspace=request.workspace,
        )  # fmt: skip
    loss = row_loss(pair, objective, RowsToLearn(ids, measured), GradOptions(request.workspace, grad_logits))
    if row_weights is None:
        return loss
    return loss * flat_rows("row_weights", row_weights, pair.student.batch_shape, FLOATS, pair.device)[ids]


def row_loss(pair: Pair, objective: Objective, rows: RowsToLearn, options: GradOptions) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    if pair.topk is not None:
        return outcome_loss(pair, objective, rows, options)
    loss, sweep = differentiated(pair, objective, rows, options)
    return ops.attach_gradient(loss, sweep, pair) if torch.compiler.is_compiling() else with_gradient(loss, sweep, pair)


def measured_at(stats: TokenStats, pair: Pair, objective: Objective, ids: Tensor) -> Fields | None:
    """What the objective needs of stats at the rows ids, or None where not measured so, or at another temperature."""
    topk_ids = None if pair.topk is None else pair.topk.ids
    if not _same(objective.temperature, stats._temperature) or not _same(topk_ids, stats._topk_ids):
        return None
    fields: Fields = {}
    for name in objective.needs(pair.topk is not None) | NORMALIZER_FIELDS:
        value = stats._get(name)
        if value is None:
            return None
        fields[name] = value[ids]
    return fields


def _same(a: float | Tensor | None, b: float | Tensor | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device.type == "cpu" and torch.equal(a, b))  # elsewhere comparing would have to wait
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def check_divergence(divergence: object, pair: Pair) -> None:
    """Refuses what is no divergence, and what a TopK cannot serve; any other teacher serves all."""
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    if pair.topk is not None:
        ok = not divergence.needs & LABEL_FIELDS
        expect(ok, "divergence", "one that reads no labels, since the teacher is a TopK", divergence)
        ok = pair.topk.tail != "ignore" or all(term.gradient in PARTIAL for _, term in divergence.terms)
        form = "ForwardKL, ReverseKL, Jeffreys, HellingerSq or a sum of them, since the TopK's tail is 'ignore'"
        expect(ok, "divergence", form, divergence)


def _check_layout(mode: object, student: Tensor | Head) -> None:
    expect(mode in ("dense", "compact", "inplace"), "grad_logits", "'dense', 'compact' or 'inplace'", mode)
    if mode != "dense":
        expect(isinstance(student, Tensor), "grad_logits", "'dense', since the student is a Head", mode)
        ok = mode != "compact" or student.dim() == 2
        expect(ok, "grad_logits", "'dense' or 'inplace', since the student's logits are not (N, V)", mode)
        ok = mode != "compact" or student.is_leaf
        expect(ok, "grad_logits", "'dense' or 'inplace', since the student's logits are not a leaf", mode)
        ok = mode != "inplace" or student.is_contiguous()
        expect(ok, "grad_logits", "'dense' or 'compact', since the student's logits are not contiguous", mode)


def _checked_ids(kept: object, pair: Pair) -> Tensor:
    """(S,) the rows to learn from."""
    if kept is None:
        return torch.arange(pair.n_rows, device=pair.device)
    expect(isinstance(kept, Kept), "kept", "what a selection rule returned, or None", kept)
    expect(kept.mask.numel() == pair.n_rows, "kept", "a choice among {} rows", kept.mask, pair.n_rows)
    return kept.mask.nonzero().squeeze(1) if torch.compiler.is_compiling() else kept.row_ids


def _checked_labels(stats: object, divergence: Divergence, pair: Pair) -> Tensor | None:
    """(N,) the labels that the statistics were measured with."""
    labels = None
    if stats is not None:
        expect(isinstance(stats, TokenStats), "stats", "what token_stats returned, or None", stats)
        shape = stats._batch_shape
        if math.prod(shape) != pair.n_rows or stats._vocab != pair.vocab:
            raise ValueError(
                f"stats: expected those of {pair.student.batch_shape} rows and {pair.vocab} vocabulary entries, "
                f"got {shape} and {stats._vocab}"
            )
        labels = stats._labels
    if divergence.needs & LABEL_FIELDS and labels is None:
        raise ValueError(
            f"stats: expected token_stats(..., labels=...), since {type(divergence).__name__} reads the sampled tokens"
        )
    return labels
