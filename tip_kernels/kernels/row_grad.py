"""LEARN from logits in memory: the gradient in the student's logits, element by element, for kept rows only.

    out[i, v] = upstream[i] * dz/dlogit * sum over terms of weight * dD/dz_v                z as in row_stats.py

S kept slots; slot i reads row row_ids[i]. l_s, l_t are log-probabilities in bits (log2 p), formed from the shift and
the log of the sum, never from the rounded lse; p = 2^l. Each divergence is one function of these and of its own row
scalars that adds w times its gradient to g. Where the student bans a token the gradient is exactly 0.

Weight 0 writes exact zeros without reading the row, so "dense" is the same kernel over all N rows. The sums that a
divergence's row scalars may need (JSD and others) are not taken here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import row_alignment, softcap_factors, warp
from ._online import C_TAIL, C, Model, capped, half_unit, shift_from_nats, widen
from .row_stats import read_tiles

CHUNK = 8192  # columns of one program
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-(2.0**101))  # log2 p of a banned token, 2 FLOOR: finite, so that 0 * NEVER = 0

# ---- one function a divergence: g + w dD/dz_s

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)


@triton.jit
def forward_kl(g, w, p_s, p_t):
    """KL(t || s): p_s - p_t"""
    return tl.fma(w, p_s - p_t, g)


@triton.jit
def reverse_kl(g, w, l_s, l_t, p_s, kl_rev):
    """KL(s || t): p_s (ln(p_s / p_t) - KL(s || t))"""
    return tl.fma(p_s, tl.fma(l_s - l_t, w * LN2, -w * kl_rev), g)


@triton.jit
def add_gradient(KIND: tl.constexpr, R: tl.constexpr, P: tl.constexpr, g, w, l_s, l_t, p_s, p_t, rows, numbers):
    """g + w times the gradient of one term: its kind, first row scalar rows[R] and weight numbers[P]."""
    w *= numbers[P]
    if KIND == FORWARD_KL:
        return forward_kl(g, w, p_s, p_t)
    else:
        tl.static_assert(KIND == REVERSE_KL, "no such divergence")
        return reverse_kl(g, w, l_s, l_t, p_s, rows[R])


# ---- kernel


@triton.jit
def log2_normaliser(shift, logsum):
    """(2 k, log2 of the sum at shift k), k on the grid of the fold, from a shift and logsum in nats."""
    k = shift_from_nats(shift)
    return 2.0 * k, (logsum + (tl.fma(-k, C, shift) - k * C_TAIL)) * LOG2E


@triton.jit
def _tile_gradient(raw_s, raw_t, s, t, w, rows, numbers, TERMS: tl.constexpr):
    """One tile of the output; rows = (2 k_s, log2 mass_s, 2 k_t, log2 mass_t, row scalars of the terms)."""
    y_s = capped(widen(raw_s), s.inner)
    y_t = capped(widen(raw_t), t.inner)
    l_s = tl.maximum(tl.fma(y_s, s.unit, -rows[0]) - rows[1], NEVER)
    l_t = tl.fma(y_t, t.unit, -rows[2]) - rows[3]
    l_t = tl.where(l_s > NEVER, l_t, NEVER)  # what the student bans counts as banned in both: no gradient
    p_s = tl.exp2(l_s)
    p_t = tl.exp2(l_t)
    g = tl.zeros_like(p_s)
    for i in tl.static_range(len(TERMS)):
        g = add_gradient(TERMS[i][0], TERMS[i][1], TERMS[i][2], g, w, l_s, l_t, p_s, p_t, rows, numbers)
    if s.inner is not None:
        g *= 1.0 - y_s * y_s
    return g


@triton.jit
def _load_rows(rows, slot):
    """(upstream, (normalisers and row scalars of the slot), whether all of the latter are finite)."""
    two_k_s, log_s = log2_normaliser(tl.load(rows[1] + slot), tl.load(rows[2] + slot))
    two_k_t, log_t = log2_normaliser(tl.load(rows[3] + slot), tl.load(rows[4] + slot))
    values = (two_k_s, log_s, two_k_t, log_t)
    zero = 0.0 * two_k_s + 0.0 * log_s + 0.0 * two_k_t + 0.0 * log_t
    for i in tl.static_range(5, len(rows)):
        value = tl.load(rows[i] + slot)
        values = values + (value,)  # noqa: RUF005
        zero += 0.0 * value
    return tl.load(rows[0] + slot), values, zero == 0.0


@triton.jit(do_not_specialize=["stride_s", "stride_t", "stride_out", "n_cols", "n_chunks"])
def grad_kernel(
    out_ptr, s_ptr, t_ptr, row_ids_ptr, temperature_ptr,
    temperature, outer_s, inner_s, outer_t, inner_t, rows, numbers,
    stride_s, stride_t, stride_out, n_cols, n_chunks,
    TERMS: tl.constexpr, SCATTER: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Columns [c CHUNK, (c + 1) CHUNK) of slot i, c = pid % n_chunks, i = pid // n_chunks.

    rows: pointers to (S,) upstream, shift_s, logsum_s, shift_t, logsum_t and the terms' row scalars. numbers: their
    weights and parameters. TERMS: KIND, R and P of each term as in `add_gradient`; R counts without upstream.
    A slot with upstream 0, a negative row id or a row scalar that is not finite is written as zeros; with SCATTER a
    negative row id writes nothing.
    """
    pid = tl.program_id(0)
    slot = (pid // n_chunks).to(tl.int64)
    row = slot
    if row_ids_ptr is not None:
        row = tl.load(row_ids_ptr + slot)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slot)
    upstream, values, finite = _load_rows(rows, slot)
    s = Model(s_ptr + tl.multiple_of(row * stride_s, ALIGNED), 2.0 * half_unit(outer_s, temperature), inner_s)
    t = Model(t_ptr + tl.multiple_of(row * stride_t, ALIGNED), 2.0 * half_unit(outer_t, temperature), inner_t)
    w = upstream * (outer_s / temperature)
    if inner_s is not None:
        w *= inner_s
    out = out_ptr + tl.multiple_of((row if SCATTER else slot) * stride_out, ALIGNED)

    lane = tl.arange(0, TILE)
    begin = (pid % n_chunks) * CHUNK
    end = tl.minimum(begin + CHUNK, n_cols)
    if SCATTER:
        end = tl.where(row >= 0, end, begin)
    whole = begin + (end - begin) // (TILE * TILES) * (TILE * TILES)
    if (upstream != 0.0) & finite & (row >= 0):
        for column in range(begin, whole, TILE * TILES):
            raw_s = read_tiles(s, column, lane, TILE, TILES)
            raw_t = read_tiles(t, column, lane, TILE, TILES)
            for j in tl.static_range(TILES):
                g = _tile_gradient(raw_s[j], raw_t[j], s, t, w, values, numbers, TERMS)
                tl.store(out + column + j * TILE + lane, g)
        for column in range(whole, end, TILE):
            inside = column + lane < end
            raw_s = tl.load(s.row + column + lane, mask=inside, other=0.0)
            raw_t = tl.load(t.row + column + lane, mask=inside, other=0.0)
            g = _tile_gradient(raw_s, raw_t, s, t, w, values, numbers, TERMS)
            tl.store(out + column + lane, g, mask=inside)
    else:
        zero = tl.zeros([TILE], tl.float32)
        for column in range(begin, whole, TILE):
            tl.store(out + column + lane, zero)
        for column in range(whole, end, TILE):
            tl.store(out + column + lane, zero, mask=column + lane < end)


