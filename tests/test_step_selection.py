"""StepSelection: what is chosen over micro-batches, and learned from them, is what one big batch would give."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import tip_kernels as tip
from tests._cases import leaf, normal

B, T, V = 16, 9, 40
FIELDS = ("entropy_s", "kl_fwd", "kl_rev")


def rollouts_of(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of both models, and a mask."""
    hidden_s, hidden_t = normal(B, T, 8, seed=seed), normal(B, T, 8, seed=seed + 1)
    return (
        hidden_s,
        normal(V, 8, seed=seed + 2),
        hidden_t,
        normal(V, 8, seed=seed + 3),
        normal(B, T, seed=seed + 4) > -1,
    )


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest entry."""
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(5)


CHOICES = {
    "SoftOr": lambda: {"select": tip.SoftOr(0.2)},
    "SoftOr, minmax": lambda: {"select": tip.SoftOr(0.3, normalize="minmax")},
    "SoftOr, batch": lambda: {"select": tip.SoftOr(0.1, scope="batch")},
    "SoftOr, global": lambda: {"select": tip.SoftOr(0.1, scope="global")},
    "Overconfident": lambda: {"select": tip.Overconfident(0.1)},
    "Overconfident, quantile": lambda: {"select": tip.Overconfident(0.5, entropy_below=("quantile", 0.4))},
    "Threshold": lambda: {"select": tip.Threshold(above=("quantile", 0.8))},
    "TopEntropy": lambda: {"select": tip.TopEntropy(2)},
    "Teachability": lambda: {"select": tip.Teachability(0.3, top_k=4)},
    "SampleEntropy": lambda: {"select": tip.SampleEntropy(0.3, gamma=1.0, unbiased=True, generator=drawn())},
    "RandomRows": lambda: {"select": tip.RandomRows(0.3, generator=drawn())},
    "KeepAll": lambda: {"select": tip.KeepAll()},
    "all valid rows": lambda: {"select": tip.SoftOr(0.2), "normalizer": "all"},
    "a number": lambda: {"select": tip.SoftOr(0.2), "normalizer": 7, "temperature": 2.0, "temperature_sq": True},
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_micro_batches_choose_and_learn_what_one_big_batch_does(name, count):
    hidden_s, head_s, hidden_t, head_t, mask = rollouts_of()
    whole, z_t = leaf(hidden_s @ head_s.T), hidden_t @ head_t.T
    one = tip.distill(whole, z_t, row_mask=mask, **CHOICES[name]())
    one.loss.backward()

    ours = leaf(whole)
    step = tip.StepSelection(**CHOICES[name]())
    places = torch.arange(B).split(B // count)
    for at in places:
        step.measure(ours[at], z_t[at], row_mask=mask[at])
    outs = [tip.distill(ours[at], z_t[at], **part) for at, part in zip(places, step.parts(), strict=True)]
    assert torch.equal(step.kept.mask, one.kept.mask) and step.kept.mask.sum() > 0
    assert torch.equal(torch.cat([out.kept.mask for out in outs]), one.kept.mask)
    loss = sum(out.loss for out in outs)
    loss.backward()
    assert loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    assert error(ours.grad, whole.grad) <= 1e-6
    assert step.correction(outs) == pytest.approx(1.0, abs=1e-6)
    if name.startswith("SoftOr") and count > 1:  # a choice in each alone is another one
        rule = CHOICES[name]()["select"]
        alone = [rule(tip.token_stats(ours[at], z_t[at]), mask[at]) for at in places]
        assert not torch.equal(torch.cat([kept.mask for kept in alone]), one.kept.mask)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_gradients_of_heads_add_up_over_micro_batches(count):
    """Each is within fp32's rounding of the truth, which is about 1e-6 where few rows are kept."""
    hidden_s, head_s, hidden_t, head_t, mask = rollouts_of()
    whole, weight, hidden, ours = leaf(hidden_s), leaf(head_s), leaf(hidden_s), leaf(head_s)
    one = tip.distill(tip.Head(whole, weight), tip.Head(hidden_t, head_t), select=tip.SoftOr(0.2), row_mask=mask)
    one.loss.backward()
    step, places = tip.StepSelection(tip.SoftOr(0.2)), torch.arange(B).split(B // count)
    heads = [(tip.Head(hidden[at], ours), tip.Head(hidden_t[at], head_t)) for at in places]
    for at, pair in zip(places, heads, strict=True):
        step.measure(*pair, row_mask=mask[at])
    for pair, part in zip(heads, step.parts(), strict=True):
        tip.distill(*pair, **part).loss.backward()
    assert torch.equal(step.kept.mask, one.kept.mask)
    assert error(hidden.grad, whole.grad) <= 1e-6 and error(ours.grad, weight.grad) <= 1e-6


@pytest.mark.parametrize("median_of", ["valid", "kept"])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_adakd_takes_its_median_and_quota_over_the_step(median_of, count):
    hidden_s, head_s, hidden_t, head_t, mask = rollouts_of(10)
    whole, hidden = leaf(hidden_s), leaf(hidden_s)
    teacher = tip.Head(hidden_t, head_t)
    how = {"median_of": median_of, "scope": "rollout"}
    one = tip.distill(tip.Head(whole, head_s), teacher, **tip.adakd(0.4, row_mask=mask, **how))
    one.loss.backward()
    choice = tip.adakd(0.4, **how)
    step = tip.StepSelection(choice["select"], temperature=choice["temperature"], temperature_sq=True)
    places = torch.arange(B).split(B // count)
    heads = [(tip.Head(hidden[at], head_s), tip.Head(hidden_t[at], head_t)) for at in places]
    for at, pair in zip(places, heads, strict=True):
        step.measure(*pair, row_mask=mask[at])
    loss = sum(tip.distill(*pair, **part).loss for pair, part in zip(heads, step.parts(), strict=True))
    loss.backward()
    assert torch.equal(step.kept.mask, one.kept.mask)
    assert loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    assert error(hidden.grad, whole.grad) <= 1e-6


def test_a_rollout_may_lie_in_several_micro_batches():
    hidden_s, head_s, hidden_t, head_t, mask = (x.flatten(0, 1) if x.shape[0] == B else x for x in rollouts_of())
    mask, ids = mask.flatten(), torch.arange(B * T) % 5
    one = tip.distill(tip.Head(leaf(hidden_s), head_s), tip.Head(hidden_t, head_t), row_mask=mask, rollout_ids=ids)
    step = tip.StepSelection(tip.SoftOr(0.5))
    for at in torch.arange(B * T).split(20):
        pair = tip.Head(hidden_s[at], head_s), tip.Head(hidden_t[at], head_t)
        step.measure(*pair, row_mask=mask[at], rollout_ids=ids[at])
    step.parts()
    assert torch.equal(step.kept.mask, one.kept.mask)


def test_a_rule_of_the_student_alone_is_measured_without_a_teacher():
    hidden_s, head_s, hidden_t, head_t, mask = rollouts_of()
    step = tip.StepSelection(tip.TopEntropy(0.2))
    assert not step.reads_teacher and tip.StepSelection(tip.SoftOr(0.2)).reads_teacher
    step.measure(tip.Head(hidden_s, head_s), row_mask=mask)
    (part,) = step.parts()
    one = tip.distill(tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t), select=tip.TopEntropy(0.2), row_mask=mask)
    out = tip.distill(tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t), **part)
    assert torch.equal(out.kept.mask, one.kept.mask) and out.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)


