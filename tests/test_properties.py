"""Random cases of measuring and learning against the float64 reference: any source, layout, rule, option, workspace.

A case is a small frozen record from which every tensor follows, so a failure prints one line that makes it again:

    python -c "from tests.test_properties import *; check(Case(...))"

300 cases by default, 10,000 with --long; seeds are fixed, so a run is repeatable.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import reference as ref
import tip_kernels as tip
from reference import select as ref_select
from tests._cases import INF, NAN, STATISTIC_FLOOR, ULP, check_gradient, distill, no_worse
from tests.test_divergences import FAMILY, SCALE
from tip_kernels.distillation import one_sweep
from tip_kernels.select.rule import Kept
from tip_kernels.sources import pair
from tip_kernels.stats import STATISTICS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PUBLIC = STATISTICS
TOPK_VALUES = {
    "forward": ref.topk_forward_kl,
    "reverse": ref.topk_reverse_kl,
    "jeffreys": lambda *a: ref.topk_forward_kl(*a) + ref.topk_reverse_kl(*a),
    "hellinger": ref.topk_hellinger_sq,
}
# name: the rule, and the reference's choice from measured statistics, where it is not random
QUOTA_RULES = {
    "TopEntropy": (tip.TopEntropy, ref_select.select_top_entropy),
    "TopDivergence": (tip.TopDivergence, ref_select.select_top_divergence),
    "TopHellinger": (tip.TopHellinger, ref_select.select_top_hellinger),
    "SoftOr": (tip.SoftOr, ref_select.select_soft_or),
    "TopMargin": (tip.TopMargin, ref_select.select_top_margin),
    "EntropyGap": (tip.EntropyGap, ref_select.select_entropy_gap),
    "PositionPrefix": (tip.PositionPrefix, ref_select.select_position_prefix),
    "CrossEntropyRatio": (tip.CrossEntropyRatio, None),  # which of two near ties is kept may hang on a rounding
    "Overconfident": (lambda keep, **how: tip.Overconfident(keep, "kl_fwd", ("quantile", 0.7), 0.01, **how), None),
    "Teachability": (lambda keep, **how: tip.Teachability(keep, top_k=3, **how), None),
    "SampleEntropy": (lambda keep, **how: tip.SampleEntropy(keep, gamma=0.5, generator=dice(), **how), None),
    "unbiased": (lambda keep, **how: tip.SampleEntropy(keep, unbiased=True, generator=dice(), **how), None),
    "RandomRows": (lambda keep, **how: tip.RandomRows(keep, generator=dice(), **how), None),
}
OTHER_RULES = {
    "KeepAll": tip.KeepAll(),
    "Threshold": tip.Threshold("kl_rev", above=0.05),
    "GreedyAgreement": tip.GreedyAgreement(3, other_weight=0.25),
}


def dice() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Record:
    def __repr__(self) -> str:
        """Only what differs from the defaults, so that the line stays short."""
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Source(Record):
    """How one model's logits are given. A kind of TopK is its tail; k entries a row."""

    kind: str = "logits"
    dtype: str = "fp32"
    layout: str = "contiguous"
    width: int = 8
    k: int = 3
    bias: str = "none"
    scale: float = 1.0
    softcap: float | None = None
    padding: int = 0  # rows of the weight beyond vocab_size


@dataclass(frozen=True, repr=False)
class Case(Record):
    """What is called on what. Rows are named by their place in the flat order, modulo their number."""

    call: str = "distill"
    data: int = 0  # the seed of all values
    shape: tuple[int, ...] = (4,)
    vocab: int = 5
    student: Source = Source()
    teacher: Source = Source()
    backend: str = "eager"
    spread: float = 3.0  # of the student's logits
    spread_t: float = 1.0  # of the teacher's, in units of the student's
    shift: float = 0.0
    closeness: float = 0.0  # of the teacher's logits to the student's, where both are logits; 0 is none
    bans: str = "none"
    broken: tuple[tuple[str, int, float], ...] = ()  # model, row, what stands in it
    temperature: str | float = 1.0
    divergence: str = "reverse"
    clip: float | None = None
    gates: str = "none"  # of the divergence and a second one: numbers, known or read from statistics
    labels: bool = False
    margins: bool = False
    top_k: int = 0
    row_weights: bool = False
    workspace_mib: float = 256
    kept: str = "all"  # of divergence_loss
    given_stats: bool = False
    grad_logits: str = "dense"
    rule: str = "SoftOr"  # of distill, and what follows
    keep: float | int = 0.5
    scope: str = "rollout"
    min_rows: int = 1
    masked: bool = False
    rollouts: bool = False
    ce_weight: float = 0.0
    temperature_sq: bool = False
    normalizer: str | float = "kept"
    full_stats: bool = False
    sweeps: int | None = None
    block: int = 256  # rows of a block of the one sweep
    at_once: bool = False  # backward=True
    loss_scale: float = 1.0  # of the gradients, as a GradScaler's
    weigher: bool = False  # row_weights as a callable, beside or without the tensor's values
    junk: bool = False  # in the per-row arguments of masked rows

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape)


