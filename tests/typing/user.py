"""A user's script over every public name, which a type checker reads (pyright, standard) and test_typing.py runs."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import tip_kernels as tip


def heads() -> tuple[tip.Head, tip.Head]:
    student = tip.Head(torch.randn(2, 6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True), scale=0.5)
    return student, tip.Head(torch.randn(2, 6, 12), torch.randn(32, 12), softcap=30.0, vocab_size=32)


def measured(student: tip.Head, teacher: tip.Head, labels: Tensor) -> tip.TokenStats:
    stats = tip.token_stats(student, teacher, labels=labels, margins=True, top_k=16)
    assert_type(stats, tip.TokenStats)
    assert_type(stats.kl_rev, Tensor)
    per_row = [stats.lse_s, stats.lse_t, stats.entropy_s, stats.entropy_t, stats.kl_fwd, stats.hellinger_sq]
    per_row += [stats.margin_s, stats.margin_t, stats.logp_s, stats.logp_t, stats.mass_t_on_top_s]
    assert all(bool(x.isfinite().all()) for x in per_row) and stats.rank_t_of_argmax_s.shape == stats.agree.shape
    return stats


def rules(generator: torch.Generator) -> list[tip.Rule]:
    return [
        tip.KeepAll(), tip.TopEntropy(0.5), tip.TopDivergence(0.5, by="kl_fwd"), tip.SoftOr(4, normalize="minmax"),
        tip.Overconfident(0.5, entropy_below=("quantile", 0.5)), tip.SampleEntropy(0.5, generator=generator),
        tip.TopHellinger(0.5, scope="batch"), tip.TopMargin(0.5), tip.EntropyGap(0.5, weighted=True),
        tip.CrossEntropyRatio(0.5), tip.Teachability(0.5), tip.GreedyAgreement(5), tip.PositionPrefix(2),
        tip.PositionSuffix(2), tip.UntilDrift(by="kl_rev", n=2), tip.FilterRollouts("kl_rev", 0.5) & tip.SoftOr(0.5),
        tip.RandomRows(0.5, generator=generator), tip.Threshold("kl_rev", above=0.0),
    ]  # fmt: skip


def divergences() -> list[tip.Divergence]:
    return [
        tip.ForwardKL(), tip.ReverseKL(), tip.Jeffreys(), tip.JSD(0.3), tip.SkewForwardKL(0.1), tip.SkewReverseKL(0.1),
        tip.TVD(), tip.HellingerSq(), tip.Renyi(0.5), tip.AlphaBeta(0.2, 0.7), tip.ToDi(), tip.SampledReverseKL(5.0),
        (0.5 * tip.ForwardKL() + tip.ReverseKL() * 0.5).clipped(10.0), tip.Gated.eopd(0.8),
        tip.Gated({tip.ForwardKL(): 0.5, tip.TVD(): torch.rand(2, 6), tip.JSD(): tip.weights.Indicator("kl_rev", 0.1)}),
        tip.Gated({tip.ReverseKL(): lambda stats, row_mask, rollout_ids: stats.entropy_t}).clipped(10.0),
    ]  # fmt: skip


def selected(stats: tip.TokenStats, mask: Tensor, rule: tip.Rule) -> tip.Kept:
    kept = rule(stats, mask)
    assert_type(kept, tip.Kept)
    assert_type(kept.row_ids, Tensor)
    assert_type(kept.row_weights, Tensor | None)
    return kept


def learned() -> None:
    """divergence_loss by every divergence, distill by every rule."""
    student, teacher = heads()
    labels, mask = torch.randint(32, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    stats = measured(student, teacher, labels)
    kept = selected(stats, mask, tip.SoftOr(0.5))
    assert_type(tip.quadrants(stats, mask), Tensor)
    for divergence in divergences():
        loss = tip.divergence_loss(student, teacher, divergence=divergence, kept=kept, stats=stats)
        assert_type(loss, Tensor)
        loss.sum().backward()
    for rule in rules(torch.Generator().manual_seed(0)):
        out = tip.distill(student, teacher, select=rule, row_mask=mask, labels=labels, ce_weight=0.1)
        assert_type(out, tip.Distilled)
        assert_type(out.plan, tip.Plan)
        out.loss.backward()
    how = tip.Execution(sweeps=2, full_stats=True, grad_filter=tip.GradFilter(1e-6))
    with tip.backend("eager"):
        tip.distill(student, teacher, divergence=tip.JSD(), execution=how).loss.backward()


def weighed() -> None:
    """Rows weighed by what a paper computes of their statistics, as distill asks for it and by hand."""
    student, teacher = heads()
    labels = torch.randint(32, (2, 6))
    by_position: list[tip.weights.Weight] = [tip.weights.TeacherConfidence(floor=0.2), tip.weights.PositionDecay(8.0)]
    for weigh in by_position:
        tip.distill(student, teacher, labels=labels, row_weights=weigh).loss.backward()
        assert_type(weigh(tip.token_stats(student, teacher), torch.ones(2, 6, dtype=torch.bool)), Tensor)


def adakd() -> None:
    """AdaKD: the ratio of kept rows follows the loss, each row has a temperature of its own."""
    student, teacher = heads()
    mask, focus = torch.ones(2, 6, dtype=torch.bool), tip.AdaptiveFocus(warmup=2)
    out = tip.distill(student, teacher, divergence=tip.ReverseKL(), **tip.adakd(focus, row_mask=mask))
    out.loss.backward()
    assert_type(tip.difficulty_temperature(out.stats, mask), Tensor)
    focus.update(float(out.loss.detach()))
    tip.AdaptiveFocus().load_state_dict(focus.state_dict())


def other_teachers() -> None:
    """A list of top tokens, whole logits, a student alone, and a choice over the micro-batches of a step."""
    student, teacher = heads()
    logp, ids = torch.randn(2, 6, 32).log_softmax(-1).topk(4)
    tip.distill(student, tip.TopK(ids, logp, tail="bucket"), divergence=tip.ForwardKL()).loss.backward()
    described = [None, {3: -0.5, 7: -1.5}, {1: -0.25}]
    assert_type(tip.TopK.from_prompt_logprobs(described, 2), tip.TopK)
    logits = torch.randn(2, 6, 32, requires_grad=True)
    tip.divergence_loss(logits, torch.randn(2, 6, 32)).sum().backward()
    assert_type(tip.token_importance(student=student, teacher=teacher), Tensor)
    assert_type(tip.token_stats(student).entropy_s, Tensor)
    step = tip.StepSelection(tip.SoftOr(0.5))
    with torch.no_grad():
        step.measure(student, teacher)
    for part in step.parts():
        tip.distill(student, teacher, **part).loss.backward()


if __name__ == "__main__":
    torch.manual_seed(0)
    learned()
    weighed()
    adakd()
    other_teachers()
    print(tip.__version__, len(tip.__all__))