# ---- launch


class Term(NamedTuple):
    """weight times one divergence: its name, its parameters and its row scalars by name, (S,) fp32 each."""

    weight: float
    name: str
    params: tuple[float, ...] = ()
    rows: Mapping[str, Tensor] = MappingProxyType({})


# name: (kind, row scalars in the order that its function takes them)
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "forward_kl": (FORWARD_KL.value, ()),
    "reverse_kl": (REVERSE_KL.value, ("kl_rev",)),
}
NORMALISERS = ("shift_s", "logsum_s", "shift_t", "logsum_t")


def row_grad(
    logits_s: Tensor,
    logits_t: Tensor,
    upstream: Tensor,
    normalisers: Mapping[str, Tensor],
    terms: Sequence[Term],
    *,
    row_ids: Tensor | None = None,
    out: Tensor | None = None,
    scatter: bool = False,
    temperature: float | Tensor = 1.0,
    scale_s: float = 1.0,
    scale_t: float = 1.0,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
) -> Tensor:
    """Gradient in the student's logits of sum_i upstream[i] * sum of terms' weight * divergence of row row_ids[i].

    logits_s, logits_t  (N, V) bf16, fp16 or fp32, unit stride along V; or any columns of them: an entry's gradient
                        reads nothing but that entry and the slot's scalars
    upstream            (S,) fp32; where it is 0 the gradient is 0 whatever the logits hold
    normalisers         shift_s, logsum_s, shift_t, logsum_t of the kept rows, (S,) fp32 in nats, from `row_stats`
    terms               what to differentiate; a slot whose row scalars are not all finite gets zeros
    row_ids             (S,) int64 rows of the logits, or None where slot i is row i; -1 is an empty slot
    out                 where to write, rounded to nearest; by default a new (S, V) in the student's dtype
    scatter             write slot i to out[row_ids[i]] instead of out[i] and leave all other rows of out as they are;
                        out may be logits_s, which is then overwritten in place
    temperature         a positive float or an (S,) tensor, of the slots

    Returns out. For a whole (N, V) gradient without a pass of zeros beforehand, give all N rows with upstream 0 where
    not kept. Does not synchronise.
    """
    n_slots, width = upstream.numel(), logits_s.shape[1]
    if out is None:
        out = torch.empty(n_slots, width, dtype=logits_s.dtype, device=logits_s.device)
    if scatter and row_ids is None:
        raise ValueError("row_ids must be given with scatter=True")
    for name, tensor, n_rows in (
        ("logits_t", logits_t, logits_s.shape[0]),
        ("out", out, logits_s.shape[0] if scatter else n_slots),
    ):
        if tensor.shape != (n_rows, width):
            raise ValueError(f"{name} must have shape ({n_rows}, {width}), got {tuple(tensor.shape)}")
    for name, tensor in (("logits_s", logits_s), ("logits_t", logits_t), ("out", out)):
        if tensor.stride(1) != 1 and width > 1:
            raise ValueError(f"{name} must have unit stride along the vocabulary, got {tensor.stride()}")
    if row_ids is None and n_slots != logits_s.shape[0]:
        raise ValueError(f"row_ids must be given for {n_slots} slots of {logits_s.shape[0]} rows")
    rows, numbers, kinds = [upstream, *(normalisers[name] for name in NORMALISERS)], [], []
    for term in terms:
        kind, names = KINDS[term.name]
        kinds.append((kind, len(rows) - 1, len(numbers)))
        rows += [term.rows[name] for name in names]
        numbers += [term.weight, *term.params]
    if n_slots == 0 or width == 0:
        return out
    per_slot = isinstance(temperature, Tensor)
    chunks = triton.cdiv(width, CHUNK)
    grad_kernel[(n_slots * chunks,)](
        out, logits_s, logits_t, row_ids, temperature.float().contiguous() if per_slot else None,
        1.0 if per_slot else temperature, *softcap_factors(scale_s, softcap_s), *softcap_factors(scale_t, softcap_t),
        tuple(row.float().contiguous() for row in rows), tuple(numbers),
        logits_s.stride(0), logits_t.stride(0), out.stride(0), width, chunks,
        TERMS=tuple(kinds), SCATTER=scatter, ALIGNED=row_alignment(logits_s, logits_t, out), CHUNK=CHUNK,
        **grad_config(),
    )  # fmt: skip
    return out


def grad_config() -> dict[str, int | bool]:
    """Pinned launch settings of `grad_kernel`: 8 columns a lane and tile."""
    return {"TILE": 4 * 8 * warp(), "TILES": 2, "num_warps": 4, "enable_fp_fusion": False}
