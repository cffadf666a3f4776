"""The measuring sweep: walks rows and vocabulary tile by tile and leaves a handful of numbers a row.

What one walk gathers of a block of rows are moments, the label's logit and the largest logits: an accumulator each. A
rank of a vocabulary-parallel group walks its own columns; what it leaves of a block is gathered, while the next block
is walked, and merged as the parts of a row are. R rows of a block, C columns of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tip_kernels.backends.eager import online
from tip_kernels.backends.eager.online import EagerMoments
from tip_kernels.backends.eager.toplist import TopList
from tip_kernels.distributed.collectives import gather_states
from tip_kernels.measure import fused
from tip_kernels.measure.topk_teacher import (
    hide_columns,
    partial_fields,
    student_outcomes,
    take_columns,
)
from tip_kernels.sources.pair import LogitRows, Pair, Rows
from tip_kernels.sources.topk import TopKRows
from tip_kernels.stats import (
    LABEL_FIELDS,
    MARGIN_FIELDS,
    PRIVATE_FIELDS,
    STUDENT_FIELDS,
    TOP_FIELDS,
    Blend,
    Fields,
)

NO_DOUBLE_BACKWARD = "tip_kernels: cannot differentiate twice: the backward of a loss is one sweep without a graph"

LIST_WORDS = 14  # fp32 numbers an entry of a row's list while lists are merged

State = online.State  # of the same names, shapes and dtypes on every rank


@torch.no_grad()
def measure(
    pair: Pair,
    want: frozenset[str | Blend],
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    workspace: int,
    record: Sequence[Tensor | None] | None = None,
) -> Fields:
    """The wanted statistics of all rows, or of the rows with the given ids, as {field: (len(rows),)}.

    Private fields (shift and logsum of each model) come without asking. labels and temperature are (N,) over all rows.
    On the Triton backend the kernels measure everything but blends, top-k lists and a student beside a TopK, which are
    tiled torch everywhere; a Head's products are a library's, or the kernel's own where its table says so. Beside a
    TopK the private fields hold the student's logits of its tokens, (len(rows), K). record takes the logits of each
    source as they pass, fp32 (len(rows), V) at temperature 1, or None to let them go.
    """
    if rows is not None:
        labels = None if labels is None else labels[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    triton = pair.topk is None and pair.backend == "triton"
    with torch.autocast(pair.device.type, enabled=False):
        n_rows = pair.n_rows if rows is None else rows.numel()
        kernel = fused.kernel_for(pair, want, n_rows) if triton and record is None else None
        if kernel is not None:
            out = kernel(pair.sources, want, rows, labels, temperature, workspace)
        else:
            out = _walk(pair, want, rows, labels, temperature, top_k, workspace, triton, record)
        if pair.topk is not None:
            out |= _beside_topk(out, pair.topk, pair.vocab, want, rows, labels, workspace)
    for name in out.keys() - want - PRIVATE_FIELDS:
        del out[name]
    return out


def _walk(
    pair: Pair,
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    top_k: int,
    workspace: int,
    triton: bool,
    record: Sequence[Tensor | None] | None,
) -> Fields:
    """The statistics of rows, walked block by block and tile by tile. labels and temperature are those of the rows."""
    made = _Accumulators(pair, want, pair.n_rows if rows is None else rows.numel(), top_k, workspace, triton)
    done: list[Fields] = []
    pending: Callable[[], Fields] | None = None
    for part in made.tiling.parts or [slice(0, 0)]:
        ids = part if rows is None else rows[part]
        copies = _copies(record, len(pair.sources), part)
        found = made.of(part, ids, labels, temperature)
        for v0, tiles, scratch in made.tiling.walk(pair.blocks(ids), copies):
            for accumulator in found:
                accumulator.add(tiles, v0, scratch)
        states: list[State] = []
        for accumulator in found:
            states.append(accumulator.state())
        merged = gather_states(states, pair.shard.group) if pair.shard else partial(list, [states])
        if pending is not None:  # this block's products have hidden the other one's collective
            done.append(pending())
        pending = partial(_finished, found, merged)
    if pending is not None:
        done.append(pending())
    return done[0] if len(done) == 1 else {name: torch.cat([fields[name] for fields in done]) for name in done[0]}


class _Accumulators:
    """How rows are cut into blocks and tiles, and what each block is to gather."""

    def __init__(
        self, pair: Pair, want: frozenset[str | Blend], n_rows: int, top_k: int, workspace: int, triton: bool
    ) -> None:
        self.pair, self.want, self.top_k, self.triton = pair, want, top_k, triton
        self.n_models = len(pair.sources)
        blends = frozenset([name for name in want if isinstance(name, Blend)])
        self.lists = bool(want & TOP_FIELDS or (want & MARGIN_FIELDS and (not triton or pair.shard)))
        row_words = self.n_models * LIST_WORDS * max(top_k, 2) if self.lists else 0
        buffers = 15 if self.lists else 6
        self.tiling = pair.tiling(n_rows, workspace, buffers, whole_parts=triton, row_words=row_words)
        self.fold = None
        if pair.topk is None and (not triton or blends):
            folded = blends if triton else want
            self.fold = online.Fold(self.tiling.rows, self.tiling.columns, self.n_models, folded, pair.device)

    def of(
        self, part: slice, ids: Tensor | slice, labels: Tensor | None, temperature: float | Tensor
    ) -> list[Accumulator]:
        """Those of one block: what may overwrite a tile comes last, and what reads others' fields before them."""
        n, pair, want = part.stop - part.start, self.pair, self.want
        tau = temperature[part] if isinstance(temperature, Tensor) else temperature
        found: list[Accumulator] = [TopLists(n, pair.sources, want, self.top_k, tau)] if self.lists else []
        if labels is not None:
            found.append(LabelLogits(labels[part], pair.student, self.n_models, tau))
        if self.triton:
            margins = bool(want & MARGIN_FIELDS) and not self.lists
            found.append(TritonMoments(n, pair.student, tau, self.n_models == 2, margins))
        if pair.topk is not None:
            found.append(ListedMoments(pair.topk.ids[ids], self.tiling.columns, pair.vocab, want))
        if self.fold is not None:
            found.append(EagerMoments(self.fold, tau))
        return found


