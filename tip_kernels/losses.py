"""LEARN: a loss per row whose value is free, and whose backward is one sweep over the kept rows.

S kept rows, V vocabulary, C columns of a tile, R rows of a block, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels._checks import FLOATS, expect, flat_rows, row_temperature, workspace_bytes
from tip_kernels.backends import backend_for
from tip_kernels.divergences import Divergence, ReverseKL
from tip_kernels.eager import row_grad
from tip_kernels.eager.online import Blend
from tip_kernels.measure import (
    IGNORE_LABEL,
    LABEL_FIELDS,
    LISTED_FIELDS,
    NORMALISER_FIELDS,
    columns_of,
    is_read_in_place,
    measure,
    tile_shape,
    with_logits,
)
from tip_kernels.select import Kept
from tip_kernels.sources import (
    Head,
    HeadBlock,
    HeadRows,
    LogitBlock,
    LogitRows,
    Rows,
    check_pair,
    rows_of,
    teacher_rows,
)
from tip_kernels.stats import TokenStats
from tip_kernels.topk import (
    PARTIAL,
    TopK,
    TopKRows,
    add_columns,
    check_request,
    hide_columns,
    partial_divergence,
    student_outcomes,
)


def divergence_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK,
    *,
    divergence: Divergence | None = None,
    kept: Kept | None = None,
    stats: TokenStats | None = None,
    temperature: float | Tensor = 1.0,
    row_weights: Tensor | None = None,
    grad_logits: str = "dense",
    workspace_mib: float = 256,
) -> Tensor:
    """The divergence of each kept row, (S,) fp32 in nats, differentiable in the student's source.

        row_loss[i] = row_weights[r] * D(teacher[r], student[r])          r = kept.row_ids[i]

    student, teacher  logits (N, V) or (B, T, V), or a Head; the teacher also a TopK. No gradient flows to the teacher
    divergence        ReverseKL() unless given
    kept              the rows to learn from, as a rule returned them; every row unless given
    stats             token_stats of the same sources: its values and normalisers are reused where it was measured at
                      this temperature and holds what the divergence needs; else the kept rows are measured again
    temperature       a positive float, or a float tensor (N,) or (B, T); divides both models' logits
    row_weights       float (N,) or (B, T), multiplies each row's loss; kept.row_weights is left to the caller
    grad_logits       how a student given as logits gets its gradient: "dense" (N, V); "compact", for an (N, V) leaf: a
                      sparse tensor whose indices are the row ids and whose values are (S, V); "inplace", into the
                      logits' own storage, which then no longer holds logits. A Head takes "dense" only
    workspace_mib     MiB that forward and backward may use beyond inputs, gradients and (N,) tensors

    The caller reduces. Gradients come in each leaf's dtype: logits are projected and gradients accumulated in fp32. A
    leaf that needs no gradient costs nothing; a row whose upstream gradient is 0 is left out of the sweep. A row whose
    divergence is infinite keeps it. Backward may run repeatedly (retain_graph), but not twice through itself. Reads
    kept.row_ids, which synchronises on its first read.

    Raises ValueError naming the argument. Source of the gradients: eager/row_grad.py.
    """
    divergence = ReverseKL() if divergence is None else divergence
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    rows_s, rows_t = rows_of(student, "student"), teacher_rows(teacher)
    check_pair(rows_s, rows_t)
    check_listed(rows_t, divergence, temperature)
    temperature = row_temperature(temperature, rows_s.batch_shape, rows_s.device)
    _check_grad_logits(grad_logits, student)
    expect(kept is None or isinstance(kept, Kept), "kept", "what a selection rule returned, or None", kept)
    if kept is None:
        ids = torch.arange(rows_s.n_rows, device=rows_s.device)
    else:
        expect(kept.mask.numel() == rows_s.n_rows, "kept", f"a choice among {rows_s.n_rows} rows", kept.mask)
        ids = kept.row_ids
    workspace = workspace_bytes(workspace_mib)
    if stats is None:
        at_rows = None
    else:
        expect(isinstance(stats, TokenStats), "stats", "what token_stats returned, or None", stats)
        matches = math.prod(stats._batch_shape) == rows_s.n_rows and stats._vocab == rows_s.vocab
        if not matches:
            raise ValueError(
                f"stats: expected those of {rows_s.batch_shape} rows and {rows_s.vocab} vocabulary entries, "
                f"got {stats._batch_shape} and {stats._vocab}"
            )
        at_rows = rows_of_stats(stats, needed(divergence, rows_t), ids, temperature)
    labels = None if stats is None else stats._labels
    if divergence.needs & LABEL_FIELDS and labels is None:
        raise ValueError(
            f"stats: expected token_stats(..., labels=...), since {type(divergence).__name__} reads the sampled tokens"
        )
    if at_rows is None:
        at_rows = measure(
            rows_s,
            rows_t,
            needed(divergence, rows_t),
            rows=ids,
            labels=labels,
            temperature=temperature,
            workspace=workspace,
        )
    loss = row_loss(
        rows_s, rows_t, RowTask(divergence, ids, at_rows, temperature, workspace, labels, grad_logits=grad_logits)
    )
    if row_weights is not None:
        loss = loss * flat_rows("row_weights", row_weights, rows_s.batch_shape, FLOATS, rows_s.device)[ids]
    return loss


def _check_grad_logits(mode: object, student: Tensor | Head) -> None:
    expect(mode in ("dense", "compact", "inplace"), "grad_logits", "'dense', 'compact' or 'inplace'", mode)
    if mode != "dense":
        expect(isinstance(student, Tensor), "grad_logits", "'dense', since the student is a Head", mode)
        ok = mode != "compact" or student.dim() == 2
        expect(ok, "grad_logits", "'dense' or 'inplace', since the student's logits are not (N, V)", mode)
        ok = mode != "inplace" or student.is_contiguous()
        expect(ok, "grad_logits", "'dense' or 'compact', since the student's logits are not contiguous", mode)


def check_listed(teacher: Rows | TopKRows, divergence: Divergence, temperature: object) -> None:
    """Refuses what a TopK cannot serve; any other teacher serves all."""
    if isinstance(teacher, TopKRows):
        check_request(temperature)
        ok = not divergence.needs & LABEL_FIELDS
        expect(ok, "divergence", "one that reads no labels, since the teacher is a TopK", divergence)
        ok = teacher.tail != "ignore" or all(term.gradient in PARTIAL for _, term in divergence.terms)
        form = "ForwardKL, ReverseKL, Jeffreys, HellingerSq or a sum of them, since the TopK's tail is 'ignore'"
        expect(ok, "divergence", form, divergence)


def needed(divergence: Divergence, teacher: Rows | TopKRows) -> frozenset[str | Blend]:
    """The measured fields, beside the normalisers, that a loss is made from."""
    return LISTED_FIELDS if isinstance(teacher, TopKRows) else divergence.needs


def rows_of_stats(
    stats: TokenStats, needs: frozenset[str | Blend], ids: Tensor, temperature: float | Tensor
) -> dict[str, Tensor] | None:
    """The needed fields of stats at the rows ids, or None where not measured, or at another temperature."""
    same = _same_temperature(temperature, stats._temperature)
    same = same and (stats._listed is not None) == (needs == LISTED_FIELDS)  # a TopK has other normalisers
    fields = {name: stats._get(name) for name in needs | NORMALISER_FIELDS}
    if not same or any(value is None for value in fields.values()):
        return None
    return {name: value[ids] for name, value in fields.items()}


def _same_temperature(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device.type == "cpu" and torch.equal(a, b))  # elsewhere comparing would have to wait
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


@dataclass(frozen=True)
class CrossEntropy:
    """The label loss of kept rows, at temperature 1."""

    weight: float
    at_rows: Mapping[str, Tensor]  # (S,) shift_s, logsum_s and logp_s at temperature 1


@dataclass(frozen=True)
class RowTask:
    """Which loss of which rows: factor * divergence + ce.weight * cross-entropy."""

    divergence: Divergence
    ids: Tensor  # (S,) int64
    at_rows: Mapping[str | Blend, Tensor]  # (S,) shift and logsum of both models, and what the divergence needs
    temperature: float | Tensor  # a tensor is (N,)
    workspace: int
    labels: Tensor | None = None  # (N,)
    factor: float | Tensor = 1.0  # a tensor is (S,)
    ce: CrossEntropy | None = None
    grad_logits: str = "dense"


def row_loss(student: Rows, teacher: Rows | TopKRows, task: RowTask) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    if isinstance(teacher, TopKRows):
        return _outcome_loss(student, teacher, task)
    tau = task.temperature[task.ids] if isinstance(task.temperature, Tensor) else task.temperature
    normalisers = {name: task.at_rows[name] for name in NORMALISER_FIELDS}
    sweep = Sweep(task.ids, normalisers, tau, task.workspace, backend_for(student.device))
    sums = sweep.row_sums(student, teacher, [term for _, term in task.divergence.terms if term.class_b])
    value, terms = 0.0, []
    for weight, term in task.divergence.terms:
        row = {**task.at_rows, **sums.get(term, {})}
        value = value + weight * term.value(row)
        terms.append(row_grad.Term(weight, term.gradient, term.params, term.scalars(row)))
    factor = torch.as_tensor(task.factor, dtype=torch.float32, device=value.device).expand_as(value)
    if (limit := task.divergence.max_per_row) is not None:
        loss = value.clamp(max=limit) * factor
        factor = torch.where(value > limit, 0.0, factor)
    else:
        loss = value * factor
    labels = None if task.labels is None else task.labels[task.ids]
    if task.ce is not None:
        loss = loss - task.ce.weight * torch.where(labels == IGNORE_LABEL, 0.0, task.ce.at_rows["logp_s"])
    gradient = GradientSweep(
        sweep, task.grad_logits, terms, factor, torch.isfinite(loss), labels, task.ce, limit is not None
    )
    return _RowLoss.apply(loss, gradient, student, teacher, *student.leaves)


def _outcome_loss(student: Rows, teacher: TopKRows, task: RowTask) -> Tensor:
    """The same against a TopK: a loss on the (S, K + 1) logits of the outcomes, whose gradient one sweep spreads."""
    rows = task.at_rows
    logits = student_outcomes(rows)
    labels = None if task.ce is None else task.labels[task.ids]
    if task.ce is not None:  # one column more: the label's logit
        label_logit = task.ce.at_rows["logp_s"] + rows["logsum_s"]
        logits = torch.cat([logits, torch.where(labels == IGNORE_LABEL, 0.0, label_logit).unsqueeze(1)], 1)
    rest = {"shift_rest": rows["shift_rest"], "logsum_rest": rows["logsum_rest"].nan_to_num(nan=torch.nan, neginf=0.0)}
    sweep = Sweep(task.ids, rest, 1.0, task.workspace, backend_for(student.device))
    spread = OutcomeSweep(sweep, task.grad_logits, teacher.ids[task.ids], labels)
    logits = _RowLoss.apply(logits, spread, student, teacher, *student.leaves)

    n_outcomes = teacher.ids.shape[1] + 1
    y = logits[:, :n_outcomes]
    lp_t = teacher.log_outcomes(task.ids, student.vocab, y[:, -1].isneginf())
    broken = (y.isnan() | lp_t.isnan().any(1, keepdim=True)).any(1)
    y, lp_t = (x.masked_fill(broken.unsqueeze(1), 0.0) for x in (y, lp_t))  # no NaN meets the 0 of its gradient
    if teacher.tail == "ignore":
        loss = sum(weight * partial_divergence(term.gradient, y, lp_t) for weight, term in task.divergence.terms)
        loss = loss if task.divergence.max_per_row is None else loss.clamp(max=task.divergence.max_per_row)
    else:
        pair = LogitRows(y[:, : lp_t.shape[1]]), LogitRows(lp_t)
        every = torch.arange(task.ids.numel(), device=y.device)
        at_rows = measure(*pair, task.divergence.needs, workspace=task.workspace)
        loss = row_loss(*pair, RowTask(task.divergence, every, at_rows, 1.0, task.workspace))
    loss = loss * task.factor
    if task.ce is not None:
        cross_entropy = y.logsumexp(1) - logits[:, n_outcomes]
        loss = loss + task.ce.weight * torch.where(labels == IGNORE_LABEL, 0.0, cross_entropy)
    loss = torch.where(loss.detach().isfinite(), loss, loss.detach())  # a row whose loss is infinite has gradient 0
    return loss.masked_fill(broken, torch.nan)


class _RowLoss(torch.autograd.Function):
    """Gives values measured without a graph the gradient that one sweep computes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        sweep: LeafSweep,
        student: Rows,
        teacher: Rows | TopKRows,
        *leaves: Tensor,
    ) -> Tensor:
        # Saved tensors let autograd refuse a backward after an in-place change; those of inference mode cannot change.
        tensors = [*leaves, *teacher.leaves]
        ctx.save_for_backward(*(None if tensor.is_inference() else tensor for tensor in tensors))
        ctx.constants = [tensor if tensor.is_inference() else None for tensor in tensors]
        ctx.sweep, ctx.student, ctx.teacher = sweep, student.with_leaves(()), teacher.with_leaves(())
        return values.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[4:]
        tensors = tuple(
            saved if constant is None else constant
            for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
        )
        leaves = tensors[: len(need)]
        student, teacher = ctx.student.with_leaves(leaves), ctx.teacher.with_leaves(tensors[len(need) :])
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.sweep.run(student, teacher, upstream.detach(), need)
        if torch.is_grad_enabled():  # create_graph=True: a gradient of the gradient would pass for 0
            grads = [None if grad is None else _Once.apply(grad, *leaves) for grad in grads]
        return (None, None, None, None, *grads)


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *leaves: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "tip_kernels: cannot differentiate twice: the backward of a loss is one sweep without a graph"
        )


