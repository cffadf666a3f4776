"""MEASURE: token_stats against the float64 reference, and what it promises beyond numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import reference as ref
import tip_kernels as tip
from tests._cases import (
    EVERY_FIELD,
    HEADS,
    INF,
    NAN,
    PAIR_FIELDS,
    PAIRS,
    banned_in_student,
    check_stats,
    head_case,
    labels_for,
    leaf,
    near_equal,
    no_worse,
    normal,
    ordinary,
)
from tip_kernels.stats import STATISTICS

ROOT = Path(__file__).parents[1]
PUBLIC = STATISTICS
HALVES = (torch.bfloat16, torch.float16)


def both(z: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 and float32 values of logits of any dtype."""
    return z.double(), z.float()


def same_bits(a: tip.TokenStats, b: tip.TokenStats, rows: Tensor | slice = slice(None)) -> None:
    for name in PUBLIC:
        x, y = a._get(name), b._get(name)
        assert (x is None) == (y is None), name
        if x is not None:
            equal = torch.equal(x[rows].nan_to_num(nan=7e7), y[rows].nan_to_num(nan=7e7))
            assert equal, f"{name}: {x[rows].tolist()} and {y[rows].tolist()}"


def close_stats(a: tip.TokenStats, b: tip.TokenStats) -> None:
    """Equal up to rounding: the bound without an eager."""
    for name in PUBLIC:
        x, y = a._get(name), b._get(name)
        assert (x is None) == (y is None), name
        if x is not None and x.dtype == torch.float32:
            no_worse(x, y, y.double(), name)
        elif x is not None:
            assert torch.equal(x, y), name


# Against the truth


@pytest.mark.parametrize("case", PAIRS)
def test_every_statistic_is_no_worse_than_eager_fp32(case):
    s, t = PAIRS[case](16, 1500)  # a tile of 1024 and a ragged one
    asked = {"labels": labels_for(16, 1500), **EVERY_FIELD}
    check_stats(tip.token_stats(s, t, **asked), both(s), both(t), **asked)


@pytest.mark.parametrize("vocab", [1, 2, 3, 127, 1000, 1025, 32001])
def test_vocabularies_of_any_size(vocab):
    s, t = ordinary(5, vocab)
    asked = {"labels": labels_for(5, vocab), **EVERY_FIELD}
    check_stats(tip.token_stats(s, t, **asked), both(s), both(t), **asked)


@pytest.mark.parametrize("case", ["near_equal", "peaked", "banned_in_student"])
@pytest.mark.parametrize("dtypes", [(a, b) for a in (torch.float32, *HALVES) for b in (torch.float32, *HALVES)][1:])
def test_logits_of_any_dtype_each_model_its_own(case, dtypes):
    s, t = (z.to(dtype) for z, dtype in zip(PAIRS[case](9, 1300), dtypes, strict=True))
    asked = {"labels": labels_for(9, 1300), **EVERY_FIELD}
    check_stats(tip.token_stats(s, t, **asked), both(s), both(t), **asked)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("options", HEADS)
def test_heads_measure_like_the_logits_they_stand_for(options, dtype):
    student = head_case(9, 1300, 48, seed=20, **HEADS[options]).to(dtype)
    teacher = head_case(9, student.vocab_size or 1300, 80, seed=30).to(dtype)
    asked = {"labels": labels_for(9, 1000), **EVERY_FIELD}
    z_s, z_t = ([case.to(d).logits() for d in (torch.float64, torch.float32)] for case in (student, teacher))
    names = [name for name in PUBLIC if name not in ("agree", "rank_t_of_argmax_s")]
    check_stats(tip.token_stats(student.head, teacher.head, **asked), z_s, z_t, names, **asked)


