"""Meters shared by the benches: peak memory from the allocator's own records, and interleaved times on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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


def peak_above_mib(run: Callable[[], object], device: torch.device | str) -> float:
    """MiB that run() held at its highest point above its start, on a CPU or a GPU. Synchronises."""
    if torch.device(device).type == "cpu":
        return peak_transient_mib(run)[0]
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - start) / 2**20


class Stopwatch:
    """Times of functions on a device, in rounds in which each runs once.

    On a GPU each time is that between two CUDA events. Before the first event the second-level cache is overwritten,
    and the device is kept busy for a millisecond in which the host launches what is timed, as in a training loop.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type != "cpu"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=self.device)

    def once_ms(self, run: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.scratch.zero_()
        torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def rounds_ms(
        self,
        runs: Mapping[str, Callable[[], object]],
        *,
        seconds: float,
        least: int = 5,
        most: int = 50,
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, list[float]]:
        """Times of each, from `least` to `most` rounds, none begun after `seconds` but the least. Synchronises."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + seconds
        for i in range(most):
            if i >= least and time.monotonic() > end:
                break
            for name, run in runs.items():
                before()
                times[name].append(self.once_ms(run))
        return times