# Which cases


@st.composite
def sources(draw, teacher: bool = False) -> Source:
    kind = draw(st.sampled_from(["logits", "head", "head", *(("bucket", "ignore", "renormalize") if teacher else ())]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    layouts = ["contiguous", "rows apart", "columns first", "cut in time", *(("expanded",) if teacher else ())]
    if kind not in ("logits", "head"):
        return Source(kind, dtype, k=draw(st.integers(1, 6)))
    layout = draw(st.sampled_from(layouts))
    if kind == "logits":
        return Source(kind, dtype, layout)
    return Source(
        kind,
        dtype,
        layout,
        width=draw(st.sampled_from([1, 3, 8, 40])),
        bias=draw(st.sampled_from(["none", "normal", "bans"])),
        scale=draw(st.sampled_from([1.0, 1.0, 0.125, 2.5])),
        softcap=draw(st.sampled_from([None, None, 4.0, 30.0])),
        padding=draw(st.sampled_from([0, 0, 3])),
    )


ROWS_OF_BROKEN = st.tuples(st.sampled_from("st"), st.integers(0, 40), st.sampled_from([NAN, INF, -INF]))


@st.composite
def cases(draw) -> Case:
    call = draw(st.sampled_from(["token_stats", "divergence_loss", "distill", "distill"]))
    triton = draw(st.integers(0, 15)) == 0  # by the interpreter: slow, so small
    flat, batch = st.sampled_from([0, 1, 2, 5, 17, 24, 40]), st.sampled_from([(1, 1), (3, 5), (2, 9), (4, 0), (0, 3)])
    shape = (draw(flat),) if draw(st.booleans()) else draw(batch)
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(41, 400), st.sampled_from([1023, 1025, 2100])))
    if triton:
        shape, vocab = draw(st.sampled_from([(3,), (1, 2), (0,), (7,)])), min(vocab, 300)
    student, teacher = draw(sources()), draw(sources(teacher=True))
    listed = teacher.kind not in ("logits", "head")
    options: dict[str, object] = {
        "data": draw(st.integers(0, 10**6)),
        "spread": draw(st.sampled_from([0.01, 1.0, 3.0, 10.0])),
        "spread_t": draw(st.sampled_from([1.0, 1.0, 0.05, 3.0])),
        "shift": draw(st.sampled_from([0.0, 0.0, 60.0, -100.0])),
        "closeness": draw(st.sampled_from([0.0, 0.0, 1e-3, 0.05])),
        "bans": draw(st.sampled_from(["none", "none", "both", "s", "t", "tiles"])),
        "broken": tuple(draw(st.lists(ROWS_OF_BROKEN, min_size=1, max_size=2))) if draw(st.integers(0, 3)) == 0 else (),
        "workspace_mib": draw(st.sampled_from([4, 256] if triton else [0.004, 0.03, 0.2, 4, 256])),
        "backend": "triton" if triton else "eager",
    }
    if listed:
        options["divergence"] = draw(st.sampled_from(list(TOPK_VALUES)))
    else:
        options["temperature"] = draw(st.sampled_from([1.0, 1.0, 0.5, 2, "rows"]))
        options["divergence"] = draw(st.sampled_from([*FAMILY, "sampled"]))
    options["clip"] = draw(st.sampled_from([None, None, None, 0.5]))
    options["gates"] = draw(st.sampled_from(["none", "none", "numbers", "known", "read"]))
    options["labels"] = options["divergence"] == "sampled" or draw(st.booleans())
    if call == "token_stats":
        options |= {"margins": not listed and draw(st.booleans()), "top_k": 0 if listed else draw(st.integers(0, 6))}
        return Case(call, shape=shape, vocab=vocab, student=student, teacher=teacher, **options)
    options["row_weights"] = draw(st.booleans())
    if call == "divergence_loss":
        given_stats = options["divergence"] == "sampled" or draw(st.booleans())
        modes = ["dense"]
        if student.kind == "logits":
            modes += ["compact"] if len(shape) == 1 else []
            modes += ["inplace"] if student.layout == "contiguous" else []
        kept = draw(st.sampled_from(["all", "some", "none"]))
        options |= {"kept": kept, "given_stats": given_stats, "grad_logits": draw(st.sampled_from(modes))}
        return Case(call, shape=shape, vocab=vocab, student=student, teacher=teacher, **options)
    rules = [*QUOTA_RULES, "SoftOr", *OTHER_RULES]
    if listed:
        rules = [rule for rule in rules if rule not in ("TopMargin", "Teachability", "GreedyAgreement")]
    options["rule"] = draw(st.sampled_from(rules))
    if options["rule"] == "CrossEntropyRatio":
        options["labels"] = True
    keep = draw(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1, 3]))
    options |= {
        "keep": keep,
        "scope": draw(st.sampled_from(["rollout", "batch"])),
        "min_rows": draw(st.integers(0, 1 if isinstance(keep, int) else 2)),
        "masked": draw(st.booleans()),
        "rollouts": draw(st.booleans()),
        "ce_weight": draw(st.sampled_from([0.0, 0.3, 1.0])) if options["labels"] else 0.0,
        "temperature_sq": draw(st.booleans()),
        "normalizer": draw(st.sampled_from(["kept", "kept", "all", 7.5])),
        "full_stats": draw(st.booleans()),
        "sweeps": draw(st.sampled_from([None, 1, 1, 2] if student.kind == "head" and not listed else [None, 2])),
        "block": draw(st.sampled_from([1, 3, 8, 256])),
        "at_once": draw(st.integers(0, 4)) == 0,
        "loss_scale": draw(st.sampled_from([1.0, 1.0, 2.0**10])),
        "weigher": draw(st.integers(0, 3)) == 0,
        "junk": draw(st.booleans()),
    }
    return Case(call, shape=shape, vocab=vocab, student=student, teacher=teacher, **options)


