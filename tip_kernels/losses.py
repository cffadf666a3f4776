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
    PRIVATE_FIELDS,
    columns_of,
    is_read_in_place,
    measure,
    tile_shape,
)
from tip_kernels.select import Kept
from tip_kernels.sources import Head, HeadBlock, HeadRows, LogitBlock, Rows, check_pair, rows_of
from tip_kernels.stats import TokenStats


def divergence_loss(
    student: Tensor | Head,
    teacher: Tensor | Head,
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

    student, teacher  logits (N, V) or (B, T, V), or a Head; no gradient flows to the teacher
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
    rows_s, rows_t = rows_of(student, "student"), rows_of(teacher, "teacher")
    check_pair(rows_s, rows_t)
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
        at_rows = rows_of_stats(stats, divergence, ids, temperature)
    labels = None if stats is None else stats._labels
    if divergence.needs & LABEL_FIELDS and labels is None:
        raise ValueError(
            f"stats: expected token_stats(..., labels=...), since {type(divergence).__name__} reads the sampled tokens"
        )
    if at_rows is None:
        at_rows = measure(
            rows_s, rows_t, divergence.needs, rows=ids, labels=labels, temperature=temperature, workspace=workspace
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


def rows_of_stats(
    stats: TokenStats, divergence: Divergence, ids: Tensor, temperature: float | Tensor
) -> dict[str, Tensor] | None:
    """What the loss needs of stats at the rows ids, or None where it was not measured, or at another temperature."""
    same = _same_temperature(temperature, stats._temperature)
    fields = {name: stats._get(name) for name in divergence.needs | PRIVATE_FIELDS}
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


def row_loss(student: Rows, teacher: Rows, task: RowTask) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    tau = task.temperature[task.ids] if isinstance(task.temperature, Tensor) else task.temperature
    normalisers = {name: task.at_rows[name] for name in PRIVATE_FIELDS}
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
        sweep, terms, factor, torch.isfinite(loss), labels, task.ce, limit is not None, task.grad_logits
    )
    return _RowLoss.apply(loss, gradient, student, teacher, *student.leaves)


class _RowLoss(torch.autograd.Function):
    """Gives values measured without a graph the gradient that one sweep computes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, values: Tensor, sweep: GradientSweep, student: Rows, teacher: Rows, *leaves: Tensor
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

    def blocks(
        self, student: Rows, teacher: Rows, buffers: int, slice_width: int = 0
    ) -> tuple[list[slice], int, list[Tensor]]:
        """The blocks of rows, the columns of a tile, and two buffers for tiles of logits."""
        n_rows = self.ids.numel()
        block, columns = tile_shape(n_rows, [student, teacher], self.workspace, buffers, slice_width=slice_width)
        parts = [slice(r0, min(r0 + block, n_rows)) for r0 in range(0, n_rows, block)]
        return parts, columns, [torch.empty(block * columns, device=student.device) for _ in range(2)]

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
        parts, columns, buffers = self.blocks(student, teacher, buffers=8)
        done: list[list[dict[str, Tensor]]] = []
        with torch.autocast(student.device.type, enabled=False):
            for part in parts or [slice(0, 0)]:
                blocks = student.block(self.ids[part]), teacher.block(self.ids[part])
                tau, rows = self.temperature_at(part), self.columns_at(part)
                totals: list[dict[str, Tensor]] = []
                for v0, v1 in columns_of(student.vocab, columns):
                    z_s, z_t = _tiles(blocks, (None, None), buffers, v0, v1)
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
class GradientSweep:
    """The gradient of sum_i upstream[i] * loss of row ids[i], by one sweep with the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    sweep: Sweep
    terms: list[row_grad.Term]
    factor: Tensor  # (S,)
    finite: Tensor  # (S,) bool: a row whose loss is infinite or NaN has gradient 0
    labels: Tensor | None  # (S,)
    ce: CrossEntropy | None
    clipped: bool
    grad_logits: str

    def run(self, student: Rows, teacher: Rows, upstream: Tensor, need: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of the student's leaves, None where not needed."""
        live = (upstream != 0) & self.finite
        task, dead = self, None
        if upstream.device.type == "cpu":
            places = live.nonzero().squeeze(1)
            task, upstream = self._restricted_to(places), upstream[places]
        else:
            dead = (~live).unsqueeze(1)  # dropping rows would have to wait for the device
        if isinstance(student, HeadRows):
            return task._through_head(student, teacher, upstream, need, dead)
        return task._to_logits(student, teacher, upstream, dead)

    def _restricted_to(self, places: Tensor) -> GradientSweep:
        return GradientSweep(
            self.sweep.restricted_to(places),
            [term._replace(rows=_at(term.rows, places)) for term in self.terms],
            self.factor[places],
            self.finite[places],
            None if self.labels is None else self.labels[places],
            None if self.ce is None else replace(self.ce, at_rows=_at(self.ce.at_rows, places)),
            self.clipped,
            self.grad_logits,
        )

    def _to_logits(self, student: Rows, teacher: Rows, upstream: Tensor, dead: Tensor | None) -> list[Tensor]:
        parts, columns, buffers = self.sweep.blocks(student, teacher, buffers=7)
        all_ids, leaf, matrix = self.sweep.ids, student.leaves[0], student.matrix
        places = None if self.grad_logits == "compact" else all_ids
        if self.grad_logits == "inplace":
            out = matrix
        elif matrix is not None and self.grad_logits == "dense":
            out = torch.zeros_like(matrix)
        else:
            out = leaf.new_zeros(student.n_rows if self.grad_logits == "dense" else all_ids.numel(), student.vocab)
        plain = self.ce is None and self.labels is None and is_read_in_place(student) and is_read_in_place(teacher)
        if self.sweep.backend == "triton" and plain:
            weights = upstream * self.factor if dead is None else (upstream * self.factor).masked_fill(dead[:, 0], 0.0)
            scatter = places is not None
            self._kernel(matrix, teacher.matrix, slice(None), weights, row_ids=all_ids, out=out, scatter=scatter)
        else:
            for v0, v1 in columns_of(student.vocab, columns):
                weight_t = _weight_tile(teacher, v0, v1)
                for part in parts:
                    ids = all_ids[part]
                    z = _tiles((student.block(ids), teacher.block(ids)), (None, weight_t), buffers, v0, v1)
                    g = self._dlogits_tile(student, z, part, v0, upstream, dead).to(out.dtype)
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
        self, student: HeadRows, teacher: Rows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        parts, columns, buffers = self.sweep.blocks(student, teacher, buffers=7, slice_width=student.width)
        all_ids, device, width = self.sweep.ids, student.device, student.width
        need_hidden, need_weight, need_bias = (*need, False)[:3]
        dhidden = torch.zeros(all_ids.numel(), width, device=device) if need_hidden else None
        dweight = torch.zeros_like(student.weight) if need_weight else None
        dbias = torch.zeros_like(student.bias) if need_bias else None
        for v0, v1 in columns_of(student.vocab, columns):
            weight_s, weight_t = _weight_tile(student, v0, v1), _weight_tile(teacher, v0, v1)
            if need_weight:
                in_place = dweight.dtype == torch.float32
                dweight_slice = dweight[v0:v1] if in_place else torch.zeros(v1 - v0, width, device=device)
            dbias_slice = torch.zeros(v1 - v0, device=device) if need_bias else None
            for part in parts:
                blocks = student.block(all_ids[part]), teacher.block(all_ids[part])
                z = _tiles(blocks, (weight_s, weight_t), buffers, v0, v1)
                g = self._dlogits_tile(student, z, part, v0, upstream, dead)
                if need_bias:
                    dbias_slice += g.sum(0)
                g = g.to(weight_s.dtype)
                if need_weight:
                    hidden = blocks[0].hidden
                    _add_product(dweight_slice, g.t(), hidden if dead is None else hidden.masked_fill(dead[part], 0.0))
                if need_hidden:
                    _add_product(dhidden[part], g, weight_s)
            if need_weight and not in_place:
                dweight[v0:v1] = dweight_slice
            if need_bias:
                dbias[v0:v1] = dbias_slice
            weight_s = weight_t = dweight_slice = None  # released before the next ones are made
        if need_hidden:
            full = torch.zeros_like(student.hidden)
            dhidden = full.index_copy_(0, all_ids, dhidden.to(full.dtype))
        return [dhidden, dweight, dbias][: len(need)]

    def _dlogits_tile(
        self, student: Rows, z: tuple[Tensor, Tensor], part: slice, v0: int, upstream: Tensor, dead: Tensor | None
    ) -> Tensor:
        """upstream * d(loss)/d(logits before scale and softcap) of one tile (R, C), fp32; overwrites z."""
        z_s, z_t = z
        up = upstream[part] * student.scale
        slope = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
        dce = None if self.ce is None else self._cross_entropy_tile(z_s, part, v0)
        g = self._divergence_gradient(z_s, z_t, part, up * self.factor[part])
        for term in self.terms:
            if "label_factor" in term.rows:
                value = term.weight * term.rows["label_factor"][part] * up * self.factor[part]
                self._add_at_label(g, part, v0, value.unsqueeze(1) / self.sweep.temperature_at(part))
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
        self._add_at_label(tile, part, v0, -weight)
        return tile

    def _add_at_label(self, tile: Tensor, part: slice, v0: int, value: Tensor) -> None:
        """tile[i, label of row i] += value[i], where that column is in the tile; value is (R, 1)."""
        place = (self.labels[part] - v0).unsqueeze(1)
        inside = (place >= 0) & (place < tile.shape[1])
        tile.scatter_add_(1, place.clamp(0, tile.shape[1] - 1), torch.where(inside, value, 0.0))


def _at(values: Mapping[str, Tensor], places: Tensor | slice) -> dict[str, Tensor]:
    return {name: value[places] for name, value in values.items()}


def _over(z: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature, in place."""
    return z if isinstance(temperature, float) and temperature == 1.0 else z.div_(temperature)


def _tiles(
    blocks: tuple[LogitBlock | HeadBlock, ...],
    weights: tuple[Tensor | None, ...],
    buffers: list[Tensor],
    v0: int,
    v1: int,
) -> tuple[Tensor, ...]:
    """Logit tiles (R, C) of both models in the buffers, after scale and softcap, at temperature 1."""
    n_rows = blocks[0].n_rows
    return tuple(
        block.tile(v0, v1, buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0), weight)
        for block, buffer, weight in zip(blocks, buffers, weights, strict=True)
    )


def _weight_tile(source: Rows, v0: int, v1: int) -> Tensor | None:
    return source.weight_tile(v0, v1) if isinstance(source, HeadRows) else None


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in out's fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)
