"""Compiles every kernel, every variant, for every target on a machine without a GPU, and reads what came out.

    python -m bench compile [--targets sm_90 ...] [--only VARIANT ...] [--json FILE] [--save DIR]

The launchers of tip_kernels/backends/triton run on a CPU's tensors, whose pages nobody touches, against a driver that
only compiles, so signatures, alignments and settings are those of real launches. For NVIDIA the machine code is read
with the cuobjdump and nvdisasm of Triton's wheel, for AMD the assembly. Columns (and keys of the JSON rows):

    registers        a thread (VGPRs on AMD)
    spill_bytes      a thread, of registers that did not fit
    stack_bytes      a thread, spills included
    shared_bytes     a program
    limit_bytes      what a program may have of them on the target; a launch that asks for more fails
    instr_per_pair   instructions of the streaming loop for each (student, teacher) pair of logits, or each student
                     logit where there is no teacher; null for a kernel without such a loop
    load_bits        the narrowest global load in that loop
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory (AMD: local data share) that one program may have. For NVIDIA the 163 and 227 KiB a block of
# the CUDA guide's table of compute capabilities, for AMD the 64 KiB of a CDNA 3 compute unit.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
VOCAB = 151_936
NUMBERS = {"renyi": 1, "alpha_beta": 2, "jsd": 1, "skew_forward_kl": 1, "skew_reverse_kl": 2, "todi": 1}  # parameters
ODD = 50_257  # a vocabulary whose rows do not start at multiples of 16 bytes


@dataclass(frozen=True)
class Row:
    kernel: str
    variant: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    limit_bytes: int
    instr_per_pair: float | None
    load_bits: int | None


# ---- what to compile: variant name -> (a call of a launcher, bytes of a pair of logits)


def variants() -> dict[str, tuple[Callable[[], object], int]]:
    """Every variant worth a row; calls launch on tensors that nobody reads."""
    import torch

    from tip_kernels.backends.triton._family import KINDS
    from tip_kernels.backends.triton.linear_stats import linear_stats
    from tip_kernels.backends.triton.row_grad import Label, Term, row_grad
    from tip_kernels.backends.triton.row_stats import row_stats
    from tip_kernels.backends.triton.row_sums import row_sums

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def logits(dtype: torch.dtype, vocab: int = VOCAB) -> torch.Tensor:
        return torch.empty(8, vocab, dtype=dtype)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return logits(bf16), logits(bf16)

    def vector(dtype: torch.dtype = fp32) -> torch.Tensor:
        return torch.empty(8, dtype=dtype)

    def terms(names: str) -> list[Term]:
        return [Term(1.0, name, (0.5,) * NUMBERS.get(name, 0), EveryRow()) for name in names.split("+")]

    class EveryRow(dict):
        def __missing__(self, name: str) -> torch.Tensor:
            return vector()

    def grad(names: str, s: torch.Tensor, t: torch.Tensor, **settings) -> torch.Tensor:
        balance = "softcap_s" not in settings  # as the sweep asks for it
        return row_grad(s, t, vector(), EveryRow(), terms(names), balance=balance, **settings)

    def sums(name: str) -> list[dict[str, torch.Tensor]]:
        return row_sums(*pair(), EveryRow(shift_s=vector()), terms(name))

    jeffreys = "forward_kl+reverse_kl"

    def head(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.empty(n, width, dtype=dtype) for n in (4096, VOCAB))

    def linear(teacher: bool, dtype: torch.dtype, bias: bool = False, **settings) -> dict[str, torch.Tensor]:
        biases = {f"bias_{m}": torch.empty(VOCAB, dtype=dtype) for m in "st"[: 1 + teacher]} if bias else {}
        return linear_stats(*head(2048, dtype), *(head(4096, dtype) if teacher else ()), **biases, **settings)

    rest = {"bias": True, "softcap_s": 30.0, "softcap_t": 30.0}
    heads = {
        "bf16": (bf16, {}),
        "bf16 bias softcap": (bf16, rest),
        "fp32": (fp32, {}),
        "fp32 bias softcap": (fp32, rest),
    }
    class_b = [name for name, (_, _, names) in KINDS.items() if names]
    label = Label(vector(torch.int64), vector())
    cross_entropy = Label(vector(torch.int64), vector(), vector(), vector(), vector())
    capped = {"softcap_s": 30.0, "softcap_t": 30.0}
    return {
        "pair bf16": (lambda: row_stats(*pair()), 4),
        "pair fp16": (lambda: row_stats(logits(fp16), logits(fp16)), 4),
        "pair fp32": (lambda: row_stats(logits(fp32), logits(fp32)), 8),
        "pair bf16/fp32": (lambda: row_stats(logits(bf16), logits(fp32)), 6),
        "pair bf16 margins": (lambda: row_stats(*pair(), margins=True), 4),
        "pair fp32 margins": (lambda: row_stats(logits(fp32), logits(fp32), margins=True), 8),
        "pair bf16 softcap": (lambda: row_stats(*pair(), **capped), 4),
        "pair bf16 softcap margins": (lambda: row_stats(*pair(), margins=True, **capped), 4),
        "pair bf16 row temperature": (lambda: row_stats(*pair(), temperature=vector()), 4),
        "pair bf16 odd stride": (lambda: row_stats(logits(bf16, ODD), logits(bf16, ODD)), 4),
        "student bf16": (lambda: row_stats(logits(bf16)), 2),
        "student fp32": (lambda: row_stats(logits(fp32)), 4),
        "student bf16 margins": (lambda: row_stats(logits(bf16), margins=True), 2),
        "student bf16 softcap": (lambda: row_stats(logits(bf16), softcap_s=30.0), 2),
        "forward_kl bf16": (lambda: grad("forward_kl", *pair()), 4),
        "reverse_kl bf16": (lambda: grad("reverse_kl", *pair()), 4),
        "jeffreys bf16": (lambda: grad(jeffreys, *pair()), 4),
        "jeffreys fp16": (lambda: grad(jeffreys, logits(fp16), logits(fp16)), 4),
        "jeffreys fp32": (lambda: grad(jeffreys, logits(fp32), logits(fp32)), 8),
        "jeffreys fp32 to bf16": (lambda: grad(jeffreys, logits(fp32), logits(fp32), out=logits(bf16)), 8),
        "jeffreys bf16 scattered": (
            lambda: grad(jeffreys, *pair(), row_ids=vector(torch.int64), out=logits(bf16), scatter=True),
            4,
        ),
        "jeffreys bf16 softcap": (lambda: grad(jeffreys, *pair(), **capped), 4),
        "jeffreys bf16 odd stride": (lambda: grad(jeffreys, logits(bf16, ODD), logits(bf16, ODD)), 4),
        "forward_kl + reverse_kl bf16, gated": (
            lambda: row_grad(
                *pair(), vector(), EveryRow(), [t._replace(gate=vector()) for t in terms(jeffreys)], balance=True
            ),
            4,
        ),
        "label_score bf16": (lambda: grad("label_score", *pair(), label=label), 4),
        "reverse_kl bf16 cross-entropy": (lambda: grad("reverse_kl", *pair(), label=cross_entropy), 4),
        **{f"{name} bf16": (partial(grad, name, *pair()), 4) for name in ("hellinger_sq", "renyi", "alpha_beta")},
        **{f"{name} bf16": (partial(grad, name, *pair()), 4) for name in class_b},
        **{f"joint {name}": (partial(linear, True, dtype, **options), 0) for name, (dtype, options) in heads.items()},
        **{f"alone {name}": (partial(linear, False, dtype, **options), 0) for name, (dtype, options) in heads.items()},
        **{f"{name} sums bf16": (partial(sums, name), 4) for name in class_b},
    }


# ---- compiling what a launcher would launch


@contextlib.contextmanager
def compile_only(target: str, compiled: list[tuple[str, object]]) -> Iterator[None]:
    """Inside, every kernel launch compiles for `target` instead and is appended to `compiled` as (kernel, result)."""
    import triton.runtime
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self) -> str:
            return target  # launches are cached by device

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGETS[target])

        def get_current_stream(self, device: str) -> int:
            return 0

    def run(self: JITFunction, *args, warmup: bool, **kwargs) -> object:
        kernel = launch(self, *args, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    drivers = triton.runtime.driver
    launch, active = JITFunction.run, drivers._active
    JITFunction.run = run
    drivers.set_active(Driver())
    try:
        yield
    finally:
        JITFunction.run, drivers._active = launch, active


# ---- reading machine code


@dataclass(frozen=True)
class Loop:
    instructions: int
    load_bits: int
    narrowest: int


def _loops(lines: list[str], label: str, instruction: str, branch: str, load_bits: Callable[[str], int]) -> list[Loop]:
    """Innermost loops of a listing, in its order. The regular expressions each have one group."""
    places, code = {}, []
    for line in lines:
        if found := re.match(label, line):
            places[found[1]] = len(code)
        elif found := re.match(instruction, line):
            code.append(found[1])
    spans = []
    for end, text in enumerate(code):
        found = re.search(branch, text)
        if found and places.get(found[1], end + 1) <= end:
            spans.append((places[found[1]], end + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = []
    for begin, end in inner:
        widths = [bits for bits in map(load_bits, code[begin:end]) if bits]
        loops.append(Loop(end - begin, sum(widths), min(widths, default=0)))
    return loops


def _nvidia_load_bits(text: str) -> int:
    found = re.search(r"\bLDG\.(\S+)", text)
    if not found:
        return 0
    width = re.search(r"\b(128|64|U16|S16|U8|S8)\b", found[1].replace(".", " "))
    return int(width[1].lstrip("US")) if width else 32


def _amd_load_bits(text: str) -> int:
    found = re.match(r"(?:global|flat|buffer)_load_(\w+)", text)
    if not found:
        return 0
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    return sizes.get(found[1], 8 if "byte" in found[1] else 16)


def read_nvidia(cubin: bytes) -> tuple[dict[str, int], list[Loop], str]:
    """(registers, spill, stack), loops and listing of a cubin."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run([tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    stored = [re.search(r"\bSTL(?:\.(128|64))?\b", line) for line in listing.splitlines()]
    spill = sum(int(found[1] or 32) // 8 for found in stored if found)
    loops = _loops(
        listing.splitlines(), r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", r"\bBRA\S*\s.*`\((\.L_x_\d+)\)",
        _nvidia_load_bits,
    )  # fmt: skip
    stats = {
        "registers": used["REG"],
        "spill_bytes": spill,
        "stack_bytes": used["STACK"] + used["LOCAL"],
    }
    return stats, loops, listing


def read_amd(listing: str) -> tuple[dict[str, int], list[Loop], str]:
    """The same of AMD assembly."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", listing)[1])

    loops = _loops(
        listing.splitlines(), r"(\.LBB\d+_\d+):", r"\t([a-z]\w+.*)", r"s_c?branch\S*\s+(\.LBB\d+_\d+)", _amd_load_bits
    )
    stats = {
        "registers": field("vgpr_count"),
        "spill_bytes": 4 * field("vgpr_spill_count"),  # scalar registers spill to lanes of vector registers
        "stack_bytes": field("private_segment_fixed_size"),
    }
    return stats, loops, listing


def measure(kernel: str, variant: str, target: str, compiled: object, pair_bytes: int, save: Path | None) -> Row:
    """One row of the table; with `save`, the binary and its listing are kept there."""
    amd = TARGETS[target][0] == "hip"
    binary = compiled.asm["hsaco" if amd else "cubin"]
    stats, loops, listing = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(binary)
    if save:
        stem = re.sub(r"[^a-z0-9_]+", "-", f"{kernel}-{variant}-{target}".lower())
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{stem}.{'hsaco' if amd else 'cubin'}").write_bytes(binary)
        (save / f"{stem}.{'s' if amd else 'sass'}").write_text(listing)
    streams = kernel in ("fold_kernel", "grad_kernel", "sums_kernel")
    stream = max(loops, key=lambda loop: (loop.load_bits, -loop.instructions), default=None) if streams else None
    pairs = stream.load_bits / (8 * pair_bytes) if stream else 0
    return Row(
        kernel,
        variant,
        target,
        instr_per_pair=round(stream.instructions / pairs, 2) if pairs else None,
        load_bits=stream.narrowest if pairs else None,
        shared_bytes=compiled.metadata.shared,
        limit_bytes=SHARED_LIMITS[target],
        **stats,
    )


def report(targets: list[str], only: list[str] | None = None, save: Path | None = None) -> Iterator[Row]:
    """Rows of every variant, or those named in `only`; each distinct kernel once."""
    for target in targets:
        seen = set()
        for variant, (call, pair_bytes) in variants().items():
            if only and variant not in only:
                continue
            compiled: list[tuple[str, object]] = []
            with compile_only(target, compiled):
                call()
            for kernel, result in compiled:
                if result.hash not in seen:
                    seen.add(result.hash)
                    yield measure(kernel, variant, target, result, pair_bytes, save)


# ---- command


def main(argv: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":  # kernels that were imported to be interpreted cannot be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "bench", "compile", *argv], env=environment).returncode
    parser = argparse.ArgumentParser(prog="python -m bench compile", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--save", type=Path, help="keep binaries and listings in this folder")
    args = parser.parse_args(argv)
    heads = ("regs", "spill", "stack", "shared", "limit")
    print(f"{'kernel':16} {'variant':30} {'target':7} {'{:>7}' * 5} {'instr/pair':>11} {'bits':>5}".format(*heads))
    rows = []
    for row in report(args.targets, args.only, args.save):
        rows.append(asdict(row))
        pair = "-" if row.instr_per_pair is None else f"{row.instr_per_pair:.2f}"
        print(
            f"{row.kernel:16} {row.variant:30} {row.target:7} {row.registers:7}{row.spill_bytes:7}{row.stack_bytes:7}"
            f"{row.shared_bytes:7}{row.limit_bytes:7} {pair:>11} {row.load_bits or '-':>5}",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    spilled = sum(row["spill_bytes"] > 0 or row["stack_bytes"] > 0 for row in rows)
    large = sum(row["shared_bytes"] > row["limit_bytes"] for row in rows)
    print(f"{len(rows)} kernels compiled, {spilled} spill, {large} ask for more shared memory than there is")
    return int(spilled + large > 0)
