"""Under torch.compile: no graph break, the results of the uncompiled call, and ops that are what they say.

Graphs are compiled by "aot_eager" but for one, which takes the C++ compiler of inductor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tip_kernels as tip
from tests._cases import distill, leaf, normal
from tip_kernels.backends.triton._family import KINDS
from tip_kernels.backends.triton.linear_stats import linear_stats
from tip_kernels.backends.triton.row_grad import Label, Term, row_grad
from tip_kernels.backends.triton.row_stats import fold_tile, new_state, row_stats
from tip_kernels.backends.triton.row_sums import row_sums
from tip_kernels.learn import gradient_sweep as sweeps
from tip_kernels.learn.ops import KNOWN
from tip_kernels.measure import sweep as measuring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["eager", *(["triton"] if TRITON else [])]
N, V, H = 6, 301, 16
STATS = ("lse_s", "entropy_s", "lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with np.errstate(all="ignore"):  # the interpreter is numpy
        yield


def compiled(function: Callable, backend: str | Callable = "aot_eager") -> Callable:
    return torch.compile(function, fullgraph=True, backend=backend)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def logits(n: int = N, vocab: int = V, seed: int = 1) -> list[Tensor]:
    return [3 * normal(n, vocab, seed=seed).to(DEVICE), 3 * normal(n, vocab, seed=seed + 1).to(DEVICE)]


def heads(n: int = N, vocab: int = V, seed: int = 1) -> list[Tensor]:
    """Student's and teacher's hidden states and weights, of different widths."""
    shapes = ((n, H), (vocab, H), (n, 24), (vocab, 24))
    return [normal(*shape, seed=seed + i).mul(shape[1] ** -0.25).to(DEVICE) for i, shape in enumerate(shapes)]


def sources(kind: str, *tensors: Tensor) -> tuple[object, object]:
    if kind == "logits":
        return tensors
    softcap = 8.0 if kind == "capped head" else None
    return tip.Head(*tensors[:2], softcap=softcap, scale=1.5), tip.Head(*tensors[2:], vocab_size=V)


def inputs(kind: str, n: int = N, seed: int = 1) -> list[Tensor]:
    return logits(n, seed=seed) if kind == "logits" else heads(n, seed=seed)


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    nan = {"nan": 7e33} if ours.is_floating_point() else {}
    return ours.dtype == theirs.dtype and torch.equal(*(x.nan_to_num(**nan) for x in (ours, theirs)))


def learned(function: Callable, tensors: list[Tensor]) -> list[Tensor | None]:
    """What function returns, its first entry reduced, and the gradients of the tensors."""
    leaves = [leaf(x) for x in tensors]
    first, *rest = function(*leaves)
    return [first.detach(), *rest, *torch.autograd.grad(1.5 * first.sum(), leaves, allow_unused=True)]


def hold_equal(function: Callable, *runs: list[Tensor], exact: bool = True) -> None:
    """function and its compiled form agree, values and gradients, on every run: in their bits, or within rounding."""
    fast = compiled(function)
    for tensors in runs:
        ours, theirs = learned(fast, tensors), learned(function, tensors)
        if exact:
            assert [same(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)
        assert any(grad is not None and grad.any() for grad in ours[-len(tensors) :])


# ---- equal results without a graph break


@pytest.mark.parametrize("kind", ["logits", "head", "capped head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_the_uncompiled_call(backend, kind):
    tau = torch.linspace(0.5, 2.0, N, device=DEVICE)
    labels = torch.arange(N, device=DEVICE) * 50 - 100 * (torch.arange(N, device=DEVICE) == 0)

    def alone(*tensors: Tensor) -> tip.TokenStats:
        return tip.token_stats(sources(kind, *tensors)[0], margins=True)

    def joint(*tensors: Tensor) -> tip.TokenStats:
        return tip.token_stats(*sources(kind, *tensors), temperature=1.3)

    def everything(*tensors: Tensor) -> tip.TokenStats:
        return tip.token_stats(*sources(kind, *tensors), labels=labels, temperature=tau, margins=True, top_k=3)

    tensors = inputs(kind)
    tensors[0][2] = torch.nan
    with tip.backend(backend):
        for function in (alone, joint, everything):
            ours, theirs = compiled(function)(*tensors), function(*tensors)
            assert ours._measured.keys() == theirs._measured.keys()
            for name, value in theirs._measured.items():
                assert same(ours._measured[name], value), name
            for name in ("_vocab", "_batch_shape", "_top_k", "_partial"):
                assert getattr(ours, name) == getattr(theirs, name), name


DIVERGENCES = [
    tip.ReverseKL(),
    tip.Renyi(0.5),
    0.5 * tip.ForwardKL() + 2.0 * tip.JSD(0.3),
    tip.SkewReverseKL(detach_mixture=True),
    tip.ReverseKL().clipped(6.0),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", ["logits", "capped head"])
def test_a_loss_and_its_gradients_are_those_of_the_uncompiled_call(kind, divergence):
    def loss(*tensors: Tensor) -> tuple[Tensor]:
        return (tip.divergence_loss(*sources(kind, *tensors), divergence=divergence),)

    hold_equal(loss, inputs(kind))


@pytest.mark.skipif(not TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_a_loss_on_triton_is_that_of_the_uncompiled_call(kind):
    def loss(*tensors: Tensor) -> tuple[Tensor]:
        return (tip.divergence_loss(*sources(kind, *tensors), divergence=tip.Jeffreys() + tip.TVD()),)

    with tip.backend("triton"):
        hold_equal(loss, inputs(kind))


@pytest.mark.parametrize("kind", ["logits", "head"])
def test_measure_select_learn_in_one_graph(kind):
    def loss(*tensors: Tensor) -> tuple[Tensor, ...]:
        student, teacher = sources(kind, *tensors)
        stats = tip.token_stats(student, teacher)
        kept = tip.SoftOr(0.5)(stats)
        return tip.divergence_loss(student, teacher, kept=kept, stats=stats), kept.mask

    hold_equal(loss, inputs(kind))


RULES = [
    tip.SoftOr(0.5),
    tip.TopEntropy(2),
    tip.Overconfident(0.5, "kl_fwd", ("quantile", 0.6), 0.1),
    tip.Threshold("kl_rev", above=0.3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_distill_is_that_of_the_uncompiled_call(rule):
    """A graph keeps a fixed number of slots, an uncompiled call on a CPU the kept rows alone: equal within rounding."""

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = tip.distill(*sources("head", *tensors), select=rule)
        return out.loss, out.kept.mask, out.kept.scores, out.stats.kl_rev, out.plan.kept_rows, out.plan.dropped_rows

    hold_equal(step, inputs("head"), exact=False)


def test_distill_takes_masks_weights_labels_and_temperatures():
    rows = torch.arange(N, device=DEVICE)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = tip.distill(
            *sources("capped head", *tensors), divergence=tip.JSD(), row_mask=rows > 0, rollout_ids=rows // 3,
            labels=rows, ce_weight=0.3, row_weights=1.0 + rows, temperature=0.5 + rows / 4, temperature_sq=True,
        )  # fmt: skip
        return out.loss, out.kept.mask

    hold_equal(step, inputs("capped head"), exact=False)


def test_what_masked_rows_hold_is_no_matter_in_a_graph_either():
    """Its op looks at the labels and temperatures of all rows."""
    rows = torch.arange(N, device=DEVICE)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        mask = torch.arange(N) > 1
        out = tip.distill(
            *sources("head", *tensors), row_mask=mask, labels=torch.where(rows > 1, rows, -7), ce_weight=0.3,
            temperature=torch.where(rows > 1, 2.0, -1.0),
        )  # fmt: skip
        return out.loss, out.kept.mask

    hold_equal(step, inputs("head"), exact=False)


def test_distill_by_adakd_is_that_of_the_uncompiled_call():
    focus = tip.AdaptiveFocus()

    def step(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        out = tip.distill(student, teacher, **tip.adakd(focus))
        return out.loss, out.kept.mask

    hold_equal(step, logits(), exact=False)


def test_a_head_under_autocast_is_that_of_the_uncompiled_call():
    def loss(*tensors: Tensor) -> tuple[Tensor]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return (tip.divergence_loss(*sources("head", *tensors)),)

    hold_equal(loss, inputs("head"))


def test_batches_in_three_dimensions_and_cut_in_time():
    def step(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        out = tip.distill(student[:, :-1], teacher[:, :-1])
        return out.loss, out.kept.mask

    hold_equal(step, [x.view(2, 3, V) for x in logits()], exact=False)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_agrees():
    def loss(*tensors: Tensor) -> Tensor:
        return tip.divergence_loss(*sources("head", *tensors), divergence=tip.ReverseKL() + tip.TVD()).sum()

    grads = []
    for function in (compiled(loss, "inductor"), loss):
        leaves = [leaf(x) for x in inputs("head")]
        value = function(*leaves)
        grads.append([value.detach(), *torch.autograd.grad(value, leaves[:2])])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ---- one graph for many shapes


def test_a_second_number_of_rows_is_not_taken_for_the_first():
    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = tip.distill(*sources("head", *tensors), select=tip.SoftOr(0.4), divergence=tip.JSD())
        return out.loss, out.kept.mask, out.stats.kl_rev, out.plan.kept_rows

    hold_equal(step, *(inputs("head", n, seed=n) for n in (6, 9, 14, 33, 20)), exact=False)
    assert graphs() == 2  # one for 6 rows, one for any number


def test_one_graph_serves_any_vocabulary_and_width():
    def loss(hidden: Tensor, weight: Tensor, hidden_t: Tensor, weight_t: Tensor) -> Tensor:
        return tip.token_stats(tip.Head(hidden, weight), tip.Head(hidden_t, weight_t)).kl_rev

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, vocab in ((6, 300), (7, 301), (9, 50)):
        assert same(fast(*heads(n, vocab)), loss(*heads(n, vocab)))
    assert graphs() == 1


@pytest.mark.skipif(not TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
def test_a_graph_follows_the_backend_and_its_backward_the_forward(monkeypatch):
    ran = []

    def watch(owner: object, name: str) -> None:
        was = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (ran.append(name), was(*args, **kwargs))[1])

    watch(measuring, "TritonMoments")
    watch(measuring, "EagerMoments")
    watch(sweeps.GradientSweep, "_kernel")
    fast = compiled(lambda *tensors: tip.divergence_loss(*sources("head", *tensors)).sum())

    def run(backend: str) -> set[str]:
        ran.clear()
        tensors = [leaf(x) for x in inputs("head")]
        with tip.backend(backend):
            value = fast(*tensors)
        with tip.backend("eager"):
            value.backward()
        return set(ran)

    assert run("eager") == {"EagerMoments"}
    assert run("triton") == {"TritonMoments", "_kernel"}
    assert run("eager") == {"EagerMoments"}


# ---- bad input


def test_values_are_checked_when_the_graph_runs():
    def stats(student: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
        return tip.token_stats(student, labels=labels, temperature=tau).logp_s

    fast, student = compiled(stats), logits()[0].cpu()
    fast(student, torch.zeros(N, dtype=torch.int64), torch.ones(N))
    with pytest.raises(ValueError, match=f"labels: expected values from 0 to {V - 1}, or -100 for none, got 0 to 999"):
        fast(student, torch.arange(N).clamp(max=1) * 999, torch.ones(N))
    with pytest.raises(ValueError, match="temperature: expected finite values above 0"):
        fast(student, torch.zeros(N, dtype=torch.int64), torch.zeros(N))


@pytest.mark.parametrize("mode", ["compact", "inplace"])
def test_a_gradient_that_no_graph_can_hold_is_refused(mode):
    student, teacher = logits()
    with pytest.raises(Exception, match=r"grad_logits: expected 'dense' under torch\.compile"):
        compiled(lambda s: tip.divergence_loss(s, teacher, grad_logits=mode))(leaf(student))


@pytest.mark.parametrize("option", [{"sweeps": 1}, {"backward": True}, {"grad_filter": tip.GradFilter(1e-4)}], ids=str)
def test_what_distill_does_outside_of_a_graph_is_refused(option):
    tensors = [leaf(x) for x in inputs("head")]
    with pytest.raises(Exception, match=rf"{next(iter(option))}: expected .* under torch\.compile"):
        compiled(lambda *t: distill(*sources("head", *t), **option).loss)(*tensors)


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("call", [tip.token_stats, tip.divergence_loss, tip.distill])
def test_a_teacher_that_no_graph_can_hold_is_refused(call, inside):
    ids, logp = torch.arange(3, device=DEVICE).repeat(N, 1), torch.full((N, 3), -2.0, device=DEVICE)
    outside = tip.TopK(ids, logp)
    with pytest.raises(Exception, match=r"teacher: expected logits or a Head under torch\.compile"):
        compiled(lambda s: call(s, tip.TopK(ids, logp) if inside else outside))(leaf(logits()[0]))


def test_a_second_derivative_is_refused():
    student, teacher = (leaf(x) for x in logits())
    loss = compiled(lambda s, t: tip.divergence_loss(s, t).sum(), "eager")(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        grad.sum().backward()


# ---- the ops


class Calls(TorchDispatchMode):
    """Keeps the calls of the package's ops, with copies of what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[tuple[object, tuple, dict]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tip_kernels":
            copies = torch.utils._pytree.tree_map_only(
                Tensor,
                lambda x: x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad),
                args,
            )
            self.found.setdefault(func.name().removeprefix("tip_kernels::"), []).append((func, copies, kwargs or {}))
        return func(*args, **(kwargs or {}))