# The tensors of a case


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another layout of memory."""
    if layout == "rows apart":
        base = x.new_empty(*x.shape[:-1], x.shape[-1] + 5)
        view = base[..., : x.shape[-1]]
    elif layout == "columns first":
        view = x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)
    elif layout == "cut in time" and x.dim() == 3:
        view = x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2])[:, :-1]
    else:
        return x.contiguous()
    return view.copy_(x)


@dataclass
class Model:
    """The tensors of a source (its leaves), and what they stand for in any precision."""

    source: Source
    leaves: list[Tensor]
    vocab: int
    broken: Tensor  # (N,) bool: rows with a NaN, a +inf or nothing allowed

    def public(self) -> Tensor | tip.Head:
        if self.source.kind == "logits":
            return self.leaves[0]
        hidden, weight, *bias = self.leaves
        size = self.vocab if self.source.padding else None
        return tip.Head(hidden, weight, *bias, scale=self.source.scale, softcap=self.source.softcap, vocab_size=size)

    def learning(self) -> Model:
        return Model(self.source, [x.detach().requires_grad_() for x in self.leaves], self.vocab, self.broken)

    def copied(self, dtype: torch.dtype, *, mended: bool) -> Model:
        """Leaves of another precision; mended: with zeros in broken rows, whose NaN would spoil autograd's products."""
        leaves = [x.detach().to(dtype).clone() for x in self.leaves]
        if mended:
            leaves[0][self.broken.view(leaves[0].shape[:-1])] = 0.0
        return Model(self.source, [x.requires_grad_() for x in leaves], self.vocab, self.broken)

    def logits(self) -> Tensor:
        """(N, V) in the leaves' precision."""
        if self.source.kind == "logits":
            return self.leaves[0].reshape(-1, self.vocab)
        hidden, weight, *bias = self.leaves
        v = self.vocab
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scales = {"scale": self.source.scale, "softcap": self.source.softcap}
        return ref.logits(hidden, weight[:v], *(b[:v] for b in bias), **scales)


