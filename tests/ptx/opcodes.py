"""What each instruction does to registers. One that is not here is `Unsupported`, by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import arithmetic as fp
from .errors import Unsupported
from .parser import BARRIERS, BRANCHES, Program, Statement

if TYPE_CHECKING:
    from .machine import Lanes

    Step = Callable[[Lanes], None]

Array = np.ndarray
DTYPES = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip


class Op(NamedTuple):
    """Types of the result and of the operands, and the function."""

    types: str
    function: Callable[..., Array]


def _pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """Of 64-bit registers that hold two fp32 numbers each."""

    def both(*operands: Array) -> Array:
        return function(*(x.view(np.float32).reshape(-1, 2) for x in operands)).view(np.uint64).ravel()

    return both


def _ordered_unequal(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


TABLE: dict[str, Op] = {
    # fp32
    "abs.f32": Op("f32 f32", np.abs),
    "neg.f32": Op("f32 f32", np.negative),
    "add.rn.f32": Op("f32 f32 f32", np.add),
    "sub.rn.f32": Op("f32 f32 f32", np.subtract),
    "mul.rn.f32": Op("f32 f32 f32", np.multiply),
    "fma.rn.f32": Op("f32 f32 f32 f32", fp.fma),
    "fma.rn.ftz.f32": Op("f32 f32 f32 f32", fp.flushed(fp.fma)),
    "div.rn.f32": Op("f32 f32 f32", np.divide),
    "div.full.f32": Op("f32 f32 f32", fp.div_full),
    "div.approx.f32": Op("f32 f32 f32", fp.div_approx),
    "max.f32": Op("f32 f32 f32", fp.maximum),
    "max.NaN.f32": Op("f32 f32 f32", fp.maximum_nan),
    "min.f32": Op("f32 f32 f32", fp.minimum),
    "ex2.approx.ftz.f32": Op("f32 f32", fp.flushed(fp.ex2)),
    "lg2.approx.ftz.f32": Op("f32 f32", fp.flushed(fp.lg2)),
    "rsqrt.approx.ftz.f32": Op("f32 f32", fp.flushed(fp.rsqrt)),
    "sqrt.approx.ftz.f32": Op("f32 f32", fp.flushed(fp.sqrt)),
    "sqrt.rn.f32": Op("f32 f32", np.sqrt),
    "add.rn.f32x2": Op("b64 b64 b64", _pairs(np.add)),
    "sub.rn.f32x2": Op("b64 b64 b64", _pairs(np.subtract)),
    "mul.rn.f32x2": Op("b64 b64 b64", _pairs(np.multiply)),
    "fma.rn.f32x2": Op("b64 b64 b64 b64", _pairs(fp.fma)),
    # conversions
    "cvt.f32.f16": Op("f32 f16", lambda x: x.astype(np.float32)),
    "cvt.rn.f16.f32": Op("f16 f32", lambda x: x.astype(np.float16)),
    "cvt.rn.f16x2.f32": Op("b32 f32 f32", lambda high, low: _pack(*(x.astype(np.float16) for x in (low, high)))),
    "cvt.rn.bf16.f32": Op("b16 f32", fp.to_bf16),
    "cvt.rn.bf16x2.f32": Op("b32 f32 f32", lambda high, low: _pack(fp.to_bf16(low), fp.to_bf16(high))),
    "cvt.rn.f32.s32": Op("f32 s32", lambda x: x.astype(np.float32)),
    "cvt.rmi.ftz.f32.f32": Op("f32 f32", fp.flushed(np.floor)),
    "cvt.rpi.ftz.f32.f32": Op("f32 f32", fp.flushed(np.ceil)),
    "cvt.s64.s32": Op("s64 s32", lambda x: x.astype(np.int64)),
    "cvt.u64.u32": Op("u64 u32", lambda x: x.astype(np.uint64)),
    "cvt.u32.u16": Op("u32 u16", lambda x: x.astype(np.uint32)),
    "cvt.u32.u64": Op("u32 u64", lambda x: x.astype(np.uint32)),
    "cvt.u16.u32": Op("u16 u32", lambda x: x.astype(np.uint16)),
    # integers
    **{f"add.{t}": Op(f"{t} {t} {t}", np.add) for t in ("s32", "s64")},
    **{f"sub.{t}": Op(f"{t} {t} {t}", np.subtract) for t in ("s32", "s64")},
    **{f"mul.lo.{t}": Op(f"{t} {t} {t}", np.multiply) for t in ("s32", "s64")},
    **{f"mad.lo.{t}": Op(f"{t} {t} {t} {t}", lambda a, b, c: a * b + c) for t in ("s32", "s64")},
    "mul.wide.s32": Op("s64 s32 s32", lambda a, b: np.multiply(a, b, dtype=np.int64)),
    "mul.wide.u32": Op("u64 u32 u32", lambda a, b: np.multiply(a, b, dtype=np.uint64)),
    "mad.wide.s32": Op("s64 s32 s32 s64", lambda a, b, c: np.multiply(a, b, dtype=np.int64) + c),
    "mad.wide.u32": Op("u64 u32 u32 u64", lambda a, b, c: np.multiply(a, b, dtype=np.uint64) + c),
    "div.s32": Op("s32 s32 s32", fp.div_s32),
    "neg.s32": Op("s32 s32", np.negative),
    "min.s32": Op("s32 s32 s32", np.minimum),
    "max.s32": Op("s32 s32 s32", np.maximum),
    **{f"shl.{t}": Op(f"{t} {t} u32", lambda x, n: _shifted(np.left_shift, x, n)) for t in ("b32", "b64")},
    **{f"shr.{t}": Op(f"{t} {t} u32", lambda x, n: _shifted(np.right_shift, x, n)) for t in ("u32", "s32", "u64")},
    # bits and predicates
    **{f"and.{t}": Op(f"{t} {t} {t}", np.bitwise_and) for t in ("pred", "b32", "b64")},
    **{f"or.{t}": Op(f"{t} {t} {t}", np.bitwise_or) for t in ("pred", "b32", "b64")},
    **{f"xor.{t}": Op(f"{t} {t} {t}", np.bitwise_xor) for t in ("pred", "b32", "b64")},
    **{f"not.{t}": Op(f"{t} {t}", np.invert) for t in ("pred", "b32", "b64")},
    **{f"selp.{t}": Op(f"{t} {t} {t} pred", lambda a, b, p: np.where(p, a, b)) for t in ("f32", "b32", "b64", "b16")},
    # comparisons; with u also true of a NaN
    **{
        f"setp.{name}.{t}": Op(f"pred {t} {t}", function)
        for t in ("s32", "u32", "b32", "s64", "u64", "b64", "f32")
        for name, function in {
            "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
            "ne": _ordered_unequal,
        }.items()
    },
    "setp.neu.f32": Op("pred f32 f32", np.not_equal),
    "setp.leu.f32": Op("pred f32 f32", lambda a, b: ~(a > b)),
    "setp.ltu.f32": Op("pred f32 f32", lambda a, b: ~(a >= b)),
    "setp.geu.f32": Op("pred f32 f32", lambda a, b: ~(a < b)),
    "setp.gtu.f32": Op("pred f32 f32", lambda a, b: ~(a <= b)),
    "setp.nan.f32": Op("pred f32 f32", lambda a, b: np.isnan(a) | np.isnan(b)),
}  # fmt: skip

REDUCTIONS = {"redux.sync.min.s32": np.minimum, "redux.sync.max.s32": np.maximum, "redux.sync.max.f32": np.fmax}
MOVES = {f"mov.{t}" for t in ("pred", "b16", "u16", "b32", "u32", "b64", "u64", "f32")}
ACCESS = re.compile(r"(ld|st)\.(param|global|shared)(?:\.v([24]))?\.(b16|b32|b64|s32)")


def _shifted(how: Callable[[Array, Array], Array], x: Array, n: Array) -> Array:
    """Shifts by the width or more leave nothing but the sign."""
    bits = 8 * x.itemsize
    shifted = how(x, np.minimum(n, bits - 1).astype(x.dtype))
    return shifted if x.dtype.kind == "i" else np.where(n < bits, shifted, x.dtype.type(0))


def _pack(low: Array, high: Array) -> Array:
    low, high = (x.view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | (high << np.uint32(16))


def decode(statement: Statement, program: Program) -> Step:
    """What to call to run a statement for some threads; for branches and barriers nothing."""
    op, operands, guard = statement.op, statement.operands, statement.guard
    if op in BRANCHES + BARRIERS:
        return lambda lanes: None
    if op in TABLE:
        result, *kinds = TABLE[op].types.split()
        _fits(statement, program, operands[0], result)
        function = TABLE[op].function
        sources = [_source(o, kind, statement, program) for o, kind in zip(operands[1:], kinds, strict=True)]
        return lambda lanes: lanes.write(operands[0], function(*(read(lanes) for read in sources)), guard)
    if op in MOVES:
        return _move(statement, program)
    if access := ACCESS.fullmatch(op):
        return _access(statement, program, *access.groups())
    if op in REDUCTIONS:
        return _reduction(statement, program)
    if op == "shfl.sync.bfly.b32":
        return _shuffle(statement, program)
    if op == "bar.warp.sync":
        return lambda lanes: lanes.by_warp(lanes.thread, statement) is None
    raise Unsupported(f"no such instruction here: {op}, in {statement}")


def _fits(statement: Statement, program: Program, register: str, kind: str) -> None:
    """Refuses a register of another width than the instruction's: no instruction here widens or narrows so."""
    if register != "_" and program.width(register) != _bits(kind):
        raise Unsupported(f"a register of {program.width(register)} bits: {statement}")


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def _source(operand: str, kind: str, statement: Statement, program: Program) -> Callable[[Lanes], Array]:
    """Reads an operand as an array of its type: one value a thread, or a single one of a constant."""
    dtype = DTYPES[kind]
    special = {
        "%tid.x": lambda lanes: lanes.thread,
        "%laneid": lambda lanes: lanes.thread % np.uint32(32),
        "%ctaid.x": lambda lanes: (lanes.program % lanes.launch.grid[0]).astype(np.uint32),
    }
    if operand in special:
        return lambda lanes: special[operand](lanes).view(dtype)
    if operand.startswith("%"):
        _fits(statement, program, operand, kind)
        return lambda lanes: lanes.read(operand).view(dtype)
    value = _constant(operand, kind, statement)
    return lambda lanes: value


