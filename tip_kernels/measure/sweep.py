"""The measuring sweep: walks rows and vocabulary tile by tile and leaves a handful of numbers a row.

R rows of a block, C columns of a tile, V vocabulary. A rank of a vocabulary-parallel group walks its own columns; what
it leaves of a block of rows is gathered, while the next block is walked, and merged as the parts of a row are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from copy import copy
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tip_kernels.backends.choice import backend_for
from tip_kernels.backends.eager import online
from tip_kernels.backends.eager.online import Blend
from tip_kernels.backends.eager.toplist import TopList
from tip_kernels.distributed.collectives import merging
from tip_kernels.sources.rows import HeadBlock, HeadRows, LogitBlock, LogitRows, Rows
from tip_kernels.sources.topk import (
    PARTIAL_FIELDS,
    TopKRows,
    hide_columns,
    partial_divergence,
    partial_entropy,
    student_outcomes,
    take_columns,
)

IGNORE_LABEL = -100
STUDENT_FIELDS = frozenset({"lse_s", "entropy_s"})
TEACHER_FIELDS = frozenset({"lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"})
MARGIN_FIELDS = frozenset({"margin_s", "margin_t", "agree"})
LABEL_FIELDS = frozenset({"logp_s", "logp_t"})
NORMALISER_FIELDS = frozenset({"shift_s", "shift_t", "logsum_s", "logsum_t"})
LISTED_FIELDS = frozenset({"listed", "shift_rest", "logsum_rest"})
PRIVATE_FIELDS = NORMALISER_FIELDS | LISTED_FIELDS
TOP_FIELDS = frozenset({"mass_t_on_top_s", "rank_t_of_argmax_s"})


@torch.no_grad()
def measure(
    student: Rows,
    teacher: Rows | TopKRows | None,
    want: frozenset[str | Blend],
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    workspace: int,
    record: list[Tensor | None] | None = None,
) -> dict[str | Blend, Tensor]:
    """The wanted statistics of all rows, or of the rows with the given ids, as {field: (len(rows),)}.

    Private fields (shift and logsum of each model) come without asking. labels and temperature are (N,) over all rows.
    On the Triton backend the kernels measure everything but blends, top-k lists and a student beside a TopK, which are
    tiled torch everywhere; a Head's products are a library's, or the kernel's own where its table says so. Beside a
    TopK the private fields hold the student's logits of its tokens, (len(rows), K). record takes the logits of each
    source as they pass, fp32 (len(rows), V) at temperature 1, or None to let them go.
    """
    if torch.compiler.is_compiling() and not isinstance(teacher, TopKRows):
        from tip_kernels.learn import ops as compiled

        return compiled.measured(student, teacher, want, rows, labels, temperature, top_k, workspace)
    n_rows = student.n_rows if rows is None else rows.numel()
    if rows is not None:
        labels = None if labels is None else labels[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    sources, listed = with_logits(student, teacher), isinstance(teacher, TopKRows)
    triton = backend_for(student.device) == "triton" and not listed
    blends = frozenset(name for name in want if isinstance(name, Blend))
    lists = bool(want & TOP_FIELDS or (want & MARGIN_FIELDS and (not triton or student.shard)))
    with torch.autocast(student.device.type, enabled=False):
        in_place = record is None and all(is_read_in_place(source) for source in sources)
        if triton and not blends and not lists and in_place:
            out = _measure_logits(sources, want, rows, labels, temperature, workspace)
        elif triton and not (blends or lists or student.shard) and record is None and _is_fused(sources, want, n_rows):
            out = _measure_hidden(sources, rows, labels, temperature, workspace)
        else:
            block, columns = tile_shape(n_rows, sources, workspace, buffers=15 if lists else 6, whole_parts=triton)
            margins = bool(want & MARGIN_FIELDS) and not lists
            engines = [] if listed else _engines(triton, sources, want, blends, margins, block, columns)
            buffers = [torch.empty(block * columns, device=source.device) for source in sources]
            done, finish = [], None
            for r0 in range(0, max(n_rows, 1), block):
                part = slice(r0, min(r0 + block, n_rows))
                ids = part if rows is None else rows[part]
                lab = None if labels is None else labels[part]
                tau = temperature[part] if isinstance(temperature, Tensor) else temperature
                blocks = [source.block(ids) for source in sources]
                if listed:
                    engines = [ListedEngine(teacher.ids[ids], columns, student.vocab, want)]
                copies = [None if z is None else z[part] for z in record or [None] * len(sources)]
                walked = _walk_block(blocks, engines, buffers, columns, want, lists, lab, tau, top_k, copies)
                done += [] if finish is None else [finish()]
                finish = walked
            done.append(finish())
            out = {name: torch.cat([d[name] for d in done]) for name in done[0]}
        if listed:
            out |= _outcome_fields(out, teacher, student.vocab, want, rows, labels, workspace)
    return {name: value for name, value in out.items() if name in want | PRIVATE_FIELDS}


def check_label_range(labels: Tensor, vocab: int) -> None:
    """Refuses labels (N,) that are no token, on a CPU; elsewhere looking at them would have to wait."""
    if labels.device.type == "cpu" and labels.numel():
        ok = bool((((labels >= 0) & (labels < vocab)) | (labels == IGNORE_LABEL)).all())
        if not ok:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(
                f"labels: expected values from 0 to {vocab - 1}, or {IGNORE_LABEL} for none, got {low} to {high}"
            )


class Engine(Protocol):
    """Takes in the tiles of a block of rows, column after column, and tells their statistics."""

    def start(self, n_rows: int, temperature: float | Tensor) -> None: ...

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        """tiles (R, C) of one or two models, fp32 logits at temperature 1; scratch of their shapes, maybe the same."""

    def state(self) -> dict[Hashable, Tensor]:
        """What was taken in, fp32 of one shape on every rank."""

    def finish(self, states: list[dict[Hashable, Tensor]]) -> dict[str | Blend, Tensor]:
        """The statistics of all that the states have taken in."""


class EagerEngine:
    """The fold of eager/online.py."""

    def __init__(self, rows: int, columns: int, n_models: int, want: frozenset[str | Blend], device: torch.device):
        self.fold = online.Fold(rows, columns, n_models, want, device)

    def start(self, n_rows: int, temperature: float | Tensor) -> None:
        self.temperature, self.unit = temperature, 1 / (online.NATS * temperature)
        self.parts: list[online.State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        unit = self.unit.unsqueeze(1) if isinstance(self.unit, Tensor) else self.unit
        self.parts.append(self.fold(tiles[0], tiles[1] if len(tiles) == 2 else None, unit, scratch))

    def state(self) -> online.State:
        self.parts = [online.merge(self.parts, self.unit)]
        return self.parts[0]

    def finish(self, states: list[online.State]) -> dict[str | Blend, Tensor]:
        return online.finish(online.merge(states, self.unit), self.temperature)


class ListedEngine:
    """The fold of eager/online.py for the student alone, listed tokens apart from the rest; at temperature 1.

    Listed tokens are banned in the tiles and folded as one part more, so that no sum over the rest cancels.
    """

    def __init__(self, ids: Tensor, columns: int, vocab: int, want: frozenset[str | Blend]) -> None:
        self.ids, want = ids, want & STUDENT_FIELDS
        self.fold = online.Fold(*ids.shape[:1], columns, 1, want, ids.device)
        self.fold_listed = online.Fold(*ids.shape, 1, want, ids.device)
        self.z = torch.where(
            (ids >= vocab) | (ids < -1), torch.nan, torch.full(ids.shape, -torch.inf, device=ids.device)
        )

    def start(self, n_rows: int, temperature: float | Tensor) -> None:
        self.parts: list[online.State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.z = take_columns(tiles[0], self.ids, v0, self.z)
        hide_columns(tiles[0], self.ids, v0)
        self.parts.append(self.fold(tiles[0], None, 1 / online.NATS))

    def state(self) -> online.State:
        self.parts = [online.merge(self.parts, 1 / online.NATS)]
        return self.parts[0]

    def finish(self, states: list[online.State]) -> dict[str | Blend, Tensor]:
        unit = 1 / online.NATS
        rest = online.merge(states, unit)
        out = online.finish(online.merge([rest, self.fold_listed(self.z.clone(), None, unit)], unit), 1.0)
        some = rest["k_s"] > online.FLOOR
        return out | {
            "listed": torch.where(self.z <= online.FLOOR, -torch.inf, self.z) - out["shift_s"].unsqueeze(1),
            "shift_rest": torch.where(some, rest["k_s"], 0.0),
            "logsum_rest": torch.where(some, rest["L_s"].log(), -torch.inf),
        }


class TritonEngine:
    """The fold of kernels/row_stats.py, on tiles that a library's GEMM made."""

    def __init__(self, columns: int, widest: int, n_models: int, margins: bool, device: torch.device) -> None:
        from tip_kernels.backends.triton import row_stats

        self.kernels, self.columns, self.widest, self.device = row_stats, max(columns, 1), max(widest, 1), device
        self.settings = {"teacher": n_models == 2, "margins": margins}

    def start(self, n_rows: int, temperature: float | Tensor) -> None:
        settings = self.settings | {"temperature": temperature}
        self.rows = self.kernels.new_state(n_rows, self.columns, self.device, **settings)

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.kernels.fold_tile(self.rows, *tiles, column=v0)

    def state(self) -> dict[Hashable, Tensor]:
        sums, part = self.rows.sums, self.rows.part
        if missing := -(-self.widest // part) - sums.shape[1]:  # parts that wider ranks have: nothing but banned tokens
            empty = sums.new_zeros(sums.shape[0], missing, sums.shape[2])
            empty[[0, 3] if self.settings["teacher"] else [0]] = online.FLOOR
            sums = torch.cat([sums, empty], 1)
        return {"sums": sums}

    def finish(self, states: list[dict[Hashable, Tensor]]) -> dict[str | Blend, Tensor]:
        sums = [state["sums"] for state in states]
        return self.kernels.finish(replace(self.rows, sums=sums[0] if len(sums) == 1 else torch.cat(sums, 1)))


def _engines(
    triton: bool,
    sources: list[Rows],
    want: frozenset[str | Blend],
    blends: frozenset[Blend],
    margins: bool,
    rows: int,
    columns: int,
) -> list[Engine]:
    device, n_models = sources[0].device, len(sources)
    if not triton:
        return [EagerEngine(rows, columns, n_models, want, device)]
    engines: list[Engine] = [TritonEngine(sources[0].columns, sources[0].widest, n_models, margins, device)]
    return [*engines, EagerEngine(rows, columns, n_models, blends, device)] if blends else engines


def with_logits(*sources: Rows | TopKRows | None) -> list[Rows]:
    """Those of the sources that have logits."""
    return [source for source in sources if isinstance(source, Rows)]


def is_read_in_place(source: Rows) -> bool:
    """Whether kernels can read the source's logits where they lie."""
    return isinstance(source, LogitRows) and source.matrix is not None and source.matrix.stride(1) == 1


def _measure_logits(
    sources: list[LogitRows],
    want: frozenset[str],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    workspace: int,
) -> dict[str, Tensor]:
    """One kernel over logits in memory; chosen rows are gathered block by block."""
    from tip_kernels.backends.triton.row_stats import row_stats

    margins, matrices = bool(want & MARGIN_FIELDS), [source.matrix for source in sources]
    if rows is None:
        out = row_stats(*matrices, margins=margins, temperature=temperature)
    else:
        block = max(1, workspace // sum(matrix.shape[1] * matrix.element_size() for matrix in matrices))
        done = []
        for r0 in range(0, max(rows.numel(), 1), block):
            ids = rows[r0 : r0 + block]
            tau = temperature[r0 : r0 + block] if isinstance(temperature, Tensor) else temperature
            done.append(row_stats(*(m.index_select(0, ids) for m in matrices), margins=margins, temperature=tau))
        out = {name: torch.cat([d[name] for d in done]) for name in done[0]}
    if labels is not None:
        inside = (labels >= 0) & (labels < sources[0].vocab)
        place = labels.clamp(0, sources[0].vocab - 1)
        for model, matrix in zip("st", matrices, strict=False):
            z = matrix[torch.arange(place.numel(), device=place.device) if rows is None else rows, place].float()
            out |= _label_field(model, torch.where(inside, z, torch.nan), temperature, out)
    return out


def _is_fused(sources: list[Rows], want: frozenset[str], n_rows: int) -> bool:
    """Whether one kernel takes the products and their fold: where it can, and where that pays."""
    if want & MARGIN_FIELDS or not all(isinstance(source, HeadRows) for source in sources):
        return False
    from tip_kernels.backends.triton import linear_stats

    whole = all(source.hidden.dtype == source.weight.dtype == source.dtype for source in sources)  # no autocast
    fits = all(linear_stats.describable(x) for source in sources for x in (source.hidden, source.weight))
    width = max(source.width for source in sources)
    return whole and fits and linear_stats.fused_pays(n_rows, width, sources[0].dtype)


def _measure_hidden(
    sources: list[HeadRows], rows: Tensor | None, labels: Tensor | None, temperature: float | Tensor, workspace: int
) -> dict[str, Tensor]:
    """One kernel over hidden states and heads, in blocks of rows whose hidden states and sums fit the workspace."""
    from tip_kernels.backends.triton.linear_stats import linear_part, linear_stats

    n_rows, vocab = sources[0].n_rows if rows is None else rows.numel(), sources[0].vocab
    settings: dict[str, object] = {}
    for model, source in zip("st", sources, strict=False):
        bias = None if source.bias is None else source.bias[:vocab].to(source.dtype).contiguous()
        settings |= {f"bias_{model}": bias, f"scale_{model}": source.scale, f"softcap_{model}": source.softcap}
    parts = -(-vocab // linear_part(n_rows, vocab))
    block = max(1, workspace // (44 * parts + 8 * sum(source.width for source in sources)))
    done = []
    for r0 in range(0, max(n_rows, 1), block):
        part = slice(r0, min(r0 + block, n_rows))
        ids = part if rows is None else rows[part]
        tau = temperature[part] if isinstance(temperature, Tensor) else temperature
        hidden = [source.hidden[ids] for source in sources]
        pairs = [x for h, source in zip(hidden, sources, strict=True) for x in (h, source.weight[:vocab])]
        out = linear_stats(*pairs, temperature=tau, **settings)
        if labels is not None:
            for model, source, h in zip("st", sources, hidden, strict=False):
                out |= _label_field(model, _label_logits(source, h, labels[part]), tau, out)
        done.append(out)
    return {name: torch.cat([d[name] for d in done]) for name in done[0]}


def _label_logits(source: HeadRows, hidden: Tensor, labels: Tensor) -> Tensor:
    """Each row's logit of its label (R,), NaN for none."""
    inside = (labels >= 0) & (labels < source.vocab)
    place = labels.clamp(0, source.vocab - 1)
    z = (hidden.float() * source.weight[place].float()).sum(1)
    if source.bias is not None:
        z += source.bias[place].to(source.dtype).float()
    z *= source.scale
    z = z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)
    return torch.where(inside, z, torch.nan)


def _walk_block(
    blocks: list[LogitBlock | HeadBlock],
    engines: list[Engine],
    buffers: list[Tensor],
    columns: int,
    want: frozenset[str | Blend],
    lists: bool,
    labels: Tensor | None,
    temperature: float | Tensor,
    top_k: int,
    copies: list[Tensor | None],
) -> Callable[[], dict[str | Blend, Tensor]]:
    """Walks the columns of one block of rows tile by tile; what it returns tells their statistics.

    Between the two the engines may take in the next block, whose products hide this one's collective.

    temperature  a float or (R,)
    copies       (R, V) of each source that its tiles are left in, or None
    """
    n_rows, source, device = blocks[0].n_rows, blocks[0].source, buffers[0].device
    labels = None if labels is None else labels - source.first
    tops = [TopList(n_rows, max(top_k, 2), device) for _ in blocks] if lists else []
    z_label = [torch.full((n_rows,), torch.nan, device=device) for _ in blocks]
    for engine in engines:
        engine.start(n_rows, temperature)
    for v0, v1 in columns_of(max(source.columns, 1), columns):
        views = [buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0) for buffer in buffers]
        places = [view if copy is None else copy[:, v0:v1] for copy, view in zip(copies, views, strict=True)]
        tiles = [block.tile(v0, v1, place) for block, place in zip(blocks, places, strict=True)]
        for top, z, other in zip(tops, tiles, tiles[::-1], strict=False):
            top.update(z, other, source.first + v0)
        if labels is not None:
            inside = (labels >= v0) & (labels < min(v1, source.columns))
            place = (labels - v0).clamp(0, v1 - v0 - 1).unsqueeze(1)
            z_label = [
                torch.where(inside, z.gather(1, place).squeeze(1), old) for z, old in zip(tiles, z_label, strict=True)
            ]
        for engine in engines:
            engine.add(tiles, v0, views)
    mine = [engine.state() for engine in engines]
    mine += [dict(enumerate(z_label))] if labels is not None else []
    mine += [top.state() for top in tops] if source.shard else []
    merged = merging(mine, source.shard)
    engines = [copy(engine) for engine in engines]  # as they are after this block

    def finished() -> dict[str | Blend, Tensor]:
        states = list(zip(*merged(), strict=True))
        out: dict[str | Blend, Tensor] = {}
        for engine, parts in reversed(list(zip(engines, states, strict=False))):
            out |= engine.finish(list(parts))
        z_labels = z_label
        if source.shard:
            if labels is not None:
                found = states[len(engines)]
                z_labels = [_only(torch.stack([part[i] for part in found])) for i in range(len(z_label))]
            for top, parts in zip(reversed(tops), reversed(states), strict=False):
                top.merge(list(parts))
        if labels is not None:
            for model, z in zip("st", z_labels, strict=False):
                out |= _label_field(model, z, temperature, out)
        return out | (_list_fields(tops, out, top_k, want, temperature) if lists else {})

    return finished


def _only(z: Tensor) -> Tensor:
    """(R,) the one value of each column of (P, R) that is no NaN, if there is one."""
    return torch.where(z.isnan().all(0), torch.nan, torch.where(z.isnan(), -torch.inf, z).amax(0))


def _label_field(
    model: str, z: Tensor, temperature: float | Tensor, out: dict[str | Blend, Tensor]
) -> dict[str, Tensor]:
    """The log-probability of a label from its logit z (R,) at temperature 1, NaN for none."""
    logp = (z / temperature - out[f"shift_{model}"]) - out[f"logsum_{model}"]
    return {f"logp_{model}": torch.where(z <= online.FLOOR, -torch.inf, logp) + 0.0 * out[f"logsum_{model}"]}


def _list_fields(
    tops: list[TopList],
    out: dict[str | Blend, Tensor],
    top_k: int,
    want: frozenset[str | Blend],
    temperature: float | Tensor,
) -> dict[str, Tensor]:
    """Margins, agreement and top-k statistics from the models' lists of largest logits."""
    fields: dict[str, Tensor] = {}
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


def _outcome_fields(
    out: dict[str | Blend, Tensor],
    teacher: TopKRows,
    vocab: int,
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    workspace: int,
) -> dict[str | Blend, Tensor]:
    """What compares the student's outcomes, measured in out, with those of a TopK."""
    rows = slice(None) if rows is None else rows
    y = student_outcomes(out)
    lp_t = teacher.log_outcomes(rows, vocab, y[:, -1].isneginf())
    if teacher.tail == "ignore":
        shift, broken = torch.zeros_like(y[:, 0]), lp_t.isnan().any(1)
        fields = {name: partial_divergence(term, y, lp_t) for name, term in PARTIAL_FIELDS.items()}
        fields |= {"entropy_t": partial_entropy(lp_t), "logsum_t": shift}
        fields = {name: value.masked_fill(broken, torch.nan) for name, value in fields.items()} | {"shift_t": shift}
    else:
        pair = LogitRows(y[:, : lp_t.shape[1]]), LogitRows(lp_t)
        fields = measure(*pair, want - STUDENT_FIELDS - LABEL_FIELDS - MARGIN_FIELDS - {"lse_t"}, workspace=workspace)
        fields = {name: value for name, value in fields.items() if name not in ("shift_s", "logsum_s")}
    if labels is not None:
        fields["logp_t"] = teacher.label_logp(rows, labels)
    return fields


def tile_shape(
    n_rows: int, sources: list[Rows], workspace: int, buffers: int, *, whole_parts: bool = False, slice_width: int = 0
) -> tuple[int, int]:
    """Rows and columns of a tile such that its buffers, gathered rows and upcast weights stay within the workspace.

    whole_parts  columns come in multiples of what a program of the Triton fold reads
    slice_width  of an fp32 slice of d(weight), for each column
    """
    width, vocab = sum(source.width for source in sources), max(sources[0].widest, 1)  # the same blocks on every rank
    # On a CPU a tile stays in the second-level cache; elsewhere it must be large enough to fill the device.
    rows, columns = (256, 1024) if sources[0].device.type == "cpu" else (2048, 8192)
    if whole_parts:
        from tip_kernels.backends.triton.row_stats import PART as columns
    rows, columns = min(rows, max(n_rows, 1)), min(columns, vocab)

    def size(rows: int, columns: int) -> int:
        return 4 * (buffers * rows * columns + (2 * rows + columns) * width + columns * slice_width)

    while size(rows, columns) > workspace and max(rows, columns) > 16:
        if columns >= rows and not whole_parts:
            columns = (columns + 1) // 2
        elif rows > 1:
            rows = (rows + 1) // 2
        else:
            break
    return rows, columns


def columns_of(vocab: int, columns: int) -> Iterator[tuple[int, int]]:
    """The tiles [v0, v1) that cover the vocabulary."""
    for v0 in range(0, vocab, columns):
        yield v0, min(v0 + columns, vocab)
