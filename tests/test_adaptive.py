"""AdaKD: the adaptive ratio, the temperatures and the preset, against the plain replay in reference/adakd.py."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference as ref
import tip_kernels as tip
from tests._cases import INF, NAN, check_gradient, head_case, leaf, ordinary
from tip_kernels.select.adakd import AdaptiveFocus, adakd, difficulty_temperature

checked = settings(deadline=None, max_examples=60, derandomize=True)


def stats_of(hellinger_sq, shape=()) -> tip.TokenStats:
    h = torch.as_tensor(hellinger_sq, dtype=torch.float32).flatten()
    return tip.TokenStats(hellinger_sq=h, _batch_shape=shape or (h.numel(),))


# The ratio


def test_focus_replays_a_written_trace_step_by_step():
    # Averages (beta 1/2): 8 | 8, 6, 6, 4, 8, 12, 12. The anchor is 8, then the average of the moment the ratio moves.
    focus = AdaptiveFocus(beta=0.5, tolerance=0.1, step=0.5, floor=0.2, warmup=1)
    trace = [(8, 1.0, 8.0), (8, 1.0, 8.0), (4, 0.5, 6.0), (6, 0.5, 6.0), (2, 0.25, 4.0), (12, 0.375, 8.0)]
    for loss, keep, anchor in [*trace, (16, 0.5625, 12.0), (12, 0.5625, 12.0)]:
        assert focus.update(loss) == focus.keep == keep
        assert focus.state_dict()["anchor"] == anchor


def test_focus_replays_the_released_codes_trace_floor_included():
    # Averages are the losses. 8 | 8 is the anchor, compared with nothing; 4 and 2 halve, anchor 2; 1 stays at the floor
    # and 0.5 again, each an anchor; so 0.6 is a rise, where the paper's anchor is still 2, and goes on to 1.
    losses = [9, 8, 4, 2, 1, 0.5, 0.6, 1.2, 2.4, 4.8, 9.6, 9]
    focus = AdaptiveFocus(beta=0.0, tolerance=0.1, step=0.5, floor=0.3, warmup=1, reanchor="release")
    trace = [1, 1, 0.5, 0.3, 0.3, 0.3, 0.45, 0.675, 1, 1, 1, 1]
    anchors = [9, 8, 4, 2, 1, 0.5, 0.6, 1.2, 2.4, 4.8, 9.6, 9.6]
    for loss, keep, anchor in zip(losses, trace, anchors, strict=True):
        assert focus.update(loss) == pytest.approx(keep)
        assert focus.state_dict()["anchor"] == anchor
    paper = AdaptiveFocus(beta=0.0, tolerance=0.1, step=0.5, floor=0.3, warmup=2)
    assert [paper.update(loss) for loss in losses][:8] == [1, 1, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3]


@given(st.lists(st.floats(0.01, 100.0), max_size=60), st.integers(0, 5), st.sampled_from([0.0, 0.9]))
@checked
def test_focus_released_is_the_training_scripts_loop(losses, warmup, beta):
    """Its own control flow, written down again: one anchor, which is None until a loss after the warm-up sets it."""
    ratio, average, anchor, ratios = 1.0, None, None, []
    for step, loss in enumerate(losses, start=1):
        average = loss if average is None else beta * average + (1 - beta) * loss
        if anchor is not None:
            drop = anchor - average
            if abs(drop) > 0.05 * anchor:
                ratio = max(ratio * 0.95, 0.1) if drop > 0 else min(ratio * 1.05, 1.0)
                anchor = average
        elif step > warmup:
            anchor = average
        ratios.append(ratio)
    focus = AdaptiveFocus(beta=beta, warmup=warmup, reanchor="release")
    assert [focus.update(loss) for loss in losses] == pytest.approx(ratios)
    assert ref.adaptive_focus(losses, warmup=warmup, smoothing=beta, reanchor="release") == pytest.approx(ratios)


@checked
@given(
    st.lists(st.floats(0.01, 100.0), max_size=40),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([0.05, 0.5]),
    st.sampled_from([0.1, 0.4, 1.0]),
)
def test_focus_agrees_with_the_reference(losses, warmup, beta, tolerance, step, floor):
    focus = AdaptiveFocus(beta, tolerance, step, floor, warmup)
    expected = ref.adaptive_focus(losses, warmup=warmup, smoothing=beta, tolerance=tolerance, step=step, floor=floor)
    assert [focus.update(loss) for loss in losses] == expected


def test_focus_starts_with_everything_and_stays_between_its_floor_and_one():
    focus = AdaptiveFocus(beta=0.0, step=0.5, floor=0.3)
    assert focus.keep == 1.0
    assert [focus.update(2.0**-i) for i in range(5)] == [1, 0.5, 0.3, 0.3, 0.3]
    assert [focus.update(2.0**i) for i in range(5)] == pytest.approx([0.45, 0.675, 1, 1, 1])


def test_focus_continues_from_a_checkpoint_as_if_nothing_had_happened():
    losses = (3 * torch.rand(30, generator=torch.Generator().manual_seed(0))).tolist()
    options = {"beta": 0.5, "warmup": 12}
    whole, first = AdaptiveFocus(**options), AdaptiveFocus(**options)
    expected = [whole.update(loss) for loss in losses]
    got = [first.update(loss) for loss in losses[:9]]
    second = AdaptiveFocus(**options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.keep == first.keep
    assert got + [second.update(loss) for loss in losses[9:]] == expected
    assert len(set(expected)) > 3
    fresh = AdaptiveFocus(**options)
    fresh.load_state_dict(torch.load(saved(AdaptiveFocus().state_dict()), weights_only=True))
    assert [fresh.update(loss) for loss in losses] == expected


def saved(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_focus_takes_tensors_and_ignores_losses_that_are_not_finite():
    focus, plain = AdaptiveFocus(beta=0.5), AdaptiveFocus(beta=0.5)
    for loss in (NAN, 4.0, INF, 2.0, -INF, 1.0):
        focus.update(torch.tensor(loss, requires_grad=True))
        if math.isfinite(loss):
            plain.update(loss)
    assert focus.state_dict() == plain.state_dict() and focus.keep < 1


def test_focus_under_gradient_accumulation_wants_the_mean_of_the_micro_batches():
    """The mean over micro-batches of equal size is the loss of the whole batch: the same trace."""
    micro = (
        1 + torch.rand(10, 4, generator=torch.Generator().manual_seed(1)).double() * torch.linspace(4, 0, 10)[:, None]
    )
    accumulated, whole = AdaptiveFocus(beta=0.5), AdaptiveFocus(beta=0.5)
    for step in micro:
        accumulated.update(sum(x.item() for x in step) / 4)
        whole.update(step.mean())
    assert accumulated.keep == whole.keep < 1


RANK = """
import sys, torch, torch.distributed as dist
from tip_kernels.select.adakd import AdaptiveFocus
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
focus = AdaptiveFocus(beta=0.5)
for a, b in [(4.0, 6.0), (3.0, 1.0), (float("nan"), 1.0), (0.5, 1.5), (9.0, 11.0)]:
    print(focus.update((a, b)[rank]), focus.state_dict()["average"], flush=True)
