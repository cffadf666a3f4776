"""MEASURE, SELECT and LEARN in one call: what a training loop uses.

Four ways to distill a batch, in the order in which they are tried:

    known rows           the rule reads nothing: rows are measured and learned from block by block        one sweep
    stashed rows         a quota: likely rows are learned from before the rule has seen all               one sweep
    second sweep by rows the kept rows are projected once more, measured and learned from at a time       two sweeps
    second sweep         the gradient sweep over kept rows, in backward                                   two sweeps

N rows, S kept rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flat_rows, refuse
from tip_kernels.backends.products import LIBRARY
from tip_kernels.distillation.one_sweep import KnownRows, Layout, Learned, SecondSweepByRows, StashedRows
from tip_kernels.distillation.options import Execution, Plan
from tip_kernels.distributed import collectives
from tip_kernels.learn.divergence_loss import measured_at, needs_of, row_loss
from tip_kernels.learn.divergences import Divergence, ReverseKL, check_beside_topk
from tip_kernels.learn.gated import check_needs, gates_of, readers_of, statistics_read
from tip_kernels.learn.gradient_sweep import GradOptions, Objective, RowsToLearn
from tip_kernels.measure import ops, sweep
from tip_kernels.select.rule import KeepAll, Kept, Rule, SoftOr, spans_ranks
from tip_kernels.sources.pair import Head, HeadRows, Pair, Request, row_temperature
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import (
    BEYOND_TOPK,
    IGNORE_LABEL,
    LABEL_FIELDS,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    TOP_FIELDS,
    Blend,
    Fields,
    TokenStats,
)

T = TypeVar("T")
Temperature = float | Tensor | Callable[[TokenStats], Tensor]
RowWeights = Tensor | Callable[[TokenStats, Tensor, Tensor | None], Tensor]


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
    ce_rows: str = "kept",
    row_weights: RowWeights | None = None,
    temperature: Temperature = 1.0,
    temperature_sq: bool = False,
    normalizer: str | float = "kept",
    workspace_mib: float = 256,
    execution: Execution = Execution(),  # noqa: B008
) -> Distilled:
    """Measures all rows, keeps those that the rule chooses, and returns a loss on them.

        loss = sum_kept w_i D(teacher_i, student_i) / normalizer            w = row_weights * the rule's own weights

    The gradient flows to the student's source, and to row_weights. Nothing kept: a 0 that is connected to the graph. A
    kept row whose loss or weight is NaN or infinite gets weight 0, is counted in plan.dropped_rows, and on a CPU warned
    of once. Does not synchronize between measuring and backward for a rule with a quota, unless of scope "global";
    rollout_ids on a GPU are counted once before. Method: measure, select, learn; TIP (arXiv 2604.14084).

    Args:
        student: Logits (N, V) or (B, T, V), or a Head.
        teacher: Likewise, or a TopK, at temperature 1.
        select: The rule that chooses rows.
        divergence: What is learned; a Gated's gates are called as row_weights are.
        row_mask: bool (N,) or (B, T): True for trainable tokens. Others are never kept; with a mask on the CPU they are
            not measured either and are NaN in the statistics.
        rollout_ids: int64 (N,) or (B, T): the rollout of each row; without them a (B, T) batch holds B rollouts.
        labels: int64 (N,) or (B, T), -100 for none: the token each row predicts; for rules that read logp, for
            SampledReverseKL and for ce_weight.
        ce_weight: In [0, 1]: mixes a label loss at temperature 1 from the same sweep,
            ce_weight * CE + (1 - ce_weight) * D; CE is 0 in a row without a label.
        ce_rows: "kept", or "all": CE is then its plain mean over all labelled, unmasked rows beside the divergence on
            kept ones, as the training scripts of AdaKD and ToDi have it (R41). That is a loss of its own over those
            rows: one more forward and backward product of the student's head for each.
        row_weights: float (N,) or (B, T), which gets a gradient where it requires one; or a callable
            `(stats, row_mask, rollout_ids) -> (N,)` without a graph, such as those of tip_kernels.weights: what its
            `needs` name is measured of all rows (without that attribute: both lse, entropies and KLs, hellinger_sq and
            what labels add), at 1.0 where the temperature is a callable.
        temperature: A positive float, a float tensor (N,) or (B, T), or a callable `stats -> (N,)`: rows are then
            measured at 1.0 and learned at what it returns, detached (AdaKD). Divides both models' logits.
        temperature_sq: Multiplies each row's divergence by its temperature squared.
        normalizer: "kept" = sum of w (the number of kept rows without weights), "all" = unmasked rows that no
            measurement found NaN, or a positive number. With a rule of scope "global" both are of all ranks, so that
            the ranks' losses add up to that of one process. DDP and FSDP average gradients over the ranks: multiply the
            loss by their number.
        workspace_mib: MiB that the call may use beyond inputs, gradients and (N,) tensors; a Head's backward holds
            d(hidden) of the kept rows once more, in fp32, and for a 16-bit weight that learns half as much again.
        execution: How the work is done: see Execution.

    Returns:
        (loss, stats, kept, plan). Statistics that neither the rule nor the loss needs are not measured; where the rule
        needs none of the teacher, the teacher's are NaN in rows that were not kept.

    Raises:
        ValueError: Naming the argument.
    """
    if ce_rows not in ("kept", "all"):
        refuse("ce_rows", "'kept' or 'all'", ce_rows)
    if ce_rows == "all" and ce_weight:
        how = {"row_mask": row_mask, "labels": labels, "workspace_mib": workspace_mib, "execution": execution}
        choice = {"select": select, "rollout_ids": rollout_ids, "row_weights": row_weights, "normalizer": normalizer}
        loss = {"divergence": divergence, "temperature": temperature, "temperature_sq": temperature_sq}
        return _with_ce_of_all_rows(student, teacher, ce_weight, how, choice | loss)
    adaptive = callable(temperature)
    request = Request.checked(
        student, teacher, labels=labels, temperature=1.0 if adaptive else temperature, row_mask=row_mask,
        rollout_ids=rollout_ids, workspace_mib=workspace_mib,
    )  # fmt: skip
    pair = request.pair
    _check(select, divergence, request, ce_weight, normalizer, temperature)
    if not isinstance(temperature_sq, bool):
        refuse("temperature_sq", "a bool", temperature_sq)
    sweeps = _sweeps_for(pair, execution)
    _check_readers(row_weights, divergence, select, request)
    if row_weights is not None and not callable(row_weights):
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
    learned, how = _learned(step)
    loss, dropped = _reduced(learned, step)
    if execution.backward:
        if loss.requires_grad:
            scale = None if learned.gradients is not None else execution.grad_scale
            loss.backward(None if scale is None else torch.as_tensor(scale, device=loss.device).float())
        loss = loss.detach()
    products = LIBRARY.get(pair.device.type, "torch")
    return Distilled(loss, learned.stats, learned.kept, Plan(how, batch.units, workspace_mib, *dropped, products))


def _with_ce_of_all_rows(
    student: Tensor | Head, teacher: Tensor | Head | TopK, ce_weight: float, how: dict[str, Any], rest: dict[str, Any]
) -> Distilled:
    """The divergence of kept rows and the label loss of all, each as a loss of its own, and their sum."""
    expect(0 <= finite_number("ce_weight", ce_weight) <= 1, "ce_weight", "a number in [0, 1]", ce_weight)
    labels, mask, execution, normalizer = how["labels"], how["row_mask"], how["execution"], rest["normalizer"]
    expect(labels is not None, "labels", "int64 labels of the rows, since ce_weight reads them", labels)
    expect(isinstance(normalizer, str), "normalizer", "'kept' or 'all' beside ce_rows='all'", normalizer)
    if not isinstance(execution, Execution):
        refuse("execution", "a tip_kernels.Execution", execution)
    expect(not execution.backward, "execution", "backward=False beside ce_rows='all', whose losses are two", execution)
    out = distill(student, teacher, **how, **rest)
    labelled = labels.to(out.kept.mask.device if mask is None else mask.device).reshape(-1) != IGNORE_LABEL
    mask = labelled if mask is None else labelled & mask.reshape(-1)
    how = how | {"row_mask": mask, "execution": replace(execution, full_stats=False)}
    ce = distill(student, teacher, **how, select=KeepAll(), divergence=rest["divergence"], ce_weight=1.0)
    loss = ce.loss
    if spans_ranks(rest["select"]):  # then the divergence's mean is over all ranks, too
        total = collectives.total(ce.plan.weight, rest["select"].group)
        loss = loss * ce.plan.weight / torch.where(total == 0, 1.0, total)
    plan = replace(out.plan, units=out.plan.units + ce.plan.units)
    return out._replace(loss=(1 - ce_weight) * out.loss + ce_weight * loss, plan=plan)


def _learned(step: Step) -> tuple[Learned, str]:
    """What the first strategy that fits leaves, and its name."""
    for strategy in STRATEGIES:
        layout = strategy.fits(step)
        if layout is not None:
            return strategy.run(step, layout), strategy.name
    if step.sweeps == 1:
        raise ValueError(
            "sweeps: expected 2 or None, since one sweep takes a student's whole Head that needs a gradient, a teacher "
            "with logits, a temperature known beforehand, a rule known beforehand or with a quota and no generator "
            "(the latter on a CPU), weights known as early, gates that read no statistics, and whole rows of logits "
            f"within workspace_mib; got 1 for {step.select}"
        )
    return _second_sweep(step), "two sweeps"


def _sweeps_for(pair: Pair, execution: Execution) -> int | None:
    """The sweeps asked for, where the pair and the moment allow what is asked; else a ValueError."""
    if not isinstance(execution, Execution):
        refuse("execution", "a tip_kernels.Execution", execution)
    if execution.grad_filter is not None and pair.shard is not None:
        raise ValueError("grad_filter: expected None with a vocab_group, since its correction needs the whole head")
    if not torch.compiler.is_compiling():
        return execution.sweeps
    expect(execution.sweeps != 1, "sweeps", "2 or None under torch.compile", execution.sweeps)
    expect(execution.backward is False, "backward", "False under torch.compile", execution.backward)
    if execution.grad_filter is not None:
        raise ValueError("grad_filter: expected None under torch.compile, got a GradFilter")
    return 2


def _reduced(learned: Learned, step: Step) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss () with its gradients, how many rows were kept, how many of them dropped, and what the rest weigh."""
    w, finite = step.weights(learned.ids, learned.real, learned.kept)
    usable = learned.real & finite & torch.isfinite(learned.losses.detach())
    w = torch.where(usable, w, 0.0)
    total = step.batch.normalizer(step.normalizer, w, step.select)
    loss = (w * torch.where(usable, learned.losses, 0.0)).sum() / total
    if learned.gradients is not None:
        loss = learned.gradients.attach(loss, w, total, step.batch.pair)
    dropped = (learned.real & ~usable).sum()
    if dropped.device.type == "cpu" and not torch.compiler.is_compiling() and int(dropped):
        warnings.warn(
            "tip_kernels.distill: a kept row has a NaN or infinite loss or weight and got weight 0; "
            "plan.dropped_rows counts such rows in every call",
            RuntimeWarning,
            stacklevel=3,
        )
    return loss, (learned.real.sum(), dropped, w.sum())


