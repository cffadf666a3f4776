"""The self-test: every public operation beside a formula of truth.py, on one device.

A check yields comparisons; the worst of them is its line. An operation that this device cannot run raises NotHere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from tip_kernels.distillation.distill import distill
from tip_kernels.distillation.importance import token_importance
from tip_kernels.distillation.options import Execution
from tip_kernels.distillation.step_selection import StepSelection
from tip_kernels.doctor import truth
from tip_kernels.doctor.cases import TOP_K, Case, Compared, Source, exact
from tip_kernels.learn import divergences
from tip_kernels.learn.divergence_loss import divergence_loss
from tip_kernels.learn.divergences import TVD, ForwardKL, ReverseKL
from tip_kernels.learn.gated import Gated
from tip_kernels.learn.grad_filter import GradFilter
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.select import weights
from tip_kernels.select.adakd import AdaptiveFocus, TopHellinger, adakd, difficulty_temperature
from tip_kernels.select.papers import (
    CrossEntropyRatio,
    EntropyGap,
    GreedyAgreement,
    PositionPrefix,
    Teachability,
    TopMargin,
)
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rollouts import FilterRollouts, PositionSuffix, UntilDrift
from tip_kernels.select.rule import KeepAll, RandomRows, Rule, SoftOr, Threshold
from tip_kernels.select.tip import Overconfident, SampleEntropy, TopDivergence, TopEntropy
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import STATISTICS, TokenStats

Check = Callable[[Case], Iterator[Compared]]
EXECUTION = Execution()


class NotHere(Exception):
    """Says why an operation cannot run on this device."""


@dataclass(frozen=True)
class Result:
    """One line. ok is None where the check did not run, for the reason in note."""

    name: str
    error: float | None
    bound: float | None
    ok: bool | None
    note: str = ""


def run(name: str, check: Check, case: Case) -> Result:
    """The worst comparison of a check; whatever it raises is a failure."""
    try:
        found = [(*compared.error_and_bound(), compared.what) for compared in check(case)]
    except NotHere as reason:
        return Result(name, None, None, None, str(reason))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Result(name, None, None, False, f"{type(error).__name__}: {lines[0]}")
    if not found:
        return Result(name, None, None, False, "nothing was compared")
    error, bound, what = max(found, key=lambda one: one[0] / one[1] if one[1] else math.inf if one[0] else 0.0)
    return Result(name, error, bound, error <= bound, what)


# ---- measure


def _statistic(field: str, case: Case) -> Iterator[Compared]:
    for what, stats, right, eager in _statistics_of(case):
        if (ours := stats._get(field)) is not None:
            yield Compared(what, ours, right[field], eager[field])


@lru_cache(maxsize=1)  # every field reads it
def _statistics_of(case: Case) -> list[tuple[str, TokenStats, dict[str, Tensor], dict[str, Tensor]]]:
    """What was measured, its statistics, those of the formulas in float64 and in float32."""
    found = []
    labels = case.labels.to(case.device)
    measured = partial(token_stats, labels=labels, margins=True, workspace_mib=1)
    for source in (*case.sources.values(), case.with_ban):
        _, student, teacher = source.on(case.device)
        for tau in (None, case.temperature):
            at = 1.0 if tau is None else tau.to(case.device)
            right = [_statistics(case, source, tau, dtype) for dtype in (torch.float64, torch.float32)]
            what = source.name if tau is None else f"{source.name}, a temperature a row"
            found.append((what, measured(student, teacher, top_k=TOP_K, temperature=at), *right))
            found.append((f"{what}, student alone", measured(student, temperature=at), *right))
    return found


def _statistics(case: Case, source: Source, tau: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    z_s, z_t = source.logits([x.to(dtype) for x in source.leaves])
    if tau is not None:
        z_s, z_t = (z / tau.to(dtype)[:, None] for z in (z_s, z_t))
    return truth.statistics(z_s, z_t, case.labels, TOP_K)


def _importance(case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    _, student, teacher = case.logits.on(case.device)
    right, eager = (_statistics(case, case.logits, None, dtype) for dtype in (torch.float64, torch.float32))
    rows = list(range(case.n_rows))
    scores = {
        "logit_diff": lambda x: x["margin_t"],
        "kl_div": lambda x: x["kl_fwd"],
        "loss_contribution": lambda x: -x["logp_t"],
        "entropy": lambda x: x["entropy_s"],
        "reverse_kl": lambda x: x["kl_rev"],
        "hellinger": lambda x: x["hellinger_sq"].sqrt(),
        "soft_or": lambda x: torch.tensor(_soft_or(_listed(x), rows)).to(x["kl_rev"]),
        "teachability": lambda x: torch.tensor(_teachability(_listed(x), rows)).to(x["kl_rev"]),
    }
    given = {"student": student, "teacher": teacher, "labels": case.labels.to(case.device), "top_k": TOP_K}
    for method, score in scores.items():
        yield Compared(method, token_importance(method=method, **given), score(right), score(eager))


# ---- select


def _listed(values: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: value.detach().cpu().double().tolist() for name, value in values.items()}


Values = dict[str, list[float]]


def _soft_or(x: Values, rows: list[int]) -> list[float]:
    h, d = (truth.shares_below(x[name], rows) for name in ("entropy_s", "kl_rev"))
    return [1 - (1 - a) * (1 - b) for a, b in zip(h, d, strict=True)]


def _sureness(x: Values, rows: list[int]) -> list[float]:
    """1 - h, h the entropy clipped at its 0.98 quantile and brought to [0, 1]."""
    entropy, top = x["entropy_s"], truth.quantile(x["entropy_s"], rows, 0.98)
    clipped = [min(value, top) for value in entropy]
    low, high = min(clipped[i] for i in rows), max(clipped[i] for i in rows)
    return [1 - (value - low) / (high - low) for value in clipped]


def _teachability(x: Values, rows: list[int]) -> list[float]:
    d, c = (
        truth.between(x[name], truth.quantile(x[name], rows, 0.05), truth.quantile(x[name], rows, 0.95))
        for name in ("kl_fwd", "mass_t_on_top_s")
    )
    return [a * b for a, b in zip(d, c, strict=True)]


def _product(*factors: list[float]) -> list[float]:
    return [math.prod(entries) for entries in zip(*factors, strict=True)]


def _uniform(x: Values, draw: torch.Generator) -> list[float]:
    n_rows = len(x["lse_s"])
    return torch.rand(n_rows, generator=draw, dtype=torch.float64, device=draw.device).tolist()


def _gumbel(x: Values, rows: list[int], draw: torch.Generator) -> list[float]:
    """log of the entropy over the largest, plus Gumbel noise."""
    largest = max(x["entropy_s"][i] for i in rows)
    noise = torch.empty(len(x["lse_s"]), dtype=torch.float64, device=draw.device).exponential_(generator=draw).tolist()
    return [math.log(entropy / largest) - math.log(e) for entropy, e in zip(x["entropy_s"], noise, strict=True)]


KEEP = 0.4


class OverRollouts(NamedTuple):
    """Which rows a rule keeps of the rows of each rollout."""

    keeps: Callable[[Values, list[list[int]]], list[int]]


def _mean(values: list[float], rows: list[int]) -> float:
    return sum(values[i] for i in rows) / len(rows)


# (rule of a generator, its score of (values, rows of the population, a generator), and what may be kept, None for all:
# of (values, a row), or OverRollouts of (values, the population's rows of each rollout))
RULES: dict[str, tuple[Callable, Callable, Callable | OverRollouts | None]] = {
    "KeepAll": (lambda g: KeepAll(), lambda x, rows, g: [0.0] * len(x["lse_s"]), None),
    "TopEntropy": (lambda g: TopEntropy(KEEP), lambda x, rows, g: x["entropy_s"], None),
    "TopDivergence": (lambda g: TopDivergence(KEEP), lambda x, rows, g: x["kl_rev"], None),
    "TopHellinger": (lambda g: TopHellinger(KEEP), lambda x, rows, g: x["hellinger_sq"], None),
    "TopMargin": (lambda g: TopMargin(KEEP), lambda x, rows, g: x["margin_t"], None),
    "SoftOr": (lambda g: SoftOr(KEEP), lambda x, rows, g: _soft_or(x, rows), None),
    "Overconfident": (
        lambda g: Overconfident(KEEP, entropy_below=6.0, divergence_above=1.0),
        lambda x, rows, g: _product(x["kl_fwd"], _sureness(x, rows)),
        lambda x, i: x["entropy_s"][i] < 6.0 and x["kl_fwd"][i] > 1.0,
    ),
    "EntropyGap": (
        lambda g: EntropyGap(KEEP),
        lambda x, rows, g: [a - b for a, b in zip(x["entropy_s"], x["entropy_t"], strict=True)],
        None,
    ),
    "CrossEntropyRatio": (
        lambda g: CrossEntropyRatio(KEEP),
        lambda x, rows, g: [-a / (-b + 1e-6) for a, b in zip(x["logp_s"], x["logp_t"], strict=True)],
        None,
    ),
    "Teachability": (
        lambda g: Teachability(KEEP, top_k=TOP_K),
        lambda x, rows, g: _teachability(x, rows),
        None,
    ),
    "GreedyAgreement": (
        lambda g: GreedyAgreement(TOP_K),
        lambda x, rows, g: [float(rank < TOP_K) for rank in x["rank_t_of_argmax_s"]],
        lambda x, i: x["rank_t_of_argmax_s"][i] < TOP_K,
    ),
    "PositionPrefix": (lambda g: PositionPrefix(2), lambda x, rows, g: [0.0] * len(x["lse_s"]), None),
    "PositionSuffix": (
        lambda g: PositionSuffix(2),
        lambda x, rows, g: [float(sum(row <= i for row in rows)) for i in range(len(x["lse_s"]))],
        None,
    ),
    "FilterRollouts": (
        lambda g: FilterRollouts("entropy_s", 1),
        lambda x, rows, g: x["entropy_s"],
        OverRollouts(
            lambda x, rollouts: [i for r in sorted(rollouts, key=lambda r: _mean(x["entropy_s"], r))[1:] for i in r]
        ),
    ),
    "UntilDrift": (
        lambda g: UntilDrift(4.0, "entropy_s", n=2),
        lambda x, rows, g: x["entropy_s"],
        OverRollouts(
            lambda x, rollouts: [
                i for rows in rollouts for i in rows if sum(x["entropy_s"][j] < 4.0 for j in rows if j <= i) < 2
            ]
        ),
    ),
    "RandomRows": (lambda g: RandomRows(KEEP, generator=g), lambda x, rows, g: _uniform(x, g), None),
    "SampleEntropy": (lambda g: SampleEntropy(KEEP, generator=g), _gumbel, None),
    "Threshold": (
        lambda g: Threshold("kl_rev", above=0.5, below=4.0),
        lambda x, rows, g: x["kl_rev"],
        lambda x, i: 0.5 < x["kl_rev"][i] < 4.0,
    ),
}


def _measured(case: Case) -> tuple[TokenStats, Values]:
    _, student, teacher = case.logits.on(case.device)
    stats = token_stats(student, teacher, labels=case.labels.to(case.device), margins=True, top_k=TOP_K)
    return stats, _listed({name: getattr(stats, name) for name in STATISTICS})


def _rule(name: str, case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    make, score, eligible = RULES[name]
    stats, x = _measured(case)
    ours, theirs = (torch.Generator(case.device).manual_seed(3) for _ in range(2))
    rule = make(ours)
    kept = rule(stats, case.mask.to(case.device), case.rollouts.to(case.device))
    known = [not any(math.isnan(x[field][i]) for field in rule.needs) for i in range(case.n_rows)]
    rows = [i for i in range(case.n_rows) if case.mask[i] and known[i]]
    scores = score(x, rows, theirs)
    allowed = _allowed(eligible, x, rows, case.rollouts.tolist())
    keep = getattr(rule, "keep", None)
    if keep is None:  # no quota
        expected = [i in rows and allowed[i] for i in range(case.n_rows)]
    else:
        expected = truth.best(scores, rows, allowed, case.rollouts.tolist(), keep)
    yield exact("rows kept", kept.mask, torch.tensor(expected))
    inside = torch.tensor(rows)
    right = torch.tensor(scores, dtype=torch.float64)[inside]
    yield Compared("scores", kept.scores.cpu()[inside], right, right.float())


def _allowed(eligible: Callable | OverRollouts | None, x: Values, rows: list[int], rollouts: list[int]) -> list[bool]:
    if not isinstance(eligible, OverRollouts):
        return [eligible is None or eligible(x, i) for i in range(len(rollouts))]
    left = eligible.keeps(x, [[i for i in rows if rollouts[i] == r] for r in sorted(set(rollouts))])
    return [i in left for i in range(len(rollouts))]


def _counts_in_float64(device: torch.device) -> None:
    """Raises NotHere on a device that has no float64, in which selection counts."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        raise NotHere(f"selection counts in float64, which {device.type} lacks") from None


