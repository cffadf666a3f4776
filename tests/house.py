"""Does the package keep to its layout?  python -m tests.house [--peers]

Three measurements and the checks on them. A check that fails prints one line and the exit code is 1.

Imports, read from the source (ast), of modules of the package by modules of the package:

    import   in a module's body, also in a class, a try or an if
    call     in a function, run when it is called: as much a dependency as the other
    typing   under `if TYPE_CHECKING:`, for annotations alone: none at run time, so it makes no arrow; counted apart,
             as is what stands in the `else` of `if not TYPE_CHECKING:`

`from tip_kernels import name` is an import of the module of that name, and of the package's face, `__init__`, where the
face exports the name; a module from which the face takes its `__all__` is face, too.

A room is a folder of the package, or a module that stands flat in it; the face is one. An arrow goes from a room to one
that it imports, however many imports it stands for. A floor is the longest way down: a room stands one floor above the
highest of those that it imports; within a cycle the imports made in calls are left out. An arrow back up is one to a
room that is not on a lower floor.

Walks, traced (sys.settrace): one loss of two Heads (N = 64 rows, V = 1024, H = 32 of the student, 48 of the teacher,
fp32) on a CPU by tiled torch, the making of the Heads and the backward included, after one that is not counted. Only
code of the package is counted:

    files      in which a line ran
    functions  that were called, each once; comprehensions and lambdas are none
    lines      that ran, each once
    switches   calls (of comprehensions and lambdas too) and resumed generators, each of which comes right after one in
               another file

The peers' reverse KL (--peers), with the same tensors, is counted in their own packages.

Complexity is McCabe's as radon counts it, with comprehensions, conditional expressions, and, or and assert among the
decisions; ruff's C901, which counts statements alone, is switched on beside it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tip_kernels"
FACE, MAIN = "__init__", "__main__"

# Checks that fail today, by their names. One that passes has to leave this set: then it holds for good.
NOT_YET: set[str] = set()

TRITON = ("kernels", "backends/triton")
BACKENDS = ("eager", "backends/eager", *TRITON)
FLAT, ROOMS, FLOORS, COMPLEXITY = 4, 20, 8, 15
WALKS = {"divergence_loss": (6, 30), "distill": (9, 60)}  # at most so many files, and switches between them
DISTILL = (15, 60)  # at most so many parameters, and lines beside the docstring
TOO_COMPLEX: dict[str, str] = {}  # functions that may be, with the reason


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    when: str  # "import", "call" or "typing"


class House:
    """The modules of a package below `root`, and what they import of each other."""

    def __init__(self, root: Path, package: str) -> None:
        self.package = package
        self.files = {_module(root, path): path for path in sorted((root / package).rglob("*.py"))}
        self.trees = {module: ast.parse(path.read_text()) for module, path in self.files.items()}
        self.exported = _exported(self.trees[package])
        self.faces = {package}  # and the module that its names are listed in, where it takes __all__ from one
        for name, _ in self.names_imported(package):
            if name.endswith(".__all__"):
                self.faces.add(listed := name.removesuffix(".__all__"))
                self.exported = _exported(self.trees[listed])
        self.imports = [
            Import(module, imported, when)
            for module in self.files
            for name, when in self.names_imported(module)
            if (imported := self._owner(name)) not in (None, module)
        ]
        self.rooms = {module: self._room(module) for module in self.files}

    def names_imported(self, module: str) -> Iterator[tuple[str, str]]:
        """Dotted names that a module imports, and when; names taken from a module are dotted to it."""
        is_folder = self.files[module].name == "__init__.py"
        package = module.split(".") if is_folder else module.split(".")[:-1]

        def visit(node: ast.AST, when: str) -> Iterator[tuple[str, str]]:
            if isinstance(node, ast.Import):
                yield from ((alias.name, when) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((f"{base}.{alias.name}", when) for alias in node.names)
            elif isinstance(node, ast.If) and ast.unparse(node.test) in _FOR_CHECKERS:
                of_checkers = _FOR_CHECKERS[ast.unparse(node.test)]
                for children, checked in ((node.body, of_checkers), (node.orelse, not of_checkers)):
                    yield from (found for child in children for found in visit(child, "typing" if checked else when))
            else:
                inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and when == "import"
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, "call" if inside else when)

        return visit(self.trees[module], "import")

    def _owner(self, name: str) -> str | None:
        """The module of the package that a dotted name is in, or None."""
        above, _, last = name.rpartition(".")
        if above == self.package and last in self.exported:
            return self.package
        return name if name in self.files else above if above in self.files else None

    def _room(self, module: str) -> str:
        """The folder that a module is in, below the package's, or its own name where it stands flat."""
        if module in self.faces:
            return FACE
        path = self.files[module].relative_to(self.files[self.package].parent)
        return path.parent.as_posix() if path.parent.parts else path.stem

    def arrows(self, when: Collection[str] = ("import", "call"), *, rooms: bool = True) -> set[tuple[str, str]]:
        """(importer, imported) of rooms, or of modules."""
        ends = ((i.importer, i.imported) for i in self.imports if i.when in when)
        if rooms:
            ends = ((self.rooms[a], self.rooms[b]) for a, b in ends)
        return {(a, b) for a, b in ends if a != b}

    def floors(self) -> dict[str, int]:
        """The floor of every room, from 1 up."""
        rooms, arrows = sorted(set(self.rooms.values())), self.arrows()
        component = components(rooms, arrows)
        made_in_calls = arrows - self.arrows(["import"])
        down = {(a, b) for a, b in arrows if not ((a, b) in made_in_calls and component[a] == component[b])}
        component, found = components(rooms, down), {}

        def floor(room: str) -> int:
            if room not in found:
                below = {b for a, b in down if a in component[room] and b not in component[room]}
                found[room] = 1 + max(map(floor, below), default=0)
            return found[room]

        return {room: floor(room) for room in rooms}