def _check(
    select: object, divergence: object, request: Request, ce_weight: object, normalizer: object, temperature: object
) -> None:
    """Refuses what does not go together."""
    pair = request.pair
    if not isinstance(select, Rule):
        refuse("select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
    if not isinstance(divergence, Divergence):
        refuse("divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    if pair.shard is not None and spans_ranks(select) and select.group is None:
        raise ValueError(
            "select: expected a group beside scope 'global', that of the ranks with rows of their own, since those of "
            "the student's vocab_group have the same, got None"
        )
    if pair.topk is not None:
        check_beside_topk(divergence, pair.topk.tail)
        _check_beside_topk(select, temperature)
    if not isinstance(ce_weight, float) or not 0 <= ce_weight <= 1:
        ok = 0 <= finite_number("ce_weight", ce_weight) <= 1
        expect(ok, "ce_weight", "a number in [0, 1]", ce_weight)
    if request.labels is None and (ce_weight or (divergence.needs | select.needs) & LABEL_FIELDS):
        reader = "ce_weight" if ce_weight else type(divergence if divergence.needs & LABEL_FIELDS else select).__name__
        raise ValueError(f"labels: expected int64 labels of the rows, since {reader} reads them, got None")
    _check_normalizer(normalizer)


def _check_beside_topk(select: Rule, temperature: object) -> None:
    if callable(temperature):
        refuse("temperature", "1.0, at which the teacher's TopK gives its log-probabilities", temperature)
    if select.needs & BEYOND_TOPK:
        refuse("select", "a rule that needs no logits of the teacher, which is a TopK", select)


def _check_readers(row_weights: object, divergence: Divergence, select: Rule, request: Request) -> None:
    """Refuses a callable row_weights, and gates, whose needs cannot be measured here."""
    readers: list[tuple[str, Any]] = [("row_weights", row_weights)] if callable(row_weights) else []
    if divergence.term_gates:
        readers += [("divergence", gate) for gate in readers_of(divergence)]
    if not readers:
        return
    lists = [getattr(select, "top_k", 0)] if select.needs & TOP_FIELDS else []
    for name, reader in readers:
        check_needs(name, reader)
        needs = getattr(reader, "needs", frozenset())
        if request.labels is None and needs & LABEL_FIELDS:
            kind = type(reader).__name__
            raise ValueError(f"labels: expected int64 labels of the rows, since {kind} reads them, got None")
        if request.pair.topk is not None and needs & BEYOND_TOPK:
            refuse(name, "one that needs no logits of the teacher, which is a TopK", reader)
        if needs & TOP_FIELDS:
            lists.append(getattr(reader, "top_k", 0))
            if lists[-1] != lists[0]:
                refuse(name, "the top_k of the rule, since one sweep measures one, {}", lists[-1], lists[0])


def _check_normalizer(normalizer: object) -> None:
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and 0 < normalizer < math.inf
    if not number and normalizer not in ("kept", "all"):
        refuse("normalizer", "'kept', 'all' or a number above 0", normalizer)


def existing_grad_buffer(weight: Tensor) -> Tensor | None:
    """Where gradients of a leaf are summed up: its main_grad (as Megatron has it), else its .grad; None where there is
    none yet, or where somebody else wants to see each gradient first."""
    target = getattr(weight, "main_grad", None)
    target = weight.grad if target is None else target
    watched = weight._backward_hooks or weight._post_accumulate_grad_hooks
    plain = weight.is_leaf and weight.requires_grad and type(weight) in (Tensor, torch.nn.Parameter) and not watched
    if not plain or not isinstance(target, Tensor):
        return None
    fits = target.shape == weight.shape and type(target) in (Tensor, torch.nn.Parameter)
    return target.detach() if fits and target.layout == torch.strided else None


class Batch:
    """The rows of one distill call: which are measured, which were found invalid, and how many products that took."""

    def __init__(self, request: Request) -> None:
        pair = request.pair
        self.pair, self.labels, self.workspace = pair, request.labels, request.workspace
        self.n_rows = pair.n_rows
        self.n_rollouts = math.prod(pair.student.batch_shape[:-1])
        self.rollout_ids = request.rollout_ids
        if isinstance(request.rollout_ids, Tensor) and request.rollout_ids.device == pair.device:
            # on a GPU the one wait, before anything is measured; a graph cannot wait and takes the most there may be
            compiling = torch.compiler.is_compiling()
            self.n_rollouts = self.n_rows if compiling else torch.unique(request.rollout_ids).numel()
        self.units = 0.0
        self.top_k = 0
        self.trainable: Tensor | None = None  # ids of unmasked rows, where the host can know them without waiting
        row_mask = self.given_mask = request.row_mask
        if row_mask is None:
            row_mask = torch.ones(self.n_rows, dtype=torch.bool, device=pair.device)
        elif row_mask.device.type == "cpu":
            self.trainable = row_mask.nonzero().squeeze(1).to(pair.device)
        self.row_mask = row_mask.to(pair.device)
        if self.given_mask is not None:
            self.given_mask = self.row_mask
        self.valid_rows = self.row_mask  # unmasked rows without those that a measurement found NaN

    def wanted(
        self, rule: Rule, readers: tuple[Any, ...], divergence: Divergence, everything: bool
    ) -> tuple[frozenset[str | Blend], bool]:
        """The fields that the rule and other readers read, with those of the loss where they come with them.

        Returns them, and whether they are of both models.
        """
        for reader in (rule, *readers):
            if getattr(reader, "needs", frozenset()) & TOP_FIELDS:
                self.top_k = getattr(reader, "top_k", 0)  # that of all
        want: frozenset[str | Blend] = rule.needs.union(*map(statistics_read, readers))
        want = want | (STUDENT_FIELDS | TEACHER_FIELDS if everything else frozenset())
        with_teacher = bool(want - STUDENT_FIELDS - {"margin_s", "logp_s"})
        if self.labels is not None and want:
            want = want | (LABEL_FIELDS if with_teacher else {"logp_s"})
        if with_teacher:
            want = want | divergence.needs
        return want, with_teacher

    def measure_for(self, want: frozenset[str | Blend], temperature: float | Tensor, with_teacher: bool) -> TokenStats:
        """The wanted statistics of all rows that may be kept."""
        measured = self.measure(self.trainable, want, temperature, with_teacher) if want else {}
        if self.trainable is not None:
            measured = {name: self.scattered(value, self.trainable) for name, value in measured.items()}
        return self.record(measured, temperature, partial=self.trainable is not None)

    def measured_at_one(
        self, ids: Tensor, measured: Fields, stats: TokenStats, temperature: float | Tensor
    ) -> dict[str, Tensor]:
        """The student's normalizer and label log-probability, at temperature 1, of the rows ids."""
        at_one = not isinstance(temperature, Tensor) and temperature == 1.0
        logp_s = stats._get("logp_s")
        if at_one and "logp_s" not in measured and logp_s is not None:
            measured = {**measured, "logp_s": logp_s[ids]}
        if not at_one or "logp_s" not in measured:
            measured = self.measure(ids, frozenset({"logp_s"}), 1.0, with_teacher=False)
        return {name: measured[name] for name in ("shift_s", "logsum_s", "logp_s")}

    def measure(
        self,
        ids: Tensor | None,
        want: frozenset[str | Blend],
        temperature: float | Tensor,
        with_teacher: bool,
        record: Sequence[Tensor | None] | None = None,
        workspace: int | None = None,
    ) -> Fields:
        """The wanted fields of the rows ids, (len(ids),) each; counts the products and notes rows that are NaN."""
        pair = self.pair if with_teacher else Pair(self.pair.student)
        measure = ops.measure if torch.compiler.is_compiling() else sweep.measure
        measured = measure(
            pair, want, rows=ids, labels=self.labels, temperature=temperature,
            top_k=self.top_k if want & TOP_FIELDS else 0, workspace=workspace or self.workspace, record=record,
        )  # fmt: skip
        self.count(ids, len(pair.sources))
        self.note_invalid(measured, ids)
        return measured

    def note_invalid(self, measured: Fields, ids: Tensor | None) -> None:
        """Removes from the valid rows those of the rows ids that a measurement found NaN."""
        invalid = measured["logsum_s"].isnan()
        if "logsum_t" in measured:
            invalid = invalid | measured["logsum_t"].isnan()
        self.valid_rows = self.valid_rows & ~(invalid if ids is None else self.scattered(invalid, ids))

    def note(self, measured: Fields, rows: Tensor, fields: Fields) -> None:
        """Keeps what was measured of the rows in fields, (N, ...) each."""
        for name, value in measured.items():
            if name in fields:
                fields[name].index_copy_(0, rows, value)
            else:
                fields[name] = self.scattered(value, rows)

    def count(self, ids: Tensor | None, products: int) -> None:
        """Adds that many products over the given rows to the units."""
        self.units += products * (1.0 if ids is None else ids.numel() / max(self.n_rows, 1))

    def filled(self, stats: TokenStats, measured: Fields, ids: Tensor) -> TokenStats:
        """stats with the fields that were measured only of kept rows, NaN in the others."""
        before = stats._measured
        late = {name: self.scattered(value, ids) for name, value in measured.items() if name not in before}
        return self.record(before | late, stats._temperature, partial=True)

    def record(self, measured: Fields, temperature: float | Tensor, *, partial: bool) -> TokenStats:
        topk = self.pair.topk
        return TokenStats(
            _measured=measured, _temperature=temperature, _vocab=self.pair.vocab,
            _batch_shape=self.pair.student.batch_shape, _labels=self.labels, _top_k=self.top_k,
            _topk_ids=None if topk is None else topk.ids, _partial=partial,
        )  # fmt: skip

    def slots(self, kept: Kept, rule: Rule) -> tuple[Tensor, Tensor]:
        """Kept row ids and which are real: exact on a CPU, else (or in a graph) as many slots as the rule may need.

        Exact, too, for a quota over all ranks, which has waited for the device anyway: one may keep any number of rows.
        """
        if (kept.mask.device.type == "cpu" or spans_ranks(rule)) and not torch.compiler.is_compiling():
            return kept.row_ids, torch.ones_like(kept.row_ids, dtype=torch.bool)
        groups = 1 if getattr(rule, "scope", "rollout") == "batch" else self.n_rollouts
        return kept.slots(min(rule.capacity(self.n_rows, groups), self.n_rows))

    def scattered(self, value: Tensor, ids: Tensor) -> Tensor:
        """(N, ...) with value at ids; NaN elsewhere, or False or -1 where the dtype has no NaN."""
        empty = torch.nan if value.is_floating_point() else (False if value.dtype == torch.bool else -1)
        out = torch.full((self.n_rows, *value.shape[1:]), empty, dtype=value.dtype, device=value.device)
        return out.index_copy_(0, ids, value)

    def normalizer(self, kind: str | float, weights: Tensor, rule: Rule | None = None) -> Tensor | float:
        """What the weighted sum of losses is divided by: over all ranks where that is the rule's scope."""
        if not isinstance(kind, str):
            return kind
        total = weights.sum() if kind == "kept" else self.valid_rows.sum().float()
        if rule is not None and spans_ranks(rule):
            total = collectives.total(total, rule.group)
        return torch.where(total == 0, 1.0, total)


def _once(make: Callable[[Step], T]) -> property:
    """A property that is made once: functools.cached_property holds a lock, which torch.compile cannot trace."""
    name = f"_{make.__name__}"

    def get(self: Step) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = make(self)
        return self.__dict__[name]

    return property(get, doc=make.__doc__)


@dataclass
class Step:
    """One distill call, checked."""

    batch: Batch
    select: Rule
    objective: Objective
    options: GradOptions
    row_weights: RowWeights | None  # (N,), or what gives them
    normalizer: str | float
    temperature_of: Callable[[TokenStats], Tensor] | None  # of the learned rows, where that follows from statistics
    sweeps: int | None
    full_stats: bool
    grad_scale: float | Tensor
    need: tuple[bool, ...] = field(init=False)  # which of the student's leaves want a gradient

    def __post_init__(self) -> None:
        leaves = self.batch.pair.student.leaves
        self.need = tuple([leaf.requires_grad for leaf in leaves]) if torch.is_grad_enabled() else ()
        everything = self.full_stats or self.temperature_of is not None
        divergence = self.objective.divergence
        gates = readers_of(divergence) if divergence.term_gates else ()
        readers = (*gates, self.row_weights) if callable(self.row_weights) else gates
        # what all rows are measured for, and whether that takes the teacher
        self.want, self.with_teacher = self.batch.wanted(self.select, readers, divergence, everything)
        # the fields that the loss needs of kept rows
        self.late = divergence.needs | frozenset({"logp_s"} if self.objective.ce_weight else ())
        keeps_all = isinstance(self.select, KeepAll)
        # whether the rule can choose, and rows be weighed, before anything is measured
        reads = self.select.needs or any(map(statistics_read, readers))
        self.knows_rows = not reads and self.temperature_of is None
        self.knows_rows = self.knows_rows and (keeps_all or not self.full_stats)
        self.measures_all = keeps_all if self.knows_rows else self.with_teacher  # in one sweep
        self.learns_early = self.temperature_of is None and not self.knows_rows  # before the rule has chosen
        if divergence.term_gates:
            self._gate_early(gates)

    def _gate_early(self, gates: tuple[Callable[..., Tensor], ...]) -> None:
        """Puts the gates beside the divergence at once, where none reads a statistic."""
        if any(map(statistics_read, gates)):
            self.learns_early = False
        else:
            self.gate(self.batch.record({}, self.objective.temperature, partial=True))

    def choose(self, stats: TokenStats) -> Kept:
        return self.select(stats, row_mask=self.batch.row_mask, rollout_ids=self.batch.rollout_ids)

    def weigh(self, stats: TokenStats) -> None:
        """Puts (N,) weights in the place of the callable that gives them, and (N,) gates beside the divergence."""
        self.gate(stats)
        if callable(self.row_weights):
            with torch.no_grad():
                weights = self.row_weights(stats, self.batch.row_mask, self.batch.rollout_ids)
            shape, device = self.batch.pair.student.batch_shape, self.batch.pair.device
            self.row_weights = flat_rows("row_weights", weights, shape, FLOATS, device).detach()

    def gate(self, stats: TokenStats) -> None:
        """Puts (N,) gates beside the divergence, once."""
        divergence, batch = self.objective.divergence, self.batch
        if divergence.term_gates and not self.objective.gates:
            shape, device = batch.pair.student.batch_shape, batch.pair.device
            gates = gates_of(divergence, stats, batch.row_mask, batch.rollout_ids, shape, device)
            self.objective = replace(self.objective, gates=gates)

    def weights(self, ids: Tensor, real: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """(S,) weights of the rows ids, 0 where not real or not finite, and where they are finite."""
        assert not callable(self.row_weights)  # `weigh` came before
        w = real.float()
        for factor in (self.row_weights, kept._weights):
            w = w if factor is None else w * factor[ids]
        finite = torch.isfinite(w.detach())
        return torch.where(real & finite, w, 0.0), finite

    @property
    def takes_third_sweep(self) -> bool:
        """Whether two sweeps need row sums of the kept rows in between."""
        two_pass = any(term.sums for _, term in self.objective.divergence.terms)
        return two_pass and len(self.batch.pair.sources) == 2

    @_once
    def known(self) -> tuple[Kept, Tensor, Tensor]:
        """The choice of a rule that knows its rows, with the slots of its rows and which of them are real."""
        unmeasured = self.batch.record({}, self.objective.temperature, partial=True)
        kept = self.choose(unmeasured)
        self.weigh(unmeasured)
        return kept, *self.batch.slots(kept, self.select)

    @_once
    def measured(self) -> Measured:
        """All rows measured, and the rule's choice among them."""
        batch = self.batch
        stats = batch.measure_for(self.want, self.objective.temperature, self.with_teacher)
        if self.knows_rows:
            kept, ids, real = self.known
        else:
            kept = self.choose(stats)
            self.weigh(stats)
            ids, real = batch.slots(kept, self.select)
        objective = self.objective
        if self.temperature_of is not None:
            shape, device = batch.pair.student.batch_shape, batch.pair.device
            objective = objective.at(row_temperature(self.temperature_of(stats), shape, device, ids))
        return Measured(stats, kept, ids, real, objective, measured_at(stats, batch.pair, objective, ids))


class Measured(NamedTuple):
    """All rows measured, the rule's choice among them, and what is learned of it."""

    stats: TokenStats
    kept: Kept
    ids: Tensor
    real: Tensor
    objective: Objective  # at the temperature of the loss
    fields: Fields | None  # what the loss needs of the kept rows, if the statistics hold it


class Strategy(Protocol):
    """A way to distill a batch."""

    name: str

    def fits(self, step: Step) -> Layout | None:
        """How it divides the workspace, where it can and should do the step, else None.

        It may measure, once for all strategies that come after.
        """
        ...

    def run(self, step: Step, layout: Layout) -> Learned: ...


def _second_sweep(step: Step) -> Learned:
    """Measures all rows; the gradient sweep over kept rows runs in backward. Fits wherever one sweep is not asked."""
    batch, pair = step.batch, step.batch.pair
    stats, kept, ids, real, objective, fields = step.measured
    projections = len(pair.sources)
    if fields is None:
        want = step.late | needs_of(objective, pair)
        fields = batch.measure(ids, want, objective.temperature, with_teacher=True)
        stats = stats if step.temperature_of is not None else batch.filled(stats, fields, ids)
    if step.takes_third_sweep:
        batch.count(ids, projections)
    at_one = batch.measured_at_one(ids, fields, stats, objective.temperature) if objective.ce_weight else None
    losses = row_loss(pair, objective, RowsToLearn(ids, fields, at_one), step.options)
    if losses.requires_grad:
        batch.count(ids, projections + sum(step.need[:2] if pair.student.width else ()))
    return Learned(stats, kept, ids, real, losses)


STRATEGIES: tuple[Strategy, ...] = (KnownRows(), StashedRows(), SecondSweepByRows())
