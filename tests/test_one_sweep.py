"""One sweep: equal to two, whatever was speculated right or wrong, and as cheap as it says."""

from __future__ import annotations

import pytest
import torch

import reference as ref
import tip_kernels as tip
from tests._cases import (
    HEADS,
    INF,
    NAN,
    HeadCase,
    Products,
    check_gradient,
    distill,
    head_case,
    labels_for,
    leaf,
    no_worse,
    normal,
)
from tip_kernels.distillation import one_sweep

N, V, WIDTH_S, WIDTH_T = 40, 1300, 32, 48
KINDS = {
    "KeepAll": tip.KeepAll(),
    "RandomRows": tip.RandomRows(0.3),
    "SoftOr": tip.SoftOr(0.3),
    "SoftOr by rollout": tip.SoftOr(3),
    "TopEntropy": tip.TopEntropy(0.3),
    "Overconfident": tip.Overconfident(0.5, "kl_fwd", ("quantile", 0.6), ("quantile", 0.3)),
    "TopMargin": tip.TopMargin(0.4, by="margin_s"),
}


@pytest.fixture(params=[5, 16], ids=lambda rows: f"blocks of {rows}")
def blocks(request, monkeypatch):
    """Row blocks so short that a batch takes many."""
    monkeypatch.setattr(one_sweep, "ROWS", {"cpu": (1, request.param)})


def models(n: int = N, **options) -> tuple[HeadCase, HeadCase]:
    """A student that gets nearer its teacher from row to row, so that a running rank deceives."""
    student, teacher = head_case(n, V, WIDTH_S, seed=20, **options), head_case(n, V, WIDTH_T, seed=30)
    student.hidden.mul_(torch.linspace(2, 0.1, n).unsqueeze(1))
    teacher.hidden.mul_(torch.linspace(2, 0.1, n).unsqueeze(1))
    return student, teacher


def seeded(rule: tip.Rule) -> tip.Rule:
    return tip.RandomRows(0.3, generator=torch.Generator().manual_seed(1)) if isinstance(rule, tip.RandomRows) else rule


def step(student: HeadCase, teacher: HeadCase, upstream: float = 1.0, **options) -> tuple[tip.Distilled, list]:
    case = student.leaves()
    out = distill(case.head, teacher.head, **options)
    (upstream * out.loss).backward()
    return out, [x.grad for x in case.tensors]


def check_equal(student: HeadCase, teacher: HeadCase, upstream: float = 1.0, **options) -> tip.Distilled:
    """One sweep against two: the same rows, statistics, loss and gradients within fp32 rounding."""
    rule = options.pop("select")
    one, grads_one = step(student, teacher, upstream, select=seeded(rule), sweeps=1, **options)
    two, grads_two = step(student, teacher, upstream, select=seeded(rule), sweeps=2, **options)
    assert one.plan.strategy == "one sweep" and two.plan.strategy == "two sweeps"
    assert torch.equal(one.kept.mask, two.kept.mask)
    torch.testing.assert_close(one.loss, two.loss, rtol=2e-6, atol=1e-7)
    assert one.plan.dropped_rows == two.plan.dropped_rows
    for a, b in zip(grads_one, grads_two, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 2e-2, atol=2e-6 * b.abs().amax())
    for name in rule.needs:
        torch.testing.assert_close(getattr(one.stats, name), getattr(two.stats, name), equal_nan=True)
    return one