# Whether the body of an `if` on this is for type checkers alone; else its `else` is.
_FOR_CHECKERS = {"TYPE_CHECKING": True, "typing.TYPE_CHECKING": True}
_FOR_CHECKERS |= {f"not {name}": False for name in _FOR_CHECKERS}


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _exported(face: ast.Module) -> set[str]:
    """The names in __all__."""
    for node in face.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def components(nodes: Collection[str], arrows: Collection[tuple[str, str]]) -> dict[str, frozenset[str]]:
    """For every node the nodes from which and to which it can be reached, itself among them."""
    reached = {}
    for start in nodes:
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            fresh = {b for a, b in arrows if a == here} - seen
            seen |= fresh
            todo += fresh
        reached[start] = seen
    return {a: frozenset(b for b in reached[a] if a in reached[b]) for a in nodes}


def cycles(nodes: Collection[str], arrows: Collection[tuple[str, str]]) -> list[list[str]]:
    """The cycles of more than one node."""
    return sorted(sorted(one) for one in set(components(nodes, arrows).values()) if len(one) > 1)


def complexities(tree: ast.AST) -> dict[str, int]:
    """Complexity of every function by its name, that of a class or function around it before a dot."""
    found: dict[str, int] = {}

    def decisions(node: ast.AST, around: str) -> int:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{around}{node.name}"
            found[name] = 1 + sum(decisions(child, f"{name}.") for child in node.body)
            return 0
        if isinstance(node, ast.ClassDef):
            around = f"{around}{node.name}."
        return _decisions_of(node) + sum(decisions(child, around) for child in ast.iter_child_nodes(node))

    decisions(tree, "")
    return found


