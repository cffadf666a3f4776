"""What every public function says about a bad argument: its name, the form expected, and what it got."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
T = TypeVar("T")


def describe(value: object) -> str:
    """A short account of a value for an error message: a tensor's shape, dtype and device, else its repr."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def expect(ok: bool, name: str, expected: str, got: object, *sizes: object) -> None:
    """Raises ValueError `NAME: expected EXPECTED, got GOT` unless ok.

    sizes  fill the {} of expected, which must not hold them itself where torch.compile may not know them as numbers
    """
    if not ok:
        refuse(name, expected, got, *sizes)


def refuse(name: str, expected: str, got: object, *sizes: object) -> NoReturn:
    """Raises what `expect` raises; where calls are counted it is called only when something is wrong."""
    raise ValueError(f"{name}: expected {expected.format(*sizes) if sizes else expected}, got {describe(got)}")


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Inside, a ValueError about an argument of those names is about the caller's own: row_mask="shift_labels"."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        if name not in names:
            raise
        raise ValueError(f"{names[name]}:{rest}") from None


def is_int(value: object) -> TypeGuard[int]:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def finite_number(name: str, value: object, *, positive: bool = False) -> float:
    """value as a float; refused unless it is a finite int or float, and above 0 where asked."""
    expected = "a finite number above 0" if positive else "a finite number"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        refuse(name, expected, value)
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        number = math.inf
    finite = -math.inf < number < math.inf  # not isfinite, which torch.compile cannot ask of a number that varies
    expect(finite and (number > 0 or not positive), name, expected, value)
    return number


def flat_rows(
    name: str, value: Tensor, batch_shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Tensor:
    """A per-row tensor given as (N,) or in the batch's own shape, as (N,)."""
    n_rows = math.prod(batch_shape)
    ok = isinstance(value, Tensor) and value.dtype in dtypes
    ok = ok and (tuple(value.shape) == (n_rows,) or tuple(value.shape) == tuple(batch_shape))
    if not ok:
        shapes = " or ".join(str(s) for s in dict.fromkeys([tuple(batch_shape), (n_rows,)]))
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        expect(ok, name, f"a {names} tensor of shape {shapes}", value)
    expect(value.device == device, name, f"a tensor on {device}", value)
    return value.reshape(n_rows)


def not_none(value: T | None) -> T:
    """A value that is there by what was checked before."""
    assert value is not None
    return value


def flag(name: str, value: object) -> None:
    """Refuses anything but True and False."""
    expect(isinstance(value, bool), name, "a bool", value)
