"""MEASURE from hidden states: two matrix products whose logits never leave the chip, with the fold as their epilogue.

    logits = hidden @ weight.T + bias, then as in row_stats.py

A program takes ROWS rows and one part of the vocabulary. For each tile of columns it accumulates both models' products
in fp32 and folds the tile into the rows' states (`_online.py`), one half after the other: with the whole tile at once
the registers overflow. Parts are merged by `finish` of row_stats.py. Operands come through tensor descriptors (TMA on
Hopper and later). Programs of one part are launched side by side, which keeps its weights in L2.

It saves writing and reading a tile of logits, which is worth it where the products are short for each logit: small
widths or few rows. Elsewhere a vendor's product into an fp32 tile and `fold_tile` is faster: see FUSED.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import aligned, on_device, target
from ._online import FLOOR, One, Pair, capped, half_unit, merge, merge_one, settle, settle_one, tile_one, tile_pair
from .row_stats import PART, RowState, finish, new_state, store_rows


@triton.jit
def _described(matrix, stride, n_rows, width, ROWS: tl.constexpr, K: tl.constexpr):
    """A matrix as a descriptor of blocks: as it came from the host, or of a pointer and a stride.

    Before sm_90 there are no bulk copies. What the host describes is taken apart there, and nothing says then that rows
    start at multiples of 16 bytes: they would be loaded element by element.
    """
    if stride is None:
        return matrix
    else:
        stride = tl.multiple_of(stride.to(tl.int64), 128 // matrix.dtype.element_ty.primitive_bitwidth)
        return tl.make_tensor_descriptor(matrix, [n_rows, width], [stride, 1], [ROWS, K])


@triton.jit
def _product(model, row, column, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr):
    """fp32 hidden @ weight.T of a block of rows and a tile of columns."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(0, model.width, K):
        acc = tl.dot(model.hidden.load([row, k]), model.weight.load([column, k]).T, acc, input_precision="ieee")
    return acc


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    x = tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1])
    return tl.split(x)


@triton.jit
def _logits(acc, bias_ptr, inner, at, n_cols):
    """(logits, capped; which of them are banned or outside) of columns `at`."""
    banned = (at >= n_cols)[None, :]
    if bias_ptr is None:
        return capped(acc, inner), tl.broadcast_to(banned, acc.shape)
    else:  # the only way to ban a token in a head
        y = capped(acc + tl.load(bias_ptr + at, mask=at < n_cols, other=0.0).to(tl.float32)[None, :], inner)
        return y, banned | (y <= FLOOR)


class Projection(NamedTuple):
    """One model: descriptors of hidden states and weight, their width, and what turns products into logits."""

    hidden: tl.tensor
    weight: tl.tensor
    width: tl.tensor
    bias_ptr: tl.tensor
    inner: tl.tensor
    unit: tl.tensor


@triton.jit
def _fold_half(s, t, pair, model_s, model_t, acc_s, acc_t, at, n_cols):
    """The rows' states with the columns `at` of both products added."""
    y_s, banned_s = _logits(acc_s, model_s.bias_ptr, model_s.inner, at, n_cols)
    y_t, banned_t = _logits(acc_t, model_t.bias_ptr, model_t.inner, at, n_cols)
    new_s, u_s, h_s, e_s = tile_one(y_s, model_s.unit, banned_s, 1)
    new_t, u_t, h_t, e_t = tile_one(y_t, model_t.unit, banned_t, 1)
    new = tile_pair(u_s, h_s, e_s, banned_s, u_t, h_t, e_t, banned_t, 1)
    return merge(s, t, pair, new_s, new_t, new)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_parts", "stride_h_s", "stride_w_s", "stride_h_t", "stride_w_t"])