def _constant(text: str, kind: str, statement: Statement) -> Array:
    if kind == "pred":
        return np.array([{"0": False, "-1": True, "1": True}[text]])
    if not re.fullmatch(r"0[fFdD][0-9A-Fa-f]+|-?(0x[0-9A-Fa-f]+|\d+)", text):
        raise Unsupported(f"no constant: {text}, in {statement}")
    bits = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text, 0)
    width = _bits(kind)
    return np.array([bits % 2**width], DTYPES[f"b{width}"]).view(DTYPES[kind])


def _move(statement: Statement, program: Program) -> Step:
    """A copy; from a vector, whose first entry is the lowest bits, or into one."""
    target, source = statement.operands
    kind = statement.op.removeprefix("mov.")
    if isinstance(source, tuple):
        part = f"b{_bits(kind) // len(source)}"
        parts = [_source(o, part, statement, program) for o in source]

        def pack(lanes: Lanes) -> None:
            values = [np.broadcast_to(read(lanes), lanes.count) for read in parts]
            lanes.write(target, np.stack(values, 1).view(DTYPES[kind]).ravel(), statement.guard)

        return pack
    if isinstance(target, tuple):
        read = _source(source, kind, statement, program)
        part = DTYPES[f"b{_bits(kind) // len(target)}"]

        def unpack(lanes: Lanes) -> None:
            for register, value in zip(target, read(lanes).view(part).reshape(-1, len(target)).T, strict=True):
                lanes.write(register, np.ascontiguousarray(value), statement.guard)

        return unpack
    if source == "global_smem":  # shared memory begins at 0
        source = "0"
    _fits(statement, program, target, kind)
    read = _source(source, kind, statement, program)
    return lambda lanes: lanes.write(target, read(lanes), statement.guard)


