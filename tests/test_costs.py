"""`tip-kernels plan` counts what distill takes."""

from __future__ import annotations

import pytest
import torch
from _cases import head_case

import tip_kernels as tip
from tip_kernels import costs
from tip_kernels.__main__ import main

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
        out = tip.distill(case.head, teacher.head, select=rule, sweeps=sweeps)
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


@pytest.mark.parametrize(
    "option, value",
    [
        ("--tokens", "0"),
        ("--vocab", "-1"),
        ("--keep", "0"),
        ("--keep", "1.5"),
        ("--gpu", "x"),
        ("--workspace-mib", "0"),
    ],
)
def test_a_bad_option_is_refused_by_name(option, value, capsys):
    options = {"--tokens": "64", "--vocab": "100", "--hidden-s": "8", "--hidden-t": "8", option: value}
    with pytest.raises(SystemExit) as stop:
        main(["plan", *(word for pair in options.items() for word in pair)])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_predictions_are_finite_for_one_token():
    assert all(torch.isfinite(torch.tensor(c.predicted_ms)) for c in table(1, 10, 1, 1, keep=1.0).values())
