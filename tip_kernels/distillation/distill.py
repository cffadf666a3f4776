"""MEASURE, SELECT and LEARN in one call: what a training loop uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flag, flat_rows, is_int, row_temperature, workspace_bytes
from tip_kernels.distillation.batch import Batch
from tip_kernels.distillation.one_sweep import Learned, Lesson, OneSweep, delivered, layout, stash_layout
from tip_kernels.learn.divergence_loss import CrossEntropy, RowTask, check_listed, needed, row_loss, rows_of_stats
from tip_kernels.learn.divergences import Divergence, ReverseKL
from tip_kernels.learn.head_gradients import GradFilter, gradient_of_its_own
from tip_kernels.measure.sweep import LABEL_FIELDS, TOP_FIELDS, with_logits
from tip_kernels.select.rule import KeepAll, Kept, Rule, SoftOr, spans_ranks
from tip_kernels.sources.rows import Head, HeadRows, pair_of
from tip_kernels.sources.topk import TopK, TopKRows
from tip_kernels.stats import TokenStats, check_labels

Temperature = float | Tensor | Callable[[TokenStats], Tensor]


@dataclass(frozen=True)
class Plan:
    """How a distill call did its work.

    strategy       "one sweep": gradients are made while the logits are at hand
                   "two sweeps": measure, then one gradient sweep over kept rows in backward
                   "two sweeps, the second by rows": the kept rows are projected once more, measured and learned from
                   at a time, where that saves a third sweep
    units          products of N x H x V that forward and a full backward take, by the rows of each sweep; with a
                   vocab_group V is this rank's share
    workspace_mib  what the call may use beyond inputs, gradients and (N,) tensors
    kept_rows      () int64 on the device: how many rows were kept
    dropped_rows   () int64 on the device: kept rows of weight 0 because their loss is NaN or infinite
    """

    strategy: str
    units: float
    workspace_mib: float
    kept_rows: Tensor
    dropped_rows: Tensor


class Distilled(NamedTuple):
    """What distill returns: the scalar loss, the statistics, the kept rows, and how it was done."""

    loss: Tensor
    stats: TokenStats
    kept: Kept
    plan: Plan


def distill(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK,
    *,
    select: Rule | None = None,
    divergence: Divergence | None = None,
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    temperature: Temperature = 1.0,
    temperature_sq: bool = False,
    normalizer: str | float = "kept",
    workspace_mib: float = 256,
    full_stats: bool = False,
    sweeps: int | None = None,
    grad_filter: GradFilter | None = None,
    backward: bool = False,
    grad_scale: float | Tensor = 1.0,
) -> Distilled:
    """Measures all rows, keeps those that the rule chooses, and returns a loss on them.

        loss = sum_kept w_i D(teacher_i, student_i) / normalizer            w = row_weights * the rule's own weights

    student, teacher  logits (N, V) or (B, T, V), or a Head; the teacher also a TopK, at temperature 1. The gradient
                      flows to the student's source only
    select            SoftOr(0.5) unless given
    divergence        ReverseKL() unless given
    row_mask          bool (N,) or (B, T): True for trainable tokens. Others are never kept; with a mask on the CPU they
                      are not measured either and are NaN in out.stats
    rollout_ids       int64 (N,) or (B, T): the rollout of each row; without them a (B, T) batch holds B rollouts
    labels            int64 (N,) or (B, T), -100 for none: the token each row predicts; for rules that read logp, for
                      SampledReverseKL and for ce_weight
    ce_weight         in [0, 1]: mixes a label loss at temperature 1 from the same sweep,
                      ce_weight * CE + (1 - ce_weight) * D; CE is 0 in a row without a label
    row_weights       float (N,) or (B, T)
    temperature       a positive float, a float tensor (N,) or (B, T), or a callable `stats -> (N,)`: rows are then
                      measured at 1.0 and learned at what it returns, detached (AdaKD). Divides both models' logits
    temperature_sq    multiplies each row's divergence by its temperature squared
    normalizer        "kept" = sum of w (the number of kept rows without weights), "all" = unmasked rows that no
                      measurement found NaN, or a positive number. With a rule of scope "global" both are of all ranks,
                      so that the ranks' losses add up to that of one process. DDP and FSDP average gradients over the
                      ranks: multiply the loss by their number
    workspace_mib     MiB that the call may use beyond inputs, gradients and (N,) tensors; a Head's backward holds
                      d(hidden) of the kept rows once more, in fp32
    full_stats        measure both lse, entropies and KLs and hellinger_sq of every row, also where nothing needs them
    sweeps            None chooses. 2: measure, and project the kept rows again in backward. 1: gradients are made while
                      the logits are at hand, which saves two products of every kept row and keeps whole rows of logits
                      in the workspace; the gradient then exists before backward, which hands it over
    grad_filter       GradFilter(tolerance): leaves tiles of small gradients out of a Head's two gradient products; None
                      is exact
    backward          True runs backward at once and returns a loss without a graph. A weight that is a leaf then gets
                      its gradient added to its main_grad, where it has one, or to its .grad, without a second (V, H)
                      buffer; not for weights whose gradients a wrapper (DDP, FSDP) waits to see
    grad_scale        a positive number or () tensor that multiplies the gradients of that backward, not the loss

    Returns (loss, stats, kept, plan). The loss is fp32. Nothing kept: a 0 that is connected to the graph. A kept row
    whose loss is NaN or infinite gets weight 0, is counted in plan.dropped_rows, and on a CPU warned of once.
    Statistics that neither the rule nor the loss needs are None; where the rule needs none of the teacher, the
    teacher's are NaN in rows that were not kept. Does not synchronise between measuring and backward for a rule with a
    quota, unless of scope "global"; rollout_ids on a GPU are counted once before.

    Raises ValueError naming the argument. Method: measure, select, learn; TIP (arXiv 2604.14084).
    """
    select = SoftOr(0.5) if select is None else select
    divergence = ReverseKL() if divergence is None else divergence
    expect(isinstance(select, Rule), "select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    rows_s, rows_t = pair_of(student, teacher)
    check_listed(rows_t, divergence, temperature)
    if rows_s.shard is not None and spans_ranks(select) and select.group is None:
        raise ValueError(
            "select: expected a group beside scope 'global', that of the ranks with rows of their own, since those of "
            "the student's vocab_group have the same, got None"
        )
    if isinstance(rows_t, TopKRows):
        ok = not select.needs & ({"margin_t", "agree", "lse_t"} | TOP_FIELDS)
        expect(ok, "select", "a rule that needs no logits of the teacher, which is a TopK", select)
    workspace = workspace_bytes(workspace_mib)
    batch = Batch(rows_s, rows_t, check_labels(labels, rows_s), row_mask, rollout_ids, workspace)
    weights = None
    if row_weights is not None:
        weights = flat_rows("row_weights", row_weights, rows_s.batch_shape, FLOATS, rows_s.device)
    expect(0 <= finite_number("ce_weight", ce_weight) <= 1, "ce_weight", "a number in [0, 1]", ce_weight)
    if labels is None and (ce_weight or (divergence.needs | select.needs) & LABEL_FIELDS):
        reader = "ce_weight" if ce_weight else type(divergence if divergence.needs & LABEL_FIELDS else select).__name__
        raise ValueError(f"labels: expected int64 labels of the rows, since {reader} reads them, got None")
    adaptive = callable(temperature)
    measured_at = 1.0 if adaptive else row_temperature(temperature, rows_s.batch_shape, rows_s.device)
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and 0 < normalizer < math.inf
    expect(number or normalizer in ("kept", "all"), "normalizer", "'kept', 'all' or a number above 0", normalizer)
    flag("temperature_sq", temperature_sq)
    flag("full_stats", full_stats)
    expect(sweeps is None or (is_int(sweeps) and sweeps in (1, 2)), "sweeps", "1, 2 or None", sweeps)
    if torch.compiler.is_compiling():
        expect(sweeps != 1, "sweeps", "2 or None under torch.compile", sweeps)
        expect(backward is False, "backward", "False under torch.compile", backward)
        if grad_filter is not None:
            raise ValueError("grad_filter: expected None under torch.compile, got a GradFilter")
        sweeps = 2

    flag("backward", backward)
    expect(
        grad_filter is None or isinstance(grad_filter, GradFilter), "grad_filter", "a GradFilter or None", grad_filter
    )
    if grad_filter is not None and rows_s.shard is not None:
        raise ValueError("grad_filter: expected None with a vocab_group, since its correction needs the whole head")
    if isinstance(grad_scale, Tensor):
        expect(grad_scale.dim() == 0 and backward, "grad_scale", "a () tensor with backward=True", grad_scale)
    else:
        expect(backward or grad_scale == 1, "grad_scale", "1 without backward=True", grad_scale)
        finite_number("grad_scale", grad_scale, positive=True)
    weight_into = gradient_of_its_own(rows_s.leaves[1]) if backward and isinstance(rows_s, HeadRows) else None
    lesson = Lesson(
        divergence,
        batch.labels,
        ce_weight,
        measured_at,
        temperature_sq,
        weights,
        normalizer,
        grad_scale,
        weight_into,
        grad_filter,
    )
    strategy, stats, kept, valid, learned = _learned(
        batch, select, rollout_ids, lesson, temperature if adaptive else None, full_stats, sweeps
    )
    ids = learned.ids

    usable = valid & torch.isfinite(learned.losses.detach())
    w = torch.where(usable, lesson.weights(ids, valid, kept), 0.0)
    total = batch.normalizer(normalizer, w, select)
    loss = (w * torch.where(usable, learned.losses, 0.0)).sum() / total
    if learned.gradients is not None:
        loss = delivered(loss, learned, w, total, rows_s, rows_t)
    if backward:
        if loss.requires_grad:
            scale = None if learned.gradients is not None else torch.as_tensor(grad_scale, device=loss.device).float()
            loss.backward(scale)
        loss = loss.detach()
    dropped = (valid & ~usable).sum()
    if dropped.device.type == "cpu" and not torch.compiler.is_compiling() and int(dropped):
        warnings.warn(
            "tip_kernels.distill: a kept row has a NaN or infinite divergence and got weight 0; "
            "plan.dropped_rows counts such rows in every call",
            RuntimeWarning,
            stacklevel=2,
        )
    return Distilled(loss, stats, kept, Plan(strategy, batch.units, workspace_mib, valid.sum(), dropped))


def _learned(
    batch: Batch,
    select: Rule,
    rollout_ids: Tensor | None,
    lesson: Lesson,
    temperature_of: Callable[[TokenStats], Tensor] | None,
    full_stats: bool,
    sweeps: int | None,
) -> tuple[str, TokenStats, Kept, Tensor, Learned]:
    """The strategy taken, the statistics, the kept rows, which of their slots are real, and what was learned."""
    student, teacher, divergence, measured_at = batch.student, batch.teacher, lesson.divergence, lesson.temperature
    adaptive = temperature_of is not None
    need = tuple(leaf.requires_grad for leaf in student.leaves) if torch.is_grad_enabled() else ()
    label = frozenset({"logp_s"}) if lesson.ce_weight else frozenset()
    want, with_teacher = batch.wanted(select, divergence, full_stats or adaptive)
    late = divergence.needs | label

    kept = None
    if not select.needs and not adaptive and (not full_stats or isinstance(select, KeepAll)):
        kept = select(batch.record({}, measured_at, partial=True), batch.row_mask, rollout_ids)
        ids, valid = batch.slots(kept, select)
        if sweeps != 2 and (plan := layout(batch, need, ids.numel())):
            one = OneSweep(batch, lesson, need, plan)
            learned = one.known(ids, lesson.weights(ids, valid, kept), want | late)
            return "one sweep", one.stats(partial=not isinstance(select, KeepAll)), kept, valid, learned
    elif sweeps != 2 and not adaptive and (plan := stash_layout(batch, need, select, lesson.weight_into is None)):
        one = OneSweep(batch, lesson, need, plan)
        kept = one.speculated(select, rollout_ids, want | label, with_teacher)
        learned = one.settled(kept, None if with_teacher else late)
        valid = torch.ones_like(learned.ids, dtype=torch.bool)
        return "one sweep", one.stats(partial=not with_teacher), kept, valid, learned
    if sweeps == 1:
        raise ValueError(
            "sweeps: expected 2 or None, since one sweep takes a student's whole Head that needs a gradient, a teacher "
            "with logits, a temperature known beforehand, a rule known beforehand or with a quota and no generator "
            f"(the latter on a CPU), and whole rows of logits within workspace_mib; got 1 for {select}"
        )

    stats = batch.measure_for(want, measured_at, with_teacher)
    if kept is None:
        kept = select(stats, row_mask=batch.row_mask, rollout_ids=rollout_ids)
        ids, valid = batch.slots(kept, select)
    learned_at = measured_at
    if adaptive:
        learned_at = row_temperature(temperature_of(stats), student.batch_shape, student.device, ids)
        lesson = replace(lesson, temperature=learned_at)
    at_rows = rows_of_stats(stats, teacher, divergence, ids, learned_at)
    projections = len(with_logits(student, teacher))
    third = projections == 2 and any(term.class_b for _, term in divergence.terms)
    if sweeps is None and (at_rows is None or third) and (plan := layout(batch, need, ids.numel())):
        one = OneSweep(batch, lesson, need, plan)
        learned = one.known(ids, lesson.weights(ids, valid, kept), late)
        if not adaptive:
            stats = batch.filled(stats, {name: value[ids] for name, value in one.fields.items()}, ids)
        return "two sweeps, the second by rows", stats, kept, valid, learned
    if at_rows is None:
        at_rows = batch.measure(ids, late | needed(divergence, teacher), learned_at, with_teacher=True)
        stats = stats if adaptive else batch.filled(stats, at_rows, ids)
    if third:
        batch.count(ids, projections)
    ce = None
    if lesson.ce_weight:
        ce = CrossEntropy(lesson.ce_weight, batch.label_rows(ids, at_rows, stats, learned_at))
    sinks = {"weight_into": lesson.weight_into, "grad_filter": lesson.grad_filter}
    task = RowTask(divergence, ids, at_rows, learned_at, batch.workspace, batch.labels, lesson.factor(ids), ce, **sinks)
    losses = row_loss(student, teacher, task)
    if losses.requires_grad:
        batch.count(ids, projections + sum(need[:2] if student.width else ()))
    return "two sweeps", stats, kept, valid, Learned(ids, losses, task)
