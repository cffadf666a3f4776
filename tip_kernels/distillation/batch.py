"""The rows of one distill call: which are measured, which were found NaN, and how many products that took."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from tip_kernels._checks import flat_rows
from tip_kernels.backends.eager.online import Blend
from tip_kernels.distributed import collectives as parallel
from tip_kernels.learn.divergences import Divergence
from tip_kernels.measure.sweep import (
    LABEL_FIELDS,
    PRIVATE_FIELDS,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    TOP_FIELDS,
    measure,
    with_logits,
)
from tip_kernels.select.rule import Kept, Rule, spans_ranks
from tip_kernels.sources.rows import Rows
from tip_kernels.sources.topk import TopKRows
from tip_kernels.stats import TokenStats, stats_record

_FIELDS = (*(f.name for f in fields(TokenStats) if not f.name.startswith("_")), *PRIVATE_FIELDS)
Fields = dict[str | Blend, Tensor]


class Batch:
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
        if isinstance(rollout_ids, Tensor) and rollout_ids.device == student.device:
            # on a GPU the one wait, before anything is measured; a graph cannot wait and takes the most there may be
            compiling = torch.compiler.is_compiling()
            self.n_rollouts = self.n_rows if compiling else torch.unique(rollout_ids).numel()
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

    def wanted(self, rule: Rule, divergence: Divergence, everything: bool) -> tuple[frozenset[str | Blend], bool]:
        """The fields that the rule reads, with those of the loss where they come with them; and if of both models."""
        self.top_k = getattr(rule, "top_k", 0)
        want = rule.needs | (STUDENT_FIELDS | TEACHER_FIELDS if everything else frozenset())
        with_teacher = bool(want - STUDENT_FIELDS - {"margin_s", "logp_s"})
        if self.labels is not None and want:
            want = want | (LABEL_FIELDS if with_teacher else {"logp_s"})
        if with_teacher:
            want = want | divergence.needs
        return want, with_teacher

    def measure_for(self, want: frozenset[str | Blend], temperature: float | Tensor, with_teacher: bool) -> TokenStats:
        """The wanted statistics of all rows that may be kept."""
        measured = self.measure(self.trainable, want, temperature, with_teacher) if want else {}
        if self.trainable is not None:
            measured = {name: self.scattered(value, self.trainable) for name, value in measured.items()}
        return self.record(measured, temperature, partial=self.trainable is not None)

    def label_rows(
        self, ids: Tensor, at_rows: dict[str | Blend, Tensor], stats: TokenStats, temperature: float | Tensor
    ) -> dict[str, Tensor]:
        """The student's normaliser and label log-probability, at temperature 1, of the rows ids."""
        at_one = not isinstance(temperature, Tensor) and temperature == 1.0
        if at_one and "logp_s" not in at_rows and stats.logp_s is not None:
            at_rows = {**at_rows, "logp_s": stats.logp_s[ids]}
        if not at_one or "logp_s" not in at_rows:
            at_rows = self.measure(ids, frozenset({"logp_s"}), 1.0, with_teacher=False)
        return {name: at_rows[name] for name in ("shift_s", "logsum_s", "logp_s")}

    def measure(
        self,
        ids: Tensor | None,
        want: frozenset[str | Blend],
        temperature: float | Tensor,
        with_teacher: bool,
        record: list[Tensor | None] | None = None,
        workspace: int | None = None,
    ) -> Fields:
        """The wanted fields of the rows ids, (len(ids),) each; counts the products and notes rows that are NaN."""
        measured = measure(
            self.student,
            self.teacher if with_teacher else None,
            want,
            rows=ids,
            labels=self.labels,
            temperature=temperature,
            top_k=self.top_k if want & TOP_FIELDS else 0,
            workspace=workspace or self.workspace,
            record=record,
        )
        self.count(ids, len(with_logits(self.student, self.teacher if with_teacher else None)))
        self.note_broken(measured, ids)
        return measured

    def note_broken(self, measured: Fields, ids: Tensor | None) -> None:
        """Strikes the rows ids that a measurement found NaN off the sane ones."""
        broken = measured["logsum_s"].isnan()
        if "logsum_t" in measured:
            broken = broken | measured["logsum_t"].isnan()
        self.sane = self.sane & ~(broken if ids is None else self.scattered(broken, ids))

    def count(self, ids: Tensor | None, products: int) -> None:
        """Adds that many products over the given rows to the units."""
        self.units += products * (1.0 if ids is None else ids.numel() / max(self.n_rows, 1))

    def filled(self, stats: TokenStats, at_rows: dict[str, Tensor], ids: Tensor) -> TokenStats:
        """stats with the fields that were measured only of kept rows, NaN in the others."""
        here = {name: stats._get(name) for name in (*_FIELDS, *stats._blends) if stats._get(name) is not None}
        late = {name: self.scattered(value, ids) for name, value in at_rows.items() if name not in here}
        return self.record(here | late, stats._temperature, partial=True)

    def record(self, measured: dict[str | Blend, Tensor], temperature: float | Tensor, *, partial: bool) -> TokenStats:
        listed_ids = getattr(self.teacher, "ids", None)
        return stats_record(measured, self.student, temperature, self.labels, self.top_k, listed_ids, partial)

    def slots(self, kept: Kept, rule: Rule) -> tuple[Tensor, Tensor]:
        """Kept row ids and which are real: exact on a CPU, else (or in a graph) as many slots as the rule may need.

        Exact, too, for a quota over all ranks, which has waited for the device anyway: one may keep any number of rows.
        """
        if (kept.mask.device.type == "cpu" or spans_ranks(rule)) and not torch.compiler.is_compiling():
            return kept.row_ids, torch.ones_like(kept.row_ids, dtype=torch.bool)
        groups = 1 if getattr(rule, "scope", "rollout") == "batch" else self.n_rollouts
        return kept.slots(min(rule.capacity(self.n_rows, groups), self.n_rows))

    def scattered(self, value: Tensor, ids: Tensor) -> Tensor:
        """(N, ...) with value at ids; NaN elsewhere, or False or -1 where the dtype has no NaN."""
        empty = torch.nan if value.is_floating_point() else (False if value.dtype == torch.bool else -1)
        out = torch.full((self.n_rows, *value.shape[1:]), empty, dtype=value.dtype, device=value.device)
        return out.index_copy_(0, ids, value)

    def normalizer(self, kind: str | float, w: Tensor, rule: Rule | None = None) -> Tensor | float:
        """What the weighted sum of losses is divided by: over all ranks where that is the rule's scope."""
        if kind not in ("kept", "all"):
            return kind
        total = w.sum() if kind == "kept" else self.sane.sum().float()
        if spans_ranks(rule):
            total = parallel.total(total, rule.group)
        return torch.where(total == 0, 1.0, total)