def test_a_head_may_meet_logits_of_another_dtype():
    student = head_case(7, 300, 32, seed=20).to(torch.bfloat16)
    t = ordinary(7, 300)[1].half()
    z_s = [student.to(d).logits() for d in (torch.float64, torch.float32)]
    check_stats(tip.token_stats(student.head, t), z_s, both(t))
    check_stats(tip.token_stats(t, student.head), both(t), z_s)


TAU = torch.linspace(0.4, 3.0, 12)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3, TAU, TAU.view(3, 4), TAU.bfloat16()], ids=lambda t: str(t)[:12])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_a_temperature_divides_both_models_logits(temperature, shape):
    if isinstance(temperature, Tensor) and temperature.dim() == 2 and shape == (12,):
        temperature = temperature.flatten()
    asked = {"labels": labels_for(12, 1300), **EVERY_FIELD}
    tau = temperature.flatten() if isinstance(temperature, Tensor) else temperature
    student, teacher = head_case(12, 1300, 48, seed=20, softcap=9.0), head_case(12, 1300, 32, seed=30)
    z_s, z_t = ([case.to(d).logits(tau) for d in (torch.float64, torch.float32)] for case in (student, teacher))
    student.hidden, teacher.hidden = student.hidden.view(*shape, -1), teacher.hidden.view(*shape, -1)
    check_stats(tip.token_stats(student.head, teacher.head, temperature=temperature, **asked), z_s, z_t, **asked)
    logits = (z_s[1] * tau[:, None] if isinstance(tau, Tensor) else z_s[1] * tau).view(*shape, -1)
    z = [
        logits.flatten(0, -2).to(d) / (tau[:, None] if isinstance(tau, Tensor) else tau)
        for d in (torch.float64, torch.float32)
    ]
    check_stats(tip.token_stats(logits, temperature=temperature), z)


@pytest.mark.parametrize("target", [1e-4, 1e-6, 4e-9])
def test_hellinger_of_nearly_equal_rows_keeps_its_digits(target):
    s, t = near_equal(16, 1500, kl=target)  # H2 is about a quarter of the KL
    truth = ref.token_stats(s.double(), t.double())["hellinger_sq"]
    assert truth.max() < target
    ours = tip.token_stats(s, t).hellinger_sq
    assert ((ours.double() - truth).abs() / truth).max() < 0.03