def _copies(record: Sequence[Tensor | None] | None, n_models: int, part: slice) -> list[Tensor | None]:
    """Where a block's logits of each source are to be copied."""
    copies: list[Tensor | None] = [None] * n_models
    for i, z in enumerate(record or ()):
        copies[i] = None if z is None else z[part]
    return copies


def _finished(accumulators: list[Accumulator], merged: Callable[[], list[list[State]]]) -> Fields:
    """A block's statistics; waits for the other ranks' states."""
    fields: Fields = {}
    for accumulator, states in reversed(list(zip(accumulators, zip(*merged(), strict=True), strict=True))):
        fields |= accumulator.finish(list(states), fields)
    return fields


def _beside_topk(
    out: Fields,
    topk: TopKRows,
    vocab: int,
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    workspace: int,
) -> Fields:
    """What compares the student's outcomes, measured in out, with those of a TopK."""
    ids = slice(None) if rows is None else rows
    y = student_outcomes(out)
    lp_t = topk.log_outcomes(ids, vocab, y[:, -1].isneginf())
    if topk.tail == "ignore":
        fields = partial_fields(y, lp_t)
    else:
        outcomes = Pair(LogitRows(y[:, : lp_t.shape[1]]), LogitRows(lp_t))
        compared = want - STUDENT_FIELDS - LABEL_FIELDS - MARGIN_FIELDS - {"lse_t"}
        fields = measure(outcomes, compared, workspace=workspace)
        del fields["shift_s"], fields["logsum_s"]
    if labels is not None:
        fields["logp_t"] = topk.label_logp(ids, labels)
    return fields


class Accumulator(Protocol):
    """Gathers something of R rows, tile by tile, and merges it over the ranks."""

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        """tiles (R, C) of one or two models, fp32 logits at temperature 1; scratch of their shapes, maybe the same.

        The last accumulators of a walk may overwrite the tiles.
        """

    def state(self) -> State:
        """What was gathered, in the same shapes and dtypes on every rank."""
        ...

    def finish(self, states: list[State], fields: Fields) -> Fields:
        """The statistics of all ranks' states; fields holds those of the accumulators after this one."""
        ...


