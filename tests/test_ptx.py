"""The kernels as they are compiled for NVIDIA GPUs, executed without one (`ptx/`), and what executes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.ptx import arithmetic, driver
from tests.ptx.errors import Fault, Unsupported
from tests.ptx.machine import Kernel
from tests.ptx.planted import PLANTED
from tests.test_kernels import FAR

ROOT = Path(__file__).parents[1]
KERNELS = {"fold_kernel", "finish_kernel", "sums_kernel", "add_parts_kernel", "grad_kernel", "entry_kernel"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", driver.TARGETS if metafunc.config.getoption("--long") else ["sm_90"])


def python(*command: object, **environment: object) -> str:
    """What a Python without a GPU prints; kernels are imported to be compiled unless the environment says otherwise."""
    settings = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = {name: str(value) for name, value in environment.items()}
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


# ---- the package's kernels


def test_compiled_kernels_pass_the_tests_of_the_interpreted_ones(target):
    said = python("-m", "tests.ptx", "--target", target)
    print(said)
    counts = r"(\d+) passed\n\w+, exact: (\d+) kernels, (\d+) variants, (\d+) launches, (\d+) opcodes"
    passed, kernels, variants, _, opcodes = map(int, re.search(counts, said).groups())
    assert set(re.findall(r"^  (\w+): \d+ variants", said, re.M)) == KERNELS and kernels == len(KERNELS)
    assert passed >= 140 and variants >= 70 and opcodes >= 80


def test_compiled_kernels_read_and_write_rows_past_two_to_the_31_elements(tmp_path):
    install = "from tests.ptx import driver\ndriver.install('sm_90')\n"
    assert "far rows agree" in python("-c", install + FAR, TRITON_CACHE_DIR=tmp_path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, dict[str, tuple[str, str]]]:
    """What each fault's sound and faulty forms came to, interpreted and compiled."""
    found = {}
    for way, interpret in (("interpreted", 1), ("compiled", 0)):
        folder = tmp_path_factory.mktemp(way)
        settings = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": folder / "cache"}
        found[way] = json.loads(python("-m", "tests.ptx.planted", folder, **settings).splitlines()[-1])
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_that_the_interpreter_passes_is_caught(planted, name):
    assert planted["interpreted"][name] == ["", ""]
    sound, faulty = planted["compiled"][name]
    assert sound == "" and PLANTED[name].caught in faulty, faulty


# ---- what executes them, on PTX written for the purpose

PTX = """
.target sm_90a
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd0, [kernel_param_0];
	mov.u32 	%r0, %tid.x;
	mov.u32 	%r1, %ctaid.x;
	mul.wide.u32 	%rd1, %r0, 4;
	add.s64 	%rd2, %rd0, %rd1;
{body}
	ret;
}}
"""


def run(body: str, out: torch.Tensor, threads: int = 32, programs: int = 1, shared: int = 0) -> torch.Tensor:
    """out, after a kernel: %r0 is the thread, %r1 the program, %rd2 the address of the thread's entry of out."""
    kernel = Kernel(PTX.format(body=body, threads=threads), shared)
    kernel.launch((programs, 1, 1), [out.data_ptr()], [out])
    return out


def ints(n: int = 32) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


@pytest.mark.parametrize("op", ["tanh.approx.f32", "add.f32", "wgmma.fence.sync.aligned", "ld.global.nc.b32"])
def test_an_unknown_instruction_is_named(op):
    with pytest.raises(Unsupported, match=re.escape(op)):
        run(f"{op} %r2, %r0;", ints())


def test_threads_part_at_a_branch_and_meet_again():
    body = """
        setp.lt.s32 %p0, %r0, 10;
        @%p0 bra $small;
        mov.b32 %r2, 100;
        bra.uni $end;
        $small:
        mov.b32 %r2, 7;
        $end:
        shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
        st.global.b32 [%rd2], {%r3};"""
    assert run(body, ints()).tolist() == [100] * 16 + [7] * 10 + [100] * 6


