"""LEARN from logits in memory: the gradient in the student's logits, element by element, for kept rows only.

    out[i, v] = dz/dlogit * (upstream[i] / temperature * sum over terms of weight * dD/dz_v
                             + push[i] [v = label_i] + weight[i] p1_v)                    z as in row_stats.py

S kept slots; slot i reads row row_ids[i]. Log-probabilities are in bits and formed from the shift and the log of the
sum, never from the rounded lse. Divergences and their gradients: `_family.py`. p1 are the student's probabilities at
temperature 1, for a cross-entropy in the same sweep. Where the student bans a token the gradient is exactly 0.

Weight 0 writes exact zeros without reading the row, so "dense" is the same kernel over all N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._family import KINDS, LOG2E, NEVER, add_gradient
from ._launch import aligned, fp32, map_arguments, on_device, row_alignment, warp
from ._online import C_TAIL, C, Model, capped, half_unit, shift_from_nats, total, widen
from .row_stats import read_tiles

CHUNK = 8192  # columns of one program

# ---- kernel


@triton.jit
def load_normaliser(shift_ptr, logsum_ptr, slot):
    """(2 k, log2 of the sum at shift k), k on the grid of the fold, from a shift and logsum in nats."""
    shift = tl.load(shift_ptr + slot)
    k = shift_from_nats(shift)
    return 2.0 * k, (tl.load(logsum_ptr + slot) + (tl.fma(-k, C, shift) - k * C_TAIL)) * LOG2E


@triton.jit
def log2_p(y, unit, two_k, log_mass):
    """log2 p of (capped) logits y; unit is in bits."""
    return tl.fma(y, unit, -two_k) - log_mass


@triton.jit
def _tile_gradient(raw_s, raw_t, at, s, t, w, rows, numbers, label, TERMS: tl.constexpr):
    """(one tile of the output, its columns being `at`, and where the student is sure).

    Sure is a probability above 1/2, at the row's temperature or at 1. rows and label are as `_load_rows` and
    `_load_label` return them.
    """
    y_s = capped(widen(raw_s), s.inner)
    l_s = tl.maximum(log2_p(y_s, s.unit, rows[0], rows[1]), NEVER)
    l_t = log2_p(capped(widen(raw_t), t.inner), t.unit, rows[2], rows[3])
    l_t = tl.where(l_s > NEVER, l_t, NEVER)  # what the student bans counts as banned in both: no gradient
    p_s = tl.exp2(l_s)
    p_t = tl.exp2(l_t)
    g = tl.zeros_like(p_s)
    for i in tl.static_range(len(TERMS)):
        if TERMS[i][3] < 0:
            g = add_gradient(TERMS[i][0], TERMS[i][1], TERMS[i][2], g, w, l_s, l_t, p_s, p_t, rows, numbers)
        else:
            gate = rows[TERMS[i][3]]
            more = add_gradient(TERMS[i][0], TERMS[i][1], TERMS[i][2], g, w * gate, l_s, l_t, p_s, p_t, rows, numbers)
            g = tl.where(gate != 0.0, more, g)  # 0 times what overflows
    if len(label) > 0:
        g += tl.where(at == label[0], label[1], 0.0)
    sure = l_s > -1.0
    if len(label) > 2:
        l_1 = log2_p(y_s, label[3], label[4], label[5])
        g = tl.fma(label[2], tl.exp2(l_1), g)
        sure = sure | (l_1 > -1.0)
    if s.inner is not None:
        g *= 1.0 - y_s * y_s
    return g, sure


@triton.jit
def _load_rows(rows, slot):
    """(upstream, (2 k and log2 mass of s and of t, row scalars), whether all but upstream are finite)."""
    values = load_normaliser(rows[1], rows[2], slot) + load_normaliser(rows[3], rows[4], slot)
    for i in tl.static_range(5, len(rows)):
        values = values + (tl.load(rows[i] + slot),)  # noqa: RUF005 (Triton has no unpacking)
    zero = 0.0 * values[0]
    for i in tl.static_range(1, len(values)):
        zero += 0.0 * values[i]
    return tl.load(rows[0] + slot), values, zero == 0.0


@triton.jit
def _load_label(label, slot, first_column, slope, unit):
    """((column, push, weight, unit, 2 k, log2 mass at temperature 1), whether any of it is to be added)."""
    values = ()
    some = slope != slope
    if len(label) > 0:
        push = tl.load(label[1] + slot)
        values = ((tl.load(label[0] + slot) - first_column).to(tl.int32), push * slope)
        some = push != 0.0
    if len(label) > 2:
        weight = tl.load(label[2] + slot)
        values = values + (weight * slope, unit) + load_normaliser(label[3], label[4], slot)  # noqa: RUF005
        some = some | (weight != 0.0)
    return values, some


@triton.jit(do_not_specialize=["stride_s", "stride_t", "stride_out", "n_cols", "n_chunks", "first_column"])
def grad_kernel(
    out_ptr, s_ptr, t_ptr, row_ids_ptr, others_ptr, sure_ptr, temperature_ptr,
    temperature, outer_s, inner_s, outer_t, inner_t, rows, numbers, label,
    stride_s, stride_t, stride_out, n_cols, n_chunks, first_column,
    TERMS: tl.constexpr, SCATTER: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Columns [c CHUNK, (c + 1) CHUNK) of slot i, c = pid % n_chunks, i = pid // n_chunks.

    rows: pointers to (S,) upstream, shift_s, logsum_s, shift_t, logsum_t and the terms' row scalars. numbers: their
    weights and parameters. TERMS: KIND, R and P of each term as in `add_gradient` and its gate among the row scalars or
    -1; R counts without upstream. label: pointers as in `Label`. A slot with nothing to add, a negative row id or a row
    scalar that is not finite is written as zeros; with SCATTER a negative row id writes nothing.

    With others_ptr a sure student's entry is left out: others (S, n_chunks) are the sums of what is written, sure
    (S, n_chunks) the entry's column or -1, for `entry_kernel`.
    """
    pid = tl.program_id(0)
    slot = (pid // n_chunks).to(tl.int64)
    row = slot
    if row_ids_ptr is not None:
        row = tl.load(row_ids_ptr + slot)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slot)
    s = Model(s_ptr + tl.multiple_of(row * stride_s, ALIGNED), 2.0 * half_unit(outer_s, temperature), inner_s)
    t = Model(t_ptr + tl.multiple_of(row * stride_t, ALIGNED), 2.0 * half_unit(outer_t, temperature), inner_t)
    slope = outer_s
    if inner_s is not None:
        slope *= inner_s
    upstream, values, finite = _load_rows(rows, slot)
    label, some = _load_label(label, slot, first_column, slope, 2.0 * half_unit(outer_s, 1.0))
    w = upstream * tl.div_rn(slope, temperature)
    out = out_ptr + tl.multiple_of((row if SCATTER else slot) * stride_out, ALIGNED)

    lane = tl.arange(0, TILE)
    begin = (pid % n_chunks) * CHUNK
    end = tl.minimum(begin + CHUNK, n_cols)
    if SCATTER:
        end = tl.where(row >= 0, end, begin)
    whole = begin + (end - begin) // (TILE * TILES) * (TILE * TILES)
    others = tl.zeros([TILE], tl.float32)
    entry = tl.full([TILE], -1, tl.int32)  # first column of the tile that holds it
    if ((upstream != 0.0) | some) & finite & (row >= 0):
        for column in range(begin, whole, TILE * TILES):
            raw_s = read_tiles(s, column, lane, TILE, TILES)
            raw_t = read_tiles(t, column, lane, TILE, TILES)
            for j in tl.static_range(TILES):
                at = column + j * TILE + lane
                g, sure = _tile_gradient(raw_s[j], raw_t[j], at, s, t, w, values, numbers, label, TERMS)
                if others_ptr is not None:
                    g = tl.where(sure, 0.0, g)
                    others += g
                    entry = tl.where(sure, column + j * TILE, entry)
                tl.store(out + at, g)
        for column in range(whole, end, TILE):
            at = column + lane
            raw_s = tl.load(s.row + at, mask=at < end, other=0.0)
            raw_t = tl.load(t.row + at, mask=at < end, other=0.0)
            g, sure = _tile_gradient(raw_s, raw_t, at, s, t, w, values, numbers, label, TERMS)
            if others_ptr is not None:
                g = tl.where(sure | (at >= end), 0.0, g)
                others += g
                entry = tl.where(sure & (at < end), column, entry)
            tl.store(out + at, g, mask=at < end)
    else:
        zero = tl.zeros([TILE], tl.float32)
        for column in range(begin, whole, TILE):
            tl.store(out + column + lane, zero)
        for column in range(whole, end, TILE):
            tl.store(out + column + lane, zero, mask=column + lane < end)
    if others_ptr is not None:
        tl.store(others_ptr + pid, total(others))
        tl.store(sure_ptr + pid, tl.max(tl.where(entry < 0, -1, entry + lane)))