def test_statistics_of_the_step_are_those_of_the_big_batch():
    hidden_s, head_s, hidden_t, head_t, _ = rollouts_of()
    step = tip.StepSelection(tip.KeepAll(), full_stats=True)
    for at in torch.arange(B).split(4):
        step.measure(tip.Head(hidden_s[at], head_s), tip.Head(hidden_t[at], head_t))
    step.parts()
    stats = tip.token_stats(tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t))
    for name in FIELDS:
        torch.testing.assert_close(getattr(step.stats, name), getattr(stats, name), rtol=1e-6, atol=1e-7)


def test_a_correction_takes_kept_rows_without_a_finite_loss_out_of_the_divisor():
    z_s, z_t = normal(B, T, V, seed=1), normal(B, T, V, seed=2)
    z_t[3, 2, 5:] = -math.inf  # ln 0 for tokens that the student allows: KL(student || teacher) is infinite
    weights = normal(B, T, seed=3).exp()
    whole, ours = leaf(z_s), leaf(z_s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        one = tip.distill(whole, z_t, select=tip.TopDivergence(0.3), row_weights=weights)
        one.loss.backward()
        step = tip.StepSelection(tip.TopDivergence(0.3))
        places = torch.arange(B).split(4)
        for at in places:
            step.measure(ours[at], z_t[at], row_weights=weights[at])
        outs = [tip.distill(ours[at], z_t[at], **part) for at, part in zip(places, step.parts(), strict=True)]
    assert sum(int(out.plan.dropped_rows) for out in outs) == 1
    loss = sum(out.loss for out in outs)
    loss.backward()
    factor = step.correction(outs)
    assert factor > 1.001
    assert factor * loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    assert error(factor * ours.grad, whole.grad) <= 1e-6


def test_bad_calls_are_refused_by_name():
    x, y = normal(6, V, seed=1), normal(6, V, seed=2)
    step = tip.StepSelection(tip.SoftOr(0.5))
    with pytest.raises(ValueError, match=r"^teacher: expected .* got NoneType"):
        step.measure(x)
    with pytest.raises(ValueError, match=r"^parts: expected a micro-batch.*"):
        step.parts()
    step.measure(x, y)
    with pytest.raises(ValueError, match=r"^rollout_ids: expected some in every micro-batch"):
        step.measure(x, y, rollout_ids=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^row_weights: expected some in every micro-batch"):
        step.measure(x, y, row_weights=torch.ones(6))
    (part,) = step.parts()
    with pytest.raises(ValueError, match=r"^measure: expected every micro-batch before parts"):
        step.measure(x, y)
    with pytest.raises(ValueError, match=r"^select: expected the micro-batch of 6 rows .* got 5 rows"):
        tip.distill(x[:5], y[:5], **part)
    with pytest.raises(ValueError, match=r"^labels: expected labels.*"):
        tip.StepSelection(tip.CrossEntropyRatio(0.5)).measure(x, y)
    for name, bad in {
        "select": {"select": 0.5},
        "temperature": {"select": tip.KeepAll(), "temperature": 0.0},
        "temperature_sq": {"select": tip.KeepAll(), "temperature_sq": 1},
        "normalizer": {"select": tip.KeepAll(), "normalizer": 0},
        "full_stats": {"select": tip.KeepAll(), "full_stats": None},
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            tip.StepSelection(**bad)