def _decisions_of(node: ast.AST) -> int:
    """How many ways more than one a node itself adds."""
    match node:
        case ast.If() | ast.IfExp() | ast.Assert():
            return 1
        case ast.For() | ast.AsyncFor() | ast.While():
            return 1 + bool(node.orelse)
        case ast.Try() | ast.TryStar():
            return len(node.handlers) + bool(node.orelse)
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.comprehension():
            return 1 + len(node.ifs)
        case ast.Match():
            bare = [
                case for case in node.cases if isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
            ]
            return len(node.cases) - bool(bare)
    return 0


@dataclass(frozen=True)
class Walk:
    """What ran of a package, and how often the reader turns to another file."""

    files: int
    functions: int
    lines: int
    switches: int
    threads: int  # in which it ran


def walked(work: Callable[[], object], package: Path) -> Walk:
    """Runs work and counts the code below the folder `package`, in all threads that start meanwhile too."""
    calls: list[CodeType] = []
    lines: set[tuple[str, int]] = set()
    threads: set[int] = set()
    inside = f"{package}/"

    def tracer(frame: FrameType, event: str, argument: object):
        code = frame.f_code
        if not code.co_filename.startswith(inside):
            return None
        if event == "call":
            calls.append(code)
            threads.add(threading.get_ident())
        elif event == "line":
            lines.add((code.co_filename, frame.f_lineno))
        return tracer

    before = sys.gettrace(), threading.gettrace()
    threading.settrace(tracer)
    sys.settrace(tracer)
    try:
        work()
    finally:
        sys.settrace(before[0])
        threading.settrace(before[1])
    return Walk(
        files=len({file for file, _ in lines}),
        functions=len({code for code in calls if not code.co_name.startswith("<")}),
        lines=len(lines),
        switches=sum(a.co_filename != b.co_filename for a, b in pairwise(calls)),
        threads=len(threads),
    )


def _tensors() -> tuple:
    """hidden and weight of the student, which need gradients, and of the teacher."""
    import torch

    torch.manual_seed(0)
    return (
        torch.randn(64, 32, requires_grad=True), torch.randn(1024, 32, requires_grad=True),
        torch.randn(64, 48), torch.randn(1024, 48),
    )  # fmt: skip


def our_walks() -> dict[str, Walk]:
    """With torch.mm's products, wherever this is run."""
    import torch

    import tip_kernels as tip
    from tip_kernels.learn import gradient_sweep
    from tip_kernels.sources import pair

    def heads() -> tuple[tip.Head, tip.Head]:
        hidden_s, weight_s, hidden_t, weight_t = _tensors()
        return tip.Head(hidden_s, weight_s), tip.Head(hidden_t, weight_t)

    works = {
        "token_stats": lambda: tip.token_stats(*heads()),
        "divergence_loss": lambda: tip.divergence_loss(*heads()).sum().backward(),
        "distill": lambda: tip.distill(*heads()).loss.backward(),
    }
    products = {"mm": torch.mm, "addmm_": torch.Tensor.addmm_}
    with mock.patch.object(pair, "mm", torch.mm), mock.patch.multiple(gradient_sweep, **products):
        return {name: _second(work, Path(tip.__file__).parent) for name, work in works.items()}


def _second(work: Callable[[], object], package: Path) -> Walk:
    """The walk of a second run: the first imports what is imported in calls."""
    work()
    return walked(work, package)


def peers_walks() -> dict[str, Walk]:
    import liger_kernel
    import torch
    import trl
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)

    def liger() -> None:
        loss = function(*_tensors(), torch.zeros(64, dtype=torch.int64))
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    def chunked() -> None:
        hidden_s, weight_s, hidden_t, weight_t = _tensors()
        rows, _ = ChunkedDivergenceFunction.apply(hidden_s, weight_s, None, hidden_t, weight_t, None, 1.0)
        rows.mean().backward()

    return {
        "Liger chunked JSD": _second(liger, Path(liger_kernel.__file__).parent),
        "TRL chunked divergence": _second(chunked, Path(trl.__file__).parent),
    }