@pytest.mark.parametrize("vocab", [200, 2100])
@pytest.mark.parametrize("case", ["banned_in_both", "banned_in_student", "banned_in_teacher", "banned_tiles"])
def test_banned_tokens_at_a_temperature_near_zero_are_no_nan(case, vocab):
    z_s, z_t = PAIRS[case](4, vocab)
    truth = ref.token_stats(z_s.double() / 1e-9, z_t.double() / 1e-9)
    ours = tip.token_stats(z_s, z_t, temperature=1e-9)
    for name in ("lse_s", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        torch.testing.assert_close(getattr(ours, name).double(), truth[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spreads", [(2.5, 0.125), (6.0, 0.5), (0.5, 6.0)], ids=str)
@pytest.mark.parametrize("vocab", [2100, 32000])
def test_a_flat_model_beside_a_peaked_one_keeps_its_digits(vocab, spreads):
    """Their masses over their largest logits differ by orders of magnitude."""
    z_s, z_t = (spread * normal(15, vocab, seed=seed) for seed, spread in zip((1, 2), spreads, strict=True))
    check_stats(tip.token_stats(z_s, z_t), (z_s.double(), z_s), (z_t.double(), z_t))


def test_equal_rows_are_at_distance_zero():
    s, _ = ordinary(8, 1500)
    stats = tip.token_stats(s, s.clone(), margins=True)
    for name in PAIR_FIELDS:
        assert torch.equal(getattr(stats, name), torch.zeros(8)), name
    assert stats.agree.all()


def test_divergences_are_never_negative():
    s = 5 * normal(64, 1500, seed=1)
    stats = tip.token_stats(s, s + 1e-5 * normal(64, 1500, seed=2))
    assert all((getattr(stats, name) >= 0).all() for name in PAIR_FIELDS)


# Banned tokens and broken rows


@pytest.mark.parametrize("vocab", [40, 3000])
def test_a_divergence_is_infinite_exactly_where_a_banned_token_is_allowed(vocab):
    s, t = banned_in_student(16, vocab)
    stats = tip.token_stats(s, t)
    assert stats.kl_fwd.isposinf().all()  # also where the teacher's probability underflows to 0
    assert stats.kl_rev.isfinite().all()
    mirror = tip.token_stats(t, s)
    assert mirror.kl_rev.isposinf().all()
    assert mirror.kl_fwd.isfinite().all()


def test_finite_logits_however_low_are_not_banned():
    s, t = torch.zeros(2, 5), torch.zeros(2, 5)
    s[:, 0] = torch.tensor([-65504.0, -1e9])  # float16's lowest, and a common mask value
    stats = tip.token_stats(s, t)
    assert stats.kl_fwd.tolist() == pytest.approx([65504 / 5, 2e8], rel=1e-4)
    assert stats.kl_rev.tolist() == pytest.approx([math.log(5 / 4)] * 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_of_a_wide_dtype_counts_as_banned(dtype):
    s, t = ordinary(4, 100)
    low, ban = s.to(dtype), s.to(dtype)
    low[:, :30], ban[:, :30] = torch.finfo(dtype).min, -INF
    same_bits(tip.token_stats(low, t, margins=True), tip.token_stats(ban, t, margins=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_of_a_wide_dtype_is_a_banned_label_and_no_second_logit(dtype):
    z = torch.full((2, 3), torch.finfo(dtype).min, dtype=dtype)
    z[:, 0] = 1.0
    stats = tip.token_stats(z, z, labels=torch.tensor([2, 0]), margins=True)
    assert stats.logp_s.tolist() == stats.logp_t.tolist() == [-INF, 0.0]
    assert stats.margin_s.isposinf().all() and stats.margin_t.isposinf().all()


def test_disjoint_models_are_as_far_as_can_be():
    s, t = torch.zeros(1, 6), torch.zeros(1, 6)
    s[:, :3], t[:, 3:] = -INF, -INF
    stats = tip.token_stats(s, t)
    assert (stats.kl_fwd.item(), stats.kl_rev.item(), stats.hellinger_sq.item()) == (INF, INF, 1.0)
    assert stats.entropy_s.item() == pytest.approx(math.log(3))


BREAKS = {"nan": (3, NAN), "inf": (3, INF), "all banned": (slice(None), -INF), "nan among banned": (slice(5), -INF)}


@pytest.mark.parametrize("model", ["s", "t"])
@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("vocab", [7, 2500])
def test_a_broken_row_is_nan_and_its_neighbours_keep_their_bits(how, model, vocab):
    sound = dict(zip("st", ordinary(6, vocab), strict=True))
    broken = {name: z.clone() for name, z in sound.items()}
    place, value = BREAKS[how]
    broken[model][2, place] = value
    if how == "nan among banned":
        broken[model][2, 6] = NAN
    asked = {"labels": torch.tensor([0, 1, 3, 2, -100, 6]), **EVERY_FIELD}
    stats = tip.token_stats(broken["s"], broken["t"], **asked)
    check_stats(stats, both(broken["s"]), both(broken["t"]), **asked)
    others = torch.arange(6) != 2
    before = tip.token_stats(sound["s"], sound["t"], **asked)
    same_bits(stats, before, others)
    other = "t" if model == "s" else "s"
    for name in (f"lse_{other}", f"entropy_{other}", f"margin_{other}", f"logp_{other}"):
        assert torch.equal(getattr(stats, name)[2], getattr(before, name)[2]), name


def test_nan_wins_over_infinity():
    s, t = ordinary(1, 50)
    s[0, 4], t[0, 9] = -INF, NAN
    stats = tip.token_stats(s, t)
    assert all(getattr(stats, name).isnan().all() for name in PAIR_FIELDS)
    assert stats.entropy_s.isfinite().all()


def test_a_broken_hidden_state_leaves_its_neighbours_their_bits():
    student, teacher = head_case(9, 1300, 48, seed=20), head_case(9, 1300, 80, seed=30)
    before = tip.token_stats(student.head, teacher.head, **EVERY_FIELD)
    student.hidden[4, 7] = NAN
    stats = tip.token_stats(student.head, teacher.head, **EVERY_FIELD)
    others = torch.arange(9) != 4
    same_bits(stats, before, others)
    assert stats.kl_rev[4].isnan()
    assert torch.equal(stats.entropy_t, before.entropy_t)


# Labels, margins and lists


def test_a_label_of_minus_100_is_nan_and_a_banned_one_minus_infinity():
    s, t = ordinary(4, 60)
    s[1, 7] = -INF
    stats = tip.token_stats(s, t, labels=torch.tensor([-100, 7, 7, 0]))
    assert stats.logp_s.isnan().tolist() == [True, False, False, False]
    assert stats.logp_s[1] == -INF
    assert stats.logp_t[1].isfinite()


def test_equal_logits_tie_to_the_lower_id():
    s, t = torch.zeros(4, 3000), torch.zeros(4, 3000)
    s[0, [5, 2000]], t[0, [5, 7]] = 4.0, 4.0  # both answer 5
    s[1, [2000, 2500]], t[1, [2500]] = 4.0, 4.0  # 2000 and 2500
    s[2, [9]], t[2, [8, 9]] = 4.0, 4.0  # 9 and 8: the teacher ranks 9 second
    asked = {"margins": True, "top_k": 2}
    stats = tip.token_stats(s, t, **asked)
    assert stats.agree.tolist() == [True, False, False, True]
    assert stats.margin_s.tolist() == [0.0, 0.0, 4.0, 0.0]
    assert stats.rank_t_of_argmax_s.tolist() == [0, 2, 1, 0]
    check_stats(stats, both(s), both(t), **asked)


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_of_16_bit_logits_agree_with_the_reference(dtype):
    s, t = (z.to(dtype) for z in ordinary(64, 2500))
    top = ref.top_ids(s.double(), 2)[0]
    s[torch.arange(64), top[:, 1]] = s.amax(1)  # every row ties at its top
    asked = {"margins": True, "top_k": 8}
    check_stats(tip.token_stats(s, t, **asked), both(s), both(t), **asked)


def test_zeros_of_either_sign_tie():
    s = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])
    assert tip.token_stats(s, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), margins=True).agree.tolist() == [True, True]


def test_a_margin_needs_two_allowed_tokens():
    one = torch.tensor([[2.0, -INF, -INF], [2.0, 1.5, -INF]])
    assert tip.token_stats(one, margins=True).margin_s.tolist() == pytest.approx([INF, 0.5])
    assert tip.token_stats(torch.zeros(2, 1), margins=True).margin_s.tolist() == [INF, INF]


def test_a_banned_token_is_in_no_top_list():
    s, t = ordinary(6, 40)
    s[:, 3:], t[:, ::2] = -INF, -INF
    asked = {"top_k": 30}
    check_stats(tip.token_stats(s, t, **asked), both(s), both(t), **asked)


@pytest.mark.parametrize("top_k", [1, 16, 500, 5000])
def test_lists_of_any_length(top_k):
    s, t = ordinary(6, 1500)
    check_stats(tip.token_stats(s, t, top_k=top_k), both(s), both(t), top_k=top_k)


# What is returned


def test_fields_that_were_not_asked_for_are_none():
    s, t = ordinary(3, 20)
    student, pair = {"lse_s", "entropy_s"}, {"lse_s", "entropy_s", "lse_t", "entropy_t", *PAIR_FIELDS}
    calls = {
        "student": (tip.token_stats(s), student),
        "student margins": (tip.token_stats(s, margins=True), student | {"margin_s"}),
        "student labels": (tip.token_stats(s, labels=torch.zeros(3, dtype=torch.long)), student | {"logp_s"}),
        "pair": (tip.token_stats(s, t), pair),
        "lists": (tip.token_stats(s, t, top_k=2), pair | {"mass_t_on_top_s", "rank_t_of_argmax_s"}),
    }
    for name, (stats, expected) in calls.items():
        assert {f for f in PUBLIC if hasattr(stats, f)} == expected, name


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 5), (2, 0), (1, 1), (3, 4)])
@pytest.mark.parametrize("source", ["logits", "head"])
def test_any_number_of_rows_comes_back_flat(shape, source):
    n = math.prod(shape)
    asked = {"labels": torch.zeros(shape, dtype=torch.long), "temperature": torch.ones(shape), **EVERY_FIELD}
    if source == "logits":
        s, t = (z.view(*shape, 50) for z in ordinary(n, 50))
        one, other = (z.flatten(0, -2) for z in (s, t))
    else:
        one, other = head_case(n, 50, 8, seed=1), head_case(n, 50, 12, seed=2)
        s, t = (tip.Head(c.hidden.view(*shape, c.hidden.shape[-1]), c.weight) for c in (one, other))
        one, other = one.head, other.head
    stats = tip.token_stats(s, t, **asked)
    for name in PUBLIC:
        value = getattr(stats, name)
        assert value.shape == (n,) and not value.requires_grad, name
        assert value.dtype == {"agree": torch.bool, "rank_t_of_argmax_s": torch.int64}.get(name, torch.float32), name
    flat_asked = {**asked, "labels": torch.zeros(n, dtype=torch.long), "temperature": torch.ones(n)}
    same_bits(stats, tip.token_stats(one, other, **flat_asked))