def test_a_loop_ends_for_each_thread_when_its_own_count_does():
    body = """
        mov.b32 %r2, 0;
        $again:
        add.s32 %r2, %r2, 3;
        setp.lt.s32 %p0, %r2, %r0;
        @%p0 bra $again;
        st.global.b32 [%rd2], {%r2};"""
    assert run(body, ints()).tolist() == [max(3, -(-i // 3) * 3) for i in range(32)]


GUARDED = "setp.lt.s32 %p0, %r0, 3;\n mov.b32 %r2, 5;\n "


def test_a_guard_keeps_the_other_threads_from_what_it_guards():
    assert run(GUARDED + "@%p0 st.global.b32 [%rd2], {%r2};", ints()).tolist() == [5] * 3 + [0] * 29
    assert run(GUARDED + "@!%p0 mov.b32 %r2, 6;\n st.global.b32 [%rd2], {%r2};", ints()).tolist() == [5] * 3 + [6] * 29


FAULTS = {
    "out of bounds, 1 threads": "st.global.b32 [%rd2 + 4], {%r0};",
    "misaligned, for 4 bytes": "st.global.b32 [%rd2 + 2], {%r0};",
    "misaligned, for 8 bytes": "ld.global.v2.b32 {%r2, %r3}, [%rd2];",
    "race: threads store different values": "st.global.b32 [%rd0], {%r0};",
    "an integer is divided by zero": "div.s32 %r2, %r0, %r0;",
    "by a part of a warp": GUARDED + "@%p0 bra $end;\n shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;\n $end:\n",
    "never reach": GUARDED + "@%p0 bra $end;\n bar.sync 0;\n $end:\n bar.sync 0;",
}


@pytest.mark.parametrize("says", FAULTS)
def test_what_a_gpu_does_not_define_is_a_fault(says):
    with pytest.raises(Fault, match=says):
        run(FAULTS[says], ints())


def test_programs_may_share_what_they_only_read():
    load = "ld.global.b32 {%r2}, [%rd0];\n"
    run(load, ints(), programs=2)
    for store in ("st.global.b32 [%rd0], {%r2};", load + "st.global.b32 [%rd2], {%r2};"):
        with pytest.raises(Fault, match="several programs"):
            run(load + store, ints(), programs=2)


def test_warps_need_a_barrier_between_a_store_and_another_warps_load():
    def swap(barrier: str) -> str:
        return f"""
        shl.b32 %r2, %r0, 2;
        st.shared.b32 [%r2], {{%r0}};
        {barrier}
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 {{%r4}}, [%r3];
        st.global.b32 [%rd2], {{%r4}};"""

    assert run(swap("bar.sync 0;"), ints(64), 64, shared=256).tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(Fault, match="several warps"):
        run(swap(""), ints(64), 64, shared=256)
    with pytest.raises(Fault, match="out of bounds"):
        run(swap("bar.sync 0;"), ints(64), 64, shared=252)


def test_shared_memory_is_each_programs_own():
    body = "shl.b32 %r2, %r0, 2;\n st.shared.b32 [%r2], {%r1};\n bar.sync 0;\n ld.shared.b32 {%r3}, [%r2];\n"
    body += "mul.wide.u32 %rd3, %r1, 128;\n add.s64 %rd4, %rd2, %rd3;\n st.global.b32 [%rd4], {%r3};"
    assert run(body, ints(96), programs=3, shared=128).tolist() == [0] * 32 + [1] * 32 + [2] * 32


# ---- arithmetic


def floats(seed: int, low: int = -140, high: int = 120) -> np.ndarray:
    """fp32 numbers of every size."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(4000) * 2.0 ** random.integers(low, high, 4000)).astype(np.float32)


def test_a_multiply_add_is_rounded_once():
    """Against exact fractions, where rounding twice goes wrong among them."""
    a, b, c = floats(1, -60, 60), floats(2, -60, 60), floats(3)
    a[:1000], b[:1000], c[:1000] = 1 + 2.0**-12, 1 + 2.0**-12, np.spacing(floats(4, -60, 1)[:1000]).astype(np.float32)
    a[1000:1200] *= np.float32(2.0**-70)
    ours = arithmetic.fma(a, b, c)
    for x, y, z, r in zip(a, b, c, ours, strict=True):
        truth = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        beside = [np.nextafter(r, np.float32(side)) for side in (-np.inf, np.inf)]
        assert abs(Fraction(float(r)) - truth) <= min(abs(Fraction(float(other)) - truth) for other in beside)


def test_subnormal_numbers_are_flushed_and_nothing_else():
    x = np.array([2.0**-126, -(2.0**-127), 2.0**-149, 0.0, -0.0, np.inf, -1.0], np.float32)
    assert arithmetic.ftz(x).tolist() == [2.0**-126, 0, 0, 0, 0, np.inf, -1]
    assert np.signbit(arithmetic.ftz(x)).tolist() == [False, True, False, False, True, False, True]
    assert arithmetic.flushed(arithmetic.ex2)(np.array([-126.0, -127.0], np.float32)).tolist() == [2.0**-126, 0]
    assert arithmetic.ex2(np.array([-127.0], np.float32)).tolist() == [2.0**-127]


def test_the_larger_of_two_is_a_number_where_one_is():
    nan, zero = np.float32(np.nan), np.float32(0)
    a, b = np.array([nan, 1, -zero, zero, nan], np.float32), np.array([1, nan, zero, -zero, nan], np.float32)
    assert np.nan_to_num(arithmetic.maximum(a, b), nan=7).tolist() == [1, 1, 0, 0, 7]
    assert np.signbit(arithmetic.maximum(a, b)[2:4]).tolist() == [False, False]
    assert np.signbit(arithmetic.minimum(a, b)[2:4]).tolist() == [True, True]
    assert np.isnan(arithmetic.maximum_nan(a, b)).tolist() == [True, True, False, False, True]


def test_bf16_is_rounded_to_the_nearest():
    x = floats(5)
    ours = (arithmetic.to_bf16(x).astype(np.uint32) << 16).view(np.float32)
    assert torch.equal(torch.from_numpy(ours), torch.from_numpy(x).bfloat16().float())


@pytest.mark.parametrize("mode", ["random", "up", "down"])
def test_an_approximation_errs_by_no_more_than_is_documented_and_by_as_much(monkeypatch, mode):
    monkeypatch.setattr(arithmetic, "mode", mode)
    x = np.linspace(-100, 100, 20_001).astype(np.float32)
    truth = np.exp2(x.astype(np.float64))
    error = (arithmetic.ex2(x) - truth) / np.spacing(truth.astype(np.float32))
    assert np.abs(error).max() <= arithmetic.ULPS["ex2"] and np.abs(error).max() > 1.4
    assert {"up": error.mean() > 1, "down": error.mean() < -1, "random": abs(error.mean()) < 0.1}[mode]
    assert (arithmetic.ex2(x) == arithmetic.ex2(x.copy())).all()  # a fixed function of its operand