def bans_of(case: Case, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, V) bool of each model."""
    n, v = case.n_rows, case.vocab
    some = torch.rand(n, v, generator=g) < 0.2
    some[:, : max(1, v // 8)] = False
    none = torch.zeros_like(some)
    tiles_s, tiles_t = none.clone(), none.clone()
    tiles_s[:, : v // 2], tiles_t[:, v - v // 3 :] = True, True
    pairs = {"none": (none, none), "both": (some, some), "s": (some, none), "t": (none, some)}
    return (pairs | {"tiles": (tiles_s, tiles_t)})[case.bans]


def top_k_of(source: Source, z: Tensor) -> tip.TopK:
    """The top k of each row, some entries absent."""
    k = min(source.k, z.shape[-1])
    top = z.nan_to_num(nan=0.0, posinf=0.0, neginf=-INF).log_softmax(-1).topk(k)
    absent = torch.arange(k) < torch.arange(z[..., 0].numel()).view(*z.shape[:-1], 1) % (k + 1)
    return tip.TopK(top.indices.masked_fill(absent, -1), top.values.to(DTYPES[source.dtype]), source.kind)


def models_of(case: Case) -> tuple[Model, Model | tip.TopK]:
    """The student and the teacher."""
    g = torch.Generator().manual_seed(case.data)
    n, v = case.n_rows, case.vocab
    spread = {"s": case.spread, "t": case.spread * case.spread_t}
    plain = {m: spread[m] * torch.randn(n, v, generator=g) for m in "st"}
    if case.closeness:
        plain["t"] = plain["s"] + case.closeness * torch.randn(n, v, generator=g)
    bans = dict(zip("st", bans_of(case, g), strict=True))
    ban_of_bias = torch.rand(v + 3, generator=g) < 0.1
    ban_of_bias[0] = False
    made: dict[str, Model | tip.TopK] = {}
    for m, source in (("s", case.student), ("t", case.teacher)):
        dtype, faults = DTYPES[source.dtype], [(r % n, x) for who, r, x in case.broken if who == m and n]
        if source.kind not in ("logits", "head"):
            faults = []
        if source.kind == "head":
            rows = v + source.padding
            hidden = torch.randn(n, source.width, generator=g)
            weight = spread[m] / source.scale * source.width**-0.5 * torch.randn(rows, source.width, generator=g)
            leaves = [hidden, weight]
            if source.bias != "none":
                bias = torch.randn(rows, generator=g)
                leaves.append(bias if source.bias == "normal" else bias.masked_fill(ban_of_bias[:rows], -INF))
            for row, _ in faults:
                hidden[row] = NAN  # an infinity would be a finite logit under a softcap
            leaves = [x.to(dtype) for x in leaves]
            leaves[0] = laid_out(leaves[0].view(*case.shape, source.width), source.layout)
            leaves[1] = laid_out(leaves[1], source.layout)
        else:
            z = plain[m] + (case.shift if m == "s" else -case.shift)
            z = z.masked_fill(bans[m], -INF)
            for row, value in faults:
                z[row] = value if value == -INF else torch.where(torch.arange(v) == row % v, value, z[row])
            if source.layout == "expanded" and n:
                z = z[:1].expand(n, v)
            z = z.to(dtype).reshape(*case.shape, v)
            leaves = [z if source.layout == "expanded" else laid_out(z, source.layout)]
        if source.kind not in ("logits", "head"):
            made[m] = top_k_of(source, leaves[0].float())
            continue
        model = Model(source, leaves, v, torch.zeros(n, dtype=torch.bool))
        model.broken = ref.broken_rows(model.logits().double())
        made[m] = model
    return made["s"], made["t"]


@contextlib.contextmanager
def settings_of(case: Case) -> Iterator[None]:
    """Workspaces below a MiB, short row blocks, a backend; a kept row without a finite loss is no surprise here."""

    checked = pair.workspace_bytes

    def workspace_bytes(value: float) -> int:
        return int(value * 2**20) if value < 1 else checked(value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(pair, "workspace_bytes", workspace_bytes))
        stack.enter_context(patch.object(one_sweep, "ROWS", {"cpu": (1, case.block)}))
        stack.enter_context(tip.backend(case.backend))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="tip_kernels.distill: a kept row")
        stack.enter_context(np.errstate(all="ignore"))  # the interpreter is numpy
        yield


@dataclass
class Reads:
    """A gate that says that it reads a statistic of the teacher."""

    gate: Tensor
    needs = frozenset({"entropy_t"})

    def __call__(self, stats: tip.TokenStats, row_mask: Tensor | None, rollout_ids: Tensor | None) -> Tensor:
        assert stats.entropy_t.numel() == self.gate.numel()
        return self.gate


@dataclass
class Problem:
    """A case's tensors and per-row arguments."""

    case: Case
    student: Model
    teacher: Model | tip.TopK
    labels: Tensor | None
    temperature: float | Tensor
    row_weights: Tensor | None
    row_mask: Tensor | None
    rollout_ids: Tensor | None

    @classmethod
    def of(cls, case: Case) -> Problem:
        student, teacher = models_of(case)
        n, g = case.n_rows, torch.Generator().manual_seed(case.data + 1)
        labels = torch.randint(0, case.vocab, (n,), generator=g)
        labels[torch.rand(n, generator=g) < 0.2] = -100
        tau = 0.4 + 2 * torch.rand(n, generator=g)
        weights = 2 * torch.rand(n, generator=g)
        weights[torch.rand(n, generator=g) < 0.2] = 0.0
        mask = torch.rand(n, generator=g) < 0.7
        ids = torch.randint(-2, 2, (n,), generator=g) * 10**12
        return cls(
            case,
            student,
            teacher,
            labels if case.labels else None,
            tau if case.temperature == "rows" else case.temperature,
            weights if case.row_weights else None,
            mask if case.masked else None,
            ids if case.rollouts else None,
        )

    def in_shape(self, x: Tensor | float | None) -> Tensor | float | None:
        """A per-row argument in the batch's own shape, every other time."""
        return x.view(self.case.shape) if isinstance(x, Tensor) and self.case.data % 2 else x

    @property
    def public_teacher(self) -> Tensor | tip.Head | tip.TopK:
        return self.teacher if isinstance(self.teacher, tip.TopK) else self.teacher.public()

    @property
    def coldest(self) -> float:
        tau = self.temperature
        return min([1.0, *tau.tolist()]) if isinstance(tau, Tensor) else float(tau)

    @property
    def largest_logit(self) -> float:
        """Of either model, over the temperature, and what a log-probability of a flat row adds."""
        z = [m.logits().detach().float() for m in (self.student, self.teacher) if isinstance(m, Model)]
        most = max(x.abs().nan_to_num(0.0, posinf=0.0).max().item() if x.numel() else 0.0 for x in z)
        return most / self.coldest + math.log(self.case.vocab)

    @property
    def floor(self) -> float:
        """No result of fp32 logits can be told better than a step of the largest."""
        return STATISTIC_FLOOR + 4 * ULP * self.largest_logit

    def at_temperature(self, z: Tensor) -> Tensor:
        tau = self.temperature
        return z / (tau.to(z.dtype).unsqueeze(1) if isinstance(tau, Tensor) else tau)

    def broken(self) -> tuple[Tensor, Tensor]:
        """(N,) bool of each model."""
        if isinstance(self.teacher, Model):
            return self.student.broken, self.teacher.broken
        teacher, k = self.teacher, self.teacher.ids.shape[-1]
        listed = teacher.ids.view(-1, k), teacher.logp.view(-1, k).double()
        z = self.student.copied(torch.float64, mended=True).logits().detach()
        return self.student.broken, ref.topk_entropy(z, *listed, teacher.tail).isnan()

    def value(self, z_s: Tensor, dtype: torch.dtype, *, mended: bool) -> Tensor:
        """The reference's divergence (N,) of the student's logits at temperature 1."""
        value = self.value_of(self.case.divergence, z_s, dtype, mended=mended)
        if self.gates is not None:
            second = self.value_of(self.second, z_s, dtype, mended=mended)
            broken = torch.zeros_like(value, dtype=torch.bool) if mended else self.broken()[0] | self.broken()[1]
            if isinstance(self.teacher, tip.TopK):  # a list of which the student bans all cannot be renormalised
                broken = broken | value.isnan()
            value = ref.gated([value, second], self.gates, broken)
        return value if self.case.clip is None else clipped(value, self.case.clip)

    def value_of(self, name: str, z_s: Tensor, dtype: torch.dtype, *, mended: bool) -> Tensor:
        """That of the divergence of the given name."""
        teacher = self.teacher
        if isinstance(teacher, tip.TopK):
            k = teacher.ids.shape[-1]
            ids, logp = teacher.ids.view(-1, k), teacher.logp.view(-1, k)
            return TOPK_VALUES[name](z_s, ids, logp.to(dtype), teacher.tail)
        with torch.no_grad():
            z_t = self.at_temperature(teacher.copied(dtype, mended=mended).logits())
        z_s = self.at_temperature(z_s)
        return ref.sampled_reverse_kl(z_s, z_t, self.labels) if name == "sampled" else FAMILY[name][1](z_s, z_t)

    @property
    def second(self) -> str:
        """The divergence beside a gated one."""
        return "hellinger" if self.case.divergence == "forward" else "forward"

    @cached_property
    def gates(self) -> list[Tensor] | None:
        """(N,) of the divergence and the second one, a third of them 0."""
        case = self.case
        if case.gates == "none":
            return None
        g = torch.Generator().manual_seed(case.data + 3)
        if case.gates == "numbers":
            return [torch.full((case.n_rows,), x) for x in (torch.rand(2, generator=g) > 0.3).float() * 0.75]
        gates = torch.rand(2, case.n_rows, generator=g)
        return list(gates.masked_fill(torch.rand(gates.shape, generator=g) < 0.3, 0.0))

    @property
    def divergence(self) -> tip.Divergence:
        case = self.case
        ours = tip.SampledReverseKL() if case.divergence == "sampled" else FAMILY[case.divergence][0]
        if self.gates is not None:
            given = [self.in_shape(gate) for gate in self.gates]
            if case.gates == "numbers" and case.n_rows:
                given = [float(gate[0]) for gate in self.gates]
            if case.gates == "read":
                given = [Reads(gate) for gate in given]
            ours = tip.Gated(dict(zip((ours, FAMILY[self.second][0]), given, strict=True)))
        return ours if case.clip is None else ours.clipped(case.clip)

    @property
    def scale(self) -> float:
        """What the value multiplies its rounded sums with."""
        return SCALE.get(self.case.divergence, 1.0) + (self.gates is not None)

    def through_reference(self, weights: Callable[[Tensor], Tensor], ce_weight: float = 0.0) -> list[tuple]:
        """(row losses, the leaves' gradients of sum(weights(losses) * losses)) in float64 and in float32.

        A row whose loss is not finite has gradient 0.
        """
        out = []
        for dtype in (torch.float64, torch.float32):
            with torch.no_grad():
                z = self.student.copied(dtype, mended=False).logits()
                value = self.row_losses(z, dtype, ce_weight, mended=False)
            mended = self.student.copied(dtype, mended=True)
            losses = self.row_losses(mended.logits(), dtype, ce_weight, mended=True)
            w = weights(value).to(dtype)
            live = value.isfinite() & (w != 0)
            losses.backward(torch.where(live, w, 0.0))
            grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in mended.leaves]
            out.append((value, grads))
        return out

    def row_losses(self, z_s: Tensor, dtype: torch.dtype, ce_weight: float, *, mended: bool) -> Tensor:
        case, factor = self.case, 1.0 - ce_weight
        if case.call == "distill" and case.temperature_sq:
            tau = self.temperature
            factor = factor * (tau.to(dtype) if isinstance(tau, Tensor) else tau) ** 2
        muted = ce_weight == 1  # a divergence that is not finite, times 0, counts for nothing
        value = self.value(z_s, dtype, mended=mended)
        losses = torch.zeros_like(value) if muted else value * factor
        if muted:  # still a NaN row where either model is broken
            losses = losses + torch.where(self.broken()[0] | self.broken()[1], NAN, 0.0).to(dtype) * (not mended)
        if ce_weight:
            labels = self.labels
            picked = -z_s.log_softmax(-1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            losses = losses + ce_weight * torch.where(labels == -100, 0.0, picked)
        return losses


def clipped(value: Tensor, limit: float) -> Tensor:
    """min(value, limit), with gradient 0 at the limit; NaN stays."""
    return torch.where(value > limit, torch.full_like(value, limit), value)


# What has to hold


def check(case: Case) -> None:
    """Runs a case and compares everything it returns with the reference."""
    with settings_of(case):
        {"token_stats": check_token_stats, "divergence_loss": check_loss, "distill": check_distill}[case.call](
            Problem.of(case)
        )


def check_token_stats(problem: Problem) -> None:
    case = problem.case
    ours = tip.token_stats(
        problem.student.public(),
        problem.public_teacher,
        labels=problem.in_shape(problem.labels),
        temperature=problem.in_shape(problem.temperature),
        margins=case.margins,
        top_k=case.top_k,
        workspace_mib=case.workspace_mib,
    )
    check_statistics(problem, ours, None, dict.fromkeys(PUBLIC))


def check_statistics(problem: Problem, ours: tip.TokenStats, top_k: int | None, rows: dict[str, Tensor | None]) -> None:
    """Holds each field of ours that rows names to the bound, at the rows (N,) bool it was measured at (None: all)."""
    case = problem.case
    z = [problem.student.copied(dtype, mended=False).logits().detach() for dtype in (torch.float64, torch.float32)]
    asked = {"labels": problem.labels, "margins": True, "top_k": case.top_k if top_k is None else top_k}
    if isinstance(problem.teacher, tip.TopK):
        check_listed_statistics(problem, ours, z, rows)
        return
    z_s = [problem.at_temperature(x) for x in z]
    z_t = [
        problem.at_temperature(problem.teacher.copied(d, mended=False).logits().detach())
        for d in (torch.float64, torch.float32)
    ]
    truth, eager = (ref.token_stats(z_s[i], z_t[i], **asked) for i in (0, 1))
    for name, where in rows.items():
        mine = ours._get(name)
        if mine is None:
            assert top_k is not None or truth[name] is None or not case.margins, f"{name} was asked for"
            continue
        assert truth[name] is not None, f"{name} was not asked for"
        pick = slice(None) if where is None else where
        mine, true, rough = mine[pick], truth[name][pick], eager[name][pick]
        if true.dtype in (torch.bool, torch.int64):
            differs = mine != true
            if differs.any():  # a tie in fp32 that is none in float64
                assert (differs & (mine == rough)).sum() == differs.sum(), f"{name}: {mine} instead of {true}"
        else:
            no_worse(mine, rough, true, name, problem.floor)


def check_listed_statistics(
    problem: Problem, ours: tip.TokenStats, z: list[Tensor], rows: dict[str, Tensor | None]
) -> None:
    k, teacher = problem.teacher.ids.shape[-1], problem.teacher
    ids, logp = teacher.ids.view(-1, k), teacher.logp.view(-1, k)
    formulas = {
        "kl_fwd": ref.topk_forward_kl,
        "kl_rev": ref.topk_reverse_kl,
        "hellinger_sq": ref.topk_hellinger_sq,
        "entropy_t": ref.topk_entropy,
    }
    for name, formula in formulas.items():
        mine = ours._get(name)
        if mine is None or name not in rows:
            continue
        truth, eager = (formula(x, ids, logp.to(x.dtype), teacher.tail) for x in z)
        if name.startswith("kl") and teacher.tail != "ignore":
            truth, eager = truth.clamp(min=0), eager.clamp(min=0)
        pick = slice(None) if rows[name] is None else rows[name]
        no_worse(mine[pick], eager[pick], truth[pick], f"{name} of a list", problem.floor)


def check_loss(problem: Problem) -> None:
    case, n = problem.case, problem.case.n_rows
    student = problem.student.learning()
    source = student.public()
    if case.grad_logits == "inplace":
        source = source * 1
    kept = None
    if case.kept != "all":
        mask = torch.rand(n, generator=torch.Generator().manual_seed(case.data + 2)) < (
            0.6 if case.kept == "some" else 0
        )
        kept = Kept(mask, torch.zeros(n))
    mask = torch.ones(n, dtype=torch.bool) if kept is None else kept.mask
    options = {"temperature": problem.in_shape(problem.temperature), "workspace_mib": case.workspace_mib}
    measured = None
    if case.given_stats:
        labels = problem.in_shape(problem.labels)
        measured = tip.token_stats(problem.student.public(), problem.public_teacher, labels=labels, **options)
    ours = tip.divergence_loss(
        source,
        problem.public_teacher,
        divergence=problem.divergence,
        kept=kept,
        stats=measured,
        row_weights=problem.in_shape(problem.row_weights),
        grad_logits=case.grad_logits,
        **options,
    )
    upstream = torch.linspace(0.5, 2.0, n)[mask]
    upstream = torch.where(ours.detach().isfinite(), upstream, 0.0)
    ours.backward(upstream)
    w = torch.ones(n) if problem.row_weights is None else problem.row_weights
    full = torch.zeros(n).masked_scatter(mask, upstream)
    truth, eager = problem.through_reference(lambda value: full * w)
    floor = problem.scale
    check_value_of(ours.detach(), *((x * w)[mask] for x in (eager[0], truth[0])), problem.floor * max(2.0, floor))
    check_leaves(problem, student, eager[1], truth[1], 2.0 * max([0.0, *w.tolist()]) * floor)


def check_value_of(ours: Tensor, eager: Tensor, truth: Tensor, floor: float) -> None:
    """A relative error of at most 1e-5, or twice eager fp32's worst, or below the floor of a statistic."""
    near = truth.isfinite() & ((ours.double() - truth).abs() <= 1e-5 * truth.abs())
    no_worse(torch.where(near, truth, ours.double()), eager, truth, "loss", floor)


def check_leaves(
    problem: Problem, student: Model, eager: list[Tensor], truth: list[Tensor], row_weight: float, roundings: int = 1
) -> None:
    """Each leaf's gradient in its own dtype, none of it beyond so many roundings and the bound."""
    leaves = [x.detach().float() for x in student.leaves]
    grow = {"hidden": 1.0, "weight": 1.0, "bias": 1.0, "logits": 1.0}
    if student.source.kind == "head":
        sound = leaves[0].reshape(-1, leaves[0].shape[-1])[~student.broken]
        grow["hidden"] = leaves[1].abs().sum(0).max().item() * student.source.scale
        grow["weight"] = (sound.abs().sum(0).max().item() if sound.numel() else 1.0) * student.source.scale
        grow["bias"] = max(1, len(sound)) * student.source.scale
    names = ("logits",) if student.source.kind == "logits" else ("hidden", "weight", "bias")
    for name, x, rough, true in zip(names, student.leaves, eager, truth, strict=False):
        assert x.grad is not None, f"{name}: no gradient"
        assert x.grad.dtype == x.dtype, name
        ours = (x.grad.to_dense() if x.grad.is_sparse else x.grad).double()
        assert ours.isfinite().all(), f"{name}: {ours}"
        if problem.case.backend == "triton":
            roundings = 2  # the interpreter cuts bfloat16 where a GPU rounds it
        step = roundings * torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0.0
        slack = step * (true.abs() + torch.finfo(x.dtype).smallest_normal)
        rounded = torch.where((ours - true).abs() <= slack, true, ours - slack * (ours - true).sign())
        check_gradient(
            rounded,
            rough.double(),
            true,
            name,
            largest_logit=problem.largest_logit,
            row_weight=row_weight * grow[name] / problem.coldest,
        )


@dataclass(frozen=True)
class ByEntropy:
    """A row weight that falls with the student's entropy, 0 beyond a nat, times what it is given."""

    beside: Tensor | None
    needs = frozenset({"entropy_s"})

    def __call__(
        self, stats: tip.TokenStats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None
    ) -> Tensor:
        w = (1 - stats.entropy_s).clamp(min=0.0)
        return w if self.beside is None else w * self.beside


def junk_where_masked(problem: Problem) -> dict[str, Tensor | float | None]:
    """The per-row arguments, where a row is masked with values that no row may have."""
    worst = {"labels": 10**9, "row_weights": NAN, "temperature": -1.0}
    said = {name: getattr(problem, name) for name in worst}
    if problem.case.junk and problem.row_mask is not None:
        for name, x in said.items():
            if isinstance(x, Tensor):
                said[name] = x.masked_fill(~problem.row_mask, worst[name])
    return said


def rule_of(case: Case) -> tip.Rule:
    if case.rule in OTHER_RULES:
        return OTHER_RULES[case.rule]
    return QUOTA_RULES[case.rule][0](case.keep, scope=case.scope, min_rows=case.min_rows)


def check_distill(problem: Problem) -> None:
    case, n = problem.case, problem.case.n_rows
    student = problem.student.learning()
    said = junk_where_masked(problem)
    weights = ByEntropy(said["row_weights"]) if case.weigher else problem.in_shape(said["row_weights"])
    options = {
        "select": rule_of(case),
        "divergence": problem.divergence,
        "row_mask": problem.in_shape(problem.row_mask),
        "rollout_ids": problem.in_shape(problem.rollout_ids),
        "labels": problem.in_shape(said["labels"]),
        "ce_weight": case.ce_weight,
        "row_weights": weights,
        "temperature": problem.in_shape(said["temperature"]),
        "temperature_sq": case.temperature_sq,
        "normalizer": case.normalizer,
        "workspace_mib": case.workspace_mib,
        "full_stats": case.full_stats,
        "backward": case.at_once,
        "grad_scale": torch.tensor(case.loss_scale) if case.at_once else 1.0,
    }
    try:
        out = distill(student.public(), problem.public_teacher, sweeps=case.sweeps, **options)
    except ValueError as refused:
        if case.sweeps != 1 or not str(refused).startswith("sweeps: expected 2 or None"):
            raise
        options["select"] = rule_of(case)
        out = distill(student.public(), problem.public_teacher, sweeps=None, **options)
    else:
        assert case.sweeps != 1 or out.plan.strategy == "one sweep"
    if not case.at_once:
        (out.loss * case.loss_scale).backward()
    kept = out.kept.mask
    check_selection(problem, out)

    rule, mask = rule_of(case), torch.ones(n, dtype=torch.bool) if problem.row_mask is None else problem.row_mask
    reads = case.full_stats or case.gates == "read"
    every = bool(rule.needs) or reads or case.weigher
    of_teacher = reads or bool(rule.needs - {"lse_s", "entropy_s", "margin_s", "logp_s"})
    rows = {}
    for name in PUBLIC:
        student_only = name in ("lse_s", "entropy_s", "margin_s", "logp_s")
        rows[name] = mask if every and (of_teacher or student_only) else kept
    check_statistics(problem, out.stats, getattr(rule, "top_k", 0), rows)

    broken_s, broken_t = problem.broken()
    found = mask & ((broken_s & every) | (broken_t & of_teacher) | (kept & (broken_s | broken_t)))
    w = torch.ones(n) if problem.row_weights is None else problem.row_weights.clone()
    if case.weigher:
        w = ByEntropy(w)(out.stats)
    if out.kept._weights is not None:
        w = w * out.kept._weights
    w = torch.where(kept, w, 0.0).double()

    def share(value: Tensor) -> Tensor:
        """The weights of finite rows, divided by the normaliser."""
        usable = torch.where(value.isfinite(), w, 0.0)
        total = {"kept": usable.sum(), "all": (mask & ~found).sum()}.get(case.normalizer, case.normalizer)
        return usable / total if total else usable

    truth, eager = problem.through_reference(share, case.ce_weight)
    sums = [(torch.where(v.isfinite(), share(v) * v.double(), 0.0)).sum() for v, _ in (truth, eager)]
    weight = share(truth[0])
    tau = problem.temperature
    factor = 1.0
    if case.temperature_sq:
        factor = max([1.0, *(tau.tolist() if isinstance(tau, Tensor) else [tau])]) ** 2
    floor = problem.scale * factor
    check_value_of(out.loss.detach(), sums[1], sums[0], problem.floor * floor * max(1.0, weight.sum().item()))
    assert out.plan.kept_rows == kept.sum()
    assert out.plan.dropped_rows == (kept & ~truth[0].isfinite()).sum()
    # a gradient made before its scale is known is rounded before and after
    roundings = 1 if out.plan.strategy == "two sweeps" else 2
    scaled = [[case.loss_scale * g for g in grads] for _, grads in (eager, truth)]
    largest = weight.max().item() * floor * case.loss_scale if n else 0.0
    check_leaves(problem, student, *scaled, largest, roundings)


def check_selection(problem: Problem, out: tip.Distilled) -> None:
    """The rule, and where there is one the reference's loop, chooses the same rows from the statistics returned."""
    case, kept = problem.case, out.kept.mask
    where = {"row_mask": problem.row_mask, "rollout_ids": problem.rollout_ids}
    if where["row_mask"] is not None or rule_of(case).needs:
        again = rule_of(case)(out.stats, *map(problem.in_shape, where.values()))
        assert torch.equal(kept, again.mask)
    reference = QUOTA_RULES.get(case.rule, (None, None))[1]
    if reference is None:
        return
    columns = {name: value for name in PUBLIC if (value := out.stats._get(name)) is not None}
    columns = columns or {"entropy_s": torch.zeros(case.n_rows)}
    if where["rollout_ids"] is None and len(case.shape) == 2:
        where["rollout_ids"] = torch.arange(case.n_rows) // max(case.shape[1], 1)
    expected = reference(columns, case.keep, scope=case.scope, min_rows=case.min_rows, **where)
    assert torch.equal(kept, expected)


def test_random_cases_are_no_worse_than_the_bound(shard):
    number, count = shard

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        try:
            check(case)
        except Exception:
            print(f'python -c "from tests.test_properties import *; check({case!r})"')
            raise

    run()
