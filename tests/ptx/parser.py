"""PTX text into a `Program`: its parameters, its registers' widths and its statements in basic blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import Unsupported

BRANCHES = ("bra", "bra.uni", "ret")
BARRIERS = ("bar.sync", "barrier.sync")


@dataclass(eq=False)
class Statement:
    """One instruction: `@guard op operands`, and the line of the Triton source that it comes from."""

    op: str
    operands: list[str | tuple[str, ...]]  # a tuple is a vector, { a, b }
    guard: str | None  # a predicate; with "!" in front its negation
    line: str

    def __str__(self) -> str:
        operands = ("{" + ", ".join(o) + "}" if isinstance(o, tuple) else o for o in self.operands)
        return f"{f'@{self.guard} ' if self.guard else ''}{self.op} {', '.join(operands)} ({self.line})"


@dataclass
class Program:
    """One kernel. A block ends at a branch, at a barrier, and before whatever a branch goes to."""

    name: str
    parameters: list[tuple[str, str]]  # name and type
    threads: int
    widths: dict[str, int] = field(default_factory=dict)  # bits of registers, by their name without its number
    blocks: list[list[Statement]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of blocks

    def width(self, register: str) -> int:
        """Bits of a register; 1 of a predicate."""
        if register not in self.widths:
            self.widths[register] = self.widths[register.rstrip("0123456789")]
        return self.widths[register]


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^/"]+)"', ptx))
    name, parameters, launch, body = re.search(
        r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, flags=re.S
    ).groups()
    types = {n: t for t, n in re.findall(r"\.param\s+\.(\w+)\s.*?(\w+_param_\d+)", parameters)}
    program = Program(name, list(types.items()), threads=int(re.search(r"\.reqntid\s+(\d+)", launch)[1]))
    items = list(_items(body, files, program))
    targets = {item.operands[0] for item in items if isinstance(item, Statement) and item.op.startswith("bra")}
    block: list[Statement] = []
    for item in items:
        if isinstance(item, Statement):
            block.append(item)
        ends = item.op in BRANCHES + BARRIERS if isinstance(item, Statement) else item in targets
        if ends and block:
            program.blocks.append(block)
            block = []
        if item in targets:
            program.labels[item] = len(program.blocks)
    return program


def _items(body: str, files: dict[str, str], program: Program) -> Iterator[Statement | str]:
    """Statements and labels in their order; registers are declared on the way."""
    line = ""
    for text in body.splitlines():
        text = text.split("//")[0].strip()
        if place := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            line = f"{files.get(place[1], place[1])}:{place[2]}"
        elif registers := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>;", text):
            program.widths[registers[2]] = 1 if registers[1] == "pred" else int(registers[1][1:])
        elif label := re.match(r"(\$\w+):", text):
            yield label[1]
        elif text and not text.startswith((".section", ".pragma")):
            for piece in filter(None, map(str.strip, text.split(";"))):
                yield _statement(piece, line)


def _statement(text: str, line: str) -> Statement:
    found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", text)
    if found is None:
        raise Unsupported(f"no instruction: {text!r} ({line})")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3] or "")
    return Statement(found[2], [_operand(o) for o in operands], found[1], line)


def _operand(text: str) -> str | tuple[str, ...]:
    return tuple(re.findall(r"[^{},\s]+", text)) if text.startswith("{") else text
