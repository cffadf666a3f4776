"""LEARN: a loss per row whose value is free, and whose backward is one sweep over the kept rows.

S kept rows, V vocabulary, C columns of a tile, R rows of a block, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tip_kernels._checks import FLOATS, expect, flat_rows, row_temperature, workspace_bytes
from tip_kernels.backends import backend_for
from tip_kernels.divergences import Divergence, ReverseKL
from tip_kernels.eager import row_grad
from tip_kernels.select import Kept
from tip_kernels.sources import Head, HeadRows, Rows, check_pair, rows_of
from tip_kernels.stats import PRIVATE_FIELDS, TokenStats, columns_of, measure, tile_shape


def divergence_loss(
    student: Tensor | Head,
    teacher: Tensor | Head,
    *,
    divergence: Divergence | None = None,
    kept: Kept | None = None,
    stats: TokenStats | None = None,
    temperature: float | Tensor = 1.0,
    row_weights: Tensor | None = None,
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
        matches = stats._batch_shape == rows_s.batch_shape and stats._vocab == rows_s.vocab
        if not matches:
            raise ValueError(
                f"stats: expected those of {rows_s.batch_shape} rows and {rows_s.vocab} entries, "
                f"got {stats._batch_shape} and {stats._vocab}"
            )
        at_rows = rows_of_stats(stats, divergence, ids, temperature)
    if at_rows is None:
        at_rows = measure(rows_s, rows_t, divergence.needs, rows=ids, temperature=temperature, workspace=workspace)
    loss = row_loss(rows_s, rows_t, ids, at_rows, divergence, temperature, workspace)
    if row_weights is not None:
        loss = loss * flat_rows("row_weights", row_weights, rows_s.batch_shape, FLOATS, rows_s.device)[ids]
    return loss


def rows_of_stats(
    stats: TokenStats, divergence: Divergence, ids: Tensor, temperature: float | Tensor
) -> dict[str, Tensor] | None:
    """What the loss needs of stats at the rows ids, or None where it was not measured, or at another temperature."""
    same = _same_temperature(temperature, stats._temperature)
    fields = {
        name: getattr(stats, f"_{name}" if name in PRIVATE_FIELDS else name)
        for name in divergence.needs | PRIVATE_FIELDS
    }
    if not same or any(value is None for value in fields.values()):
        return None
    return {name: value[ids] for name, value in fields.items()}


def _same_temperature(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device.type == "cpu" and torch.equal(a, b))  # elsewhere comparing would have to wait
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def row_loss(
    student: Rows,
    teacher: Rows,
    ids: Tensor,
    at_rows: dict[str, Tensor],
    divergence: Divergence,
    temperature: float | Tensor,
    workspace: int,
) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached."""
    tau = temperature[ids] if isinstance(temperature, Tensor) else temperature
    sweep = GradientSweep(ids, at_rows, divergence, tau, workspace, backend_for(student.device))
    values = divergence.value(at_rows)
    return _RowLoss.apply(values, sweep, student, teacher, *student.leaves)


