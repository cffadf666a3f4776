"""The loss of kept rows: its value from statistics, its gradient one sweep from each row to the leaves of the source.

    Objective                what is learned of a row
    differentiated           its value, and the sweep that is its gradient
    LeafSweep, GradientSweep d(logits) tile by tile, into the logits or through the head
    Balance                  the entry of a row that the others fix, where the student is sure of a token
    HeadGradients            d(hidden) = g W and d(weight) = g^T hidden, summed up tile by tile; g is d(loss)/d(logits)
    with_gradient            attaches a sweep to values that were measured without a graph

N rows, S kept rows, R rows of a block (r in memory), V vocabulary, C columns of a tile, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tip_kernels._checks import not_none
from tip_kernels.backends.products import addmm_, mm
from tip_kernels.distributed.collectives import all_reduce_sum_
from tip_kernels.distributed.shards import Shard
from tip_kernels.learn.divergences import (
    GATE,
    Divergence,
    Row,
    Scalars,
    Term,
    exp,
    gradient_of_tile,
    log_probabilities,
    sums_of_tile,
)
from tip_kernels.learn.grad_filter import GradFilter
from tip_kernels.measure.sweep import NO_DOUBLE_BACKWARD
from tip_kernels.measure.topk_teacher import add_columns
from tip_kernels.sources.pair import HeadBlock, HeadRows, LogitRows, Pair, Rows, Tiling
from tip_kernels.stats import IGNORE_LABEL, LABEL_FIELDS, NORMALIZER_FIELDS, Fields

if TYPE_CHECKING:
    from tip_kernels.backends.triton.row_grad import Label

LN2 = math.log(2.0)
ENTRY_ROWS = 1024  # of hidden states gathered at a time


@dataclass(frozen=True)
class GradOptions:
    """How gradients are made and where they go; never what they are."""

    workspace: int  # bytes
    layout: str = "dense"  # of a gradient of logits: "dense", "compact" or "inplace"
    weight_into: Tensor | None = None  # (V, H) where d(weight) of a Head is added, instead of returned
    grad_filter: GradFilter | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a row: (1 - ce_weight) * tau^2 * divergence + ce_weight * cross-entropy, tau^2 only where asked.

    The divergence is the sum of its terms, each times its gate where there are gates.
    """

    divergence: Divergence
    temperature: float | Tensor = 1.0  # a tensor is (N,)
    labels: Tensor | None = None  # (N,)
    ce_weight: float = 0.0
    temperature_sq: bool = False
    gates: tuple[Tensor, ...] = ()  # (N,) each, of divergence.terms

    def at(self, temperature: float | Tensor) -> Objective:
        return replace(self, temperature=temperature)

    @property
    def divergence_weight_is_zero(self) -> bool:
        """Whether the label loss stands alone, so that a divergence of +inf must not matter: 0 * inf is NaN."""
        return self.ce_weight == 1

    def temperature_at(self, ids: Tensor) -> float | Tensor:
        """The temperature of the rows ids, a float or (S,)."""
        return self.temperature[ids] if isinstance(self.temperature, Tensor) else self.temperature

    def labels_at(self, ids: Tensor) -> Tensor:
        """The labels (S,) of the rows ids, where they are read."""
        assert self.labels is not None
        return self.labels[ids]

    def gates_at(self, ids: Tensor) -> tuple[Tensor, ...]:
        """(S,) the gates of the rows ids."""
        return tuple([gate[ids] for gate in self.gates])

    def factor(self, ids: Tensor, like: Tensor) -> Tensor:
        """What multiplies the divergence of the rows ids, of the shape of `like` (S,)."""
        factor = 1.0 - self.ce_weight
        if self.temperature_sq:
            factor = factor * self.temperature_at(ids) ** 2
        return factor if isinstance(factor, Tensor) else torch.full_like(like, factor)


@dataclass(frozen=True)
class RowsToLearn:
    """Kept rows, and what was measured of them."""

    ids: Tensor  # (S,) int64
    measured: Fields  # (S,) shift and logsum of both models, and what the objective needs
    at_one: Scalars | None = None  # (S,) shift_s, logsum_s and logp_s at temperature 1, for a label loss


def swept_sums(sweep: RowSweep, pair: Pair, divergences: list[Divergence]) -> list[dict[str, Tensor]]:
    """The row sums of two-pass divergences, each {name: (S,)}, by one sweep."""
    return sweep.sums_of(pair, divergences)