def distill_sizes() -> tuple[int, int]:
    """The parameters of `distill`, and its lines beside the docstring."""
    import tip_kernels as tip

    lines, _ = inspect.getsourcelines(tip.distill)
    (function,) = ast.parse(textwrap.dedent("".join(lines))).body
    docstring = function.body[0] if ast.get_docstring(function) else None
    beside = len(lines) - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)
    return len(inspect.signature(tip.distill).parameters), beside


Found = tuple[str, str | None]  # the name of a check, and what is wrong where something is


def found_in(house: House) -> Iterator[Found]:
    """The checks of a package's imports."""
    for name, rooms in (("cycles of files", False), ("cycles of rooms", True)):
        nodes = set(house.rooms.values() if rooms else house.files)
        wrong = cycles(nodes, house.arrows(rooms=rooms))
        yield name, "; ".join(" / ".join(cycle) for cycle in wrong) or None
    floors, rooms = house.floors(), set(house.rooms.values())
    up = sorted(f"{a} -> {b}" for a, b in house.arrows() if floors[a] <= floors[b])
    yield "arrows back up", ", ".join(up) or None
    yield "floors", _at_most(FLOORS, max(floors.values()), "floors")
    yield "rooms", _at_most(ROOMS, len(rooms), "rooms")
    flat = sorted(m for m in house.files if house.files[m].parent == house.files[house.package].parent)
    flat = [house.rooms[m] for m in flat if house.rooms[m] not in (FACE, MAIN)]
    yield "flat modules", _at_most(FLAT, len(flat), f"modules beside {FACE} and {MAIN}", flat)
    face = {i.importer for i in house.imports if i.imported in house.faces and i.when != "typing"} - house.faces
    yield "the face", f"{house.package} itself is imported by {', '.join(sorted(face))}" if face else None
    yield from _found_in_backends(house)


def _found_in_backends(house: House) -> Iterator[Found]:
    backends = [module for module, room in house.rooms.items() if room in BACKENDS]
    known = {module: sorted(_public_types_known(house, module, backends)) for module in backends}
    lines = [f"{module} knows {', '.join(names)}" for module, names in known.items() if names]
    yield "backends know no public type", "; ".join(lines) or None
    outside = sorted(
        module
        for module, room in house.rooms.items()
        if room not in TRITON and any(name.split(".")[0] == "triton" for name, _ in house.names_imported(module))
    )
    yield "Triton in its backend alone", f"imported by {', '.join(outside)}" if outside else None


