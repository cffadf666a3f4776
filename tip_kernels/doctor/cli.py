"""`tip-kernels doctor` from its arguments to its exit code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from tip_kernels.inspect.usage import Parser, UsageError, pick_device

if TYPE_CHECKING:
    import torch

    from tip_kernels.doctor.checks import Check, Result

DESCRIPTION = """\
What is installed beside what was tested, the device, the backend that will run there and why, the compilers at hand;
then every operation on that device against float64, one line each: its worst error and what is allowed. A few seconds
on a CPU; on a GPU each kernel is compiled first. Exit code 1 where a number is wrong."""
LINE = "{:<6} {:<44} {:>11} {:>11}  {}"


def parser() -> Parser:
    p = Parser(
        prog="tip-kernels doctor", description=DESCRIPTION, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    p.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    p.add_argument("--only", metavar="TEXT", help="check those operations alone whose name holds TEXT")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return p


def run(options: dict) -> int:
    """Prints what was found; returns the exit code."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("needs torch: pip install torch")
    from tip_kernels.doctor import machine

    began = time.perf_counter()
    device = pick_device(options.get("device", "auto"))
    if device.type == "cpu":  # the kernels are run, too; read when Triton is first imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    chosen, quiet = chosen_by(options.get("only", "")), options.get("json", False)
    report = {
        "system": machine.system(),
        "packages": machine.packages(),
        "device": machine.device_facts(device),
        "backend": machine.backend_facts(device),
        "compilers": machine.compilers(),
    }
    if not quiet:
        print_machine(report)
    results = self_test(device, chosen, (lambda result: None) if quiet else print_result)
    wrong = [result.name for result in results if result.ok is False]
    seconds = time.perf_counter() - began
    if quiet:
        checks = [asdict(result) for result in results]
        print(json.dumps(finite(report | {"checks": checks, "ok": not wrong, "seconds": round(seconds, 1)})))
    else:
        skipped = sum(result.ok is None for result in results)
        said = f"{len(results) - skipped} checks in {seconds:.1f} s" + (f", {skipped} not run" if skipped else "")
        print(f"\n{said}: " + (f"{len(wrong)} wrong: {'; '.join(wrong)}" if wrong else "all right"))
    return 1 if wrong else 0


def chosen_by(text: str) -> dict[str, Check]:
    """The checks whose name holds the text."""
    from tip_kernels.doctor import checks, ops

    chosen = {name: check for name, check in (checks.CHECKS | ops.CHECKS).items() if text in name}
    if not chosen:
        raise UsageError(f"argument --only: expected a part of the name of an operation, got {text!r}")
    return chosen


def self_test(device: torch.device, chosen: dict[str, Check], say: Callable[[Result], None]) -> list[Result]:
    """Runs the checks in order; each is said when it is done."""
    import torch

    from tip_kernels.doctor import cases, checks

    case, results, threads = cases.case(device), [], torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, check in chosen.items():
                results.append(checks.run(name, check, case))
                say(results[-1])
    finally:
        torch.set_num_threads(threads)
    return results


def print_machine(report: dict) -> None:
    system, device, backend = report["system"], report["device"], report["backend"]
    print(f"tip-kernels {system['tip_kernels']}, Python {system['python']}, {system['platform']}")
    for name, package in report["packages"].items():
        tested = ", ".join(package["tested"])
        print(f"{name:<13} {package['found'] or '-':<14} tested: {tested:<24} {package['verdict']}")
    facts = ", ".join(str(value) for key, value in device.items() if key != "device")
    print(f"{'device':<13} {device['device']}: {facts}, {system['threads']} threads")
    print(f"{'backend':<13} {backend['backend'] or 'none'}: {backend['why']}")
    for language, compiler in report["compilers"].items():
        print(f"{language + ' compiler':<13} {compiler or 'none found'}")
    print("\n" + LINE.format("", "operation", "worst error", "bound", "worst in").rstrip())


def print_result(result: Result) -> None:
    word = {True: "ok", False: "WRONG", None: "-"}[result.ok]
    error, bound = ("" if value is None else f"{value:.1e}" for value in (result.error, result.bound))
    print(LINE.format(word, result.name, error, bound, result.note).rstrip(), flush=True)


def finite(value: object) -> object:
    """JSON knows no infinity: such numbers become text."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value


def main(argv: list[str]) -> int:
    """Exit code of `tip-kernels doctor`: 0 all right, 1 a wrong number, 2 bad arguments, 130 interrupted."""
    try:
        return run(vars(parser().parse_args(argv)))
    except UsageError as error:
        print(f"tip-kernels doctor: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tip-kernels doctor: interrupted", file=sys.stderr)
        return 130
