"""LEARN, before the gradient: the row sums of divergences that need both normalisers first (two-pass in `_family.py`).

    out[name][i] = sum over v of a summand of row row_ids[i]                 JSD, skew KLs, total variation, ToDi

One more read of the kept rows. A row is cut into the parts of `row_stats`, one program each, and a second kernel adds
the parts in column order, so a row's bits depend on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._family import KINDS, NEVER, at_least_never, sum_terms
from ._launch import aligned, fp32, map_arguments, on_device, row_alignment, warp
from ._online import Model, capped, half_unit, total, widen
from .row_grad import NORMALISERS, Term, check_tiles, load_normaliser, log2_p
from .row_stats import PART, read_tiles

SLOTS = 128  # slots of one program of `add_parts_kernel`


@triton.jit
def _tile_sums(raw_s, raw_t, inside, s, t, rows, numbers, sums, TERMS: tl.constexpr):
    """The lanes `sums`, two for each term, with one tile added; columns that are not `inside` count as banned."""
    l_s = log2_p(capped(widen(raw_s), s.inner), s.unit, rows[0], rows[1])
    l_t = log2_p(capped(widen(raw_t), t.inner), t.unit, rows[2], rows[3])
    if inside is not None:
        l_s = tl.where(inside, l_s, NEVER)
        l_t = tl.where(inside, l_t, NEVER)
    l_s = at_least_never(l_s)
    l_t = at_least_never(l_t)
    p_s = tl.exp2(l_s)
    p_t = tl.exp2(l_t)
    out = ()
    for i in tl.static_range(len(TERMS)):
        a, b = sum_terms(TERMS[i][0], TERMS[i][1], l_s, l_t, p_s, p_t, numbers)
        out = out + (sums[2 * i] + a, sums[2 * i + 1] + b)  # noqa: RUF005 (Triton has no unpacking)
    return out


@triton.jit(do_not_specialize=["stride_s", "stride_t", "n_slots", "n_cols", "n_parts"])
def sums_kernel(
    out_ptr, s_ptr, t_ptr, row_ids_ptr, temperature_ptr,
    temperature, outer_s, inner_s, outer_t, inner_t, rows, numbers,
    stride_s, stride_t, n_slots, n_cols, n_parts,
    TERMS: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums over part `pid % n_parts` of slot `pid // n_parts` to out[sum, part, slot]; NaN for a negative row id.

    rows: pointers to (S,) shift_s, logsum_s, shift_t, logsum_t. TERMS: kind and place of the first parameter of each.
    """
    pid = tl.program_id(0)
    slot = (pid // n_parts).to(tl.int64)
    part = pid % n_parts
    row = slot
    if row_ids_ptr is not None:
        row = tl.load(row_ids_ptr + slot)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slot)
    values = load_normaliser(rows[0], rows[1], slot) + load_normaliser(rows[2], rows[3], slot)
    s = Model(s_ptr + tl.multiple_of(row * stride_s, ALIGNED), 2.0 * half_unit(outer_s, temperature), inner_s)
    t = Model(t_ptr + tl.multiple_of(row * stride_t, ALIGNED), 2.0 * half_unit(outer_t, temperature), inner_t)
    lane = tl.arange(0, TILE)
    begin = part * PART
    end = tl.where(row >= 0, tl.minimum(begin + PART, n_cols), begin)
    whole = begin + (end - begin) // (TILE * TILES) * (TILE * TILES)
    sums = ()
    for _ in tl.static_range(2 * len(TERMS)):
        sums = sums + (tl.zeros([TILE], tl.float32),)  # noqa: RUF005
    for column in range(begin, whole, TILE * TILES):
        raw_s = read_tiles(s, column, lane, TILE, TILES)
        raw_t = read_tiles(t, column, lane, TILE, TILES)
        for j in tl.static_range(TILES):
            sums = _tile_sums(raw_s[j], raw_t[j], None, s, t, values, numbers, sums, TERMS)
    for column in range(whole, end, TILE):
        inside = column + lane < end
        raw_s = tl.load(s.row + column + lane, mask=inside, other=0.0)
        raw_t = tl.load(t.row + column + lane, mask=inside, other=0.0)
        sums = _tile_sums(raw_s, raw_t, inside, s, t, values, numbers, sums, TERMS)
    for i in tl.static_range(2 * len(TERMS)):
        value = tl.where(row >= 0, total(sums[i]), float("nan"))
        tl.store(out_ptr + (i * n_parts + part).to(tl.int64) * n_slots + slot, value)


