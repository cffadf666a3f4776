"""LEARN while a row's logits are in memory: nothing is projected twice, at the price of whole rows of logits.

    row block   R rows measured with both models' logits recorded, (R, V) fp32 each; then d(logits) over them
    stash       d(logits) of rows that a quota will probably keep, (C, V) fp32, C = SLACK times the quota

Rows known before they are measured are learned block by block: d(logits) goes into the two gradient products at once.
With a quota the rule ranks the rows seen so far after each block, and d(logits) of those above a looser quota is
stashed. When all are measured the rule decides exactly, the few kept rows that were not stashed are projected again,
and one pair of products takes the stash in. A rule that reads the student alone stashes its logits instead, and the
teacher is projected for kept rows only.

The gradient exists before the upstream scalar does: backward scales it and hands it over. A second backward through the
same graph falls back to the gradient sweep.

N rows, S kept rows, r rows of the block in memory, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from tip_kernels.learn.gradient_sweep import (
    Context,
    GradOptions,
    HeadGradients,
    Objective,
    RowsToLearn,
    differentiated,
    once,
    save,
    saved,
)
from tip_kernels.measure.sweep import measure
from tip_kernels.select.rule import KeepAll, Kept, QuotaRule, Rule
from tip_kernels.sources.pair import HeadRows, LogitRows, Pair, Rows, columns_of
from tip_kernels.stats import Blend, Fields, TokenStats

if TYPE_CHECKING:
    from tip_kernels.distillation.distill import Step

SLACK = 1.25  # rows stashed per row of the quota
ROWS = {"cpu": (96, 256)}  # the fewest rows of a block that keep the products efficient, and the most that help
OTHER_ROWS = (512, 2048)
FILTER_COLUMNS = 1024  # narrow enough that rare tokens fill whole tiles
RANKING = 8192  # multiply-adds in the time that a row takes to be ranked once more, after a block
TILES_MIB = 16  # of the workspace for tiles, at most


@dataclass(frozen=True)
class Layout:
    """How one sweep divides its workspace: a block of rows of logits, a stash, and tiles."""

    rows: int  # R
    slots: int  # C; 0: rows are learned as they come
    tiles: int  # bytes for tiles of logits
    reuse_grad_weight: bool = False  # the row blocks lie in d(weight) until it is written


def divided(
    workspace: int,
    n_rows: int,
    slots: int,
    vocab: int,
    widths: tuple[int, int],
    device: str,
    wide_sum: Callable[[int], bool],
    grad_weight_bytes: int = 0,
) -> Layout | None:
    """A workspace of so many bytes divided among row blocks, stash and tiles, or None where the blocks get too short.

    wide_sum           whether a sum of d(weight) over so many blocks takes an fp32 (V, H) beside the gradient
    grad_weight_bytes  bytes of d(weight), which is written last and holds the row blocks until then
    """
    fewest, most = ROWS.get(device, OTHER_ROWS)
    tiles = min(workspace // 4, TILES_MIB * 2**20)
    left = workspace - tiles - 4 * slots * (vocab + 3 * widths[0])  # hidden rows, weighted, gradient
    most, gathered = min(most, max(n_rows, 1)), 12 * sum(widths)
    rows = min(left // (8 * vocab + gathered), most)
    if wide_sum(1 if slots else math.ceil(n_rows / max(rows, 1))):
        left -= 4 * vocab * widths[0]
        rows = min(left // (8 * vocab + gathered), most)
    reused = min(left // gathered, grad_weight_bytes // (8 * vocab), most)
    if max(rows, reused) < min(fewest, max(n_rows, 1)):
        return None
    return Layout(max(rows, reused), slots, tiles, reused >= rows and reused > 0)


def layout_for(step: Step, n_rows: int, slots: int = 0) -> Layout | None:
    """The layout for learning from n_rows rows, or for measuring them with a stash of so many slots.

    None where one sweep cannot do it: no head to differentiate, a teacher without logits, too small a workspace.
    """
    pair, need, student = step.batch.pair, step.need, step.batch.pair.student
    if not isinstance(student, HeadRows) or pair.shard or len(pair.sources) < 2 or not any(need):
        return None
    dtype, into = student.weight.dtype, step.options.weight_into is not None
    reusable = 4 * student.weight.numel() if need[1] and dtype == torch.float32 and not into and slots else 0
    widths, workspace = (student.width, pair.sources[1].width), step.batch.workspace

    def wide_sum(blocks: int) -> bool:
        narrow = dtype != torch.float32 and (blocks > 1 or dtype == torch.float16)
        divided_later = into and not slots and isinstance(step.normalizer, str)
        return need[1] and (divided_later or narrow)

    return divided(workspace, n_rows, slots, pair.vocab, widths, pair.device.type, wide_sum, reusable)


def stash_slots(n_rows: int, capacity: int) -> int:
    """How many of n_rows rows to stash for a quota of at most `capacity` in all."""
    return min(n_rows, math.ceil(SLACK * capacity) + 1)


def parts_of(n_rows: int, rows: int) -> list[slice]:
    """The blocks of so many rows."""
    return [slice(r0, min(r0 + rows, n_rows)) for r0 in range(0, n_rows, rows)]


class Learned(NamedTuple):
    """What a strategy leaves: the losses of kept rows, with a graph or with gradients that exist already."""

    stats: TokenStats
    kept: Kept
    ids: Tensor  # (S,)
    real: Tensor  # (S,) bool: which of the slots hold a kept row
    losses: Tensor  # (S,)
    gradients: PrecomputedGradients | None = None  # of sum of weights * loss / divisor, where losses have no graph


P = ParamSpec("P")
R = TypeVar("R")
Blocks = TypeVar("Blocks", bound="RowBlocks")


def without_graph(method: Callable[Concatenate[Blocks, P], R]) -> Callable[Concatenate[Blocks, P], R]:
    """The method without a graph and in the dtypes it says, also under autocast."""

    @wraps(method)
    def call(self: Blocks, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.autocast(self.pair.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call


class RowBlocks:
    """The logits of a block of rows of both models, and what is learned from them while they are in memory."""

    def __init__(self, step: Step, objective: Objective, layout: Layout) -> None:
        self.step, self.objective, self.layout = step, objective, layout
        self.batch, self.pair, self.need = step.batch, step.batch.pair, step.need
        student, self.teacher = self.pair.sources
        assert isinstance(student, HeadRows)  # there is no layout for others
        self.student = student
        size, device = (layout.rows, self.pair.vocab), self.pair.device
        self.buffer: Tensor | None = None
        if layout.reuse_grad_weight:
            self.buffer = torch.empty(self.student.leaves[1].shape, device=device)
            self.z_s, self.z_t = self.buffer.view(-1)[: 2 * math.prod(size)].view(2, *size)
        else:
            self.z_s, self.z_t = torch.empty(size, device=device), torch.empty(size, device=device)
        partial = self.batch.trainable is not None or not step.measures_all
        self.stats = self.batch.record({}, objective.temperature, partial=partial)
        self.fields: Fields = self.stats._measured  # (N, ...) of everything measured so far, NaN where not
        self.losses = torch.full((self.batch.n_rows,), torch.nan, device=device)
        self.at_one: dict[str, Tensor] = {}  # (N,) normalizers and label log-probabilities at temperature 1

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
            measured = self.batch.measure(rows, want, temperature, True, [z_s, z_t], self.layout.tiles)
            self.batch.note(measured, rows, self.fields)
            every = torch.arange(rows.numel(), device=rows.device)
            dead = self.dlogits(rows, every, z_s, z_t, out=z_s, places=None, weights=w)
            self.add_to(gradients, part, z_s, w, dead)
        self.batch.count(ids, sum(self.need[:2]))
        return self.precomputed(ids, gradients, divisor)

    def gradients(self, ids: Tensor, passes: int, into: Tensor | None) -> HeadGradients:
        options, dtype = self.step.options, self.student.leaves[1].dtype
        # what is multiplied by a loss scale, or added to a wider buffer, is rounded afterwards
        wide = passes > 1 or dtype == torch.float16 or options.weight_into is not None
        return HeadGradients(
            self.student, ids, self.need, wide=wide, grad_filter=options.grad_filter, into=into, buffer=self.buffer
        )

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
            with gradients.columns(v0, v1, student.weight_tile(v0, v1)):
                gradients.add(part, hidden, dlogits[:, v0:v1], weights)

    def measure_late(self, rows: Tensor, z_s: Tensor, z_t: Tensor, want: frozenset[str | Blend]) -> None:
        """What the loss needs of rows whose student logits are in memory; projects the teacher into z_t."""
        self.project(self.teacher, rows, z_t)
        labels = None if self.objective.labels is None else self.objective.labels[rows]
        pair, tau = Pair(LogitRows(z_s), LogitRows(z_t)), self.objective.temperature_at(rows)
        here = measure(pair, want, labels=labels, temperature=tau, workspace=self.layout.tiles)
        self.batch.note_invalid(here, rows)
        self.batch.note(here, rows, self.fields)

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
        measured = {name: value[ids] for name, value in self.fields.items()}
        pair = Pair(LogitRows(z_s), LogitRows(z_t))
        pair.student.scale, pair.student.softcap = self.student.scale, self.student.softcap  # dlogits are the head's
        labels = None if objective.labels is None else objective.labels[rows]
        tau = objective.temperature_at(rows)
        here = replace(objective, temperature=tau, labels=labels, gates=objective.gates_at(rows))
        at_one = None
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

    def fits(self, step: Step) -> Layout | None:
        return layout_for(step, step.known[1].numel()) if step.sweeps != 2 and step.knows_rows else None

    def run(self, step: Step, layout: Layout) -> Learned:
        kept, ids, real = step.known
        blocks = RowBlocks(step, step.objective, layout)
        made = blocks.learn_rows(ids, step.weights(ids, real, kept)[0], step.want | step.late)
        return Learned(blocks.stats, kept, ids, real, blocks.losses[ids], made)


class SecondSweepByRows:
    """Measures all rows; projects the kept ones once more, to measure what is missing and learn from them at once."""

    name = "two sweeps, the second by rows"

    def fits(self, step: Step) -> Layout | None:
        if step.sweeps is not None or not any(step.need) or layout_for(step, 1) is None:
            return None
        saves = step.measured.fields is None or step.takes_third_sweep
        return layout_for(step, step.measured.ids.numel()) if saves else None

    def run(self, step: Step, layout: Layout) -> Learned:
        stats, kept, ids, real, objective, _ = step.measured
        blocks = RowBlocks(step, objective, layout)
        made = blocks.learn_rows(ids, step.weights(ids, real, kept)[0], step.late)
        if step.temperature_of is None:
            stats = step.batch.filled(stats, {name: value[ids] for name, value in blocks.fields.items()}, ids)
        return Learned(stats, kept, ids, real, blocks.losses[ids], made)


class StashedRows:
    """One sweep over all rows, with a stash for the choice of a quota rule."""

    name = "one sweep"

    def fits(self, step: Step) -> Layout | None:
        """The layout for measuring all rows with a stash for the rule's choice, or None where that is not to be had.

        A KeepAll comes here where its rows' weights follow from statistics.

        Ranking by block reads counts on the host, which is free on a CPU alone; a random rule would draw more than
        once, and ranks would have to choose together as often as the one with most rows.
        """
        batch, rule, pair = step.batch, step.select, step.batch.pair
        if step.sweeps == 2 or not step.learns_early:
            return None
        if pair.device.type != "cpu" or pair.backend != "eager":
            return None
        ranks_rows = isinstance(rule, QuotaRule) and rule.needs and rule.scope != "global"
        if not isinstance(rule, KeepAll) and (not ranks_rows or hasattr(rule, "generator")):
            return None
        n_rows = batch.n_rows if batch.trainable is None else batch.trainable.numel()
        capacity = rule.capacity(batch.n_rows, batch.n_rollouts)
        layout = layout_for(step, n_rows, stash_slots(n_rows, capacity))
        if layout is None or step.sweeps == 1:
            return layout
        ranked, saved = math.ceil(n_rows / layout.rows) * batch.n_rows, capacity * pair.vocab * pair.width
        return layout if ranked * RANKING <= saved else None

    def run(self, step: Step, layout: Layout) -> Learned:
        blocks = StashingBlocks(step, step.objective, layout)
        kept = blocks.stash_likely_rows()
        made = blocks.finish_from_stash(kept)
        ids = kept.row_ids
        real = torch.ones_like(ids, dtype=torch.bool)
        return Learned(blocks.stats, kept, ids, real, blocks.losses[ids], made)


class StashingBlocks(RowBlocks):
    """Row blocks whose likely rows are kept in a stash: d(logits), or the student's logits without a teacher."""

    @without_graph
    def stash_likely_rows(self) -> Kept:
        """Measures every row and stashes those that a looser quota keeps among the rows seen so far."""
        step, batch, temperature = self.step, self.batch, self.objective.temperature
        with_teacher, likely_rule = step.with_teacher, loosened(step.select)
        want = step.want | (step.late - step.objective.divergence.needs)
        self.stash = Stash(self.layout.slots, self.pair.vocab, batch.n_rows)
        candidates = torch.arange(batch.n_rows) if batch.trainable is None else batch.trainable
        for part in parts_of(candidates.numel(), self.layout.rows) or [slice(0, 0)]:
            rows = candidates[part]
            z_s, z_t = self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            record = [z_s, z_t] if with_teacher else [z_s]
            measured = batch.measure(rows, want, temperature, with_teacher, record, self.layout.tiles)
            batch.note(measured, rows, self.fields)
            likely = likely_rule(self.stats, batch.given_mask, batch.rollout_ids).mask
            self.stash.release(likely)
            local = likely[rows].nonzero().squeeze(1)
            slots = self.stash.take(rows[local])
            local = local[: slots.numel()]
            if with_teacher:
                self.dlogits(rows, local, z_s, z_t, out=self.stash.rows, places=slots)
            else:
                self.stash.rows.index_copy_(0, slots, z_s[local])
        return step.select(self.stats, batch.given_mask, batch.rollout_ids)

    @without_graph
    def finish_from_stash(self, kept: Kept) -> PrecomputedGradients:
        """Completes the stash with the kept rows that it missed, and takes it into the gradients."""
        stash, ids, step = self.stash, kept.row_ids, self.step
        stash.release(kept.mask)
        missed = stash.compact(ids)
        for part in parts_of(missed.numel(), self.layout.rows):
            rows = missed[part]
            slots, z_s, z_t = stash.take(rows), self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            self.project(self.student, rows, z_s)
            if step.with_teacher:
                self.project(self.teacher, rows, z_t)
                self.dlogits(rows, torch.arange(rows.numel()), z_s, z_t, out=stash.rows, places=slots)
            else:
                stash.rows.index_copy_(0, slots, z_s)
        held = stash.owner[: ids.numel()]
        if not step.with_teacher:
            self._learn_from_logits(held)
        step.weigh(self.stats)
        weights, _ = step.weights(ids, torch.ones_like(ids, dtype=torch.bool), kept)
        weights = weights * self.losses[ids].isfinite()
        total = self.batch.normalizer(step.normalizer, weights)
        share = torch.zeros(self.batch.n_rows).index_copy_(0, ids, weights / total * step.grad_scale)[held]
        gradients = self.gradients(held, 1, step.options.weight_into)
        dlogits = stash.rows[: ids.numel()].mul_(share.unsqueeze(1))
        self.add_to(gradients, slice(0, ids.numel()), dlogits, share, (share == 0).unsqueeze(1))
        self.batch.count(ids, sum(self.need[:2]))
        return self.precomputed(ids, gradients, total)

    def _learn_from_logits(self, held: Tensor) -> None:
        """Puts d(logits) in the place of the student's logits that the stash holds of the rows held (S,)."""
        for part in parts_of(held.numel(), self.layout.rows):
            rows, z_s = held[part], self.stash.rows[part]
            z_t = self.z_t[: rows.numel()]
            self.measure_late(rows, z_s, z_t, self.step.late)
            self.dlogits(rows, torch.arange(rows.numel()), z_s, z_t, out=z_s, places=None)