def strided(z: Tensor) -> dict[str, Tensor]:
    n, v = z.shape
    wide, shifted = torch.full((n, v + 13), NAN), torch.full((n, v + 1), NAN)
    wide[:, :v], shifted[:, 1:] = z, z
    every_other = torch.full((2 * n, v), NAN)
    every_other[::2] = z
    columns = torch.full((n, 2 * v), NAN)
    columns[:, ::2] = z
    return {
        "row stride above V": wide[:, :v],
        "odd offset": shifted[:, 1:],
        "every other row": every_other[::2],
        "every other column": columns[:, ::2],
        "column-major": z.t().contiguous().t(),
    }


@pytest.mark.parametrize(
    "layout", ["row stride above V", "odd offset", "every other row", "every other column", "column-major"]
)
def test_strided_logits_measure_as_contiguous_ones(layout):
    s, t = ordinary(6, 1300)
    asked = {"labels": labels_for(6, 1300), **EVERY_FIELD}
    expected = tip.token_stats(s, t, **asked)
    same_bits(tip.token_stats(strided(s)[layout], strided(t)[layout], **asked), expected)
    same_bits(tip.token_stats(s, strided(t)[layout], **asked), expected)


def test_strided_batches_and_heads_measure_as_contiguous_ones():
    s, t = (z.view(3, 4, 500) for z in ordinary(12, 500))
    long_s, by_time = torch.full((3, 5, 500), NAN), t.transpose(0, 1).contiguous().transpose(0, 1)
    long_s[:, :-1] = s
    same_bits(tip.token_stats(long_s[:, :-1], by_time), tip.token_stats(s, t))
    case = head_case(12, 500, 32, seed=20)
    hidden, weight = case.hidden.view(3, 4, 32), case.weight
    long_hidden = torch.full((3, 5, 32), NAN)
    long_hidden[:, 1:] = hidden
    plain = tip.token_stats(tip.Head(hidden, weight), t)
    close_stats(tip.token_stats(tip.Head(long_hidden[:, 1:], weight.t().contiguous().t()), t), plain)