@triton.jit(do_not_specialize=["n_slots", "n_parts"])
def add_parts_kernel(out_ptr, parts_ptr, n_slots, n_parts, SLOTS: tl.constexpr):
    """out[sum, slot] = parts[sum, 0, slot] + parts[sum, 1, slot] + ..., in this order."""
    blocks = tl.cdiv(n_slots, SLOTS)
    sum_ = (tl.program_id(0) // blocks).to(tl.int64)
    slot = (tl.program_id(0) % blocks) * SLOTS + tl.arange(0, SLOTS)
    at = parts_ptr + sum_ * n_parts * n_slots + slot
    total = tl.load(at, mask=slot < n_slots, other=0.0)
    for _ in range(1, n_parts):
        at += n_slots
        total += tl.load(at, mask=slot < n_slots, other=0.0)
    tl.store(out_ptr + sum_ * n_slots + slot, total, mask=slot < n_slots)


def row_sums(
    logits_s: Tensor,
    logits_t: Tensor,
    normalisers: Mapping[str, Tensor],
    terms: Sequence[Term],
    *,
    row_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale_s: float = 1.0,
    scale_t: float = 1.0,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
) -> list[dict[str, Tensor]]:
    """The row sums of each term, {name: (S,) fp32}, names as in `_family.KINDS`; arguments as in `row_grad`.

    A row that is NaN in either model is NaN in its sums. Does not synchronise.
    """
    for term in terms:
        if not KINDS[term.name][2]:
            raise ValueError(f"terms must be divergences with row sums of their own, got {term.name!r}")
    check_tiles(logits_s, logits_t, normalisers["shift_s"].numel(), row_ids)
    numbers, kinds = [], []
    for term in terms:
        kinds += (KINDS[term.name][0], len(numbers))
        numbers += map(float, term.params)
    maps = map_arguments(temperature, scale_s, softcap_s, scale_t, softcap_t)
    rows = [fp32(normalisers[name]) for name in NORMALISERS]
    out = _row_sums(logits_s, logits_t, row_ids, rows, kinds, numbers, *maps)
    return [
        dict(zip(KINDS[term.name][2], out[2 * i : 2 * i + 2].unbind(0), strict=True)) for i, term in enumerate(terms)
    ]


@torch.library.custom_op("tip_kernels::row_sums", mutates_args=())
def _row_sums(
    logits_s: Tensor,
    logits_t: Tensor,
    row_ids: Tensor | None,
    rows: Sequence[Tensor],
    kinds: Sequence[int],
    numbers: Sequence[float],
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    inner_s: float | None,
    outer_t: float,
    inner_t: float | None,
) -> Tensor:
    """(2 terms, S) sums. rows and numbers as in `sums_kernel`, kinds its TERMS one after the other."""
    out = _new_sums(logits_s, logits_t, row_ids, rows, kinds)
    (n_sums, n_slots), width = out.shape, logits_s.shape[1]
    if out.numel() == 0:
        return out
    parts = triton.cdiv(width, PART)
    partial = out.new_empty(n_sums, parts, n_slots)
    with on_device(out):
        sums_kernel[(n_slots * parts,)](
            partial, logits_s, logits_t, aligned(row_ids), aligned(temperatures),
            temperature, outer_s, inner_s, outer_t, inner_t, tuple(map(aligned, rows)), tuple(numbers) or (0.0,),
            logits_s.stride(0), logits_t.stride(0), n_slots, width, parts,
            TERMS=tuple(zip(kinds[::2], kinds[1::2], strict=True)), ALIGNED=row_alignment(logits_s, logits_t),
            PART=PART, TILE=8 * warp(), TILES=2, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        add_parts_kernel[(n_sums * triton.cdiv(n_slots, SLOTS),)](
            out, partial, n_slots, parts, SLOTS=SLOTS, num_warps=1, enable_fp_fusion=False
        )
    return out


@_row_sums.register_fake
def _new_sums(
    logits_s: Tensor,
    logits_t: Tensor,
    row_ids: Tensor | None,
    rows: Sequence[Tensor],
    kinds: Sequence[int],
    *settings: object,
) -> Tensor:
    return rows[0].new_empty(len(kinds), rows[0].shape[0])
