"""The measuring sweep: walks rows and vocabulary tile by tile and leaves a handful of numbers a row.

R rows of a block, C columns of a tile, V vocabulary. A rank of a vocabulary-parallel group walks its own columns; what
it leaves of a block of rows is gathered, while the next block is walked, and merged as the parts of a row are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tip_kernels.backends.choice import backend_for
from tip_kernels.backends.eager.online import Fold
from tip_kernels.distributed.collectives import gather_states
from tip_kernels.measure import fused
from tip_kernels.measure.accumulators import (
    Accumulator,
    EagerMoments,
    LabelLogits,
    ListedMoments,
    State,
    TopLists,
    TritonMoments,
)
from tip_kernels.measure.topk_teacher import partial_fields, student_outcomes
from tip_kernels.sources.logits import Block, LogitRows
from tip_kernels.sources.pair import Pair
from tip_kernels.stats import (
    LABEL_FIELDS,
    MARGIN_FIELDS,
    PRIVATE_FIELDS,
    STUDENT_FIELDS,
    TOP_FIELDS,
    Blend,
    Fields,
    blends_of,
)
from tip_kernels.workspace import columns_of


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
    record: list[Tensor | None] | None = None,
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
    triton = pair.topk is None and backend_for(pair.device) == "triton"
    with torch.autocast(pair.device.type, enabled=False):
        n_rows = pair.n_rows if rows is None else rows.numel()
        kernel = fused.kernel_for(pair, want, n_rows) if triton and record is None else None
        if kernel is not None:
            out = kernel(pair.sources, want, rows, labels, temperature, workspace)
        else:
            out = _walk(pair, want, rows, labels, temperature, top_k, workspace, triton, record)
        if pair.topk is not None:
            out |= _beside_topk(out, pair, want, rows, labels, workspace)
    return {name: value for name, value in out.items() if name in want or name in PRIVATE_FIELDS}


def _walk(
    pair: Pair,
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    top_k: int,
    workspace: int,
    triton: bool,
    record: list[Tensor | None] | None,
) -> Fields:
    """The statistics of rows, walked block by block and tile by tile. labels and temperature are those of the rows."""
    n_rows, n_models, topk = pair.n_rows if rows is None else rows.numel(), len(pair.sources), pair.topk
    blends, lists = blends_of(want), bool(want & TOP_FIELDS or (want & MARGIN_FIELDS and (not triton or pair.shard)))
    block, columns = pair.tile_shape(n_rows, workspace, buffers=15 if lists else 6, whole_parts=triton)
    eager = topk is None and (not triton or blends)
    fold = Fold(block, columns, n_models, blends if triton else want, pair.device) if eager else None
    buffers = [torch.empty(block * columns, device=pair.device) for _ in pair.sources]

    def accumulators(ids: Tensor | slice, n: int, labels: Tensor | None, tau: float | Tensor) -> list[Accumulator]:
        """Those of one block: what may overwrite a tile comes last, and what reads others' fields before them."""
        found: list[Accumulator] = [TopLists(n, pair.sources, want, top_k, tau)] if lists else []
        if labels is not None:
            found.append(LabelLogits(labels, pair.student, n_models, tau))
        if triton:
            found.append(TritonMoments(n, pair.student, tau, n_models == 2, bool(want & MARGIN_FIELDS) and not lists))
        if topk is not None:
            found.append(ListedMoments(topk.ids[ids], columns, pair.vocab, want))
        if fold is not None:
            found.append(EagerMoments(fold, tau))
        return found

    done: list[Fields] = []
    pending: Callable[[], Fields] | None = None
    for r0 in range(0, max(n_rows, 1), block):
        part = slice(r0, min(r0 + block, n_rows))
        ids = part if rows is None else rows[part]
        tau = temperature[part] if isinstance(temperature, Tensor) else temperature
        found = accumulators(ids, part.stop - part.start, None if labels is None else labels[part], tau)
        copies = [None if z is None else z[part] for z in record or [None] * n_models]
        for v0, tiles, scratch in _tiles(pair, pair.blocks(ids), buffers, columns, copies):
            for accumulator in found:
                accumulator.add(tiles, v0, scratch)
        states = [accumulator.state() for accumulator in found]
        merged = gather_states(states, pair.shard.group) if pair.shard else partial(list, [states])
        if pending is not None:  # this block's products have hidden the other one's collective
            done.append(pending())
        pending = partial(_finished, found, merged)
    if pending is not None:
        done.append(pending())
    return done[0] if len(done) == 1 else {name: torch.cat([fields[name] for fields in done]) for name in done[0]}


def _tiles(
    pair: Pair, blocks: list[Block], buffers: list[Tensor], columns: int, copies: list[Tensor | None]
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """(v0, each source's tile, room of the same shapes) of a block of rows, column after column.

    copies  (R, V) of each source that its tiles are left in, or None: they lie in the buffers
    """
    n_rows = blocks[0].n_rows
    for v0, v1 in columns_of(max(pair.student.columns, 1), columns):
        views = [buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0) for buffer in buffers]
        places = [view if copy is None else copy[:, v0:v1] for copy, view in zip(copies, views, strict=True)]
        yield v0, [b.tile(v0, v1, place) for b, place in zip(blocks, places, strict=True)], views


def _finished(accumulators: list[Accumulator], merged: Callable[[], list[list[State]]]) -> Fields:
    """A block's statistics; waits for the other ranks' states."""
    fields: Fields = {}
    for accumulator, states in reversed(list(zip(accumulators, zip(*merged(), strict=True), strict=True))):
        fields |= accumulator.finish(list(states), fields)
    return fields


def _beside_topk(
    out: Fields, pair: Pair, want: frozenset[str | Blend], rows: Tensor | None, labels: Tensor | None, workspace: int
) -> Fields:
    """What compares the student's outcomes, measured in out, with those of a TopK."""
    topk, ids = pair.topk, slice(None) if rows is None else rows
    y = student_outcomes(out)
    lp_t = topk.log_outcomes(ids, pair.vocab, y[:, -1].isneginf())
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