def test_measuring_changes_no_input_and_keeps_no_graph():
    student, teacher = head_case(6, 300, 32, seed=20, bias=normal(300, seed=3)).leaves(), head_case(6, 300, 16, seed=30)
    s, tau, labels = ordinary(6, 300)[0].requires_grad_(), torch.full((6,), 1.5), labels_for(6, 300)
    inputs = [*student.tensors, *teacher.tensors, s, tau, labels]
    before = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    for source in (student.head, s):
        stats = tip.token_stats(source, teacher.head, temperature=tau, labels=labels, **EVERY_FIELD)
        assert not any(value.requires_grad for value in stats._measured.values())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions
    tau.fill_(7.0)
    assert torch.equal(stats._temperature, torch.full((6,), 1.5))


def test_measuring_twice_gives_the_same_bits():
    student, teacher = head_case(30, 1300, 48, seed=20), head_case(30, 1300, 80, seed=30)
    first, second = (tip.token_stats(student.head, teacher.head, **EVERY_FIELD) for _ in range(2))
    same_bits(first, second)


def test_a_row_alone_measures_as_in_a_batch():
    s, t = ordinary(300, 700)  # more rows than a block
    student, teacher = head_case(300, 700, 48, seed=20), head_case(300, 700, 80, seed=30)
    rows = [0, 7, 255, 256, 299]
    asked = {"margins": True}
    for name, one, other in (("logits", s, t), ("head", student.logits(), teacher.logits())):
        del name
        batch = tip.token_stats(one, other, **asked)
        for i in rows:
            alone = tip.token_stats(one[i : i + 1], other[i : i + 1], **asked)
            for field in ("entropy_s", "kl_fwd", "kl_rev", "hellinger_sq", "margin_s"):
                x, y = getattr(alone, field), getattr(batch, field)[i : i + 1]
                no_worse(x, y, y.double(), field)