def _public_types_known(house: House, module: str, backends: Collection[str]) -> set[str]:
    """Classes of the face that a module takes from a module outside the backends, or reads off one."""
    classes = (node.name for tree in house.trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    public = house.exported & set(classes)
    taken = {name.rpartition(".")[2] for name, _ in house.names_imported(module) if house._owner(name) not in backends}
    read = {node.attr for node in ast.walk(house.trees[module]) if isinstance(node, ast.Attribute)}
    return public & (taken | read)


def found_in_reference(house: House, reference: House) -> Iterator[Found]:
    """The specification stands alone, and what it specifies stands without it."""
    allowed = {"torch", reference.package, *sys.stdlib_module_names}
    names = {name.split(".")[0] for module in reference.files for name, _ in reference.names_imported(module)}
    wrong = sorted(names - allowed)
    yield f"{reference.package} imports torch alone", f"it imports {', '.join(wrong)}" if wrong else None
    wrong = sorted(
        module
        for module in house.files
        if any(name.split(".")[0] == reference.package for name, _ in house.names_imported(module))
    )
    yield f"{reference.package} is not imported", f"imported by {', '.join(wrong)}" if wrong else None


def found_in_functions(house: House) -> Iterator[Found]:
    """Complexity. A check for every function that is above, or that may be."""
    counted: dict[str, int] = {}
    for tree in house.trees.values():
        for name, count in complexities(tree).items():
            counted[name] = max(count, counted.get(name, 0))
    for name, count in sorted(counted.items()):
        if count > COMPLEXITY and name not in TOO_COMPLEX:
            yield f"complexity of {name}", _at_most(COMPLEXITY, count)
    for name in TOO_COMPLEX:
        fits = counted.get(name, 0) <= COMPLEXITY
        yield f"excuse of {name}", "it is not above, or no more: take it out of TOO_COMPLEX" if fits else None


def found_in_walks(walks: Mapping[str, Walk], sizes: tuple[int, int]) -> Iterator[Found]:
    for name, (files, switches) in WALKS.items():
        yield f"files of {name}", _at_most(files, walks[name].files, "files")
        yield f"switches of {name}", _at_most(switches, walks[name].switches, "switches between files")
    yield "parameters of distill", _at_most(DISTILL[0], sizes[0], "parameters")
    yield "lines of distill", _at_most(DISTILL[1], sizes[1], "lines beside its docstring")


def _at_most(limit: int, count: int, what: str = "", names: Collection[str] = ()) -> str | None:
    listed = f": {', '.join(names)}" if names else ""
    return None if count <= limit else f"expected at most {f'{limit} {what}'.strip()}, got {count}{listed}"


def verdicts(found: Collection[Found], not_yet: Collection[str]) -> list[str]:
    """A line for every check that fails, for every excused one that passes, and for an excuse of no check."""
    failed = {name for name, wrong in found if wrong}
    lines = [f"{name}: {wrong}" for name, wrong in found if wrong and name not in not_yet]
    return lines + [f"{name}: passes, take it out of NOT_YET" for name in sorted(set(not_yet) - failed)]


def table_of_rooms(house: House) -> Iterator[str]:
    floors, arrows = house.floors(), house.arrows()
    up = {(a, b) for a, b in arrows if floors[a] <= floors[b]}
    typing = len(house.arrows(["typing"]) - arrows)
    yield (
        f"{len(floors)} rooms on {max(floors.values())} floors, {len(house.files)} files, {len(arrows)} arrows, "
        f"{len(up)} of them back up; {typing} more for annotations alone"
    )
    yield f"{'floor':<6}{'room':<18}{'files':>6}{'lines':>7}  imports (^ back up)"
    for room in sorted(floors, key=lambda r: (-floors[r], r)):
        paths = [house.files[m] for m in house.files if house.rooms[m] == room]
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        below = sorted((b for a, b in arrows if a == room), key=lambda r: (-floors[r], r))
        marked = " ".join(f"^{b}" if (room, b) in up else b for b in below)
        yield f"{floors[room]:<6}{room:<18}{len(paths):>6}{lines:>7}  {marked}".rstrip()


def table_of_walks(walks: Mapping[str, Walk]) -> Iterator[str]:
    yield f"{'walk':<24}{'files':>6}{'functions':>11}{'lines':>7}{'switches':>10}"
    for name, walk in walks.items():
        yield f"{name:<24}{walk.files:>6}{walk.functions:>11}{walk.lines:>7}{walk.switches:>10}"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.house", description="does the package keep to its layout?")
    options.add_argument("--peers", action="store_true", help="trace Liger's and TRL's chunked losses too")
    args = options.parse_args(argv)
    house, reference = House(ROOT, PACKAGE), House(ROOT, "reference")
    walks, sizes = our_walks(), distill_sizes()
    print(*table_of_rooms(house), sep="\n")
    print()
    print(*table_of_walks(walks | (peers_walks() if args.peers else {})), sep="\n")
    print(f"\ndistill: {sizes[0]} parameters, {sizes[1]} lines beside its docstring")
    found = [
        *found_in(house),
        *found_in_reference(house, reference),
        *found_in_functions(house),
        *found_in_walks(walks, sizes),
    ]
    for name, wrong in found:
        if wrong and name in NOT_YET:
            print(f"not yet  {name}: {wrong}")
    failed = verdicts(found, NOT_YET)
    print(*(f"FAILED   {line}" for line in failed), f"{len(found)} checks, {len(failed)} failed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