@triton.jit(do_not_specialize=["stride_out", "n_chunks"])
def entry_kernel(
    out_ptr, row_ids_ptr, others_ptr, sure_ptr, stride_out, n_chunks, SCATTER: tl.constexpr, CHUNKS: tl.constexpr
):
    """Slot i's sure entry, where there is one: a row sums to 0; the formula is a difference of numbers near 1."""
    slot = tl.program_id(0).to(tl.int64)
    row = slot
    if SCATTER:
        row = tl.load(row_ids_ptr + slot)  # of an empty slot nothing is sure
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < n_chunks
    others = total(tl.load(others_ptr + slot * n_chunks + chunk, mask=inside, other=0.0))
    column = tl.max(tl.load(sure_ptr + slot * n_chunks + chunk, mask=inside, other=-1))
    if column >= 0:
        tl.store(out_ptr + row * stride_out + column, -others)


# ---- launch


class Term(NamedTuple):
    """weight times one divergence: its name in KINDS, its parameters and its row scalars by name, (S,) fp32.

    gate: (S,) fp32, multiplies the term in each row; where it is 0 the term is left out.
    """

    weight: float
    name: str
    params: tuple[float, ...] = ()
    rows: Mapping[str, Tensor] = MappingProxyType({})
    gate: Tensor | None = None


