"""Every public argument of measuring and learning refuses what it cannot take, by name, and changes nothing."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

import tip_kernels as tip

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
        tip.distill,
        [
            *SHARED,
            ("teacher", [("none", None, LOGITS)]),
            ("select", SELECTS),
            ("divergence", DIVERGENCES),
            ("row_mask", ROW_MASKS),
            ("rollout_ids", ROLLOUT_IDS),
            ("labels", LABELS),
            ("ce_weight", CE_WEIGHTS),
            ("row_weights", ROW_WEIGHTS),
            ("temperature", TEMPERATURES + CALLABLES),
            ("temperature_sq", FLAGS),
            ("normalizer", NORMALIZERS),
            ("full_stats", FLAGS),
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
