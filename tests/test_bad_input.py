"""Every public argument of measuring and learning refuses what it cannot take, by name, and changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from operator import attrgetter

import pytest
import torch
from torch import Tensor

import tip_kernels as tip
from tests._cases import HOW, distill
from tip_kernels.__main__ import main

N, V, H = 6, 20, 8
GOT = r", got .+"


@dataclasses.dataclass
class Call:
    """Good arguments of a call of distill, to be spoilt one at a time."""

    student: object
    teacher: object
    options: dict


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, H, generator=g, requires_grad=True),
        "weight": torch.randn(V, H, generator=g, requires_grad=True),
        "bias": torch.randn(V, generator=g),
        "logits": torch.randn(N, V, generator=g, requires_grad=True),
        "teacher": torch.randn(N, V, generator=g),
    }


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def needing(fields: object) -> object:
    """Weights of 1 that say they need those fields."""
    weigh = functools.partial(lambda stats, *_: torch.ones(N))
    weigh.needs = fields
    return weigh


META = torch.device("meta")  # a device that is not the sources' own

HEAD = [  # argument, fault, value, what the message says after "ARGUMENT: expected"
    ("hidden", "not a tensor", [[1.0]], r"a float32, bfloat16 or float16 tensor of shape \(N, H\) or \(B, T, H\)"),
    ("hidden", "one dimension", ones(H), "a float32, bfloat16 or float16 tensor of shape"),
    ("hidden", "four dimensions", ones(1, 2, 3, H), "a float32, bfloat16 or float16 tensor of shape"),
    ("hidden", "float64", ones(N, H, dtype=torch.float64), "a float32, bfloat16 or float16 tensor"),
    ("hidden", "int64", ones(N, H, dtype=torch.int64), "a float32, bfloat16 or float16 tensor"),
    ("weight", "not a tensor", None, rf"a float tensor of shape \(V, {H}\)"),
    ("weight", "one dimension", ones(H), rf"a float tensor of shape \(V, {H}\)"),
    ("weight", "another width", ones(V, H + 1), rf"a float tensor of shape \(V, {H}\)"),
    ("weight", "transposed", ones(H, V), rf"a float tensor of shape \(V, {H}\)"),
    ("weight", "no rows", ones(0, H), "at least one vocabulary row"),
    ("weight", "another dtype", ones(V, H, dtype=torch.bfloat16), "hidden's dtype torch.float32"),
    ("weight", "int64", ones(V, H, dtype=torch.int64), "a float tensor"),
    ("weight", "another device", torch.ones(V, H, device=META), "a tensor on hidden's device cpu"),
    ("bias", "not a tensor", 0.0, rf"a float tensor of shape \({V},\) on cpu, or None"),
    ("bias", "another length", ones(V + 1), rf"a float tensor of shape \({V},\)"),
    ("bias", "a column", ones(V, 1), rf"a float tensor of shape \({V},\)"),
    ("bias", "int64", ones(V, dtype=torch.int64), rf"a float tensor of shape \({V},\)"),
    ("bias", "another device", torch.ones(V, device=META), ".* on cpu, or None"),
    ("scale", "nan", math.nan, "a finite number"),
    ("scale", "infinite", math.inf, "a finite number"),
    ("scale", "a string", "1", "a finite number"),
    ("scale", "a bool", True, "a finite number"),
    ("scale", "a tensor", ones(1), "a finite number"),
    ("scale", "too large a number", 10**400, "a finite number"),
    ("softcap", "zero", 0.0, "a finite number above 0"),
    ("softcap", "negative", -30, "a finite number above 0"),
    ("softcap", "infinite", math.inf, "a finite number above 0"),
    ("softcap", "a string", "30", "a finite number above 0"),
    ("vocab_size", "zero", 0, f"an int from 1 to weight's {V} rows"),
    ("vocab_size", "above the rows", V + 1, f"an int from 1 to weight's {V} rows"),
    ("vocab_size", "a float", 3.0, "an int from 1"),
    ("vocab_size", "a bool", True, "an int from 1"),
    ("vocab_group", "a number", 1, "a process group"),
]


@pytest.mark.parametrize("argument, fault, value, expected", HEAD, ids=[f"{a}, {f}" for a, f, *_ in HEAD])
def test_a_head_refuses(argument, fault, value, expected):
    good = {name: x for name, x in tensors().items() if name in ("hidden", "weight", "bias")}
    with pytest.raises(ValueError, match=rf"^{argument}: expected {expected}.*{GOT}"):
        tip.Head(**(good | {argument: value}))


def test_a_head_without_width_is_refused():
    with pytest.raises(ValueError, match=r"^hidden: expected"):
        tip.Head(torch.zeros(2, 3, 0), torch.zeros(V, 0))


LOGITS = r"float32, bfloat16 or float16 logits of shape \(N, V\) or \(B, T, V\), or a tip_kernels.Head"
SOURCES = [  # for the student and the teacher of every call
    ("not a tensor", [[1.0]], LOGITS),
    ("one dimension", ones(V), LOGITS),
    ("four dimensions", ones(1, 2, 3, V), LOGITS),
    ("float64", ones(N, V, dtype=torch.float64), LOGITS),
    ("int64", ones(N, V, dtype=torch.int64), LOGITS),
    ("complex", ones(N, V, dtype=torch.complex64), LOGITS),
    ("no vocabulary", ones(N, 0), "at least one vocabulary entry"),
]
MISMATCHES = [  # for the teacher of every call
    ("another vocabulary", ones(N, V + 2), rf"the student's vocabulary of {V} entries, got {V + 2}; .*vocab_size={V}"),
    ("more rows", ones(N + 1, V), rf"the student's rows \({N},\), got \({N + 1},\)"),
    ("another batch shape", ones(2, 3, V), rf"the student's rows \({N},\), got \(2, 3\)"),
    ("another device", torch.ones(N, V, device=META), "the student's device cpu, got meta"),
    ("a head of another vocabulary", tip.Head(ones(N, H), ones(V + 2, H)), f"the student's vocabulary of {V} entries"),
    ("a head of more rows", tip.Head(ones(N + 1, H), ones(V, H)), r"the student's rows"),
]

TEMPERATURES = [
    ("zero", 0.0, "a finite number above 0"),
    ("negative", -1, "a finite number above 0"),
    ("nan", math.nan, "a finite number above 0"),
    ("infinite", math.inf, "a finite number above 0"),
    ("a string", "1", "a finite number above 0"),
    ("a bool", True, "a finite number above 0"),
    ("none", None, "a finite number above 0"),
    ("too large a number", 10**400, "a finite number above 0"),
    ("another length", ones(N + 1), rf"a .*float32.* tensor of shape \({N},\)"),
    ("one for all rows", ones(1), rf"a .*float32.* tensor of shape \({N},\)"),
    ("a scalar tensor", torch.tensor(1.0), rf"a .*float32.* tensor of shape \({N},\)"),
    ("a column", ones(N, 1), rf"a .*float32.* tensor of shape \({N},\)"),
    ("int64", ones(N, dtype=torch.int64), "a .*float32.* tensor"),
    ("another device", torch.ones(N, device=META), "a tensor on cpu"),
    ("a zero among them", torch.tensor([1.0] * (N - 1) + [0.0]), "finite values above 0"),
    ("a nan among them", torch.tensor([1.0] * (N - 1) + [math.nan]), "finite values above 0"),
    ("an infinity among them", torch.tensor([1.0] * (N - 1) + [math.inf]), "finite values above 0"),
]
LABELS = [
    ("not a tensor", [0] * N, rf"a int64 tensor of shape \({N},\)"),
    ("int32", ones(N, dtype=torch.int32), rf"a int64 tensor of shape \({N},\)"),
    ("float", ones(N), rf"a int64 tensor of shape \({N},\)"),
    ("another length", ones(N + 1, dtype=torch.int64), rf"a int64 tensor of shape \({N},\)"),
    ("a column", ones(N, 1, dtype=torch.int64), rf"a int64 tensor of shape \({N},\)"),
    ("another device", torch.ones(N, dtype=torch.int64, device=META), "a tensor on cpu"),
    ("V", V * ones(N, dtype=torch.int64), f"values from 0 to {V - 1}, or -100 for none"),
    ("-1", -1 * ones(N, dtype=torch.int64), f"values from 0 to {V - 1}, or -100 for none"),
]
WORKSPACES = [
    ("zero", 0, "a number of MiB, at least 1"),
    ("negative", -256, "a number of MiB, at least 1"),
    ("nan", math.nan, "a (finite number|number of MiB, at least 1)"),
    ("infinite", math.inf, "a (finite number|number of MiB, at least 1)"),
    ("a string", "256", "a (finite number|number of MiB, at least 1)"),
    ("a bool", True, "a (finite number|number of MiB, at least 1)"),
]
TOP_K = [
    ("negative", -1, "an int of at least 0"),
    ("a float", 2.0, "an int of at least 0"),
    ("a bool", True, "an int of at least 0"),
    ("none", None, "an int of at least 0"),
]
ROW_WEIGHTS = [
    ("a number", 1.0, rf"a float32 or bfloat16 or float16 tensor of shape \({N},\)"),
    ("another length", ones(N + 1), rf"a .*tensor of shape \({N},\)"),
    ("a column", ones(N, 1), rf"a .*tensor of shape \({N},\)"),
    ("int64", ones(N, dtype=torch.int64), "a float32"),
    ("bool", ones(N, dtype=torch.bool), "a float32"),
    ("another device", torch.ones(N, device=META), "a tensor on cpu"),
]
ROW_MASKS = [
    ("a list", [True] * N, rf"a bool tensor of shape \({N},\)"),
    ("float", ones(N), rf"a bool tensor of shape \({N},\)"),
    ("int64", ones(N, dtype=torch.int64), rf"a bool tensor of shape \({N},\)"),
    ("another length", ones(N + 1, dtype=torch.bool), rf"a bool tensor of shape \({N},\)"),
    ("a column", ones(N, 1, dtype=torch.bool), rf"a bool tensor of shape \({N},\)"),
    ("another device", torch.ones(N, dtype=torch.bool, device=META), "a tensor on cpu"),
]
ROLLOUT_IDS = [
    ("a list", [0] * N, rf"a int64 tensor of shape \({N},\)"),
    ("int32", ones(N, dtype=torch.int32), rf"a int64 tensor of shape \({N},\)"),
    ("another length", ones(N + 1, dtype=torch.int64), rf"a int64 tensor of shape \({N},\)"),
    ("another device", torch.ones(N, dtype=torch.int64, device=META), "a tensor on cpu"),
]
DIVERGENCES = [
    ("a string", "reverse", "a Divergence such as tip_kernels.ReverseKL"),
    ("the class", tip.ReverseKL, "a Divergence such as tip_kernels.ReverseKL"),
]
NORMALIZERS = [
    ("another word", "mean", "'kept', 'all' or a number above 0"),
    ("zero", 0, "'kept', 'all' or a number above 0"),
    ("negative", -3, "'kept', 'all' or a number above 0"),
    ("nan", math.nan, "'kept', 'all' or a number above 0"),
    ("infinite", math.inf, "'kept', 'all' or a number above 0"),
    ("none", None, "'kept', 'all' or a number above 0"),
    ("a tensor", ones(1), "'kept', 'all' or a number above 0"),
    ("a bool", True, "'kept', 'all' or a number above 0"),
]
CALLABLES = [  # temperatures of distill that are computed
    ("returns none", lambda stats: None, "a finite number above 0"),
    ("returns another length", lambda stats: stats.entropy_s[:2], rf"a .*tensor of shape \({N},\)"),
    ("returns a zero", lambda stats: 0.0 * stats.entropy_s, "finite values above 0"),
]
WEIGHERS = [  # row_weights of distill that follow from statistics
    ("returns none", lambda *_: None, rf"a .*tensor of shape \({N},\)"),
    ("returns another length", lambda stats, *_: stats.entropy_s[:2], rf"a .*tensor of shape \({N},\)"),
    ("returns float64", lambda stats, *_: stats.entropy_s.double(), "a float32"),
    ("needs what nobody measures", needing({"kl"}), "a callable whose needs are a set of statistics"),
    ("needs a list", needing(["kl_rev"]), "a callable whose needs are a set of statistics"),
]
GRAD_LOGITS = [
    ("another word", "sparse", "'dense', 'compact' or 'inplace'"),
    ("none", None, "'dense', 'compact' or 'inplace'"),
    ("a bool", True, "'dense', 'compact' or 'inplace'"),
]
CE_WEIGHTS = [
    ("negative", -0.1, "a number in"),
    ("above one", 1.5, "a number in"),
    ("nan", math.nan, "a (finite )?number"),
    ("a string", "0.5", "a (finite )?number"),
    ("a bool", True, "a (finite )?number"),
]
SELECTS = [
    ("a fraction", 0.5, r"a selection rule such as tip_kernels.SoftOr"),
    ("a function", lambda stats: stats, r"a selection rule such as tip_kernels.SoftOr"),
    ("the class", tip.SoftOr, r"a selection rule such as tip_kernels.SoftOr"),
]
SWEEPS = [
    ("zero", 0, "1, 2 or None"),
    ("three", 3, "1, 2 or None"),
    ("a float", 2.0, "1, 2 or None"),
    ("a bool", True, "1, 2 or None"),
]
GRAD_FILTERS = [("a number", 1e-3, "a GradFilter or None"), ("the class", tip.GradFilter, "a GradFilter or None")]
GRAD_SCALES = [
    ("without backward", 2.0, "1 without backward=True"),
    ("a vector", ones(2), r"a \(\) tensor with backward=True"),
]
EXECUTION = "a tip_kernels.Execution"
EXECUTIONS = [("none", None, EXECUTION), ("a dict", {}, EXECUTION), ("the class", tip.Execution, EXECUTION)]
FLAGS = [("a string", "no", "a bool"), ("an int", 1, "a bool"), ("none", None, "a bool")]


def kept_of(n: int, device: torch.device | str = "cpu") -> object:
    stats = tip.TokenStats(entropy_s=torch.rand(n, device=device), _vocab=V, _batch_shape=(n,))
    return tip.KeepAll()(stats)


def stats_of(n: int, vocab: int) -> tip.TokenStats:
    return tip.token_stats(torch.zeros(n, vocab), torch.zeros(n, vocab))


KEPT = [
    ("a mask", ones(N, dtype=torch.bool), "what a selection rule returned, or None"),
    ("row ids", torch.arange(2), "what a selection rule returned, or None"),
    ("of other rows", kept_of(N + 1), f"a choice among {N} rows"),
]
STATS = [
    ("a dict", {}, "what token_stats returned, or None"),
    ("of other rows", stats_of(N + 1, V), rf"those of \({N},\) rows"),
    ("of another vocabulary", stats_of(N, V + 1), rf"those of \({N},\) rows and {V} "),
]

SHARED = [("student", SOURCES), ("teacher", SOURCES + MISMATCHES), ("workspace_mib", WORKSPACES)]
CALLS = {
    "token_stats": (
        tip.token_stats,
        [*SHARED, ("temperature", TEMPERATURES), ("labels", LABELS), ("top_k", TOP_K), ("margins", FLAGS)],
    ),
    "divergence_loss": (
        tip.divergence_loss,
        [
            *SHARED,
            ("teacher", [("none", None, LOGITS)]),
            ("temperature", TEMPERATURES),
            ("divergence", DIVERGENCES),
            ("kept", KEPT),
            ("stats", STATS),
            ("row_weights", ROW_WEIGHTS),
            ("grad_logits", GRAD_LOGITS),
        ],
    ),
    "distill": (
        distill,
        [
            *SHARED,
            ("teacher", [("none", None, LOGITS)]),
            ("select", SELECTS),
            ("divergence", DIVERGENCES),
            ("row_mask", ROW_MASKS),
            ("rollout_ids", ROLLOUT_IDS),
            ("labels", LABELS),
            ("ce_weight", CE_WEIGHTS),
            ("ce_rows", [("another", "every", "'kept' or 'all'"), ("none", None, "'kept' or 'all'")]),
            ("row_weights", ROW_WEIGHTS + WEIGHERS),
            ("temperature", TEMPERATURES + CALLABLES),
            ("temperature_sq", FLAGS),
            ("normalizer", NORMALIZERS),
            ("full_stats", FLAGS),
            ("sweeps", SWEEPS),
            ("grad_filter", GRAD_FILTERS),
            ("backward", FLAGS),
            ("grad_scale", GRAD_SCALES),
            ("execution", EXECUTIONS),
        ],
    ),
}
TABLE = [
    (call, argument, fault, value, expected)
    for call, (_, arguments) in CALLS.items()
    for argument, faults in arguments
    for fault, value, expected in faults
]


@pytest.mark.parametrize("source", ["logits", "head"])
@pytest.mark.parametrize(
    "call, argument, fault, value, expected", TABLE, ids=[f"{c}, {a}, {f}" for c, a, f, *_ in TABLE]
)
def test_a_call_refuses(call, argument, fault, value, expected, source):
    good = tensors()
    student = good["logits"] if source == "logits" else tip.Head(good["hidden"], good["weight"], good["bias"])
    arguments = {"student": student, "teacher": good["teacher"], argument: value}
    before = {name: x.detach().clone() for name, x in good.items()}
    spoilt = value.clone() if isinstance(value, Tensor) else None
    with pytest.raises(ValueError) as caught:
        CALLS[call][0](**arguments)
    message = str(caught.value)
    assert re.match(rf"{argument}: expected {expected}", message), message
    assert ", got " in message, message
    assert len(message) < 400, message
    assert all(torch.equal(x, before[name]) and x.grad is None for name, x in good.items())
    assert all(x._version == 0 for x in good.values())
    assert spoilt is None or spoilt.is_meta or torch.equal(value.nan_to_num(7.0), spoilt.nan_to_num(7.0))


def test_lists_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match=r"^top_k: expected 0 without a teacher, got int 3"):
        tip.token_stats(torch.zeros(N, V), top_k=3)


def test_a_gradient_that_the_student_cannot_take_is_refused():
    s, t = torch.zeros(2, 3, V), torch.zeros(2, 3, V)
    head = tip.Head(ones(N, H), ones(V, H))
    for student, teacher, mode, expected in (
        (head, torch.zeros(N, V), "compact", "'dense', since the student is a Head"),
        (head, torch.zeros(N, V), "inplace", "'dense', since the student is a Head"),
        (s, t, "compact", "'dense' or 'inplace', since"),
        (torch.zeros(V, N).t(), torch.zeros(N, V), "inplace", "'dense' or 'compact', since"),
    ):
        with pytest.raises(ValueError, match=rf"^grad_logits: expected {expected}.*, got"):
            tip.divergence_loss(student, teacher, grad_logits=mode)


def test_a_label_loss_needs_labels():
    with pytest.raises(ValueError, match=r"^labels: expected int64 labels .* ce_weight reads them, got None"):
        tip.distill(torch.zeros(N, V), torch.zeros(N, V), ce_weight=0.5)


def test_a_batch_refuses_rows_of_another_order():
    s, t = torch.zeros(2, 3, V), torch.zeros(2, 3, V)
    for name, value in (
        ("temperature", ones(3, 2)),
        ("row_mask", ones(3, 2, dtype=torch.bool)),
        ("labels", ones(3, 2, dtype=torch.int64)),
        ("row_weights", ones(1, 6)),
        ("rollout_ids", ones(3, 2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected a .* tensor of shape \(2, 3\) or \(6,\), got"):
            tip.distill(s, t, **{name: value})


def test_vocabularies_that_differ_by_padding_are_accepted_once_cut():
    student, teacher = tip.Head(ones(N, H), ones(V + 4, H)), tip.Head(ones(N, H + 1), ones(V, H + 1))
    with pytest.raises(ValueError, match=f"vocab_size={V}"):
        tip.token_stats(student, teacher)
    cut = tip.Head(ones(N, H), ones(V + 4, H), vocab_size=V)
    assert tip.token_stats(cut, teacher).kl_rev.shape == (N,)


def test_a_factor_of_a_divergence_is_a_finite_number():
    for factor in (math.nan, math.inf, 0, -1.0, "2", True, ones(1)):
        with pytest.raises(ValueError, match="factor of a divergence: expected a finite number above 0, got"):
            factor * tip.ReverseKL() if not isinstance(factor, Tensor) else tip.ReverseKL() * factor
    with pytest.raises(TypeError):
        tip.ReverseKL() + 1


# Every argument of every public name

QUOTA = {"keep": 0.0, "scope": "all", "min_rows": -1, "group": 1}
WHERE = {"row_mask": ones(N), "rollout_ids": ones(N)}
RULES = {  # name: a bad value of each argument of the rule itself
    "CrossEntropyRatio": QUOTA | {"epsilon": 0.0},
    "EntropyGap": QUOTA | {"weighted": 1},
    "GreedyAgreement": {"top_k": 0, "agreeing": 1, "other_weight": 1.0},
    "KeepAll": {},
    "Overconfident": QUOTA | {"entropy_below": math.nan, "divergence_above": "big", "by": "kl"},
    "FilterRollouts": {"by": "kl", "drop": 1.0, "largest": 1},
    "PositionPrefix": QUOTA,
    "PositionSuffix": QUOTA,
    "UntilDrift": {"threshold": math.nan, "by": "kl", "n": 0, "top_k": 0},
    "RandomRows": QUOTA | {"generator": 0},
    "SampleEntropy": QUOTA | {"alpha": -1.0, "gamma": math.nan, "generator": 0, "unbiased": 1},
    "SoftOr": QUOTA | {"normalize": "max", "lowest": 1},
    "Teachability": QUOTA | {"top_k": 0, "by": "kl"},
    "Threshold": {"by": "kl", "above": math.nan, "below": ("quantile", 2)},
    "TopDivergence": QUOTA | {"by": "kl"},
    "TopEntropy": QUOTA,
    "TopHellinger": QUOTA,
    "TopMargin": QUOTA | {"by": "kl_rev"},
}
OTHERS = {
    "AdaptiveFocus": {
        "beta": 1.0,
        "tolerance": -0.1,
        "step": 0.0,
        "floor": 0.0,
        "warmup": -1,
        "reanchor": "code",
        "group": 1,
    },
    "AlphaBeta": {"a": 0.0, "b": 0.0},
    "ForwardKL": {},
    "GradFilter": {"tolerance": 0.0},
    "HellingerSq": {},
    "JSD": {"teacher_weight": 2.0},
    "Gated": {"gates": {}, "max_per_row": 0.0},
    "Jeffreys": {},
    "Renyi": {"alpha": 0.0},
    "ReverseKL": {},
    "SampledReverseKL": {"clip": 0.0},
    "SkewForwardKL": {"a": 1.0},
    "SkewReverseKL": {"a": 1.0, "detach_mixture": 1},
    "StepSelection": {
        "select": 0.5,
        "temperature": 0.0,
        "temperature_sq": 1,
        "normalizer": 0,
        "full_stats": None,
    },
    "TVD": {},
    "ToDi": {"beta": -1.0},
    "TopK": {"ids": ones(N, 2), "logp": ones(N, 3), "tail": "drop"},
    "adakd": {
        "focus": 0.0,
        "strength": math.nan,
        "base": 0.0,
        "scope": "all",
        "median_scope": "all",
        "median_of": "all",
        "min_rows": -1,
        "group": 1,
        **WHERE,
    },
    "difficulty_temperature": {
        "stats": None,
        "strength": math.nan,
        "base": 0.0,
        "scope": "all",
        "kept": ones(N),
        "group": 1,
        **WHERE,
    },
    "quadrants": {"stats": {}, "row_mask": ones(N), "entropy": math.nan, "divergence": ("quantile", -1)},
    "token_importance": {
        "student": None,
        "teacher": None,
        "labels": None,
        "method": "kl",
        "row_mask": ones(N),
        "normalize": "max",
        "top_k": 0,
        "workspace_mib": 0,
    },
}
WEIGHTS = {
    "weights.ConfidenceProduct": {"teacher": -1.0, "student": math.nan},
    "weights.DriftDecay": {"threshold": math.nan, "drop": 0.0, "base": -1.0, "by": "kl", "top_k": 0},
    "weights.ImportanceRatio": {"rollout_logp": 0.5, "low": -1.0, "high": 0.0},
    "weights.Indicator": {"by": "kl", "above": math.nan, "below": ("quantile", 2)},
    "weights.LogRatioSigmoid": {"beta": -1.0},
    "weights.PositionDecay": {"half_life": 0.0},
    "weights.PrefixDecay": {"gamma": -1.0},
    "weights.TeacherConfidence": {"floor": 2.0, "zero_at": 0.0},
}
EVERY = RULES | OTHERS | WEIGHTS
MADE_HERE = {"Distilled", "Kept", "Plan", "TokenStats"}  # what calls return
BASES = {"Divergence", "Rule"}
COUNTERS = {"entries", "skipped", "total", "dropped"}  # of a GradFilter, which it fills itself


def good_arguments(name: str, argument: str) -> dict[str, object]:
    """The other arguments of a call that is spoilt by one."""
    stats = tip.token_stats(torch.zeros(N, V), torch.zeros(N, V))
    if name == "token_importance":
        methods = {"labels": "loss_contribution", "student": "kl_div", "normalize": "soft_or", "top_k": "teachability"}
        labels = ones(N, dtype=torch.int64)
        sources = {"student": torch.zeros(N, V), "teacher": torch.zeros(N, V), "labels": labels}
        return sources | {"method": methods.get(argument, "logit_diff")}
    return {
        "TopK": {"ids": torch.arange(2).expand(N, 2), "logp": torch.full((N, 2), -1.0)},
        "difficulty_temperature": {"stats": stats},
        "quadrants": {"stats": stats},
        "StepSelection": {"select": tip.KeepAll()},
        "Gated": {"gates": {tip.TVD(): 1.0}},
        "Renyi": {"alpha": 0.5},
        "GradFilter": {"tolerance": 0.1},
        "weights.ImportanceRatio": {"rollout_logp": torch.zeros(N)},
        "weights.Indicator": {"by": "kl_rev"},
    }.get(name, {"keep": 0.5} if "keep" in EVERY[name] else {})


def called(name: str, arguments: dict[str, object]) -> None:
    """Makes or calls it; what keeps its arguments for later is asked for its result, too."""
    made = attrgetter(name)(tip)(**arguments)
    if name == "adakd":
        tip.distill(torch.zeros(N, V), torch.zeros(N, V), **made)


@pytest.mark.parametrize("name, argument", [(name, argument) for name, bad in EVERY.items() for argument in bad])
def test_every_argument_is_refused_by_its_name(name, argument):
    arguments = good_arguments(name, argument)
    if argument == "group" and name != "AdaptiveFocus":
        arguments["scope"] = "global"
    called(name, arguments)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*{GOT}"):
        called(name, arguments | {argument: EVERY[name][argument]})


@pytest.mark.parametrize("name", RULES | WEIGHTS)
@pytest.mark.parametrize("argument, value", [("stats", {}), *WHERE.items()])
def test_every_rule_and_weight_refuses_what_it_is_called_with(name, argument, value):
    rule = attrgetter(name)(tip)(**good_arguments(name, ""))
    labels = ones(N, dtype=torch.int64)
    stats = tip.token_stats(torch.zeros(N, V), torch.zeros(N, V), labels=labels, margins=True, top_k=16)
    rule(stats)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*{GOT}"):
        rule(**({"stats": stats} | {argument: value}))


def test_every_argument_of_every_public_name_has_a_case():
    """A new argument fails here until it stands in one of the tables above."""
    tabled = {name: set(bad) for name, bad in EVERY.items()}
    tabled |= {call: {argument for argument, _ in arguments} for call, (_, arguments) in CALLS.items()}
    tabled["Execution"] = set(HOW)
    tabled["distill"] -= tabled["Execution"]
    tabled |= {"Head": {argument for argument, *_ in HEAD}, "backend": {"name"}}
    weights = {f"weights.{name}" for name in tip.weights.__all__ if name != "Weight"}
    for name in set(tip.__all__) - MADE_HERE - BASES - {"weights"} | weights:
        wanted = set(inspect.signature(attrgetter(name)(tip)).parameters) - (
            COUNTERS if name == "GradFilter" else set()
        )
        assert tabled.get(name) == wanted, name
    of_stats = {"self", "stats", *WHERE}
    calls = [(tip.Rule.__call__, of_stats), (tip.weights.Weight.__call__, of_stats)]
    calls += [(tip.Kept.slots, {"self", "capacity"})]
    for call, known in calls:
        assert set(inspect.signature(call).parameters) == known
    with pytest.raises(ValueError, match=r"^backend: expected 'eager' or 'triton', got"), tip.backend("cuda"):
        pass
    for capacity in (-1, 2, 1.0):
        with pytest.raises(ValueError, match=r"^capacity: expected an int in \[0, 1\], got"):
            kept_of(1).slots(capacity)


# Every option of the command line

SIZES = ["--tokens", "64", "--vocab", "100", "--hidden-s", "8", "--hidden-t", "8"]
WORDS = {  # option: bad values
    "opd": {
        "--model": ["gpt"],
        "--teacher": ["nowhere"],
        "--student": ["nowhere"],
        "--task": ["nothing.txt", "reasoning_gym:"],
        "--teacher-topk": ["0", "1.5", "x"],
        "--entropy-below": ["low", "nan", "quantile:2"],
        "--divergence-above": ["high", "inf", "quantile:"],
        "--rule": ["best"],
        "--keep": ["0", "1.5", "nan", "half", "-3"],
        "--scope": ["world"],
        "--divergence": ["kl", "jsd:2", "tvd:1"],
        "--preset": ["best"],
        "--steps": ["0", "-1", "1.5"],
        "--batch": ["0"],
        "--micro-batch": ["0", "1.5"],
        "--min-rows": ["-1", "1.5"],
        "--alpha": ["-1", "nan", "x"],
        "--gamma": ["-1", "inf"],
        "--loss-temperature": ["0", "-1", "inf"],
        "--median-of": ["all"],
        "--reanchor": ["code"],
        "--lr": ["0", "nan", "inf", "x"],
        "--warmup": ["-1"],
        "--rollouts-per-prompt": ["0", "1.5"],
        "--temperature": ["0", "inf"],
        "--top-p": ["0", "1.5", "nan", "x"],
        "--top-k": ["-1", "1.5"],
        "--max-new-tokens": ["0", "60"],
        "--seed": ["-1", "x"],
        "--device": ["abacus"],
        "--threads": ["0"],
        "--timeout": ["0", "inf"],
        "--workspace-mib": ["0", "-5"],
        "--eval-prompts": ["0", "5000"],
        "--eval-every": ["0"],
        "--eval-task": ["nothing.txt", "reasoning_gym:"],
        "--eval-samples": ["0", "1.5"],
        "--eval-temperature": ["-1", "nan", "x"],
        "--judge": ["best"],
        "--schedule": ["linear"],
        "--weight-decay": ["-1", "nan", "x"],
        "--output": [__file__],
        "--tracker": ["paper"],
    },
    "inspect": {
        "--output": [f"{__file__}/page.html"],
        "--save": ["statistics.csv"],
        "--teacher": ["nowhere"],
        "--student": ["nowhere"],
        "--task": ["nothing.txt"],
        "--prompts": ["0"],
        "--rule": ["best"],
        "--keep": ["0"],
        "--temperature": ["0"],
        "--max-new-tokens": ["0"],
        "--seed": ["-1"],
        "--device": ["abacus"],
        "--entropy": ["0", "nan"],
        "--divergence": ["-1"],
    },
    "compare": {"--output": [f"{__file__}/page.html"]},
    "plan": {
        "--tokens": ["0", "x"],
        "--vocab": ["0"],
        "--hidden-s": ["0"],
        "--hidden-t": ["-8"],
        "--keep": ["0", "1.5", "nan"],
        "--gpu": ["abacus"],
        "--workspace-mib": ["0", "nan"],
        "--world": ["0", "x"],
        "--vocab-parallel": ["0", "3"],
        "--link": ["string", "0", "nan", "nvlink4"],
    },
    "doctor": {"--device": ["abacus"], "--only": ["nothing of this name"]},
}
SWITCHES = {  # option: what it may not stand beside
    "opd": {
        "--chat": ["=1"],
        "--resume": ["=1", "--overwrite"],
        "--overwrite": ["=1"],
        "--no-report": ["=1"],
        "--json": ["=1"],
        "--quiet": ["=1"],
        "--retrain": ["=1", "--rule=all"],
    },
    "inspect": {"--chat": ["=1"], "--json": ["=1"], "--quiet": ["=1"]},
    "compare": {"--json": ["=1"], "--quiet": ["=1"]},
    "plan": {},
    "doctor": {"--json": ["=1"]},
}


def flat(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(option, value) for option, values in table.items() for value in values]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    small = ["--batch", "4", "--eval-prompts", "4", "--quiet", "--no-report"]
    assert main(["opd", "--steps", "1", *small, "--output", str(folder / "run")]) == 0
    return str(folder / "run")


def parsers() -> dict[str, object]:
    from tip_kernels.doctor.cli import parser as doctor
    from tip_kernels.opd import inspect_cli as cli
    from tip_kernels.opd.options import parser
    from tip_kernels.plan import costs

    inspecting = {"inspect": cli.inspect_parser(), "compare": cli.compare_parser()}
    return {"opd": parser(), **inspecting, "plan": costs.parser(), "doctor": doctor()}


def refused(command: str, option: str, words: list[str], folder, capsys) -> None:
    """One line, exit code 2, the option's name, and nothing written."""
    capsys.readouterr()
    try:
        code = main([command, *words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "", err
    last = err.strip().splitlines()[-1]
    assert re.search(rf"argument {option}\b", last), last
    assert not list(folder.iterdir()), last


def spread(table: dict[str, dict[str, list[str]]]) -> list[tuple[str, str, str]]:
    """Every (command, option, value) of a table of options by command."""
    return [
        (command, option, value) for command, of in table.items() for option, values in of.items() for value in values
    ]


@pytest.mark.parametrize(
    "command, option, value",
    spread(WORDS),
)
def test_a_bad_option_is_one_line_and_exit_code_2(command, option, value, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"plan": SIZES, "compare": [finished], "opd": ["--output", str(tmp_path / "run")]}.get(command, [])
    if command == "inspect":
        pair = option in ("--teacher", "--student", "--task")
        from tip_kernels.opd.settings import PACKAGED

        words = ["--teacher", str(PACKAGED / "teacher"), "--student", str(PACKAGED / "student")] if pair else [finished]
        words = [*words, "--prompts", "1", "--quiet"] if option != "--prompts" else words
        words = words if option == "--output" else [*words, "--output", str(tmp_path / "page.html")]
    if command == "opd" and option == "--output":
        words = []
    refused(command, option, [*words, option, value], tmp_path, capsys)


@pytest.mark.parametrize(
    "command, option, beside",
    spread(SWITCHES),
)
def test_a_switch_takes_no_value_and_no_contradiction(command, option, beside, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [option + beside] if beside.startswith("=") else [option, beside]
    if option == "--resume" and beside == "--overwrite":
        words += ["--output", finished]
    elif command == "compare":
        words += [finished]
    refused(command, option, words, tmp_path, capsys)


def test_every_option_of_every_command_has_a_case():
    for command, parser in parsers().items():
        options = {a.option_strings[-1]: a.nargs for a in parser._actions if a.option_strings} | {"--help": None}
        del options["--help"]
        assert set(WORDS[command]) == {name for name, nargs in options.items() if nargs != 0}, command
        assert set(SWITCHES[command]) == {name for name, nargs in options.items() if nargs == 0}, command