class _RowLoss(torch.autograd.Function):
    """Gives values measured without a graph the gradient that one sweep computes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, values: Tensor, sweep: GradientSweep, student: Rows, teacher: Rows, *leaves: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*leaves, *teacher.leaves)  # autograd then refuses a backward after an in-place change
        ctx.sweep, ctx.student, ctx.teacher = sweep, student.with_leaves(()), teacher.with_leaves(())
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[4:]
        leaves, teacher_leaves = ctx.saved_tensors[: len(need)], ctx.saved_tensors[len(need) :]
        student, teacher = ctx.student.with_leaves(leaves), ctx.teacher.with_leaves(teacher_leaves)
        with torch.autocast(upstream.device.type, enabled=False):
            grads = ctx.sweep.run(student, teacher, upstream, need)
        return (None, None, None, None, *grads)


@dataclass(frozen=True)
class GradientSweep:
    """The gradient of sum_i upstream[i] * D(row ids[i]), by one sweep with the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    ids: Tensor  # (S,) int64
    at_rows: Mapping[str, Tensor]  # (S,) shift, logsum and the gradient's scalars
    divergence: Divergence
    temperature: float | Tensor  # or (S,)
    workspace: int
    backend: str

    def run(self, student: Rows, teacher: Rows, upstream: Tensor, need: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of the student's leaves, None where not needed."""
        live = upstream != 0
        sweep, dead = self, None
        if upstream.device.type == "cpu":
            places = live.nonzero().squeeze(1)
            sweep, upstream = self._restricted_to(places), upstream[places]
        else:
            dead = (~live).unsqueeze(1)  # dropping rows would have to wait for the device
        if isinstance(student, HeadRows):
            return sweep._through_head(student, teacher, upstream, need, dead)
        return sweep._to_logits(student, teacher, upstream, dead)

    def _restricted_to(self, places: Tensor) -> GradientSweep:
        tau = self.temperature[places] if isinstance(self.temperature, Tensor) else self.temperature
        at_rows = {name: value[places] for name, value in self.at_rows.items()}
        return GradientSweep(self.ids[places], at_rows, self.divergence, tau, self.workspace, self.backend)

    def _to_logits(self, student: Rows, teacher: Rows, upstream: Tensor, dead: Tensor | None) -> list[Tensor]:
        blocks, columns = self._blocks(student, teacher)
        dlogits = torch.zeros_like(student.matrix)
        buffers = self._buffers(blocks, columns, student.device)
        for v0, v1 in columns_of(student.vocab, columns):
            for part in blocks:
                ids = self.ids[part]
                tiles = (student.block(ids), None), (teacher.block(ids), _weight_tile(teacher, v0, v1))
                g = self._dlogits_tile(tiles, buffers, part, v0, v1, upstream, dead)
                dlogits[:, v0:v1].index_copy_(0, ids, g.to(dlogits.dtype))
        return [dlogits]

    def _through_head(
        self, student: HeadRows, teacher: Rows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        blocks, columns = self._blocks(student, teacher)
        device, width = student.device, student.width
        need_hidden, need_weight, need_bias = (*need, False)[:3]
        dhidden = torch.zeros(self.ids.numel(), width, device=device) if need_hidden else None
        dweight = torch.zeros_like(student.weight) if need_weight else None
        dbias = torch.zeros_like(student.bias) if need_bias else None
        buffers = self._buffers(blocks, columns, device)
        in_place = need_weight and dweight.dtype == torch.float32
        for v0, v1 in columns_of(student.vocab, columns):
            weight_s, weight_t = _weight_tile(student, v0, v1), _weight_tile(teacher, v0, v1)
            if need_weight:
                slice_ = dweight[v0:v1] if in_place else torch.zeros(v1 - v0, width, device=device)
            bias_sum = torch.zeros(v1 - v0, device=device) if need_bias else None
            for part in blocks:
                ids = self.ids[part]
                block_s, block_t = student.block(ids), teacher.block(ids)
                g = self._dlogits_tile(
                    ((block_s, weight_s), (block_t, weight_t)), buffers, part, v0, v1, upstream, dead
                )
                hidden = block_s.hidden if dead is None else block_s.hidden.masked_fill(dead[part], 0.0)
                if need_bias:
                    bias_sum += g.sum(0)
                g = g.to(weight_s.dtype)
                if need_weight:
                    _add_product(slice_, g.t(), hidden)
                if need_hidden:
                    _add_product(dhidden[part], g, weight_s)
            if need_weight and not in_place:
                dweight[v0:v1] = slice_
            if need_bias:
                dbias[v0:v1] = bias_sum
        if need_hidden:
            full = torch.zeros_like(student.hidden)
            dhidden = full.index_copy_(0, self.ids, dhidden.to(full.dtype))
        return [dhidden, dweight, dbias][: len(need)]

    def _dlogits_tile(
        self,
        tiles: tuple,
        buffers: list[Tensor],
        part: slice,
        v0: int,
        v1: int,
        upstream: Tensor,
        dead: Tensor | None,
    ) -> Tensor:
        """upstream * dD/d(logits before scale and softcap) of one tile, fp32 (R, C)."""
        n_rows = part.stop - part.start
        (block_s, weight_s), (block_t, weight_t) = tiles
        z_s, z_t = (buffer[: n_rows * (v1 - v0)].view(n_rows, -1) for buffer in buffers)
        block_s.tile(v0, v1, z_s, weight_s)
        block_t.tile(v0, v1, z_t, weight_t)
        tau = self.temperature[part].unsqueeze(1) if isinstance(self.temperature, Tensor) else self.temperature
        source = block_s.source
        slope = None if source.softcap is None else 1 - (z_s / source.softcap).square_()
        if isinstance(tau, Tensor) or tau != 1.0:
            z_s.div_(tau)
            z_t.div_(tau)
        rows = {name: value[part].unsqueeze(1) for name, value in self.at_rows.items()}
        terms = [(weight, term.gradient) for weight, term in self.divergence.terms]
        g = row_grad.dlogits(z_s, z_t, terms, rows)
        g.mul_(upstream[part].unsqueeze(1) * (source.scale / tau))
        if slope is not None:
            g.mul_(slope)
        return g if dead is None else g.masked_fill_(dead[part], 0.0)

    def _blocks(self, student: Rows, teacher: Rows) -> tuple[list[slice], int]:
        n_rows = self.ids.numel()
        block, columns = tile_shape(n_rows, student, teacher, self.workspace, buffers=6)
        return [slice(r0, min(r0 + block, n_rows)) for r0 in range(0, n_rows, block)], columns

    def _buffers(self, blocks: list[slice], columns: int, device: torch.device) -> list[Tensor]:
        rows = max((part.stop - part.start for part in blocks), default=0)
        return [torch.empty(rows * columns, device=device) for _ in range(2)]


def _weight_tile(source: Rows, v0: int, v1: int) -> Tensor | None:
    return source.weight_tile(v0, v1) if isinstance(source, HeadRows) else None


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in out's fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)