def _quadrants(case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    stats, x = _measured(case)
    ours = quadrants(stats, case.mask.to(case.device), entropy=5.0, divergence=0.5)
    pairs = zip(x["entropy_s"], x["kl_rev"], case.mask.tolist(), strict=True)
    expected = [(1 + 2 * (h < 5.0) + (d <= 0.5)) if rows else 0 for h, d, rows in pairs]
    yield exact("quadrants", ours, torch.tensor(expected, dtype=torch.int8))


# ---- learn


def _learn(name: str, source_name: str, case: Case) -> Iterator[Compared]:
    (parameters, formula), source = truth.DIVERGENCES[name], case.sources[source_name]
    leaves, student, teacher = source.on(case.device, grad=True)
    tau, w = case.temperature.to(case.device), case.weights.to(case.device)
    stats = None
    if name == "SampledReverseKL":
        stats = token_stats(student, teacher, labels=case.sampled.to(case.device), temperature=tau)
    divergence = getattr(divergences, name)(*parameters)
    options = {"divergence": divergence, "stats": stats, "temperature": tau, "row_weights": w, "workspace_mib": 1}
    loss = divergence_loss(student, teacher, **options)
    loss.sum().backward()

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        return case.weights.to(z_s.dtype) * formula(*case.log_probs(z_s, z_t), case.sampled)

    yield from source.compared(loss, leaves, right)


def _sum_and_clip(case: Case) -> Iterator[Compared]:
    leaves, student, teacher = case.logits.on(case.device, grad=True)
    divergence = (0.5 * ForwardKL() + 0.25 * TVD()).clipped(2.0)
    loss = divergence_loss(student, teacher, divergence=divergence)
    loss.sum().backward()

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        lp = case.log_probs(z_s, z_t, temperature=False)
        parts = (truth.DIVERGENCES[name][1](*lp, case.sampled) for name in ("ForwardKL", "TVD"))
        return (0.5 * next(parts) + 0.25 * next(parts)).clamp(max=2.0)

    yield from case.logits.compared(loss, leaves, right)


def _gated(case: Case) -> Iterator[Compared]:
    leaves, student, teacher = case.logits.on(case.device, grad=True)
    gate = torch.arange(case.n_rows) % 3 / 2
    divergence = Gated({ForwardKL(): gate.to(case.device), TVD(): 0.25})
    loss = divergence_loss(student, teacher, divergence=divergence)
    loss.sum().backward()

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        lp = case.log_probs(z_s, z_t, temperature=False)
        parts = (truth.DIVERGENCES[name][1](*lp, case.sampled) for name in ("ForwardKL", "TVD"))
        return gate * next(parts) + 0.25 * next(parts)

    yield from case.logits.compared(loss, leaves, right)


def _listed_teacher(tail: str, case: Case) -> Iterator[Compared]:
    source, ids = case.head, case.logits.frozen[0].topk(TOP_K).indices
    logp = source.logits([x.double() for x in source.leaves])[1].log_softmax(1).gather(1, ids).float()
    leaves, student, _ = source.on(case.device, grad=True)
    teacher = TopK(ids.to(case.device), logp.to(case.device), tail=tail)
    stats = token_stats(student, teacher)
    loss = divergence_loss(student, teacher, divergence=ForwardKL(), stats=stats)
    loss.sum().backward()

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        p = logp.to(z_s.dtype)
        lp_t = torch.cat([p, torch.log1p(-p.exp().sum(1, keepdim=True))], 1)
        return truth.listed_kl(truth.outcomes(z_s, ids), lp_t, tail)

    yield Compared("kl_fwd", stats.kl_fwd, *(found[0] for found in source.beside(right)))
    yield from source.compared(loss, leaves, right)


def _distill(
    strategy: str,
    case: Case,
    *,
    select: Rule,
    execution: Execution = EXECUTION,
) -> Iterator[Compared]:
    """Reverse KL at a temperature a row, beside a label loss, over the rows that the rule chose."""
    _counts_in_float64(case.device)
    source, labelled = case.head, case.labels >= 0
    leaves, student, teacher = source.on(case.device, grad=True)
    columns = (case.mask, case.rollouts, case.labels, case.weights, case.temperature)
    mask, rollouts, given_labels, w, tau = (column.to(case.device) for column in columns)
    out = distill(
        student, teacher, select=select, ce_weight=0.25, row_mask=mask, rollout_ids=rollouts, labels=given_labels,
        row_weights=w, temperature=tau, execution=execution,
    )  # fmt: skip
    if not execution.backward:
        out.loss.backward()
    if out.plan.strategy != strategy:
        raise AssertionError(f"expected {strategy}, got {out.plan.strategy}")
    rows, labels = out.kept.mask.cpu(), case.labels.clamp(min=0)[:, None]

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        w = torch.where(rows, case.weights.to(z_s.dtype), 0.0)
        divergence = truth.DIVERGENCES["ReverseKL"][1](*case.log_probs(z_s, z_t), case.sampled)
        cross_entropy = -z_s.log_softmax(1).gather(1, labels)[:, 0].where(labelled, 0.0)
        return (w * (0.75 * divergence + 0.25 * cross_entropy)).sum() / w.sum()

    yield from source.compared(out.loss, leaves, right)


def _distill_listed(case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    source, ids = case.head, case.logits.frozen[0].topk(TOP_K).indices
    logp = source.logits([x.double() for x in source.leaves])[1].log_softmax(1).gather(1, ids).float()
    leaves, student, _ = source.on(case.device, grad=True)
    teacher = TopK(ids.to(case.device), logp.to(case.device))
    out = distill(student, teacher, select=TopDivergence(KEEP), divergence=ForwardKL())
    out.loss.backward()
    rows = out.kept.mask.cpu()

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        p = logp.to(z_s.dtype)
        lp_t = torch.cat([p, torch.log1p(-p.exp().sum(1, keepdim=True))], 1)
        return truth.listed_kl(truth.outcomes(z_s, ids), lp_t, "bucket")[rows].mean()

    yield from source.compared(out.loss, leaves, right)


# (weight by its sampling log-probabilities, formula of (values, row, valid rows of its rollout before it, all of them,
# valid rows of the batch))
WEIGHTS: dict[str, tuple[Callable, Callable]] = {
    "TeacherConfidence": (
        lambda logp: weights.TeacherConfidence(0.2, zero_at=5.0),
        lambda x, i, before, rollout, every: max(0.2, 1 - x["entropy_t"][i] / 5.0),
    ),
    "ConfidenceProduct": (
        lambda logp: weights.ConfidenceProduct(),
        lambda x, i, before, rollout, every: (
            _confidences(x, i, every) / (sum(_confidences(x, j, every) for j in every) / len(every))
        ),
    ),
    "PrefixDecay": (
        lambda logp: weights.PrefixDecay(2.0),
        lambda x, i, before, rollout, every: 3 - 2 * _log_ratios(x, before) / _log_ratios(x, rollout),
    ),
    "LogRatioSigmoid": (
        lambda logp: weights.LogRatioSigmoid(0.5),
        lambda x, i, before, rollout, every: 1 / (1 + math.exp(0.5 * (x["logp_s"][i] - x["logp_t"][i]))),
    ),
    "ImportanceRatio": (
        lambda logp: weights.ImportanceRatio(logp, 0.5, 2.0),
        lambda x, i, before, rollout, every: min(2.0, max(0.5, math.exp(x["logp_s"][i] - x["rollout_logp"][i]))),
    ),
    "PositionDecay": (
        lambda logp: weights.PositionDecay(3.0),
        lambda x, i, before, rollout, every: 0.5 ** (len(before) / 3.0),
    ),
    "DriftDecay": (
        lambda logp: weights.DriftDecay(0.1, drop=0.2, top_k=TOP_K),
        lambda x, i, before, rollout, every: (
            0.5 + max(0.0, 1 - 0.2 * sum(x["mass_t_on_top_s"][j] < 0.1 for j in [*before, i]))
        ),
    ),
}


def _confidences(x: Values, i: int, every: list[int]) -> float:
    top_s, top_t = (max(x[name][j] for j in every) for name in ("entropy_s", "entropy_t"))
    return (2 - x["entropy_t"][i] / top_t) * (1 + x["entropy_s"][i] / top_s)


def _log_ratios(x: Values, rows: list[int]) -> float:
    return sum(abs(x["logp_t"][j] - x["logp_s"][j]) for j in rows)


def _weights(name: str, case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    make, formula = WEIGHTS[name]
    stats, x = _measured(case)
    rollout_logp = stats.logp_s.cpu() + torch.linspace(-1.0, 1.0, case.n_rows)
    x["rollout_logp"] = rollout_logp.tolist()
    weight = make(rollout_logp.to(case.device))
    ours = weight(stats, case.mask.to(case.device), case.rollouts.to(case.device)).cpu()
    known = [not any(math.isnan(x[field][i]) for field in weight.needs) for i in range(case.n_rows)]
    every = [i for i in range(case.n_rows) if case.mask[i] and known[i]]
    ids, right = case.rollouts.tolist(), []
    for i in every:
        rollout = [j for j in every if ids[j] == ids[i]]
        right.append(formula(x, i, [j for j in rollout if j < i], rollout, every))
    truth = torch.tensor(right, dtype=torch.float64)
    yield Compared("weights", ours[every], truth, truth.float())


def _adakd(case: Case) -> Iterator[Compared]:
    _counts_in_float64(case.device)
    source, mask = case.head, case.mask
    leaves, student, teacher = source.on(case.device, grad=True)
    given = adakd(0.5, row_mask=mask.to(case.device), rollout_ids=case.rollouts.to(case.device))
    out = distill(student, teacher, divergence=ReverseKL(), **given)
    out.loss.backward()
    rows = out.kept.mask.cpu()
    h = _statistics(case, source, None, torch.float64)["hellinger_sq"]
    median = h[mask].sort().values[(int(mask.sum()) - 1) // 2]
    tau = torch.where(mask, torch.exp(-0.5 * (h - median) / (h + median)), 1.0)
    ours = difficulty_temperature(out.stats, mask.to(case.device))
    yield Compared("difficulty_temperature", ours, tau, tau.float())

    def right(z_s: Tensor, z_t: Tensor) -> Tensor:
        t = tau.to(z_s.dtype)
        lp = case.log_probs(z_s / t[:, None], z_t / t[:, None], temperature=False)
        return (t.square() * truth.DIVERGENCES["ReverseKL"][1](*lp, case.sampled))[rows].mean()

    yield from source.compared(out.loss, leaves, right)


def _step_selection(case: Case) -> Iterator[Compared]:
    """Rows chosen over two micro-batches are those of the whole case, ranked by their divergence."""
    student, teacher = (z.to(case.device) for z in (case.logits.leaves[0], case.logits.frozen[0]))
    step, halves = (
        StepSelection(TopDivergence(KEEP, by="kl_rev", scope="batch")),
        (slice(0, None, 2), slice(1, None, 2)),
    )
    for half in halves:
        step.measure(student[half], teacher[half], row_mask=case.mask[half].to(case.device))
    step.parts()
    order = torch.cat([torch.arange(case.n_rows)[half] for half in halves])
    right, eager = (_statistics(case, case.logits, None, dtype) for dtype in (torch.float64, torch.float32))
    values = right["kl_rev"].tolist()
    rows = [i for i in range(case.n_rows) if case.mask[i] and not math.isnan(values[i])]
    best = truth.best(values, rows, [True] * case.n_rows, [0] * case.n_rows, KEEP)
    yield exact("rows kept", step.kept.mask, torch.tensor(best)[order])
    inside = torch.tensor(best)[order]
    yield Compared("kl_rev", step.stats.kl_rev.cpu()[inside], *(x["kl_rev"][order][inside] for x in (right, eager)))


def _focus(case: Case) -> Iterator[Compared]:
    """The ratio follows the paper's lines over losses that fall, stay and rise."""
    losses = [2.0, 1.5, 1.2, 1.0, 1.0, 0.9, 1.4, 2.0, 2.2]
    focus, ours, right = AdaptiveFocus(beta=0.5, warmup=2), [], []
    keep, average, anchor = 1.0, losses[0], losses[0]
    for seen, loss in enumerate(losses):
        ours.append(focus.update(torch.tensor(loss, device=case.device)))
        average = 0.5 * average + 0.5 * loss
        before = keep
        if seen < 2:
            anchor = average
        elif average < 0.95 * anchor:
            keep = max(0.1, 0.95 * keep)
        elif average > 1.05 * anchor:
            keep = min(1.0, 1.05 * keep)
        anchor = average if keep != before else anchor
        right.append(keep)
    yield Compared("keep", torch.tensor(ours), torch.tensor(right).double(), torch.tensor(right))


CHECKS: dict[str, Check] = {
    **{f"token_stats {field}": partial(_statistic, field) for field in STATISTICS},
    "token_importance": _importance,
    **{f"select {name}": partial(_rule, name) for name in RULES},
    "quadrants": _quadrants,
    **{f"weights {name}": partial(_weights, name) for name in WEIGHTS},
    **{
        f"divergence_loss {name}, {source}": partial(_learn, name, source)
        for name in truth.DIVERGENCES
        for source in ("logits", "Head")
    },
    "divergence_loss ReverseKL, bfloat16 Head": partial(_learn, "ReverseKL", "bfloat16 Head"),
    "divergence_loss of a clipped sum": _sum_and_clip,
    "divergence_loss Gated": _gated,
    **{f"divergence_loss TopK, {tail}": partial(_listed_teacher, tail) for tail in ("bucket", "ignore", "renormalize")},
    "distill, one sweep": partial(_distill, "one sweep", select=KeepAll(), execution=Execution(sweeps=1)),
    "distill, two sweeps": partial(_distill, "two sweeps", select=SoftOr(KEEP), execution=Execution(sweeps=2)),
    "distill, backward=True": partial(
        _distill, "two sweeps", select=TopEntropy(KEEP), execution=Execution(sweeps=2, backward=True)
    ),
    "distill, GradFilter": partial(
        _distill,
        "two sweeps",
        select=SoftOr(KEEP),
        execution=Execution(sweeps=2, grad_filter=GradFilter(1e-12)),
    ),
    "distill, TopK": _distill_listed,
    "distill, adakd": _adakd,
    "AdaptiveFocus": _focus,
    "StepSelection": _step_selection,
}