def _access(statement: Statement, program: Program, way: str, space: str, vector: str | None, kind: str) -> Step:
    """Loads and stores."""
    place, value = statement.operands if way == "st" else statement.operands[::-1]
    values = value if isinstance(value, tuple) else (value,)
    base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", place).groups()
    if len(values) != int(vector or 1):
        raise Unsupported(f"a vector of another size: {statement}")
    if space == "param":
        return _load_parameter(statement, program, base, offset, values[0], kind)
    for register in values:
        if register.startswith("%"):
            _fits(statement, program, register, kind)
    pointer = _source(base, "u64" if space == "global" else "u32", statement, program)
    offset = np.uint64(int(offset or 0) % 2**64)

    def address(lanes: Lanes) -> Array:
        return pointer(lanes).astype(np.uint64) + offset

    if way == "ld":
        return _load(statement, space, address, values, DTYPES[kind])
    return _store(statement, space, address, [_source(o, kind, statement, program) for o in values])


def _load_parameter(
    statement: Statement, program: Program, name: str, offset: str | None, target: str, kind: str
) -> Step:
    """A parameter, its sign extended where the register is wider."""
    if offset:
        raise Unsupported(f"a part of a parameter: {statement}")
    if kind[0] != "s":
        _fits(statement, program, target, kind)
    word, wide = DTYPES[f"b{_bits(kind)}"], DTYPES[f"{'s' if kind[0] == 's' else 'b'}{program.width(target)}"]

    def step(lanes: Lanes) -> None:
        bits = np.array([lanes.launch.arguments[name] % 2 ** _bits(kind)], word)
        lanes.write(target, bits.view(DTYPES[kind]).astype(wide))

    return step


