"""Runs a program: all threads of all its programs at once, block by block, one array over the threads a register.

Threads that part wait for each other at the block that stands first, so those of a warp meet again where the compiler
means them to. A thread's registers are junk (a NaN) until they are written.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import numpy as np
from torch import Tensor

from . import opcodes
from .errors import Fault
from .memory import Global, Shared, Space
from .parser import BARRIERS, BRANCHES, Statement, parse

Array = np.ndarray
WORDS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # how registers of so many bits are held
JUNK = 0x7FBADBAD7FBADBAD


class Kernel:
    """A compiled kernel, ready to be launched; counts what has run."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.program, self.shared_bytes = parse(ptx), shared_bytes
        self.blocks = [[(s, opcodes.decode(s, self.program)) for s in block] for block in self.program.blocks]
        self.launches = 0
        self.ran: Counter[int] = Counter()  # threads, by block

    def reached(self) -> float:
        """The share of the instructions that some thread has run."""
        sizes = [len(block) for block in self.program.blocks]
        return sum(sizes[block] for block in self.ran) / sum(sizes)

    def opcodes(self) -> Counter[str]:
        """Instructions that ran, by opcode, each as often as there were threads."""
        counts: Counter[str] = Counter()
        for block, threads in self.ran.items():
            for statement in self.program.blocks[block]:
                counts[statement.op] += threads
        return counts

    def launch(self, grid: tuple[int, int, int], arguments: list[int], tensors: list[Tensor]) -> None:
        """Runs every program of the grid; arguments are the bits of the parameters."""
        self.launches += 1
        with np.errstate(all="ignore"):
            Launch(self, grid, arguments, tensors).run()


class Launch:
    """The state of one launch."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int], tensors: list[Tensor]) -> None:
        self.kernel, self.grid = kernel, grid
        self.programs, self.threads = grid[0] * grid[1] * grid[2], kernel.program.threads
        names = [name for name, _ in kernel.program.parameters]
        self.arguments = dict(zip(names, arguments, strict=True))
        self.registers: dict[str, Array] = {}
        self.spaces: dict[str, Space] = {"global": Global(tensors)}
        if kernel.shared_bytes:
            self.spaces["shared"] = Shared(self.programs, kernel.shared_bytes)
        self.epochs = np.zeros(self.programs, np.int64)  # barriers that each program has passed
        self.exited = np.zeros(self.programs, np.int64)  # threads

    def run(self) -> None:
        pending, waiting = {0: np.arange(self.programs * self.threads)}, {}
        while pending or waiting:
            if not pending:
                raise Fault(f"{self.kernel.program.name}: a barrier that some threads of a program never reach")
            number = min(pending)
            index = pending.pop(number)
            last = self.kernel.program.blocks[number][-1]
            queue = waiting if last.op in BARRIERS else pending
            for target, threads in self.run_block(number, index):
                queue[target] = np.union1d(queue[target], threads) if target in queue else threads
            self._release(waiting, pending)
        for space in self.spaces.values():
            space.check_races()

    def run_block(self, number: int, index: Array) -> list[tuple[int, Array]]:
        """Runs a block for the threads `index`; where they go on, but for those that leave the kernel."""
        lanes = Lanes(self, index)
        self.kernel.ran[number] += len(index)
        for _, step in self.kernel.blocks[number]:
            step(lanes)
        last = self.kernel.program.blocks[number][-1]
        taken = np.full(len(index), last.op in BRANCHES)
        if last.guard:
            taken &= lanes.guard(last.guard)
        lanes.merge()
        ways = [(number + 1, index[~taken])]
        if last.op == "ret":
            np.add.at(self.exited, lanes.program[taken], 1)
        elif last.op in BRANCHES:
            ways.append((self.kernel.program.labels[last.operands[0]], index[taken]))
        return [(target, threads) for target, threads in ways if len(threads)]

    def _release(self, waiting: dict[int, Array], pending: dict[int, Array]) -> None:
        """Lets the programs go on all of whose threads wait at one barrier."""
        for target in list(waiting):
            index = waiting.pop(target)
            program = index // self.threads
            free = np.bincount(program, minlength=self.programs) + self.exited == self.threads
            self.epochs[np.unique(program[free[program]])] += 1
            for queue, threads in ((pending, index[free[program]]), (waiting, index[~free[program]])):
                if len(threads):
                    queue[target] = np.union1d(queue[target], threads) if target in queue else threads


class Lanes:
    """The threads that run a block together: their places, and their registers."""

    def __init__(self, launch: Launch, index: Array) -> None:
        self.launch, self.index, self.count = launch, index, len(index)
        self.whole = self.count == launch.programs * launch.threads
        self.values = launch.registers if self.whole else {}
        self.written: set[str] = set()

    @cached_property
    def program(self) -> Array:
        return self.index // self.launch.threads

    @cached_property
    def thread(self) -> Array:
        return (self.index % self.launch.threads).astype(np.uint32)

    @cached_property
    def epoch(self) -> Array:
        return self.launch.epochs[self.program]

    @cached_property
    def _warps(self) -> bool:
        """Whether the threads are whole warps."""
        rows = self.index.reshape(-1, 32) if self.count % 32 == 0 else np.zeros((1, 32))
        return bool((rows == rows[:, :1] // 32 * 32 + np.arange(32)).all())

    def by_warp(self, x: Array, statement: Statement) -> Array:
        """x as (warps, 32)."""
        if not self._warps:
            raise Fault(f"run by a part of a warp: {statement}")
        return x.reshape(-1, 32)

    def where(self, bad: Array) -> str:
        """The first of the threads that `bad` marks."""
        i = int(np.flatnonzero(bad)[0])
        return f"program {self.program[i]}, thread {self.thread[i]} of {self.launch.kernel.program.name}"

    def some(self, chosen: Array) -> Lanes:
        """Those of the threads that are chosen, for one access."""
        return Lanes(self.launch, self.index[chosen])

    def read(self, register: str) -> Array:
        """A register's bits."""
        if register not in self.values:
            self.values[register] = self._all(register)[self.index]
        return self.values[register]

    def guard(self, predicate: str) -> Array:
        return ~self.read(predicate[1:]) if predicate[0] == "!" else self.read(predicate)

    def write(self, register: str, value: Array, guard: str | None = None) -> None:
        """Sets a register, where there is a guard for the threads that it holds for."""
        if register == "_":
            return
        value = value.view(WORDS[self.launch.kernel.program.width(register)])
        if guard:
            value = np.where(self.guard(guard), value, self.read(register))
        self.values[register] = value if len(value) == self.count else np.repeat(value, self.count)
        self.written.add(register)

    def merge(self) -> None:
        """Puts what a part of the threads has written among the registers of all."""
        if not self.whole:
            for register in self.written:
                everyone = self._all(register).copy()
                everyone[self.index] = self.values[register]
                self.launch.registers[register] = everyone

    def _all(self, register: str) -> Array:
        if register not in self.launch.registers:
            word = WORDS[self.launch.kernel.program.width(register)]
            junk = np.array([JUNK], np.uint64).view(word if word != np.bool_ else np.uint8)[:1].astype(word)
            self.launch.registers[register] = np.repeat(junk, self.launch.programs * self.launch.threads)
        return self.launch.registers[register]