# Workspace, autocast


@pytest.mark.parametrize("case", ["ordinary", "banned_tiles", "shifted_near_equal"])
def test_a_tiny_workspace_gives_the_same_statistics(case):
    s, t = PAIRS[case](300, 2100)
    asked = {"labels": labels_for(300, 2100), **EVERY_FIELD}
    for workspace_mib in (1, 1024):
        check_stats(tip.token_stats(s, t, workspace_mib=workspace_mib, **asked), both(s), both(t), **asked)


def test_a_tiny_workspace_gives_the_same_statistics_of_heads():
    student, teacher = head_case(300, 1300, 512, seed=20), head_case(300, 1300, 256, seed=30, softcap=8.0)
    tau = torch.linspace(0.5, 2.0, 300)
    asked = {"labels": labels_for(300, 1300), "margins": True}
    z_s, z_t = ([case.to(d).logits(tau) for d in (torch.float64, torch.float32)] for case in (student, teacher))
    names = [name for name in PUBLIC if not name.startswith(("agree", "mass", "rank"))]
    for workspace_mib in (1, 512):
        stats = tip.token_stats(student.head, teacher.head, temperature=tau, workspace_mib=workspace_mib, **asked)
        check_stats(stats, z_s, z_t, names, **asked)


def test_autocast_takes_heads_in_its_dtype_and_statistics_stay_fp32():
    student = head_case(9, 1300, 48, seed=20, bias=normal(1300, seed=40))
    teacher = head_case(9, 1300, 80, seed=30)
    z_s, z_t = (
        [case.to(torch.bfloat16).to(d).logits() for d in (torch.float64, torch.float32)] for case in (student, teacher)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = tip.token_stats(student.head, teacher.head, margins=True)
        mixed = tip.token_stats(tip.Head(student.hidden.bfloat16(), student.weight, student.bias), teacher.head)
    names = [name for name in PUBLIC if name != "agree" and hasattr(stats, name)]
    check_stats(stats, z_s, z_t, names, margins=True)
    assert torch.equal(mixed.kl_rev, stats.kl_rev)
    s, t = ordinary(9, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tip.token_stats(s, t)
    same_bits(inside, tip.token_stats(s, t))


# Backends and imports


def test_an_eager_backend_can_be_asked_for():
    s, t = ordinary(4, 100)
    expected = tip.token_stats(s, t)
    with tip.backend("eager"):
        same_bits(tip.token_stats(s, t), expected)
        student = leaf(s)
        tip.divergence_loss(student, t).sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cuda", "Eager", "", None, 3])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend: expected 'eager' or 'triton', got"), tip.backend(name):
        pass


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter without this suite's environment variables."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TIP_KERNELS_BACKEND")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )


TRY_EVERYTHING = """
import torch, tip_kernels as tip
s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
for work in (
    lambda: tip.token_stats(s, t),
    lambda: tip.divergence_loss(s, t),
    lambda: tip.distill(s, t),
):
    try:
        work()
    except ValueError as error:
        print(error)
    else:
        print("no error")
"""


def test_triton_on_a_cpu_is_refused_everywhere_with_a_way_out():
    asked = child(TRY_EVERYTHING, TIP_KERNELS_BACKEND="triton")
    lines = asked.stdout.splitlines()
    assert len(lines) == 3, asked.stderr
    assert all(line.startswith("backend: 'triton' was asked for") and "TRITON_INTERPRET=1" in line for line in lines), (
        lines
    )


def test_the_environment_names_the_backend_and_the_context_wins():
    code = (
        TRY_EVERYTHING + "\nwith tip.backend('eager'):\n    tip.distill(s, t).loss.backward()\n    print('eager ran')\n"
    )
    asked = child(code, TIP_KERNELS_BACKEND="cuda")
    lines = asked.stdout.splitlines()
    assert lines[-1] == "eager ran", asked.stderr
    assert all(line.startswith("TIP_KERNELS_BACKEND: expected 'eager' or 'triton', got") for line in lines[:3]), lines


def test_importing_needs_neither_triton_nor_transformers():
    code = """
        import sys
        import torch  # torch's own optional imports are not the claim

        BLOCKED = ("triton", "transformers", "trl", "tokenizers", "safetensors", "rich", "tqdm", "matplotlib", "numpy")
        for name in [m for m in sys.modules if m.partition(".")[0] in BLOCKED]:
            del sys.modules[name]

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        before = set(sys.modules)
        sys.meta_path.insert(0, Block())
        import tip_kernels as tip

        new = {m.partition(".")[0] for m in set(sys.modules) - before}
        assert new <= {"tip_kernels", "torch"} | sys.stdlib_module_names, new
        sys.meta_path.pop(0)
        sys.modules["triton"] = None  # what an interpreter without it looks like to find_spec
        s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
        tip.distill(s, t).loss.backward()
        tip.token_stats(tip.Head(torch.randn(4, 8), torch.randn(50, 8)), t, margins=True, top_k=2)
        try:
            with tip.backend("triton"):
                tip.distill(s, t)
        except ValueError as error:
            print(error)
    """
    done = child(code)
    assert done.stdout.startswith("backend: 'triton' was asked for, but triton is not installed"), done.stderr


@pytest.mark.parametrize("size", [(512, 20_000, 512), (2048, 4000, 512), (64, 50_000, 64)])
def test_lists_of_many_tokens_stay_within_the_workspace(size):
    n, vocab, top_k = size
    s, t = normal(n, vocab, seed=1), normal(n, vocab, seed=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        tip.token_stats(s, t, top_k=top_k, workspace_mib=32)
    held = most = 0
    for event in sorted(
        (e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    assert 2**20 < most <= 32.5 * 2**20