def differentiated(
    pair: Pair,
    objective: Objective,
    rows: RowsToLearn,
    options: GradOptions,
    sums_of: Callable[[RowSweep, Pair, list[Divergence]], list[dict[str, Tensor]]] = swept_sums,
) -> tuple[Tensor, GradientSweep]:
    """The (S,) loss of rows whose statistics are known, without a graph, and the sweep that is its gradient."""
    divergence, measured = objective.divergence, rows.measured
    normalizers: dict[str, Tensor] = {}
    for name in NORMALIZER_FIELDS:
        normalizers[name] = measured[name]
    tau, backend, two_pass = objective.temperature_at(rows.ids), pair.backend, []
    parts = divergence.terms
    for _, term in parts:
        backend = backend if term.kernel else "eager"
        if term.sums:
            two_pass.append(term)
    sweep = RowSweep(rows.ids, normalizers, tau, options.workspace, backend)
    sums = iter(sums_of(sweep, pair, two_pass) if two_pass else ())
    value, terms = _zero(measured) if objective.gates else torch.zeros_like(normalizers["logsum_s"]), []
    for i, (weight, term) in enumerate(parts):
        row: Row = {**measured, **next(sums)} if term.sums else measured
        of_term, scalars = weight * term.value(row), term.scalars(row)
        if objective.gates:
            of_term, scalars = gated(of_term, scalars, objective.gates[i][rows.ids])
        value = value + of_term
        terms.append(Term(weight, term, scalars))
    loss, factor = _scaled_loss(objective, measured, value, objective.factor(rows.ids, value))
    ce = None if rows.at_one is None else CrossEntropy(objective.ce_weight, rows.at_one)
    reads_labels = ce is not None or divergence.needs & LABEL_FIELDS
    labels = objective.labels_at(rows.ids) if reads_labels else None
    if ce is not None:
        loss = loss - ce.logp_of(labels)
    masked = objective.divergence_weight_is_zero or divergence.max_per_row is not None
    return loss, GradientSweep(sweep, options, terms, factor, torch.isfinite(loss), labels, ce, masked)


def _zero(measured: Fields) -> Tensor:
    """(S,) 0, but NaN in a NaN row."""
    of_s, of_t = measured["logsum_s"], measured["logsum_t"]
    return torch.zeros_like(of_s).masked_fill(of_s.isnan() | of_t.isnan(), math.nan)


def _scaled_loss(objective: Objective, measured: Fields, value: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) the divergence as it counts in the loss, and what its gradient is multiplied by."""
    limit = objective.divergence.max_per_row
    if objective.divergence_weight_is_zero:  # it matters no more
        return _zero(measured), factor
    if limit is None:
        return value * factor, factor
    return value.clamp(max=limit) * factor, torch.where(value > limit, 0.0, factor)


def gated(value: Tensor, scalars: dict[str, Tensor], gate: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A term's value and row scalars under its gate, (S,) each: where that is 0 the term is left out, NaN or not."""
    out = gate == 0
    scalars = {name: scalar.masked_fill(out, 0.0) for name, scalar in scalars.items()}
    return (gate * value).masked_fill(out, 0.0), scalars | {GATE: gate}


