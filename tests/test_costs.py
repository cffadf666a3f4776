"""`tip-kernels plan` counts what distill takes."""

from __future__ import annotations

import pytest
import torch

import tip_kernels as tip
from tests._cases import distill, head_case
from tip_kernels.__main__ import main
from tip_kernels.plan import costs, wire

CPU = costs.Device("cpu", 1e11, 1e-10, 1e-9, kind="cpu")


def table(*sizes: int, keep: float = 0.2, device: costs.Device = CPU, **options) -> dict[str, costs.Cost]:
    return {c.strategy: c for c in costs.costs(*sizes, keep, device, **options)}


@pytest.mark.parametrize("width_t", [32, 64])
def test_the_units_are_those_of_a_step(width_t):
    student, teacher = head_case(200, 1300, 32, seed=20), head_case(200, 1300, width_t, seed=30)
    planned = table(200, 1300, 32, width_t)
    for rule, sweeps, strategy in [
        (tip.SoftOr(0.2), 1, "one sweep"),
        (tip.SoftOr(0.2), 2, "two sweeps"),
        (tip.TopEntropy(0.2), 1, "one sweep, entropy rule"),
        (tip.TopEntropy(0.2), 2, "two sweeps, entropy rule"),
        (tip.RandomRows(0.2), 1, "one sweep, rows known"),
    ]:
        case = student.leaves()
        out = distill(case.head, teacher.head, select=rule, sweeps=sweeps)
        taken = out.plan.units  # of either head
        if width_t == 32:
            assert taken == pytest.approx(planned[strategy].units, abs=0.02), strategy
        else:
            assert planned[strategy].units > taken, strategy  # the teacher's products are twice as large


def test_a_step_that_does_not_fit_is_not_offered():
    assert "one sweep" in table(1024, 32_000, 512, 512)
    assert "one sweep" not in table(1024, 32_000, 512, 512, workspace_mib=32)
    assert "one sweep" not in table(1024, 32_000, 512, 512, device=costs.GPUS["h100"])


def test_more_kept_rows_cost_more_and_peers_do_not_care():
    few, many = table(1024, 32_000, 512, 512, keep=0.1), table(1024, 32_000, 512, 512, keep=0.9, workspace_mib=2048)
    for name, cost in few.items():
        same = name.endswith("all rows")
        assert (cost.predicted_ms == many[name].predicted_ms) == same, name
        assert cost.predicted_ms <= many[name].predicted_ms


def test_the_rates_of_this_cpu_are_positive():
    device = costs.this_cpu(16, repeats=1)
    assert device.flops > 0 and device.touch_s > 0 and device.fresh_s > 0


