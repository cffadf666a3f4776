"""What fp32 instructions return: rounding, flushed subnormals, and approximations with the error that is documented."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import Fault

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
Array = np.ndarray

# What an approximate instruction returns: the correctly rounded result, or one that is wrong by its documented bound:
# by any part of it, as a fixed function of the operands, or by all of it, always up or always down.
MODES = ("exact", "random", "up", "down")
mode = "exact"

# Largest errors in units in the last place of the result. From the PTX ISA's and the CUDA guide's words: ex2 and both
# divisions 2; relative errors of 2^-22 (lg2), 2^-22.9 (rsqrt) and 2^-23 (sqrt) are up to twice as many last places as
# of 2^-23, the size of one.
ULPS = {"ex2": 2.0, "lg2": 2.0, "rsqrt": 2.2, "sqrt": 2.0, "div": 2.0}


def ftz(x: Array) -> Array:
    """x with subnormal numbers replaced by a zero of their sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    """The .ftz form of an instruction: operands and result are flushed."""
    return lambda *operands: ftz(function(*map(ftz, operands)))


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact
    total = product + c
    result = total.astype(F32)
    # Rounding to float64 on the way matters where it made a tie of float32, or where float32 has fewer digits.
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    twice = tie | (np.abs(total) < 2.0**-125)
    if twice.any():
        at = np.flatnonzero(twice)
        result[at] = _round_once(product[at], np.broadcast_to(c, total.shape)[at].astype(F64), total[at])
    return result


def _round_once(product: Array, c: Array, total: Array) -> Array:
    """float32 of product + c by way of its float64 sum, rounded to odd."""
    part = total - product
    lost = (product - (total - part)) + (c - part)  # exact: Knuth's two-sum
    even = (total.view(U64) & U64(1)) == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even & np.isfinite(total), odd, total).astype(F32)


def _hash(bits: Array) -> Array:
    """32 well-mixed bits of 32 (the finalizer of MurmurHash3)."""
    bits = (bits ^ (bits >> U32(16))) * U32(0x85EBCA6B)
    bits = (bits ^ (bits >> U32(13))) * U32(0xC2B2AE35)
    return bits ^ (bits >> U32(16))


def _approximate(name: str, y: Array, *operands: Array) -> Array:
    """float32 of the float64 result y, wrong by as much as `mode` says."""
    nearest = y.astype(F32)
    if mode == "exact":
        return nearest
    bits = U32(0)
    for operand in operands:
        bits = _hash(bits ^ operand.view(U32))
    share = {"random": bits * 2.0**-31 - 1.0, "up": 1.0, "down": -1.0}[mode]
    # Half a step of the bound is left to the rounding.
    wrong = (y + share * (ULPS[name] - 0.5) * np.spacing(np.abs(nearest)).astype(F64)).astype(F32)
    return np.where(np.isfinite(nearest) & (nearest != 0), wrong, nearest)


def ex2(x: Array) -> Array:
    return np.where(x == 0, F32(1), _approximate("ex2", np.exp2(x, dtype=F64), x))


def lg2(x: Array) -> Array:
    return _approximate("lg2", np.log2(x, dtype=F64), x)


def rsqrt(x: Array) -> Array:
    return _approximate("rsqrt", 1.0 / np.sqrt(x, dtype=F64), x)


def sqrt(x: Array) -> Array:
    return _approximate("sqrt", np.sqrt(x, dtype=F64), x)


def div_full(a: Array, b: Array) -> Array:
    return _approximate("div", np.divide(a, b, dtype=F64), a, b)


def div_approx(a: Array, b: Array) -> Array:
    """As `div_full`, but of divisors above 2^126 it is 0, or NaN where a is infinite."""
    far = (np.abs(b) > F32(2.0**126)) & np.isfinite(b)
    return np.where(far, np.where(np.isinf(a), F32(np.nan), F32(0)), div_full(a, b))


def maximum(a: Array, b: Array) -> Array:
    """The operand that is no NaN; +0 is larger than -0."""
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, a + b, np.fmax(a, b))


def minimum(a: Array, b: Array) -> Array:
    return -maximum(-a, -b)


def maximum_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), maximum(a, b))


def to_bf16(x: Array) -> Array:
    """Bits of the nearest bf16, ties to even."""
    bits = x.view(U32)
    nearest = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), nearest).astype(U16)


def div_s32(a: Array, b: Array) -> Array:
    """Rounded towards zero, as C does."""
    if (b == 0).any():
        raise Fault("an integer is divided by zero")
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(np.int32)