def _load(
    statement: Statement, space: str, address: Callable[[Lanes], Array], targets: tuple[str, ...], dtype: type
) -> Step:
    """Into one register or several, where there is a guard for the threads that it holds for."""

    def step(lanes: Lanes) -> None:
        memory = lanes.launch.spaces[space]
        if statement.guard is None:
            loaded = memory.load(address(lanes), dtype, len(targets), lanes, statement)
        elif not (chosen := lanes.guard(statement.guard)).any():
            return
        else:
            loaded = [lanes.read(target).copy() for target in targets]
            some = memory.load(address(lanes)[chosen], dtype, len(targets), lanes.some(chosen), statement)
            for whole, part in zip(loaded, some, strict=True):
                whole[chosen] = part.view(whole.dtype)
        for target, value in zip(targets, loaded, strict=True):
            lanes.write(target, value)

    return step


def _store(
    statement: Statement, space: str, address: Callable[[Lanes], Array], sources: list[Callable[[Lanes], Array]]
) -> Step:
    def step(lanes: Lanes) -> None:
        at, values = address(lanes), [np.broadcast_to(read(lanes), lanes.count) for read in sources]
        if statement.guard is not None:
            chosen = lanes.guard(statement.guard)
            at, values, lanes = at[chosen], [value[chosen] for value in values], lanes.some(chosen)
        if lanes.count:
            lanes.launch.spaces[space].store(at, values, lanes, statement)

    return step


def _reduction(statement: Statement, program: Program) -> Step:
    """The warp's minimum or maximum, in each of its threads."""
    target, source, mask = statement.operands
    kind = statement.op.rsplit(".", 1)[1]
    read, members = _source(source, kind, statement, program), _source(mask, "s32", statement, program)
    how = REDUCTIONS[statement.op]

    def step(lanes: Lanes) -> None:
        _all_members(members(lanes), statement)
        lanes.write(target, np.repeat(how.reduce(lanes.by_warp(read(lanes), statement), axis=1), 32))

    return step


def _shuffle(statement: Statement, program: Program) -> Step:
    """What the thread has whose number in the warp differs in the given bits."""
    target, source, bits, clamp, mask = statement.operands
    _all_members(_constant(mask, "s32", statement), statement)
    if int(clamp, 0) != 31:
        raise Unsupported(f"a shuffle within parts of a warp: {statement}")
    read, other = _source(source, "b32", statement, program), np.arange(32) ^ int(bits, 0)
    return lambda lanes: lanes.write(target, lanes.by_warp(read(lanes), statement)[:, other].ravel())


def _all_members(mask: Array, statement: Statement) -> None:
    if (mask != -1).any():
        raise Unsupported(f"a part of a warp: {statement}")
