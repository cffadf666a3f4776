"""LEARN: divergence_loss against float64 autograd through the reference, and what a training loop relies on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import reference as ref
import tip_kernels as tip
from tests._cases import (
    HEADS,
    INF,
    NAN,
    PAIRS,
    STATISTIC_FLOOR,
    HeadCase,
    Products,
    check_gradient,
    head_case,
    leaf,
    near_equal,
    no_worse,
    normal,
    ordinary,
)
from tip_kernels.select.rule import Kept

DIVERGENCES = {
    "forward": (tip.ForwardKL(), ref.forward_kl),
    "reverse": (tip.ReverseKL(), ref.reverse_kl),
    "jeffreys": (tip.Jeffreys(), ref.jeffreys),
    "sum": (
        0.3 * tip.ForwardKL() + tip.ReverseKL() * 2,
        lambda s, t: 0.3 * ref.forward_kl(s, t) + 2 * ref.reverse_kl(s, t),
    ),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
PRECISIONS = (torch.float64, torch.float32)


def keep(*row_ids: int, of: int) -> Kept:
    mask = torch.zeros(of, dtype=torch.bool)
    mask[list(row_ids)] = True
    return Kept(mask, torch.zeros(of))


def through_reference(
    student: HeadCase | Tensor,
    teacher: HeadCase | Tensor,
    value: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor,
    temperature: float | Tensor = 1.0,
) -> list[tuple[Tensor, list[Tensor]]]:
    """Row values and the gradients of sum(weights * value) in the student's leaves, in float64 and in float32.

    A weight of 0 leaves the row out.
    """
    out = []
    for dtype in PRECISIONS:
        if isinstance(student, HeadCase):
            case = student.to(dtype).leaves()
            leaves, z_s = case.tensors, case.logits(temperature)
        else:
            z = leaf(student.to(dtype))
            leaves = [z]
            z_s = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
        if isinstance(teacher, HeadCase):
            z_t = teacher.to(dtype).logits(temperature)
        else:
            z_t = teacher.to(dtype)
            z_t = z_t / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
        values = value(z_s, z_t)
        torch.where(weights != 0, weights.to(dtype) * values, 0.0).sum().backward()
        out.append((values.detach(), [x.grad for x in leaves]))
    return out


def check_logits(s: Tensor, t: Tensor, divergence: str, **options) -> None:
    """Loss and gradient of every row of a pair of logits, rows weighted differently."""
    ours, value = DIVERGENCES[divergence]
    weights = torch.linspace(0.5, 2.0, s.shape[0])
    student = leaf(s)
    loss = tip.divergence_loss(student, t, divergence=ours, **options)
    finite = loss.detach().isfinite()
    torch.where(finite, weights * loss, 0.0).sum().backward()
    truth, eager = through_reference(s, t, value, weights * finite, options.get("temperature", 1.0))
    no_worse(
        loss.detach(), eager[0], truth[0], "loss", max(1, sum(factor for factor, _ in ours.terms)) * STATISTIC_FLOOR
    )
    largest = s[s.isfinite()].abs().amax().item()
    row_weight = 2.0 * sum(factor for factor, _ in ours.terms)
    check_gradient(student.grad, eager[1][0], truth[1][0], "logits", largest_logit=largest, row_weight=row_weight)


# Against the truth


@every_divergence
@pytest.mark.parametrize("case", PAIRS)
def test_gradients_of_logits_are_no_worse_than_eager_fp32(case, divergence):
    check_logits(*PAIRS[case](8, 1500), divergence)


@every_divergence
@pytest.mark.parametrize("vocab", [1, 2, 3, 127, 1025, 32001])
def test_gradients_over_vocabularies_of_any_size(vocab, divergence):
    check_logits(*ordinary(3, vocab), divergence)


@pytest.mark.parametrize("temperature", [0.5, 3, torch.linspace(0.4, 3.0, 8)], ids=["half", "three", "per row"])
@every_divergence
def test_gradients_at_a_temperature(divergence, temperature):
    check_logits(*ordinary(8, 1300), divergence, temperature=temperature)


@pytest.mark.parametrize("options", HEADS)
@every_divergence
def test_gradients_of_every_leaf_of_a_head_are_no_worse_than_eager_fp32(divergence, options):
    ours, value = DIVERGENCES[divergence]
    student = head_case(20, 1300, 48, seed=20, **HEADS[options])
    teacher_options = {"bias": HEADS[options]["bias"]} if options == "bias that bans" else {}
    teacher = head_case(20, student.vocab_size or 1300, 80, seed=30, **teacher_options)
    weights = torch.linspace(0.5, 2.0, 20)
    case = student.leaves()
    loss = tip.divergence_loss(case.head, teacher.head, divergence=ours)
    (weights * loss).sum().backward()
    truth, eager = through_reference(student, teacher, value, weights)
    no_worse(loss.detach(), eager[0], truth[0], "loss")
    for name, x, eager_grad, grad in zip(("hidden", "weight", "bias"), case.tensors, eager[1], truth[1], strict=False):
        check_gradient(x.grad, eager_grad, grad, name)
        if name != "hidden" and student.vocab_size:
            assert torch.equal(x.grad[student.vocab_size :], torch.zeros_like(x[student.vocab_size :])), name


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_gradients_at_a_temperature_per_row_with_a_softcap(shape):
    tau = torch.linspace(0.4, 3.0, 12)
    student, teacher = head_case(12, 1300, 48, seed=20, softcap=7.0), head_case(12, 1300, 80, seed=30, scale=0.5)
    case = student.leaves()
    head, other = (
        tip.Head(c.hidden.view(*shape, -1), c.weight, softcap=c.softcap, scale=c.scale) for c in (case, teacher)
    )
    loss = tip.divergence_loss(head, other, temperature=tau.view(shape))
    assert loss.shape == (12,)
    loss.sum().backward()
    truth, eager = through_reference(student, teacher, ref.reverse_kl, torch.ones(12), tau)
    no_worse(loss.detach(), eager[0], truth[0], "loss")
    for x, eager_grad, grad in zip(case.tensors, eager[1], truth[1], strict=True):
        check_gradient(x.grad, eager_grad, grad, "head")


def near_convergence(dtype: torch.dtype) -> tuple[HeadCase, HeadCase]:
    """bf16 values, held in dtype: a teacher that is the student with a noisy head, at a KL of about 0.02."""
    student = head_case(24, 3000, 64, seed=20, spread=3.0).to(torch.bfloat16)
    noise = 0.2 * 64**-0.5 * normal(3000, 64, seed=22)
    teacher = HeadCase(student.hidden, (student.weight.float() + noise).to(torch.bfloat16))
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)], ids=["before", "after"])
@every_divergence
def test_gradients_near_convergence_before_and_after_rounding_to_bf16(divergence, dtype, bound):
    ours, value = DIVERGENCES[divergence]
    student, teacher = near_convergence(dtype)
    (values, truth), _ = through_reference(student, teacher, value, torch.ones(24))
    if divergence == "reverse":
        assert 0.015 < values.mean() < 0.025
    case = student.leaves()
    tip.divergence_loss(case.head, teacher.head, divergence=ours).sum().backward()
    for x, grad in zip(case.tensors, truth, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - grad).norm() / grad.norm() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_logits_come_in_their_dtype(dtype):
    s, t = (z.to(dtype) for z in ordinary(8, 1300))
    student = leaf(s)
    loss = tip.divergence_loss(student, t)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    (_, (truth,)), _ = through_reference(s, t, ref.reverse_kl, torch.ones(8))
    assert student.grad.dtype == dtype
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    tiny = torch.finfo(dtype).smallest_normal  # where float16's steps stop shrinking
    assert ((student.grad.double() - truth).abs() <= step * truth.abs() + step * tiny + 1e-6).all()


def test_rows_of_logits_that_saturate_keep_small_errors():
    s, t = torch.zeros(4, 2000), torch.zeros(4, 2000)
    rows = torch.arange(4)
    s[rows, rows], t[rows, rows + 1] = torch.tensor([40.0, 80, 150, 300]), torch.tensor([40.0, 80, 150, 300])
    for divergence in DIVERGENCES:
        check_logits(s, t, divergence)


@every_divergence
@pytest.mark.parametrize("shift", [0, 20, -120])
def test_gradients_of_logits_near_convergence_do_not_feel_a_shift(divergence, shift):
    """The same target without the floor: a shift of the logits, which no divergence sees, must not cost digits."""
    ours, value = DIVERGENCES[divergence]
    s, t = ((z + shift).bfloat16() for z in near_equal(16, 3000, kl=0.02))
    student = leaf(s.float())
    tip.divergence_loss(student, t, divergence=ours).sum().backward()
    truth, eager = through_reference(s, t, value, torch.ones(16))
    check_gradient(student.grad, eager[1][0], truth[1][0], "logits")


@every_divergence
def test_every_row_of_a_logit_gradient_sums_to_zero(divergence):
    s, t = near_equal(8, 1500)
    ours, value = DIVERGENCES[divergence]
    student = leaf(s)
    tip.divergence_loss(student, t, divergence=ours).sum().backward()
    _, (_, (eager,)) = through_reference(s, t, value, torch.ones(8))
    ours_sum, eager_sum = (grad.double().sum(1).abs().amax() for grad in (student.grad, eager))
    assert ours_sum <= max(2 * eager_sum, 1e-6)  # of terms whose probabilities sum to 1


# Which rows


@every_divergence
@pytest.mark.parametrize("source", ["logits", "head"])
def test_only_kept_rows_have_a_loss_and_a_gradient(source, divergence):
    ours, value = DIVERGENCES[divergence]
    rows, weights = [1, 4, 5, 11], torch.zeros(12)
    weights[rows] = 1.0
    if source == "logits":
        student, teacher = ordinary(12, 1300)
        one, leaves = leaf(student), None
        leaves = [one]
    else:
        student, teacher = head_case(12, 1300, 48, seed=20), head_case(12, 1300, 80, seed=30)
        case = student.leaves()
        one, leaves = case.head, case.tensors
    other = teacher if source == "logits" else teacher.head
    loss = tip.divergence_loss(one, other, divergence=ours, kept=keep(*rows, of=12))
    assert loss.shape == (4,)
    loss.sum().backward()
    truth, eager = through_reference(student, teacher, value, weights)
    no_worse(loss.detach(), eager[0][rows], truth[0][rows], "loss")
    for x, eager_grad, grad in zip(leaves, eager[1], truth[1], strict=True):
        check_gradient(x.grad, eager_grad, grad, source)
    rest = [i for i in range(12) if i not in rows]
    assert not leaves[0].grad[rest].any()


def test_rows_that_are_not_kept_are_not_read():
    student, teacher = head_case(6, 300, 16, seed=20), head_case(6, 300, 24, seed=30)
    student.hidden[2], teacher.hidden[4] = NAN, INF
    case = student.leaves()
    tip.divergence_loss(case.head, teacher.head, kept=keep(0, 1, 5, of=6)).sum().backward()
    assert all(x.grad.isfinite().all() for x in case.tensors)


@pytest.mark.parametrize("source", ["logits", "head"])
@pytest.mark.parametrize("how", ["no rows", "nothing kept"])
def test_without_rows_there_is_an_empty_loss_and_a_zero_gradient(how, source):
    n = 0 if how == "no rows" else 3
    student, teacher = head_case(n, 50, 8, seed=20, bias=normal(50, seed=1)), head_case(n, 50, 12, seed=30)
    if source == "head":
        case = student.leaves()
        one, other, leaves = case.head, teacher.head, case.tensors
    else:
        one, other = leaf(student.logits()), teacher.logits()
        leaves = [one]
    loss = tip.divergence_loss(one, other, kept=None if n == 0 else keep(of=3))
    assert loss.shape == (0,)
    loss.sum().backward()
    for x in leaves:
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_row_weights_multiply_each_rows_loss():
    s, t = ordinary(6, 200)
    weights, kept = torch.arange(6.0), keep(0, 2, 5, of=6)
    plain, weighted = (tip.divergence_loss(s, t, kept=kept, row_weights=w) for w in (None, weights))
    assert torch.equal(weighted, plain * torch.tensor([0.0, 2.0, 5.0]))
    b, c = s.view(2, 3, 200), t.view(2, 3, 200)
    assert torch.equal(tip.divergence_loss(b, c, kept=kept, row_weights=weights.view(2, 3)), weighted)
    student = leaf(s)
    tip.divergence_loss(student, t, row_weights=weights).sum().backward()
    truth, eager = through_reference(s, t, ref.reverse_kl, weights)
    check_gradient(student.grad, eager[1][0], truth[1][0], "logits", largest_logit=15, row_weight=5.0)
    assert not student.grad[0].any()


# Statistics that are already there


@every_divergence
def test_statistics_at_hand_are_not_measured_again(divergence):
    student, teacher = head_case(12, 1300, 48, seed=20), head_case(12, 1300, 80, seed=30)
    ours = DIVERGENCES[divergence][0]
    stats = tip.token_stats(student.head, teacher.head)
    kept = keep(0, 3, 7, of=12)
    with Products() as products:
        reused = tip.divergence_loss(student.head, teacher.head, divergence=ours, kept=kept, stats=stats)
    assert products.macs == 0
    fresh = tip.divergence_loss(student.head, teacher.head, divergence=ours, kept=kept)
    no_worse(reused, fresh, fresh.double(), "loss")


TEMPERATURES = {
    "another number": (1.0, 2.0),
    "per row, measured at a number": (2.0, torch.full((6,), 2.0)),
    "a number, measured per row": (torch.full((6,), 2.0), 2.0),
    "another per row": (torch.linspace(1, 2, 6), torch.linspace(1, 3, 6)),
    "the same number": (2.0, 2.0),
    "the same per row": (torch.linspace(1, 2, 6), torch.linspace(1, 2, 6)),
}


@pytest.mark.parametrize("case", TEMPERATURES)
def test_statistics_from_another_temperature_are_measured_again(case):
    measured_at, learned_at = TEMPERATURES[case]
    s, t = ordinary(6, 300)
    stats = tip.token_stats(s, t, temperature=measured_at)
    student, other = leaf(s), leaf(s)
    loss = tip.divergence_loss(student, t, stats=stats, temperature=learned_at)
    expected = tip.divergence_loss(other, t, temperature=learned_at)
    no_worse(loss.detach(), expected.detach(), expected.detach().double(), "loss")
    loss.sum().backward()
    expected.sum().backward()
    check_gradient(student.grad, other.grad, other.grad.double(), "logits")


def test_statistics_without_a_teacher_are_measured_again():
    s, t = ordinary(6, 300)
    loss = tip.divergence_loss(s, t, stats=tip.token_stats(s))
    expected = tip.divergence_loss(s, t)
    no_worse(loss, expected, expected.double(), "loss")


def test_changing_stats_or_temperature_afterwards_changes_nothing():
    s, t = ordinary(6, 300)
    tau = torch.full((6,), 2.0)
    student, other = leaf(s), leaf(s)
    stats = tip.token_stats(s, t, temperature=tau)
    weights = torch.ones(6)
    loss = tip.divergence_loss(student, t, stats=stats, temperature=tau, row_weights=None)
    stats.kl_rev.fill_(NAN)
    stats._get("shift_s").fill_(NAN)
    tau.fill_(9.0)
    (weights * loss).sum().backward()
    tip.divergence_loss(other, t, temperature=2.0).sum().backward()
    check_gradient(student.grad, other.grad, other.grad.double(), "logits")


# What autograd expects


@pytest.mark.parametrize("source", ["logits", "head"])
def test_backward_may_run_twice_over_a_retained_graph_and_gradients_add_up(source):
    student, teacher = head_case(12, 1300, 48, seed=20), head_case(12, 1300, 80, seed=30)
    once, twice, split = student.leaves(), student.leaves(), student.leaves()

    def loss_of(case: HeadCase, kept: Kept | None = None) -> tuple[Tensor, list[Tensor]]:
        if source == "head":
            return tip.divergence_loss(case.head, teacher.head, kept=kept).sum(), case.tensors
        z = leaf(case.logits())
        return tip.divergence_loss(z, teacher.logits(), kept=kept).sum(), [z]

    loss, leaves = loss_of(once)
    loss.backward()
    loss2, leaves2 = loss_of(twice)
    loss2.backward(retain_graph=True)
    loss2.backward()
    for x, y in zip(leaves, leaves2, strict=True):
        assert torch.equal(2 * x.grad, y.grad)
    if source == "head":  # two calls on halves of the rows
        for kept in (keep(*range(5), of=12), keep(*range(5, 12), of=12)):
            loss_of(split, kept)[0].backward()
        for x, y in zip(leaves, split.tensors, strict=True):
            check_gradient(y.grad, x.grad, x.grad.double(), "two calls")
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_backward_touches_grad():
    student, teacher = head_case(6, 300, 16, seed=20).leaves(), head_case(6, 300, 24, seed=30).leaves()
    loss = tip.divergence_loss(student.head, teacher.head)
    assert all(x.grad is None for x in student.tensors)
    grads = torch.autograd.grad(loss.sum(), student.tensors)
    assert all(x.grad is None for x in student.tensors + teacher.tensors)
    tip.divergence_loss(student.head, teacher.head).sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(student.tensors, grads, strict=True))
    assert all(x.grad is None for x in teacher.tensors)  # the teacher is a constant


@pytest.mark.parametrize(
    "frozen, units", [((), 4), (("weight", "bias"), 3), (("hidden",), 3), (("hidden", "weight"), 2)]
)
def test_a_frozen_leaf_gets_no_gradient_and_costs_no_product(frozen, units):
    case = head_case(6, 1300, 32, seed=20, bias=normal(1300, seed=3)).leaves()
    teacher = head_case(6, 1300, 32, seed=30)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    stats = tip.token_stats(case.head, teacher.head)
    loss = tip.divergence_loss(case.head, teacher.head, stats=stats)
    with Products() as products:
        loss.sum().backward()
    assert products.macs == units * 6 * 1300 * 32
    full = head_case(6, 1300, 32, seed=20, bias=normal(1300, seed=3)).leaves()
    tip.divergence_loss(full.head, teacher.head).sum().backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(case, name).grad
        assert (grad is None) == (name in frozen)
        if name not in frozen:
            check_gradient(grad, getattr(full, name).grad, getattr(full, name).grad.double(), name)


def test_without_grad_there_is_no_graph():
    s, t = ordinary(6, 300)
    assert not tip.divergence_loss(s, t).requires_grad
    with torch.no_grad():
        loss = tip.divergence_loss(leaf(s), t)
    assert loss.grad_fn is None
    no_worse(loss, ref.reverse_kl(s, t), ref.reverse_kl(s.double(), t.double()), "loss")


def test_a_teacher_from_inference_mode_is_as_good_as_any():
    s, t = ordinary(6, 300)
    case, expected = leaf(s), leaf(s)
    tip.divergence_loss(expected, t).sum().backward()
    with torch.inference_mode():
        teacher = t.clone()
    tip.divergence_loss(case, teacher).sum().backward()
    assert torch.equal(case.grad, expected.grad)


@pytest.mark.parametrize("source", ["logits", "head"])
def test_double_backward_is_refused(source):
    case, teacher = head_case(4, 60, 8, seed=20).leaves(), head_case(4, 60, 8, seed=30)
    one = case.head if source == "head" else leaf(case.logits())
    wrt = case.hidden if source == "head" else one
    loss = tip.divergence_loss(one, teacher.head).square().sum()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (grad,) = torch.autograd.grad(loss, wrt, create_graph=True)
        torch.autograd.grad(grad.square().sum(), wrt)


def test_a_gradient_penalty_is_refused_rather_than_taken_for_a_constant():
    s, t = ordinary(4, 60)
    student = leaf(s)
    loss = tip.divergence_loss(student, t).sum()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize(
    "what", ["hidden", "weight", "bias", "teacher hidden", "teacher weight", "logits", "teacher logits"]
)
def test_a_source_changed_in_place_before_backward_is_refused(what):
    case, teacher = head_case(4, 60, 8, seed=20, bias=normal(60, seed=1)).leaves(), head_case(4, 60, 8, seed=30)
    z_s, z_t = leaf(case.logits()), teacher.logits()
    if "logits" in what:
        loss = tip.divergence_loss(z_s, z_t)
        changed = z_t if what.startswith("teacher") else z_s
    else:
        loss = tip.divergence_loss(case.head, teacher.head)
        owner = teacher if what.startswith("teacher") else case
        changed = getattr(owner, what.removeprefix("teacher "))
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_learning_changes_no_input():
    case, teacher = head_case(6, 300, 16, seed=20, bias=normal(300, seed=1)).leaves(), head_case(6, 300, 24, seed=30)
    s, t = leaf(case.logits()), teacher.logits()
    tau, weights, kept = torch.full((6,), 1.5), torch.ones(6), keep(0, 2, 3, of=6)
    inputs = [*case.tensors, *teacher.tensors, s, t, tau, weights, kept.mask]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    for one, other in ((case.head, teacher.head), (s, t), (case.head, t)):
        stats = tip.token_stats(one, other, temperature=tau)
        options = {"kept": kept, "row_weights": weights, "temperature": tau}
        tip.divergence_loss(one, other, stats=stats, **options).sum().backward()
        tip.divergence_loss(one, other, **options).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


@pytest.mark.parametrize("layout", ["row stride above V", "column-major", "batch cut in time"])
def test_strided_logits_get_the_gradient_of_contiguous_ones(layout):
    s, t = ordinary(12, 500)
    base = {
        "row stride above V": normal(12, 513, seed=1),
        "column-major": normal(500, 12, seed=1),
        "batch cut in time": normal(3, 5, 500, seed=1),
    }[layout]
    view = {"row stride above V": lambda x: x[:, :500], "column-major": lambda x: x.t()}.get(
        layout, lambda x: x[:, :-1]
    )
    with torch.no_grad():
        view(base).copy_(s.view(view(base).shape))
    base.requires_grad_()
    tip.divergence_loss(view(base), t.view(view(base).shape)).sum().backward()
    plain = leaf(s)
    tip.divergence_loss(plain, t).sum().backward()
    assert torch.equal(view(base.grad).reshape(12, 500), plain.grad)
    assert torch.count_nonzero(base.grad) == torch.count_nonzero(plain.grad)


def test_a_strided_head_gets_the_gradient_of_a_contiguous_one():
    student, teacher = head_case(12, 500, 32, seed=20), head_case(12, 500, 32, seed=30)
    plain = student.leaves()
    tip.divergence_loss(plain.head, teacher.head).sum().backward()
    hidden, weight = torch.zeros(3, 5, 32), student.weight.t().contiguous()
    hidden[:, 1:] = student.hidden.view(3, 4, 32)
    hidden.requires_grad_(), weight.requires_grad_()
    head = tip.Head(hidden[:, 1:], weight.t())
    tip.divergence_loss(head, tip.Head(teacher.hidden.view(3, 4, 32), teacher.weight)).sum().backward()
    check_gradient(hidden.grad[:, 1:].reshape(12, 32), plain.hidden.grad, plain.hidden.grad.double(), "hidden")
    check_gradient(weight.grad.t(), plain.weight.grad, plain.weight.grad.double(), "weight")
    assert not hidden.grad[:, 0].any()


# Where the gradient of logits goes


def test_a_compact_gradient_holds_the_kept_rows_alone():
    s, t = ordinary(12, 1300)
    dense, compact, kept = leaf(s), leaf(s), keep(1, 4, 11, of=12)
    tip.divergence_loss(dense, t, kept=kept).sum().backward()
    tip.divergence_loss(compact, t, kept=kept, grad_logits="compact").sum().backward()
    assert compact.grad.is_sparse
    assert compact.grad.coalesce().indices().tolist() == [[1, 4, 11]]
    assert compact.grad.coalesce().values().shape == (3, 1300)
    assert torch.equal(compact.grad.to_dense(), dense.grad)


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_an_inplace_gradient_takes_the_logits_storage_and_runs_once(shape):
    student, teacher = head_case(12, 1300, 32, seed=20), head_case(12, 1300, 32, seed=30)
    plain, other, kept = student.leaves(), student.leaves(), keep(1, 4, 11, of=12)

    def logits(case: HeadCase) -> Tensor:
        return (case.hidden @ case.weight.T).view(*shape, 1300)

    tip.divergence_loss(logits(plain), teacher.logits().view(*shape, 1300), kept=kept).sum().backward()
    z = logits(other)
    loss = tip.divergence_loss(z, teacher.logits().view(*shape, 1300), kept=kept, grad_logits="inplace")
    loss.sum().backward(retain_graph=True)
    for x, y in zip(plain.tensors, other.tensors, strict=True):
        assert torch.equal(x.grad, y.grad)
    rows = z.detach().view(12, 1300).abs().sum(1) > 0
    assert torch.equal(rows, kept.mask)  # the gradient, 0 in rows that were not kept
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["rows", "batch"])
def test_an_inplace_gradient_of_a_leaf_takes_its_storage_too(shape):
    z, t = (3 * normal(*shape, 50_000, seed=i) for i in (1, 2))
    plain, student = leaf(z), leaf(z)
    tip.divergence_loss(plain, t).sum().backward()
    loss = tip.divergence_loss(student, t, grad_logits="inplace", workspace_mib=1).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        loss.backward()
    sizes = [event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) < z.numel() * 4 / 2
    assert torch.equal(student.grad, plain.grad)
    assert student.grad.data_ptr() == student.data_ptr()


# Rows without a finite loss


@pytest.mark.parametrize("source", ["logits", "head"])
def test_a_clipped_infinite_row_keeps_the_limit_and_has_gradient_zero(source):
    s, t = ordinary(5, 300)
    t[2, 5] = -INF
    student, weight = leaf(s), torch.eye(300, requires_grad=True)
    one, leaves = (student, [student]) if source == "logits" else (tip.Head(student, weight), [student, weight])
    loss = tip.divergence_loss(one, t, divergence=tip.ReverseKL().clipped(30.0))
    assert loss[2] == 30
    loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (student.grad.abs().sum(1) > 0).tolist() == [True, True, False, True, True]


@every_divergence
@pytest.mark.parametrize("source", ["logits", "head"])
@pytest.mark.parametrize("upstream", ["zero", "one"])
def test_a_row_without_a_finite_loss_has_gradient_zero_and_spoils_no_other(upstream, source, divergence):
    """R9. Row 2 is infinite (only one model bans token 5), rows 3 and 4 are NaN in the student or the teacher."""
    ours, value = DIVERGENCES[divergence]
    s, t = ordinary(7, 1300)
    s[2, 5], t[2, 6], s[3, 9], t[4, 9] = -INF, -INF, NAN, NAN
    student = leaf(s)
    one, leaves = student, [student]
    if source == "head":  # rows of an identity: these very logits
        weight = torch.eye(1300, requires_grad=True)
        hidden = leaf(s.masked_fill(~s.isfinite(), -1e31))  # -inf * 0 would be NaN in a product
        with torch.no_grad():
            hidden[3] = NAN
        one, leaves = tip.Head(hidden, weight), [hidden, weight]
    loss = tip.divergence_loss(one, t, divergence=ours)
    assert loss.isposinf().tolist() == [False, False, True, False, False, False, False]
    assert loss.isnan().tolist() == [False, False, False, True, True, False, False]
    bad = torch.tensor([2, 3, 4])
    (torch.where(loss.isfinite(), loss, 0.0) if upstream == "zero" else loss).sum().backward()
    assert not leaves[0].grad[bad].any()
    assert all(x.grad.isfinite().all() for x in leaves)
    truth, eager = through_reference(s, t, value, torch.tensor([1.0, 1, 0, 0, 0, 1, 1]))
    check_gradient(leaves[0].grad, eager[1][0], truth[1][0], "rows", largest_logit=15, row_weight=1.0)


def test_a_zero_upstream_gradient_leaves_its_row_out_of_the_sweep():
    case, teacher = head_case(10, 1300, 32, seed=20).leaves(), head_case(10, 1300, 32, seed=30)
    loss = tip.divergence_loss(case.head, teacher.head)
    upstream = torch.zeros(10)
    upstream[[2, 7]] = 1.0
    with Products() as products:
        loss.backward(upstream)
    assert products.macs <= 4 * 2 * 1300 * 32
    assert not case.hidden.grad[[0, 1, 3, 4, 5, 6, 8, 9]].any()


# Workspace and precision modes


@every_divergence
@pytest.mark.parametrize("source", ["logits", "head"])
def test_a_tiny_workspace_gives_the_same_gradients(source, divergence):
    ours, value = DIVERGENCES[divergence]
    student, teacher = head_case(300, 1300, 384, seed=20), head_case(300, 1300, 256, seed=30)
    truth, eager = through_reference(student, teacher, value, torch.ones(300))
    if source == "logits":
        z_s, z_t = student.logits(), teacher.logits()
        truth, eager = through_reference(z_s, z_t, value, torch.ones(300))
    for workspace_mib in (1, 512):
        case = student.leaves()
        one, leaves = (case.head, case.tensors) if source == "head" else (leaf(student.logits()), [])
        other = teacher.head if source == "head" else z_t
        loss = tip.divergence_loss(one, other, divergence=ours, workspace_mib=workspace_mib)
        loss.sum().backward()
        no_worse(loss.detach(), eager[0], truth[0], "loss")
        for x, eager_grad, grad in zip(leaves or [one], eager[1], truth[1], strict=True):
            check_gradient(x.grad, eager_grad, grad, f"{workspace_mib} MiB")


def test_autocast_projects_in_its_dtype_and_gradients_keep_the_leaves():
    student, teacher = head_case(12, 1300, 48, seed=20, bias=normal(1300, seed=40)), head_case(12, 1300, 80, seed=30)
    rounded = [case.to(torch.bfloat16).to(torch.float32) for case in (student, teacher)]
    truth, eager = through_reference(*rounded, ref.reverse_kl, torch.ones(12))
    case = student.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tip.divergence_loss(case.head, teacher.head)
    assert loss.dtype == torch.float32
    no_worse(loss.detach(), eager[0], truth[0], "loss")
    loss.sum().backward()
    for x, eager_grad, grad in zip(case.tensors, eager[1], truth[1], strict=True):
        assert x.grad.dtype == torch.float32
        check_gradient(x.grad, eager_grad, grad, "autocast")
    again = student.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # backward under autocast, too
        tip.divergence_loss(again.head, teacher.head).sum().backward()
    assert torch.equal(again.weight.grad, case.weight.grad)


def test_backward_in_autocast_does_not_round_what_the_forward_did_not():
    student, teacher = head_case(12, 1300, 48, seed=20), head_case(12, 1300, 80, seed=30)
    plain, other = student.leaves(), student.leaves()
    tip.divergence_loss(plain.head, teacher.head).sum().backward()
    loss = tip.divergence_loss(other.head, teacher.head).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert torch.equal(plain.weight.grad, other.weight.grad)


def test_one_step_of_descent_lowers_the_loss():
    student, teacher = head_case(40, 300, 32, seed=20).leaves(), head_case(40, 300, 32, seed=30)
    first = tip.divergence_loss(student.head, teacher.head).mean()
    first.backward()
    with torch.no_grad():
        size = math.sqrt(sum(x.grad.square().sum().item() for x in student.tensors))
        for x in student.tensors:
            x -= 0.01 / size * x.grad
        second = tip.divergence_loss(student.head, teacher.head).mean()
    assert second.item() == pytest.approx(first.item() - 0.01 * size, rel=1e-3)
