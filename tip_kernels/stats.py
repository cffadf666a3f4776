"""MEASURE: the statistics of every row in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tip_kernels._checks import expect, flat_rows, row_temperature, workspace_bytes
from tip_kernels.eager import online
from tip_kernels.eager.online import Blend
from tip_kernels.eager.toplist import TopList
from tip_kernels.sources import Head, HeadBlock, LogitBlock, Rows, check_pair, rows_of

IGNORE_LABEL = -100
STUDENT_FIELDS = frozenset({"lse_s", "entropy_s"})
TEACHER_FIELDS = frozenset({"lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"})
MARGIN_FIELDS = frozenset({"margin_s", "margin_t", "agree"})
LABEL_FIELDS = frozenset({"logp_s", "logp_t"})
PRIVATE_FIELDS = frozenset({"shift_s", "shift_t", "logsum_s", "logsum_t"})
TOP_FIELDS = frozenset({"mass_t_on_top_s", "rank_t_of_argmax_s"})


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per-row statistics of a student's and a teacher's next-token distributions.

    Every public field is a flat (N,) tensor in row order b*T + t, fp32 and in nats unless said, or None where it was
    not asked for. A row whose logits hold a NaN, a +inf, or nothing but -inf is NaN in every statistic that reads it.
    """

    lse_s: Tensor | None = None  # log of the sum of exponentials of the student's logits / temperature
    lse_t: Tensor | None = None  # the same of the teacher
    entropy_s: Tensor | None = None
    entropy_t: Tensor | None = None
    kl_fwd: Tensor | None = None  # KL(teacher || student), clamped at 0; +inf where the student bans a teacher token
    kl_rev: Tensor | None = None  # KL(student || teacher), clamped at 0
    hellinger_sq: Tensor | None = None  # 1 - sum sqrt(p_s p_t), in [0, 1], no unit
    margin_s: Tensor | None = None  # top-1 minus top-2 logit / temperature; +inf with fewer than two finite logits
    margin_t: Tensor | None = None
    agree: Tensor | None = None  # bool: both models have the same argmax (the lower id wins a tie)
    logp_s: Tensor | None = None  # log-probability of the label; NaN where the label is -100
    logp_t: Tensor | None = None
    mass_t_on_top_s: Tensor | None = None  # teacher probability on the student's top_k tokens, in [0, 1]
    rank_t_of_argmax_s: Tensor | None = (
        None  # int64: the student's argmax in the teacher's top_k, 0 first; top_k if absent
    )
    _shift_s: Tensor | None = field(default=None, repr=False)  # (N,) largest logit / temperature
    _shift_t: Tensor | None = field(default=None, repr=False)
    _logsum_s: Tensor | None = field(default=None, repr=False)  # (N,) lse - shift, formed before it is rounded into lse
    _logsum_t: Tensor | None = field(default=None, repr=False)
    _temperature: float | Tensor = field(default=1.0, repr=False)
    _vocab: int = field(default=0, repr=False)
    _batch_shape: tuple[int, ...] = field(default=(), repr=False)  # (N,) or (B, T)
    _labels: Tensor | None = field(default=None, repr=False)  # (N,) int64
    _blends: dict[Blend, Tensor] = field(default_factory=dict, repr=False)  # ln sum p_t^a p_s^b, each (N,)

    def _get(self, name: str | Blend) -> Tensor | None:
        """A measured value by the name that `measure` gives it, or None."""
        if isinstance(name, Blend):
            return self._blends.get(name)
        return getattr(self, f"_{name}" if name in PRIVATE_FIELDS else name)


