"""What tests/house.py measures and refuses, on small packages made for it; the package's own layout and docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import tip_kernels as tip
from tests import house
from tip_kernels.compat import liger, trl
from tip_kernels.hooks import transformers, verl
from tip_kernels.inspect import save_statistics


def built(root: Path, files: dict[str, str], package: str = "toy") -> house.House:
    """A package of those files, beside what is there of it; folders get an empty `__init__` unless they have one."""
    for name, text in files.items():
        path = root / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for folder in (root / package, path.parent):
            (folder / "__init__.py").touch()
    return house.House(root, package)


def wrong_in(found) -> dict[str, str]:
    return {name: wrong for name, wrong in found if wrong}


def test_the_package_keeps_to_its_layout(capsys):
    code, printed = house.main([]), capsys.readouterr().out
    assert code == 0, printed
    assert all(name in printed for name in ("token_stats", "divergence_loss", "distill", "sources"))


def test_imports_in_calls_are_arrows_and_those_for_annotations_are_none(tmp_path):
    toy = built(
        tmp_path,
        {
            "a.py": """
                from typing import TYPE_CHECKING
                from toy.room import inner
                if TYPE_CHECKING:
                    from toy import b
                if not TYPE_CHECKING:
                    from toy.room import other
                def late():
                    from . import c
                """,
            "b.py": "try:\n    import toy.c\nfinally:\n    pass",
            "c.py": "class C:\n    import math",
            "room/inner.py": "from .other import name\nfrom ..c import C",
            "room/other.py": "name = 1",
        },
    )
    assert toy.arrows() == {("a", "room"), ("a", "c"), ("b", "c"), ("room", "c")}
    assert toy.arrows(["import"]) == toy.arrows() - {("a", "c")}
    assert toy.arrows(["typing"]) == {("a", "b")}
    assert {("toy.room.inner", "toy.room.other"), ("toy.a", "toy.room.other")} <= toy.arrows(rooms=False)
    assert toy.floors() == {"__init__": 1, "c": 1, "b": 2, "room": 2, "a": 3}
    assert not wrong_in(house.found_in(toy))


def test_a_name_of_the_face_is_the_face_and_a_module_of_the_package_is_none(tmp_path):
    toy = built(
        tmp_path,
        {
            "__init__.py": "from toy.learn import learn\n__all__ = ['learn']",
            "learn.py": "def learn(): ...",
            "other/__init__.py": "",
            "a.py": "from toy import other",
            "b.py": "from toy import learn",
            "c.py": "def late():\n    import toy as t",
            "opd/loop.py": "import toy",
        },
    )
    assert wrong_in(house.found_in(toy)) == {"the face": "toy itself is imported by toy.b, toy.c, toy.opd.loop"}


def test_the_names_of_the_face_may_stand_in_a_module_of_its_own(tmp_path):
    toy = built(
        tmp_path,
        {
            "__init__.py": "if TYPE_CHECKING:\n    from toy._public import __all__ as __all__",
            "_public.py": "from toy.learn.loss import Loss\n__all__ = ['Loss']",
            "learn/loss.py": "class Loss: ...",
            "backends/eager/fold.py": "from toy.learn.loss import Loss",
            "plan/a.py": "from toy import Loss",
            "plan/b.py": "from toy._public import Loss",
        },
    )
    wrong = wrong_in(house.found_in(toy))
    assert wrong["the face"] == "toy itself is imported by toy.plan.a, toy.plan.b"
    assert wrong["backends know no public type"] == "toy.backends.eager.fold knows Loss"


def test_cycles_of_files_and_of_rooms_and_arrows_back_up_are_found(tmp_path):
    files = {
        "x/low.py": "",
        "x/high.py": "def late():\n    from toy.y import middle",
        "y/middle.py": "from toy.x import low",
    }
    wrong = wrong_in(house.found_in(built(tmp_path, files)))
    assert wrong == {"cycles of rooms": "x / y", "arrows back up": "x -> y"}
    wrong = wrong_in(house.found_in(built(tmp_path, {"x/low.py": "def late():\n    from toy.y import middle"})))
    assert wrong["cycles of files"] == "toy.x.low / toy.y.middle"


def test_floors_rooms_and_flat_modules_are_limited(tmp_path):
    files = {f"m{i}.py": f"import toy.m{i + 1}" for i in range(8)} | {"m8.py": ""}
    wrong = wrong_in(house.found_in(built(tmp_path, files)))
    assert wrong.keys() == {"floors", "flat modules"} and "got 9" in wrong["floors"]
    wrong = wrong_in(house.found_in(built(tmp_path, {f"r{i}/m.py": "" for i in range(20)})))
    assert "rooms" in wrong


@pytest.mark.parametrize("text", ["from toy.kinds import Head", "import toy.kinds\nprint(toy.kinds.Head)"])
def test_a_backend_that_knows_a_public_type_is_found(tmp_path, text):
    files = {
        "__init__.py": "__all__ = ['Head', 'SMALL']",
        "kinds.py": "class Head: ...\nclass Blend: ...\nSMALL = 1",
        "backends/eager/fold.py": "from toy.kinds import Blend, SMALL\nfrom .names import Head",
        "backends/eager/names.py": "Head = 1",
    }
    assert not wrong_in(house.found_in(built(tmp_path, files)))
    wrong = wrong_in(house.found_in(built(tmp_path, {"backends/eager/fold.py": text})))
    assert wrong == {"backends know no public type": "toy.backends.eager.fold knows Head"}


def test_triton_stays_in_its_backend_and_the_reference_alone(tmp_path):
    toy = built(tmp_path, {"backends/triton/k.py": "import triton", "a.py": "def f():\n    import triton.language"})
    assert wrong_in(house.found_in(toy)) == {"Triton in its backend alone": "imported by toy.a"}
    reference = built(tmp_path, {"a.py": "import math, torch.nn\nfrom .b import x", "b.py": "x = 1"}, "reference")
    assert not wrong_in(house.found_in_reference(toy, reference))
    reference = built(tmp_path, {"b.py": "import numpy\nx = 1"}, "reference")
    toy = built(tmp_path, {"b.py": "def f():\n    from reference import a"})
    assert wrong_in(house.found_in_reference(toy, reference)) == {
        "reference imports torch alone": "it imports numpy",
        "reference is not imported": "imported by toy.b",
    }


def test_complexity_counts_every_decision_of_a_function_and_not_those_of_functions_in_it():
    text = """
        def plain(): return 1
        class C:
            def method(self, x):
                for y in x:
                    if y and x or self: pass
                else: pass
                while x: x = 1 if x else 2
                try: pass
                except OSError: pass
                except ValueError: pass
                else: pass
                def inner(z): return [a for a in z if a if z]
                assert x
                return {a: b for a in x for b in x}
        def cases(x):
            match x:
                case 1: pass
                case [2, _]: pass
                case _: pass
        """
    counted = house.complexities(ast.parse(textwrap.dedent(text)))
    # for, its else, if, and, or; while, the conditional; two excepts, the else; assert; two comprehensions; and one
    assert counted == {"plain": 1, "C.method": 14, "C.method.inner": 4, "cases": 3}


def test_a_function_that_is_too_complex_is_named(tmp_path, monkeypatch):
    toy = built(tmp_path, {"a.py": "def f(x):\n    return " + " and ".join("x" * 16), "b.py": "def f(x): return x"})
    assert wrong_in(house.found_in_functions(toy)) == {
        "complexity of f": "expected at most 15, got 16",
    }
    monkeypatch.setattr(house, "TOO_COMPLEX", {"f": "a reason", "g": "a reason"})
    assert wrong_in(house.found_in_functions(toy)).keys() == {"excuse of g"}


def test_a_walk_counts_files_functions_lines_and_turns_to_another_file(tmp_path, monkeypatch):
    files = {
        "walk_a.py": """
            import threading
            from walk.walk_b import square
            def work():
                def inner(x): return square(x)
                total = sum(inner(x) for x in (1, 2))
                other = threading.Thread(target=inner, args=(3,))
                other.start()
                other.join()
                return total
            """,
        "walk_b.py": "def square(x):\n    y = x * x\n    return y\ndef unused():\n    return 1",
    }
    package = built(tmp_path, files, "walk").files["walk"].parent
    monkeypatch.syspath_prepend(tmp_path)
    from walk.walk_a import work

    counted = house.walked(work, package)
    # work, the generator, inner, square; the generator, inner, square; and in the thread inner, square
    assert counted == house.Walk(files=2, functions=3, lines=8, switches=5, threads=2)


def test_a_backward_runs_in_the_thread_that_calls_it():
    assert {name: walk.threads for name, walk in house.our_walks().items()} == dict.fromkeys(
        ("token_stats", "divergence_loss", "distill"), 1
    )


def test_walks_and_sizes_past_their_limits_are_named():
    long = house.Walk(files=99, functions=1, lines=1, switches=99, threads=1)
    wrong = wrong_in(house.found_in_walks({"divergence_loss": long, "distill": long}, (16, 61)))
    assert len(wrong) == 6 and wrong["switches of distill"] == "expected at most 60 switches between files, got 99"
    short = house.Walk(files=6, functions=1, lines=1, switches=30, threads=1)
    assert not wrong_in(house.found_in_walks({"divergence_loss": short, "distill": short}, (15, 60)))


def test_an_excuse_holds_until_its_check_passes():
    found = [("bad", "it is"), ("worse", "it is"), ("good", None)]
    assert house.verdicts(found, {"bad", "good", "gone"}) == [
        "worse: it is",
        "gone: passes, take it out of NOT_YET",
        "good: passes, take it out of NOT_YET",
    ]


def entries(docstring: str, section: str) -> set[str]:
    """The names that a section of a docstring in Google's style explains, each at the start of a line of its own."""
    found = re.search(rf"^{section}:\n((?:(?: .*)?\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return set(re.findall(r"^    \*{0,2}(\w+)(?: \([^)]*\))?: \S", found[1], re.MULTILINE)) if found else set()


