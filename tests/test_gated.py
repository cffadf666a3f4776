"""Sums of divergences whose coefficients are of each row, against float64 autograd of the reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import reference as ref
import tip_kernels as tip
from tests._cases import INF, NAN, PAIRS, STATISTIC_FLOOR, check_gradient, distill, head_case, leaf, no_worse, normal
from tests.test_divergences import FAMILY
from tip_kernels.distillation import one_sweep
from tip_kernels.select.rule import Kept

N, V, K = 24, 61, 4
BACKENDS = ["eager", "triton"]
ROWS = {"eager": N, "triton": 7}  # by the interpreter
ROLLOUTS = torch.tensor([7, -2, 7])[torch.arange(N) % 3]


class Fixed:
    """A gate that is known, and says that it reads a statistic."""

    def __init__(self, gate: Tensor, needs: frozenset[str] = frozenset({"entropy_t"})) -> None:
        self.gate, self.needs, self.calls = gate, needs, []

    def __call__(self, stats: tip.TokenStats, row_mask: Tensor | None, rollout_ids: Tensor | None) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append((stats, row_mask, rollout_ids))
        return self.gate


def ramp(n: int, low: float = 0.0, high: float = 1.5) -> Tensor:
    """From low to high, every third 0."""
    return torch.linspace(low, high, n) * (torch.arange(n) % 3 != 1)


SUMS: dict[str, list[str]] = {
    "one pass": ["reverse", "forward"],
    "two passes": ["jsd", "todi", "tvd"],
    "sums in a sum": ["jeffreys", "sum", "renyi 2"],
    "powers": ["alpha-beta", "skew forward", "skew reverse", "hellinger"],
}


def gates_for(names: list[str], n: int) -> dict[str, Tensor]:
    gates = {name: ramp(n).roll(i) for i, name in enumerate(names)}
    gates[names[0]] = gates[names[0]] + 0.5 * (torch.arange(n) % 5 != 2)
    return gates


def ours_of(names: list[str], gates: dict[str, Tensor]) -> tip.Gated:
    return tip.Gated({FAMILY[name][0]: gates[name] for name in names})


def value_of(z_s: Tensor, z_t: Tensor, gates: dict[str, Tensor]) -> Tensor:
    broken = ref.broken_rows(z_s) | ref.broken_rows(z_t)
    return ref.gated([FAMILY[name][1](z_s, z_t) for name in gates], list(gates.values()), broken)


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    with tip.backend(backend), np.errstate(all="ignore"):  # the interpreter is numpy
        yield


def truth_and_eager(value: Callable[[Tensor, Tensor], Tensor], s: Tensor, t: Tensor, upstream: Tensor) -> list:
    """(values, d(sum upstream * value)/ds over the finite ones), in float64 and float32."""
    out = []
    for dtype in (torch.float64, torch.float32):
        z = leaf(s.to(dtype))
        values = value(z, t.to(dtype))
        values.backward(torch.where(values.isfinite(), upstream.to(dtype), 0.0))
        out.append((values.detach(), z.grad))
    return out


# Against the truth


@pytest.mark.parametrize("names", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_sum_in_float64(backend, case, names):
    n, v = (4, 130) if backend == "triton" else (8, 1100)
    s, t = PAIRS[case](n, v)
    gates, upstream = gates_for(names, n), torch.linspace(0.5, 2, n)
    student = leaf(s)
    with on(backend):
        loss = tip.divergence_loss(student, t, divergence=ours_of(names, gates))
        loss.backward(torch.where(loss.detach().isfinite(), upstream, 0.0))
    truth, eager = truth_and_eager(lambda a, b: value_of(a, b, gates), s, t, upstream)
    scale = 10 * len(names)  # alpha-beta divides by 0.14
    no_worse(loss.detach(), eager[0], truth[0], "loss", scale * STATISTIC_FLOOR)
    largest = s[s.isfinite()].abs().amax().item()
    check_gradient(student.grad, eager[1], truth[1], "logits", largest_logit=largest, row_weight=2 * scale)


@pytest.mark.parametrize("names", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_a_head_are_those_of_the_sum_in_float64(backend, softcap, names):
    n = ROWS[backend]
    case, teacher = head_case(n, V, 8, 3, softcap=softcap, scale=1.5, spread=3.0), head_case(n, V, 12, 4)
    gates, student = gates_for(names, n), head_case(n, V, 8, 3, softcap=softcap, scale=1.5, spread=3.0).leaves()
    tau = torch.linspace(0.6, 2, n)
    with on(backend):
        tip.divergence_loss(
            student.head, teacher.head, divergence=ours_of(names, gates), temperature=tau
        ).sum().backward()
    both = []
    for dtype in (torch.float64, torch.float32):
        copy = case.to(dtype).leaves()
        value_of(copy.logits(tau.to(dtype)), teacher.to(dtype).logits(tau.to(dtype)), gates).sum().backward()
        both.append([x.grad for x in copy.tensors])
    for ours, truth, eager, what in zip(student.tensors, *both, ("hidden", "weight"), strict=True):
        check_gradient(ours.grad, eager, truth, what)


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_a_list_of_tokens_it_is_the_sum_of_their_divergences(backend, tail):
    n = ROWS[backend]
    s, z = normal(n, V, seed=1), normal(n, V, seed=2)
    logp, ids = z.log_softmax(1).topk(K)
    gates = {tip.ReverseKL(): ramp(n), tip.ForwardKL(): ramp(n).flip(0), tip.HellingerSq(): torch.ones(n)}
    values = [ref.topk_reverse_kl, ref.topk_forward_kl, ref.topk_hellinger_sq]
    broken = torch.zeros(n, dtype=torch.bool)
    student, upstream = leaf(s), torch.linspace(0.5, 2, n)
    with on(backend):
        loss = tip.divergence_loss(student, tip.TopK(ids, logp, tail), divergence=tip.Gated(gates))
        loss.backward(upstream)
    truth, eager = truth_and_eager(
        lambda a, b: ref.gated([f(a, ids, b, tail) for f in values], list(gates.values()), broken), s, logp, upstream
    )
    no_worse(loss.detach(), eager[0], truth[0], "loss", 3 * STATISTIC_FLOOR)
    check_gradient(student.grad, eager[1], truth[1], "logits", row_weight=6.0)


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalize"])
def test_beside_a_list_a_gate_of_0_leaves_out_what_is_infinite(tail):
    s, z = normal(N, V, seed=1), normal(N, V, seed=2)
    logp, ids = z.log_softmax(1).topk(K)
    s[torch.arange(N), ids[:, 0]] = -INF  # every forward KL is infinite
    student, gate = leaf(s), (torch.arange(N) % 2).float()
    divergence = tip.Gated({tip.HellingerSq(): 1.0, tip.ForwardKL(): gate})
    loss = tip.divergence_loss(student, tip.TopK(ids, logp, tail), divergence=divergence)
    assert torch.equal(loss.isinf(), gate.bool())
    loss[gate == 0].sum().backward()
    plain = leaf(s)
    alone = tip.divergence_loss(plain, tip.TopK(ids, logp, tail), divergence=tip.HellingerSq())[gate == 0]
    alone.sum().backward()
    torch.testing.assert_close(loss[gate == 0], alone)
    torch.testing.assert_close(student.grad, plain.grad)


# What is left out, dropped, or capped


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_of_0_leaves_its_divergence_out_even_infinite_or_without_a_label(backend):
    n = ROWS[backend]
    s, t = 3 * normal(n, V, seed=1), 3 * normal(n, V, seed=2)
    s[:, 5] = -INF  # forward KL and Renyi are infinite, TVD is not
    s[:2, 7], t[:2, 7] = -200.0, 8.0  # a power of the ratio overflows
    s[3], t[4] = NAN, NAN  # NaN rows stay NaN
    labels, gate = torch.full((n,), -100), torch.zeros(n)
    student, plain = leaf(s), leaf(s)
    divergence = tip.Gated(
        {tip.TVD(): 1.0, tip.ForwardKL(): gate, tip.Renyi(3.0): 0, tip.SampledReverseKL(): gate.bool()}
    )
    with on(backend):
        stats = tip.token_stats(s, t, labels=labels)
        loss = tip.divergence_loss(student, t, divergence=divergence, stats=stats)
        alone = tip.divergence_loss(plain, t, divergence=tip.TVD(), stats=stats)
        for x in (loss, alone):
            x.nan_to_num(0.0).sum().backward()
    assert loss[[3, 4]].isnan().all() and loss.isnan().sum() == 2
    torch.testing.assert_close(loss, alone, equal_nan=True)
    torch.testing.assert_close(student.grad, plain.grad)
    none = tip.divergence_loss(s, t, divergence=tip.Gated({tip.TVD(): 0}))
    assert torch.equal(none.isnan(), loss.isnan()) and none.nan_to_num(0.0).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_kept_row_whose_gate_is_not_finite_is_dropped_counted_and_warned_of(bad, backend):
    n = ROWS[backend]
    s, t = normal(n, V, seed=1), normal(n, V, seed=2)
    gate = torch.ones(n).index_fill(0, torch.tensor([2, 5]), bad)
    student, plain = leaf(s), leaf(s)
    with on(backend):
        with pytest.warns(RuntimeWarning, match="NaN or infinite loss or weight"):
            out = tip.distill(
                student, t, select=tip.KeepAll(), divergence=tip.Gated({tip.ReverseKL(): Fixed(gate), tip.JSD(): 0.5})
            )
        out.loss.backward()
        right = 1.0 * tip.ReverseKL() + 0.5 * tip.JSD()
        others = tip.distill(plain, t, select=tip.KeepAll(), divergence=right, row_mask=gate.isfinite())
        others.loss.backward()
    assert int(out.plan.dropped_rows) == 2
    torch.testing.assert_close(out.loss, others.loss)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-5, atol=1e-9)


def test_a_cap_is_one_of_the_sum():
    s, t = 3 * normal(N, V, seed=1), 3 * normal(N, V, seed=2)
    gates, student, upstream = gates_for(["reverse", "jsd"], N), leaf(s), torch.linspace(0.5, 2, N)
    divergence = ours_of(["reverse", "jsd"], gates).clipped(2.0)
    loss = tip.divergence_loss(student, t, divergence=divergence)
    loss.backward(upstream)
    assert (loss == 2.0).any() and (loss < 2.0).any()

    def value(a: Tensor, b: Tensor) -> Tensor:
        sums = value_of(a, b, gates)
        return torch.where(sums > 2.0, torch.full_like(sums, 2.0), sums)

    truth, eager = truth_and_eager(value, s, t, upstream)
    no_worse(loss.detach(), eager[0], truth[0], "loss")
    check_gradient(student.grad, eager[1], truth[1], "logits", row_weight=2.0)


# distill


RULES = {"all rows": tip.KeepAll(), "a quota": tip.SoftOr(0.5), "student's": tip.TopEntropy(0.5)}


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(one_sweep, "ROWS", {"cpu": (1, 5)})


def models() -> tuple:
    return head_case(N, V, 8, 3), head_case(N, V, 12, 4)


def learned(divergence: tip.Divergence, upstream: float = 1.0, **options) -> tuple[tip.Distilled, list[Tensor]]:
    case, teacher = models()
    student = case.leaves()
    out = distill(student.head, teacher.head, divergence=divergence, **options)
    (upstream * out.loss).backward()
    return out, [x.grad for x in student.tensors]


@pytest.mark.parametrize("names", [["reverse", "forward"], ["jsd", "todi", "forward"]], ids=" and ".join)
@pytest.mark.parametrize("sweeps", [1, 2, None])
@pytest.mark.parametrize("select", RULES)
def test_distill_is_the_mean_of_the_sum_in_one_sweep_as_in_two(short_blocks, select, sweeps, names):
    mask = torch.arange(N) % 7 != 3
    gates = gates_for(names, N)
    on = {"row_mask": mask, "rollout_ids": ROLLOUTS, "select": RULES[select], "sweeps": sweeps}
    out, grads = learned(ours_of(names, gates), upstream=-2.5, **on)
    assert out.plan.strategy.startswith("one sweep" if sweeps == 1 or (select == "all rows" and not sweeps) else "two")
    case, teacher = models()
    kept, both = out.kept.mask, []
    for dtype in (torch.float64, torch.float32):
        copy = case.to(dtype).leaves()
        loss = value_of(copy.logits(), teacher.to(dtype).logits(), gates)[kept].mean()
        (-2.5 * loss).backward()
        both.append((loss.detach(), [x.grad for x in copy.tensors]))
    torch.testing.assert_close(out.loss.double(), both[0][0], rtol=1e-5, atol=0)
    for ours, truth, eager in zip(grads, both[0][1], both[1][1], strict=True):
        check_gradient(ours, eager, truth, "leaf")


@pytest.mark.parametrize("select", RULES)
def test_a_gate_that_reads_statistics_takes_two_sweeps_and_gets_what_a_weight_gets(select):
    mask, gate = torch.arange(N) % 7 != 3, Fixed(ramp(N))
    on = {"row_mask": mask, "rollout_ids": ROLLOUTS, "select": RULES[select]}
    divergence = tip.Gated({tip.ReverseKL(): 1.0, tip.Jeffreys(): gate})
    out, grads = learned(divergence, **on)
    ((stats, row_mask, rollouts),) = gate.calls  # once, though Jeffreys is two terms
    assert torch.equal(row_mask, mask) and torch.equal(rollouts, ROLLOUTS) and stats.entropy_t.shape == (N,)
    assert out.plan.strategy.startswith("two sweeps")
    early, right = learned(tip.Gated({tip.ReverseKL(): 1.0, tip.Jeffreys(): gate.gate}), **on)
    torch.testing.assert_close(out.loss, early.loss)
    for ours, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"^sweeps: expected 2 or None.* gates that read no statistics"):
        learned(divergence, sweeps=1, **on)


def test_only_what_the_gates_need_is_measured():
    out, _ = learned(tip.Gated({tip.JSD(): Fixed(ramp(N), frozenset({"entropy_s"}))}), select=tip.KeepAll(), sweeps=2)
    assert "entropy_s" in out.stats._measured and "hellinger_sq" not in out.stats._measured
    out, _ = learned(tip.Gated({tip.JSD(): lambda stats, *_: stats.hellinger_sq}), select=tip.KeepAll())
    assert {"entropy_s", "entropy_t", "kl_fwd", "hellinger_sq"} <= set(out.stats._measured)
    out, _ = learned(tip.Gated({tip.JSD(): tip.weights.DriftDecay(top_k=K)}), select=tip.TopEntropy(0.5))
    assert "mass_t_on_top_s" in out.stats._measured and out.stats._top_k == K


def test_a_weight_that_reads_no_list_leaves_the_rules_k_alone():
    reads_kl = tip.weights.DriftDecay(2.0, by="kl_rev", top_k=9)
    out, _ = learned(tip.Gated({tip.ReverseKL(): reads_kl}), select=tip.Teachability(0.5, top_k=K))
    assert out.stats._top_k == K


def test_label_losses_temperatures_and_weights_come_on_top():
    labels, tau, w = torch.arange(N) * 7 % V, torch.linspace(0.5, 2, N), torch.linspace(0, 2, N)
    gates = gates_for(["reverse", "jsd"], N)
    on = {"labels": labels, "ce_weight": 0.3, "temperature": tau, "temperature_sq": True, "row_weights": w}
    case, teacher = models()
    both = []
    for dtype in (torch.float64, torch.float32):
        copy = case.to(dtype).leaves()
        z = copy.logits()
        values = value_of(z / tau.to(dtype)[:, None], teacher.to(dtype).logits(tau.to(dtype)), gates)
        ce = -z.log_softmax(1).gather(1, labels[:, None])[:, 0]
        loss = (w.to(dtype) * (0.7 * tau.to(dtype) ** 2 * values + 0.3 * ce)).sum() / w.to(dtype).sum()
        loss.backward()
        both.append((loss.detach(), [x.grad for x in copy.tensors]))
    for sweeps in (1, 2):
        out, grads = learned(ours_of(["reverse", "jsd"], gates), select=tip.KeepAll(), sweeps=sweeps, **on)
        torch.testing.assert_close(out.loss.double(), both[0][0], rtol=1e-5, atol=0)
        for ours, truth, eager in zip(grads, both[0][1], both[1][1], strict=True):
            check_gradient(ours, eager, truth, "leaf")
    out, grads = learned(ours_of(["reverse", "jsd"], gates), select=tip.KeepAll(), **on | {"ce_weight": 1.0})
    alone, right = learned(tip.ReverseKL(), select=tip.KeepAll(), **on | {"ce_weight": 1.0})
    torch.testing.assert_close(out.loss, alone.loss)
    for ours, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_token_gets_its_gated_push(backend):
    n = ROWS[backend]
    labels, s, t = torch.arange(n) * 7 % V, normal(n, V, seed=1), normal(n, V, seed=2)
    gate, student = ramp(n), leaf(s)
    with on(backend):
        stats = tip.token_stats(s, t, labels=labels)
        divergence = tip.Gated({tip.SampledReverseKL(): gate, tip.ForwardKL(): 0.5})
        tip.divergence_loss(student, t, divergence=divergence, stats=stats).sum().backward()
    broken = torch.zeros(n, dtype=torch.bool)
    truth, eager = truth_and_eager(
        lambda a, b: ref.gated(
            [ref.sampled_reverse_kl(a, b, labels), ref.forward_kl(a, b)], [gate, torch.full((n,), 0.5)], broken
        ),
        s, t, torch.ones(n),
    )  # fmt: skip
    check_gradient(student.grad, eager[1], truth[1], "logits", row_weight=2.0)


def test_labels_on_all_rows_are_beside_the_gated_divergence_of_kept_ones():
    labels, gate = torch.arange(N) * 7 % V, Fixed(ramp(N))
    on = {"labels": labels, "ce_weight": 0.5, "ce_rows": "all", "select": tip.SoftOr(0.5)}
    case, teacher = models()
    ours = tip.distill(case.head, teacher.head, divergence=tip.Gated({tip.ReverseKL(): gate}), **on)
    right = tip.distill(case.head, teacher.head, divergence=tip.Gated({tip.ReverseKL(): gate.gate}), **on)
    torch.testing.assert_close(ours.loss, right.loss)


def test_under_adakd_gates_read_statistics_at_temperature_1():
    gate = Fixed(ramp(N))
    case, teacher = models()
    options = tip.adakd(0.6)
    tip.distill(case.head, teacher.head, divergence=tip.Gated({tip.ReverseKL(): gate}), **options)
    ((stats, _, _),) = gate.calls
    torch.testing.assert_close(stats.entropy_t, tip.token_stats(case.head, teacher.head).entropy_t)


def test_a_second_backward_through_one_sweep_is_gated_too(short_blocks):
    case, teacher = models()
    student, divergence = case.leaves(), ours_of(["reverse", "forward"], gates_for(["reverse", "forward"], N))
    out = distill(student.head, teacher.head, divergence=divergence, select=tip.SoftOr(0.5), sweeps=1)
    first = torch.autograd.grad(out.loss, student.tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.loss, student.tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_gates_get_no_gradient():
    gate = torch.ones(N, requires_grad=True)
    s = leaf(normal(N, V, seed=1))
    divergence = tip.Gated({tip.ReverseKL(): gate, tip.ForwardKL(): Fixed(gate * 2)})
    t = normal(N, V, seed=2)
    listed = tip.TopK(*reversed(t.log_softmax(1).topk(K)), "ignore")
    for teacher in (t, listed):
        tip.distill(s, teacher, divergence=divergence).loss.backward()
        assert gate.grad is None and s.grad.isfinite().all()


# divergence_loss


def test_divergence_loss_measures_all_rows_for_its_gates_and_takes_given_statistics_as_they_are():
    s, t = 2 * normal(N, V, seed=1), 2 * normal(N, V, seed=2)
    stats, weigh = tip.token_stats(s, t, top_k=K), tip.weights.TeacherConfidence()  # compares rows
    kept = Kept(torch.arange(N) % 2 == 0, torch.zeros(N))
    for gate in (weigh, lambda stats, *_: stats.kl_fwd, tip.weights.DriftDecay(0.3, top_k=K)):
        fixed = gate(stats, None, None)
        divergence = tip.Gated({tip.ReverseKL(): gate, tip.JSD(): 1.0})
        right = tip.divergence_loss(s, t, divergence=tip.Gated({tip.ReverseKL(): fixed, tip.JSD(): 1.0}), kept=kept)
        for given in (None, stats):
            ours = tip.divergence_loss(s, t, divergence=divergence, kept=kept, stats=given)
            torch.testing.assert_close(ours, right)
    by_place = tip.Gated({tip.JSD(): tip.weights.PositionDecay(4.0)})
    right = tip.divergence_loss(s, t, divergence=tip.JSD()) * 0.5 ** (torch.arange(N) / 4)
    torch.testing.assert_close(tip.divergence_loss(s, t, divergence=by_place), right)


def test_gates_of_masked_rows_and_rollouts_are_given_to_divergence_loss_as_numbers():
    s, t, mask = normal(N, V, seed=1), normal(N, V, seed=2), torch.arange(N) % 7 != 3
    divergence = tip.Gated({tip.JSD(): tip.weights.PositionDecay(2.0), tip.TVD(): 0.5}).clipped(0.2)
    stats = tip.token_stats(s, t)
    kept = tip.KeepAll()(stats, mask)
    loss = tip.divergence_loss(s, t, divergence=divergence.at(stats, mask, ROLLOUTS), kept=kept, stats=stats)
    out = tip.distill(
        s, t, divergence=divergence, select=tip.KeepAll(), row_mask=mask, rollout_ids=ROLLOUTS, normalizer=1
    )
    torch.testing.assert_close(loss.sum(), out.loss)


def test_a_divergence_made_elsewhere_is_gated_too():
    class Half(tip.TVD):
        def value(self, row):
            return 0.5 * super().value(row)

        def gradient(self, lp_s, lp_t, rows):
            return super().gradient(lp_s, lp_t, rows).mul_(0.5)

    s, t, gate = normal(N, V, seed=1), normal(N, V, seed=2), ramp(N)
    for backend in BACKENDS:
        ours, right = leaf(s), leaf(s)
        with on(backend):
            tip.divergence_loss(ours, t, divergence=tip.Gated({Half(): gate, tip.ForwardKL(): 1})).sum().backward()
            plain = tip.Gated({tip.TVD(): 0.5 * gate, tip.ForwardKL(): 1})
            tip.divergence_loss(right, t, divergence=plain).sum().backward()
        torch.testing.assert_close(ours.grad, right.grad)


def test_a_gate_of_every_kind_and_shape_is_the_same_number():
    s, t = normal(2, N // 2, V, seed=1), normal(2, N // 2, V, seed=2)
    right = 0.5 * tip.divergence_loss(s, t, divergence=tip.ForwardKL())
    half = torch.full((N,), 0.5)
    for gate in (0.5, torch.tensor(0.5), half, half.view(2, -1), half.bfloat16(), lambda *_: half.view(2, -1)):
        torch.testing.assert_close(tip.divergence_loss(s, t, divergence=tip.Gated({tip.ForwardKL(): gate})), right)
    ones = torch.ones(N, dtype=torch.bool)
    torch.testing.assert_close(tip.divergence_loss(s, t, divergence=tip.Gated({tip.ForwardKL(): ones})), 2 * right)


def test_no_rows_have_no_loss():
    for gate in (1.0, lambda stats, *_: stats.entropy_t):
        out = tip.distill(leaf(torch.zeros(0, V)), torch.zeros(0, V), divergence=tip.Gated({tip.ReverseKL(): gate}))
        assert out.loss == 0 and out.loss.requires_grad


# Presets


def test_eopd_adds_the_forward_kl_where_the_teacher_is_unsure():
    s, t = 2 * normal(N, V, seed=1), torch.linspace(0.1, 8, N)[:, None] * normal(N, V, seed=2)
    z_s, z_t = s.double(), t.double()
    entropy = -(z_t.softmax(1) * z_t.log_softmax(1)).sum(1)
    unsure = (entropy > 0.8).double()
    assert 0 < unsure.sum() < N
    right = ref.reverse_kl(z_s, z_t) + 2 * unsure * ref.forward_kl(z_s, z_t)
    out = tip.distill(s, t, select=tip.KeepAll(), divergence=tip.Gated.eopd(weight=2.0))
    torch.testing.assert_close(out.loss.double(), right.mean(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"^threshold: expected a finite number"):
        tip.Gated.eopd(NAN)
    with pytest.raises(ValueError, match=r"^weight: expected a finite number above 0"):
        tip.Gated.eopd(weight=0)


# torch.compile


@pytest.mark.parametrize("kind", ["distill", "divergence_loss"])
def test_a_number_changes_from_step_to_step_without_compiling_again(kind):
    counter = CompileCounterWithBackend("aot_eager")
    t, mask = normal(N, V, seed=2), torch.ones(N, dtype=torch.bool)

    def step(s: Tensor, divergence: tip.Divergence) -> Tensor:
        if kind == "distill":
            return tip.distill(s, t, select=tip.SoftOr(0.5), divergence=divergence, row_mask=mask).loss
        return tip.divergence_loss(s, t, divergence=divergence).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for part in (0.0, 0.25, 0.6, 1):
        divergence = tip.Gated({tip.ForwardKL(): 1 - part, tip.ReverseKL(): part, tip.JSD(): 0.5})
        ours, theirs = leaf(normal(N, V, seed=1)), leaf(normal(N, V, seed=1))
        loss, right = compiled(ours, divergence), step(theirs, divergence)
        loss.backward(), right.backward()
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert counter.frame_count == 1


def test_gates_of_statistics_are_compiled_in():
    t = normal(N, V, seed=2)
    divergence = tip.Gated({tip.ReverseKL(): lambda stats, *_: stats.entropy_t > 3.7, tip.TVD(): tip.weights.Indicator(
        "kl_rev", above=0.5
    )})  # fmt: skip

    def step(s: Tensor) -> Tensor:
        out = tip.distill(s, t, select=tip.TopEntropy(0.5), divergence=divergence).loss
        return out + tip.divergence_loss(s, t, divergence=divergence).mean()

    ours, theirs = leaf(normal(N, V, seed=1)), leaf(normal(N, V, seed=1))
    torch.compile(step, fullgraph=True, backend="aot_eager")(ours).backward()
    step(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# Bad input


REFUSED = {
    "nothing": ({}, r"a dict \{divergence: gate\} of at least one, got dict"),
    "no dict": ([tip.ReverseKL()], r"a dict \{divergence: gate\} of at least one, got list"),
    "no divergence": ({"reverse_kl": 1.0}, r"divergences such as tip_kernels.ReverseKL\(\) as keys, got str"),
    "clipped": ({tip.ReverseKL().clipped(1.0): 1.0}, "divergences that are not clipped and hold no gates, got"),
    "nested": ({tip.Gated({tip.TVD(): 1.0}): 1.0}, "divergences that are not clipped and hold no gates, got Gated"),
    "a negative number": ({tip.TVD(): -0.5}, "numbers of at least 0, got float -0.5"),
    "a NaN": ({tip.TVD(): NAN}, "a finite number, got float nan"),
    "True": ({tip.TVD(): True}, "a finite number, got bool True"),
    "text": ({tip.TVD(): "entropy"}, "a finite number, got str"),
    "integers": ({tip.TVD(): torch.ones(N, dtype=torch.int64)}, "float or bool tensors, got a tensor"),
    "unknown needs": (
        {tip.TVD(): Fixed(ramp(N), frozenset({"entropy"}))},
        "a callable whose needs are a set of statistics .*, got frozenset",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_sum_with_gates_is_refused_when_it_is_made(what):
    gates, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"^gates: expected {message}"):
        tip.Gated(gates)


RETURNED = {
    "too few rows": (ramp(N - 1), r"a float32 or bfloat16 or float16 or bool tensor of shape \(24,\), got a tensor"),
    "a column": (ramp(N).unsqueeze(1), r"a float32 or .* of shape \(24,\), got a tensor of shape \(24, 1\)"),
    "integers": (torch.ones(N, dtype=torch.int64), r"a float32 or .*, got a tensor of shape \(24,\), torch.int64"),
    "float64": (ramp(N).double(), r"a float32 or .*, got a tensor of shape \(24,\), torch.float64"),
    "a number": (1.0, r"a float32 or .*, got float 1.0"),
    "on no device": (torch.empty(N, device="meta"), "a tensor on cpu, got a tensor"),
}


@pytest.mark.parametrize("call", [tip.distill, tip.divergence_loss])
@pytest.mark.parametrize("what", RETURNED)
def test_what_a_gate_returns_is_checked(what, call):
    returned, message = RETURNED[what]
    with pytest.raises(ValueError, match=f"^gates: expected {message}"):
        call(normal(N, V, seed=1), normal(N, V, seed=2), divergence=tip.Gated({tip.TVD(): Fixed(returned)}))


def test_a_gated_sum_adds_to_no_other_and_takes_no_factor():
    gated = tip.Gated({tip.TVD(): 1.0})
    for sum_of in (lambda: gated + tip.TVD(), lambda: tip.TVD() + gated):
        with pytest.raises(ValueError, match=r"^divergence: a Gated cannot be a part of a sum"):
            sum_of()
    with pytest.raises(ValueError, match=r"^divergence: a Gated cannot be scaled"):
        2.0 * gated
    with pytest.raises(ValueError, match=r"^max_per_row: expected a finite number above 0"):
        gated.clipped(0)


def test_what_a_gate_reads_must_be_there():
    s, t = normal(N, V, seed=1), normal(N, V, seed=2)
    sampled = tip.Gated({tip.TVD(): tip.weights.LogRatioSigmoid()})
    with pytest.raises(ValueError, match=r"^labels: expected int64 labels .* LogRatioSigmoid reads them, got None"):
        tip.distill(s, t, divergence=sampled)
    with pytest.raises(ValueError, match=r"^stats: expected token_stats\(..., labels=...\)"):
        tip.divergence_loss(s, t, divergence=sampled)
    with pytest.raises(ValueError, match=r"^stats: LogRatioSigmoid reads logp_s, which was not measured: pass labels"):
        tip.divergence_loss(s, t, divergence=sampled, stats=tip.token_stats(s, t))
    by_list = tip.Gated({tip.TVD(): tip.weights.DriftDecay(top_k=4), tip.JSD(): tip.weights.DriftDecay(top_k=5)})
    with pytest.raises(ValueError, match=r"^divergence: expected the top_k of the rule.* 4, got int 5"):
        tip.distill(s, t, divergence=by_list)
    listed = tip.TopK(*reversed(t.log_softmax(1).topk(K)))
    reads_list = tip.Gated({tip.ReverseKL(): tip.weights.DriftDecay()})
    for call in (tip.distill, tip.divergence_loss):
        with pytest.raises(ValueError, match=r"^divergence: expected .* no logits of the teacher, which is a TopK"):
            call(s, listed, divergence=reads_list)
    assert math.isfinite(tip.distill(s, listed, divergence=tip.Gated.eopd()).loss)