def token_stats(
    student: Tensor | Head,
    teacher: Tensor | Head | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    margins: bool = False,
    top_k: int = 0,
    workspace_mib: float = 256,
) -> TokenStats:
    """Measures every row in one pass over the vocabulary, without materialising a softmax (or, of a Head, the logits).

        lse = log sum exp z                        entropy = lse - sum p z              z = logits / temperature
        kl_fwd = sum p_t (log p_t - log p_s)       kl_rev = sum p_s (log p_s - log p_t)
        hellinger_sq = 1 - sum sqrt(p_t p_s)

    student, teacher  logits (N, V) or (B, T, V), or a Head; float32, bfloat16 or float16, each its own
    labels            int64 (N,) or (B, T): the token that each row predicts (already shifted), -100 for none; adds logp
    temperature       a positive float, or a float tensor (N,) or (B, T); divides both models' logits
    margins           adds margin_s, margin_t and agree
    top_k             k of the top-k statistics mass_t_on_top_s and rank_t_of_argmax_s, which need a teacher; 0 is none
    workspace_mib     MiB that the pass may use beyond its inputs and (N,) results

    Returns a TokenStats of (N,) fp32 fields, also under autocast. KLs are clamped at 0; their noise floor is about
    1e-7 nats. A logit at or below -2^100 counts as -inf, a banned token: legal in either model, and a KL is +inf
    exactly where its second model bans a token that its first allows. No gradient flows. Does not synchronise; labels
    and temperatures are range-checked on a CPU, on CUDA a bad one makes its row NaN.

    Raises ValueError naming the argument. Method: online softmax with recentred moments (tip_kernels/eager/online.py).
    """
    rows_s = rows_of(student, "student")
    rows_t = None if teacher is None else rows_of(teacher, "teacher")
    if rows_t is not None:
        check_pair(rows_s, rows_t)
    expect(
        isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 0, "top_k", "an int of at least 0", top_k
    )
    expect(top_k == 0 or teacher is not None, "top_k", "0 without a teacher", top_k)
    temperature = row_temperature(temperature, rows_s.batch_shape, rows_s.device)
    want = STUDENT_FIELDS | (TEACHER_FIELDS if teacher is not None else frozenset())
    want |= MARGIN_FIELDS if margins else frozenset()
    want |= TOP_FIELDS if top_k else frozenset()
    want |= LABEL_FIELDS if labels is not None else frozenset()
    labels = check_labels(labels, rows_s)
    workspace = workspace_bytes(workspace_mib)
    measured = measure(rows_s, rows_t, want, labels=labels, temperature=temperature, top_k=top_k, workspace=workspace)
    return stats_record(measured, rows_s, temperature, labels)


def check_labels(labels: Tensor | None, rows: Rows) -> Tensor | None:
    """Labels flattened to (N,), int64; their range is checked on a CPU."""
    if labels is None:
        return None
    labels = flat_rows("labels", labels, rows.batch_shape, (torch.int64,), rows.device)
    if labels.device.type == "cpu" and labels.numel():
        ok = bool((((labels >= 0) & (labels < rows.vocab)) | (labels == IGNORE_LABEL)).all())
        if not ok:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(
                f"labels: expected values from 0 to {rows.vocab - 1}, or {IGNORE_LABEL} for none, got {low} to {high}"
            )
    return labels


def stats_record(
    measured: dict[str | Blend, Tensor], rows: Rows, temperature: float | Tensor, labels: Tensor | None = None
) -> TokenStats:
    """A TokenStats from measured (N,) tensors."""
    blends = {name: value for name, value in measured.items() if isinstance(name, Blend)}
    named = {f"_{k}" if k in PRIVATE_FIELDS else k: v for k, v in measured.items() if k not in blends}
    return TokenStats(
        **named,
        _temperature=temperature,
        _vocab=rows.vocab,
        _batch_shape=rows.batch_shape,
        _labels=labels,
        _blends=blends,
    )


