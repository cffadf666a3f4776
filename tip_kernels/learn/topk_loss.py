"""The loss of kept rows beside a TopK: a divergence of the outcomes, whose gradient one sweep spreads.

    dz_k = g_k   for one of the K tokens         dz_v = g_rest exp(z_v) / sum over the rest of exp z   for any other

S kept rows, R rows of a block, K tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_kernels._checks import not_none
from tip_kernels.learn import ops
from tip_kernels.learn.divergences import Divergence, exp, log_probabilities
from tip_kernels.learn.gradient_sweep import (
    Balance,
    GradOptions,
    LeafSweep,
    Objective,
    RowsToLearn,
    RowSweep,
    differentiated,
    swept_sums,
    with_gradient,
)
from tip_kernels.measure import ops as measure_ops
from tip_kernels.measure import sweep as measuring
from tip_kernels.measure.topk_teacher import add_columns, hide_columns, partial_divergence, student_outcomes
from tip_kernels.sources.pair import LogitRows, Pair, Rows
from tip_kernels.sources.topk import TopKRows
from tip_kernels.stats import IGNORE_LABEL


def outcome_loss(pair: Pair, topk: TopKRows, objective: Objective, rows: RowsToLearn, options: GradOptions) -> Tensor:
    """The (S,) loss of rows whose outcomes were measured, with its backward attached."""
    measured, divergence = rows.measured, objective.divergence
    logits = student_outcomes(measured)
    labels = None if rows.at_one is None else objective.labels_at(rows.ids)
    if rows.at_one is not None:  # one column more: the label's logit
        label_logit = rows.at_one["logp_s"] + measured["logsum_s"]
        logits = torch.cat([logits, torch.where(labels == IGNORE_LABEL, 0.0, label_logit).unsqueeze(1)], 1)
    rest = {"shift_rest": measured["shift_rest"]}
    rest["logsum_rest"] = measured["logsum_rest"].nan_to_num(nan=torch.nan, neginf=0.0)
    sweep = RowSweep(rows.ids, rest, 1.0, options.workspace, pair.backend)
    logits = with_gradient(logits, OutcomeSweep(sweep, options, topk.ids[rows.ids], labels), pair)

    n_outcomes = topk.ids.shape[1] + 1
    y = logits[:, :n_outcomes]
    lp_t = topk.log_outcomes(rows.ids, pair.vocab, y[:, -1].isneginf())
    invalid = (y.isnan() | lp_t.isnan().any(1, keepdim=True)).any(1)
    y, lp_t = [x.masked_fill(invalid.unsqueeze(1), 0.0) for x in (y, lp_t)]  # no NaN meets the 0 of its gradient
    gates = objective.gates_at(rows.ids)
    if topk.tail == "ignore":
        loss = _partial(divergence.terms, gates, y, lp_t)
        loss = loss if divergence.max_per_row is None else loss.clamp(max=divergence.max_per_row)
    else:
        loss = _whole(
            Pair(LogitRows(y[:, : lp_t.shape[1]]), LogitRows(lp_t)), Objective(divergence, gates=gates), options
        )
    if objective.divergence_weight_is_zero:
        loss = torch.zeros_like(loss)
    else:
        loss = loss * objective.factor(rows.ids, loss.detach())
    if rows.at_one is not None:
        cross_entropy = y.logsumexp(1) - logits[:, n_outcomes]
        loss = loss + objective.ce_weight * torch.where(labels == IGNORE_LABEL, 0.0, cross_entropy)
    return loss.masked_fill(invalid, torch.nan)


def _partial(terms: Sequence[tuple[float, Divergence]], gates: tuple[Tensor, ...], y: Tensor, lp_t: Tensor) -> Tensor:
    """The (S,) sum of the terms, each a sum that stops at the K tokens, differentiable in the outcomes' logits y."""
    total = torch.zeros_like(y[:, 0])
    for i, (weight, term) in enumerate(terms):
        if not gates:
            total = total + weight * partial_divergence(not_none(term.kernel), y, lp_t)
            continue
        out = (gates[i] == 0).unsqueeze(1)  # where the term is left out, it is one of rows that agree
        value = partial_divergence(
            not_none(term.kernel), y.masked_fill(out, 0.0), lp_t.masked_fill(out, -math.log(y.shape[1]))
        )
        total = total + weight * gates[i] * value
    return total


def _whole(outcomes: Pair, objective: Objective, options: GradOptions) -> Tensor:
    """The loss of every row of a pair of outcomes' logits, differentiable in the student's."""
    every = torch.arange(outcomes.n_rows, device=outcomes.device)
    compiling = torch.compiler.is_compiling()
    measure = measure_ops.measure if compiling else measuring.measure
    measured = measure(outcomes, objective.divergence.needs, workspace=options.workspace)
    rows, sums_of = RowsToLearn(every, measured), ops.swept_sums if compiling else swept_sums
    loss, sweep = differentiated(outcomes, objective, rows, GradOptions(options.workspace), sums_of)
    return with_gradient(loss, sweep, outcomes)


@dataclass(frozen=True)
class OutcomeSweep(LeafSweep):
    """The gradient of sum upstream * logits of outcomes; upstream is (S, K + 1), with one column more for labels.

    The normalizers of its sweep are those of the rest, over which the gradient of column K is spread.
    """

    topk_ids: Tensor  # (S, K)
    labels: Tensor | None  # (S,)

    def live(self, upstream: Tensor) -> Tensor:
        return (upstream != 0).any(1)

    def restricted_to(self, places: Tensor) -> OutcomeSweep:
        labels = None if self.labels is None else self.labels[places]
        return replace(self, sweep=self.sweep.restricted_to(places), topk_ids=self.topk_ids[places], labels=labels)

    def dlogits_tile(
        self,
        student: Rows,
        z: list[Tensor],
        part: slice,
        v0: int,
        upstream: Tensor,
        dead: Tensor | None,
        balance: Balance | None,
    ) -> Tensor:
        (tile,), up = z, upstream[part] * student.scale
        topk_ids, k = self.topk_ids[part], self.topk_ids.shape[1]
        slope = None if student.softcap is None else 1 - (tile / student.softcap).square_()
        hide_columns(tile, topk_ids, v0)
        rest = self.sweep.columns_at(part)
        g = exp(log_probabilities(tile, rest["shift_rest"], rest["logsum_rest"]))
        g.mul_(up[:, k : k + 1])
        add_columns(g, topk_ids, v0, up[:, :k])
        if self.labels is not None:
            add_columns(g, self.labels[part].unsqueeze(1), v0, up[:, k + 1 :])
        if slope is not None:
            g.mul_(slope)
        return g if dead is None else g.masked_fill_(dead[part], 0.0)