@dataclass(frozen=True)
class Sweep:
    """What every sweep over kept rows shares: the rows, both models' normalisers, and how tiles are made."""

    ids: Tensor  # (S,) int64
    normalisers: Mapping[str, Tensor]  # (S,) shift and logsum of both models
    temperature: float | Tensor  # or (S,)
    workspace: int
    backend: str

    def restricted_to(self, places: Tensor) -> Sweep:
        return replace(
            self,
            ids=self.ids[places],
            normalisers=_at(self.normalisers, places),
            temperature=self.temperature[places] if isinstance(self.temperature, Tensor) else self.temperature,
        )

    def blocks(self, sources: list[Rows], buffers: int, slice_width: int = 0) -> tuple[list[slice], int, list[Tensor]]:
        """The blocks of rows, the columns of a tile, and a buffer for each source's tiles of logits."""
        n_rows = self.ids.numel()
        block, columns = tile_shape(n_rows, sources, self.workspace, buffers, slice_width=slice_width)
        parts = [slice(r0, min(r0 + block, n_rows)) for r0 in range(0, n_rows, block)]
        return parts, columns, [torch.empty(block * columns, device=source.device) for source in sources]

    def temperature_at(self, part: slice) -> float | Tensor:
        return self.temperature[part].unsqueeze(1) if isinstance(self.temperature, Tensor) else self.temperature

    def columns_at(self, part: slice) -> dict[str, Tensor]:
        return {name: value[part].unsqueeze(1) for name, value in self.normalisers.items()}

    @torch.no_grad()
    def row_sums(self, student: Rows, teacher: Rows, terms: list[Divergence]) -> dict[Divergence, dict[str, Tensor]]:
        """The row sums of class-B divergences, each {name: (S,)}, by one sweep; nothing is swept without any."""
        if not terms:
            return {}
        asked = [row_grad.Term(1.0, term.gradient, term.params, {}) for term in terms]
        parts, columns, buffers = self.blocks([student, teacher], buffers=8)
        done: list[list[dict[str, Tensor]]] = []
        with torch.autocast(student.device.type, enabled=False):
            for part in parts or [slice(0, 0)]:
                blocks = [student.block(self.ids[part]), teacher.block(self.ids[part])]
                tau, rows = self.temperature_at(part), self.columns_at(part)
                totals: list[dict[str, Tensor]] = []
                for v0, v1 in columns_of(student.vocab, columns):
                    z_s, z_t = _tiles(blocks, [None, None], buffers, v0, v1)
                    sums = row_grad.row_sums(_over(z_s, tau), _over(z_t, tau), asked, rows)
                    totals = (
                        [{k: a[k] + b[k] for k in a} for a, b in zip(totals, sums, strict=True)] if totals else sums
                    )
                done.append(totals)
        return {
            term: {name: torch.cat([totals[i][name] for totals in done]) for name in done[0][i]}
            for i, term in enumerate(terms)
        }