def kernel_calls(calls: Calls) -> None:
    """Every kernel op, from the functions that make them."""
    for dtype, extra in ((torch.float32, {}), (torch.float16, {"temperature": torch.rand(N) + 0.5, "softcap_s": 5.0})):
        z_s, z_t = (z.cpu().to(dtype) for z in logits())
        stats = row_stats(z_s, z_t, margins=True, **extra)
        row_stats(z_s)
        ids = torch.tensor([4, 0, -1])
        at = {name: value[ids] for name, value in stats.items()}
        at_ids = {name: value[ids] if isinstance(value, Tensor) else value for name, value in extra.items()}
        terms = [Term(0.5, "reverse_kl", (), at), Term(1.0, "jsd", (0.3,), {"kl_s": at["kl_fwd"]})]
        label = Label(torch.tensor([1, 300, -100]), torch.ones(3))
        row_grad(z_s, z_t, torch.ones(3), at, terms, row_ids=ids, label=label, **at_ids)
        row_grad(z_s, z_t, torch.ones(3), at, terms, row_ids=ids, out=z_s.new_zeros(z_s.shape), scatter=True, **at_ids)
        row_sums(z_s, z_t, stats, [Term(1.0, "jsd", (0.3,)), Term(1.0, "tvd")], **extra)
        row_grad(z_s, z_t, torch.ones(3), at, terms, row_ids=ids, out=z_s, scatter=True, **at_ids)
        row_grad(z_t, z_s, torch.ones(N), stats, [Term(1.0, "forward_kl")], out=z_t, **extra)
        h_s, w_s, h_t, w_t = (x.cpu().to(dtype) for x in heads())
        linear_stats(h_s, w_s, h_t, w_t, bias_s=w_s[:, 0].contiguous(), **extra)
        linear_stats(h_s, w_s)
    wide = normal(N, 8192 + 40, seed=3)
    state = new_state(N, wide.shape[1], "cpu", teacher=False)
    fold_tile(state, wide[:, :8192])
    fold_tile(state, wide[:, 8192:], column=8192)