class Label(NamedTuple):
    """What labels add to the gradient at temperature 1; a label outside the columns at hand adds nothing.

    ids: (S,) int64. push: (S,) fp32, the gradient at the label's column. weight: (S,) fp32 of the student's
    probabilities at temperature 1, whose normaliser is shift and logsum; for a cross-entropy of weight c, push is -c.
    """

    ids: Tensor
    push: Tensor
    weight: Tensor | None = None
    shift: Tensor | None = None
    logsum: Tensor | None = None


NORMALISERS = ("shift_s", "logsum_s", "shift_t", "logsum_t")


def row_grad(
    logits_s: Tensor,
    logits_t: Tensor,
    upstream: Tensor,
    normalisers: Mapping[str, Tensor],
    terms: Sequence[Term],
    *,
    label: Label | None = None,
    first_column: int = 0,
    row_ids: Tensor | None = None,
    out: Tensor | None = None,
    scatter: bool = False,
    balance: bool = False,
    temperature: float | Tensor = 1.0,
    scale_s: float = 1.0,
    scale_t: float = 1.0,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
) -> Tensor:
    """Gradient in the student's logits of sum_i upstream[i] * sum of terms' weight * divergence of row row_ids[i].

    logits_s, logits_t  (N, V) bf16, fp16 or fp32, unit stride along V; or any columns of them, from first_column on: an
                        entry's gradient reads nothing but that entry and the slot's scalars
    upstream            (S,) fp32; where it is 0 the gradient is 0 whatever the logits hold
    normalisers         shift_s, logsum_s, shift_t, logsum_t of the kept rows, (S,) fp32 in nats, from `row_stats`
    terms               what to differentiate; a slot whose row scalars are not all finite gets zeros
    label               added at the labels' columns and for a cross-entropy, or None
    row_ids             (S,) int64 rows of the logits, or None where slot i is row i; -1 is an empty slot
    out                 where to write, rounded to nearest; by default a new (S, V) in the student's dtype
    scatter             write slot i to out[row_ids[i]] instead of out[i] and leave all other rows of out as they are;
                        out may be logits_s, which is then overwritten in place
    balance             for whole rows of a gradient that sums to 0 in each: the entry of a token that the student is
                        sure of is made of the others, since the formula keeps none of its digits. Not with softcap_s
    temperature         a positive float or an (S,) tensor, of the slots

    Returns out. For a whole (N, V) gradient without a pass of zeros beforehand, give all N rows with upstream 0 where
    not kept. Does not synchronise.
    """
    n_slots = upstream.numel()
    if out is None:
        out = torch.empty(n_slots, logits_s.shape[1], dtype=logits_s.dtype, device=logits_s.device)
    if balance and softcap_s is not None:
        raise ValueError("softcap_s must be None with balance=True")
    check_tiles(logits_s, logits_t, n_slots, row_ids)
    _check_out(out, logits_s, n_slots, row_ids, scatter)
    rows, kinds, numbers = _arguments([upstream, *(normalisers[name] for name in NORMALISERS)], terms)
    label = [] if label is None else [value for value in label if value is not None]
    maps = map_arguments(temperature, scale_s, softcap_s, scale_t, softcap_t)
    label = label[:1] + list(map(fp32, label[1:]))
    rest = (list(map(fp32, rows)), kinds, numbers, label, first_column, balance, *maps)
    if out is logits_s:
        _row_grad_inplace(logits_s, logits_t, row_ids, *rest)
    else:
        _row_grad(out, logits_s, logits_t, row_ids, scatter, *rest)
    return out


def _arguments(rows: list[Tensor], terms: Sequence[Term]) -> tuple[list[Tensor], list[int], list[float]]:
    """rows with those of the terms, kinds and numbers, as `_row_grad` takes them."""
    kinds: list[int] = []
    numbers: list[float] = []
    for term in terms:
        kind, names, _ = KINDS[term.name]
        kinds += (kind, len(rows) - 1, len(numbers), -1 if term.gate is None else len(rows) + len(names) - 1)
        rows = rows + [term.rows[name] for name in names] + ([] if term.gate is None else [term.gate])
        numbers += map(float, (term.weight, *term.params))
    return rows, kinds, numbers


