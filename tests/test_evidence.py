"""bench/evidence.md: its table and figure follow from the committed runs, and its arithmetic is right."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

import tip_kernels as tip

stats = pytest.importorskip("scipy.stats")
matplotlib = pytest.importorskip("matplotlib")
evidence = pytest.importorskip("bench.evidence")

from bench import _evidence_models as models  # noqa: E402
from bench import _evidence_table as table  # noqa: E402
from bench.tables import ROOT  # noqa: E402

SIGNED = r"[+-]\d\.\d{3}"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [json.loads(line) for line in evidence.RUNS.read_text().splitlines()]


@pytest.fixture(scope="module")
def setup() -> dict:
    return json.loads(table.SETUP.read_text())


def test_every_cell_was_run_with_every_student_and_nothing_else_is_there(records):
    wanted = {(*cell, seed) for cell in evidence.cells() for seed in evidence.SEEDS}
    found = [evidence._key(record) for record in records]
    assert len(found) == len(set(found)) and set(found) == wanted
    assert all([look["step"] for look in record["looks"]] == list(evidence.LOOKS) for record in records)


def test_the_runs_make_the_tables_again(records, setup):
    assert table.text(records, table.teachers_of(setup)) == table.TEXT.read_text()


def test_the_runs_make_the_figure_again_bit_for_bit(records, setup):
    if matplotlib.__version__ != setup["matplotlib"]:
        pytest.skip(f"drawn with matplotlib {setup['matplotlib']}, this is {matplotlib.__version__}")
    assert table.figure(records, table.teachers_of(setup)) == table.FIGURE.read_bytes()


def test_every_student_began_between_a_fifth_and_four_fifths_of_its_teacher(setup):
    teachers = table.teachers_of(setup)
    students = [model for model in setup["models"] if model["side"] == "student"]
    assert {(m["task"], m["seed"]) for m in students} == set(itertools.product(models.LANGUAGES, evidence.SEEDS))
    assert all(0.2 < m["accuracy"] / teachers[m["task"]] < 0.8 for m in students)


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/evidence.md", 20)])
def test_every_difference_that_a_page_quotes_is_in_a_row_of_its_claim(page, least):
    """A number with a sign, as in `T1: +0.003`, stands in the table of answers under that claim."""
    block = (ROOT / page).read_text().split("oes choosing tokens help?")[1].split("\n## ")[0]
    block = " ".join(block.split())
    rows = re.findall(r"^\| (\w\d) \| .*?\| ([+-]\d\.\d{3}) \|", table.TEXT.read_text(), re.MULTILINE)
    quoted = re.findall(r"(\w\d): ((?:[+-]\d\.\d{3}(?:, | to | and )?)+)", block)
    found = [(claim, number) for claim, numbers in quoted for number in re.findall(SIGNED, numbers)]
    assert set(found) <= set(rows)
    assert len(found) == len(re.findall(SIGNED, block)) >= least  # none without its claim


def test_an_interval_is_the_bootstrap_over_every_resample():
    x = np.array([0.1, 0.4, 0.9])
    means = sorted(np.mean(each) for each in itertools.product(x, repeat=3))
    assert table.interval(x) == pytest.approx((means[0], means[-1]))  # 2.5 % of 27 is none
    x = np.random.default_rng(0).normal(size=5)
    drawn = np.random.default_rng(1).choice(x, (200_000, 5)).mean(1)
    assert table.interval(x) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def _of(p: list[float], holm: bool) -> list[float]:
    cell = ("task", "rule", "topk", 1.0, "reverse_kl", 1e-3)
    return [d.adjusted for d in table.corrected([table.Difference("T1", cell, cell, 0, 0, 0, x) for x in p], holm)]


def test_corrections_are_those_of_the_textbooks():
    p = [0.01, 0.04, 0.03, 0.005]
    assert _of(p, holm=True) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _of(p, holm=False) == pytest.approx(stats.false_discovery_control(p))


def test_a_verdict_needs_a_corrected_p_or_a_narrow_interval():
    cell = ("task", "rule", "topk", 1.0, "reverse_kl", 1e-3)

    def verdict(mean, low, high, adjusted):
        return table.Difference("T1", cell, cell, mean, low, high, 0.0, adjusted).verdict

    assert verdict(0.1, 0.05, 0.15, 0.04) == "better" and verdict(-0.1, -0.2, -0.05, 0.04) == "worse"
    assert verdict(0.1, 0.05, 0.15, 0.06) == "open" and verdict(0.0, -0.01, 0.019, 0.9) == "same"
    assert verdict(0.0, -0.021, 0.0, 0.9) == "open"


def test_differences_are_paired_by_seed_and_other_seeds_are_refused():
    def run(rule, seed, accuracy):
        cell = {"task": "sorting", "rule": rule, "mode": "topk", "keep": 1.0, "divergence": "reverse_kl", "lr": 1e-3}
        looks = [
            {"step": s, "tokens": s, "seconds": 1.0, "accuracy": accuracy if s >= 10 else 0.0} for s in evidence.LOOKS
        ]
        return cell | {"seed": seed, "looks": looks, "skipped": 0, "kept_share": 1.0, "kept_mass": None}

    gaps = np.array([0.1, 0.2, 0.15])
    runs = [run("b", s, 0.3 * s) for s in range(3)] + [run("a", s, 0.3 * s + gaps[s]) for s in (2, 1, 0)]
    measured = table.measure(runs, {"sorting": 0.5})
    a, b = (cell for cell in sorted(measured))
    found = table.difference(measured, "T1", a, b)
    assert found.mean == pytest.approx(0.15) and found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert measured[b].tokens.tolist() == [np.inf, np.inf, 10]  # 0.6 is the first above 0.45
    with pytest.raises(ValueError, match="the same seeds"):
        table.difference(table.measure(runs[1:], {"sorting": 0.5}), "T1", a, b)


def test_a_drawn_rule_draws_by_its_score():
    """Of the entropy rule it is the library's own sampling."""
    given = tip.token_stats(torch.randn(300, 20, generator=torch.Generator().manual_seed(0)))
    for seed in range(5):
        one, two = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = evidence.Sampled(0.2, of=tip.TopEntropy(0.2), generator=one)
        assert torch.equal(drawn(given).mask, tip.SampleEntropy(0.2, generator=two)(given).mask)


def test_fillers_have_the_share_that_the_protocol_says_and_every_completion_fits():
    for name, share in (("addition_5", 0.057), ("addition_21", 0.214), ("addition_40", 0.400)):
        language = models.LANGUAGES[name]()
        (written,) = language.teacher_reads(random.Random(1), 1)
        letters = sum(character in "abcdefgh" for character in written.completion)
        assert letters / len(written.completion) == pytest.approx(share, abs=0.008)
        assert len(written.completion) <= language.task.max_new_tokens
        assert len(written.prompt) + language.task.max_new_tokens <= models.POSITIONS


def test_sorting_is_judged_by_the_sorted_letters_and_an_end():
    task = models.LANGUAGES["sorting"]().task
    answer = "".join(sorted(task.held_out[3][:-1]))
    assert task.judge(3, answer, True) and not task.judge(3, answer, False) and not task.judge(3, answer[::-1], True)
