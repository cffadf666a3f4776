"""LEARN: a loss per row whose value is free, and whose backward is one sweep over the kept rows.

S kept rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, flat_rows, refuse
from tip_kernels.learn import ops
from tip_kernels.learn.divergences import Divergence, ReverseKL, check_beside_topk
from tip_kernels.learn.gated import gates_of, readers_of, statistics_read
from tip_kernels.learn.gradient_sweep import GradOptions, Objective, RowsToLearn, differentiated, with_gradient
from tip_kernels.learn.topk_loss import outcome_loss
from tip_kernels.measure import ops as measure_ops
from tip_kernels.measure import sweep
from tip_kernels.select.rule import Kept, statistic
from tip_kernels.sources.pair import Head, Pair, Request
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import (
    BEYOND_TOPK,
    LABEL_FIELDS,
    LISTED_FIELDS,
    NORMALIZER_FIELDS,
    STUDENT_FIELDS,
    TOP_FIELDS,
    Blend,
    Fields,
    TokenStats,
)

Weigher = Callable[[TokenStats, None, None], Tensor]


def divergence_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK,
    *,
    divergence: Divergence | None = None,
    kept: Kept | None = None,
    stats: TokenStats | None = None,
    temperature: float | Tensor = 1.0,
    row_weights: Tensor | Weigher | None = None,
    grad_logits: str = "dense",
    workspace_mib: float = 256,
) -> Tensor:
    """The divergence of each kept row, (S,) fp32 in nats, differentiable in the student's source.

        row_loss[i] = row_weights[r] * D(teacher[r], student[r])          r = kept.row_ids[i]

    The caller reduces. Gradients come in each leaf's dtype: logits are projected and gradients accumulated in fp32. A
    leaf that needs no gradient costs nothing; a row whose upstream gradient is 0 is left out of the sweep. A row whose
    divergence is infinite keeps it. Backward may run repeatedly (retain_graph), but not twice through itself. Reads
    kept.row_ids, which synchronises on its first read. Source of the gradients: learn/divergences.py.

    Args:
        student: Logits (N, V) or (B, T, V), or a Head.
        teacher: The same, or a TopK. No gradient flows to it.
        divergence: ReverseKL() unless given. A Gated's gates are called as gate(stats, None, None), of the stats given
            or else of all rows, measured at this temperature.
        kept: The rows to learn from, as a rule returned them; every row unless given.
        stats: token_stats of the same sources: its values and normalisers are reused where it was measured at this
            temperature and holds what the divergence needs; else the kept rows are measured again.
        temperature: A positive float, or a float tensor (N,) or (B, T); divides both models' logits.
        row_weights: float (N,) or (B, T), multiplies each row's loss; or a callable such as those of
            tip_kernels.weights, called as row_weights(stats, None, None) without a graph, which takes stats. Masked
            rows, or several rollouts of (N,) rows, are its own business: `lambda stats, *_: weight(stats, row_mask,
            rollout_ids)`. kept.row_weights is left to the caller.
        grad_logits: How a student given as logits gets its gradient: "dense" (N, V); "compact", for an (N, V) leaf: a
            sparse tensor whose indices are the row ids and whose values are (S, V); "inplace", into the logits' own
            storage, which then no longer holds logits. A Head takes "dense" only.
        workspace_mib: MiB that forward and backward may use beyond inputs, gradients and (N,) tensors; a Head's
            backward holds d(hidden) of the kept rows once more, in fp32, and for a 16-bit weight that learns half as
            much again.

    Returns:
        (S,) fp32, in the order of kept.row_ids.

    Raises:
        ValueError: Naming the argument.
    """
    divergence = ReverseKL() if divergence is None else divergence
    request = Request.checked(student, teacher, temperature=temperature, workspace_mib=workspace_mib, rows_follow=True)
    pair = request.pair
    if not isinstance(divergence, Divergence):
        refuse("divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    if pair.topk is not None:
        check_beside_topk(divergence, pair.topk.tail)
    _check_layout(grad_logits, student)
    ids = _checked_ids(kept, pair)
    if pair.topk is not None or isinstance(request.temperature, Tensor):
        request.check_values(None if kept is None else ids)
    labels = _checked_labels(stats, divergence, pair)
    objective = Objective(divergence, request.temperature, labels)
    known = stats  # of all rows
    if divergence.term_gates:
        known = _measured_for_gates(divergence, request) if stats is None else stats
        objective = replace(objective, gates=_gates(divergence, known, pair))
    measured = None if known is None or known._partial else measured_at(known, pair, objective, ids)
    if measured is None:
        measure = measure_ops.measure if torch.compiler.is_compiling() else sweep.measure
        measured = measure(
            pair, needs_of(objective, pair), rows=None if kept is None else ids, labels=labels,
            temperature=request.temperature, workspace=request.workspace,
        )  # fmt: skip
    loss = row_loss(pair, objective, RowsToLearn(ids, measured), GradOptions(request.workspace, grad_logits))
    return loss if row_weights is None else loss * _weights(row_weights, stats, pair)[ids]


def _gates(divergence: Divergence, stats: TokenStats | None, pair: Pair) -> tuple[Tensor, ...]:
    """What multiplies each term, (N,) each."""
    stats = TokenStats() if stats is None else stats
    for reader in readers_of(divergence):
        for name in sorted(getattr(reader, "needs", ())):
            statistic(stats, name, type(reader).__name__)
    return gates_of(divergence, stats, None, None, pair.student.batch_shape, pair.device)


def _measured_for_gates(divergence: Divergence, request: Request) -> TokenStats | None:
    """All rows, measured for the gates and for the loss; None where the gates read nothing."""
    pair, readers = request.pair, readers_of(divergence)
    if not readers:
        return None
    reads: frozenset[str] = frozenset().union(*map(statistics_read, readers))
    if reads & LABEL_FIELDS:
        raise ValueError("stats: expected token_stats(..., labels=...), since a gate reads them, got None")
    if pair.topk is not None and reads & BEYOND_TOPK:
        refuse("divergence", "gates that need no logits of the teacher, which is a TopK", divergence)
    measure = measure_ops.measure if torch.compiler.is_compiling() else sweep.measure
    top_k = max([getattr(reader, "top_k", 0) for reader in readers if statistics_read(reader) & TOP_FIELDS], default=0)
    want = reads | divergence.needs | STUDENT_FIELDS
    measured = measure(pair, want, temperature=request.temperature, top_k=top_k, workspace=request.workspace)
    return TokenStats(
        _measured=measured, _temperature=request.temperature, _vocab=pair.vocab, _top_k=top_k,
        _batch_shape=pair.student.batch_shape, _topk_ids=None if pair.topk is None else pair.topk.ids,
    )  # fmt: skip


def _weights(given: Tensor | Weigher, stats: TokenStats | None, pair: Pair) -> Tensor:
    """(N,) the weights given, or what the callable given makes of the statistics."""
    if callable(given):
        if stats is None:
            refuse("stats", "token_stats of the same sources, since a callable row_weights reads them", stats)
        with torch.no_grad():
            given = given(stats, None, None)
    return flat_rows("row_weights", given, pair.student.batch_shape, FLOATS, pair.device)


def row_loss(pair: Pair, objective: Objective, rows: RowsToLearn, options: GradOptions) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    if pair.topk is not None:
        return outcome_loss(pair, pair.topk, objective, rows, options)
    if torch.compiler.is_compiling():
        return ops.differentiable(pair, objective, rows, options)
    return with_gradient(*differentiated(pair, objective, rows, options), pair)


def needs_of(objective: Objective, pair: Pair) -> frozenset[str | Blend]:
    """The measured fields, beside the normalizers, that the divergence is made from."""
    return objective.divergence.needs if pair.topk is None else LISTED_FIELDS


def measured_at(stats: TokenStats, pair: Pair, objective: Objective, ids: Tensor) -> Fields | None:
    """What the objective needs of stats at the rows ids, or None where not measured so, or at another temperature."""
    topk_ids = None if pair.topk is None else pair.topk.ids
    if not _same(objective.temperature, stats._temperature) or not _same(topk_ids, stats._topk_ids):
        return None
    fields: Fields = {}
    for name in needs_of(objective, pair) | NORMALIZER_FIELDS:
        value = stats._get(name)
        if value is None:
            return None
        fields[name] = value[ids]
    return fields


def _same(a: float | Tensor | None, b: float | Tensor | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device.type == "cpu" and torch.equal(a, b))  # elsewhere comparing would have to wait
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _check_layout(mode: object, student: Tensor | Head) -> None:
    if mode not in ("dense", "compact", "inplace"):
        refuse("grad_logits", "'dense', 'compact' or 'inplace'", mode)
    if mode == "dense":
        return
    if not isinstance(student, Tensor):
        refuse("grad_logits", "'dense', since the student is a Head", mode)
    if mode == "compact" and student.dim() != 2:
        refuse("grad_logits", "'dense' or 'inplace', since the student's logits are not (N, V)", mode)
    if mode == "compact" and not student.is_leaf:
        refuse("grad_logits", "'dense' or 'inplace', since the student's logits are not a leaf", mode)
    if mode == "inplace" and not student.is_contiguous():
        refuse("grad_logits", "'dense' or 'compact', since the student's logits are not contiguous", mode)


def _checked_ids(kept: object, pair: Pair) -> Tensor:
    """(S,) the rows to learn from."""
    if kept is None:
        return torch.arange(pair.n_rows, device=pair.device)
    if not isinstance(kept, Kept):
        refuse("kept", "what a selection rule returned, or None", kept)
    if kept.mask.numel() != pair.n_rows:
        refuse("kept", "a choice among {} rows", kept.mask, pair.n_rows)
    return kept.mask.nonzero().squeeze(1) if torch.compiler.is_compiling() else kept.row_ids


def _checked_labels(stats: object, divergence: Divergence, pair: Pair) -> Tensor | None:
    """(N,) the labels that the statistics were measured with."""
    labels = None
    if stats is not None:
        if not isinstance(stats, TokenStats):
            refuse("stats", "what token_stats returned, or None", stats)
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
