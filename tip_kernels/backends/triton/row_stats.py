"""MEASURE from logits in memory: every statistic of a row in one read of both models.

    z = softcap tanh(scale logits / softcap) / temperature          (without a softcap: scale logits / temperature)

A row is cut into parts of PART columns, one program each; a second kernel merges a row's parts in column order and
writes the statistics (formulas: `_online.py`). PART, TILE and the order of every sum are fixed, so a row's bits depend
on nothing but its logits and settings: not on N, its neighbours, the run, whether the logits came whole or as tiles, or
the dtype, stride and alignment that they came in.

A part is read with per-lane sums and a shift taken from its first columns (`_part_lanes`); that needs no maximum in
the loop. A part that rises far above its first columns is read once more over a better shift. Where lanes cannot be
exact (a banned token, NaN, +inf, the ragged end), tiles are folded one by one with everything checked (`_part_tiles`).

Rows whose stride is no multiple of 16 bytes are read element by element: correct, but below the memory's rate. (Peeling
the start of such rows would make a row's bits depend on its position.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import aligned, fp32, map_arguments, on_device, row_alignment, target, warp
from ._online import (
    FLOOR,
    GUARD,
    Lanes,
    Model,
    One,
    Pair,
    Top,
    add_one,
    add_pair,
    add_top,
    alive,
    capped,
    close_one,
    close_pair,
    finish_one,
    finish_pair,
    grid_ceil,
    half_unit,
    merge,
    merge_one,
    merge_top,
    no_one,
    no_pair,
    no_top,
    settle,
    settle_one,
    tile_one,
    tile_pair,
    tile_top,
    top_of_lanes,
    widen,
)

PART = 8192  # columns of one program; 19 parts at V = 152k
ROWS = 32  # rows of one program of `finish_kernel`

# ---- kernels


@triton.jit
def read_tiles(model, column, lane, TILE: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles from `column` on, as stored; all loads are issued before the first is used."""
    raw = ()
    for j in tl.static_range(TILES):
        raw = raw + (tl.load(model.row + column + j * TILE + lane),)  # noqa: RUF005 (Triton has no unpacking)
    return raw


@triton.jit
def _first_shift(model, column, lane, TILE: tl.constexpr, TILES: tl.constexpr):
    """(the shift that the first TILES tiles ask for, whether those hold anything finite)."""
    raw = read_tiles(model, column, lane, TILE, TILES)
    most = tl.maximum(widen(raw[0]), FLOOR)
    for j in tl.static_range(1, TILES):
        most = tl.maximum(most, widen(raw[j]))
    most = tl.max(most)
    return grid_ceil(capped(most, model.inner) * model.unit), most > FLOOR


@triton.jit
def _lanes(s, t, k_s, k_t, begin, end, MARGINS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """State of [begin, end), a whole number of TILES tiles, over the given shifts, and whether it is exact."""
    lane = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.float32)
    one_s, one_t, pair = One(k_s, zero, zero), One(k_t, zero, zero), Lanes(zero, zero, zero, zero)
    top_s = Top(zero + FLOOR, zero + FLOOR, lane)
    top_t = top_s
    for column in range(begin, end, TILE * TILES):
        raw_s = read_tiles(s, column, lane, TILE, TILES)
        raw_t = raw_s
        if t.row is not None:
            raw_t = read_tiles(t, column, lane, TILE, TILES)
        for j in tl.static_range(TILES):
            y_s = capped(widen(raw_s[j]), s.inner)
            one_s, u_s, h_s, e_s = add_one(one_s, y_s, s.unit)
            if MARGINS:
                top_s = add_top(top_s, y_s, column + j * TILE)
            if t.row is not None:
                y_t = capped(widen(raw_t[j]), t.inner)
                one_t, u_t, h_t, e_t = add_one(one_t, y_t, t.unit)
                pair = add_pair(pair, u_s, h_s, e_s, u_t, h_t, e_t)
                if MARGINS:
                    top_t = add_top(top_t, y_t, column + j * TILE)
    one_s, exact = close_one(one_s)
    one_t, exact_t = close_one(one_t)
    pair, exact_pair = close_pair(pair)
    if t.row is not None:
        exact = exact & exact_t & exact_pair
    return one_s, one_t, pair, top_of_lanes(top_s, lane), top_of_lanes(top_t, lane), exact