alone = AdaptiveFocus(group=(dist.new_group([0]), dist.new_group([1]))[rank])
alone.update(1.0 + rank)
print(alone.state_dict()["average"])
dist.destroy_process_group()
"""


def test_focus_is_the_same_on_every_data_parallel_rank(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(tip.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    out = [process.communicate(timeout=120)[0].split() for process in ranks]
    assert all(process.returncode == 0 for process in ranks)
    plain = AdaptiveFocus(beta=0.5)
    expected = [(plain.update(loss), plain.state_dict()["average"]) for loss in (5.0, 2.0, NAN, 1.0, 10.0)]
    for rank in (0, 1):
        assert out[rank] == [str(x) for pair in expected for x in pair] + [str(1.0 + rank)]
    assert len({keep for keep, _ in expected}) > 2


@pytest.mark.parametrize(
    "argument, values",
    [
        ("beta", (1.0, -0.1, NAN, None)),
        ("tolerance", (-0.1, 1.0, "x")),
        ("step", (0.0, 1.0, INF)),
        ("floor", (0.0, 1.1, True)),
        ("warmup", (-1, 0.5, True, None)),
    ],
)
def test_a_bad_setting_of_the_focus_is_refused(argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
            AdaptiveFocus(**{argument: value})


def test_a_bad_loss_or_state_is_refused_and_changes_nothing():
    focus = AdaptiveFocus()
    focus.update(2.0)
    before = focus.state_dict()
    for loss in ("2", None, True, torch.ones(2)):
        with pytest.raises(ValueError, match=r"^loss: expected a number"):
            focus.update(loss)
    for state in ({}, {"keep": 1.0}, before | {"more": 1}, [1.0]):
        with pytest.raises(ValueError, match=r"^state: expected a dict of keep, average, anchor, seen"):
            focus.load_state_dict(state)
    assert focus.state_dict() == before


# Temperatures


@st.composite
def batches(draw):
    """Rows with ties, zeros and NaN, perhaps a mask, perhaps rollouts that are not contiguous."""
    n = draw(st.integers(1, 20))
    h = draw(st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 0.1, 0.1, 0.5, 0.9, 1.0, NAN]), min_size=n, max_size=n))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    ids = draw(st.none() | st.lists(st.sampled_from([0, 7, -3]), min_size=n, max_size=n))
    return (
        stats_of(h),
        None if mask is None else torch.tensor(mask),
        None if ids is None else torch.tensor(ids),
    )


@checked
@given(batches(), st.sampled_from([0.5, 1.0, -0.5, 0.0]), st.sampled_from([1.0, 2.0]))
def test_temperatures_agree_with_the_reference(batch, strength, base):
    stats, mask, ids = batch
    as_dict = {"hellinger_sq": stats.hellinger_sq.double()}
    for scope in ("batch", "rollout"):
        ours = difficulty_temperature(stats, mask, strength, base, scope=scope, rollout_ids=ids)
        expected = ref.difficulty_temperature(
            as_dict, mask, strength, base, rollout_ids=ids if scope == "rollout" else None
        )
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)


def test_temperatures_by_hand():
    # Difficulties 0.1, 0.2, 0.4, 0.4: the lower median is 0.2, and (h - m) / (h + m) = -3/5, 0, 3/5, 3/5.
    stats = stats_of([0.01, 0.04, 0.16, 0.16, NAN, 1.0])
    mask = torch.tensor([True] * 5 + [False])
    expected = torch.tensor([math.exp(0.3), 1, math.exp(-0.3), math.exp(-0.3), 1, 1])
    torch.testing.assert_close(difficulty_temperature(stats, mask), expected)
    torch.testing.assert_close(difficulty_temperature(stats, mask, base=3.0), 3 * expected)
    torch.testing.assert_close(difficulty_temperature(stats, mask, strength=-0.5), 1 / expected)
    assert torch.equal(difficulty_temperature(stats, mask, strength=0.0), torch.ones(6))


def test_temperatures_lie_between_e_to_the_plus_and_minus_strength_and_fall_with_difficulty():
    stats = tip.token_stats(*ordinary(31, 200))
    tau = difficulty_temperature(stats, strength=0.7, base=2.0)
    assert (tau >= 2 * math.exp(-0.7)).all() and (tau <= 2 * math.exp(0.7)).all()
    assert (tau[stats.hellinger_sq.argsort()].diff() <= 0).all()
    median = stats.hellinger_sq.median()
    assert (tau[stats.hellinger_sq == median] == 2.0).all()
    s = stats.hellinger_sq.double().sqrt()
    expected = 2 * torch.exp(-0.7 * torch.tanh(torch.log(s / s.median())))
    torch.testing.assert_close(tau.double(), expected, rtol=1e-6, atol=0)


def test_temperatures_are_defined_where_difficulties_are_zero():
    assert difficulty_temperature(stats_of([0.0, 0.0, 0.0])).tolist() == [1, 1, 1]
    c = math.exp(0.5)
    torch.testing.assert_close(difficulty_temperature(stats_of([0.0, 0.0, 0.3])), torch.tensor([1, 1, 1 / c]))
    torch.testing.assert_close(difficulty_temperature(stats_of([0.0, 0.3, 0.3])), torch.tensor([c, 1, 1]))
    assert difficulty_temperature(stats_of([NAN, NAN]), base=2.0).tolist() == [2, 2]
    assert difficulty_temperature(stats_of([0.5, 0.1]), torch.zeros(2, dtype=torch.bool)).tolist() == [1, 1]
    assert difficulty_temperature(stats_of([])).shape == (0,)


def test_temperatures_can_take_the_median_of_the_kept_rows():
    stats = stats_of([0.1, 0.2, 0.3, 0.4, 0.5, NAN, NAN])
    kept = tip.TopHellinger(3)(stats)
    tau = difficulty_temperature(stats, kept=kept)
    h = stats.hellinger_sq
    torch.testing.assert_close(tau[:5], torch.exp(-0.5 * (h - 0.4) / (h + 0.4))[:5])
    assert tau[5] == 1
    torch.testing.assert_close(difficulty_temperature(stats, kept=tip.KeepAll()(stats)), difficulty_temperature(stats))
    nothing = tip.Threshold("hellinger_sq", above=2.0)(stats)
    assert difficulty_temperature(stats, kept=nothing).tolist() == [1] * 7


def test_rollouts_of_a_batch_have_a_median_each():
    stats = stats_of([[0.1, 0.2, 0.3], [0.5, 0.7, 0.6]], shape=(2, 3))
    tau = difficulty_temperature(stats, scope="rollout").view(2, 3)
    assert tau[0, 1] == tau[1, 2] == 1
    again = difficulty_temperature(stats, scope="rollout", rollout_ids=torch.tensor([[4, 4, 4], [2, 2, 2]]))
    assert torch.equal(again, tau.flatten())


def test_temperatures_are_detached_and_need_no_look_at_the_data():
    stats = stats_of([0.1, 0.2])
    stats.hellinger_sq.requires_grad_()
    assert not difficulty_temperature(stats).requires_grad
    meta = tip.TokenStats(hellinger_sq=torch.empty(6, device="meta"), _batch_shape=(2, 3))
    mask = torch.empty(6, dtype=torch.bool, device="meta")
    for scope in ("batch", "rollout"):
        assert difficulty_temperature(meta, mask, scope=scope).shape == (6,)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("strength", NAN),
        ("base", 0.0),
        ("scope", "sequence"),
        ("row_mask", torch.ones(2)),
        ("rollout_ids", torch.zeros(5, dtype=torch.int64)),
        ("kept", torch.ones(2, dtype=torch.bool)),
        ("kept", tip.KeepAll()(stats_of([0.1, 0.2, 0.3]))),
    ],
)
def test_bad_arguments_of_temperatures_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
        difficulty_temperature(stats_of([0.1, 0.2]), **{argument: value})


def test_temperatures_without_the_statistic_are_refused():
    with pytest.raises(ValueError, match="difficulty_temperature reads hellinger_sq, which was not measured"):
        difficulty_temperature(tip.token_stats(torch.zeros(2, 3)))


# The preset


def through_reference(s: Tensor, t: Tensor, value, **options) -> list[tuple[Tensor, Tensor]]:
    out = []
    for dtype in (torch.float64, torch.float32):
        z = leaf(s.to(dtype))
        loss = ref.adakd_loss(z, t.to(dtype), value, **options)
        loss.backward()
        out.append((loss.detach(), z.grad))
    return out


DIVERGENCES = {
    "reverse": (tip.ReverseKL(), ref.reverse_kl),
    "forward": (tip.ForwardKL(), ref.forward_kl),
    "todi": (tip.ToDi(), ref.todi),
    "alpha-beta": (tip.AlphaBeta(), lambda s, t: ref.alpha_beta(s, t, 0.2, 0.7)),
}


@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_preset_learns_the_loss_of_the_reference(divergence, scope):
    ours, value = DIVERGENCES[divergence]
    s, t = ordinary(24, 300)
    t[::2] = s[::2] + 0.3 * t[::2]  # easy rows and hard ones
    mask = torch.arange(24) % 5 != 0
    ids = torch.arange(24) % 3
    out_of = {"row_mask": mask, "rollout_ids": ids, "scope": scope, "strength": 0.7, "base": 1.5}
    student = leaf(s)
    out = tip.distill(student, t, divergence=ours, **adakd(0.4, **out_of))
    out.loss.backward()
    truth, eager = through_reference(s, t, value, keep=0.4, **out_of)
    torch.testing.assert_close(out.loss.detach().double(), truth[0], rtol=1e-5, atol=1e-6)
    check_gradient(student.grad, eager[1], truth[1], "gradient", largest_logit=12, row_weight=0.3)
    assert out.kept.mask.sum() == (int(0.4 * 19) if scope == "batch" else 3 * int(0.4 * 6.5))
    assert not student.grad[~out.kept.mask].any()


def test_the_preset_over_heads_in_a_batch_equals_its_logits():
    student, teacher = head_case(12, 300, 16, seed=20), head_case(12, 300, 24, seed=30)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    case = student.leaves()
    head = tip.Head(case.hidden.view(3, 4, -1), case.weight)
    other = tip.Head(teacher.hidden.view(3, 4, -1), teacher.weight)
    out = tip.distill(head, other, **adakd(0.5, row_mask=mask))
    logits = student.logits().view(3, 4, -1)
    dense = tip.distill(logits, teacher.logits().view(3, 4, -1), **adakd(0.5, row_mask=mask))
    torch.testing.assert_close(out.loss.detach(), dense.loss)
    assert torch.equal(out.kept.mask, dense.kept.mask) and out.kept.mask.view(3, 4).sum(1).tolist() == [2, 1, 2]


def test_the_parts_of_the_preset_can_be_left_out_and_varied():
    s, t = ordinary(16, 200)
    t[::2] = s[::2] + 0.3 * t[::2]

    def loss(**options):
        return tip.distill(s, t, **adakd(**options)).loss

    plain = tip.distill(s, t, select=tip.TopHellinger(0.5)).loss
    torch.testing.assert_close(loss(focus=0.5, strength=0.0), plain)
    focus = AdaptiveFocus()
    torch.testing.assert_close(loss(focus=focus), loss(focus=1.0))
    focus.load_state_dict(focus.state_dict() | {"keep": 0.5})
    torch.testing.assert_close(loss(focus=focus), loss(focus=0.5))
    stats = tip.token_stats(s, t)
    kept = tip.TopHellinger(0.5)(stats)
    tau = difficulty_temperature(stats, kept=kept)
    expected = tip.distill(s, t, select=tip.TopHellinger(0.5), temperature=tau, temperature_sq=True).loss
    torch.testing.assert_close(loss(focus=0.5, median_of="kept"), expected, rtol=1e-5, atol=1e-6)
    different = [loss(focus=0.5), loss(focus=0.5, median_of="kept"), loss(focus=0.5, base=2.0)]
    assert len({round(x.item(), 4) for x in different}) == 3


def test_the_preset_measures_medians_over_the_rows_that_it_was_given():
    """Also where masked rows were measured: distill leaves them out only if the mask is on the CPU."""
    stats = tip.token_stats(*ordinary(12, 200))
    mask, ids = torch.arange(12) % 4 != 0, torch.arange(12) % 3
    where = {"row_mask": mask, "rollout_ids": ids}
    kept = tip.TopHellinger(0.5)(stats, **where)
    for options, expected in (
        ({}, {}),
        ({"median_scope": "rollout"}, {"scope": "rollout"}),
        ({"median_of": "kept"}, {"kept": kept}),
        ({"median_of": "kept", "median_scope": "rollout"}, {"kept": kept, "scope": "rollout"}),
    ):
        tau = adakd(0.5, **where, **options)["temperature"](stats)
        assert torch.equal(tau, difficulty_temperature(stats, **where, **expected)), options
        assert not torch.equal(tau, difficulty_temperature(stats)), options


@pytest.mark.parametrize(
    "argument, value",
    [
        *[("focus", focus) for focus in (0.0, 1, "half", None)],
        ("strength", NAN),
        ("base", -1.0),
        *[(name, "all") for name in ("scope", "median_scope", "median_of")],
    ],
)
def test_bad_arguments_of_the_preset_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*got"):
        adakd(**{argument: value})


def test_a_student_learns_with_the_preset_while_the_focus_narrows():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 12, generator=g)
    teacher = tip.Head(hidden, torch.randn(40, 12, generator=g))
    weight = torch.zeros(40, 12, requires_grad=True)
    mask = torch.arange(64) % 7 != 0
    ids = torch.arange(64) // 16
    focus = AdaptiveFocus(beta=0.5, step=0.1, floor=0.3, warmup=3)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    before = tip.token_stats(tip.Head(hidden, weight), teacher).kl_fwd[mask].mean()
    kept = []
    for _ in range(25):
        optimizer.zero_grad()
        arguments = adakd(focus, row_mask=mask, rollout_ids=ids)
        out = tip.distill(tip.Head(hidden, weight), teacher, divergence=tip.ForwardKL(), **arguments)
        out.loss.backward()
        optimizer.step()
        focus.update(out.loss)
        kept.append(int(out.kept.mask.sum()))
    after = tip.token_stats(tip.Head(hidden, weight), teacher).kl_fwd[mask].mean()
    assert after < 0.25 * before
    assert kept[:4] == [54] * 4 and kept[-1] < 0.7 * 54 and focus.keep >= 0.3