@torch.no_grad()
def measure(
    student: Rows,
    teacher: Rows | None,
    want: frozenset[str | Blend],
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    workspace: int,
) -> dict[str, Tensor]:
    """The wanted statistics of all rows, or of the rows with the given ids, as {field: (len(rows),)}.

    Private fields (shift and logsum of each model) come without asking. labels and temperature are (N,) over all rows.
    """
    n_rows = student.n_rows if rows is None else rows.numel()
    if rows is not None:
        labels = None if labels is None else labels[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    lists = bool(want & (MARGIN_FIELDS | TOP_FIELDS))
    block, columns = tile_shape(n_rows, student, teacher, workspace, buffers=14 if lists else 5)
    sources = [source for source in (student, teacher) if source is not None]
    tiles = [torch.empty(block * columns, device=source.device) for source in sources]
    fold = online.Fold(block, columns, len(sources), want, student.device)
    done = []
    with torch.autocast(student.device.type, enabled=False):
        for r0 in range(0, max(n_rows, 1), block):
            part = slice(r0, min(r0 + block, n_rows))
            ids = part if rows is None else rows[part]
            lab = None if labels is None else labels[part]
            tau = temperature[part, None] if isinstance(temperature, Tensor) else temperature
            done.append(
                _measure_block([source.block(ids) for source in sources], fold, tiles, columns, lab, tau, top_k)
            )
    return {name: torch.cat([d[name] for d in done]) for name in done[0]}


def _measure_block(
    blocks: list[LogitBlock | HeadBlock],
    fold: online.Fold,
    buffers: list[Tensor],
    columns: int,
    labels: Tensor | None,
    temperature: float | Tensor,
    top_k: int,
) -> dict[str, Tensor]:
    """The statistics of one block of rows: walks the vocabulary tile by tile. temperature is a float or (R, 1)."""
    n_rows, vocab, device = blocks[0].n_rows, blocks[0].source.vocab, buffers[0].device
    lists: list[TopList] = []
    if fold.want & (MARGIN_FIELDS | TOP_FIELDS):
        lists = [TopList(n_rows, max(top_k, 2), device) for _ in blocks]
    x_label = [torch.full((n_rows,), torch.nan, device=device) for _ in blocks]
    parts = []
    for v0, v1 in columns_of(vocab, columns):
        tiles = [
            b.tile(v0, v1, buf[: n_rows * (v1 - v0)].view(n_rows, -1)) for b, buf in zip(blocks, buffers, strict=True)
        ]
        for x in tiles:
            x.mul_(online.HALF_LOG2E / temperature)
        for top, x, other in zip(lists, tiles, tiles[::-1], strict=False):
            top.update(x, other, v0)
        if labels is not None:
            inside = (labels >= v0) & (labels < v1)
            place = (labels - v0).clamp(0, v1 - v0 - 1).unsqueeze(1)
            x_label = [
                torch.where(inside, x.gather(1, place).squeeze(1), old) for x, old in zip(tiles, x_label, strict=True)
            ]
        parts.append(fold(tiles[0], tiles[1] if len(tiles) == 2 else None))
    state = online.merge(parts)
    out = online.finish(state)
    if labels is not None:
        for model, x in zip("st", x_label, strict=False):
            logp = online.NATS * (x - state[f"k_{model}"]) - out[f"logsum_{model}"]
            out[f"logp_{model}"] = torch.where(x <= online.FLOOR, -torch.inf, logp) + 0.0 * out[f"logsum_{model}"]
    if lists:
        out |= _list_fields(lists, out, top_k, fold.want)
    return {name: value for name, value in out.items() if name in fold.want | PRIVATE_FIELDS}


def _list_fields(lists: list[TopList], out: dict[str, Tensor], top_k: int, want: frozenset[str]) -> dict[str, Tensor]:
    """Margins, agreement and top-k statistics from the models' lists of largest logits."""
    fields: dict[str, Tensor] = {}
    for model, top in zip("st", lists, strict=False):
        if f"margin_{model}" in want:
            values, nan = top.values, 0.0 * out[f"logsum_{model}"]
            second = values[:, 1] if values.shape[1] > 1 else torch.full_like(nan, -torch.inf)
            margin = online.NATS * (values[:, 0] - second)
            fields[f"margin_{model}"] = torch.where(second <= online.FLOOR, torch.inf, margin) + nan
    if len(lists) == 2:
        top_s, top_t = lists
        best = top_s.ids[:, :1]
        nan = 0.0 * (out["logsum_s"] + out["logsum_t"])
        whole = ~nan.isnan()
        if "agree" in want:
            fields["agree"] = whole & (best.squeeze(1) == top_t.ids[:, 0])
        if "mass_t_on_top_s" in want:
            logp = online.NATS * top_s.payload[:, :top_k] - (out["shift_t"] + out["logsum_t"]).unsqueeze(1)
            listed = top_s.values[:, :top_k] > online.FLOOR
            fields["mass_t_on_top_s"] = torch.where(listed, logp.exp(), 0.0).sum(1).clamp_(max=1.0) + nan
            hit = (top_t.ids[:, :top_k] == best) & (top_t.values[:, :top_k] > online.FLOOR) & whole.unsqueeze(1)
            fields["rank_t_of_argmax_s"] = torch.where(hit.any(1), hit.int().argmax(1), top_k)
    return fields


def tile_shape(n_rows: int, student: Rows, teacher: Rows | None, workspace: int, buffers: int) -> tuple[int, int]:
    """Rows and columns of a tile such that its buffers, gathered rows and upcast weights stay within the workspace."""
    sources = [source for source in (student, teacher) if source is not None]
    width = sum(source.width for source in sources)
    # On a CPU a tile stays in the second-level cache; elsewhere it must be large enough to fill the device.
    rows, columns = (256, 1024) if student.device.type == "cpu" else (2048, 8192)
    rows, columns = min(rows, max(n_rows, 1)), min(columns, student.vocab)
    while 4 * (buffers * rows * columns + (rows + columns) * width) > workspace and max(rows, columns) > 16:
        if columns >= rows:
            columns = (columns + 1) // 2
        else:
            rows = (rows + 1) // 2
    return rows, columns


def columns_of(vocab: int, columns: int) -> Iterator[tuple[int, int]]:
    """The tiles [v0, v1) that cover the vocabulary."""
    for v0 in range(0, vocab, columns):
        yield v0, min(v0 + columns, vocab)
