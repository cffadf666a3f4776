"""What launches share: the target they compile for and how arguments are classed, so that shapes do not recompile.

Each launch is a torch.library op of its own, `tip_kernels::NAME`, which torch.compile and fake tensors take as a whole.
Ops take tensors and numbers; what turns logits into z is six of them, which `map_arguments` makes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor


def target() -> tuple[str, int]:
    """("cuda", 90), ("hip", 0) and so on: what a launch now would compile for; ("", 0) under the interpreter."""
    if triton.knobs.runtime.interpret:
        return "", 0
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch if isinstance(found.arch, int) else 0


def warp() -> int:
    """Lanes of a warp."""
    return 64 if target()[0] == "hip" else 32


def row_alignment(*tiles: Tensor) -> int:
    """8 if every row starts at a multiple of 8 elements, else 1: all of a shape that a kernel is compiled for."""
    return 8 if all(tile.stride(0) % 8 == 0 for tile in tiles) else 1


def softcap_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(factor outside tanh, factor inside), or (scale, None) without a softcap."""
    return (float(scale), None) if softcap is None else (float(softcap), scale / softcap)


def map_arguments(
    temperature: float | Tensor, scale_s: float, softcap_s: float | None, scale_t: float, softcap_t: float | None
) -> tuple[Tensor | None, float, float, float | None, float, float | None]:
    """(temperature's pointer or None, its number, factors of the student, factors of the teacher)."""
    return (
        *temperature_arguments(temperature),
        *softcap_factors(scale_s, softcap_s),
        *softcap_factors(scale_t, softcap_t),
    )


def temperature_arguments(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """(pointer or None, number): an int would be compiled for."""
    return (fp32(temperature), 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def fp32(x: Tensor) -> Tensor:
    """x as the kernels read vectors."""
    return x.float().contiguous()


def aligned(x: Tensor | None) -> Tensor | None:
    """x at a multiple of 16 bytes, for which alone kernels that read a vector of any N are compiled."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


def on_device(x: Tensor) -> AbstractContextManager:
    """Context in which launches go to x's device, as models spread over several GPUs need."""
    return torch.xpu.device_of(x) if x.is_xpu else torch.cuda.device_of(x)
