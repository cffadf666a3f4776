"""MEASURE, SELECT and LEARN in one call: what a training loop uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flag, flat_rows, row_temperature, workspace_bytes
from tip_kernels.divergences import Divergence, ReverseKL
from tip_kernels.eager.online import Blend
from tip_kernels.losses import CrossEntropy, RowTask, check_listed, needed, row_loss, rows_of_stats
from tip_kernels.measure import (
    LABEL_FIELDS,
    PRIVATE_FIELDS,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    TOP_FIELDS,
    measure,
    with_logits,
)
from tip_kernels.select import Kept, Rule, SoftOr
from tip_kernels.sources import Head, Rows, check_pair, rows_of, teacher_rows
from tip_kernels.stats import TokenStats, check_labels, stats_record
from tip_kernels.topk import TopK, TopKRows

_FIELDS = (*(f.name for f in fields(TokenStats) if not f.name.startswith("_")), *PRIVATE_FIELDS)
Temperature = float | Tensor | Callable[[TokenStats], Tensor]


@dataclass(frozen=True)
class Plan:
    """How a distill call did its work.

    strategy       "two sweeps": measure, then one gradient sweep over kept rows in backward
    units          products of N x H x V that forward and a full backward take, by the rows of each sweep
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
                      measurement found NaN, or a positive number
    workspace_mib     MiB that the call may use beyond inputs, gradients and (N,) tensors; a Head's backward holds
                      d(hidden) of the kept rows once more, in fp32
    full_stats        measure both lse, entropies and KLs and hellinger_sq of every row, also where nothing needs them

    Returns (loss, stats, kept, plan). The loss is fp32. Nothing kept: a 0 that is connected to the graph. A kept row
    whose loss is NaN or infinite gets weight 0, is counted in plan.dropped_rows, and on a CPU warned of once.
    Statistics that neither the rule nor the loss needs are None; where the rule needs none of the teacher, the
    teacher's are NaN in rows that were not kept. Does not synchronise between measuring and backward for a rule with a
    quota; rollout_ids on a GPU are counted once before.

    Raises ValueError naming the argument. Method: measure, select, learn; TIP (arXiv 2604.14084).
    """
    select = SoftOr(0.5) if select is None else select
    divergence = ReverseKL() if divergence is None else divergence
    expect(isinstance(select, Rule), "select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    rows_s, rows_t = rows_of(student, "student"), teacher_rows(teacher)
    check_pair(rows_s, rows_t)
    check_listed(rows_t, divergence, temperature)
    if isinstance(rows_t, TopKRows):
        ok = not select.needs & ({"margin_t", "agree", "lse_t"} | TOP_FIELDS)
        expect(ok, "select", "a rule that needs no logits of the teacher, which is a TopK", select)
    workspace = workspace_bytes(workspace_mib)
    batch = _Batch(rows_s, rows_t, check_labels(labels, rows_s), row_mask, rollout_ids, workspace)
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

    stats = batch.measure_for(select, divergence, measured_at, full_stats or adaptive)
    kept = select(stats, row_mask=batch.row_mask, rollout_ids=rollout_ids)
    ids, valid = batch.slots(kept, select)
    learned_at = measured_at
    if adaptive:
        learned_at = row_temperature(temperature(stats), rows_s.batch_shape, rows_s.device, ids)
    at_rows = rows_of_stats(stats, rows_t, divergence, ids, learned_at)
    if at_rows is None:
        late = divergence.needs | needed(divergence, rows_t) | ({"logp_s"} if ce_weight else frozenset())
        at_rows = batch.measure_late(ids, late, learned_at)
        stats = stats if adaptive else batch.filled(stats, at_rows, ids)
    projections = len(with_logits(rows_s, rows_t))
    if projections == 2 and any(term.class_b for _, term in divergence.terms):
        batch.count(ids, projections)

    factor = 1.0 - ce_weight
    if temperature_sq:
        factor = factor * (learned_at[ids] if isinstance(learned_at, Tensor) else learned_at) ** 2
    ce = CrossEntropy(ce_weight, batch.label_rows(ids, at_rows, stats, learned_at)) if ce_weight else None
    task = RowTask(divergence, ids, at_rows, learned_at, batch.workspace, batch.labels, factor, ce)
    losses = row_loss(rows_s, rows_t, task)
    if losses.requires_grad:
        batch.count(ids, projections + sum(leaf.requires_grad for leaf in rows_s.leaves[:2] if rows_s.width))
    usable = valid & torch.isfinite(losses.detach())
    w = usable.float()
    for factor in (weights, kept._weights):
        w = w if factor is None else w * factor[ids]
    loss = (w * torch.where(usable, losses, 0.0)).sum() / batch.normalizer(normalizer, w)
    dropped = (valid & ~usable).sum()
    if dropped.device.type == "cpu" and int(dropped):
        warnings.warn(
            "tip_kernels.distill: a kept row has a NaN or infinite divergence and got weight 0; "
            "plan.dropped_rows counts such rows in every call",
            RuntimeWarning,
            stacklevel=2,
        )
    return Distilled(loss, stats, kept, Plan("two sweeps", batch.units, workspace_mib, valid.sum(), dropped))


class _Batch:
    """The rows of one distill call: which are measured, which were found NaN, and how many products that took."""

    def __init__(
        self,
        student: Rows,
        teacher: Rows | TopKRows,
        labels: Tensor | None,
        row_mask: Tensor | None,
        rollout_ids: Tensor | None,
        workspace: int,
    ) -> None:
        self.student, self.teacher, self.labels, self.workspace = student, teacher, labels, workspace
        self.n_rows = student.n_rows
        self.n_rollouts = math.prod(student.batch_shape[:-1])
        if isinstance(rollout_ids, Tensor) and rollout_ids.device == student.device and student.device.type != "cpu":
            self.n_rollouts = torch.unique(rollout_ids).numel()  # the one wait, before anything is measured
        self.units = 0.0
        self.top_k = 0
        self.trainable: Tensor | None = None  # ids of unmasked rows, where the host can know them without waiting
        if row_mask is None:
            row_mask = torch.ones(self.n_rows, dtype=torch.bool, device=student.device)
        else:
            on_cpu = isinstance(row_mask, Tensor) and row_mask.device.type == "cpu"
            device = row_mask.device if on_cpu else student.device
            row_mask = flat_rows("row_mask", row_mask, student.batch_shape, (torch.bool,), device)
            if on_cpu:
                self.trainable = row_mask.nonzero().squeeze(1).to(student.device)
        self.row_mask = row_mask.to(student.device)
        self.sane = self.row_mask  # unmasked rows without those that a measurement found NaN

    def measure_for(
        self, rule: Rule, divergence: Divergence, temperature: float | Tensor, everything: bool
    ) -> TokenStats:
        """The statistics that the rule reads, and those of the loss where they come with them."""
        self.top_k = getattr(rule, "top_k", 0)
        want = rule.needs | (STUDENT_FIELDS | TEACHER_FIELDS if everything else frozenset())
        with_teacher = bool(want - STUDENT_FIELDS - {"margin_s", "logp_s"})
        if self.labels is not None and want:
            want = want | (LABEL_FIELDS if with_teacher else {"logp_s"})
        if with_teacher:
            want = want | divergence.needs
        measured = self._measure(self.trainable, want, temperature, with_teacher) if want else {}
        if self.trainable is not None:
            measured = {name: _scattered(value, self.trainable, self.n_rows) for name, value in measured.items()}
        return self._record(measured, temperature, partial=self.trainable is not None)

    def measure_late(self, ids: Tensor, want: frozenset[str], temperature: float | Tensor) -> dict[str, Tensor]:
        """What the loss needs of the kept rows alone."""
        return self._measure(ids, want, temperature, with_teacher=True)

    def label_rows(
        self, ids: Tensor, at_rows: dict[str | Blend, Tensor], stats: TokenStats, temperature: float | Tensor
    ) -> dict[str, Tensor]:
        """The student's normaliser and label log-probability, at temperature 1, of the rows ids."""
        at_one = not isinstance(temperature, Tensor) and temperature == 1.0
        if at_one and "logp_s" not in at_rows and stats.logp_s is not None:
            at_rows = {**at_rows, "logp_s": stats.logp_s[ids]}
        if not at_one or "logp_s" not in at_rows:
            at_rows = self._measure(ids, frozenset({"logp_s"}), 1.0, with_teacher=False)
        return {name: at_rows[name] for name in ("shift_s", "logsum_s", "logp_s")}

    def _measure(
        self, ids: Tensor | None, want: frozenset[str], temperature: float | Tensor, with_teacher: bool
    ) -> dict[str, Tensor]:
        measured = measure(
            self.student,
            self.teacher if with_teacher else None,
            want,
            rows=ids,
            labels=self.labels,
            temperature=temperature,
            top_k=self.top_k if want & TOP_FIELDS else 0,
            workspace=self.workspace,
        )
        self.count(ids, len(with_logits(self.student, self.teacher if with_teacher else None)))
        broken = measured["logsum_s"].isnan()
        if with_teacher:
            broken = broken | measured["logsum_t"].isnan()
        self.sane = self.sane & ~(broken if ids is None else _scattered(broken, ids, self.n_rows))
        return measured

    def count(self, ids: Tensor | None, products: int) -> None:
        """Adds that many products over the given rows to the units."""
        self.units += products * (1.0 if ids is None else ids.numel() / max(self.n_rows, 1))

    def filled(self, stats: TokenStats, at_rows: dict[str, Tensor], ids: Tensor) -> TokenStats:
        """stats with the fields that were measured only of kept rows, NaN in the others."""
        here = {name: stats._get(name) for name in (*_FIELDS, *stats._blends) if stats._get(name) is not None}
        late = {name: _scattered(value, ids, self.n_rows) for name, value in at_rows.items() if name not in here}
        return self._record(here | late, stats._temperature, partial=True)

    def _record(self, measured: dict[str | Blend, Tensor], temperature: float | Tensor, *, partial: bool) -> TokenStats:
        listed_ids = getattr(self.teacher, "ids", None)
        return stats_record(measured, self.student, temperature, self.labels, self.top_k, listed_ids, partial)

    def slots(self, kept: Kept, rule: Rule) -> tuple[Tensor, Tensor]:
        """Kept row ids and which of them are real: exact on a CPU, else as many slots as the rule may need."""
        if kept.mask.device.type == "cpu":
            return kept.row_ids, torch.ones_like(kept.row_ids, dtype=torch.bool)
        groups = 1 if getattr(rule, "scope", "rollout") == "batch" else self.n_rollouts
        return kept.slots(min(rule.capacity(self.n_rows, groups), self.n_rows))

    def normalizer(self, kind: str | float, w: Tensor) -> Tensor | float:
        """What the weighted sum of losses is divided by."""
        if kind not in ("kept", "all"):
            return kind
        total = w.sum() if kind == "kept" else self.sane.sum().float()
        return torch.where(total == 0, 1.0, total)


def _scattered(value: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    """(n_rows, ...) with value at ids; NaN elsewhere, or False or -1 where the dtype has no NaN."""
    empty = torch.nan if value.is_floating_point() else (False if value.dtype == torch.bool else -1)
    out = torch.full((n_rows, *value.shape[1:]), empty, dtype=value.dtype, device=value.device)
    return out.index_copy_(0, ids, value)