DIVERGENCES = [tip.ReverseKL(), tip.Jeffreys(), tip.JSD(0.3), tip.ToDi(), tip.Renyi(0.5), tip.ReverseKL().clipped(1.0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_one_sweep_is_two(blocks, kind, divergence):
    check_equal(*models(), select=KINDS[kind], divergence=divergence)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
def test_one_sweep_is_two_for_any_head(blocks, kind, head):
    student, teacher = models(**HEADS[head])
    teacher.vocab_size = student.vocab_size
    if head == "bias that bans":  # a token that both allow or neither, or every loss is infinite
        teacher.bias = student.bias
    check_equal(student, teacher, select=KINDS[kind])


OPTIONS = {
    "labels": {"labels": labels_for(N, V), "ce_weight": 0.3},
    "labels at a temperature": {"labels": labels_for(N, V), "ce_weight": 0.3, "temperature": 1.7},
    "label loss alone": {"labels": labels_for(N, V), "ce_weight": 1.0},
    "sampled": {"labels": torch.arange(N) * 7919 % V, "divergence": tip.SampledReverseKL()},
    "temperatures": {"temperature": torch.linspace(0.5, 2, N), "temperature_sq": True},
    "row weights": {"row_weights": torch.linspace(0, 2, N)},
    "all rows in the mean": {"normalizer": "all"},
    "a number": {"normalizer": 7.0},
    "masked": {"row_mask": normal(N, seed=9) > -0.5},
    "nothing kept": {"row_mask": torch.zeros(N, dtype=torch.bool)},
    "rollouts": {"rollout_ids": torch.arange(N) % 7},
    "every statistic": {"full_stats": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
def test_one_sweep_is_two_with_every_option(blocks, kind, option):
    check_equal(*models(), upstream=-2.5, select=KINDS[kind], **OPTIONS[option])


@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_sweep_is_two_in_16_bits(blocks, kind, dtype):
    student, teacher = models(bias=normal(V, seed=40))
    check_equal(student.to(dtype), teacher.to(dtype), select=KINDS[kind])


@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
def test_the_gradient_is_that_of_the_reference(blocks, kind):
    student, teacher = models(bias=normal(V, seed=40), softcap=9.0)
    out, ours = step(student, teacher, select=KINDS[kind], sweeps=1)
    grads, losses = [], []
    for dtype in (torch.float64, torch.float32):
        case = student.to(dtype).leaves()
        losses.append(ref.reverse_kl(case.logits(), teacher.to(dtype).logits())[out.kept.mask].mean())
        losses[-1].backward()
        grads.append([x.grad for x in case.tensors])
    no_worse(out.loss.detach(), losses[1].detach(), losses[0].detach(), "loss")
    for x, eager, truth in zip(ours, grads[1], grads[0], strict=True):
        check_gradient(x, eager, truth, "leaf")


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
def test_the_units_are_the_products_taken_and_frozen_leaves_cost_none(blocks, kind, frozen):
    student, teacher = head_case(N, V, 32, seed=20, bias=normal(V, seed=40)), head_case(N, V, 32, seed=30)
    case = student.leaves()
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    products = Products()
    with products:
        out = distill(case.head, teacher.head, select=KINDS[kind], sweeps=1)
        out.loss.backward()
    rho, leaves = out.plan.kept_rows.item() / N, 2 - len({"weight", "hidden"} & set(frozen))
    assert out.plan.units == pytest.approx(products.macs / (N * 32 * V))
    least = (1 + rho if kind == "TopEntropy" else 2) + leaves * rho
    assert least - 1e-9 <= out.plan.units <= least + 0.2  # what was speculated wrong
    for name, x in zip(("hidden", "weight", "bias"), case.tensors, strict=True):
        assert (x.grad is None) == (name in frozen)


@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
def test_one_sweep_takes_a_weight_in_any_layout(blocks, kind):
    student, teacher = models()
    student.weight, teacher.weight = (x.weight.t().contiguous().t() for x in (student, teacher))
    case = HeadCase(leaf(student.hidden), student.weight.detach().requires_grad_())
    assert not case.weight.is_contiguous()
    distill(case.head, teacher.head, select=KINDS[kind], sweeps=1).loss.backward()
    _, grads = step(*models(), select=KINDS[kind], sweeps=2)
    for x, g in zip(case.tensors, grads, strict=True):
        torch.testing.assert_close(x.grad, g, rtol=1e-4, atol=2e-6 * g.abs().amax())


def test_a_deceived_speculation_projects_again_and_is_as_right(blocks):
    student, teacher = head_case(N, V, 32, seed=20), head_case(N, V, 32, seed=30)
    student.hidden.mul_(torch.linspace(2, 0.01, N).unsqueeze(1))
    out = check_equal(student, teacher, select=tip.TopDivergence(0.5, by="kl_rev"))
    assert out.plan.units > 2 + 2 * 0.5 + 2 / N  # the first rows beat the last, which their block could not know


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", ["KeepAll", "SoftOr", "TopEntropy"])
@pytest.mark.filterwarnings("ignore:tip_kernels.distill")
def test_a_broken_row_touches_no_other(blocks, kind, value):
    student, teacher = models()
    student.hidden[7, 3] = teacher.hidden[11, 2] = value
    out, grads = step(student, teacher, select=KINDS[kind], sweeps=1)
    assert out.loss.isfinite() and all(x.isfinite().all() for x in grads)
    clean = torch.ones(N, dtype=torch.bool)
    clean[[7, 11]] = False
    mask = clean & out.kept.mask
    sound_s, sound_t = models()
    case = sound_s.leaves()
    loss = ref.reverse_kl(case.logits(), sound_t.logits())[mask].mean()
    loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[1], case.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_token_that_only_the_teacher_bans_drops_its_rows(blocks):
    student, teacher = models()
    teacher.bias = torch.where(torch.arange(V) == 5, -INF, 0.0)
    with pytest.warns(RuntimeWarning, match="infinite"):
        out, grads = step(student, teacher, select=tip.KeepAll(), sweeps=1)
    assert out.plan.dropped_rows == N and out.loss == 0 and all((x == 0).all() for x in grads)


def test_backward_runs_again_and_on_parts(blocks):
    student, teacher = models()
    case = student.leaves()
    out = distill(case.head, teacher.head, select=tip.SoftOr(0.3), divergence=tip.JSD(0.3), sweeps=1)
    first = torch.autograd.grad(out.loss, case.tensors, retain_graph=True)
    again = torch.autograd.grad(3 * out.loss, case.tensors, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-4, atol=1e-7)
    (hidden,) = torch.autograd.grad(out.loss, case.hidden, retain_graph=True)
    torch.testing.assert_close(hidden, first[0], rtol=1e-4, atol=1e-7)
    grads = torch.autograd.grad(out.loss, case.tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grads[0].sum().backward()


def test_a_leaf_changed_before_backward_is_refused(blocks):
    student, teacher = models()
    case = student.leaves()
    out = distill(case.head, teacher.head, select=tip.SoftOr(0.3), sweeps=1)
    with torch.no_grad():
        case.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_gradients_add_up_over_micro_batches(blocks):
    student, teacher = models()
    weight, grads = leaf(student.weight), []
    for rows in (slice(0, 24), slice(24, 40)):
        out = distill(
            tip.Head(student.hidden[rows], weight),
            tip.Head(teacher.hidden[rows], teacher.weight),
            select=tip.KeepAll(),
            normalizer=N,
            sweeps=1,
        )
        out.loss.backward()
        grads.append(weight.grad.clone())
    whole = step(student, teacher, select=tip.KeepAll(), sweeps=1)[1][1]
    assert not torch.equal(grads[0], whole)
    torch.testing.assert_close(grads[1], whole, rtol=1e-4, atol=1e-7)


def test_autocast_takes_the_products_in_its_dtype_and_sums_in_fp32(blocks):
    student, teacher = models()
    with torch.autocast("cpu", torch.bfloat16):
        one = step(student, teacher, select=tip.KeepAll(), sweeps=1)
        two = step(student, teacher, select=tip.KeepAll(), sweeps=2)
    torch.testing.assert_close(one[0].loss, two[0].loss)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_without_a_gradient_nothing_but_measuring_is_done():
    student, teacher = head_case(N, V, 32, seed=20), head_case(N, V, 32, seed=30)
    out = distill(student.head, teacher.head, select=tip.KeepAll())
    assert out.plan.units == 2 and not out.loss.requires_grad
    with torch.no_grad():
        assert distill(student.leaves().head, teacher.head, select=tip.KeepAll()).plan.units == 2


def test_a_workspace_too_small_for_rows_of_logits_takes_two_sweeps():
    student, teacher = head_case(200, 9000, 16, seed=20).leaves(), head_case(200, 9000, 16, seed=30)
    plans = [distill(student.head, teacher.head, workspace_mib=mib).plan for mib in (4, 64)]
    assert [plan.strategy for plan in plans] == ["two sweeps", "one sweep"]


def test_what_one_sweep_cannot_do_is_refused_when_asked_for():
    student, teacher = models()
    logits = leaf(student.logits())
    refused = [
        (logits, {}),
        (student.leaves().head, {"select": tip.Threshold(above=0.1)}),
        (student.leaves().head, {"select": tip.SampleEntropy(0.5)}),
        (student.leaves().head, {"temperature": tip.difficulty_temperature}),
        (student.head, {}),
    ]
    for source, options in refused:
        with pytest.raises(ValueError, match=r"^sweeps: expected 2 or None, since one sweep"):
            distill(source, teacher.head, sweeps=1, **options)
    with pytest.raises(ValueError, match=r"^sweeps: expected 1, 2 or None, got int 3"):
        distill(student.leaves().head, teacher.head, sweeps=3)


@pytest.mark.parametrize("divergence", [tip.ReverseKL(), tip.JSD(0.5)], ids=str)
def test_the_second_sweep_goes_by_rows_where_that_saves_products(blocks, divergence):
    student, teacher = models()
    rule = tip.SampleEntropy(0.5, generator=torch.Generator())
    runs = []
    for sweeps in (None, 2):
        rule.generator.manual_seed(3)
        runs.append(step(student, teacher, select=rule, divergence=divergence, sweeps=sweeps))
    assert runs[0][0].plan.strategy == "two sweeps, the second by rows"
    assert runs[0][0].plan.units == pytest.approx(1 + 4 * 0.5)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for name in ("entropy_s", "lse_s", "kl_rev"):
        a, b = (run[0].stats._get(name) for run in runs)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True)
