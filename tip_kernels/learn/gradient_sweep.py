"""The gradient sweep over kept rows: from the loss of each to the leaves of the student's source.

S kept rows, R rows of a block, V vocabulary, C columns of a tile, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_kernels.backends.eager import row_grad
from tip_kernels.learn.head_gradients import HeadGradients
from tip_kernels.learn.objective import GradOptions
from tip_kernels.learn.sweep import RowSweep, over_, rows_of_all, tiles_of
from tip_kernels.measure.topk_teacher import add_columns
from tip_kernels.sources.head import HeadRows
from tip_kernels.sources.logits import LogitRows, Rows
from tip_kernels.sources.pair import Pair
from tip_kernels.stats import IGNORE_LABEL
from tip_kernels.workspace import columns_of


@dataclass(frozen=True)
class CrossEntropy:
    """The label loss of kept rows, at temperature 1."""

    weight: float
    at_rows: Mapping[str, Tensor]  # (S,) shift_s, logsum_s and logp_s at temperature 1


@dataclass(frozen=True)
class LeafSweep:
    """Carries the gradient of something of each row to the student's leaves, the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    sweep: RowSweep
    options: GradOptions

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

    def fill_rows(self, pair: Pair, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool) -> bool:
        """Writes the gradient of logits in memory at once, where a kernel can; tells whether it did."""
        return False

    def run(self, pair: Pair, upstream: Tensor, need: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of the student's leaves, None where not needed."""
        live = self.live(upstream)
        task, dead = self, None
        if upstream.device.type == "cpu":
            places = live.nonzero().squeeze(1)
            task, upstream = self.restricted_to(places), upstream[places]
        else:
            dead = (~live).unsqueeze(1)  # dropping rows would have to wait for the device
        if isinstance(pair.student, HeadRows):
            return task._through_head(pair, pair.student, upstream, need, dead)
        return task._to_logits(pair, pair.student, upstream, dead)

    def _to_logits(self, pair: Pair, student: LogitRows, upstream: Tensor, dead: Tensor | None) -> list[Tensor | None]:
        all_ids, leaf, matrix = self.sweep.ids, student.leaves[0], student.matrix
        if self.options.layout == "inplace":
            out = matrix
        elif matrix is not None and self.options.layout == "dense":
            out = torch.zeros_like(matrix)
        else:
            out = leaf.new_zeros(student.n_rows if self.options.layout == "dense" else all_ids.numel(), student.vocab)
        self.write(pair, upstream, dead, out, None if self.options.layout == "compact" else all_ids)
        if self.options.layout == "inplace":
            others = torch.ones(matrix.shape[0], 1, dtype=torch.bool, device=matrix.device).index_fill_(
                0, all_ids, False
            )
            out.masked_fill_(others, 0.0)
        if self.options.layout == "compact":
            out = torch.sparse_coo_tensor(
                all_ids.unsqueeze(0), out, matrix.shape, is_coalesced=True, check_invariants=False
            )
        return [out.view(leaf.shape) if matrix is None else out]

    def write(
        self,
        pair: Pair,
        upstream: Tensor,
        dead: Tensor | None,
        out: Tensor,
        places: Tensor | None,
    ) -> None:
        """Writes the gradient of logits in memory into rows places (S,) of out (., V), or into its first S.

        out may be the logits' own storage where row i of the sweep is row places[i] of both, or i without places.
        """
        scatter = places is not None
        if (not scatter or places is self.sweep.ids) and self.fill_rows(pair, upstream, dead, out, scatter):
            return
        all_ids = self.sweep.ids
        parts, columns, buffers = self.sweep.tiling(pair, buffers=7)
        for v0, v1 in columns_of(pair.vocab, columns):
            weights = [source.weight_tile(v0, v1) for source in pair.sources]
            for part in parts:
                z = tiles_of(pair.blocks(all_ids[part]), weights, buffers, v0, v1)
                g = self.dlogits_tile(pair.student, z, part, v0, upstream, dead).to(out.dtype)
                if places is None:
                    out[part, v0:v1] = g
                else:
                    out[:, v0:v1].index_copy_(0, places[part], g)

    def _through_head(
        self, pair: Pair, student: HeadRows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        all_ids, options = self.sweep.ids, self.options
        parts, columns, buffers = self.sweep.tiling(pair, buffers=7, slice_width=student.width)
        sums = HeadGradients(student, all_ids, need, into=options.weight_into, grad_filter=options.grad_filter)
        for v0, v1 in columns_of(student.columns, columns):
            with sums.columns(v0, v1) as tile:
                weights = [tile, *[source.weight_tile(v0, v1) for source in pair.sources[1:]]]
                for part in parts:
                    blocks = pair.blocks(all_ids[part])
                    z = tiles_of(blocks, weights, buffers, v0, v1)
                    g = self.dlogits_tile(student, z, part, v0, upstream, dead)
                    hidden = blocks[0].hidden
                    hidden = hidden if dead is None else hidden.masked_fill(dead[part], 0.0)
                    sums.add(part, hidden, g, upstream[part] if upstream.dim() == 1 else None)
                weights = tile = None  # released before the next ones are made
        return sums.finished()


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
        return replace(
            self,
            sweep=self.sweep.restricted_to(places),
            terms=[term._replace(rows=rows_of_all(term.rows, places)) for term in self.terms],
            factor=self.factor[places],
            finite=self.finite[places],
            labels=None if self.labels is None else self.labels[places],
            ce=None if self.ce is None else replace(self.ce, at_rows=rows_of_all(self.ce.at_rows, places)),
        )

    def fill_rows(self, pair: Pair, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool) -> bool:
        matrices = [source.in_place for source in pair.sources]
        plain = None not in matrices and pair.student.scale == 1.0 and pair.student.softcap is None
        # a clipped row may have scalars that are not finite, which the kernel takes for a row without any gradient
        if self.sweep.backend != "triton" or not plain or (self.ce is not None and self.clipped):
            return False
        upstream = upstream if dead is None else upstream.masked_fill(dead[:, 0], 0.0)
        weights = (upstream * self.factor).masked_fill(upstream == 0, 0.0)
        where = {"row_ids": self.sweep.ids, "out": out, "scatter": scatter, "label": self._label(upstream, weights)}
        self._kernel(*matrices, slice(None), weights, **where)
        return True

    def _label(self, upstream: Tensor, weights: Tensor) -> tuple[Tensor, ...] | None:
        """What the labels add to the gradient of whole rows, for the Triton kernel; weights is upstream * factor."""
        if self.labels is None:
            return None
        from tip_kernels.backends.triton.row_grad import Label

        push = torch.zeros_like(weights)
        for term in self.terms:
            if "label_factor" in term.rows:
                push += term.weight * term.rows["label_factor"] * weights / self.sweep.temperature
        if self.ce is None:
            return Label(self.labels, push)
        weight = upstream * self.ce.weight * (self.labels != IGNORE_LABEL)
        return Label(self.labels, push - weight, weight, self.ce.at_rows["shift_s"], self.ce.at_rows["logsum_s"])

    def dlogits_tile(
        self, student: Rows, z: list[Tensor], part: slice, v0: int, upstream: Tensor, dead: Tensor | None
    ) -> Tensor:
        z_s, z_t = z
        up = upstream[part] * student.scale
        slope = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
        dce = None if self.ce is None else self._cross_entropy_tile(z_s, part, student.first + v0)
        g = self._divergence_gradient(z_s, z_t, part, up * self.factor[part])
        for term in self.terms:
            if "label_factor" in term.rows:
                value = term.weight * term.rows["label_factor"][part] * up * self.factor[part]
                value = value.unsqueeze(1) / self.sweep.temperature_at(part)
                add_columns(g, self.labels[part].unsqueeze(1), student.first + v0, value)
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
        g = row_grad.dlogits(over_(z_s, tau), over_(z_t, tau), terms, self.sweep.columns_at(part))
        return g.mul_(weights.unsqueeze(1) / tau)

    def _kernel(self, z_s: Tensor, z_t: Tensor, part: slice, weights: Tensor, **where: object) -> Tensor:
        """The same by the Triton kernel, which reads tiles or whole rows."""
        from tip_kernels.backends.triton import row_grad as kernels

        terms = [kernels.Term(term.weight, term.name, term.params, rows_of_all(term.rows, part)) for term in self.terms]
        tau = self.sweep.temperature
        tau = tau[part] if isinstance(tau, Tensor) else tau
        return kernels.row_grad(
            z_s, z_t, weights, rows_of_all(self.sweep.normalizers, part), terms, temperature=tau, **where
        )

    def _cross_entropy_tile(self, z_s: Tensor, part: slice, v0: int) -> Tensor:
        """ce.weight * (p_s - one-hot(label)) at temperature 1, 0 in rows without a label."""
        shift, logsum = (self.ce.at_rows[name][part].unsqueeze(1) for name in ("shift_s", "logsum_s"))
        weight = (self.labels[part] != IGNORE_LABEL).unsqueeze(1) * self.ce.weight
        tile = row_grad.exp(row_grad.log_probabilities(z_s.clone(), shift, logsum)).mul_(weight)
        add_columns(tile, self.labels[part].unsqueeze(1), v0, -weight)
        return tile
