"""LEARN while a row's logits are in memory: nothing is projected twice, at the price of whole rows of logits.

    row block   R rows measured with both models' logits recorded, (R, V) fp32 each; then d(logits) over them

Rows known before they are measured are learned block by block: d(logits) goes into the two gradient products at once.
The gradient exists before the upstream scalar does: backward scales it and hands it over. A second backward through the
same graph falls back to the gradient sweep.

N rows, S kept rows, r rows of the block in memory, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from tip_kernels.distillation.precomputed import PrecomputedGradients
from tip_kernels.distillation.strategy import Learned, Step, takes_third_sweep
from tip_kernels.learn.dense_loss import differentiated
from tip_kernels.learn.head_gradients import HeadGradients
from tip_kernels.learn.objective import GradOptions, Objective, RowsToLearn
from tip_kernels.measure.ops import measure
from tip_kernels.sources.logits import LogitRows, Rows
from tip_kernels.sources.pair import Pair
from tip_kernels.stats import Blend, Fields, TokenStats
from tip_kernels.workspace import Layout, columns_of, parts_of

FILTER_COLUMNS = 1024  # narrow enough that rare tokens fill whole tiles

Method = TypeVar("Method", bound=Callable[..., Any])


def without_graph(method: Method) -> Method:
    """The method without a graph and in the dtypes it says, also under autocast."""

    @wraps(method)
    def call(self: RowBlocks, *args: object) -> object:
        with torch.no_grad(), torch.autocast(self.pair.device.type, enabled=False):
            return method(self, *args)

    return call  # type: ignore[return-value]


class RowBlocks:
    """The logits of a block of rows of both models, and what is learned from them while they are in memory."""

    def __init__(self, step: Step, objective: Objective, layout: Layout) -> None:
        self.step, self.objective, self.layout = step, objective, layout
        self.batch, self.pair, self.need = step.batch, step.batch.pair, step.need
        self.student, self.teacher = self.pair.sources
        size, device = (layout.rows, self.pair.vocab), self.pair.device
        self.buffer: Tensor | None = None
        if layout.reuse_grad_weight:
            self.buffer = torch.empty(self.student.leaves[1].shape, device=device)
            self.z_s, self.z_t = self.buffer.view(-1)[: 2 * math.prod(size)].view(2, *size)
        else:
            self.z_s, self.z_t = torch.empty(size, device=device), torch.empty(size, device=device)
        self.fields: Fields = {}  # (N, ...) of everything measured, NaN where not
        self.losses = torch.full((self.batch.n_rows,), torch.nan, device=device)
        self.at_one: Fields = {}  # (N,) normalizers and label log-probabilities at temperature 1

    @without_graph
    def learn_rows(self, ids: Tensor, weights: Tensor, want: frozenset[str | Blend]) -> PrecomputedGradients:
        """Measures what is wanted of rows ids (S,) of given weights, and learns from them, block by block."""
        divisor = self.batch.normalizer(self.step.normalizer, weights)
        parts, temperature = parts_of(ids.numel(), self.layout.rows) or [slice(0, 0)], self.objective.temperature
        exact = not isinstance(divisor, Tensor)  # else a row without a finite loss changes it
        gradients = self.gradients(ids, len(parts), self.step.options.weight_into if exact else None)
        for part in parts:
            rows, w = ids[part], weights[part] / divisor * self.step.grad_scale
            z_s, z_t = self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            self.note(self.batch.measure(rows, want, temperature, True, [z_s, z_t], self.layout.tiles), rows)
            every = torch.arange(rows.numel(), device=rows.device)
            dead = self.dlogits(rows, every, z_s, z_t, out=z_s, places=None, weights=w)
            self.add_to(gradients, part, z_s, w, dead)
        self.batch.count(ids, sum(self.need[:2]))
        return self.precomputed(ids, gradients, divisor)

    def gradients(self, ids: Tensor, passes: int, into: Tensor | None) -> HeadGradients:
        options, dtype = self.step.options, self.student.leaves[1].dtype
        # what is multiplied by a loss scale, or added to a wider buffer, is rounded afterwards
        wide = passes > 1 or dtype == torch.float16 or options.weight_into is not None
        buffers = {"into": into, "buffer": self.buffer}
        return HeadGradients(self.student, ids, self.need, wide=wide, grad_filter=options.grad_filter, **buffers)

    def add_to(
        self, gradients: HeadGradients, part: slice, dlogits: Tensor, weights: Tensor, dead: Tensor | None
    ) -> None:
        """Adds the gradients of rows part of gradients, whose dlogits (r, V) hold the weights (r,)."""
        student, hidden = self.student, self.student.block(gradients.ids[part]).hidden
        if dead is not None:
            hidden = hidden.masked_fill(dead, 0.0)  # 0 * NaN: a NaN stays in its row
        columns = max(1, min(student.vocab, self.layout.tiles // (12 * student.width + 4 * hidden.shape[0])))
        if gradients.filter is not None:
            columns = min(columns, FILTER_COLUMNS)
        for v0, v1 in columns_of(student.vocab, columns):
            with gradients.columns(v0, v1):
                gradients.add(part, hidden, dlogits[:, v0:v1], weights)

    def stats(self, partial: bool = True) -> TokenStats:
        """The record of all that was measured so far; partial: of some rows only."""
        partial = partial or self.batch.trainable is not None
        return self.batch.record(self.fields, self.objective.temperature, partial=partial)

    def note(self, measured: Fields, rows: Tensor) -> None:
        """Keeps what was measured of the rows."""
        for name, value in measured.items():
            if name in self.fields:
                self.fields[name].index_copy_(0, rows, value)
            else:
                self.fields[name] = self.batch.scattered(value, rows)

    def measure_late(self, rows: Tensor, z_s: Tensor, z_t: Tensor, want: frozenset[str | Blend]) -> None:
        """What the loss needs of rows whose student logits are in memory; projects the teacher into z_t."""
        self.project(self.teacher, rows, z_t)
        labels = None if self.objective.labels is None else self.objective.labels[rows]
        pair, tau = Pair(LogitRows(z_s), LogitRows(z_t)), self.objective.temperature_at(rows)
        here = measure(pair, want, labels=labels, temperature=tau, workspace=self.layout.tiles)
        self.batch.note_invalid(here, rows)
        self.note(here, rows)

    def project(self, source: Rows, rows: Tensor, out: Tensor) -> None:
        """Logits (r, V) of the given rows of a source, at temperature 1."""
        block = source.block(rows)
        columns = max(1, min(source.vocab, self.layout.tiles // (4 * block.n_rows + 4 * source.width)))
        buffer = torch.empty(block.n_rows * columns, device=out.device)
        for v0, v1 in columns_of(source.vocab, columns):
            out[:, v0:v1] = block.tile(v0, v1, buffer[: block.n_rows * (v1 - v0)].view(block.n_rows, v1 - v0))
        self.batch.count(rows, 1)

    def dlogits(
        self,
        rows: Tensor,
        local: Tensor,
        z_s: Tensor,
        z_t: Tensor,
        *,
        out: Tensor,
        places: Tensor | None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """Writes weights * d(loss)/d(logits of the head) of the measured rows rows[local] into out; notes their losses.

        z_s, z_t (., V) hold the logits of rows. Row i goes to out[places[i]], or out[i], which may be z_s itself. A row
        whose loss is not finite writes zeros; returns where, (r, 1) bool, or None where nowhere.
        """
        objective, ids, tiles = self.objective, rows[local], self.layout.tiles
        pair = Pair(LogitRows(z_s), LogitRows(z_t))
        pair.student.scale, pair.student.softcap = self.student.scale, self.student.softcap  # dlogits are the head's
        labels = None if objective.labels is None else objective.labels[rows]
        tau = objective.temperature_at(rows)
        here = Objective(objective.divergence, tau, labels, objective.ce_weight, objective.temperature_sq)
        measured, at_one = {name: value[ids] for name, value in self.fields.items()}, None
        if objective.ce_weight:
            at_one = measured
            if isinstance(tau, Tensor) or tau != 1.0:
                student, want = Pair(pair.student), frozenset({"logp_s"})
                at_one = measure(student, want, rows=local, labels=labels, workspace=tiles)
            at_one = {name: at_one[name] for name in ("shift_s", "logsum_s", "logp_s")}
            for name, value in at_one.items():
                self.at_one.setdefault(name, torch.full_like(self.losses, torch.nan)).index_copy_(0, ids, value)
        loss, sweep = differentiated(pair, here, RowsToLearn(local, measured, at_one), GradOptions(tiles))
        self.losses.index_copy_(0, ids, loss)
        dead = (~sweep.finite).unsqueeze(1)
        dead = None if dead.device.type == "cpu" and not dead.any() else dead
        sweep.write(pair, torch.ones_like(loss) if weights is None else weights, dead, out, places)
        return dead

    def precomputed(self, ids: Tensor, gradients: HeadGradients, divisor: Tensor | float) -> PrecomputedGradients:
        """The gradients, and how to make them again from the sources."""
        measured = {name: value[ids] for name, value in self.fields.items()}
        at_one = {name: value[ids] for name, value in self.at_one.items()} if self.at_one else None
        rows = RowsToLearn(ids, measured, at_one)
        return PrecomputedGradients(gradients, divisor, self.objective, rows, self.step.options)


class KnownRows:
    """One sweep over rows that the rule knows before anything is measured."""

    name = "one sweep"

    def fits(self, step: Step) -> bool:
        return step.sweeps != 2 and step.knows_rows and step.layout(step.known[1].numel()) is not None

    def run(self, step: Step) -> Learned:
        kept, ids, real = step.known
        blocks = RowBlocks(step, step.objective, step.layout(ids.numel()))
        made = blocks.learn_rows(ids, step.weights(ids, real, kept), step.want | step.late)
        return Learned(blocks.stats(partial=not step.keeps_all), kept, ids, real, blocks.losses[ids], made)


class SecondSweepByRows:
    """Measures all rows; projects the kept ones once more, to measure what is missing and learn from them at once."""

    name = "two sweeps, the second by rows"

    def fits(self, step: Step) -> bool:
        if step.sweeps is not None or not any(step.need) or step.layout(1) is None:
            return False
        saves = step.measured.fields is None or takes_third_sweep(step)
        return saves and step.layout(step.measured.ids.numel()) is not None

    def run(self, step: Step) -> Learned:
        stats, kept, ids, real, objective, _ = step.measured
        blocks = RowBlocks(step, objective, step.layout(ids.numel()))
        made = blocks.learn_rows(ids, step.weights(ids, real, kept), step.late)
        if step.temperature_of is None:
            stats = step.batch.filled(stats, {name: value[ids] for name, value in blocks.fields.items()}, ids)
        return Learned(stats, kept, ids, real, blocks.losses[ids], made)