def sweep_calls(calls: Calls) -> None:
    """Every op of the sweeps, from compiled public functions."""

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        def run(*args):
            with calls:
                return graph(*args)

        return run

    rows = torch.arange(N)
    settings = {"labels": rows, "ce_weight": 0.3, "temperature": 0.5 + rows / 4, "divergence": tip.JSD()}
    cases = [("logits", settings), ("capped head", {"divergence": tip.ToDi() + tip.AlphaBeta()}), ("head", settings)]
    for kind, options in cases:
        tensors = [x.cpu() for x in inputs(kind)]
        if kind == "head":
            tensors[0] = normal(H, N, seed=9).t()  # a gradient of other strides than the leaf
        leaves = [leaf(x) for x in tensors]
        loss = compiled(
            lambda *t, kind=kind, options=options: tip.distill(*sources(kind, *t), **options).loss, backend
        )(*leaves)
        with calls:
            loss.backward()
        compiled(lambda *t, kind=kind: tip.token_stats(*sources(kind, *t), top_k=2, margins=True).agree, backend)(
            *tensors
        )


@pytest.fixture(scope="module")
def calls() -> Calls:
    found = Calls()
    with np.errstate(all="ignore"):
        if TRITON and DEVICE == "cpu":
            with found:
                kernel_calls(found)
        sweep_calls(found)
    return found