class ListedMoments:
    """The fold of eager/online.py for the student alone, listed tokens apart from the rest; at temperature 1.

    Listed tokens are banned in the tiles and folded as one part more, so that no sum over the rest cancels.
    """

    def __init__(self, ids: Tensor, columns: int, vocab: int, want: frozenset[str | Blend]) -> None:
        self.ids, want = ids, want & STUDENT_FIELDS
        n_rows, k = ids.shape
        self.fold = online.Fold(n_rows, columns, 1, want, ids.device)
        self.fold_listed = online.Fold(n_rows, k, 1, want, ids.device)
        self.z = torch.where(
            (ids >= vocab) | (ids < -1), torch.nan, torch.full(ids.shape, -torch.inf, device=ids.device)
        )
        self.parts: list[State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.z = take_columns(tiles[0], self.ids, v0, self.z)
        hide_columns(tiles[0], self.ids, v0)
        self.parts.append(self.fold(tiles[0], None, 1 / online.NATS))

    def state(self) -> State:
        return online.merge(self.parts, 1 / online.NATS)

    def finish(self, states: list[State], fields: Fields) -> Fields:
        unit = 1 / online.NATS
        rest = online.merge(states, unit)
        out = online.finish(online.merge([rest, self.fold_listed(self.z.clone(), None, unit)], unit), 1.0)
        some = rest["k_s"] > online.FLOOR
        return out | {
            "topk_logits": torch.where(self.z <= online.FLOOR, -torch.inf, self.z) - out["shift_s"].unsqueeze(1),
            "shift_rest": torch.where(some, rest["k_s"], 0.0),
            "logsum_rest": torch.where(some, rest["M_s"].log1p(), -torch.inf),
        }


class TritonMoments:
    """The fold of kernels/row_stats.py, on tiles that a library's GEMM made."""

    def __init__(self, n_rows: int, source: Rows, temperature: float | Tensor, teacher: bool, margins: bool) -> None:
        from tip_kernels.backends.triton import row_stats

        self.kernels, self.widest = row_stats, max(source.widest, 1)
        settings = {"teacher": teacher, "margins": margins, "temperature": temperature}
        self.rows = row_stats.new_state(n_rows, max(source.columns, 1), source.device, **settings)

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.kernels.fold_tile(self.rows, *tiles, column=v0)

    def state(self) -> State:
        sums, part = self.rows.sums, self.rows.part
        if missing := -(-self.widest // part) - sums.shape[1]:  # parts that wider ranks have: nothing but banned tokens
            empty = sums.new_zeros(sums.shape[0], missing, sums.shape[2])
            empty[[0, 3] if self.rows.teacher else [0]] = online.FLOOR
            sums = torch.cat([sums, empty], 1)
        return {"sums": sums}

    def finish(self, states: list[State], fields: Fields) -> Fields:
        sums = [state["sums"] for state in states]
        return self.kernels.finish(replace(self.rows, sums=sums[0] if len(sums) == 1 else torch.cat(sums, 1)))


class LabelLogits:
    """Each model's logit of each row's label, which one rank has; NaN for none."""

    def __init__(self, labels: Tensor, source: Rows, n_models: int, temperature: float | Tensor) -> None:
        self.column, self.columns, self.temperature = labels - source.first, source.columns, temperature
        self.z = [torch.full(labels.shape, torch.nan, device=labels.device) for _ in range(n_models)]

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        inside = (self.column >= v0) & (self.column < min(v0 + tiles[0].shape[1], self.columns))
        place = (self.column - v0).clamp(0, tiles[0].shape[1] - 1).unsqueeze(1)
        self.z = [torch.where(inside, t.gather(1, place).squeeze(1), z) for t, z in zip(tiles, self.z, strict=True)]

    def state(self) -> State:
        return dict(enumerate(self.z))

    def finish(self, states: list[State], fields: Fields) -> Fields:
        out: Fields = {}
        for i, model in zip(states[0], "st", strict=False):
            z = torch.stack([state[i] for state in states])
            only = torch.where(z.isnan().all(0), torch.nan, torch.where(z.isnan(), -torch.inf, z).amax(0))
            out |= online.label_field(model, only, self.temperature, fields)
        return out


class TopLists:
    """Each model's largest logits, with the other model's at the same tokens: margins, agreement, top-k statistics."""

    def __init__(
        self, n_rows: int, sources: list[Rows], want: frozenset[str | Blend], top_k: int, temperature: float | Tensor
    ) -> None:
        self.want, self.top_k, self.temperature, self.first = want, top_k, temperature, sources[0].first
        self.tops = [TopList(n_rows, max(top_k, 2), sources[0].device) for _ in sources]

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        for top, z, other in zip(self.tops, tiles, tiles[::-1], strict=True):
            top.update(z, other, self.first + v0)

    def state(self) -> State:
        return {(i, name): x for i, top in enumerate(self.tops) for name, x in top.state().items()}

    def finish(self, states: list[State], fields: Fields) -> Fields:
        if len(states) > 1:
            for i, top in enumerate(self.tops):
                top.merge([{name: x for (j, name), x in state.items() if i == j} for state in states])
        return list_fields(self.tops, fields, self.top_k, self.want, self.temperature)


def list_fields(
    tops: list[TopList],
    out: Fields,
    top_k: int,
    want: frozenset[str | Blend],
    temperature: float | Tensor,
) -> Fields:
    """Margins, agreement and top-k statistics from the models' lists of largest logits."""
    fields: Fields = {}
    for model, top in zip("st", tops, strict=False):
        if f"margin_{model}" in want:
            values, nan = top.values, 0.0 * out[f"logsum_{model}"]
            second = values[:, 1] if values.shape[1] > 1 else torch.full_like(nan, -torch.inf)
            margin = (values[:, 0] - second) / temperature
            fields[f"margin_{model}"] = torch.where(second <= online.FLOOR, torch.inf, margin) + nan
    if len(tops) == 2:
        top_s, top_t = tops
        best = top_s.ids[:, :1]
        nan = 0.0 * (out["logsum_s"] + out["logsum_t"])
        whole = ~nan.isnan()
        fields["agree"] = whole & (best.squeeze(1) == top_t.ids[:, 0])
        if top_k:
            tau = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
            logp = (top_s.payload[:, :top_k] / tau - out["shift_t"].unsqueeze(1)) - out["logsum_t"].unsqueeze(1)
            listed = top_s.values[:, :top_k] > online.FLOOR
            fields["mass_t_on_top_s"] = torch.where(listed, logp.exp(), 0.0).sum(1).clamp_(max=1.0) + nan
            hit = (top_t.ids[:, :top_k] == best) & (top_t.values[:, :top_k] > online.FLOOR) & whole.unsqueeze(1)
            fields["rank_t_of_argmax_s"] = torch.where(hit.any(1), hit.int().argmax(1), top_k)
    return fields