@dataclass(frozen=True)
class RowSweep:
    """What every sweep over kept rows shares: the rows, both models' normalizers, and how tiles are made."""

    ids: Tensor  # (S,) int64
    normalizers: Scalars  # (S,) shift and logsum of both models
    temperature: float | Tensor  # or (S,)
    workspace: int
    backend: str

    def restricted_to(self, places: Tensor) -> RowSweep:
        return replace(
            self,
            ids=self.ids[places],
            normalizers=rows_of_all(self.normalizers, places),
            temperature=self.temperature[places] if isinstance(self.temperature, Tensor) else self.temperature,
        )

    def tiling(self, pair: Pair) -> Tiling:
        """The tiles of the rows: the same for row sums and the gradient that reads them, which then see equal bits."""
        slice_width = pair.student.width if isinstance(pair.student, HeadRows) else 0
        return pair.tiling(self.ids.numel(), self.workspace, buffers=8, slice_width=slice_width)

    def sure_columns(self, z_s: Tensor, part: slice, at_one: Scalars | None) -> tuple[Tensor, Tensor]:
        """The column of the largest logit of each row of a tile (R, C), and whether its probability is above 1/2.

        That is at the temperature of the sweep or, beside a label loss, at 1.
        """
        tau = self.temperature[part] if isinstance(self.temperature, Tensor) else self.temperature
        bound = (self.normalizers["shift_s"][part] + self.normalizers["logsum_s"][part] - LN2) * tau
        if at_one is not None:
            bound = torch.minimum(bound, at_one["shift_s"][part] + at_one["logsum_s"][part] - LN2)
        sure = z_s.amax(1) > bound
        if sure.device.type == "cpu" and not sure.any():
            return torch.zeros_like(sure, dtype=torch.int64), sure
        return z_s.argmax(1), sure

    def temperature_at(self, part: slice) -> float | Tensor:
        return self.temperature[part].unsqueeze(1) if isinstance(self.temperature, Tensor) else self.temperature

    def columns_at(self, part: slice) -> dict[str, Tensor]:
        return {name: value[part].unsqueeze(1) for name, value in self.normalizers.items()}

    @torch.no_grad()
    def sums_of(self, pair: Pair, divergences: Sequence[Divergence]) -> list[dict[str, Tensor]]:
        """The row sums of each two-pass divergence, {name: (S,)}."""
        tiling, done = self.tiling(pair), []
        with torch.autocast(pair.device.type, enabled=False):
            for part in tiling.parts or [slice(0, 0)]:
                totals: list[dict[str, Tensor]] = []
                for _, (z_s, z_t), _ in tiling.walk(pair.blocks(self.ids[part]), [None, None]):
                    sums = self._tile_sums(z_s, z_t, divergences, part)
                    for total, tile in zip(totals, sums, strict=False):
                        total.update({name: total[name] + tile[name] for name in total})
                    totals = totals or sums
                done.append(totals)
        sums = [
            {name: torch.cat([totals[i][name] for totals in done]) for name in each} for i, each in enumerate(done[0])
        ]
        if pair.shard is None:
            return sums
        every = all_reduce_sum_(torch.stack([x for named in sums for x in named.values()]), pair.shard.group)
        rows = iter(every)
        return [{name: next(rows) for name in named} for named in sums]

    def _tile_sums(
        self, z_s: Tensor, z_t: Tensor, divergences: Sequence[Divergence], part: slice
    ) -> list[dict[str, Tensor]]:
        if self.backend == "triton":
            from tip_kernels.backends.triton.row_grad import Term as KernelTerm
            from tip_kernels.backends.triton.row_sums import row_sums

            tau = self.temperature[part] if isinstance(self.temperature, Tensor) else self.temperature
            terms = [KernelTerm(1.0, not_none(divergence.kernel), divergence.params) for divergence in divergences]
            return row_sums(z_s, z_t, rows_of_all(self.normalizers, part), terms, temperature=tau)
        tau = self.temperature_at(part)
        return sums_of_tile(over_(z_s, tau), over_(z_t, tau), divergences, self.columns_at(part))


def rows_of_all(values: Scalars, places: Tensor | slice) -> dict[str, Tensor]:
    """Some rows of each of the tensors."""
    return {name: value[places] for name, value in values.items()}


