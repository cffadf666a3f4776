"""SELECT over a whole optimizer step: every micro-batch is measured before any is learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flag, flat_rows
from tip_kernels.distillation.distill import Distilled
from tip_kernels.distributed import collectives
from tip_kernels.measure.ops import measure
from tip_kernels.select.adakd import DifficultyTemperature
from tip_kernels.select.rule import Kept, Rule, spans_ranks
from tip_kernels.sources.pair import Head, Pair, Request
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import LABEL_FIELDS, STUDENT_FIELDS, TEACHER_FIELDS, Blend, Fields, TokenStats


@dataclass(frozen=True, eq=False)
class ChosenRows(Rule):
    """The rows of one micro-batch that were chosen in its step; it reads no statistic."""

    kept: Kept
    count: int  # of kept rows

    def _kept(self, stats: TokenStats, row_mask: Tensor | None, rollout_ids: Tensor | None) -> Kept:
        n_rows, wanted = math.prod(stats._batch_shape), self.kept.mask.numel()
        if n_rows != wanted:
            raise ValueError(f"select: expected the micro-batch of {wanted} rows that was measured, got {n_rows} rows")
        return self.kept

    def capacity(self, n_rows: int, n_groups: int | None = None) -> int:
        return self.count


class StepPart(TypedDict):
    """The arguments of `distill` for one micro-batch."""

    select: ChosenRows
    row_mask: Tensor | None
    row_weights: Tensor | None
    temperature: float | Tensor
    temperature_sq: bool
    normalizer: float


class _MicroBatch(NamedTuple):
    fields: Fields  # (N,) each, NaN in rows that were not measured
    vocab: int
    row_mask: Tensor  # (N,) bool, on the device of the fields
    given_mask: Tensor | None
    rollouts: Tensor  # (N,) int64, from 0 where none were given
    named: bool  # whether they were
    row_weights: Tensor | None  # (N,)


class StepSelection:
    """Chooses the rows of all micro-batches of an optimizer step together, as `distill` does those of one big batch.

        step = tip.StepSelection(tip.SoftOr(0.2))
        for batch in micro_batches:
            with torch.no_grad():
                step.measure(student(batch), teacher(batch), row_mask=batch.mask)
        for batch, part in zip(micro_batches, step.parts()):
            tip.distill(student(batch), teacher(batch), **part).loss.backward()

    Ranks, quantiles, min-max and medians, quotas of scope "batch" and the loss's divisor are those of the whole step;
    with a rule of scope "global", of the step of all ranks. The losses of the parts add up to that of the big batch.

    The price is a second forward of the models, the first without a graph, and a second measuring sweep of the kept
    rows; where neither rule nor temperature reads the teacher, of the student alone. With dropout both forwards differ.

    Args:
        select: The rule.
        temperature: A positive float, or a callable `stats -> (N,)` of the statistics of the step, such as adakd's.
        temperature_sq: As distill's.
        normalizer: "kept", "all" or a positive number, as distill's.
        full_stats: Measure both lse, entropies and KLs and hellinger_sq of every row, whatever the rule reads.

    Attributes:
        stats: After parts(): the statistics of all micro-batches, one after the other's.
        kept: After parts(): the rows chosen among these.

    Raises:
        ValueError: Naming the argument.
    """

    stats: TokenStats
    kept: Kept

    def __init__(
        self,
        select: Rule,
        *,
        temperature: float | Callable[[TokenStats], Tensor] = 1.0,
        temperature_sq: bool = False,
        normalizer: str | float = "kept",
        full_stats: bool = False,
    ) -> None:
        expect(isinstance(select, Rule), "select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
        if not callable(temperature):
            finite_number("temperature", temperature, positive=True)
        flag("temperature_sq", temperature_sq)
        flag("full_stats", full_stats)
        number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and 0 < normalizer < math.inf
        expect(number or normalizer in ("kept", "all"), "normalizer", "'kept', 'all' or a number above 0", normalizer)
        self.select, self.temperature, self.temperature_sq = select, temperature, temperature_sq
        self.normalizer = normalizer
        self._want: frozenset[str | Blend] = select.needs
        if full_stats or callable(temperature):
            self._want = self._want | STUDENT_FIELDS | TEACHER_FIELDS
        self._batches: list[_MicroBatch] = []
        self._divisor = math.nan  # of the losses, once rows are chosen

    @property
    def reads_teacher(self) -> bool:
        """Whether `measure` needs the teacher."""
        return bool(self._want - STUDENT_FIELDS - {"margin_s", "logp_s"})

    @torch.no_grad()
    def measure(
        self,
        student: Tensor | Head,
        teacher: Tensor | Head | TopK | None = None,
        *,
        row_mask: Tensor | None = None,
        rollout_ids: Tensor | None = None,
        labels: Tensor | None = None,
        row_weights: Tensor | None = None,
        workspace_mib: float = 256,
    ) -> None:
        """Takes in the statistics of the next micro-batch; its logits, hidden states and heads are not kept.

        Args:
            student: Logits (N, V) or (B, T, V), or a Head.
            teacher: Likewise, or a TopK; may be None where `reads_teacher` is False.
            row_mask: bool (N,) or (B, T), True for trainable tokens; with a mask on the CPU others are not measured.
            rollout_ids: int64 (N,) or (B, T), in every micro-batch or in none. Equal ids are one rollout, in whichever
                micro-batches (and, with scope "global", on whichever ranks) its rows lie. Without them a (B, T)
                micro-batch holds B rollouts of its own, and scope "global" has one quota for all.
            labels: int64 (N,) or (B, T), -100 for none: for rules that read logp.
            row_weights: float (N,) or (B, T), as distill's.
            workspace_mib: MiB that the sweep may use.

        Raises:
            ValueError: Naming the argument.
        """
        expect(math.isnan(self._divisor), "measure", "every micro-batch before parts()", "one after it")
        expect(teacher is not None or not self.reads_teacher, "teacher", "a source, as the choice reads it", teacher)
        request = Request.checked(
            student, teacher if self.reads_teacher else None, labels=labels, row_mask=row_mask,
            temperature=1.0 if callable(self.temperature) else self.temperature, workspace_mib=workspace_mib,
            top_k=getattr(self.select, "top_k", 0), alone=True,
        )  # fmt: skip
        reads_labels = self._want & LABEL_FIELDS
        expect(labels is not None or not reads_labels, "labels", "labels of the rows, as the rule reads them", labels)
        pair, shape = request.pair, request.pair.student.batch_shape
        weights = None if row_weights is None else flat_rows("row_weights", row_weights, shape, FLOATS, pair.device)
        named = rollout_ids is not None
        first = self._batches[0] if self._batches else None
        expect(first is None or first.named == named, "rollout_ids", "some in every micro-batch, or in none", named)
        expect(
            first is None or (first.row_weights is None) == (weights is None),
            "row_weights",
            "some in every micro-batch, or in none",
            row_weights,
        )
        if rollout_ids is not None:
            rollouts = flat_rows("rollout_ids", rollout_ids, shape, (torch.int64,), pair.device)
        else:
            rollouts = torch.arange(pair.n_rows, device=pair.device) // max(math.prod(shape[1:]), 1)
            rollouts = rollouts if len(shape) > 1 else torch.zeros_like(rollouts)
        mask, rows = request.row_mask, None
        if mask is None:
            mask = torch.ones(pair.n_rows, dtype=torch.bool, device=pair.device)
        elif mask.device.type == "cpu":
            rows = mask.nonzero().squeeze(1).to(pair.device)
        fields = self._measured(request, pair, rows)
        self._batches.append(_MicroBatch(fields, pair.vocab, mask.to(pair.device), row_mask, rollouts, named, weights))

    def _measured(self, request: Request, pair: Pair, rows: Tensor | None) -> Fields:
        if not self._want:
            return {}
        found = measure(
            pair, self._want, rows=rows, labels=request.labels, temperature=request.temperature, top_k=request.top_k,
            workspace=request.workspace,
        )  # fmt: skip
        return found if rows is None else {name: scattered(value, rows, pair.n_rows) for name, value in found.items()}

    @torch.no_grad()
    def parts(self) -> list[StepPart]:
        """Chooses, and returns for each micro-batch, in the order measured, its arguments of `distill`.

        Ranks of a rule of scope "global" call it together, each with as many micro-batches as it has. Synchronises.

        Raises:
            ValueError: Where nothing was measured.
        """
        batches = self._batches
        expect(bool(batches), "parts", "a micro-batch that was measured before", batches)
        sizes = [batch.row_mask.numel() for batch in batches]
        mask = torch.cat([batch.row_mask for batch in batches])
        rollouts = self._rollouts(sizes)
        fields = {name: torch.cat([batch.fields[name] for batch in batches]) for name in batches[0].fields}
        fixed = 1.0 if callable(self.temperature) else self.temperature
        self.stats = TokenStats(
            _measured=fields, _temperature=fixed, _vocab=batches[0].vocab, _batch_shape=(mask.numel(),),
            _top_k=getattr(self.select, "top_k", 0) if fields else 0, _partial=True,
        )  # fmt: skip
        self.kept = self.select(self.stats, mask, rollouts)
        temperature = self._temperature(mask, rollouts)
        weights = self._weights(mask)
        self._divisor = self._total(weights, mask)
        counts = torch.stack([part.sum() for part in self.kept.mask.split(sizes)]).tolist()
        columns = (self.kept.mask, self.kept.scores, self.kept._weights, temperature)
        each = zip(*(split(column, sizes) for column in columns), strict=True)
        return [
            {
                "select": ChosenRows(Kept(chosen, scores, own), count),
                "row_mask": batch.given_mask,
                "row_weights": batch.row_weights,
                "temperature": fixed if tau is None else tau,
                "temperature_sq": self.temperature_sq,
                "normalizer": self._divisor,
            }
            for batch, count, (chosen, scores, own, tau) in zip(batches, counts, each, strict=True)
        ]

    def correction(self, outs: Iterable[Distilled]) -> float:
        """What gradients and loss of the step are to be multiplied by before the optimizer's step.

        1.0, unless a kept row had no finite loss: in one big batch its weight would not be in the divisor. Ranks of a
        rule of scope "global" call it together. Synchronises.

        Args:
            outs: What `distill` returned for every part.
        """
        if self.normalizer != "kept":
            return 1.0
        used = torch.stack([out.plan.weight for out in outs]).sum()
        if spans_ranks(self.select):
            used = collectives.total(used, self.select.group)
        return self._divisor / used.item() if used.item() > 0 else 1.0

    def _rollouts(self, sizes: list[int]) -> Tensor | None:
        """(N,) int64; without ids, those of a micro-batch follow those of the one before, and "global" has none."""
        batches = self._batches
        if batches[0].named:
            return torch.cat([batch.rollouts for batch in batches])
        if spans_ranks(self.select):
            return None
        starts = [sum(sizes[:place]) for place in range(len(sizes))]  # no rollout is without a row
        return torch.cat([batch.rollouts + start for batch, start in zip(batches, starts, strict=True)])

    def _temperature(self, mask: Tensor, rollouts: Tensor | None) -> Tensor | None:
        """(N,), where it is not the same for all."""
        if not callable(self.temperature):
            return None
        measure_of = self.temperature
        if isinstance(measure_of, DifficultyTemperature):
            measure_of = measure_of.over(mask, rollouts)
        return flat_rows("temperature", measure_of(self.stats), (mask.numel(),), FLOATS, mask.device).float()

    def _weights(self, mask: Tensor) -> Tensor:
        """(N,) what each row weighs, if it is kept."""
        weights = torch.ones(mask.numel(), device=mask.device)
        own = [batch.row_weights for batch in self._batches if batch.row_weights is not None]
        for factor in (self.kept._weights, torch.cat(own) if own else None):
            weights = weights if factor is None else weights * factor
        return weights

    def _total(self, weights: Tensor, mask: Tensor) -> float:
        """What the step's losses are divided by."""
        if not isinstance(self.normalizer, str):
            return float(self.normalizer)
        if self.normalizer == "kept":
            total = torch.where(self.kept.mask, weights, 0.0).sum()
        else:
            valid = mask
            for name in ("logsum_s", "logsum_t"):
                value = self.stats._get(name)
                valid = valid if value is None else valid & ~value.isnan()
            total = valid.sum().float()
        if spans_ranks(self.select):
            total = collectives.total(total, self.select.group)
        return total.item() or 1.0


def split(column: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """The column of each micro-batch."""
    return [None] * len(sizes) if column is None else list(column.split(sizes))


def scattered(value: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """(N, ...) with value at rows; NaN elsewhere, or False or -1 where the dtype has no NaN."""
    empty = torch.nan if value.is_floating_point() else (False if value.dtype == torch.bool else -1)
    out = torch.full((n_rows, *value.shape[1:]), empty, dtype=value.dtype, device=value.device)
    return out.index_copy_(0, rows, value)