def test_the_command_prints_every_strategy(capsys):
    sizes = ["--tokens", "8192", "--vocab", "151936", "--hidden-s", "2048", "--hidden-t", "4096"]
    assert main(["plan", *sizes, "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    for name in ("two sweeps", "TRL, all rows", "Liger, all rows", "dense autograd"):
        assert name in out


def ranked(*sizes: int, keep: float = 0.2, **options) -> dict[str, costs.RankCost]:
    return {c.strategy: c for c in costs.rank_costs(*sizes, keep, costs.GPUS["h100"], weight_bytes=2, **options)}


LARGEST = (1_048_576, 262_144, 4096, 8192)


def test_one_rank_costs_what_a_step_costs_and_sends_nothing():
    alone = {c.strategy: c for c in costs.costs(8192, 151_936, 2048, 4096, 0.2, costs.GPUS["h100"], weight_bytes=2)}
    for name, cost in ranked(8192, 151_936, 2048, 4096, world=1).items():
        assert cost.compute_ms == alone[name].predicted_ms and cost.collectives == [] and cost.wire_ms == 0
        assert cost.memory_mib > alone[name].workspace_mib + 2 * 151_936 * (2048 + 2048 + 4096) / 2**20


def test_a_thousand_ranks_share_the_largest_step():
    """8 ranks a node share the vocabulary, 128 share the rows; the selection moves 12 bytes of each row."""
    alone, many = ranked(*LARGEST, world=1)["two sweeps"], ranked(*LARGEST, world=1024, vocab_parallel=8)["two sweeps"]
    assert alone.compute_ms / many.compute_ms == pytest.approx(1024, rel=0.05)
    assert many.memory_mib < alone.memory_mib / 10
    sent = {c.name: c for c in many.collectives}
    assert sent["scores"].sent == 12 * 127 / 128 * 1_048_576
    assert sent["d(hidden)"].sent == pytest.approx(2 * 7 / 8 * 4 * 4096 * 0.2 * 8192, rel=1e-3)
    assert sent["states"].payload == 4 * 11 * 4 * 8192  # 4 parts of 8192 columns
    assert sent["head (DDP, FSDP2)"].sent == 2 * 127 / 128 * 2 * 32_768 * 4096
    # the largest, and what all hops take
    assert (
        sum(c.sent for c in many.collectives) / 40e6 < many.wire_ms < sum(c.sent for c in many.collectives) / 40e6 + 3
    )


def test_a_cut_vocabulary_sends_hidden_gradients_instead_of_the_head():
    whole, cut = (ranked(*LARGEST, world=1024, vocab_parallel=p) for p in (1, 8))
    names = [{c.name for c in costs["two sweeps"].collectives} for costs in (whole, cut)]
    assert names[1] - names[0] == {"shards", "states", "sure entries", "d(hidden)"} and names[0] <= names[1]
    assert cut["two sweeps"].wire_ms < whole["two sweeps"].wire_ms / 5
    assert set(cut) == {"two sweeps", "two sweeps, entropy rule"} < set(whole)


def test_a_state_on_a_gpu_has_the_words_of_the_kernel():
    row_stats = pytest.importorskip("tip_kernels.backends.triton.row_stats", exc_type=ImportError)
    for columns in (8192, 8193, 20_000):
        for want, teacher in ((frozenset({"entropy_s", "kl_rev"}), True), (frozenset({"entropy_s"}), False)):
            sums = row_stats.new_state(1, columns, "cpu", teacher=teacher).sums
            assert wire.state_words(want, columns, "cuda") == sums.numel()


def test_a_faster_link_is_faster():
    slow, fast = (ranked(*LARGEST, world=8, vocab_parallel=8, link_gbps=g)["two sweeps"] for g in (50, 450))
    hops_ms = 5e-3 * sum(c.hops for c in slow.collectives)
    assert slow.collectives == fast.collectives and slow.wire_ms - hops_ms == pytest.approx(
        9 * (fast.wire_ms - hops_ms)
    )


@pytest.mark.parametrize("link", ["x", "0", "-1", "inf"])
def test_a_link_that_is_none_is_refused(link, capsys):
    sizes = ["--tokens", "64", "--vocab", "100", "--hidden-s", "8", "--hidden-t", "8"]
    with pytest.raises(SystemExit) as stop:
        main(["plan", *sizes, "--world", "2", "--link", link])
    assert stop.value.code == 2 and "argument --link: expected ndr, nvlink3" in capsys.readouterr().err


def test_the_command_prints_what_each_rank_sends(capsys):
    sizes = ["--tokens", "1048576", "--vocab", "262144", "--hidden-s", "4096", "--hidden-t", "8192"]
    assert main(["plan", *sizes, "--gpu", "h100", "--world", "1024", "--vocab-parallel", "8", "--link", "25"]) == 0
    out = capsys.readouterr().out
    assert "128 data-parallel x 8 vocabulary-parallel, 25 GB/s a rank" in out
    for name in ("two sweeps", "states", "sure entries", "d(hidden)", "scores", "normaliser", "head (DDP, FSDP2)"):
        assert name in out


@pytest.mark.parametrize(
    "option, value",
    [
        ("--tokens", "0"),
        ("--vocab", "-1"),
        ("--keep", "0"),
        ("--keep", "1.5"),
        ("--gpu", "x"),
        ("--workspace-mib", "0"),
        ("--world", "0"),
        ("--vocab-parallel", "2"),
        ("--link", "nvlink4"),
    ],
)
def test_a_bad_option_is_refused_by_name(option, value, capsys):
    options = {"--tokens": "64", "--vocab": "100", "--hidden-s": "8", "--hidden-t": "8", option: value}
    with pytest.raises(SystemExit) as stop:
        main(["plan", *(word for pair in options.items() for word in pair)])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_predictions_are_finite_for_one_token():
    assert all(torch.isfinite(torch.tensor(c.predicted_ms)) for c in table(1, 10, 1, 1, keep=1.0).values())