def test_sections_of_a_docstring_are_read():
    docstring = """One line.

        Args:
            a: One
                b: of two lines.
            c (int): Another.
            **d: The others.

        Returns:
            e: Something.
        """
    assert entries(docstring, "Args") == {"a", "c", "d"}
    assert entries(docstring, "Returns") == {"e"} and not entries(docstring, "Raises")


PUBLIC = {name: getattr(tip, name) for name in tip.__all__ if name != "weights"}
PUBLIC |= {f"weights.{name}": getattr(tip.weights, name) for name in tip.weights.__all__ if name != "Weight"}
METHODS = [tip.Rule.__call__, tip.weights.Weight.__call__, tip.Rule.capacity, tip.Kept.slots, tip.AdaptiveFocus.update]
METHODS += [tip.AdaptiveFocus.load_state_dict, liger.LigerFusedLinearJSD.forward, liger.LigerFusedLinearJSDLoss.forward]
METHODS += [trl.ChunkedDivergenceFunction.apply]
ELSEWHERE = [transformers.head_of, transformers.distill_batch, verl.select_rows, verl.register, save_statistics]
ELSEWHERE += [liger.LigerFusedLinearJSD, liger.LigerFusedLinearJSDLoss, trl.generalized_jsd_loss]
PUBLIC |= {f"{each.__module__}.{each.__qualname__}": each for each in METHODS + ELSEWHERE}


def undocumented(public: Callable) -> set[str]:
    """Parameters of a public callable that no section explains; of a result, which nobody makes, its fields."""
    parameters = {p for p in inspect.signature(public).parameters if p != "self" and not p.startswith("_")}
    return parameters - entries(public.__doc__ or "", "Args") - entries(public.__doc__ or "", "Attributes")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_of_a_public_name_is_explained_in_a_section(name):
    assert not undocumented(PUBLIC[name])