@triton.jit
def _part_lanes(s, t, begin, end, MARGINS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """`_lanes` with shifts from the first columns and, where a mass rose far above its shift, once more from there."""
    lane = tl.arange(0, TILE)
    k_s, some = _first_shift(s, begin, lane, TILE, TILES)
    k_t = k_s
    if t.row is not None:
        k_t, some_t = _first_shift(t, begin, lane, TILE, TILES)
        some = some & some_t
    one_s, one_t, pair, top_s, top_t = no_one(), no_one(), no_pair(), no_top(), no_top()
    exact = begin > end
    tries = tl.where(some, 2, 0)
    while tries > 0:
        one_s, one_t, pair, top_s, top_t, exact = _lanes(s, t, k_s, k_t, begin, end, MARGINS, TILE, TILES)
        high = exact & (one_s.mass > GUARD)
        k_s = settle_one(one_s).shift
        if t.row is not None:
            high = exact & ((one_s.mass > GUARD) | (one_t.mass > GUARD))
            k_t = settle_one(one_t).shift
        tries = tl.where(high, tries - 1, 0)
    return one_s, one_t, pair, top_s, top_t, exact


@triton.jit
def _tile(model, column, lane, end):
    """One tile of (capped) logits; columns from `end` on read as banned."""
    inside = column + lane < end
    y = capped(widen(tl.load(model.row + column + lane, mask=inside, other=0.0)), model.inner)
    return tl.where(inside, y, float("-inf"))


@triton.jit
def _part_tiles(s, t, one_s, one_t, pair, top_s, top_t, begin, end, MARGINS: tl.constexpr, TILE: tl.constexpr):
    """The given state merged with the columns [begin, end), whatever they hold."""
    lane = tl.arange(0, TILE)
    for column in range(begin, end, TILE):
        y_s = _tile(s, column, lane, end)
        banned_s = y_s * s.unit <= FLOOR
        new_s, u_s, h_s, e_s = tile_one(y_s, s.unit, banned_s)
        if MARGINS:
            top_s = merge_top(top_s, tile_top(y_s, column, lane))
        if t.row is None:
            one_s = merge_one(one_s, new_s)
        else:
            y_t = _tile(t, column, lane, end)
            banned_t = y_t * t.unit <= FLOOR
            new_t, u_t, h_t, e_t = tile_one(y_t, t.unit, banned_t)
            new = tile_pair(u_s, h_s, e_s, banned_s, u_t, h_t, e_t, banned_t)
            one_s, one_t, pair = merge(one_s, one_t, pair, new_s, new_t, new)
            if MARGINS:
                top_t = merge_top(top_t, tile_top(y_t, column, lane))
    return one_s, one_t, pair, top_s, top_t


@triton.jit(do_not_specialize=["stride_s", "stride_t", "n_rows", "n_cols", "n_parts", "first_part", "all_parts"])
def fold_kernel(
    state_ptr, s_ptr, t_ptr, temperature_ptr,
    temperature, outer_s, inner_s, outer_t, inner_t,
    stride_s, stride_t, n_rows, n_cols, n_parts, first_part, all_parts,
    MARGINS: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Folds part `pid % n_parts` of row `pid // n_parts` into state[field, first_part + part, row]."""
    pid = tl.program_id(0)
    row = (pid // n_parts).to(tl.int64)
    part = pid % n_parts
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    s = Model(s_ptr + tl.multiple_of(row * stride_s, ALIGNED), half_unit(outer_s, temperature), inner_s)
    t = Model(None, 0.0, None)
    if t_ptr is not None:
        t = Model(t_ptr + tl.multiple_of(row * stride_t, ALIGNED), half_unit(outer_t, temperature), inner_t)

    one_s, one_t, pair, top_s, top_t = no_one(), no_one(), no_pair(), no_top(), no_top()
    begin = part * PART
    end = tl.minimum(begin + PART, n_cols)
    whole = begin + (end - begin) // (TILE * TILES) * (TILE * TILES)
    done = begin
    if whole > begin:
        new_s, new_t, new, new_top_s, new_top_t, exact = _part_lanes(s, t, begin, whole, MARGINS, TILE, TILES)
        if exact:
            one_s, one_t, pair, top_s, top_t = new_s, new_t, new, new_top_s, new_top_t
            done = whole
    one_s, one_t, pair, top_s, top_t = _part_tiles(s, t, one_s, one_t, pair, top_s, top_t, done, end, MARGINS, TILE)

    out = state_ptr + (first_part + part).to(tl.int64) * n_rows + row
    stride = all_parts.to(tl.int64) * n_rows
    before = first_part * PART
    if t_ptr is None:
        one_s = settle_one(one_s)
        store_fields(out, stride, 0, (one_s.shift, one_s.mass, one_s.moment))
        if MARGINS:
            store_fields(out, stride, 3, (top_s.first, top_s.second, (top_s.column + before).to(tl.float32)))
    else:
        one_s, one_t, pair = settle(one_s, one_t, pair)
        store_fields(out, stride, 0, (one_s.shift, one_s.mass, one_s.moment, one_t.shift, one_t.mass, one_t.moment))
        store_fields(out, stride, 6, (pair.drift_t, pair.drift_s, pair.spread, pair.ban_s, pair.ban_t))
        if MARGINS:
            store_fields(out, stride, 11, (top_s.first, top_s.second, (top_s.column + before).to(tl.float32)))
            store_fields(out, stride, 14, (top_t.first, top_t.second, (top_t.column + before).to(tl.float32)))


@triton.jit
def store_fields(ptr, stride, FIRST: tl.constexpr, values):
    for i in tl.static_range(len(values)):
        tl.store(ptr + (FIRST + i) * stride, values[i])


@triton.jit
def _load_one(ptr, stride, FIRST: tl.constexpr, live):
    shift = tl.load(ptr + FIRST * stride, mask=live, other=FLOOR)
    mass = tl.load(ptr + (FIRST + 1) * stride, mask=live, other=0.0)
    return One(shift, mass, tl.load(ptr + (FIRST + 2) * stride, mask=live, other=0.0))


@triton.jit
def _load_pair(ptr, stride, FIRST: tl.constexpr, live):
    values = ()
    for i in tl.static_range(5):
        values = values + (tl.load(ptr + (FIRST + i) * stride, mask=live, other=0.0),)  # noqa: RUF005
    return Pair(values[0], values[1], values[2], values[3], values[4])


@triton.jit
def _load_top(ptr, stride, FIRST: tl.constexpr, live):
    first = tl.load(ptr + FIRST * stride, mask=live, other=FLOOR)
    second = tl.load(ptr + (FIRST + 1) * stride, mask=live, other=FLOOR)
    return Top(first, second, tl.load(ptr + (FIRST + 2) * stride, mask=live, other=0.0))


@triton.jit
def _margin(top, one, outer, temperature):
    """Top-1 minus top-2 in nats; +inf with fewer than two finite logits, NaN for a row that is not alive."""
    margin = (top.first - top.second) * tl.div_rn(outer, temperature)
    margin = tl.where(top.second > FLOOR, margin, float("inf"))
    return tl.where(alive(one), margin, float("nan"))


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def finish_kernel(
    out_ptr, state_ptr, temperature_ptr, temperature, outer_s, outer_t, n_rows, n_parts,
    TEACHER: tl.constexpr, MARGINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merges the parts of ROWS rows in column order and writes the statistics, field-major (field, row)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row, mask=live, other=1.0)
    stride = n_parts.to(tl.int64) * n_rows
    s = _load_one(state_ptr + row, stride, 0, live)
    if TEACHER:
        t = _load_one(state_ptr + row, stride, 3, live)
        pair = _load_pair(state_ptr + row, stride, 6, live)
    if MARGINS:
        top_s = _load_top(state_ptr + row, stride, 11 if TEACHER else 3, live)
        if TEACHER:
            top_t = _load_top(state_ptr + row, stride, 14, live)
    at = state_ptr + row
    for _ in range(1, n_parts):
        at += n_rows
        new_s = _load_one(at, stride, 0, live)
        if TEACHER:
            s, t, pair = merge(s, t, pair, new_s, _load_one(at, stride, 3, live), _load_pair(at, stride, 6, live))
        else:
            s = merge_one(s, new_s)
        if MARGINS:
            top_s = merge_top(top_s, _load_top(at, stride, 11 if TEACHER else 3, live))
            if TEACHER:
                top_t = merge_top(top_t, _load_top(at, stride, 14, live))
    if TEACHER:
        s, t, pair = settle(s, t, pair)
        store_rows(out_ptr + row, n_rows, 0, finish_one(s) + finish_one(t) + finish_pair(s, t, pair), live)
        if MARGINS:
            agree = tl.where((top_s.column == top_t.column) & alive(s) & alive(t), 1.0, 0.0)
            margins = (_margin(top_s, s, outer_s, temperature), _margin(top_t, t, outer_t, temperature), agree)
            store_rows(out_ptr + row, n_rows, 11, margins, live)
    else:
        s = settle_one(s)
        store_rows(out_ptr + row, n_rows, 0, finish_one(s), live)
        if MARGINS:
            store_rows(out_ptr + row, n_rows, 4, (_margin(top_s, s, outer_s, temperature),), live)


@triton.jit
def store_rows(ptr, stride, FIRST: tl.constexpr, values, live):
    """values[i] of every row to field FIRST + i."""
    for i in tl.static_range(len(values)):
        tl.store(ptr + (FIRST + i) * stride.to(tl.int64), values[i], mask=live)


# ---- launch


ONE_FIELDS = ("shift_s", "logsum_s", "lse_s", "entropy_s")
PAIR_FIELDS = (*ONE_FIELDS, "shift_t", "logsum_t", "lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq")


@dataclass(frozen=True, eq=False)
class RowState:
    """Unfinished sums of N rows over a vocabulary, and the settings that they are being taken under.

    sums: (F, parts, N) fp32, each part being `part` columns; F is 3 or 11, plus 3 a model with margins.
    """

    sums: Tensor
    vocab: int
    part: int
    teacher: bool
    margins: bool
    temperature: float | Tensor
    scale_s: float
    scale_t: float
    softcap_s: float | None
    softcap_t: float | None

    def maps(self) -> tuple[Tensor | None, float, float, float | None, float, float | None]:
        """The settings as the kernels take them."""
        return map_arguments(self.temperature, self.scale_s, self.softcap_s, self.scale_t, self.softcap_t)


def new_state(
    n_rows: int,
    vocab: int,
    device: torch.device | str,
    *,
    teacher: bool = True,
    margins: bool = False,
    temperature: float | Tensor = 1.0,
    scale_s: float = 1.0,
    scale_t: float = 1.0,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
    part: int = PART,
) -> RowState:
    """State for rows of `vocab` columns, to be filled by `fold_tile` and read by `finish`.

    temperature is a positive float or an (N,) tensor and divides both models' logits; scale and softcap are positive.
    """
    if vocab < 1 or vocab >= 2**24:
        raise ValueError(f"vocab must be in [1, 2**24), got {vocab}")
    if isinstance(temperature, Tensor):
        if temperature.shape != (n_rows,):
            raise ValueError(
                f"temperature must be a float or a tensor of shape ({n_rows},), got {tuple(temperature.shape)}"
            )
        temperature = fp32(temperature.to(device))
    fields = (11 if teacher else 3) + (3 * (1 + teacher) if margins else 0)
    sums = torch.empty(fields, triton.cdiv(vocab, part), n_rows, dtype=torch.float32, device=device)
    return RowState(sums, vocab, part, teacher, margins, temperature, scale_s, scale_t, softcap_s, softcap_t)


def fold_tile(state: RowState, logits_s: Tensor, logits_t: Tensor | None = None, column: int = 0) -> None:
    """Folds the columns [column, column + width) of every row into the state; each column must be folded exactly once.

    logits_s, logits_t: (N, width) bf16, fp16 or fp32, unit stride along the width, before scale and softcap. `column`
    is a multiple of state.part, and so is the width unless the tile ends the vocabulary. Does not synchronise.
    """
    width = logits_s.shape[1]
    tiles = [("logits_s", logits_s)] + ([("logits_t", logits_t)] if logits_t is not None else [])
    if state.teacher != (logits_t is not None):
        raise ValueError(f"logits_t must be {'a tensor' if state.teacher else 'None'} for this state")
    for name, tile in tiles:
        if tile.shape != (state.sums.shape[2], width):
            raise ValueError(f"{name} must have shape ({state.sums.shape[2]}, {width}), got {tuple(tile.shape)}")
        if tile.stride(1) != 1 and width > 1:
            raise ValueError(f"{name} must have unit stride along the vocabulary, got {tile.stride()}")
    if column % state.part or column + width > state.vocab or (width % state.part and column + width != state.vocab):
        raise ValueError(
            f"column and width must cut [0, {state.vocab}) at multiples of {state.part}, got {column} and {width}"
        )
    _fold_tile(state.sums, logits_s, logits_t, *state.maps(), column // state.part, state.part, state.margins)


@torch.library.custom_op("tip_kernels::fold_tile", mutates_args={"sums"})
def _fold_tile(
    sums: Tensor,
    logits_s: Tensor,
    logits_t: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    inner_s: float | None,
    outer_t: float,
    inner_t: float | None,
    first_part: int,
    part: int,
    margins: bool,
) -> None:
    """Writes the parts from first_part on of `RowState.sums`."""
    n_rows, width = logits_s.shape
    if n_rows == 0:
        return
    parts = triton.cdiv(width, part)
    alignment = row_alignment(logits_s, *(() if logits_t is None else (logits_t,)))
    has_cap = inner_s is not None or inner_t is not None
    with on_device(logits_s):
        fold_kernel[(n_rows * parts,)](
            sums, logits_s, logits_t, aligned(temperatures), temperature, outer_s, inner_s, outer_t, inner_t,
            logits_s.stride(0), logits_t.stride(0) if logits_t is not None else 0,
            n_rows, width, parts, first_part, sums.shape[1],
            MARGINS=margins, ALIGNED=alignment, PART=part, **fold_config(margins, has_cap, alignment > 1),
        )  # fmt: skip


def finish(state: RowState) -> dict[str, Tensor]:
    """Statistics of every row, (N,) fp32 each, in nats: see `row_stats`. Does not synchronise."""
    temperatures, temperature, outer_s, _, outer_t, _ = state.maps()
    out = _finish_rows(state.sums, temperatures, temperature, outer_s, outer_t, state.teacher, state.margins)
    stats = dict(zip(_names(state.teacher, state.margins), out.unbind(0), strict=True))
    if "agree" in stats:
        stats["agree"] = stats["agree"] > 0.5
    return stats


def _names(teacher: bool, margins: bool) -> tuple[str, ...]:
    """The statistics in the order that `finish_kernel` stores them."""
    if teacher:
        return (*PAIR_FIELDS, "margin_s", "margin_t", "agree") if margins else PAIR_FIELDS
    return (*ONE_FIELDS, "margin_s") if margins else ONE_FIELDS


@torch.library.custom_op("tip_kernels::finish_rows", mutates_args=())
def _finish_rows(
    sums: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    outer_t: float,
    teacher: bool,
    margins: bool,
) -> Tensor:
    """(fields, N) statistics of `RowState.sums`."""
    _, parts, n_rows = sums.shape
    out = _new_rows(sums, teacher, margins)
    if n_rows:
        with on_device(out):
            finish_kernel[(triton.cdiv(n_rows, ROWS),)](
                out, sums, aligned(temperatures), temperature, outer_s, outer_t, n_rows, parts,
                TEACHER=teacher, MARGINS=margins, ROWS=ROWS, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return out


@_finish_rows.register_fake
def _new_rows(sums: Tensor, *settings: object) -> Tensor:
    return sums.new_empty(len(_names(*settings[-2:])), sums.shape[2])


def row_stats(
    logits_s: Tensor, logits_t: Tensor | None = None, *, margins: bool = False, **settings
) -> dict[str, Tensor]:
    """Every statistic of each row from one read of the logits.

    logits_s, logits_t: (N, V) bf16, fp16 or fp32 (each its own), unit stride along V. settings: temperature, scale_s,
    scale_t, softcap_s, softcap_t, as in `new_state`.
    Returns (N,) fp32 tensors in nats: shift_s, logsum_s, lse_s = shift_s + logsum_s, entropy_s, with a teacher the same
    of the teacher, kl_fwd = KL(t || s), kl_rev = KL(s || t) and hellinger_sq; with margins margin_s, margin_t and agree
    (bool). log p = (z - shift) - logsum is finer than z - lse. A row with NaN, +inf or nothing but -inf is NaN in every
    statistic that reads it (agree is False there). Does not synchronise.
    """
    state = new_state(*logits_s.shape, logits_s.device, teacher=logits_t is not None, margins=margins, **settings)
    fold_tile(state, logits_s, logits_t)
    return finish(state)


def fold_config(margins: bool, has_cap: bool, aligned: bool) -> dict[str, int | bool]:
    """Pinned launch settings of `fold_kernel`: 8 columns a lane and tile, one warp a program."""
    config = {
        "TILE": 8 * warp(),
        "TILES": 1 if has_cap else 2 if margins else 4,
        "num_warps": 1,
        "enable_fp_fusion": False,  # the bits must not depend on the compiler's default
    }
    backend, arch = target()
    if backend == "cuda" and arch >= 100 and aligned and not (margins or has_cap):
        config["maxnreg"] = 168  # left alone, ptxas stops at 128 there and spills
    return config