def loosened(rule: Rule) -> Rule:
    """The same rule with a quota, where it has one, SLACK times as large."""
    if not isinstance(rule, QuotaRule):
        return rule
    return replace(
        rule, keep=math.ceil(SLACK * rule.keep) if isinstance(rule.keep, int) else min(1.0, SLACK * rule.keep)
    )


class Stash:
    """C rows of V numbers, and which row of the batch each holds. Lives on a CPU, where asking for a count is free."""

    def __init__(self, slots: int, vocab: int, n_rows: int) -> None:
        self.rows = torch.empty(slots, vocab)
        self.owner = torch.full((slots,), -1)  # the row that a slot holds
        self.slot = torch.full((n_rows,), -1)  # the slot of a row

    def release(self, others: Tensor) -> None:
        """Frees the slots of all rows but those of the mask others (N,)."""
        gone = (self.owner >= 0) & ~others[self.owner]
        self.slot[self.owner[gone]] = -1
        self.owner[gone] = -1

    def take(self, ids: Tensor) -> Tensor:
        """Free slots for as many of the rows ids as there is room for, (<= r,)."""
        free = (self.owner < 0).nonzero().squeeze(1)[: ids.numel()]
        ids = ids[: free.numel()]
        self.owner[free], self.slot[ids] = ids, free
        return free

    def compact(self, ids: Tensor) -> Tensor:
        """Moves the rows ids, so far as they are held, into the first slots; returns those that are not held."""
        held = self.slot[ids] >= 0
        outside = ids[held & (self.slot[ids] >= ids.numel())]
        sources = self.slot[outside]
        self.owner[sources] = -1
        targets = self.take(outside)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.rows[target] = self.rows[source]
        return ids[~held]


