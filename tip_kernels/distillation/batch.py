"""The rows of one distill call: which are measured, which were found invalid, and how many products that took."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tip_kernels.distributed import collectives
from tip_kernels.learn.divergences import Divergence
from tip_kernels.measure.ops import measure
from tip_kernels.measure.token_stats import stats_record
from tip_kernels.select.rule import Kept, Rule, spans_ranks
from tip_kernels.sources.pair import Pair, Request
from tip_kernels.stats import LABEL_FIELDS, STUDENT_FIELDS, TEACHER_FIELDS, TOP_FIELDS, Blend, Fields, TokenStats


class Batch:
    """The rows of one distill call: which are measured, which were found invalid, and how many products that took."""

    def __init__(self, request: Request) -> None:
        pair = request.pair
        self.pair, self.labels, self.workspace = pair, request.labels, request.workspace
        self.alone = Pair(pair.student)
        self.n_rows = pair.n_rows
        self.n_rollouts = math.prod(pair.student.batch_shape[:-1])
        self.rollout_ids = request.rollout_ids
        if isinstance(request.rollout_ids, Tensor) and request.rollout_ids.device == pair.device:
            # on a GPU the one wait, before anything is measured; a graph cannot wait and takes the most there may be
            compiling = torch.compiler.is_compiling()
            self.n_rollouts = self.n_rows if compiling else torch.unique(request.rollout_ids).numel()
        self.units = 0.0
        self.top_k = 0
        self.trainable: Tensor | None = None  # ids of unmasked rows, where the host can know them without waiting
        row_mask = request.row_mask
        if row_mask is None:
            row_mask = torch.ones(self.n_rows, dtype=torch.bool, device=pair.device)
        elif row_mask.device.type == "cpu":
            self.trainable = row_mask.nonzero().squeeze(1).to(pair.device)
        self.row_mask = row_mask.to(pair.device)
        self.valid_rows = self.row_mask  # unmasked rows without those that a measurement found NaN

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

    def measured_at_one(self, ids: Tensor, measured: Fields, stats: TokenStats, temperature: float | Tensor) -> Fields:
        """The student's normalizer and label log-probability, at temperature 1, of the rows ids."""
        at_one = not isinstance(temperature, Tensor) and temperature == 1.0
        logp_s = stats._get("logp_s")
        if at_one and "logp_s" not in measured and logp_s is not None:
            measured = {**measured, "logp_s": logp_s[ids]}
        if not at_one or "logp_s" not in measured:
            measured = self.measure(ids, frozenset({"logp_s"}), 1.0, with_teacher=False)
        return {name: measured[name] for name in ("shift_s", "logsum_s", "logp_s")}

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
        pair = self.pair if with_teacher else self.alone
        measured = measure(
            pair, want, rows=ids, labels=self.labels, temperature=temperature,
            top_k=self.top_k if want & TOP_FIELDS else 0, workspace=workspace or self.workspace, record=record,
        )  # fmt: skip
        self.count(ids, len(pair.sources))
        self.note_invalid(measured, ids)
        return measured

    def note_invalid(self, measured: Fields, ids: Tensor | None) -> None:
        """Removes from the valid rows those of the rows ids that a measurement found NaN."""
        invalid = measured["logsum_s"].isnan()
        if "logsum_t" in measured:
            invalid = invalid | measured["logsum_t"].isnan()
        self.valid_rows = self.valid_rows & ~(invalid if ids is None else self.scattered(invalid, ids))

    def count(self, ids: Tensor | None, products: int) -> None:
        """Adds that many products over the given rows to the units."""
        self.units += products * (1.0 if ids is None else ids.numel() / max(self.n_rows, 1))

    def filled(self, stats: TokenStats, measured: Fields, ids: Tensor) -> TokenStats:
        """stats with the fields that were measured only of kept rows, NaN in the others."""
        before = stats._measured
        late = {name: self.scattered(value, ids) for name, value in measured.items() if name not in before}
        return self.record(before | late, stats._temperature, partial=True)

    def record(self, measured: Fields, temperature: float | Tensor, *, partial: bool) -> TokenStats:
        return stats_record(measured, self.pair, temperature, self.labels, self.top_k, partial=partial)

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

    def normalizer(self, kind: str | float, weights: Tensor, rule: Rule | None = None) -> Tensor | float:
        """What the weighted sum of losses is divided by: over all ranks where that is the rule's scope."""
        if not isinstance(kind, str):
            return kind
        total = weights.sum() if kind == "kept" else self.valid_rows.sum().float()
        if spans_ranks(rule):
            total = collectives.total(total, rule.group)
        return torch.where(total == 0, 1.0, total)
