"""MEASURE, SELECT and LEARN in one call: what a training loop uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flag, flat_rows
from tip_kernels.distillation.batch import Batch
from tip_kernels.distillation.one_sweep import KnownRows, SecondSweepByRows
from tip_kernels.distillation.options import Execution, Plan
from tip_kernels.distillation.stash import StashedRows
from tip_kernels.distillation.strategy import Learned, SecondSweep, Step, Strategy
from tip_kernels.learn.divergence_loss import check_divergence
from tip_kernels.learn.divergences import Divergence, ReverseKL
from tip_kernels.learn.head_gradients import existing_grad_buffer
from tip_kernels.learn.objective import GradOptions, Objective
from tip_kernels.select.rule import Kept, Rule, spans_ranks
from tip_kernels.select.tip import SoftOr
from tip_kernels.sources.head import Head, HeadRows
from tip_kernels.sources.pair import Request
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import LABEL_FIELDS, TOP_FIELDS, TokenStats

Temperature = float | Tensor | Callable[[TokenStats], Tensor]

STRATEGIES: tuple[Strategy, ...] = (KnownRows(), StashedRows(), SecondSweepByRows(), SecondSweep())


class Distilled(NamedTuple):
    """What distill returns.

    Attributes:
        loss: () fp32.
        stats: What was measured of each row.
        kept: The rows that were learned from.
        plan: How it was done.
    """

    loss: Tensor
    stats: TokenStats
    kept: Kept
    plan: Plan


def distill(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK,
    *,
    select: Rule = SoftOr(0.5),  # noqa: B008 (rules, divergences and settings are frozen)
    divergence: Divergence = ReverseKL(),  # noqa: B008
    row_mask: Tensor | None = None,
    rollout_ids: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    temperature: Temperature = 1.0,
    temperature_sq: bool = False,
    normalizer: str | float = "kept",
    workspace_mib: float = 256,
    execution: Execution = Execution(),  # noqa: B008
) -> Distilled:
    """Measures all rows, keeps those that the rule chooses, and returns a loss on them.

        loss = sum_kept w_i D(teacher_i, student_i) / normalizer            w = row_weights * the rule's own weights

    The gradient flows to the student's source only. Nothing kept: a 0 that is connected to the graph. A kept row whose
    loss is NaN or infinite gets weight 0, is counted in plan.dropped_rows, and on a CPU warned of once. Does not
    synchronize between measuring and backward for a rule with a quota, unless of scope "global"; rollout_ids on a GPU
    are counted once before. Method: measure, select, learn; TIP (arXiv 2604.14084).

    Args:
        student: Logits (N, V) or (B, T, V), or a Head.
        teacher: Likewise, or a TopK, at temperature 1.
        select: The rule that chooses rows.
        divergence: What is learned.
        row_mask: bool (N,) or (B, T): True for trainable tokens. Others are never kept; with a mask on the CPU they are
            not measured either and are NaN in the statistics.
        rollout_ids: int64 (N,) or (B, T): the rollout of each row; without them a (B, T) batch holds B rollouts.
        labels: int64 (N,) or (B, T), -100 for none: the token each row predicts; for rules that read logp, for
            SampledReverseKL and for ce_weight.
        ce_weight: In [0, 1]: mixes a label loss at temperature 1 from the same sweep,
            ce_weight * CE + (1 - ce_weight) * D; CE is 0 in a row without a label.
        row_weights: float (N,) or (B, T).
        temperature: A positive float, a float tensor (N,) or (B, T), or a callable `stats -> (N,)`: rows are then
            measured at 1.0 and learned at what it returns, detached (AdaKD). Divides both models' logits.
        temperature_sq: Multiplies each row's divergence by its temperature squared.
        normalizer: "kept" = sum of w (the number of kept rows without weights), "all" = unmasked rows that no
            measurement found NaN, or a positive number. With a rule of scope "global" both are of all ranks, so that
            the ranks' losses add up to that of one process. DDP and FSDP average gradients over the ranks: multiply the
            loss by their number.
        workspace_mib: MiB that the call may use beyond inputs, gradients and (N,) tensors; a Head's backward holds
            d(hidden) of the kept rows once more, in fp32.
        execution: How the work is done: see Execution.

    Returns:
        (loss, stats, kept, plan). Statistics that neither the rule nor the loss needs are not measured; where the rule
        needs none of the teacher, the teacher's are NaN in rows that were not kept.

    Raises:
        ValueError: Naming the argument.
    """
    adaptive = callable(temperature)
    request = Request.checked(
        student, teacher, labels=labels, temperature=1.0 if adaptive else temperature, row_mask=row_mask,
        rollout_ids=rollout_ids, workspace_mib=workspace_mib,
    )  # fmt: skip
    pair = request.pair
    _check(select, divergence, request, ce_weight, normalizer, temperature)
    flag("temperature_sq", temperature_sq)
    expect(isinstance(execution, Execution), "execution", "a tip_kernels.Execution", execution)
    sweeps = execution.sweeps_for(pair)
    if row_weights is not None:
        row_weights = flat_rows("row_weights", row_weights, pair.student.batch_shape, FLOATS, pair.device)
    weight_into = None
    if execution.backward and isinstance(pair.student, HeadRows):
        weight_into = existing_grad_buffer(pair.student.weight)
    batch = Batch(request)
    step = Step(
        batch, select, Objective(divergence, request.temperature, request.labels, ce_weight, temperature_sq),
        GradOptions(request.workspace, weight_into=weight_into, grad_filter=execution.grad_filter), row_weights,
        normalizer, temperature if adaptive else None, sweeps, execution.full_stats, execution.grad_scale,
    )  # fmt: skip
    strategy = next(strategy for strategy in STRATEGIES if _fits(strategy, step))
    learned = strategy.run(step)
    loss, dropped = _reduced(learned, step)
    if execution.backward:
        if loss.requires_grad:
            scale = None if learned.gradients is not None else execution.grad_scale
            loss.backward(None if scale is None else torch.as_tensor(scale, device=loss.device).float())
        loss = loss.detach()
    return Distilled(loss, learned.stats, learned.kept, Plan(strategy.name, batch.units, workspace_mib, *dropped))


def _fits(strategy: Strategy, step: Step) -> bool:
    if step.sweeps == 1 and strategy.name != "one sweep":
        raise ValueError(
            "sweeps: expected 2 or None, since one sweep takes a student's whole Head that needs a gradient, a teacher "
            "with logits, a temperature known beforehand, a rule known beforehand or with a quota and no generator "
            f"(the latter on a CPU), and whole rows of logits within workspace_mib; got 1 for {step.select}"
        )
    return strategy.fits(step)


def _reduced(learned: Learned, step: Step) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss () with its gradients, and how many rows were kept and how many of them dropped."""
    usable = learned.real & torch.isfinite(learned.losses.detach())
    w = torch.where(usable, step.weights(learned.ids, learned.real, learned.kept), 0.0)
    total = step.batch.normalizer(step.normalizer, w, step.select)
    loss = (w * torch.where(usable, learned.losses, 0.0)).sum() / total
    if learned.gradients is not None:
        loss = learned.gradients.attach(loss, w, total, step.batch.pair)
    dropped = (learned.real & ~usable).sum()
    if dropped.device.type == "cpu" and not torch.compiler.is_compiling() and int(dropped):
        warnings.warn(
            "tip_kernels.distill: a kept row has a NaN or infinite divergence and got weight 0; "
            "plan.dropped_rows counts such rows in every call",
            RuntimeWarning,
            stacklevel=3,
        )
    return loss, (learned.real.sum(), dropped)


