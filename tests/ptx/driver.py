"""Stands in for Triton's driver of NVIDIA GPUs: launches compile for a target and run here, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from .errors import Fault
from .machine import Kernel

# Capability and bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities).
TARGETS = {"sm_80": (80, 166_912), "sm_90": (90, 232_448), "sm_100": (100, 232_448)}
KERNELS: dict[str, Kernel] = {}  # by their PTX, all that were launched


def install(target: str, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
    """From here on every launch of this process compiles for `target` and runs here; `edit` may change its PTX.

    Nothing is assembled: what a cache would keep as machine code is the PTX. TRITON_CACHE_DIR must therefore be a
    folder of its own. Needs TRITON_INTERPRET=0 before Triton's first import.
    """
    assert not triton.knobs.runtime.interpret, "kernels were imported to be interpreted: set TRITON_INTERPRET=0"
    CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()
    triton.runtime.driver.set_active(Driver(target, edit))


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, target: str, edit: Callable[[str], str]) -> None:
        self.launcher_cls, self.utils = Launcher, Utils(target, edit)
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", TARGETS[self.target][0], 32)


class Utils:
    """Loading of binaries, and limits."""

    def __init__(self, target: str, edit: Callable[[str], str]) -> None:
        self.target, self.edit = target, edit

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[self.target][1], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[object, Kernel, int, int, int]:
        ptx = self.edit(binary.decode())
        if ptx not in KERNELS:
            KERNELS[ptx] = Kernel(ptx, shared)
        return object(), KERNELS[ptx], 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: object) -> None:
        pass


class Launcher:
    """Takes a launch's arguments to the kernel's parameters, as Triton's launcher does in C."""

    def __init__(self, source: object, metadata: object) -> None:
        self.signature = list(source.signature.values())

    def __call__(self, x, y, z, stream, kernel: Kernel, packed, metadata, enter, leave, *arguments) -> None:
        parameters, bits, tensors = kernel.program.parameters, [], []
        given = list(_flat(arguments, self.signature))
        if len(parameters) != len(given) + 2:  # pointers to scratch memory, which no kernel here asks for
            raise Fault(f"{kernel.program.name} has {len(parameters)} parameters for {len(given)} arguments")
        for (value, kind), (name, width) in zip(given, parameters, strict=False):
            if kind[0] == "*":
                tensors.append(value)
            bits.append(_bits(value, kind, width, name))
        kernel.launch((x, y, z), [*bits, 0, 0], tensors)


def _flat(values: tuple, kinds: list) -> Iterator[tuple[object, str]]:
    """Arguments and their types, but for those that the kernel is compiled for; tuples are taken apart."""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(value, list(kind))
        elif kind != "constexpr":
            yield value, kind


def _bits(value: float | Tensor, kind: str, width: str, name: str) -> int:
    """A value as its parameter takes it."""
    if {"fp32": "f32", "i32": "u32", "i64": "u64"}.get(kind, "u64" if kind[0] == "*" else "") != width:
        raise Fault(f"{name} is of type {width}, for an argument of type {kind}")
    if kind[0] == "*":
        return value.data_ptr()
    if kind == "fp32":
        return int(np.float32(value).view(np.uint32))
    bits = int(kind[1:])
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise Fault(f"{name}: {value} does not fit {kind}")
    return value % 2**bits
