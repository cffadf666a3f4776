"""The four ways to distill a batch, in the order in which they are tried.

    known rows           the rule reads nothing: rows are measured and learned from block by block        one sweep
    stashed rows         a quota: likely rows are learned from before the rule has seen all (stash.py)    one sweep
    second sweep by rows the kept rows are projected once more, measured and learned from at a time       two sweeps
    second sweep         the gradient sweep over kept rows, in backward                                   two sweeps

N rows, S kept rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tip_kernels._checks import row_temperature
from tip_kernels.distillation.batch import Batch
from tip_kernels.distillation.precomputed import PrecomputedGradients
from tip_kernels.learn.divergence_loss import measured_at, row_loss
from tip_kernels.learn.objective import GradOptions, Objective, RowsToLearn
from tip_kernels.select.rule import KeepAll, Kept, Rule
from tip_kernels.sources.head import HeadRows
from tip_kernels.stats import Blend, Fields, TokenStats
from tip_kernels.workspace import Layout, divided

T = TypeVar("T")


class Learned(NamedTuple):
    """What a strategy leaves: the losses of kept rows, with a graph or with gradients that exist already."""

    stats: TokenStats
    kept: Kept
    ids: Tensor  # (S,)
    real: Tensor  # (S,) bool: which of the slots hold a kept row
    losses: Tensor  # (S,)
    gradients: PrecomputedGradients | None = None  # of sum of weights * loss / divisor, where losses have no graph


def _once(make: Callable[[Step], T]) -> property:
    """A property that is made once: functools.cached_property holds a lock, which torch.compile cannot trace."""
    name = f"_{make.__name__}"

    def get(self: Step) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = make(self)
        return self.__dict__[name]

    return property(get, doc=make.__doc__)


@dataclass
class Step:
    """One distill call, checked."""

    batch: Batch
    select: Rule
    objective: Objective
    options: GradOptions
    row_weights: Tensor | None  # (N,)
    normalizer: str | float
    temperature_of: Callable[[TokenStats], Tensor] | None  # of the learned rows, where that follows from statistics
    sweeps: int | None
    full_stats: bool
    grad_scale: float | Tensor
    need: tuple[bool, ...] = field(init=False)  # which of the student's leaves want a gradient

    def __post_init__(self) -> None:
        leaves = self.batch.pair.student.leaves
        self.need = tuple([leaf.requires_grad for leaf in leaves]) if torch.is_grad_enabled() else ()
        everything = self.full_stats or self.temperature_of is not None
        # what all rows are measured for, and whether that takes the teacher
        self.want, self.with_teacher = self.batch.wanted(self.select, self.objective.divergence, everything)

    @property
    def late(self) -> frozenset[str | Blend]:
        """The fields that the loss needs of kept rows."""
        label = frozenset({"logp_s"}) if self.objective.ce_weight else frozenset()
        return self.objective.divergence.needs | label

    @property
    def knows_rows(self) -> bool:
        """Whether the rule can choose before anything is measured."""
        return not self.select.needs and self.temperature_of is None and not (self.full_stats and not self.keeps_all)

    @property
    def keeps_all(self) -> bool:
        return isinstance(self.select, KeepAll)

    def choose(self, stats: TokenStats) -> Kept:
        return self.select(stats, row_mask=self.batch.row_mask, rollout_ids=self.batch.rollout_ids)

    def weights(self, ids: Tensor, real: Tensor, kept: Kept) -> Tensor:
        """(S,) weights of the rows ids, 0 where not real."""
        w = real.float()
        for factor in (self.row_weights, kept._weights):
            w = w if factor is None else w * factor[ids]
        return w

    def layout(self, n_rows: int, slots: int = 0) -> Layout | None:
        """The layout for learning from n_rows rows, or for measuring them with a stash of so many slots.

        None where one sweep cannot do it: no head to differentiate, a teacher without logits, too small a workspace.
        """
        pair, need, student = self.batch.pair, self.need, self.batch.pair.student
        if not isinstance(student, HeadRows) or pair.shard or len(pair.sources) < 2 or not any(need):
            return None
        wide, own_weight = student.weight.dtype == torch.float32, self.options.weight_into is None
        reusable = 4 * student.weight.numel() if need[1] and wide and own_weight and slots else 0
        widths = student.width, pair.sources[1].width
        return divided(
            self.batch.workspace, n_rows, slots, pair.vocab, widths, pair.device.type, need[1] and not wide, reusable
        )

    @_once
    def known(self) -> tuple[Kept, Tensor, Tensor]:
        """The choice of a rule that knows its rows, with the slots of its rows and which of them are real."""
        unmeasured = self.batch.record({}, self.objective.temperature, partial=True)
        kept = self.choose(unmeasured)
        return kept, *self.batch.slots(kept, self.select)

    @_once
    def measured(self) -> Measured:
        """All rows measured, and the rule's choice among them."""
        batch, objective = self.batch, self.objective
        stats = batch.measure_for(self.want, objective.temperature, self.with_teacher)
        if self.knows_rows:
            kept, ids, real = self.known
        else:
            kept = self.choose(stats)
            ids, real = batch.slots(kept, self.select)
        if self.temperature_of is not None:
            shape, device = batch.pair.student.batch_shape, batch.pair.device
            objective = objective.at(row_temperature(self.temperature_of(stats), shape, device, ids))
        return Measured(stats, kept, ids, real, objective, measured_at(stats, batch.pair, objective, ids))


class Measured(NamedTuple):
    """All rows measured, the rule's choice among them, and what is learned of it."""

    stats: TokenStats
    kept: Kept
    ids: Tensor
    real: Tensor
    objective: Objective  # at the temperature of the loss
    fields: Fields | None  # what the loss needs of the kept rows, if the statistics hold it


class Strategy(Protocol):
    """A way to distill a batch."""

    name: str

    def fits(self, step: Step) -> bool:
        """Whether it can and should do the step. It may measure, once for all strategies that come after."""
        ...

    def run(self, step: Step) -> Learned: ...


class SecondSweep:
    """Measures all rows; the gradient sweep over kept rows runs in backward."""

    name = "two sweeps"

    def fits(self, step: Step) -> bool:
        return True

    def run(self, step: Step) -> Learned:
        batch, pair = step.batch, step.batch.pair
        stats, kept, ids, real, objective, fields = step.measured
        projections = len(pair.sources)
        if fields is None:
            want = step.late | objective.needs(pair.topk is not None)
            fields = batch.measure(ids, want, objective.temperature, with_teacher=True)
            stats = stats if step.temperature_of is not None else batch.filled(stats, fields, ids)
        if takes_third_sweep(step):
            batch.count(ids, projections)
        at_one = batch.measured_at_one(ids, fields, stats, objective.temperature) if objective.ce_weight else None
        losses = row_loss(pair, objective, RowsToLearn(ids, fields, at_one), step.options)
        if losses.requires_grad:
            batch.count(ids, projections + sum(step.need[:2] if pair.student.width else ()))
        return Learned(stats, kept, ids, real, losses)


def takes_third_sweep(step: Step) -> bool:
    """Whether two sweeps need row sums of the kept rows in between."""
    two_pass = any(term.class_b for _, term in step.objective.divergence.terms)
    return two_pass and len(step.batch.pair.sources) == 2
