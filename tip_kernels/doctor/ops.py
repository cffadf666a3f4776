"""The self-test of every torch.library op: those that torch.compile puts into a graph, and the Triton kernels.

Each check reaches its op by the public function that uses it. What a kernel is not meant to compute comes from the
tiled torch code, so that a wrong kernel is named and not those after it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tip_kernels.backends.choice import backend
from tip_kernels.doctor import truth
from tip_kernels.doctor.cases import Case, Compared, case
from tip_kernels.doctor.checks import Check, NotHere
from tip_kernels.learn import divergences
from tip_kernels.learn.divergence_loss import divergence_loss
from tip_kernels.measure.token_stats import token_stats

WIDE = 17_011  # tokens: three parts of a row, each a program's, which the kernels merge


def _in_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one graph, run without a compiler."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def _compiled_measure(case: Case) -> Iterator[Compared]:
    _, student, teacher = case.logits.on(case.device)
    ours = _in_graph(lambda z_s, z_t: token_stats(z_s, z_t).kl_rev)(student, teacher)
    found = case.logits.beside(lambda *z: _divergence(case, "ReverseKL", *z))
    yield Compared("kl_rev", ours, *(values[0] for values in found))


def _divergence(case: Case, name: str, z_s: Tensor, z_t: Tensor) -> Tensor:
    return truth.DIVERGENCES[name][1](*case.log_probs(z_s, z_t, temperature=False), case.sampled)


def _compiled_loss(name: str, part: slice, case: Case) -> Iterator[Compared]:
    """The value (part :1) or the gradient (1:) of a divergence in a graph."""
    leaves, student, teacher = case.logits.on(case.device, grad=True)
    divergence = getattr(divergences, name)(*truth.DIVERGENCES[name][0])
    loss = _in_graph(lambda z_s, z_t: divergence_loss(z_s, z_t, divergence=divergence))(student, teacher)
    loss.sum().backward()
    yield from case.logits.compared(loss, leaves, lambda *z: _divergence(case, name, *z))[part]


def _kernel_stats(case: Case) -> Iterator[Compared]:
    _, student, teacher = case.logits.on(case.device)
    with backend("triton"):
        stats = token_stats(student, teacher, margins=True)
    found = []
    for dtype in (torch.float64, torch.float32):
        z_s, z_t = case.logits.logits([x.to(dtype) for x in case.logits.leaves])
        found.append(truth.statistics(z_s, z_t, case.labels, 1))
    right, eager = found
    for name in ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq", "margin_s", "agree"):
        yield Compared(name, getattr(stats, name), right[name], eager[name])


def _kernel_linear(case: Case) -> Iterator[Compared]:
    from tip_kernels.backends.triton.linear_stats import fused_pays, linear_stats

    if case.device.type != "cpu" and not fused_pays(1, 16, torch.float16):
        raise NotHere("another kernel is faster on this device and takes its place")
    head = [[x.to(torch.float16) for x in leaves[:2]] for leaves in (case.head.leaves, case.head.frozen)]
    ours = linear_stats(*(x.to(case.device) for leaves in head for x in leaves))
    found = []
    for dtype in (torch.float64, torch.float32):
        z_s, z_t = (truth.logits(*(x.to(dtype) for x in leaves)) for leaves in head)
        found.append(truth.statistics(z_s, z_t, case.labels, 1))
    right, eager = found
    for name in ("lse_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        yield Compared(name, ours[name], right[name], eager[name])


def _kernel_loss(name: str, part: slice, case: Case, *, grad_logits: str = "dense") -> Iterator[Compared]:
    """The value or the gradient of a divergence by kernels, its statistics by tiled torch."""
    leaves, student, teacher = case.logits.on(case.device, grad=True)
    logits = leaves[0].detach().clone() if grad_logits == "inplace" else None
    with backend("eager"):
        stats = token_stats(student, teacher)
    divergence = getattr(divergences, name)(*truth.DIVERGENCES[name][0])
    with backend("triton"):
        loss = divergence_loss(student, teacher, divergence=divergence, stats=stats, grad_logits=grad_logits)
        loss.sum().backward()
    if logits is not None and torch.equal(leaves[0].detach(), logits):
        raise AssertionError("the gradient was not written into the logits")
    yield from case.logits.compared(loss, leaves, lambda *z: _divergence(case, name, *z))[part]


def _ready_for_kernels(device: torch.device) -> None:
    """Raises NotHere where Triton cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise NotHere("triton is not installed")
    if device.type not in ("cuda", "cpu"):
        raise NotHere(f"Triton has no backend for {device.type}")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotHere("no GPU, and TRITON_INTERPRET is not 1")


def _on_kernels(check: Check, full: Case) -> Iterator[Compared]:
    _ready_for_kernels(full.device)
    if full.device.type != "cpu":
        yield from check(case(full.device, vocab=WIDE))
        return
    try:  # the interpreter is for tests: where it cannot run, nothing that a user runs is wrong
        found = list(check(case(full.device, n_rows=8, vocab=303)))
    except Exception as error:
        raise NotHere(f"Triton's interpreter raised {type(error).__name__}: {str(error).strip()[:200]!r}") from error
    yield from found


VALUE, GRADIENT = slice(0, 1), slice(1, None)
GRAPH: dict[str, Check] = {
    "tip_kernels::measure": _compiled_measure,
    "tip_kernels::sweep_sums": partial(_compiled_loss, "JSD", VALUE),
    "tip_kernels::attach_gradient": partial(_compiled_loss, "ReverseKL", VALUE),
    "tip_kernels::sweep_gradient": partial(_compiled_loss, "ReverseKL", GRADIENT),
}
KERNELS: dict[str, Check] = {
    "tip_kernels::fold_tile": _kernel_stats,
    "tip_kernels::finish_rows": _kernel_stats,
    "tip_kernels::fold_linear": _kernel_linear,
    "tip_kernels::row_sums": partial(_kernel_loss, "JSD", VALUE),
    "tip_kernels::row_grad": partial(_kernel_loss, "ReverseKL", GRADIENT),
    "tip_kernels::row_grad_": partial(_kernel_loss, "ReverseKL", GRADIENT, grad_logits="inplace"),
}
CHECKS: dict[str, Check] = GRAPH | {name: partial(_on_kernels, check) for name, check in KERNELS.items()}
