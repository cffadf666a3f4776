"""Row weights that follow from statistics: each against its loop in float64, alone, in distill, in divergence_loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
import tip_kernels as tip
from tests._cases import distill, head_case

W = tip.weights
B, T, V, K = 3, 9, 41, 4
N = B * T
ROLLOUTS = torch.tensor([7, -2, 7])[torch.arange(N) % 3]  # interleaved


def inputs(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=g)
    return {
        "labels": labels.masked_fill(torch.arange(N) == 11, -100),
        "mask": torch.rand(N, generator=g) < 0.8,
        "rollout_logp": torch.randn(N, generator=g) - 3,
    }


def measured(shape: tuple[int, ...] = (N,), seed: int = 0, ban: bool = False) -> tuple[tip.TokenStats, dict]:
    x = inputs(seed)
    s, t = head_case(N, V, 8, seed).logits().float(), head_case(N, V, 12, seed + 1).logits().float()
    if ban:
        rows, y = torch.arange(N), x["labels"].clamp(min=0)
        for model, where in ((t, rows % 5 == 1), (s, rows % 5 == 2), (t, rows % 5 == 3), (s, rows % 5 == 3)):
            model[rows[where], y[where]] = -math.inf
    stats = tip.token_stats(s.view(*shape, V), t.view(*shape, V), labels=x["labels"], top_k=K)
    return stats, {name: getattr(stats, name) for name in reference_fields(stats)}


def reference_fields(stats: tip.TokenStats) -> list[str]:
    return ["entropy_s", "entropy_t", "logp_s", "logp_t", "mass_t_on_top_s", "kl_rev"]


ROLLOUT_LOGP = inputs()["rollout_logp"]
CASES = {  # the weight, and its loop of (stats, mask, rollouts)
    "teacher confidence": (W.TeacherConfidence(), lambda x, m, r: reference.teacher_confidence(x, m)),
    "teacher confidence in nats": (
        W.TeacherConfidence(0.3, zero_at=2.5),
        lambda x, m, r: reference.teacher_confidence(x, m, floor=0.3, zero_at=2.5),
    ),
    "confidence product": (
        W.ConfidenceProduct(0.7, 2.0),
        lambda x, m, r: reference.confidence_product(x, m, teacher=0.7, student=2.0),
    ),
    "prefix decay": (W.PrefixDecay(), reference.prefix_decay),
    "prefix decay, stronger": (W.PrefixDecay(3.0), lambda x, m, r: reference.prefix_decay(x, m, r, gamma=3.0)),
    "log-ratio sigmoid": (W.LogRatioSigmoid(), lambda x, m, r: reference.log_ratio_sigmoid(x, m)),
    "log-ratio sigmoid, flat": (W.LogRatioSigmoid(0.0), lambda x, m, r: reference.log_ratio_sigmoid(x, m, beta=0.0)),
    "importance ratio": (
        W.ImportanceRatio(ROLLOUT_LOGP, low=0.25),
        lambda x, m, r: reference.importance_ratio(x, ROLLOUT_LOGP, m, low=0.25),
    ),
    "position decay": (W.PositionDecay(2.5), lambda x, m, r: reference.position_decay(x, m, r, half_life=2.5)),
    "indicator": (
        W.Indicator("entropy_t", above=2.0, below=3.0),
        lambda x, m, r: reference.indicator(x, m, by="entropy_t", above=2.0, below=3.0),
    ),
    "drift decay": (
        W.DriftDecay(0.3, drop=0.4, base=0.1, top_k=K),
        lambda x, m, r: reference.drift_decay(x, m, r, threshold=0.3, drop=0.4, base=0.1),
    ),
    "drift decay by KL": (
        W.DriftDecay(2.0, by="kl_rev"),
        lambda x, m, r: reference.drift_decay(x, m, r, threshold=2.0, by="kl_rev"),
    ),
}
of_every_weight = pytest.mark.parametrize("name", CASES)


def close(ours: Tensor, truth: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=1e-7, equal_nan=True)


@of_every_weight
@pytest.mark.parametrize("ban", [False, True], ids=["all allowed", "sampled tokens banned"])
@pytest.mark.parametrize("rollouts", [None, ROLLOUTS], ids=["one rollout", "interleaved rollouts"])
@pytest.mark.parametrize("masked", [False, True], ids=["every row", "masked"])
def test_every_weight_is_its_loop_in_float64(name, masked, rollouts, ban):
    weight, loop = CASES[name]
    for seed in range(3):
        stats, fields = measured(seed=seed, ban=ban)
        mask = inputs(seed)["mask"] if masked else None
        close(weight(stats, mask, rollouts), loop(fields, mask, rollouts))


@of_every_weight
def test_a_batch_holds_its_own_rollouts_and_masks_of_either_shape(name):
    weight, loop = CASES[name]
    stats, fields = measured((B, T))
    if name == "importance ratio":
        weight = replace(weight, rollout_logp=ROLLOUT_LOGP.view(B, T))
    mask, rollouts = inputs()["mask"], torch.arange(N) // T
    close(weight(stats, mask.view(B, T)), loop(fields, mask, rollouts))


@of_every_weight
def test_a_nan_row_is_nan_and_counts_for_no_other(name):
    weight, loop = CASES[name]
    _, fields = measured()
    broken = {x: value.masked_fill(torch.arange(N) == 4, torch.nan) for x, value in fields.items()}
    ours = weight(tip.TokenStats(**broken), None, ROLLOUTS)
    reads = weight.needs
    assert bool(ours[4].isnan()) == bool(reads)
    close(ours, loop(broken, None, ROLLOUTS))


@of_every_weight
def test_no_rows_and_nothing_unmasked_weigh_nothing(name):
    weight, _ = CASES[name]
    stats, fields = measured()
    empty = tip.TokenStats(**{x: value[:0] for x, value in fields.items()})
    of_none = replace(weight, rollout_logp=ROLLOUT_LOGP[:0]) if name == "importance ratio" else weight
    assert of_none(empty).shape == (0,)
    assert torch.equal(weight(stats, torch.zeros(N, dtype=torch.bool)), torch.zeros(N))


def test_models_that_agree_weigh_every_row_alike():
    zero = torch.zeros(N)
    stats = tip.TokenStats(entropy_s=zero, entropy_t=zero, logp_s=zero, logp_t=zero)
    assert torch.equal(W.PrefixDecay(0.5)(stats), torch.full((N,), 1.5))
    assert torch.equal(W.LogRatioSigmoid()(stats), torch.full((N,), 0.5))
    assert torch.equal(W.TeacherConfidence()(stats), torch.ones(N))
    assert torch.equal(W.ConfidenceProduct()(stats), torch.ones(N))


def test_a_rollout_weighs_the_same_whatever_its_neighbours():
    """Sums of groups cancel nothing: a rollout of huge log-ratios beside one of tiny ones."""
    tiny = torch.tensor([1e-3, 2e-3, 3e-3])
    logp_t = torch.cat([torch.full((3,), -9e4), -tiny])
    stats = tip.TokenStats(logp_s=torch.zeros(6), logp_t=logp_t)
    ours = W.PrefixDecay()(stats, None, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.equal(ours[3:], W.PrefixDecay()(tip.TokenStats(logp_s=torch.zeros(3), logp_t=-tiny)))


def test_statistics_of_another_k_are_refused():
    stats, _ = measured()
    with pytest.raises(ValueError, match=r"^stats: expected statistics measured with top_k=5, got int 4"):
        W.DriftDecay(top_k=5)(stats)
    W.DriftDecay(1.0, by="kl_rev", top_k=5)(stats)


# In distill

SELECTS = {"all rows": tip.KeepAll(), "a quota": tip.SoftOr(0.6), "student's": tip.TopEntropy(0.6)}
DISTILLED = ["teacher confidence", "confidence product", "prefix decay", "importance ratio", "position decay"]
DISTILLED += ["drift decay"]


def batch() -> tuple:
    return head_case(N, V, 8, 3), head_case(N, V, 12, 4), inputs()


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("name", DISTILLED)
def test_distill_weighs_by_a_callable_as_by_its_tensor(name, select, sweeps):
    weight, loop = CASES[name]
    case, teacher, x = batch()
    on = {"labels": x["labels"].clamp(min=0), "row_mask": x["mask"], "rollout_ids": ROLLOUTS, "sweeps": sweeps}
    stats = tip.token_stats(case.head, teacher.head, labels=on["labels"], top_k=K)
    truth = loop({f: getattr(stats, f) for f in reference_fields(stats)}, x["mask"], ROLLOUTS).float()
    losses = []
    for weights in (weight, truth):
        student = case.leaves()
        out = distill(student.head, teacher.head, select=SELECTS[select], row_weights=weights, **on)
        out.loss.backward()
        losses.append((out, student))
    (ours, student), (theirs, right) = losses
    assert ours.plan.strategy == {1: "one sweep", 2: "two sweeps"}[sweeps]
    assert torch.equal(ours.kept.mask, theirs.kept.mask)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.plan.weight, theirs.plan.weight, rtol=1e-5, atol=0)
    for a, b in zip(student.tensors, right.tensors, strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["kept", "all", 7.0])
def test_a_weighted_loss_is_that_of_whole_softmaxes_in_float64(normalizer):
    case, teacher, x = batch()
    mask = x["mask"]
    out = tip.distill(
        case.head, teacher.head, select=tip.KeepAll(), row_mask=mask, row_weights=W.TeacherConfidence(0.2),
        normalizer=normalizer,
    )  # fmt: skip
    z_s, z_t = case.to(torch.float64).logits(), teacher.to(torch.float64).logits()
    truth = {"entropy_t": -(z_t.softmax(1) * z_t.log_softmax(1)).sum(1)}
    w = reference.teacher_confidence(truth, mask, floor=0.2)
    divisor = {"kept": w.sum(), "all": mask.sum()}.get(normalizer, normalizer)
    right = (w * reference.reverse_kl(z_s, z_t))[mask].sum() / divisor
    torch.testing.assert_close(out.loss.double(), right, rtol=1e-5, atol=0)


def test_only_what_the_weight_needs_is_measured():
    case, teacher, x = batch()
    measured_by = {
        W.TeacherConfidence(): {"entropy_t"},
        W.ImportanceRatio(ROLLOUT_LOGP): {"logp_s"},
        W.DriftDecay(top_k=K): {"mass_t_on_top_s"},
    }
    for weight, needed in measured_by.items():
        options = {"labels": x["labels"].clamp(min=0)} if "logp_s" in needed else {}
        out = distill(case.head, teacher.head, select=tip.KeepAll(), row_weights=weight, sweeps=2, **options)
        assert needed <= set(out.stats._measured) and "hellinger_sq" not in out.stats._measured
    out = distill(case.head, teacher.head, select=tip.KeepAll(), row_weights=lambda stats, *_: stats.hellinger_sq)
    assert {"entropy_s", "entropy_t", "kl_fwd", "hellinger_sq"} <= set(out.stats._measured)


def test_rows_known_beforehand_are_weighed_beforehand_and_cost_one_sweep():
    case, teacher, _ = batch()
    early = distill(case.leaves().head, teacher.head, select=tip.KeepAll(), row_weights=W.PositionDecay(4))
    assert early.plan.strategy == "one sweep" and early.plan.units == 4.0
    late = distill(case.leaves().head, teacher.head, select=tip.KeepAll(), row_weights=W.TeacherConfidence(), sweeps=1)
    assert late.plan.strategy == "one sweep" and late.plan.units == 4.0


def test_under_adakd_rows_are_weighed_by_statistics_at_temperature_1():
    case, teacher, x = batch()
    student = case.leaves()
    given = tip.adakd(0.6, row_mask=x["mask"], rollout_ids=ROLLOUTS)
    seen = []

    def weigh(stats, row_mask, rollout_ids):
        seen.append((row_mask, rollout_ids))
        return W.TeacherConfidence()(stats, row_mask, rollout_ids)

    out = distill(student.head, teacher.head, row_weights=weigh, **given)
    out.loss.backward()
    ((mask, rollouts),) = seen
    assert torch.equal(mask, x["mask"]) and torch.equal(rollouts, ROLLOUTS)
    w = W.TeacherConfidence()(tip.token_stats(case.head, teacher.head), x["mask"], ROLLOUTS)
    again = case.leaves()
    plain = distill(again.head, teacher.head, row_weights=w, **given)
    plain.loss.backward()
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.hidden.grad, again.hidden.grad, rtol=1e-4, atol=1e-6)


def test_weights_and_the_weights_of_a_rule_multiply():
    case, teacher, _ = batch()
    rule = tip.EntropyGap(0.5, weighted=True)
    out = tip.distill(case.head, teacher.head, select=rule, row_weights=W.TeacherConfidence())
    w = W.TeacherConfidence()(tip.token_stats(case.head, teacher.head))[out.kept.row_ids]
    torch.testing.assert_close(out.plan.weight, (w * out.kept.row_weights).sum())


def test_weights_beside_a_label_loss_on_all_rows_weigh_the_divergence_alone():
    case, teacher, x = batch()
    on = {"labels": x["labels"], "ce_weight": 0.5, "ce_rows": "all", "select": tip.SoftOr(0.5)}
    ours = tip.distill(case.head, teacher.head, row_weights=W.TeacherConfidence(), **on)
    w = W.TeacherConfidence()(tip.token_stats(case.head, teacher.head))
    torch.testing.assert_close(ours.loss, tip.distill(case.head, teacher.head, row_weights=w, **on).loss)


def test_a_kept_row_whose_weight_is_nan_is_dropped_counted_and_warned_of():
    case, teacher, x = batch()
    labels = x["labels"]
    with pytest.warns(RuntimeWarning, match="NaN or infinite loss or weight"):
        out = tip.distill(case.head, teacher.head, select=tip.KeepAll(), labels=labels, row_weights=W.LogRatioSigmoid())
    assert int(out.plan.dropped_rows) == 1 and out.loss.isfinite()


def test_a_listed_teacher_is_weighed_by_what_it_tells():
    case, teacher, _ = batch()
    logp, ids = teacher.logits().float().log_softmax(1).topk(K)
    listed = tip.TopK(ids, logp)
    out = tip.distill(case.head, listed, select=tip.KeepAll(), row_weights=W.TeacherConfidence())
    w = W.TeacherConfidence()(tip.token_stats(case.head, listed))
    torch.testing.assert_close(out.plan.weight, w.sum())
    with pytest.raises(ValueError, match=r"^row_weights: expected one that needs no logits of the teacher, which is a"):
        tip.distill(case.head, listed, row_weights=W.DriftDecay())


def test_what_a_weight_reads_must_be_there_and_of_one_k():
    case, teacher, _ = batch()
    with pytest.raises(ValueError, match=r"^labels: expected int64 labels .* PrefixDecay reads them, got None"):
        tip.distill(case.head, teacher.head, row_weights=W.PrefixDecay())
    with pytest.raises(ValueError, match=r"^row_weights: expected the top_k of the rule.* 16, got int 4"):
        tip.distill(case.head, teacher.head, select=tip.Teachability(0.5), row_weights=W.DriftDecay(top_k=4))
    distill(case.head, teacher.head, select=tip.Teachability(0.5, top_k=4), row_weights=W.DriftDecay(top_k=4))
    with pytest.raises(ValueError, match=r"^sweeps: expected 2 or None.* weights known as early"):
        distill(
            case.leaves().head, teacher.head, select=tip.RandomRows(0.5), row_weights=W.TeacherConfidence(), sweeps=1
        )


def test_weights_get_no_gradient_and_make_none():
    case, teacher, _ = batch()
    student = case.leaves()

    def weigh(stats, row_mask, rollout_ids):
        assert not torch.is_grad_enabled()
        return stats.kl_rev

    tip.distill(student.head, teacher.head, row_weights=weigh).loss.backward()
    assert student.hidden.grad.isfinite().all()


# In divergence_loss


def test_divergence_loss_weighs_by_a_callable_of_its_statistics():
    stats, _ = measured()
    s, t = head_case(N, V, 8, 0).logits().float().requires_grad_(), head_case(N, V, 12, 1).logits().float()
    kept = tip.TopEntropy(0.4)(stats)
    ours = tip.divergence_loss(s, t, kept=kept, stats=stats, row_weights=W.PrefixDecay())
    right = tip.divergence_loss(s, t, kept=kept, stats=stats, row_weights=W.PrefixDecay()(stats))
    assert torch.equal(ours, right)
    masked = tip.divergence_loss(
        s, t, kept=kept, stats=stats, row_weights=lambda stats, *_: W.PrefixDecay()(stats, inputs()["mask"], ROLLOUTS)
    )
    assert not torch.equal(masked, right)
    with pytest.raises(ValueError, match=r"^stats: expected token_stats .* callable row_weights reads them, got None"):
        tip.divergence_loss(s, t, row_weights=W.PrefixDecay())
