"""Global and shared memory: where a launch may load and store, and which of its accesses nothing keeps in order."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from .errors import Fault
from .parser import Statement

if TYPE_CHECKING:
    from .machine import Lanes

Array = np.ndarray
UNIT = 2  # bytes, of the smallest access
ORIGIN = 16  # the first address: numpy takes no array at 0


class Access(NamedTuple):
    """One instruction of many threads. Warps of a program are in step from one barrier, or epoch, to the next."""

    address: Array
    size: int
    stores: bool
    program: Array
    warp: Array
    epoch: Array
    statement: Statement

    def units(self) -> Array:
        """(threads, units) that are touched."""
        return (self.address[:, None].astype(np.int64) + np.arange(0, self.size, UNIT)) // UNIT


class Space:
    """Bytes at addresses of a program's own (shared) or of all programs (global)."""

    def __init__(self) -> None:
        self.log: list[Access] = []

    def misses(self, address: Array, size: int) -> Array:
        """Which of the accesses go outside."""
        raise NotImplementedError

    def absolute(self, address: Array, lanes: Lanes) -> Array:
        """Bytes from the start of `cells`."""
        raise NotImplementedError

    def cells(self, dtype: type) -> Array:
        """The whole space as an array."""
        raise NotImplementedError

    def _places(self, address: Array, dtype: type, count: int, lanes: Lanes, statement: Statement) -> Array:
        """Indices into `cells` of the first of `count` values for each thread."""
        item = np.dtype(dtype).itemsize
        size = item * count
        crooked = address % np.uint64(size) != 0
        if crooked.any():
            raise Fault(f"misaligned, for {size} bytes at once: {statement}, {lanes.where(crooked)}")
        outside = self.misses(address, size)
        if outside.any():
            raise Fault(f"out of bounds, {outside.sum()} threads: {statement}, {lanes.where(outside)}")
        address = self.absolute(address, lanes)
        stores = statement.op.startswith("st.")
        who = lanes.program, lanes.thread // 32, lanes.epoch
        self.log.append(Access(address, size, stores, *who, statement))
        return (address // np.uint64(item)).astype(np.int64)

    def load(self, address: Array, dtype: type, count: int, lanes: Lanes, statement: Statement) -> list[Array]:
        at = self._places(address, dtype, count, lanes, statement)
        return [self.cells(dtype)[at + i] for i in range(count)]

    def store(self, address: Array, values: list[Array], lanes: Lanes, statement: Statement) -> None:
        dtype = values[0].dtype.type
        at = self._places(address, dtype, len(values), lanes, statement)
        cells = self.cells(dtype)
        for i, value in enumerate(values):
            cells[at + i] = value
            if (cells[at + i] != value).any():
                raise Fault(f"race: threads store different values to one place: {statement}")

    def check_races(self) -> None:
        """No order holds between programs, nor between warps of a program from one barrier to the next."""
        stores = [access.units().ravel() for access in self.log if access.stores]
        if not stores:
            return
        stored = np.unique(np.concatenate(stores))
        columns: list[list[Array]] = [[], [], [], [], []]
        for number, access in enumerate(self.log):
            units = access.units()
            if units.max() < stored[0] or units.min() > stored[-1]:
                continue
            hit = np.isin(units, stored)
            lane = hit.nonzero()[0]
            entries = access.program[lane], access.epoch[lane], access.warp[lane], np.full(len(lane), number)
            for column, values in zip(columns, (units[hit], *entries), strict=True):
                column.append(values)
        unit, program, epoch, warp, number = map(np.concatenate, columns)
        stores = np.array([access.stores for access in self.log])[number]
        self._refuse("programs", (unit,), program, stores, number)
        # One instruction that stores for several warps has stored equal values, as a vector held by all of them does.
        self._refuse("warps without a barrier between", (unit, program, epoch), warp, stores, number, alone=True)

    def _refuse(
        self, what: str, keys: tuple[Array, ...], who: Array, stores: Array, number: Array, alone: bool = False
    ) -> None:
        """Raises where, among accesses of equal keys, one stores and not all are by the same; one `alone` may be."""
        order = np.lexsort(keys)
        same = np.ones(len(order) - 1, bool)
        for key in keys:
            same &= np.diff(key[order]) == 0
        group = np.concatenate([[0], np.cumsum(~same)])
        first, last = (how(group, who[order]) for how in (_smallest, _largest))
        any_store = _largest(group, stores[order])
        bad = (first != last) & any_store.astype(bool)
        if alone:
            bad &= _smallest(group, number[order]) != _largest(group, number[order])
        if bad.any():
            of_group = number[order][group == np.flatnonzero(bad)[0]]
            found = sorted({str(self.log[i].statement) for i in of_group})
            raise Fault(f"race: one place is touched by several {what}: {' and '.join(found)}")


def _smallest(group: Array, x: Array) -> Array:
    return np.minimum.reduceat(x, np.flatnonzero(np.diff(group, prepend=-1)))


def _largest(group: Array, x: Array) -> Array:
    return np.maximum.reduceat(x, np.flatnonzero(np.diff(group, prepend=-1)))


class Span(NamedTuple):
    """What a tensor covers: [begin, end), and where rows have gaps between them the first `width` of `pitch` bytes."""

    begin: int
    end: int
    pitch: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Span:
        item = x.element_size()
        end = x.data_ptr() + item * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
        rows = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) > x.shape[1]
        return cls(x.data_ptr(), end, *((item * x.stride(0), item * x.shape[1]) if rows else (0, 0)))

    def misses(self, address: Array, size: int) -> Array:
        begin = address - np.uint64(self.begin)  # far above any end where it is negative
        bad = begin > np.uint64(max(self.end - self.begin - size, 0))
        if self.pitch and not bad.all():
            bad |= begin % np.uint64(self.pitch) + np.uint64(size) > np.uint64(self.width)
        return bad


class Global(Space):
    """The memory of this process, of which a launch may touch its tensors only."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.spans = list(dict.fromkeys(Span.of(x) for x in tensors if x.numel()))

    def misses(self, address: Array, size: int) -> Array:
        outside = np.ones(len(address), bool)
        for span in self.spans:
            outside &= span.misses(address, size)
            if not outside.any():
                break
        return outside

    def absolute(self, address: Array, lanes: Lanes) -> Array:
        return address - np.uint64(ORIGIN)

    def cells(self, dtype: type) -> Array:
        return EVERYTHING[dtype]


class Shared(Space):
    """Shared memory, `size` bytes of each program, one after the other; it begins as junk."""

    def __init__(self, programs: int, size: int) -> None:
        super().__init__()
        self.size, self.pitch = size, -(-size // 16) * 16
        self.bytes = np.full(programs * self.pitch, 0xBD, np.uint8)

    def misses(self, address: Array, size: int) -> Array:
        return address + np.uint64(size) > np.uint64(self.size)

    def absolute(self, address: Array, lanes: Lanes) -> Array:
        return lanes.program.astype(np.uint64) * np.uint64(self.pitch) + address

    def cells(self, dtype: type) -> Array:
        return self.bytes.view(dtype)


def _everything(dtype: type) -> Array:
    """All addresses of this process as one array, of which only those that a `Global` has checked are touched."""
    return np.frombuffer((ctypes.c_uint8 * 2**47).from_address(ORIGIN), dtype)


EVERYTHING = {dtype: _everything(dtype) for dtype in (np.uint16, np.uint32, np.uint64)}