@torch.library.custom_op("tip_kernels::row_grad", mutates_args={"out"})
def _row_grad(
    out: Tensor,
    logits_s: Tensor,
    logits_t: Tensor,
    row_ids: Tensor | None,
    scatter: bool,
    rows: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    label: Sequence[Tensor],
    first_column: int,
    balance: bool,
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    inner_s: float | None,
    outer_t: float,
    inner_t: float | None,
) -> None:
    """Writes out. rows, numbers and label as in `grad_kernel`, kinds its TERMS one after the other."""
    maps = (temperatures, temperature, outer_s, inner_s, outer_t, inner_t)
    _launch(out, logits_s, logits_t, row_ids, scatter, rows, kinds, numbers, label, first_column, balance, maps)


@torch.library.custom_op("tip_kernels::row_grad_", mutates_args={"logits_s"})
def _row_grad_inplace(
    logits_s: Tensor,
    logits_t: Tensor,
    row_ids: Tensor | None,
    rows: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    label: Sequence[Tensor],
    first_column: int,
    balance: bool,
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    inner_s: float | None,
    outer_t: float,
    inner_t: float | None,
) -> None:
    """Writes the rows row_ids of logits_s, or all of them: `row_grad` with out where it reads."""
    maps = (temperatures, temperature, outer_s, inner_s, outer_t, inner_t)
    scatter = row_ids is not None
    _launch(logits_s, logits_s, logits_t, row_ids, scatter, rows, kinds, numbers, label, first_column, balance, maps)


def _launch(
    out: Tensor,
    logits_s: Tensor,
    logits_t: Tensor,
    row_ids: Tensor | None,
    scatter: bool,
    rows: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    label: Sequence[Tensor],
    first_column: int,
    balance: bool,
    maps: tuple[Tensor | float | None, ...],
) -> None:
    n_slots, width = rows[0].shape[0], logits_s.shape[1]
    if n_slots == 0 or width == 0:
        return
    chunks = triton.cdiv(width, CHUNK)
    others = sure = None
    if balance:
        others = torch.empty(n_slots, chunks, device=out.device)
        sure = torch.empty(n_slots, chunks, dtype=torch.int32, device=out.device)
    with on_device(logits_s):
        grad_kernel[(n_slots * chunks,)](
            out, logits_s, logits_t, aligned(row_ids), others, sure, aligned(maps[0]), *maps[1:],
            tuple(map(aligned, rows)), tuple(numbers) or (0.0,), tuple(map(aligned, label)),
            logits_s.stride(0), logits_t.stride(0), out.stride(0), width, chunks, first_column,
            TERMS=tuple(zip(*(kinds[i::4] for i in range(4)), strict=True)), SCATTER=scatter,
            ALIGNED=row_alignment(logits_s, logits_t, out), CHUNK=CHUNK, **grad_config(),
        )  # fmt: skip
        if balance:
            entry_kernel[(n_slots,)](
                out, row_ids, others, sure, out.stride(0), chunks,
                SCATTER=scatter, CHUNKS=triton.next_power_of_2(chunks), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip


def check_tiles(logits_s: Tensor, logits_t: Tensor, n_slots: int, row_ids: Tensor | None) -> None:
    """Refuses logits that do not fit each other, their slots or the kernels' stride."""
    if logits_t.shape != logits_s.shape:
        raise ValueError(f"logits_t must have shape {tuple(logits_s.shape)}, got {tuple(logits_t.shape)}")
    for name, tensor in (("logits_s", logits_s), ("logits_t", logits_t)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have unit stride along the vocabulary, got {tensor.stride()}")
    if row_ids is None and n_slots != logits_s.shape[0]:
        raise ValueError(f"row_ids must be given for {n_slots} slots of {logits_s.shape[0]} rows")


def _check_out(out: Tensor, logits_s: Tensor, n_slots: int, row_ids: Tensor | None, scatter: bool) -> None:
    if scatter and row_ids is None:
        raise ValueError("row_ids must be given with scatter=True")
    rows, width = logits_s.shape[0] if scatter else n_slots, logits_s.shape[1]
    if out.shape != (rows, width) or (out.stride(1) != 1 and width > 1):
        raise ValueError(
            f"out must have shape ({rows}, {width}) and unit stride along the vocabulary, "
            f"got {tuple(out.shape)} and {out.stride()}"
        )


def grad_config() -> dict[str, int | bool]:
    """Pinned launch settings of `grad_kernel`: 8 columns a lane and tile."""
    return {"TILE": 4 * 8 * warp(), "TILES": 2, "num_warps": 4, "enable_fp_fusion": False}