def _check(
    select: object, divergence: object, request: Request, ce_weight: object, normalizer: object, temperature: object
) -> None:
    """Refuses what does not go together."""
    pair = request.pair
    expect(isinstance(select, Rule), "select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
    check_divergence(divergence, pair)
    if pair.shard is not None and spans_ranks(select) and select.group is None:
        raise ValueError(
            "select: expected a group beside scope 'global', that of the ranks with rows of their own, since those of "
            "the student's vocab_group have the same, got None"
        )
    if pair.topk is not None:
        expect(
            not callable(temperature),
            "temperature",
            "1.0, at which the teacher's TopK gives its log-probabilities",
            temperature,
        )
        ok = not select.needs & ({"margin_t", "agree", "lse_t"} | TOP_FIELDS)
        expect(ok, "select", "a rule that needs no logits of the teacher, which is a TopK", select)
    expect(0 <= finite_number("ce_weight", ce_weight) <= 1, "ce_weight", "a number in [0, 1]", ce_weight)
    if request.labels is None and (ce_weight or (divergence.needs | select.needs) & LABEL_FIELDS):
        reader = "ce_weight" if ce_weight else type(divergence if divergence.needs & LABEL_FIELDS else select).__name__
        raise ValueError(f"labels: expected int64 labels of the rows, since {reader} reads them, got None")
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and 0 < normalizer < math.inf
    expect(number or normalizer in ("kept", "all"), "normalizer", "'kept', 'all' or a number above 0", normalizer)
