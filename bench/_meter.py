"""Meters shared by the benches: peak memory from the allocator's own records."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_transient_mib(run: Callable[[], object]) -> tuple[float, float]:
    """MiB that run() held at its highest point above its start, and what it still holds at its end.

    On a CPU the profiler reports every allocation and release of torch's allocator in order, so the peak is exact and
    independent of what else the process did. What run returns is kept alive while the end is read.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak / 2**20, held / 2**20