def over_(z: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature, in place."""
    return z if isinstance(temperature, float) and temperature == 1.0 else z.div_(temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """The label loss of kept rows, at temperature 1."""

    weight: float
    at_rows: Scalars  # (S,) shift_s, logsum_s and logp_s at temperature 1

    def logp_of(self, labels: Tensor | None) -> Tensor:
        """weight * log p of the labels (S,), 0 in rows without one."""
        assert labels is not None
        return self.weight * torch.where(labels == IGNORE_LABEL, 0.0, self.at_rows["logp_s"])


@dataclass(frozen=True)
class LeafSweep:
    """Carries the gradient of something of each row to the student's leaves, the vocabulary in the outer loop.

    Each slice of d(weight) is complete when its tile is done and is written once; d(hidden) accumulates in fp32.
    """

    sweep: RowSweep
    options: GradOptions
    balances = False  # whether a row of d(logits at temperature 1) sums to 0
    keeps_rows = False  # whether rows without a gradient stay in the tiles

    def live(self, upstream: Tensor) -> Tensor:
        """(S,) bool: rows whose gradient is not 0."""
        raise NotImplementedError

    def restricted_to(self, places: Tensor) -> LeafSweep:
        raise NotImplementedError

    def dlogits_tile(
        self,
        student: Rows,
        z: list[Tensor],
        part: slice,
        v0: int,
        upstream: Tensor,
        dead: Tensor | None,
        balance: Balance | None,
    ) -> Tensor:
        """d(logits before scale and softcap) of one tile (R, C), fp32; z are the sources' tiles, overwritten.

        Leaves to balance, where there is one, the entries that it fixes; they are 0 in the tile.
        """
        raise NotImplementedError

    def fill_rows(self, pair: Pair, upstream: Tensor, dead: Tensor | None, out: Tensor, scatter: bool) -> bool:
        """Writes the gradient of logits in memory at once, where a kernel can; tells whether it did."""
        return False

    def run(self, pair: Pair, upstream: Tensor, need: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of the student's leaves, None where not needed."""
        live = self.live(upstream)
        task, dead = self, None
        if upstream.device.type == "cpu" and not self.keeps_rows:
            places = live.nonzero().squeeze(1)
            task, upstream = self.restricted_to(places), upstream[places]
        else:
            dead = (~live).unsqueeze(1)  # on a GPU dropping rows would have to wait
        if isinstance(pair.student, HeadRows):
            return task._through_head(pair, pair.student, upstream, need, dead)
        assert isinstance(pair.student, LogitRows)
        return task._to_logits(pair, pair.student, upstream, dead)

    def _to_logits(self, pair: Pair, student: LogitRows, upstream: Tensor, dead: Tensor | None) -> list[Tensor | None]:
        all_ids, leaf, layout = self.sweep.ids, student.leaves[0], self.options.layout
        if layout == "compact":
            out = leaf.new_zeros(all_ids.numel(), student.vocab)
            self.write(pair, upstream, dead, out, None)
            place = all_ids.unsqueeze(0)
            return [torch.sparse_coo_tensor(place, out, leaf.shape, is_coalesced=True, check_invariants=False)]
        if layout == "inplace":
            out = leaf
        elif student.matrix is not None:
            out = torch.zeros_like(student.matrix)
        else:
            out = leaf.new_zeros(student.n_rows, student.vocab)
        self.write(pair, upstream, dead, out, all_ids)
        if layout == "inplace":
            others = torch.ones(out.shape[0], 1, dtype=torch.bool, device=out.device).index_fill_(0, all_ids, False)
            out.masked_fill_(others, 0.0)
        # an alias, which autograd takes for a leaf's gradient as it is: it would copy the logits' own tensor
        return [out.view(leaf.shape)]

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
        tiling, balance = self.sweep.tiling(pair), self.balance(upstream)
        for v0, v1 in tiling.slices:
            weights = pair.weights(v0, v1)
            for part in tiling.parts:
                z = tiling.tiles(pair.blocks(all_ids[part]), weights, v0, v1)
                g = self.dlogits_tile(pair.student, z, part, v0, upstream, dead, balance).to(out.dtype)
                if places is None:
                    out[part, v0:v1] = g
                else:
                    out[:, v0:v1].index_copy_(0, places[part], g)
        if balance is not None:
            columns, values = balance.entries(None)
            rows = torch.arange(columns.numel(), device=out.device) if places is None else places
            place = rows, columns.clamp(min=0)
            out[place] = torch.where(columns < 0, out[place], values.to(out.dtype))

    def balance(self, upstream: Tensor) -> Balance | None:
        return Balance(upstream) if self.balances else None

    def _through_head(
        self, pair: Pair, student: HeadRows, upstream: Tensor, need: tuple[bool, ...], dead: Tensor | None
    ) -> list[Tensor | None]:
        all_ids, options = self.sweep.ids, self.options
        tiling, balance = self.sweep.tiling(pair), self.balance(upstream)
        sums = HeadGradients(
            student, all_ids, need, into=options.weight_into, grad_filter=options.grad_filter,
            sure=None if balance is None else balance.columns,
        )  # fmt: skip
        for v0, v1 in tiling.slices:
            weights = pair.weights(v0, v1)
            assert weights[0] is not None  # of a Head
            with sums.columns(v0, v1, weights[0]):
                for part in tiling.parts:
                    blocks = pair.blocks(all_ids[part])
                    z = tiling.tiles(blocks, weights, v0, v1)
                    g = self.dlogits_tile(student, z, part, v0, upstream, dead, balance)
                    assert isinstance(blocks[0], HeadBlock)
                    hidden = blocks[0].hidden
                    hidden = hidden if dead is None else hidden.masked_fill(dead[part], 0.0)
                    sums.add(part, hidden, g, upstream[part] if upstream.dim() == 1 else None)
            weights = []  # released before the next ones are made
        if balance is not None:
            sums.add_entries(*balance.entries(student.shard))
        return sums.finished()


@dataclass(frozen=True)
class GradientSweep(LeafSweep):
    """The gradient of sum_i upstream[i] * loss of row ids[i]; upstream is (S,)."""

    terms: list[Term]
    factor: Tensor  # (S,)
    finite: Tensor  # (S,) bool: a row whose loss is infinite or NaN has gradient 0
    labels: Tensor | None  # (S,)
    ce: CrossEntropy | None
    clipped: bool
    balances = True

    @property
    def keeps_rows(self) -> bool:
        """With row sums the tiles are those that the sums were made of: other products may round otherwise."""
        return any(term.divergence.sums for term in self.terms)

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
        z_s, z_t = [source.in_place for source in pair.sources]
        plain = pair.student.scale == 1.0 and pair.student.softcap is None
        # a clipped row may have scalars that are not finite, which the kernel takes for a row without any gradient
        if self.sweep.backend != "triton" or not plain or (self.ce is not None and self.clipped):
            return False
        if z_s is None or z_t is None:
            return False
        upstream = upstream if dead is None else upstream.masked_fill(dead[:, 0], 0.0)
        weights = (upstream * self.factor).masked_fill(upstream == 0, 0.0)
        label = self._label(upstream, weights)
        where = slice(None), weights, out, self.sweep.ids, scatter, label
        self._kernel(z_s, z_t, *where, balance=True)
        return True

    def _label(self, upstream: Tensor, weights: Tensor) -> Label | None:
        """What the labels add to the gradient of whole rows, for the Triton kernel; weights is upstream * factor."""
        if self.labels is None:
            return None
        from tip_kernels.backends.triton.row_grad import Label

        push = torch.zeros_like(weights)
        for term in self.terms:
            if "label_factor" in term.rows:
                push += label_push(term, slice(None), weights) / self.sweep.temperature
        if self.ce is None:
            return Label(self.labels, push)
        weight = upstream * self.ce.weight * (self.labels != IGNORE_LABEL)
        return Label(self.labels, push - weight, weight, self.ce.at_rows["shift_s"], self.ce.at_rows["logsum_s"])

    def dlogits_tile(
        self,
        student: Rows,
        z: list[Tensor],
        part: slice,
        v0: int,
        upstream: Tensor,
        dead: Tensor | None,
        balance: Balance | None,
    ) -> Tensor:
        z_s, z_t = z
        assert balance is not None
        up = upstream[part] * student.scale
        found = self.sweep.sure_columns(z_s, part, None if self.ce is None else self.ce.at_rows)
        slope = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
        dce = None if self.ce is None else self._cross_entropy_tile(self.ce, z_s, part, student.first + v0)
        g = self._divergence_gradient(z_s, z_t, part, up * self.factor[part])
        for term in self.terms:
            if "label_factor" in term.rows:
                assert self.labels is not None
                value = label_push(term, part, up * self.factor[part]).unsqueeze(1) / self.sweep.temperature_at(part)
                add_columns(g, self.labels[part].unsqueeze(1), student.first + v0, value)
        if self.clipped:  # a clipped row may be an infinite one, whose g is not finite
            g.masked_fill_((self.factor[part] == 0).unsqueeze(1), 0.0)
        if dce is not None:
            g.add_(dce.mul_(up.unsqueeze(1)))
        if dead is not None:
            g.masked_fill_(dead[part], 0.0)
            slope = slope if slope is None else slope.masked_fill_(dead[part], 0.0)
        balance.take(g, *found, slope, part, student.first + v0)
        return g if slope is None else g.mul_(slope)

    def _divergence_gradient(self, z_s: Tensor, z_t: Tensor, part: slice, weights: Tensor) -> Tensor:
        """weights * d(divergence)/dz of one tile (R, C); weights is (R,)."""
        if self.sweep.backend == "triton":
            return self._kernel(z_s, z_t, part, weights, torch.empty_like(z_s))
        tau = self.sweep.temperature_at(part)
        g = gradient_of_tile(over_(z_s, tau), over_(z_t, tau), self.terms, part, self.sweep.columns_at(part))
        return g.mul_(weights.unsqueeze(1) / tau)

    def _kernel(
        self,
        z_s: Tensor,
        z_t: Tensor,
        part: slice,
        weights: Tensor,
        out: Tensor,
        row_ids: Tensor | None = None,
        scatter: bool = False,
        label: Label | None = None,
        balance: bool = False,
    ) -> Tensor:
        """The same by the Triton kernel, which reads tiles or whole rows."""
        from tip_kernels.backends.triton import row_grad as kernels

        terms = [
            kernels.Term(weight, not_none(divergence.kernel), divergence.params, rows, rows.get(GATE))
            for weight, divergence, rows in [(*term[:2], rows_of_all(term.rows, part)) for term in self.terms]
        ]
        tau = self.sweep.temperature
        tau = tau[part] if isinstance(tau, Tensor) else tau
        return kernels.row_grad(
            z_s, z_t, weights, rows_of_all(self.sweep.normalizers, part), terms, temperature=tau, out=out,
            row_ids=row_ids, scatter=scatter, label=label, balance=balance,
        )  # fmt: skip

    def _cross_entropy_tile(self, ce: CrossEntropy, z_s: Tensor, part: slice, v0: int) -> Tensor:
        """ce.weight * (p_s - one-hot(label)) at temperature 1, 0 in rows without a label."""
        assert self.labels is not None
        shift, logsum = (ce.at_rows[name][part].unsqueeze(1) for name in ("shift_s", "logsum_s"))
        weight = (self.labels[part] != IGNORE_LABEL).unsqueeze(1) * ce.weight
        tile = exp(log_probabilities(z_s.clone(), shift, logsum)).mul_(weight)
        add_columns(tile, self.labels[part].unsqueeze(1), v0, -weight)
        return tile


def label_push(term: Term, part: slice, weights: Tensor) -> Tensor:
    """weights (R,) times what the term adds at the labels of the rows part."""
    push = term.weight * term.rows["label_factor"][part] * weights
    return push * term.rows[GATE][part] if GATE in term.rows else push


class Balance:
    """What a row of d(logits) has beside its sure entry: a row sums to 0, as the gradient of all that a softmax feeds.

    Where the student is sure of a token, the formula of its entry is a difference of numbers near 1 and keeps none of
    its digits; the others are small and exact, and their sum is the entry, but for the sign.
    """

    def __init__(self, upstream: Tensor) -> None:
        self.others = torch.zeros_like(upstream)  # (S,)
        self.columns = torch.full(upstream.shape, -1, dtype=torch.int64, device=upstream.device)
        self.slope: Tensor | None = None  # of the softcap at the entry

    def take(self, g: Tensor, columns: Tensor, sure: Tensor, slope: Tensor | None, part: slice, first: int) -> None:
        """Adds up a tile g (R, C) and empties its sure entries; `first` is its first token."""
        place = columns.unsqueeze(1)
        g.scatter_(1, place, torch.where(sure.unsqueeze(1), 0.0, g.gather(1, place)))
        self.others[part] += g.sum(1)
        self.columns[part] = torch.where(sure, columns + first, self.columns[part])
        if slope is not None:
            if self.slope is None:
                self.slope = torch.ones_like(self.others)
            here = self.slope[part]
            here.copy_(torch.where(sure, slope.gather(1, place).squeeze(1), here))

    def entries(self, shard: Shard | None) -> tuple[Tensor, Tensor]:
        """The token of each row's entry, -1 for none (here), and its value; (S,) each."""
        others = self.others if shard is None else all_reduce_sum_(self.others, shard.group)
        values = torch.where(self.columns < 0, 0.0, -others)
        return self.columns, values if self.slope is None else values * self.slope


class HeadGradients:
    """Sums of the gradients of a head's leaves over rows ids (S,), vocabulary slice by slice.

        for v0, v1 in ...:
            with sums.columns(v0, v1, tile):            # the head's rows v0 to v1, (C, H)
                sums.add(part, hidden, g)               # for each part of the rows

    need    which of hidden, weight and bias want a gradient
    wide    sums of weight stay fp32 until they are finished: the vocabulary is walked several times, or they are scaled
            later; else each slice is rounded to the weight's dtype when it is closed
    into    where d(weight) is added instead of into a buffer of its own, (V, H)
    buffer  that buffer, if there is one already; what it holds is lost
    sure    (S,) the token of each row whose entry is added in the end, -1 for none, as found by then: of a weight
            narrower than fp32 the rest of its sum is kept meanwhile, (S, H) in its dtype, so that it is rounded once
    """

    def __init__(
        self,
        student: HeadRows,
        ids: Tensor,
        need: tuple[bool, ...],
        *,
        wide: bool = False,
        into: Tensor | None = None,
        grad_filter: GradFilter | None = None,
        buffer: Tensor | None = None,
        sure: Tensor | None = None,
    ) -> None:
        self.student, self.ids, self.into, self.filter, self.sure = student, ids, into, grad_filter, sure
        need_hidden, need_weight, need_bias = (*need, False, False, False)[:3]
        weight, device = student.weight, ids.device
        self.hidden: Tensor | None = None  # the sums that are wanted
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.rest: Tensor | None = None
        if need_weight:
            dtype = torch.float32 if wide else weight.dtype
            if buffer is None and into is None:
                buffer = torch.empty(weight.shape, dtype=dtype, device=device)
            self.weight = buffer if into is None else into
            if sure is not None and self.weight is not None and self.weight.dtype != torch.float32:
                self.rest = torch.zeros(ids.numel(), student.width, dtype=self.weight.dtype, device=device)
        if need_bias:
            self.bias = torch.zeros(student.leaves[2].shape, device=device)
        if need_hidden:
            self.hidden = torch.zeros(ids.numel(), student.width, device=device)
        if grad_filter is not None:
            self.dropped = torch.zeros(ids.numel(), device=device)  # the sum that each row lacks
            self.row_sum = torch.zeros(student.width, device=device)  # of the head's rows
        self.walked = 0

    @contextmanager
    def columns(self, v0: int, v1: int, tile: Tensor) -> Iterator[None]:
        """Opens a slice of the vocabulary, in order, each once a pass; tile (C, H) holds its rows of the head."""
        self.v0, self.v1 = v0, v1
        first_pass = self.walked == v0
        self.tile = tile
        self.fresh = first_pass and self.into is None
        place = self.slice = None
        if self.weight is not None:
            place = self.slice = self.weight[v0:v1]
            if place.dtype != torch.float32:
                self.slice, self.fresh = torch.empty(place.shape, device=place.device), True
        if self.filter is not None and first_pass:
            self.row_sum += tile.float().sum(0)
        yield
        if place is not None and self.slice is not None:
            if self.fresh:
                self.slice.zero_()  # every tile was left out, or there was none
            if self.slice is not place:
                if self.into is not None:
                    self.slice += place
                place.copy_(self.slice)
                self._keep_rest(self.slice, place)
        self.walked = max(self.walked, v1)
        del self.tile, self.slice

    def add(self, part: slice, hidden: Tensor, g: Tensor, row_scale: Tensor | None = None) -> None:
        """Takes in g (r, C) fp32 of the open columns, of the rows ids[part] with hidden states (r, H).

        row_scale  (r,) the weights that g holds, for the filter's tolerance
        """
        if self.filter is not None and self.filter.drops(g, row_scale):
            self.dropped[part] += g.sum(1)
            return
        if self.bias is not None:
            self.bias[self.v0 : self.v1] += g.sum(0)
        g = g.to(self.tile.dtype)
        if self.slice is not None:
            _product_into(self.slice, g.t(), hidden, fresh=self.fresh)
            self.fresh = False
        if self.hidden is not None:
            _product_into(self.hidden[part], g, self.tile, fresh=False)

    def add_entries(self, tokens: Tensor, values: Tensor) -> None:
        """Takes in g of one token of each of the rows ids: tokens (S,), -1 for none, and values (S,) fp32."""
        student, columns = self.student, tokens - self.student.first
        if student.columns == 0 or len(tokens) == 0:  # a rank's share may be empty
            return
        here = (columns >= 0) & (columns < student.columns)
        own, values = torch.where(here, columns, student.columns), torch.where(here, values, 0.0)
        columns = columns.clamp(0, student.columns - 1)
        if self.bias is not None:
            self.bias.index_add_(0, columns, values)
        if self.hidden is not None:
            for out, at, g in zip(*(x.split(ENTRY_ROWS) for x in (self.hidden, columns, values)), strict=True):
                out.add_(_scaled(student.weight[at].to(student.dtype).float(), g))
        if self.weight is None:
            return
        if self.weight.dtype == torch.float32:
            for ids, at, g in zip(*(x.split(ENTRY_ROWS) for x in (self.ids, columns, values)), strict=True):
                self.weight.index_add_(0, at, _scaled(self._hidden_at(ids), g))
            return
        self._add_rounded_once(self.weight, own, values)

    def _add_rounded_once(self, weight: Tensor, columns: Tensor, values: Tensor) -> None:
        """Entries into a weight narrower than fp32, of each token once, with what the rounding of its slice left."""
        order = columns.argsort(stable=True)
        columns = columns[order]
        group = torch.zeros_like(columns)
        torch.cumsum(columns[1:] != columns[:-1], 0, out=group[1:])
        steps = list(zip(*(x.split(ENTRY_ROWS) for x in (order, columns, group)), strict=True))
        begun = torch.zeros(1, self.student.width, device=columns.device)  # of a token that goes on in the next step
        for i, (rows, at, groups) in enumerate(steps):
            slot = groups - groups[0]
            token = torch.full_like(at, self.student.columns).scatter_(0, slot, at)
            total = torch.zeros(len(at), self.student.width, device=columns.device)
            total.index_add_(0, slot, _scaled(self._hidden_at(self.ids[rows]), values[rows]))
            total[:1] += begun
            last, ready = slot[-1:], token < self.student.columns
            if i + 1 < len(steps):
                goes_on = steps[i + 1][2][0] == groups[-1]
                begun = torch.where(goes_on, total[last], 0.0)
                ready.index_copy_(0, last, ready[last] & ~goes_on)
            if self.rest is not None:
                total += torch.zeros_like(total).index_copy_(0, slot, self.rest[rows].float())
            # where there is no token to write, one that is written, or token 0 as it is, is written again
            some, pick = ready.any(), torch.where(ready, torch.arange(len(at), device=at.device), ready.long().argmax())
            token = torch.where(some, token[pick], 0)
            sums = weight[token].float() + torch.where(some, total[pick], 0.0)
            weight.index_copy_(0, token, sums.to(weight.dtype))

    def _keep_rest(self, exact: Tensor, rounded: Tensor) -> None:
        """What rounding takes from the sums (C, H) of tokens that get an entry in the end."""
        if self.sure is None or self.rest is None:
            return
        at = self.sure - self.student.first - self.v0
        here = (at >= 0) & (at < len(exact))
        rows = here.nonzero().squeeze(1) if here.device.type == "cpu" else torch.arange(len(at), device=at.device)
        for some in rows.split(ENTRY_ROWS):
            place = at[some].clamp(0, len(exact) - 1)
            rest = torch.where(here[some].unsqueeze(1), exact[place] - rounded[place].float(), 0.0)
            self.rest[some] += rest.to(self.rest.dtype)

    def _hidden_at(self, ids: Tensor) -> Tensor:
        """Hidden states (len(ids), H) as the products take them, in fp32."""
        hidden = self.student.hidden
        return hidden[torch.unravel_index(ids, hidden.shape[:-1])].to(self.student.dtype).float()

    def finished(self, factor: Tensor | None = None, into: Tensor | None = None) -> list[Tensor | None]:
        """The gradients of the leaves times factor (), once, in their dtypes and shapes.

        That of weight is None where it was added elsewhere, or is added to `into` now, before it is rounded.
        """
        student, weight = self.student, None
        if self.hidden is not None and student.shard is not None:
            all_reduce_sum_(self.hidden, student.shard.group)
        if self.hidden is not None and self.filter is not None:
            self.hidden.addcmul_(self.dropped.unsqueeze(1), self.row_sum.unsqueeze(0) / student.vocab)
        if factor is not None:
            for x in (self.hidden, self.weight if self.into is None else None, self.bias):
                if x is not None:
                    x.mul_(factor)
        hidden = None if self.hidden is None else self._rounded_hidden(self.hidden)
        if self.weight is not None and self.into is None:
            self.weight[self.walked :].zero_()  # beyond vocab_size
            if into is not None:
                into += self.weight
            weight = None if into is not None else self.weight.to(student.weight.dtype)
        bias = None if self.bias is None else self.bias.to(student.leaves[2].dtype)
        return [hidden, weight, bias][: len(student.leaves)]

    def _rounded_hidden(self, sums: Tensor) -> Tensor:
        """d(hidden) of all N rows in the leaf's dtype and shape, 0 where not of `ids`."""
        student = self.student
        out = torch.zeros(student.hidden.shape, dtype=student.hidden.dtype, device=self.ids.device)
        for part in range(0, self.ids.numel(), 4096):
            rows = sums[part : part + 4096].to(out.dtype)
            out.view(-1, student.width).index_copy_(0, self.ids[part : part + 4096], rows)
        return out


def _scaled(x: Tensor, g: Tensor) -> Tensor:
    """x (r, H) times g (r,), and 0 where g is 0, whatever x holds."""
    return (x * g.unsqueeze(1)).masked_fill_((g == 0).unsqueeze(1), 0.0)


def _product_into(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out (fp32) = a @ b where fresh, else out += a @ b; summed in fp32."""
    if a.dtype == torch.float32:
        mm(a, b, out=out) if fresh else addmm_(out, a, b)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
        out.copy_(product) if fresh else out.add_(product)


def with_gradient(values: Tensor, sweep: LeafSweep, pair: Pair) -> Tensor:
    """values (S, ...) as they are; backward runs the sweep."""
    return _WithGradient.apply(values, sweep, pair, *pair.student.leaves)


class Context(FunctionCtx):
    """What a backward finds of its forward: autograd's own, and what `save` keeps."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    constants: list[Tensor | None]
    n_leaves: int
    pair: Pair
    sweep: LeafSweep


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, values: Tensor, sweep: LeafSweep, pair: Pair, *leaves: Tensor) -> Tensor:
        save(ctx, pair)
        ctx.sweep = sweep
        return values.clone()

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        pair = saved(ctx)
        with torch.no_grad(), torch.autocast(upstream[0].device.type, enabled=False):
            grads = ctx.sweep.run(pair, upstream[0].detach(), ctx.needs_input_grad[3:])
        return None, None, None, *once(grads, pair.student.leaves)


def save(ctx: Context, pair: Pair) -> None:
    """Keeps a pair's tensors for backward, as autograd wants them kept."""
    # Saved tensors let autograd refuse a backward after an in-place change; those of inference mode cannot change.
    tensors = [*pair.student.leaves, *(pair.teacher.leaves if pair.teacher is not None else ())]
    kept = [None if tensor.is_inference() else tensor for tensor in tensors]
    ctx.save_for_backward(*kept)  # pyright: ignore[reportArgumentType]  (autograd takes None, torch's stub does not)
    ctx.constants = [tensor if tensor.is_inference() else None for tensor in tensors]
    ctx.n_leaves, ctx.pair = len(pair.student.leaves), pair.with_leaves()


def saved(ctx: Context) -> Pair:
    """The pair that `save` kept."""
    both = zip(ctx.saved_tensors, ctx.constants, strict=True)
    tensors = tuple([x for kept in both for x in kept if x is not None])  # one of the two
    return ctx.pair.with_leaves(tensors[: ctx.n_leaves], tensors[ctx.n_leaves :])


def once(grads: list[Tensor | None], leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients that cannot be differentiated again; with create_graph=True one of them would pass for 0."""
    if not torch.is_grad_enabled():
        return grads
    return [None if grad is None else _NoDoubleBackward.apply(grad, *leaves) for grad in grads]


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *leaves: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> NoReturn:
        raise RuntimeError(NO_DOUBLE_BACKWARD)