def linear_kernel(
    state_ptr, hidden_s, weight_s, bias_s_ptr, hidden_t, weight_t, bias_t_ptr, temperature_ptr,
    temperature, outer_s, inner_s, outer_t, inner_t,
    n_rows, n_cols, width_s, width_t, stride_h_s, stride_w_s, stride_h_t, stride_w_t, n_parts,
    PART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Folds part `pid // blocks` of row block `pid % blocks` into state[field, part, row].

    hidden, weight: descriptors with strides None, or pointers.
    """
    blocks = tl.cdiv(n_rows, ROWS)
    part = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * ROWS
    rows = row + tl.arange(0, ROWS)
    live = rows < n_rows
    zero = tl.zeros([ROWS], tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + rows, mask=live, other=1.0)
    hidden_s = _described(hidden_s, stride_h_s, n_rows, width_s, ROWS, K)
    weight_s = _described(weight_s, stride_w_s, n_cols, width_s, COLS, K)
    if hidden_t is not None:
        hidden_t = _described(hidden_t, stride_h_t, n_rows, width_t, ROWS, K)
        weight_t = _described(weight_t, stride_w_t, n_cols, width_t, COLS, K)
    model_s = Projection(hidden_s, weight_s, width_s, bias_s_ptr, inner_s, zero + half_unit(outer_s, temperature))
    model_t = Projection(hidden_t, weight_t, width_t, bias_t_ptr, inner_t, zero + half_unit(outer_t, temperature))
    s, t, pair = One(zero + FLOOR, zero, zero), One(zero + FLOOR, zero, zero), Pair(zero, zero, zero, zero, zero)
    begin = part * PART
    for column in range(begin, tl.minimum(begin + PART, n_cols), COLS):
        acc_s = _product(model_s, row, column, ROWS, COLS, K)
        if hidden_t is None:
            y, banned = _logits(acc_s, bias_s_ptr, inner_s, column + tl.arange(0, COLS), n_cols)
            s = merge_one(s, tile_one(y, model_s.unit, banned, 1)[0])
        else:
            acc_t = _product(model_t, row, column, ROWS, COLS, K)
            left_s, right_s = _halves(acc_s)
            left_t, right_t = _halves(acc_t)
            at = column + tl.arange(0, COLS // 2)
            s, t, pair = _fold_half(s, t, pair, model_s, model_t, left_s, left_t, at, n_cols)
            s, t, pair = _fold_half(s, t, pair, model_s, model_t, right_s, right_t, at + COLS // 2, n_cols)
    out = state_ptr + part.to(tl.int64) * n_rows + rows
    stride = n_parts.to(tl.int64) * n_rows
    if hidden_t is None:
        store_rows(out, stride, 0, settle_one(s), live)
    else:
        s, t, pair = settle(s, t, pair)
        store_rows(out, stride, 0, s, live)
        store_rows(out, stride, 3, t, live)
        store_rows(out, stride, 6, pair, live)


# ---- launch


def linear_config(teacher: bool, plain: bool, fp32: bool = False) -> dict[str, int | bool]:
    """Pinned launch settings of `linear_kernel`: the largest tiles that compile without spills. Not yet timed.

    plain: without bias and softcap. fp32: of operands, whose exact products no tensor core takes.
    """
    backend, arch = target()
    config = {"ROWS": 128, "COLS": 128, "K": 64, "num_warps": 8, "num_stages": 4}
    if not backend:
        config |= {"ROWS": 16, "COLS": 256, "K": 32}  # the interpreter: few, large steps
    elif fp32:
        config |= {"ROWS": 32, "COLS": 32 if teacher else 64, "K": 16, "num_warps": 4}
        config |= {"num_stages": 2 if backend == "hip" else 3}
    elif backend == "hip":
        config |= {"num_stages": 2}
    elif arch < 90:
        config |= {"ROWS": 128 if plain else 64, "COLS": 64 if teacher else 128, "K": 32, "num_stages": 3}
    elif arch < 100:
        config |= {"COLS": (128 if plain else 64) * (1 if teacher else 2)}
    else:
        config |= {"COLS": 64 if teacher else 128}
    return config | {"enable_fp_fusion": False}


# Backend: (least architecture, widest H for any number of rows, most rows for any H) where this kernel is preferred to
# a vendor's product and `fold_tile`. No GPU has timed either. The numbers are arithmetic: writing and reading an fp32
# tile that misses L2 costs 45 % of the products at H = 1024 and 24 % at 2048 on an H100, against the 6 to 10 % by which
# Triton's product may trail a vendor's and still win; below some 300 rows reading the weights bounds both. `bench gpu`
# times both side by side. Without the bulk copies of sm_90, and in fp32, the vendor's product is taken.
FUSED = {"cuda": (90, 1024, 256)}


def fused_pays(n_rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether FUSED prefers this kernel; width is the larger model's."""
    backend, arch = target()
    least, widest, most = FUSED.get(backend, (0, 0, -1))
    return arch >= least and dtype != torch.float32 and (width <= widest or n_rows <= most)


def linear_part(n_rows: int, vocab: int) -> int:
    """Columns of one program: PART, or fewer where there would be too few programs to fill a GPU."""
    part, rows = PART, linear_config(teacher=True, plain=True)["ROWS"]
    while part > 512 and triton.cdiv(n_rows, rows) * triton.cdiv(vocab, part) < 1000:
        part //= 2
    return part


def fold_linear(
    state: RowState,
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor | None = None,
    weight_t: Tensor | None = None,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
) -> None:
    """Folds every column of every row into the state, which `finish` of row_stats.py reads."""
    n_rows = hidden_s.shape[0]
    heads = {"s": (hidden_s, weight_s)} | ({"t": (hidden_t, weight_t)} if state.teacher else {})
    for model, (hidden, weight) in heads.items():
        check_head(model, hidden, weight, n_rows, state.vocab)
    _fold_linear(state.sums, hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, *state.maps(), state.part)


@torch.library.custom_op("tip_kernels::fold_linear", mutates_args={"sums"})
def _fold_linear(
    sums: Tensor,
    hidden_s: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    hidden_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    outer_s: float,
    inner_s: float | None,
    outer_t: float,
    inner_t: float | None,
    part: int,
) -> None:
    """Writes `RowState.sums`."""
    n_rows, vocab, teacher = hidden_s.shape[0], weight_s.shape[0], hidden_t is not None
    if n_rows == 0:
        return
    plain = bias_s is None and bias_t is None and inner_s is None and inner_t is None
    config = linear_config(teacher, plain, torch.float32 in {hidden_s.dtype, *((hidden_t.dtype,) if teacher else ())})
    matrices, strides = _operands(
        (hidden_s, hidden_t), config["ROWS"], (weight_s, weight_t), config["COLS"], config["K"]
    )
    blocks, parts = triton.cdiv(n_rows, config["ROWS"]), sums.shape[1]
    with on_device(hidden_s):
        linear_kernel[(blocks * parts,)](
            sums, *matrices[:2], bias_s, *matrices[2:], bias_t, aligned(temperatures),
            temperature, outer_s, inner_s, outer_t, inner_t,
            n_rows, vocab, hidden_s.shape[1], hidden_t.shape[1] if teacher else 0, *strides, parts, PART=part, **config,
        )  # fmt: skip


def _operands(
    hidden: tuple[Tensor, Tensor | None], rows: int, weight: tuple[Tensor, Tensor | None], cols: int, k: int
) -> tuple[list[TensorDescriptor | Tensor | None], list[int | None]]:
    """(hidden_s, weight_s, hidden_t, weight_t) and their strides as `linear_kernel` takes them."""
    backend, arch = target()
    by_host = backend != "cuda" or arch >= 90
    matrices, strides = [], []
    for pair in zip(hidden, weight, strict=True):
        for x, block in zip(pair, (rows, cols), strict=True):
            described = by_host and x is not None
            matrices.append(TensorDescriptor.from_tensor(x, [block, k]) if described else x)
            strides.append(None if by_host or x is None else x.stride(0))
    return matrices, strides


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe a matrix: rows of unit stride that start at multiples of 16 bytes."""
    return x.dim() == 2 and x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def check_head(model: str, hidden: Tensor, weight: Tensor, n_rows: int, vocab: int) -> None:
    """Refuses what does not fit or a tensor descriptor cannot describe."""
    for name, x, n in ((f"hidden_{model}", hidden, n_rows), (f"weight_{model}", weight, vocab)):
        if x.shape != (n, hidden.shape[1]) or x.dtype != hidden.dtype:
            form = f"shape ({n}, {hidden.shape[1]}) and dtype {hidden.dtype}"
            raise ValueError(f"{name} must have {form}, got {tuple(x.shape)} and {x.dtype}")
        if not describable(x):
            raise ValueError(
                f"{name} must have rows of unit stride that start at multiples of 16 bytes, got strides {x.stride()}"
            )


def linear_stats(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor | None = None,
    weight_t: Tensor | None = None,
    *,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    **settings,
) -> dict[str, Tensor]:
    """The statistics of `row_stats` from hidden states and heads, without logits in memory; no margins.

    hidden: (N, H) and weight: (V, H) of one dtype, bf16, fp16 or fp32, whose rows start at multiples of 16 bytes; the
    models may differ in width and dtype. bias: (V,). settings as in `new_state`. Does not synchronise.
    """
    (n_rows, _), vocab, teacher = hidden_s.shape, weight_s.shape[0], hidden_t is not None
    part = linear_part(n_rows, vocab)
    state = new_state(n_rows, vocab, hidden_s.device, teacher=teacher, part=part, **settings)
    fold_linear(state, hidden_s, weight_s, hidden_t, weight_t, bias_s, bias_t)
    return finish(state)
