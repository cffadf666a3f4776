"""What backward may be asked beside: to run at once, to add into a gradient that exists, to leave small tiles out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tip_kernels as tip
from bench._meter import peak_transient_mib
from tests._cases import HeadCase, distill, head_case, leaf, normal

N, V, WIDTH = 48, 3000, 32
RULES = {"rows known": tip.KeepAll(), "speculated": tip.SoftOr(0.3), "teacher late": tip.TopEntropy(0.3)}


def models(**options) -> tuple[HeadCase, HeadCase]:
    return head_case(N, V, WIDTH, seed=20, **options), head_case(N, V, WIDTH, seed=30)


def gradients(case: HeadCase, teacher: HeadCase, scale: float = 1.0, **options) -> list[Tensor]:
    """Of the plain way: a loss, and its backward."""
    case = case.leaves()
    (scale * distill(case.head, teacher.head, **options).loss).backward()
    return [x.grad for x in case.tensors]


# Backward at once


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("normalizer", ["kept", 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_at_once_adds_to_the_gradient_that_exists(rule, sweeps, normalizer, dtype):
    student, teacher = (case.to(dtype) for case in models(bias=normal(V, seed=40)))
    options = {"select": RULES[rule], "sweeps": sweeps, "normalizer": normalizer}
    expected = gradients(student, teacher, 3.0, **options)
    case = student.leaves()
    before = [torch.full_like(x, 0.25) for x in case.tensors]
    for x, g in zip(case.tensors, before, strict=True):
        x.grad = g.clone()
    place = case.weight.grad.data_ptr()
    out = distill(case.head, teacher.head, backward=True, grad_scale=torch.tensor(3.0), **options)
    assert not out.loss.requires_grad and case.weight.grad.data_ptr() == place
    torch.testing.assert_close(out.loss, distill(student.head, teacher.head, **options | {"sweeps": 2}).loss)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for x, g, b in zip(case.tensors, expected, before, strict=True):
        torch.testing.assert_close(x.grad, b + g, **close)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_backward_at_once_makes_the_first_gradient(sweeps):
    student, teacher = models()
    case = student.leaves()
    distill(case.head, teacher.head, backward=True, grad_scale=0.5, sweeps=sweeps)
    for x, g in zip(case.tensors, gradients(student, teacher, 0.5, sweeps=sweeps), strict=True):
        torch.testing.assert_close(x.grad, g, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_main_grad_takes_the_gradient_and_grad_stays_none(rule, sweeps):
    student, teacher = (case.to(torch.bfloat16) for case in models())
    case = student.leaves()
    case.weight.main_grad = torch.ones(V, WIDTH)
    distill(case.head, teacher.head, select=RULES[rule], backward=True, sweeps=sweeps)
    assert case.weight.grad is None and case.hidden.grad is not None
    expected = gradients(student, teacher, select=RULES[rule], sweeps=sweeps)[1].float()
    torch.testing.assert_close(case.weight.main_grad - 1, expected, rtol=1e-2, atol=1e-6)


def test_the_gradient_flows_on_into_a_backbone_and_a_tied_embedding():
    _, teacher = models()
    grads = []
    for at_once in (False, True):
        weight, mix = leaf(normal(V, WIDTH, seed=7)), leaf(normal(WIDTH, WIDTH, seed=8))
        weight.grad, mix.grad = torch.ones(V, WIDTH), torch.ones(WIDTH, WIDTH)
        hidden = torch.tanh(weight[torch.arange(N)] @ mix)
        out = distill(tip.Head(hidden, weight), teacher.head, backward=at_once)
        if not at_once:
            out.loss.backward()
        grads.append((weight.grad, mix.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_hooks_see_the_gradient_of_a_backward_at_once():
    student, teacher = models()
    case, seen = student.leaves(), []
    case.weight.grad = torch.zeros(V, WIDTH)
    case.weight.register_hook(lambda g: seen.append(g.clone()))
    distill(case.head, teacher.head, backward=True)
    torch.testing.assert_close(seen[0], case.weight.grad)


def test_frozen_leaves_stay_frozen_in_a_backward_at_once():
    student, teacher = models()
    case = student.leaves()
    case.weight.requires_grad_(False)
    distill(case.head, teacher.head, backward=True)
    assert case.weight.grad is None and case.hidden.grad is not None
    distill(student.head, teacher.head, backward=True)  # nothing wants a gradient


@pytest.mark.parametrize("rule, options", [(tip.SoftOr(0.1), {}), (tip.KeepAll(), {"normalizer": 100.0})])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_no_second_buffer_of_the_heads_size_is_made(rule, options, sweeps):
    width, vocab = 256, 12_000  # a head of 11.7 MiB
    student, teacher = head_case(64, vocab, width, seed=20).leaves(), head_case(64, vocab, width, seed=30)
    student.weight.grad, student.hidden.grad = torch.zeros(vocab, width), torch.zeros(64, width)
    options |= {"select": rule, "sweeps": sweeps, "workspace_mib": 12}
    head_mib = 4 * width * vocab / 2**20
    at_once, _ = peak_transient_mib(lambda: distill(student.head, teacher.head, backward=True, **options))
    plain, _ = peak_transient_mib(lambda: distill(student.head, teacher.head, **options).loss.backward())
    assert at_once < 0.7 * head_mib and plain > head_mib


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.filterwarnings("ignore:tip_kernels.distill")
def test_a_kept_row_of_infinite_loss_has_no_part_in_a_backward_at_once(sweeps):
    """What is added to a gradient in place cannot be divided by another number afterwards."""
    student, teacher = models()
    ban = torch.zeros(N, V)
    ban[5, 7] = ban[9, 3] = -torch.inf  # two rows whose KL(student || teacher) is infinite, and ranks first
    other = teacher.logits() + ban
    options = {"select": tip.TopDivergence(8), "sweeps": sweeps}
    grads = []
    for at_once in (False, True):
        case = student.leaves()
        case.weight.grad = torch.zeros(V, WIDTH)
        out = distill(case.head, other, backward=at_once, **options)
        assert out.plan.dropped_rows == 2
        if not at_once:
            out.loss.backward()
        grads.append(case.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_a_scale_without_backward_is_refused():
    student, teacher = models()
    with pytest.raises(ValueError, match=r"^grad_scale: expected 1 without backward=True"):
        distill(student.head, teacher.head, grad_scale=2.0)
    with pytest.raises(ValueError, match=r"^grad_scale: expected a finite number above 0"):
        distill(student.head, teacher.head, grad_scale=-1.0, backward=True)
    with pytest.raises(ValueError, match=r"^backward: expected a bool"):
        distill(student.head, teacher.head, backward=1)


# Leaving small tiles out


def sorted_models() -> tuple[HeadCase, HeadCase]:
    """Heads whose last tokens are rare in every row, as those of a tokenizer sorted by frequency."""
    student, teacher = models()
    slope = torch.linspace(0, -20, V)
    student.bias, teacher.bias = slope.clone(), slope.clone()
    return student, teacher


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_filter_skips_rare_tokens_within_its_bounds_and_says_how_many(rule, sweeps):
    student, teacher = sorted_models()
    options = {"select": RULES[rule], "sweeps": sweeps}
    exact = gradients(student, teacher, **options)
    sieve, case = tip.GradFilter(2.0**-12), student.leaves()
    out = distill(case.head, teacher.head, grad_filter=sieve, **options)
    out.loss.backward()
    assert 0.2 < sieve.share < 0.9 and 0 < sieve.mass < 0.05
    rows = out.kept.row_ids
    weight = 1 / rows.numel()
    spread = (student.weight - student.weight.mean(0)).norm(dim=1).amax()
    error = (case.hidden.grad - exact[0]).norm(dim=1)[rows]
    dlogits = torch.autograd.grad(
        tip.divergence_loss(z := leaf(student.logits()), teacher.logits(), kept=out.kept).sum(), z
    )[0][rows]
    dropped = torch.where(dlogits.abs() < sieve.tolerance, dlogits.abs(), 0.0).sum(1)  # at most these
    assert (error <= 1.01 * weight * dropped * spread + 1e-7).all() and error.amax() > 0
    bound = sieve.tolerance * weight * student.hidden[rows].norm(dim=1).sum()
    error = (case.weight.grad - exact[1]).norm(dim=1)
    assert error.amax() <= bound + 1e-7 and error.amax() > 0
    assert (case.bias.grad - exact[2]).abs().amax() <= sieve.tolerance * 1.01


def test_the_mean_row_makes_up_for_most_of_what_was_dropped():
    student, teacher = sorted_models()
    student.weight += 1.0  # a head with a mean, so that the row sum matters
    exact = gradients(student, teacher)[0]
    sieve = tip.GradFilter(2.0**-10)
    ours = gradients(student, teacher, grad_filter=sieve)[0]
    kept = exact.abs().sum(1) > 0
    z = leaf(student.logits())
    out = distill(student.head, teacher.head)
    g = torch.autograd.grad(tip.divergence_loss(z, teacher.logits(), kept=out.kept).sum(), z)[0][kept] / kept.sum()
    uncorrected = torch.where(g.abs() * kept.sum() < 2.0**-10, g, 0.0) @ student.weight
    assert (ours - exact).norm() < 0.5 * uncorrected.norm()


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_filtered_gradient_does_not_feel_what_is_added_to_every_row_of_the_head(sweeps):
    """It shifts all logits of a row alike; only a row of d(logits) that sums to 0 takes it out again."""
    student, teacher = sorted_models()
    plain, moved = student, HeadCase(student.hidden, student.weight + 3.0, student.bias)
    sieves = tip.GradFilter(2.0**-7), tip.GradFilter(2.0**-7)
    grads = [
        gradients(case, teacher, grad_filter=sieve, sweeps=sweeps)[0]
        for case, sieve in zip((plain, moved), sieves, strict=True)
    ]
    assert sieves[0].skipped == sieves[1].skipped > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_filter_that_drops_nothing_changes_nothing(rule, sweeps):
    student, teacher = models()
    options, sieve = {"select": RULES[rule], "sweeps": sweeps}, tip.GradFilter(1e-30)
    for a, b in zip(
        gradients(student, teacher, grad_filter=sieve, **options), gradients(student, teacher, **options), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # tiles may be cut otherwise
    assert sieve.share == 0 and sieve.mass == 0 and sieve.entries > 0


def test_a_filter_that_drops_everything_leaves_the_mean_row_alone():
    student, teacher = models()
    sieve = tip.GradFilter(10.0)
    hidden, weight = gradients(student, teacher, grad_filter=sieve, sweeps=2)
    assert sieve.share == 1 and sieve.mass == 1 and (weight == 0).all() and hidden.abs().amax() < 1e-6


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), "small"])
def test_a_filter_without_a_tolerance_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"^tolerance: expected a finite number above 0"):
        tip.GradFilter(tolerance)
