"""Runs the tests of the kernels, and the self-test that a GPU gets first, on compiled code: see `ptx`'s docstring."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import numpy as np
import pytest

from . import arithmetic, driver

FOLDER = Path(__file__).parents[1]
TESTS = [
    FOLDER / "test_kernels.py",
    f"{FOLDER / 'test_bench.py'}::test_the_self_test_of_a_gpu_finds_every_kernel_right",
]
# Tests that are of no use here: of tensor cores, of the interpreter, those that compile in a process of their own, and
# that of far rows, which test_ptx.py runs.
ELSEWHERE = {
    "test_constants_times_tensors_are_tensors_to_this_interpreter",
    "test_linear_stats_is_no_worse_than_eager_fp32",
    "test_linear_stats_takes_any_vocabulary",
    "test_linear_stats_takes_no_rows_and_names_what_does_not_fit",
    "test_rows_past_two_to_the_31_elements_are_read_and_written",
    "test_committed_table_has_no_spill_and_meets_the_targets",
    "test_compiled_kernels_do_not_regress",
    "test_fused_product_uses_hopper_matrix_units_and_bulk_copies",
    "test_sizes_and_temperatures_do_not_recompile",
}


class OnCompiledCode:
    """A pytest plugin: leaves out what runs elsewhere, and counts."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)  # before -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        assert {item.originalname for item in items} >= ELSEWHERE, "a test has another name now"
        items[:] = [i for i in items if i.originalname not in ELSEWHERE and "linear_kernel" not in i.name]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1


def summary(target: str) -> str:
    """What has run: kernels, variants, launches, opcodes, and the share of the instructions that was reached."""
    kernels: dict[str, list[driver.Kernel]] = {}
    opcodes: Counter[str] = Counter()
    for kernel in driver.KERNELS.values():
        kernels.setdefault(kernel.program.name, []).append(kernel)
        opcodes.update(kernel.opcodes())
    lines = [
        f"{target}, {arithmetic.mode}: {len(kernels)} kernels, {len(driver.KERNELS)} variants, "
        f"{sum(kernel.launches for kernel in driver.KERNELS.values())} launches, {len(opcodes)} opcodes"
    ]
    for name, variants in sorted(kernels.items()):
        reached = np.mean([kernel.reached() for kernel in variants])
        lines.append(f"  {name}: {len(variants)} variants, {100 * reached:.0f} % of their instructions")
    return "\n".join([*lines, f"  {' '.join(sorted(opcodes))}"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--target", choices=driver.TARGETS, default="sm_90")
    parser.add_argument("--errors", choices=arithmetic.MODES, default="exact", help="of approximate instructions")
    parser.add_argument("-k", metavar="WORDS", default="", help="tests, as pytest chooses them")
    options = parser.parse_args()
    arithmetic.mode = os.environ["TIP_KERNELS_TEST_ERRORS"] = options.errors
    ran = OnCompiledCode()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        driver.install(options.target)
        quiet = ["-p", "no:cacheprovider", "-p", "no:xdist"]
        code = pytest.main([*map(str, TESTS), "-k", options.k, *quiet], plugins=[ran])
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(ran.outcomes.items())))
    print(summary(options.target))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
