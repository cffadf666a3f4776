"""The sweeps over kept rows: row sums that a class-B divergence needs, and the gradient of the student's source.

S kept rows, V vocabulary, C columns of a tile, R rows of a block, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tip_kernels.backends.eager import row_grad
from tip_kernels.distributed.collectives import added_up
from tip_kernels.learn.divergences import Divergence
from tip_kernels.learn.head_gradients import GradFilter, HeadGradients
from tip_kernels.measure.sweep import IGNORE_LABEL, columns_of, is_read_in_place, tile_shape, with_logits
from tip_kernels.sources.rows import HeadBlock, HeadRows, LogitBlock, LogitRows, Rows
from tip_kernels.sources.topk import TopKRows, add_columns, hide_columns

TWICE = "tip_kernels: cannot differentiate twice: the backward of a loss is one sweep without a graph"


@dataclass(frozen=True)
class CrossEntropy:
    """The label loss of kept rows, at temperature 1."""

    weight: float
    at_rows: Mapping[str, Tensor]  # (S,) shift_s, logsum_s and logp_s at temperature 1


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

    def row_sums(self, student: Rows, teacher: Rows, terms: list[Divergence]) -> dict[Divergence, dict[str, Tensor]]:
        """The row sums of class-B divergences, each {name: (S,)}, by one sweep; nothing is swept without any."""
        if not terms:
            return {}
        asked = [row_grad.Term(1.0, term.gradient, term.params, {}) for term in terms]
        if torch.compiler.is_compiling():
            from tip_kernels.learn import ops as compiled

            return dict(zip(terms, compiled.row_sums(self, student, teacher, asked), strict=True))
        return dict(zip(terms, self.sums_of(student, teacher, asked), strict=True))

    @torch.no_grad()
    def sums_of(self, student: Rows, teacher: Rows, terms: list[row_grad.Term]) -> list[dict[str, Tensor]]:
        """The row sums of each term; a term brings its name and parameters."""
        parts, columns, buffers = self.blocks([student, teacher], buffers=8)
        done: list[list[dict[str, Tensor]]] = []
        with torch.autocast(student.device.type, enabled=False):
            for part in parts or [slice(0, 0)]:
                blocks = [student.block(self.ids[part]), teacher.block(self.ids[part])]
                totals: list[dict[str, Tensor]] = []
                for v0, v1 in columns_of(max(student.columns, 1), columns):
                    z_s, z_t = _tiles(blocks, [None, None], buffers, v0, v1)
                    sums = self._tile_sums(z_s, z_t, terms, part)
                    totals = (
                        [{k: a[k] + b[k] for k in a} for a, b in zip(totals, sums, strict=True)] if totals else sums
                    )
                done.append(totals)
        sums = [
            {name: torch.cat([totals[i][name] for totals in done]) for name in done[0][i]} for i in range(len(terms))
        ]
        if student.shard is None:
            return sums
        every = added_up(torch.stack([x for named in sums for x in named.values()]), student.shard.group)
        rows = iter(every)
        return [{name: next(rows) for name in named} for named in sums]

    def _tile_sums(self, z_s: Tensor, z_t: Tensor, terms: list[row_grad.Term], part: slice) -> list[dict[str, Tensor]]:
        if self.backend == "triton":
            from tip_kernels.backends.triton.row_sums import row_sums

            tau = self.temperature[part] if isinstance(self.temperature, Tensor) else self.temperature
            return row_sums(z_s, z_t, _at(self.normalisers, part), terms, temperature=tau)
        tau = self.temperature_at(part)
        return row_grad.row_sums(_over(z_s, tau), _over(z_t, tau), terms, self.columns_at(part))


@dataclass(frozen=True)
class LeafSweep:
    """Carries the gradient of something of each row to the student's leaves, the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    sweep: Sweep
    grad_logits: str
    weight_into: Tensor | None = field(default=None, kw_only=True)  # where d(weight) is added, instead of returned
    grad_filter: GradFilter | None = field(default=None, kw_only=True)

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
        all_ids, leaf, matrix = self.sweep.ids, student.leaves[0], student.matrix
        if self.grad_logits == "inplace":
            out = matrix
        elif matrix is not None and self.grad_logits == "dense":
            out = torch.zeros_like(matrix)
        else:
            out = leaf.new_zeros(student.n_rows if self.grad_logits == "dense" else all_ids.numel(), student.vocab)
        self.write(student, teacher, upstream, dead, out, None if self.grad_logits == "compact" else all_ids)
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

    def write(
        self,
        student: LogitRows,
        teacher: Rows | TopKRows,
        upstream: Tensor,
        dead: Tensor | None,
        out: Tensor,
        places: Tensor | None,
    ) -> None:
        """Writes the gradient of logits in memory into rows places (S,) of out (., V), or into its first S.

        out may be the logits' own storage where row i of the sweep is row places[i] of both, or i without places.
        """
        scatter = places is not None
        if (not scatter or places is self.sweep.ids) and self.fill_rows(student, teacher, upstream, dead, out, scatter):
            return
        sources, all_ids = with_logits(student, teacher), self.sweep.ids
        parts, columns, buffers = self.sweep.blocks(sources, buffers=7)
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

    def _through_head(
        self, student: HeadRows, teacher: Rows | TopKRows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        sources, all_ids = with_logits(student, teacher), self.sweep.ids
        parts, columns, buffers = self.sweep.blocks(sources, buffers=7, slice_width=student.width)
        sums = HeadGradients(student, all_ids, need, into=self.weight_into, grad_filter=self.grad_filter)
        for v0, v1 in columns_of(student.columns, columns):
            with sums.columns(v0, v1) as tile:
                weights = [tile, *(_weight_tile(source, v0, v1) for source in sources[1:])]
                for part in parts:
                    blocks = [source.block(all_ids[part]) for source in sources]
                    z = _tiles(blocks, weights, buffers, v0, v1)
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
            terms=[term._replace(rows=_at(term.rows, places)) for term in self.terms],
            factor=self.factor[places],
            finite=self.finite[places],
            labels=None if self.labels is None else self.labels[places],
            ce=None if self.ce is None else replace(self.ce, at_rows=_at(self.ce.at_rows, places)),
        )

    def fill_rows(
        self, student: Rows, teacher: Rows, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool
    ) -> bool:
        plain = is_read_in_place(student) and is_read_in_place(teacher)
        plain = plain and student.scale == 1.0 and student.softcap is None
        # a clipped row may have scalars that are not finite, which the kernel takes for a row without any gradient
        if self.sweep.backend != "triton" or not plain or (self.ce is not None and self.clipped):
            return False
        upstream = upstream if dead is None else upstream.masked_fill(dead[:, 0], 0.0)
        weights = (upstream * self.factor).masked_fill(upstream == 0, 0.0)
        where = {"row_ids": self.sweep.ids, "out": out, "scatter": scatter, "label": self._label(upstream, weights)}
        self._kernel(student.matrix, teacher.matrix, slice(None), weights, **where)
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
        g = row_grad.dlogits(_over(z_s, tau), _over(z_t, tau), terms, self.sweep.columns_at(part))
        return g.mul_(weights.unsqueeze(1) / tau)

    def _kernel(self, z_s: Tensor, z_t: Tensor, part: slice, weights: Tensor, **where: object) -> Tensor:
        """The same by the Triton kernel, which reads tiles or whole rows."""
        from tip_kernels.backends.triton import row_grad as kernels

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
        return replace(self, sweep=self.sweep.restricted_to(places), listed=self.listed[places], labels=labels)

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