@dataclass
class PrecomputedGradients:
    """Gradients of sum of weights * row loss / divisor, and how to make them again for a second backward."""

    gradients: HeadGradients | None  # until they are handed over
    divisor: Tensor | float
    objective: Objective
    rows: RowsToLearn
    options: GradOptions

    def attach(self, loss: Tensor, weights: Tensor, total: Tensor | float, pair: Pair) -> Tensor:
        """The loss () with its gradients attached: sum of weights * row loss / total, of weights (S,)."""
        total = total.detach() if isinstance(total, Tensor) else total
        self.weights, self.scale = weights.detach() / total, self.divisor / total
        return _AttachPrecomputed.apply(loss, self, pair, *pair.student.leaves)

    def times(self, upstream: Tensor, pair: Pair, need: tuple[bool, ...]) -> list[Tensor | None]:
        """The gradients of the student's leaves times upstream ()."""
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            _, sweep = differentiated(pair, self.objective, self.rows, self.options)
            return sweep.run(pair, self.weights * upstream, need)
        factor = upstream * self.scale
        factor = None if factor.device.type == "cpu" and factor == 1 else factor
        sums = gradients.finished(factor, self.options.weight_into)
        return [x if wanted else None for x, wanted in zip(sums, need, strict=True)]


class _Context(Context):
    made: PrecomputedGradients


class _AttachPrecomputed(torch.autograd.Function):
    """Gives a loss the gradients that exist already, times the upstream scalar, beside those of its rows' weights."""

    @staticmethod
    def forward(ctx: _Context, loss: Tensor, made: PrecomputedGradients, pair: Pair, *leaves: Tensor) -> Tensor:
        save(ctx, pair)
        ctx.made = made
        return loss.clone()

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        pair = saved(ctx)
        with torch.no_grad(), torch.autocast(upstream[0].device.type, enabled=False):
            grads = ctx.made.times(upstream[0].detach(), pair, ctx.needs_input_grad[3:])
        return *upstream, None, None, *once(grads, pair.student.leaves)
