"""token_importance: every method against its definition on the reference, its shapes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference as ref
import tip_kernels as tip
from reference import select
from tests._cases import INF, NAN, head_case, labels_for, leaf, no_worse, ordinary
from tip_kernels.distillation.importance import token_importance

READS = {
    "logit_diff": {"teacher"},
    "kl_div": {"student", "teacher"},
    "loss_contribution": {"teacher", "labels"},
    "entropy": {"student"},
    "reverse_kl": {"student", "teacher"},
    "hellinger": {"student", "teacher"},
    "soft_or": {"student", "teacher"},
    "teachability": {"student", "teacher"},
}
every_method = pytest.mark.parametrize("method", READS)


def by_definition(method: str, s: Tensor, t: Tensor, labels: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """(N,) straight from the reference, NaN on masked rows."""
    stats = ref.token_stats(s, t, labels=labels, margins=True, top_k=16)
    if method == "soft_or":
        return ref.soft_or_scores(stats, row_mask=row_mask).to(s.dtype)
    if method == "teachability":
        return select.teachability_scores(stats, row_mask=row_mask).to(s.dtype)
    scores = {
        "logit_diff": stats["margin_t"],
        "kl_div": stats["kl_fwd"],
        "loss_contribution": -stats["logp_t"],
        "entropy": stats["entropy_s"],
        "reverse_kl": stats["kl_rev"],
        "hellinger": ref.difficulty(stats),
    }[method]
    return scores if row_mask is None else scores.masked_fill(~row_mask, NAN)


def sources() -> tuple[Tensor, Tensor, Tensor]:
    """Rows far apart and near, with a banned token, a broken row of either model, and rows without a label."""
    s, t = ordinary(24, 60)
    t[::2] = s[::2] + 0.3 * t[::2]
    s[3, 5], t[5, 7], s[9, 1], t[11, 1] = -INF, -INF, NAN, NAN
    return s, t, labels_for(24, 60)


@pytest.mark.parametrize("masked", [False, True])
@every_method
def test_scores_are_those_of_the_definition(method, masked):
    s, t, labels = sources()
    row_mask = torch.arange(24) % 4 != 1 if masked else None
    given = {"student": s, "teacher": t, "labels": labels, "row_mask": row_mask}
    ours = token_importance(**given, method=method)
    assert ours.dtype == torch.float32
    truth, eager = (by_definition(method, s.to(d), t.to(d), labels, row_mask) for d in (torch.float64, torch.float32))
    no_worse(ours, eager, truth, method, floor=1e-5 if method == "teachability" else 2e-6)


@every_method
def test_what_a_method_does_not_read_may_be_missing_and_changes_nothing(method):
    s, t, labels = sources()
    given = {"student": s, "teacher": t, "labels": labels}
    full = token_importance(**given, method=method)
    needed = {name: value for name, value in given.items() if name in READS[method]}
    wrong = {name: torch.zeros(2, 3) for name in given if name not in READS[method]}
    for rest in ({}, wrong):
        assert torch.equal(token_importance(**needed, **rest, method=method).nan_to_num(77), full.nan_to_num(77))
    for name in READS[method]:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*since method '{method}' reads it, got NoneType"):
            token_importance(**{other: value for other, value in needed.items() if other != name}, method=method)


@every_method
def test_scores_come_in_the_shape_of_the_batch(method):
    s, t, labels = sources()
    flat = token_importance(student=s, teacher=t, labels=labels, method=method)
    assert flat.shape == (24,)
    for mask in (torch.ones(4, 6, dtype=torch.bool), torch.ones(24, dtype=torch.bool)):
        batch = token_importance(
            student=s.view(4, 6, -1), teacher=t.view(4, 6, -1), labels=labels.view(4, 6), method=method, row_mask=mask
        )
        assert batch.shape == (4, 6)
        assert torch.equal(batch.flatten().nan_to_num(77), flat.nan_to_num(77))
    empty = token_importance(student=s[:0], teacher=t[:0], labels=labels[:0], method=method)
    assert empty.shape == (0,)


@every_method
def test_heads_score_like_their_logits_and_no_gradient_flows(method):
    student, teacher = head_case(12, 80, 16, seed=20).leaves(), head_case(12, 80, 24, seed=30)
    given = {"labels": labels_for(12, 80), "method": method}
    ours = token_importance(student=student.head, teacher=teacher.head, **given)
    assert not ours.requires_grad
    logits = token_importance(student=leaf(student.logits()), teacher=teacher.logits(), **given)
    assert not logits.requires_grad
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_row_without_a_score_is_nan():
    s, t, labels = sources()
    for method in READS:
        scores = token_importance(student=s, teacher=t, labels=labels, method=method)
        expected = torch.zeros(24, dtype=torch.bool)
        expected[9] = "student" in READS[method]
        expected[11] = "teacher" in READS[method]
        if method == "loss_contribution":
            expected |= labels == -100
        assert torch.equal(scores.isnan(), expected), method


def test_normalize_and_top_k_reach_their_methods():
    s, t, _ = sources()
    given = {"student": s, "teacher": t}
    stats = ref.token_stats(s.double(), t.double(), top_k=2)
    minmax = token_importance(**given, method="soft_or", normalize="minmax")
    expected = ref.soft_or_scores(stats, "minmax")
    torch.testing.assert_close(minmax.double(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    two = token_importance(**given, method="teachability", top_k=2)
    expected = select.teachability_scores(stats)
    torch.testing.assert_close(two.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not torch.equal(two, token_importance(**given, method="teachability"))


@pytest.mark.parametrize(
    "argument, options",
    [
        ("method", {"method": "kl"}),
        ("method", {"method": None}),
        ("normalize", {"method": "soft_or", "normalize": "max"}),
        ("top_k", {"method": "teachability", "top_k": 0}),
        ("row_mask", {"method": "kl_div", "row_mask": torch.ones(24)}),
        ("row_mask", {"method": "soft_or", "row_mask": torch.ones(3, dtype=torch.bool)}),
        ("workspace_mib", {"method": "entropy", "workspace_mib": 0}),
        ("student", {"method": "entropy", "student": "logits"}),
        ("teacher", {"method": "logit_diff", "teacher": torch.zeros(3)}),
        ("teacher", {"method": "kl_div", "teacher": torch.zeros(24, 61)}),
        ("labels", {"method": "loss_contribution", "labels": torch.full((24,), 60)}),
        ("labels", {"method": "loss_contribution", "labels": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_bad_arguments_are_named(argument, options):
    s, t, labels = sources()
    with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
        token_importance(**{"student": s, "teacher": t, "labels": labels} | options)


def test_scores_choose_the_rows_that_the_rules_choose():
    s, t = ordinary(20, 60)
    stats = tip.token_stats(s, t, margins=True)
    for method, rule in (
        ("logit_diff", tip.TopMargin(5)),
        ("kl_div", tip.TopDivergence(5, by="kl_fwd")),
        ("entropy", tip.TopEntropy(5)),
        ("reverse_kl", tip.TopDivergence(5)),
        ("hellinger", tip.TopHellinger(5)),
        ("soft_or", tip.SoftOr(5)),
    ):
        scores = token_importance(student=s, teacher=t, method=method)
        assert sorted(scores.topk(5).indices.tolist()) == rule(stats).row_ids.tolist(), method