@dataclass(frozen=True)
class LeafSweep:
    """Carries the gradient of something of each row to the student's leaves, the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    sweep: Sweep
    grad_logits: str

    def live(self, upstream: Tensor) -> Tensor:
        """(S,) bool: rows whose gradient is not 0."""
        raise NotImplementedError

    def restricted_to(self, places: Tensor) -> LeafSweep:
        raise NotImplementedError

    def dlogits_tile(
        self, student: Rows, z: list[Tensor], part: slice, v0: int, upstream: Tensor, dead: Tensor | None
    ) -> Tensor:
        """d(logits before scale and softcap) of one tile (R, C), fp32; z are the sources' tiles, overwritten."""
        raise NotImplementedError

    def fill_rows(
        self, student: Rows, teacher: Rows | TopKRows, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool
    ) -> bool:
        """Writes the gradient of logits in memory at once, where a kernel can; tells whether it did."""
        return False

    def run(
        self, student: Rows, teacher: Rows | TopKRows, upstream: Tensor, need: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients of the student's leaves, None where not needed."""
        live = self.live(upstream)
        task, dead = self, None
        if upstream.device.type == "cpu":
            places = live.nonzero().squeeze(1)
            task, upstream = self.restricted_to(places), upstream[places]
        else:
            dead = (~live).unsqueeze(1)  # dropping rows would have to wait for the device
        if isinstance(student, HeadRows):
            return task._through_head(student, teacher, upstream, need, dead)
        return task._to_logits(student, teacher, upstream, dead)

    def _to_logits(
        self, student: LogitRows, teacher: Rows | TopKRows, upstream: Tensor, dead: Tensor | None
    ) -> list[Tensor]:
        sources = with_logits(student, teacher)
        parts, columns, buffers = self.sweep.blocks(sources, buffers=7)
        all_ids, leaf, matrix = self.sweep.ids, student.leaves[0], student.matrix
        places = None if self.grad_logits == "compact" else all_ids
        if self.grad_logits == "inplace":
            out = matrix
        elif matrix is not None and self.grad_logits == "dense":
            out = torch.zeros_like(matrix)
        else:
            out = leaf.new_zeros(student.n_rows if self.grad_logits == "dense" else all_ids.numel(), student.vocab)
        if not self.fill_rows(student, teacher, upstream, dead, out, scatter=places is not None):
            for v0, v1 in columns_of(student.vocab, columns):
                weights = [_weight_tile(source, v0, v1) for source in sources]
                for part in parts:
                    ids = all_ids[part]
                    z = _tiles([source.block(ids) for source in sources], weights, buffers, v0, v1)
                    g = self.dlogits_tile(student, z, part, v0, upstream, dead).to(out.dtype)
                    if places is None:
                        out[part, v0:v1] = g
                    else:
                        out[:, v0:v1].index_copy_(0, places[part], g)
        if self.grad_logits == "inplace":
            others = torch.ones(matrix.shape[0], 1, dtype=torch.bool, device=matrix.device).index_fill_(
                0, all_ids, False
            )
            out.masked_fill_(others, 0.0)
        if self.grad_logits == "compact":
            out = torch.sparse_coo_tensor(
                all_ids.unsqueeze(0), out, matrix.shape, is_coalesced=True, check_invariants=False
            )
        return [out.view(leaf.shape) if matrix is None else out]

    def _through_head(
        self, student: HeadRows, teacher: Rows | TopKRows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        sources = with_logits(student, teacher)
        parts, columns, buffers = self.sweep.blocks(sources, buffers=7, slice_width=student.width)
        all_ids, device, width = self.sweep.ids, student.device, student.width
        need_hidden, need_weight, need_bias = (*need, False)[:3]
        dhidden = torch.zeros(all_ids.numel(), width, device=device) if need_hidden else None
        dweight = torch.zeros_like(student.weight) if need_weight else None
        dbias = torch.zeros_like(student.bias) if need_bias else None
        for v0, v1 in columns_of(student.vocab, columns):
            weights = [_weight_tile(source, v0, v1) for source in sources]
            if need_weight:
                in_place = dweight.dtype == torch.float32
                dweight_slice = dweight[v0:v1] if in_place else torch.zeros(v1 - v0, width, device=device)
            dbias_slice = torch.zeros(v1 - v0, device=device) if need_bias else None
            for part in parts:
                blocks = [source.block(all_ids[part]) for source in sources]
                z = _tiles(blocks, weights, buffers, v0, v1)
                g = self.dlogits_tile(student, z, part, v0, upstream, dead)
                if need_bias:
                    dbias_slice += g.sum(0)
                g = g.to(weights[0].dtype)
                if need_weight:
                    hidden = blocks[0].hidden
                    _add_product(dweight_slice, g.t(), hidden if dead is None else hidden.masked_fill(dead[part], 0.0))
                if need_hidden:
                    _add_product(dhidden[part], g, weights[0])
            if need_weight and not in_place:
                dweight[v0:v1] = dweight_slice
            if need_bias:
                dbias[v0:v1] = dbias_slice
            weights = dweight_slice = None  # released before the next ones are made
        if need_hidden:
            full = torch.zeros_like(student.hidden)
            dhidden = full.index_copy_(0, all_ids, dhidden.to(full.dtype))
        return [dhidden, dweight, dbias][: len(need)]


@dataclass(frozen=True)
class GradientSweep(LeafSweep):
    """The gradient of sum_i upstream[i] * loss of row ids[i]; upstream is (S,)."""

    terms: list[row_grad.Term]
    factor: Tensor  # (S,)
    finite: Tensor  # (S,) bool: a row whose loss is infinite or NaN has gradient 0
    labels: Tensor | None  # (S,)
    ce: CrossEntropy | None
    clipped: bool

    def live(self, upstream: Tensor) -> Tensor:
        return (upstream != 0) & self.finite

    def restricted_to(self, places: Tensor) -> GradientSweep:
        return GradientSweep(
            self.sweep.restricted_to(places),
            self.grad_logits,
            [term._replace(rows=_at(term.rows, places)) for term in self.terms],
            self.factor[places],
            self.finite[places],
            None if self.labels is None else self.labels[places],
            None if self.ce is None else replace(self.ce, at_rows=_at(self.ce.at_rows, places)),
            self.clipped,
        )

    def fill_rows(
        self, student: Rows, teacher: Rows, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool
    ) -> bool:
        plain = self.ce is None and self.labels is None and is_read_in_place(student) and is_read_in_place(teacher)
        if self.sweep.backend != "triton" or not plain:
            return False
        weights = upstream * self.factor if dead is None else (upstream * self.factor).masked_fill(dead[:, 0], 0.0)
        where = {"row_ids": self.sweep.ids, "out": out, "scatter": scatter}
        self._kernel(student.matrix, teacher.matrix, slice(None), weights, **where)
        return True

    def dlogits_tile(
        self, student: Rows, z: list[Tensor], part: slice, v0: int, upstream: Tensor, dead: Tensor | None
    ) -> Tensor:
        z_s, z_t = z
        up = upstream[part] * student.scale
        slope = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
        dce = None if self.ce is None else self._cross_entropy_tile(z_s, part, v0)
        g = self._divergence_gradient(z_s, z_t, part, up * self.factor[part])
        for term in self.terms:
            if "label_factor" in term.rows:
                value = term.weight * term.rows["label_factor"][part] * up * self.factor[part]
                value = value.unsqueeze(1) / self.sweep.temperature_at(part)
                add_columns(g, self.labels[part].unsqueeze(1), v0, value)
        if self.clipped:  # a clipped row may be an infinite one, whose g is not finite
            g.masked_fill_((self.factor[part] == 0).unsqueeze(1), 0.0)
        if dce is not None:
            g.add_(dce.mul_(up.unsqueeze(1)))
        if slope is not None:
            g.mul_(slope)
        return g if dead is None else g.masked_fill_(dead[part], 0.0)

    def _divergence_gradient(self, z_s: Tensor, z_t: Tensor, part: slice, weights: Tensor) -> Tensor:
        """weights * d(divergence)/dz of one tile (R, C); weights is (R,)."""
        if self.sweep.backend == "triton":
            return self._kernel(z_s, z_t, part, weights, out=torch.empty_like(z_s))
        tau = self.sweep.temperature_at(part)
        terms = [term._replace(rows={k: v[part].unsqueeze(1) for k, v in term.rows.items()}) for term in self.terms]
        g = row_grad.dlogits(_over(z_s, tau), _over(z_t, tau), terms, self.sweep.columns_at(part))
        return g.mul_(weights.unsqueeze(1) / tau)

    def _kernel(self, z_s: Tensor, z_t: Tensor, part: slice, weights: Tensor, **where: Tensor | bool) -> Tensor:
        """The same by the Triton kernel, which reads tiles or whole rows."""
        from tip_kernels.kernels import row_grad as kernels

        terms = [kernels.Term(term.weight, term.name, term.params, _at(term.rows, part)) for term in self.terms]
        tau = self.sweep.temperature
        tau = tau[part] if isinstance(tau, Tensor) else tau
        return kernels.row_grad(z_s, z_t, weights, _at(self.sweep.normalisers, part), terms, temperature=tau, **where)

    def _cross_entropy_tile(self, z_s: Tensor, part: slice, v0: int) -> Tensor:
        """ce.weight * (p_s - one-hot(label)) at temperature 1, 0 in rows without a label."""
        shift, logsum = (self.ce.at_rows[name][part].unsqueeze(1) for name in ("shift_s", "logsum_s"))
        weight = (self.labels[part] != IGNORE_LABEL).unsqueeze(1) * self.ce.weight
        tile = row_grad.exp(row_grad.log_probabilities(z_s.clone(), shift, logsum)).mul_(weight)
        add_columns(tile, self.labels[part].unsqueeze(1), v0, -weight)
        return tile


@dataclass(frozen=True)
class OutcomeSweep(LeafSweep):
    """The gradient of sum upstream * logits of outcomes; upstream is (S, K + 1), with one column more for labels.

    The normalisers of its sweep are those of the rest, over which the gradient of column K is spread.
    """

    listed: Tensor  # (S, K) token ids
    labels: Tensor | None  # (S,)

    def live(self, upstream: Tensor) -> Tensor:
        return (upstream != 0).any(1)

    def restricted_to(self, places: Tensor) -> OutcomeSweep:
        labels = None if self.labels is None else self.labels[places]
        return OutcomeSweep(self.sweep.restricted_to(places), self.grad_logits, self.listed[places], labels)

    def dlogits_tile(
        self, student: Rows, z: list[Tensor], part: slice, v0: int, upstream: Tensor, dead: Tensor | None
    ) -> Tensor:
        (tile,), up = z, upstream[part] * student.scale
        listed, k = self.listed[part], self.listed.shape[1]
        slope = None if student.softcap is None else 1 - (tile / student.softcap).square_()
        hide_columns(tile, listed, v0)
        rest = self.sweep.columns_at(part)
        g = row_grad.exp(row_grad.log_probabilities(tile, rest["shift_rest"], rest["logsum_rest"]))
        g.mul_(up[:, k : k + 1])
        add_columns(g, listed, v0, up[:, :k])
        if self.labels is not None:
            add_columns(g, self.labels[part].unsqueeze(1), v0, up[:, k + 1 :])
        if slope is not None:
            g.mul_(slope)
        return g if dead is None else g.masked_fill_(dead[part], 0.0)


def _at(values: Mapping[str, Tensor], places: Tensor | slice) -> dict[str, Tensor]:
    return {name: value[places] for name, value in values.items()}


def _over(z: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature, in place."""
    return z if isinstance(temperature, float) and temperature == 1.0 else z.div_(temperature)


def _tiles(
    blocks: list[LogitBlock | HeadBlock],
    weights: list[Tensor | None],
    buffers: list[Tensor],
    v0: int,
    v1: int,
) -> list[Tensor]:
    """Logit tiles (R, C) of each source in the buffers, after scale and softcap, at temperature 1."""
    n_rows = blocks[0].n_rows
    return [
        block.tile(v0, v1, buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0), weight)
        for block, buffer, weight in zip(blocks, buffers, weights, strict=True)
    ]


def _weight_tile(source: Rows, v0: int, v1: int) -> Tensor | None:
    return source.weight_tile(v0, v1) if isinstance(source, HeadRows) else None


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in out's fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)
