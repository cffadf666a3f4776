"""The loss of kept rows of two sources with logits: its value from statistics, its gradient one sweep.

S kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels.backends.choice import backend_for
from tip_kernels.backends.eager import row_grad
from tip_kernels.learn import ops
from tip_kernels.learn.gradient_sweep import CrossEntropy, GradientSweep
from tip_kernels.learn.objective import GradOptions, Objective, RowsToLearn
from tip_kernels.learn.sweep import RowSweep
from tip_kernels.sources.pair import Pair
from tip_kernels.stats import IGNORE_LABEL


def differentiated(
    pair: Pair, objective: Objective, rows: RowsToLearn, options: GradOptions
) -> tuple[Tensor, GradientSweep]:
    """The (S,) loss of rows whose statistics are known, without a graph, and the sweep that is its gradient."""
    normalizers, divergence = rows.normalizers, objective.divergence
    tau, backend = objective.temperature_at(rows.ids), backend_for(pair.device)
    sweep = RowSweep(rows.ids, normalizers, tau, options.workspace, backend)
    sums = ops.row_sums(sweep, pair, [term for _, term in divergence.terms if term.class_b])
    value, terms = 0.0, []
    for weight, term in divergence.terms:
        row = {**rows.measured, **sums.get(term, {})}
        value = value + weight * term.value(row)
        terms.append(row_grad.Term(weight, term.gradient, term.params, term.scalars(row)))
    factor = objective.factor(rows.ids)
    factor = factor if isinstance(factor, Tensor) else torch.full_like(value, factor)
    limit = divergence.max_per_row
    if objective.divergence_weight_is_zero:  # the divergence matters no more, but a NaN row stays one
        loss = 0.0 * (normalizers["logsum_s"] + normalizers["logsum_t"])
    elif limit is not None:
        loss = value.clamp(max=limit) * factor
        factor = torch.where(value > limit, 0.0, factor)
    else:
        loss = value * factor
    ce = None if rows.at_one is None else CrossEntropy(objective.ce_weight, rows.at_one)
    reads_labels = ce is not None or any("label_factor" in term.rows for term in terms)
    labels = objective.labels[rows.ids] if reads_labels else None
    if ce is not None:
        loss = loss - ce.weight * torch.where(labels == IGNORE_LABEL, 0.0, ce.at_rows["logp_s"])
    masked = objective.divergence_weight_is_zero or limit is not None
    return loss, GradientSweep(sweep, options, terms, factor, torch.isfinite(loss), labels, ce, masked)
