"""LEARN while a row's logits are at hand: nothing is projected twice, at the price of whole rows of logits in memory.

    row block   R rows measured with both models' logits recorded, (R, V) fp32 each; then d(logits) over them
    stash       d(logits) of rows that a quota will probably keep, (C, V) fp32, C = SLACK times the quota

Rows known before they are measured are learned block by block: d(logits) goes into the two gradient products at once.
A quota over many blocks is speculated on: after each block the rule ranks the rows seen so far and d(logits) of those
above a looser quota is stashed. When all are measured the rule decides exactly, the few kept rows that were not stashed
are projected again, and one pair of products takes the stash in. A rule that reads the student alone stashes its logits
instead, and the teacher is projected for kept rows only. The gradient exists before the upstream scalar does: backward
scales it and hands it over. A second backward through the same graph falls back to the sweep of sweeps.py.

N rows, S kept rows, r rows at hand, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels._checks import is_int
from tip_kernels.backends.choice import backend_for
from tip_kernels.backends.eager.online import Blend
from tip_kernels.distillation.batch import Batch, Fields
from tip_kernels.learn.divergence_loss import Once, RowTask, differentiated
from tip_kernels.learn.divergences import Divergence
from tip_kernels.learn.gradient_sweep import CrossEntropy
from tip_kernels.learn.head_gradients import GradFilter, HeadGradients
from tip_kernels.measure.sweep import columns_of, measure
from tip_kernels.select.rule import Kept, QuotaRule, Rule, spans_ranks
from tip_kernels.sources.rows import HeadRows, LogitRows, Rows
from tip_kernels.sources.topk import TopKRows
from tip_kernels.stats import TokenStats

SLACK = 1.25  # rows stashed per row of the quota
ROWS = {"cpu": (96, 256)}  # the fewest rows of a block that keep the products efficient, and the most that help
OTHER_ROWS = (512, 2048)
FILTER_COLUMNS = 1024  # narrow enough that rare tokens fill whole tiles
TILES_MIB = 16  # of the workspace for tiles, at most


@dataclass(frozen=True)
class Layout:
    """How one sweep divides its workspace."""

    rows: int  # R
    slots: int  # C; 0: rows are learned as they come
    tiles: int  # bytes for tiles of logits
    borrow: bool = False  # the row blocks lie in d(weight) until it is written


def layout(batch: Batch, need: tuple[bool, ...], n_rows: int, slots: int = 0, own_weight: bool = True) -> Layout | None:
    """The layout for learning from n_rows rows, or for measuring them with a stash of so many slots.

    own_weight  d(weight) gets a buffer of its own, if any
    None where one sweep cannot do it: no head to differentiate, a teacher without logits, too small a workspace.
    """
    student, teacher = batch.student, batch.teacher
    if not isinstance(student, HeadRows) or student.shard or isinstance(teacher, TopKRows) or not any(need):
        return None
    wide = student.weight.dtype == torch.float32
    widths = student.width, teacher.width
    lent = 4 * student.weight.numel() if need[1] and wide and own_weight and slots else 0
    narrow = need[1] and not wide
    return divided(batch.workspace, n_rows, slots, student.vocab, widths, student.device.type, narrow, lent)


def divided(
    workspace: int,
    n_rows: int,
    slots: int,
    vocab: int,
    widths: tuple[int, int],
    device: str,
    narrow_weight: bool,
    lent: int = 0,
) -> Layout | None:
    """A workspace of so many bytes divided among row blocks, stash and tiles, or None where the blocks get too short.

    narrow_weight  d(weight) has 16 bits, so that a sum over several blocks needs an fp32 (V, H) beside it
    lent           bytes of d(weight), which is written last and holds the row blocks until then
    """
    fewest, most = ROWS.get(device, OTHER_ROWS)
    tiles = min(workspace // 4, TILES_MIB * 2**20)
    left = workspace - tiles - 4 * slots * (vocab + 3 * widths[0])  # hidden rows, weighted, gradient
    if slots == 0 and n_rows > most and narrow_weight:
        left -= 4 * vocab * widths[0]
    most, gathered = min(most, max(n_rows, 1)), 12 * sum(widths)
    rows = min(left // (8 * vocab + gathered), most)
    borrowed = min(left // gathered, lent // (8 * vocab), most)
    if max(rows, borrowed) < min(fewest, max(n_rows, 1)):
        return None
    return Layout(max(rows, borrowed), slots, tiles, borrowed >= rows and borrowed > 0)


def stash_layout(batch: Batch, need: tuple[bool, ...], rule: Rule, own_weight: bool) -> Layout | None:
    """The layout for measuring all rows with a stash for the rule's choice, or None where it cannot be speculated on.

    Speculating reads counts on the host, which is free on a CPU alone; a random rule would draw more than once, and
    ranks would have to choose together as often as the one with most rows.
    """
    free = batch.student.device.type == "cpu" and backend_for(batch.student.device) == "eager"
    if not free or not isinstance(rule, QuotaRule) or not rule.needs or hasattr(rule, "generator") or spans_ranks(rule):
        return None
    n_rows = batch.n_rows if batch.trainable is None else batch.trainable.numel()
    slots = stash_slots(n_rows, rule.capacity(batch.n_rows, batch.n_rollouts))
    return layout(batch, need, n_rows, slots, own_weight)


def stash_slots(n_rows: int, capacity: int) -> int:
    """How many of n_rows rows to stash for a quota of at most `capacity` in all."""
    return min(n_rows, math.ceil(SLACK * capacity) + 1)


def loosened(rule: QuotaRule) -> QuotaRule:
    """The same rule with a quota SLACK times as large."""
    return replace(rule, keep=math.ceil(SLACK * rule.keep) if is_int(rule.keep) else min(1.0, SLACK * rule.keep))


def _without_graph(method: Callable) -> Callable:
    """The method without a graph and in the dtypes it says, also under autocast."""

    @wraps(method)
    def call(self: OneSweep, *args: object) -> object:
        with torch.no_grad(), torch.autocast(self.student.device.type, enabled=False):
            return method(self, *args)

    return call


@dataclass(frozen=True)
class Lesson:
    """What is learned of each kept row: its loss at a temperature, and its weight."""

    divergence: Divergence
    labels: Tensor | None  # (N,)
    ce_weight: float
    temperature: float | Tensor  # or (N,)
    temperature_sq: bool
    row_weights: Tensor | None  # (N,)
    normalizer: str | float
    grad_scale: float | Tensor = 1.0  # of gradients that are made before backward
    weight_into: Tensor | None = None  # (V, H) where d(weight) is added, instead of returned
    grad_filter: GradFilter | None = None

    def factor(self, ids: Tensor) -> float | Tensor:
        """What multiplies the divergence of the rows ids."""
        if not self.temperature_sq:
            return 1.0 - self.ce_weight
        return (1.0 - self.ce_weight) * tau_of(self.temperature, ids) ** 2

    def weights(self, ids: Tensor, valid: Tensor, kept: Kept) -> Tensor:
        """(S,) weights of the rows ids, 0 where not valid."""
        w = valid.float()
        for factor in (self.row_weights, kept._weights):
            w = w if factor is None else w * factor[ids]
        return w


def tau_of(temperature: float | Tensor, ids: Tensor) -> float | Tensor:
    """The temperature of the rows ids, a float or (S,)."""
    return temperature[ids] if isinstance(temperature, Tensor) else temperature


@dataclass
class Learned:
    """Losses of kept rows, without a graph, and gradients of sum of weights * loss / divisor, if made already."""

    ids: Tensor  # (S,)
    losses: Tensor  # (S,)
    task: RowTask
    gradients: HeadGradients | None = None
    divisor: Tensor | float = 1.0


class OneSweep:
    """The logits of a block of rows of both models, and what is learned from them while they are at hand."""

    def __init__(self, batch: Batch, lesson: Lesson, need: tuple[bool, ...], plan: Layout) -> None:
        self.batch, self.lesson, self.need, self.plan = batch, lesson, need, plan
        self.student, self.teacher = batch.student, batch.teacher
        size, device, self.buffer = (plan.rows, self.student.vocab), self.student.device, None
        if plan.borrow:
            self.buffer = torch.empty(self.student.weight.shape, device=device)
            self.z_s, self.z_t = self.buffer.view(-1)[: 2 * math.prod(size)].view(2, *size)
        else:
            self.z_s, self.z_t = (torch.empty(size, device=device) for _ in range(2))
        self.fields: Fields = {}  # (N, ...) of everything measured, NaN where not
        self.losses = torch.full((batch.n_rows,), torch.nan, device=self.student.device)
        self.ce: Fields = {}  # (N,) normalisers and label log-probabilities at temperature 1

    @_without_graph
    def known(self, ids: Tensor, weights: Tensor, want: frozenset[str | Blend]) -> Learned:
        """Measures what is wanted of rows ids (S,) of given weights, and learns from them, block by block."""
        divisor = self.batch.normalizer(self.lesson.normalizer, weights)
        parts, temperature = self._parts(ids.numel()) or [slice(0, 0)], self.lesson.temperature
        exact = not isinstance(divisor, Tensor)  # else a row without a finite loss changes it
        gradients = self._gradients(ids, passes=len(parts), into=self.lesson.weight_into if exact else None)
        for part in parts:
            rows, w = ids[part], weights[part] / divisor * self.lesson.grad_scale
            z_s, z_t = self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            here = self.batch.measure(rows, want, temperature, True, [z_s, z_t], self.plan.tiles)
            self._note(here, rows)
            every = torch.arange(rows.numel(), device=rows.device)
            dead = self._learn(rows, every, z_s, z_t, out=z_s, places=None, weights=w)
            self._take_in(gradients, part, z_s, w, dead)
        self.batch.count(ids, sum(self.need[:2]))
        return Learned(ids, self.losses[ids], self._task(ids), gradients, divisor)

    @_without_graph
    def speculated(
        self, rule: QuotaRule, rollout_ids: Tensor | None, want: frozenset[str | Blend], with_teacher: bool
    ) -> Kept:
        """Measures every row and stashes those that a looser quota keeps among the rows seen so far; the rule's choice.

        The stash then holds d(logits), or the student's logits where the teacher is not measured.
        """
        batch, temperature, row_mask = self.batch, self.lesson.temperature, self.batch.row_mask
        self.stash = Stash(self.plan.slots, self.student.vocab, batch.n_rows)
        candidates = torch.arange(batch.n_rows) if batch.trainable is None else batch.trainable
        for part in self._parts(candidates.numel()) or [slice(0, 0)]:
            rows = candidates[part]
            z_s, z_t = self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            record = [z_s, z_t] if with_teacher else [z_s]
            self._note(batch.measure(rows, want, temperature, with_teacher, record, self.plan.tiles), rows)
            likely = loosened(rule)(self.stats(), row_mask, rollout_ids).mask
            self.stash.release(likely)
            local = likely[rows].nonzero().squeeze(1)
            slots = self.stash.take(rows[local])
            local = local[: slots.numel()]
            if with_teacher:
                self._learn(rows, local, z_s, z_t, out=self.stash.rows, places=slots)
            else:
                self.stash.rows.index_copy_(0, slots, z_s[local])
        return rule(self.stats(), row_mask, rollout_ids)

    @_without_graph
    def settled(self, kept: Kept, late: frozenset[str | Blend] | None) -> Learned:
        """Completes the stash with the kept rows that it missed, and takes it into the gradients.

        late  what the loss needs, where the stash holds the student's logits; None where it holds d(logits)
        """
        stash, ids = self.stash, kept.row_ids
        stash.release(kept.mask)
        missed = stash.compact(ids)
        for part in self._parts(missed.numel()):
            rows = missed[part]
            slots, z_s, z_t = stash.take(rows), self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            self._project(self.student, rows, z_s)
            if late is not None:
                stash.rows.index_copy_(0, slots, z_s)
            else:
                self._project(self.teacher, rows, z_t)
                every = torch.arange(rows.numel())
                self._learn(rows, every, z_s, z_t, out=stash.rows, places=slots)
        held = stash.owner[: ids.numel()]
        if late is not None:
            for part in self._parts(ids.numel()):
                rows, z_s = held[part], stash.rows[part]
                z_t = self.z_t[: rows.numel()]
                self._measure_late(rows, z_s, z_t, late)
                every = torch.arange(rows.numel())
                self._learn(rows, every, z_s, z_t, out=z_s, places=None)
        weights = self.lesson.weights(ids, torch.ones_like(ids, dtype=torch.bool), kept)
        weights = weights * self.losses[ids].isfinite()
        total = self.batch.normalizer(self.lesson.normalizer, weights)
        share = torch.zeros(self.batch.n_rows).index_copy_(0, ids, weights / total * self.lesson.grad_scale)[held]
        gradients = self._gradients(held, passes=1, into=self.lesson.weight_into)
        dlogits = stash.rows[: ids.numel()].mul_(share.unsqueeze(1))
        self._take_in(gradients, slice(0, ids.numel()), dlogits, share, (share == 0).unsqueeze(1))
        self.batch.count(ids, sum(self.need[:2]))
        return Learned(ids, self.losses[ids], self._task(ids), gradients, total)

    def _gradients(self, ids: Tensor, passes: int, into: Tensor | None) -> HeadGradients:
        grad_filter = self.lesson.grad_filter
        return HeadGradients(
            self.student, ids, self.need, passes=passes, into=into, grad_filter=grad_filter, buffer=self.buffer
        )

    def _take_in(
        self, gradients: HeadGradients, part: slice, dlogits: Tensor, weights: Tensor, dead: Tensor | None
    ) -> None:
        """Adds the gradients of rows part of gradients, whose dlogits (r, V) hold the weights (r,)."""
        student, hidden = self.student, self.student.block(gradients.ids[part]).hidden
        if dead is not None:
            hidden = hidden.masked_fill(dead, 0.0)  # 0 * NaN: a NaN stays in its row
        columns = max(1, min(student.vocab, self.plan.tiles // (12 * student.width + 4 * hidden.shape[0])))
        if gradients.filter is not None:
            columns = min(columns, FILTER_COLUMNS)
        for v0, v1 in columns_of(student.vocab, columns):
            with gradients.columns(v0, v1):
                gradients.add(part, hidden, dlogits[:, v0:v1], weights)

    def stats(self, partial: bool = True) -> TokenStats:
        """The record of all that was measured so far; partial: of some rows only."""
        partial = partial or self.batch.trainable is not None
        return self.batch.record(self.fields, self.lesson.temperature, partial=partial)

    def _parts(self, n_rows: int) -> list[slice]:
        """The blocks of so many rows."""
        return [slice(r0, min(r0 + self.plan.rows, n_rows)) for r0 in range(0, n_rows, self.plan.rows)]

    def _note(self, measured: Fields, rows: Tensor) -> None:
        for name, value in measured.items():
            if name in self.fields:
                self.fields[name].index_copy_(0, rows, value)
            else:
                self.fields[name] = self.batch.scattered(value, rows)

    def _measure_late(self, rows: Tensor, z_s: Tensor, z_t: Tensor, want: frozenset[str | Blend]) -> None:
        """What the loss needs of rows whose student logits are at hand; projects the teacher into z_t."""
        self._project(self.teacher, rows, z_t)
        labels = None if self.lesson.labels is None else self.lesson.labels[rows]
        tau = tau_of(self.lesson.temperature, rows)
        pair = LogitRows(z_s), LogitRows(z_t)
        here = measure(*pair, want, labels=labels, temperature=tau, workspace=self.plan.tiles)
        self.batch.note_broken(here, rows)
        self._note(here, rows)

    def _project(self, source: Rows, rows: Tensor, out: Tensor) -> None:
        """Logits (r, V) of the given rows of a source, at temperature 1."""
        block = source.block(rows)
        columns = max(1, min(source.vocab, self.plan.tiles // (4 * block.n_rows + 4 * source.width)))
        buffer = torch.empty(block.n_rows * columns, device=out.device)
        for v0, v1 in columns_of(source.vocab, columns):
            out[:, v0:v1] = block.tile(v0, v1, buffer[: block.n_rows * (v1 - v0)].view(block.n_rows, v1 - v0))
        self.batch.count(rows, 1)

    def _learn(
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
        lesson, ids = self.lesson, rows[local]
        source_s, source_t = LogitRows(z_s), LogitRows(z_t)
        source_s.scale, source_s.softcap = self.student.scale, self.student.softcap  # dlogits are those of the head
        labels = None if lesson.labels is None else lesson.labels[rows]
        at_rows = {name: value[ids] for name, value in self.fields.items()}
        ce = None
        if lesson.ce_weight:
            named, tau = at_rows, lesson.temperature
            if isinstance(tau, Tensor) or tau != 1.0:
                want = frozenset({"logp_s"})
                named = measure(source_s, None, want, rows=local, labels=labels, workspace=self.plan.tiles)
            named = {name: named[name] for name in ("shift_s", "logsum_s", "logp_s")}
            for name, value in named.items():
                self.ce.setdefault(name, torch.full_like(self.losses, torch.nan)).index_copy_(0, ids, value)
            ce = CrossEntropy(lesson.ce_weight, named)
        tau = tau_of(lesson.temperature, rows)
        task = RowTask(lesson.divergence, local, at_rows, tau, self.plan.tiles, labels, lesson.factor(ids), ce)
        loss, gradient = differentiated(source_s, source_t, task)
        self.losses.index_copy_(0, ids, loss)
        dead = (~gradient.finite).unsqueeze(1)
        dead = None if dead.device.type == "cpu" and not dead.any() else dead
        gradient.write(source_s, source_t, torch.ones_like(loss) if weights is None else weights, dead, out, places)
        return dead

    def _task(self, ids: Tensor) -> RowTask:
        """The same over the sources themselves, for a second backward."""
        lesson = self.lesson
        at_rows = {name: value[ids] for name, value in self.fields.items()}
        ce = CrossEntropy(lesson.ce_weight, {name: value[ids] for name, value in self.ce.items()}) if self.ce else None
        sinks = {"weight_into": lesson.weight_into, "grad_filter": lesson.grad_filter}
        return RowTask(
            lesson.divergence,
            ids,
            at_rows,
            lesson.temperature,
            self.batch.workspace,
            lesson.labels,
            lesson.factor(ids),
            ce,
            **sinks,
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


def delivered(
    loss: Tensor, learned: Learned, weights: Tensor, divisor: Tensor | float, student: HeadRows, teacher: Rows
) -> Tensor:
    """The loss () with its gradients attached: sum of weights * learned.losses / divisor."""
    share = weights / divisor
    sums, into = learned.gradients.finished(), learned.task.weight_into
    ready = Ready(student, teacher, learned.task, share, sums, learned.divisor / divisor, into)
    return Delivered.apply(loss, ready, *student.leaves)


@dataclass
class Ready:
    """Gradients of sum of weights * row loss, up to a scale, and how to make them again."""

    student: Rows
    teacher: Rows
    task: RowTask  # of the kept rows
    weights: Tensor  # (S,)
    sums: list[Tensor | None] | None  # one of each leaf; None once they are handed over
    scale: Tensor | float  # () what the sums have to be multiplied by
    weight_into: Tensor | None  # where d(weight) is added, instead of returned

    def gradients(
        self, upstream: Tensor, leaves: tuple[Tensor, ...], teacher_leaves: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> list[Tensor | None]:
        sums, self.sums = self.sums, None
        if sums is not None:
            factor = upstream * self.scale
            if factor.device.type != "cpu" or factor != 1:
                sums = [None if x is None else x.mul_(factor) for x in sums]
            if self.weight_into is not None and sums[1] is not None:
                self.weight_into += sums[1]
                sums[1] = None
            return [x if wanted else None for x, wanted in zip(sums, need, strict=True)]
        student, teacher = self.student.with_leaves(leaves), self.teacher.with_leaves(teacher_leaves)
        _, sweep = differentiated(student, teacher, self.task)
        return sweep.run(student, teacher, self.weights * upstream, need)


class Delivered(torch.autograd.Function):
    """Gives a loss measured without a graph the gradients that exist already, times the upstream scalar."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, ready: Ready, *leaves: Tensor) -> Tensor:
        tensors = [*leaves, *ready.teacher.leaves]
        ctx.save_for_backward(*(None if tensor.is_inference() else tensor for tensor in tensors))
        ctx.constants = [tensor if tensor.is_inference() else None for tensor in tensors]
        ready.student, ready.teacher = ready.student.with_leaves(()), ready.teacher.with_leaves(())
        ctx.ready = ready
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        need, pairs = ctx.needs_input_grad[2:], zip(ctx.saved_tensors, ctx.constants, strict=True)
        tensors = tuple(saved if constant is None else constant for saved, constant in pairs)
        leaves = tensors[: len(need)]
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.ready.gradients(upstream.detach(), leaves, tensors[len(need) :], need)
        if torch.is_grad_enabled():  # create_graph=True: a gradient of the gradient would pass for 0
            grads = [None if grad is None else Once.apply(grad, *leaves) for grad in grads]
        return (None, None, *grads)
