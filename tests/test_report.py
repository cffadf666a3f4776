"""What a run shows of itself: the view in a terminal, its report, runs beside each other, trackers."""

import json
import math
import re
import struct
import sys
import types

import pytest
import torch

import tip_kernels as tip
from tip_kernels import __main__ as command

pytest.importorskip("transformers")

from tip_kernels.inspect import curves, page
from tip_kernels.inspect.usage import UsageError
from tip_kernels.opd import report, trackers, train
from tip_kernels.opd.pair import load_pair
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task
from tip_kernels.opd.train import Loop

SMALL = ["--batch", "4", "--eval-prompts", "8", "--eval-every", "2"]


def run(name, *arguments):
    return command.main([name, *map(str, arguments)])


def run_of(name, accuracies, seed=0, **settings):
    """A run of 3 steps, made up."""
    rows = [{"step": 0, "accuracy": accuracies[0], "eval_kl": 1.0}]
    rows += [
        {"step": i, "loss": 1 / i, "kept": 10 * i, "rows": 100, "seconds": 0.5, "accuracy": accuracies[i], "q1": 0.25}
        for i in (1, 2, 3)
    ]
    return curves.Run(name, {"seed": seed, "rule": "soft_or", "keep": 0.2, "preset": None} | settings, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert run("opd", "--steps", 4, *SMALL, "--quiet", "--output", folder) == 0
    return folder


def test_a_run_ends_with_a_page_and_two_pictures(folder):
    html = (folder / "report.html").read_text()
    assert "http" not in html.lower()
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    titles = [panel["title"] for panel in content["panels"]]
    assert titles == [title for title, _ in curves.CURVES.values()] + [
        "Tokens by quadrant, share of all",
        "Entropy of the student on held-out prompts, nats",
    ]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    loss = content["panels"][1]["series"][0]
    assert loss["y"] == [row["loss"] for row in log[1:]] and loss["x"]["steps"] == [1, 2, 3, 4]
    assert loss["x"]["tokens"][-1] == sum(row["kept"] for row in log[1:])
    assert loss["x"]["seconds"][-1] == pytest.approx(sum(row["seconds"] for row in log[1:]))
    for name in ("curves.png", "tokens.png"):
        data = (folder / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 200 and len(data) > 10_000


def test_no_report_writes_none(tmp_path):
    assert run("opd", "--steps", 1, *SMALL, "--quiet", "--no-report", "--output", tmp_path) == 0
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.html"))


def test_overwriting_a_run_removes_its_pages(tmp_path):
    assert run("opd", "--steps", 1, *SMALL, "--quiet", "--output", tmp_path) == 0
    assert (tmp_path / "report.html").is_file()
    arguments = ["--steps", 1, *SMALL, "--quiet", "--no-report", "--overwrite", "--output", tmp_path]
    assert run("opd", *arguments) == 0
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_the_log_says_how_much_of_the_divergence_the_kept_tokens_carry(keep, monkeypatch):
    pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", torch.device("cpu"))
    loop = Loop(Settings(batch=4, keep=keep), pair, load_task("addition", 1), torch.device("cpu"))
    seen = []
    distill = tip.distill
    monkeypatch.setattr(train, "distill", lambda *a, **k: seen.append((distill(*a, **k), k["row_mask"])) or seen[-1][0])
    row = loop.step()
    out, mask = seen[0]
    kl = out.stats.kl_rev[mask.flatten()].double()
    kept = out.stats.kl_rev[out.kept.row_ids].double()
    assert row["kept_mass"] == pytest.approx((kept.sum() / kl.sum()).item())
    assert (row["kept_mass"] == pytest.approx(1.0)) == (keep == 1.0) and row["kept_mass"] > 0.5


def test_kept_mass_leaves_out_masked_rows_and_infinite_divergences():
    stats = tip.TokenStats(kl_rev=torch.tensor([1.0, 3.0, math.inf, 100.0, math.nan]))
    kept = tip.Kept(torch.tensor([True, False, True, False, False]), torch.zeros(5))
    mask = torch.tensor([[True, True, True, False, True]])
    assert train._kl_sums(stats, kept, mask) == (4.0, 1.0)


def test_the_entropy_histogram_counts_every_token_once():
    entropy = torch.tensor([0.0, 0.1, 1.0, 2.0, 3.0, math.nan])
    counts = train._histogram(entropy, 2.0)
    assert counts.sum() == 5 and counts.shape == (train.BINS,)
    assert counts[0] == 1 and counts[2] == 1 and counts[20] == 1 and counts[-1] == 2


def test_evaluations_hold_a_histogram_of_all_answers_tokens(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [row["entropy_histogram"] for row in rows if "entropy_histogram" in row]
    assert len(found) == 3 and found[0]["top"] == pytest.approx(math.log(24))
    assert all(8 * 30 < sum(histogram["counts"]) <= 8 * 48 for histogram in found)
    panel = curves._histograms(curves.Run.load(folder))
    assert [sum(series["y"]) for series in panel["series"]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "values, half", [([1.0, 2.0], 6.353), ([1.0, 2.0, 3.0], 2.4841), ([0.0, 1.0] * 30, 0.13024), ([5.0] * 4, 0.0)]
)
def test_bands_are_students_intervals_of_the_mean(values, half):
    mean, low, high = curves.interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert high - mean == pytest.approx(half, rel=1e-3) and mean - low == pytest.approx(half, rel=1e-3)
    assert curves.interval([0.7]) == (0.7, 0.7, 0.7)


def test_runs_that_differ_in_their_seed_are_one_group_named_by_what_differs_elsewhere():
    runs = [run_of(f"a{seed}", [0, 0.1, 0.2, 0.3 + seed / 10], seed) for seed in range(3)]
    runs += [run_of("b", [0, 0.2, 0.4, 0.6], keep=0.5), run_of("c", [0, 0, 0, 0], preset="adakd")]
    groups = curves.grouped(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("soft_or, keep 0.2", 3),
        ("soft_or, keep 0.5", 1),
        ("adakd", 1),
    ]
    curve = groups[0].curve("accuracy")
    assert curve["x"] == {"steps": [0, 1, 2, 3], "tokens": [0, 10, 30, 60], "seconds": [0, 0.5, 1.0, 1.5]}
    assert curve["y"][-1] == pytest.approx(0.4) and curve["high"][-1] == pytest.approx(0.4 + 4.303 * 0.1 / 3**0.5)
    assert curve["low"][:3] == curve["y"][:3] and curves.grouped(runs[:3])[0].name == "a0"
    figures = curves.figures(groups)
    assert [row["runs"] for row in figures] == [["a0", "a1", "a2"], ["b"], ["c"]]
    assert figures[0]["accuracy"]["mean"] == pytest.approx(0.4) and figures[1]["kept_share"] == pytest.approx(0.2)


def test_a_curve_of_runs_of_unequal_length_ends_where_the_shortest_does():
    runs = [run_of("a", [0, 0.1, 0.2, 0.3]), run_of("b", [0, 0.3, 0.4, 0.5], seed=1)]
    del runs[1].rows[3]
    curve = curves.grouped(runs)[0].curve("accuracy")
    assert curve["x"]["steps"] == [0, 1, 2] and curve["y"] == pytest.approx([0, 0.2, 0.3])


def test_drawn_bands_of_shares_stay_within_them():
    group = curves.grouped([run_of("a", [0, 0, 0, 0.9]), run_of("b", [0, 0, 0, 1.0], seed=1)])[0]
    assert group.curve("accuracy")["high"][-1] > 1
    series = curves._panel("accuracy", [group.curve("accuracy")])["series"][0]
    assert max(series["high"]) == 1 and min(series["low"]) >= 0


def test_compare_writes_a_page_a_picture_and_figures(folder, tmp_path, capsys):
    other = tmp_path / "other"
    assert run("opd", "--steps", 2, *SMALL, "--keep", 0.5, "--quiet", "--no-report", "--output", other) == 0
    output = tmp_path / "both.html"
    assert run("compare", folder, other, "--output", output, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [group["name"] for group in result["groups"]] == ["keep 0.2, steps 4", "keep 0.5, steps 2"]
    assert "kept" in out and "both.html" in err
    assert "http" not in output.read_text().lower() and output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert run("compare", folder, "--output", output, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_run_of_an_earlier_version_is_compared_by_what_its_log_has(tmp_path):
    rows = [{"step": 0, "eval_kl": 1.0}, {"step": 1, "loss": 2.0, "kept": 3, "rows": 9, "seconds": 1.0, "eval_kl": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text('{"seed": 0}')
    content = curves.comparison(curves.grouped([curves.Run.load(tmp_path)]))
    assert [panel["title"] for panel in content["panels"]] == [curves.CURVES[c][0] for c in ("loss", "eval_kl")]
    assert content["tables"][0]["rows"][0][2:5] == ["–", "–", "0.5"]
    assert "0.5" in page.curves_page(content["title"], content)


BAD = {
    "nothing": (["compare"], r"compare: error: .*arguments are required: RUN"),
    "no run": (["compare", "."], r"argument RUN: expected the folder of a run, got '.' without run.json"),
    "no page": (["inspect"], r"argument FILE: expected a run, .* got nothing"),
    "missing": (["inspect", "no.safetensors"], r"argument FILE: expected a file .* got 'no.safetensors'"),
    "another kind": (["inspect", __file__], r"argument FILE: expected a name in .safetensors or .parquet, got "),
    "no run to inspect": (["inspect", "."], r"argument FILE: expected the folder of a run, got '.'"),
    "half a pair": (["inspect", "--student", "."], r"argument FILE: expected .* --teacher and --student"),
    "both": (["inspect", ".", "--teacher", "x"], r"argument --teacher: expected none beside a FILE, got 'x'"),
    "a rule of none": (["inspect", "no.parquet", "--rule", "all"], r"argument --rule: expected none where FILE"),
    "no rollouts": (["inspect", ".", "--prompts", "0"], r"argument --prompts: expected a whole number of at least 1"),
    "a tracker of none": (["opd", "--tracker", "paper"], r"argument --tracker: invalid choice: 'paper'"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lines", ["not json\n", '{"no": "step"}\n', '{"step": 1}\n{"step": 0}\n', ""])
def test_a_broken_log_is_one_clear_error(tmp_path, lines):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text(lines)
    with pytest.raises(UsageError, match=r"argument RUN: expected "):
        curves.Run.load(tmp_path)


ROW = {"loss": 0.5, "entropy": 0.4, "kept_share": 0.2, "kept_mass": 0.9, "grad_norm": 1.0}
ROW |= {"q1": 0.01, "q2": 0.2, "q3": 0.0, "q4": 0.79}


def show(quiet=False):
    with report.Progress(Settings(steps=3), 0, quiet) as progress:
        progress.say("hello [world]")
        progress.show({"step": 0, "accuracy": 0.25, "eval_kl": 1.5})
        for step in (1, 2, 3):
            progress.show(
                ROW | {"step": step, "loss": 1 / step} | ({"accuracy": 0.5, "eval_kl": 0.7} if step == 3 else {})
            )


def test_a_terminal_gets_a_live_view(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    show()
    out, err = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert out == "" and "\x1b[" in err and "hello [world]" in text
    last = text[text.rindex("opd ") :]
    assert "3/3" in last and re.search(r"accuracy +25.0 % → 50.0 % +▁█", last) and re.search(r"loss +1 → 0.333", last)
    assert "Q3 0 %  Q1 1 %  Q2 20 %  Q4 79 %" in last and re.search(r"kept +20.0 % +with 90.0 % of the KL", last)


def test_elsewhere_it_is_plain_lines_and_quiet_is_nothing(capsys):
    show()
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    assert err.splitlines()[:2] == ["hello [world]", "start  accuracy 25.0 %  KL 1.5"]
    assert err.splitlines()[2].startswith("step 3/3  accuracy 50.0 %  loss 0.333  entropy 0.40  kept 20.0 %")
    assert err.count("\n") == 3
    show(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_levels_and_stripe_follow_the_values():
    assert report._levels([0.0, 1.0, 0.5]) == "▁█▅" and report._levels([2.0, 2.0]) == "▁▁"
    stripe = report._stripe({"q1": 0.0, "q2": 0.25, "q3": 0.001, "q4": 0.749})
    assert [span.end - span.start for span in stripe.spans] == [1, 10, 30]


def test_a_tracker_gets_the_numbers_of_every_row_and_is_closed(tmp_path, monkeypatch):
    logged, events = [], []

    class Stub:
        def log(self, numbers, step):
            logged.append((step, numbers))

        def finish(self):
            events.append("finished")

    def init(project, name, config, **_):
        events.append((project, name, config["steps"]))
        return Stub()

    stub = types.ModuleType("wandb")
    stub.init, stub.__spec__ = init, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    folder = tmp_path / "run"
    assert run("opd", "--steps", 2, *SMALL, "--quiet", "--no-report", "--tracker", "wandb", "--output", folder) == 0
    assert events == [("tip-kernels", "run", 2), "finished"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in logged] == [0, 1, 2]
    assert logged[1][1]["loss"] == rows[1]["loss"] and logged[2][1]["accuracy"] == rows[2]["accuracy"]
    assert all(isinstance(v, float) for _, numbers in logged for v in numbers.values())


def test_trackers_are_off_by_default_and_a_missing_one_is_named_before_any_work(tmp_path, capsys, monkeypatch):
    assert isinstance(trackers.open_tracker(None, tmp_path, {}, 0), trackers._None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="argument --tracker: trackio is not installed: pip install trackio"):
        trackers.check("trackio")
    assert trackers.check(None) is None and not list(tmp_path.iterdir())


def test_numbers_of_a_row_are_finite_and_flat():
    row = {"step": 3, "loss": math.nan, "kl": math.inf, "rows": 4, "grad_norm": None, "entropy_histogram": {"top": 1}}
    assert trackers.numbers_of(row) == {"rows": 4.0}


def test_tensorboard_reads_back_what_a_run_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = trackers.open_tracker("tensorboard", tmp_path, {"steps": 2}, 0)
    tracker.log({"loss": 2.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 2.0), (2, 1.0)]
