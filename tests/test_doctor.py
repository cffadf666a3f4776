"""`tip-kernels doctor` tells what is here, and names every operation whose numbers are wrong."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._library.custom_ops import OPDEFS

import tip_kernels as tip
from tip_kernels import _versions
from tip_kernels.__main__ import main
from tip_kernels.doctor import cases, checks, machine, ops, truth
from tip_kernels.select.rule import QuotaRule

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OPS = sorted(ops.CHECKS)


def doctor(capsys, *words: str) -> tuple[int, str]:
    """Exit code and output."""
    capsys.readouterr()
    return main(["doctor", *words]), capsys.readouterr().out


def wrong_names(output: str) -> list[str]:
    return [line[6:51].strip() for line in output.splitlines() if line.startswith("WRONG")]


def registered() -> set[str]:
    """Every torch.library op of the package, after all of its modules have been loaded that need no other library."""
    for module in pkgutil.walk_packages(tip.__path__, "tip_kernels."):
        if not re.match(r"tip_kernels\.(__main__|hooks|compat|opd|inspect)\b", module.name):
            importlib.import_module(module.name)
    names = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return {name for name in names if name.startswith("tip_kernels::")}


def test_everything_is_right_here_in_under_20_seconds_of_work(capsys):
    began = time.process_time()
    code, output = doctor(capsys)
    assert time.process_time() - began < 20
    assert code == 0 and wrong_names(output) == [], output
    assert output.splitlines()[-1].endswith("all right")
    assert "not run" not in output
    lines = [line for line in output.splitlines() if line.startswith("ok ")]
    assert len(lines) == len(checks.CHECKS | ops.CHECKS)


def test_every_registered_op_has_a_check_and_every_check_of_an_op_has_run_it():
    assert registered() == set(OPS)
    case = cases.case(CPU)
    for name, check in ops.CHECKS.items():
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            assert checks.run(name, check, case).ok, name
        assert name in {event.name for event in profile.function_events}


def test_every_public_name_that_computes_has_a_check():
    lines = "\n".join(checks.CHECKS)
    kinds = {name: getattr(tip, name) for name in tip.__all__}
    results = {"Distilled", "Divergence", "Kept", "Plan", "Rule", "TokenStats"}
    inputs = {"Execution", "Head", "backend"}
    assert all(
        re.search(rf"\b{name}\b", lines) for name in kinds.keys() - results - inputs - {"difficulty_temperature"}
    )
    divergences = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, tip.Divergence)}
    rules = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, tip.Rule)}
    assert set(truth.DIVERGENCES) == divergences - {"Divergence", "Gated"}
    assert set(checks.RULES) == rules - {"Rule"}


@pytest.mark.parametrize("name", OPS)
def test_wrong_op_is_named_and_the_exit_code_is_1(name, capsys, monkeypatch):
    registered()
    right = OPDEFS[name]._backend_fns[None]

    def wrong(*arguments):
        given = right(*arguments)
        for out in [given] if isinstance(given, torch.Tensor) else given or []:
            out.mul_(1.01)
        if given is None:  # written into its first argument
            arguments[0].mul_(1.01)
        return given

    monkeypatch.setitem(OPDEFS[name]._backend_fns, None, wrong)
    torch._dynamo.reset()
    code, output = doctor(capsys, "--only", name)
    assert code == 1 and name in wrong_names(output), output
    assert output.splitlines()[-1].endswith(f"wrong: {'; '.join(wrong_names(output))}")


TOP = "select TopEntropy"
SWAPS = {  # what is swapped: its owner, its name, the wrong one, where the doctor looks, what it must and must not name
    "value": (tip.TVD, "value", lambda self, row: 1.001 * row["value"], "TVD", {"divergence_loss TVD, Head"}),
    "gradient": (
        tip.HellingerSq,
        "scalars",
        lambda self, row: {"hellinger_sq": row["hellinger_sq"] * 1.001},
        "HellingerSq",
        {"divergence_loss HellingerSq, logits", "divergence_loss HellingerSq, Head"},
    ),
    "score": (tip.TopEntropy, "_scores", lambda self, x, rows: -x["entropy_s"], "select", {TOP}),
    "quota": (QuotaRule, "_choose", lambda self, s, x, rows, g: (rows, None), "select", {TOP, "select SoftOr"}),
    "ratio": (tip.AdaptiveFocus, "update", lambda self, loss: 1.0, "Focus", {"AdaptiveFocus"}),
}


@pytest.mark.parametrize("what", SWAPS)
def test_wrong_function_is_named(what, capsys, monkeypatch):
    owner, attribute, wrong, where, names = SWAPS[what]
    monkeypatch.setattr(owner, attribute, wrong)
    code, output = doctor(capsys, "--only", where)
    assert code == 1 and names <= set(wrong_names(output)), output
    assert "select KeepAll" not in wrong_names(output)


def test_statistic_measured_wrongly_is_named_and_its_neighbours_are_not(capsys, monkeypatch):
    right = tip.token_stats

    def wrong(*arguments, **options):
        stats = right(*arguments, **options)
        if hasattr(stats, "kl_rev"):
            stats._measured["kl_rev"] = stats.kl_rev * 1.001
        return stats

    monkeypatch.setattr("tip_kernels.doctor.checks.token_stats", wrong)
    code, output = doctor(capsys, "--only", "token_stats")
    assert code == 1 and wrong_names(output) == ["token_stats kl_rev"]


def test_error_that_an_operation_raises_is_a_failure_in_one_line(capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\non this device")

    monkeypatch.setattr("tip_kernels.doctor.checks.quadrants", broken)
    code, output = doctor(capsys, "--only", "quadrants")
    assert code == 1
    assert re.search(r"^WRONG  quadrants +RuntimeError: no such kernel$", output, re.MULTILINE)


def test_choice_that_differs_in_one_row_is_wrong():
    expected = torch.tensor([True, False, False])
    assert cases.exact("rows", expected.clone(), expected).error_and_bound() == (0.0, 0.0)
    assert cases.exact("rows", ~expected, expected).error_and_bound() == (3.0, 0.0)


@pytest.mark.parametrize(
    "ours", [[1.0, torch.nan], [torch.inf, 2.0], [1.0, 2.0001], [1.0], [torch.nan, torch.nan]], ids=str
)
def test_number_that_is_not_the_truths_is_beyond_the_bound(ours):
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    error, bound = cases.Compared("x", torch.tensor(ours), right, right.float()).error_and_bound()
    assert error > bound


def test_infinity_of_the_truth_is_asked_for():
    right = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    for ours, is_right in (([1.0, torch.inf], True), ([1.0, 3e38], False), ([1.0, -torch.inf], False)):
        error, bound = cases.Compared("x", torch.tensor(ours), right, right.float()).error_and_bound()
        assert (error <= bound) == is_right


def test_json_holds_what_the_lines_say(capsys):
    code, output = doctor(capsys, "--json", "--only", "select")
    report = json.loads(output)
    assert code == 0 and report["ok"] is True
    assert report["system"]["tip_kernels"] == tip.__version__
    assert torch.__version__.startswith(report["packages"]["torch"]["found"])  # which may lack "+cu128"
    assert report["backend"]["backend"] == "eager" and "cpu" in report["backend"]["why"]
    assert report["device"]["device"] == "cpu"
    assert report["compilers"].keys() == {"c", "c++"}
    assert {check["name"] for check in report["checks"]} == {f"select {name}" for name in checks.RULES}
    assert all(check["ok"] and check["error"] <= check["bound"] for check in report["checks"])


def test_json_of_an_infinite_error_is_json(capsys, monkeypatch):
    monkeypatch.setattr(tip.ReverseKL, "value", lambda self, row: row["kl_rev"] * torch.nan)
    code, output = doctor(capsys, "--json", "--only", "divergence_loss ReverseKL, logits")
    assert code == 1
    report = json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["checks"][0] | {"bound": 0, "note": ""} == {
        "name": "divergence_loss ReverseKL, logits", "error": "inf", "bound": 0, "ok": False, "note": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ("2.13.0+cpu", "tested"),
        ("99.1", "untested"),
        ("1.0", "torch: expected 2.0 or newer, got 1.0"),
        ("2.5", "torch: expected 2.6 or newer, got 2.5: it adds wrongly"),
        (None, "not installed"),
    ],
)
def test_version_found_stands_beside_those_tested(found, verdict, monkeypatch):
    monkeypatch.setattr(_versions, "TESTED", {"torch": {"2.13.0": "2026-11-29", "2.9": "2026-11-29"}})
    monkeypatch.setattr(_versions, "FLOORS", {"torch": "2.0"})
    monkeypatch.setattr(_versions, "KNOWN_BAD", {"torch": (_versions.Broken("2.5", "2.6", "it adds wrongly"),)})
    monkeypatch.setattr(_versions, "installed", {"torch": found}.get)
    assert machine.packages() == {"torch": {"found": found, "tested": ["2.9", "2.13.0"], "verdict": verdict}}


def test_backend_says_why(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.delenv("TIP_KERNELS_BACKEND", raising=False)
    assert machine.backend_facts(gpu) == {"backend": "triton", "why": "a GPU, and triton is installed"}
    assert machine.backend_facts(CPU)["backend"] == "eager"
    monkeypatch.setenv("TIP_KERNELS_BACKEND", "eager")
    assert machine.backend_facts(gpu) == {"backend": "eager", "why": "TIP_KERNELS_BACKEND=eager"}
    monkeypatch.setenv("TIP_KERNELS_BACKEND", "abacus")
    assert machine.backend_facts(gpu)["backend"] is None
    assert "got str 'abacus'" in machine.backend_facts(gpu)["why"]


def test_compiler_is_looked_for_where_triton_and_inductor_look(tmp_path, monkeypatch):
    compiler = tmp_path / "my-cc"
    compiler.write_text("#!/bin/sh\necho my compiler 1.0\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CC", "my-cc -m64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.compilers() == {"c": "my compiler 1.0", "c++": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC")
    monkeypatch.delenv("CXX")
    assert machine.compilers() == {"c": None, "c++": None}


def test_interpreter_that_cannot_run_is_no_wrong_number(capsys, monkeypatch):
    def broken(*arguments, **options):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    registered()
    monkeypatch.setitem(OPDEFS["tip_kernels::row_sums"]._backend_fns, None, broken)
    code, output = doctor(capsys, "--only", "tip_kernels::row_sums")
    assert code == 0 and "1 not run" in output
    assert "interpreter raised TypeError: 'only 0-dimensional arrays" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_on_a_gpu_every_kernel_runs_on_rows_of_several_parts(monkeypatch):
    """Shown on the inputs that a GPU gets, fewer rows of them, by Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    from tip_kernels.backends.triton import row_stats

    got, launched = [], []
    monkeypatch.setattr(ops, "_ready_for_kernels", lambda device: None)
    gpu = replace(cases.case(CPU), device=torch.device("cuda"))
    monkeypatch.setattr(ops, "case", lambda device, **sizes: cases.case(CPU, n_rows=4, **sizes))
    launch = InterpretedFunction.__getitem__
    monkeypatch.setattr(
        InterpretedFunction,
        "__getitem__",
        lambda kernel, grid: launched.append(kernel.fn.__name__) or launch(kernel, grid),
    )
    for name in ops.KERNELS:
        got.append(checks.run(name, ops.CHECKS[name], gpu))
        assert got[-1].ok, got[-1]
    sources = (ROOT / "tip_kernels/backends/triton").glob("*.py")
    kernels = {kernel for source in sources for kernel in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert len(kernels) >= 5 and set(launched) == kernels
    assert ops.WIDE > 2 * row_stats.PART


def test_kernels_are_not_run_where_triton_is_missing(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    code, output = doctor(capsys, "--only", "tip_kernels::row_grad")
    assert code == 0 and output.count("triton is not installed") == 2


def test_truth_of_the_doctor_is_that_of_the_reference():
    import reference as ref

    case = cases.case(CPU)
    z_s, z_t = (z.double() for z in case.logits.logits(case.logits.leaves))
    ours = truth.statistics(z_s, z_t, case.labels, 5)
    theirs = ref.token_stats(z_s, z_t, labels=case.labels, margins=True, top_k=5)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, equal_nan=True, msg=name)
    lp = case.log_probs(z_s, z_t, temperature=False)
    for name, (parameters, formula) in truth.DIVERGENCES.items():
        snake = {"ToDi": "todi"}.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        labels = (case.sampled,) if name == "SampledReverseKL" else ()
        right = getattr(ref, snake)(z_s, z_t, *labels, *parameters)
        torch.testing.assert_close(formula(*lp, case.sampled), right, msg=name)


def test_doctor_needs_neither_the_reference_nor_the_tests():
    script = """
import sys
sys.modules["reference"] = sys.modules["tests"] = None
from tip_kernels.__main__ import main
sys.exit(main(["doctor", "--only", "token_stats"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_doctor_says_nothing_on_stderr_and_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tip_kernels", "doctor", "--only", "tip_kernels::"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 checks" in done.stdout


def test_every_issue_form_about_something_wrong_asks_for_what_the_doctor_says():
    forms = {form.stem: form for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.keys() == {"bug", "wrong-number", "new-rule", "config"}
    for form in (forms["bug"], forms["wrong-number"]):
        fields = form.read_text().split("  - type: ")
        (asked,) = [field for field in fields if "Output of `tip-kernels doctor`" in field]
        assert "required: true" in asked