KERNEL_OPS = ["fold_tile", "finish_rows", "fold_linear", "row_grad", "row_grad_", "row_sums"]
SWEEP_OPS = ["measure", "sweep_sums", "attach_gradient", "sweep_gradient"]


@pytest.mark.parametrize("op", [*SWEEP_OPS, *(KERNEL_OPS if TRITON and DEVICE == "cpu" else [])])
def test_an_op_is_what_it_is_declared_to_be(calls, op):
    """Schema (what is written), autograd, fake kernel, and tracing with symbolic shapes: torch.library.opcheck."""
    assert len(calls.found[op]) >= 2
    for func, args, kwargs in calls.found[op]:
        if op == "sweep_gradient":  # it runs in a backward, and refuses a derivative
            args = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
        torch.library.opcheck(func, args, kwargs)
    if op in ("measure", "sweep_sums", "attach_gradient"):
        tensors = torch.utils._pytree.tree_leaves([args for _, args, _ in calls.found[op]])
        assert any(x.requires_grad for x in tensors if isinstance(x, Tensor))


def test_every_op_is_checked():
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tip_kernels::")
    }
    assert names == {*KERNEL_OPS, *SWEEP_OPS}


def test_sums_are_in_the_order_of_the_kernels():
    assert {name: sums for name, (_, _, sums) in KINDS.items()} == {name: kind.sums for name, kind in KNOWN.items()}
