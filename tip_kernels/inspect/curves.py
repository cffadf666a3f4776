"""A run's curves from its log, several runs beside each other, and their pictures.

A curve is drawn against optimizer steps, against the tokens trained on, or against seconds of training (evaluation not
counted). Runs that differ in nothing but the seed are one group: at each step that all of them have, its mean m and

    m +- t_{0.975, n-1} s / sqrt(n)          s: the sample standard deviation of n runs

the 95 % interval of the mean under Student's t; a single run has no interval.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tip_kernels.inspect.objects import parse_object, read_object, read_text
from tip_kernels.inspect.page import QUADRANTS
from tip_kernels.inspect.usage import UsageError

AXES = {"steps": "optimizer steps", "tokens": "tokens trained on", "seconds": "seconds of training"}
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7b00", "#666666")
QUADRANT_COLOURS = {1: "#e69f00", 2: "#56b4e9", 3: "#d55e00", 4: "#009e73"}
# t_{0.975, n} for n = 1, 2, ...; beyond them 1.96 + 2.372 / n is as exact
_T_975 = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101
2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042"""
T_975 = [float(word) for word in _T_975.split()]
SAYS_ENOUGH = ("rule", "preset", "divergence", "task")  # settings whose values need no name before them
IGNORED = ("seed", "device", "threads")  # settings in which runs of one group may differ
CURVES = {  # log column: title, whether it is a share
    "accuracy": ("Accuracy on held-out prompts", True),
    "loss": ("Loss on kept tokens", False),
    "eval_kl": ("KL(student ‖ teacher) on held-out prompts, nats a token", False),
    "kept_mass": ("KL carried by the kept tokens, share of all", True),
}


COUNTS = ("kept", "rows", "seconds")  # columns that are added up


@dataclass
class Run:
    """One run: its settings and its log, a dict a step; row 0 is the evaluation before training."""

    name: str
    settings: dict
    rows: list[dict]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read the folder of a run; UsageError where it is none."""
        for name in ("run.json", "log.jsonl"):
            if not (folder / name).is_file():
                raise UsageError(f"argument RUN: expected the folder of a run, got {str(folder)!r} without {name}")
        settings, log = read_object(folder / "run.json", "RUN"), folder / "log.jsonl"
        rows = [_row(log, number, line) for number, line in enumerate(read_text(log, "RUN").splitlines(), start=1)]
        steps = [row["step"] for row in rows]
        if not rows or steps != sorted(set(steps)):
            raise UsageError(f"argument RUN: expected ascending steps in {log}, got {steps[:5]}")
        return cls(folder.resolve().name, settings, rows)

    def axis(self, name: str) -> dict[int, float]:
        """How far the run was on an axis of AXES after each step."""
        column = {"steps": None, "tokens": "kept", "seconds": "seconds"}[name]
        steps = [row["step"] for row in self.rows]
        return dict(zip(steps, accumulate(row.get(column, 0) for row in self.rows) if column else steps, strict=True))

    def column(self, name: str) -> dict[int, float]:
        """A column of the log, at the steps that have it."""
        return {row["step"]: row[name] for row in self.rows if row.get(name) is not None}


@dataclass
class Group:
    """Runs of the same settings but for the seed."""

    name: str
    runs: list[Run]

    def curve(self, column: str) -> dict:
        """Mean and interval of a column at each step that all runs have, with the mean place on each axis."""
        found = [run.column(column) for run in self.runs]
        steps = sorted(set.intersection(*(set(values) for values in found)))
        bands = [interval([values[step] for values in found]) for step in steps]
        x = {}
        for axis in AXES:
            places = [run.axis(axis) for run in self.runs]
            x[axis] = [statistics.fmean(place[step] for place in places) for step in steps]
        mean, low, high = zip(*bands, strict=True) if bands else ((), (), ())
        return {"label": self.name, "x": x, "y": mean, "low": low, "high": high}


def _row(log: Path, number: int, line: str) -> dict:
    """A line of a log; UsageError where a column that is drawn holds anything but what a run writes."""
    try:
        row = parse_object(line)
        if type(row.get("step")) is not int or row["step"] < 0:
            raise ValueError(f"step {row.get('step')!r}")
        for name in (*CURVES, *COUNTS, "q1", "q2", "q3", "q4"):
            number_is = type(row.get(name, 0)) in (int, float) and math.isfinite(row.get(name, 0))
            if not number_is and (name in COUNTS or row[name] is not None):
                raise ValueError(f"{name} {row[name]!r}")
        histogram = row.get("entropy_histogram")
        if histogram is not None and not (
            float(histogram["top"]) > 0 and histogram["counts"] and all(count >= 0 for count in histogram["counts"])
        ):
            raise ValueError(f"entropy_histogram {histogram!r}")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UsageError(f"argument RUN: expected a row of a run in {log}, line {number}, got: {error}") from None
    return row


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of the 95 % interval of the mean; the mean thrice for one value."""
    mean, n = statistics.fmean(values), len(values) - 1
    if n == 0:
        return mean, mean, mean
    t = T_975[n - 1] if n <= len(T_975) else 1.96 + 2.372 / n
    half = t * statistics.stdev(values) / math.sqrt(n + 1)
    return mean, mean - half, mean + half


def grouped(runs: list[Run]) -> list[Group]:
    """Groups in the order of their first runs, each named by the settings in which the groups differ."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name not in IGNORED}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    differing = _differing([members[0].settings for members in groups.values()])
    return [Group(_label(members[0], differing), members) for members in groups.values()]


def _differing(settings: list[dict]) -> list[str]:
    """The names of the settings in which groups differ; beside a preset that some have, the others' rule."""
    names = dict.fromkeys(name for one in settings for name in one if name not in IGNORED)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    return ["rule", *differing] if "preset" in differing and "rule" not in differing else differing


def _label(run: Run, differing: list[str]) -> str:
    """What tells a run's group from the others, in few words: "soft_or, keep 0.2"; what is not set goes unsaid.

    A preset stands for rule and keep. The run's name where nothing is left to say.
    """
    left_out = ("rule", "keep") if run.settings.get("preset") else ("preset",)
    given = {name: run.settings.get(name) for name in differing if name not in left_out}
    told = [_said(name, value) for name, value in given.items() if value is not None and value is not False]
    return ", ".join(told) or run.name


def _said(name: str, value: object) -> str:
    """A setting and its value; a path by its last part."""
    text = (
        Path(value).name
        if name in ("teacher", "student", "task", "eval_task") and isinstance(value, str)
        else str(value)
    )
    return text if name in SAYS_ENOUGH else f"{name.replace('_', ' ')} {text}"


def figures(groups: list[Group]) -> list[dict]:
    """What the table of compared runs says of each group."""
    rows = []
    for group in groups:
        row = {"name": group.name, "runs": [run.name for run in group.runs]}
        for column in ("accuracy", "eval_kl"):
            curve = group.curve(column)
            ends = {"mean": curve["y"][-1], "low": curve["low"][-1], "high": curve["high"][-1]} if curve["y"] else None
            row |= {f"start_{column}": curve["y"][0] if curve["y"] else None, column: ends}
        shares = [
            sum(r.get("kept", 0) for r in run.rows) / max(sum(r.get("rows", 0) for r in run.rows), 1)
            for run in group.runs
        ]
        row |= {"kept_share": statistics.fmean(shares)}
        row |= {name: statistics.fmean(list(run.axis(name).values())[-1] for run in group.runs) for name in AXES}
        rows.append(row)
    return rows


def comparison(groups: list[Group]) -> dict:
    """What the page of compared runs shows."""
    runs = [run.name for group in groups for run in group.runs]
    panels = [_panel(column, [group.curve(column) for group in groups]) for column in CURVES]
    if not any(panels):
        raise UsageError(f"argument RUN: expected runs with a value to draw in their logs, got {', '.join(runs)}")
    head = ["", "runs", "at start", "accuracy", "KL", "kept", "steps", "tokens", "s"]
    rows = [
        [
            row["name"],
            len(row["runs"]),
            percent(row["start_accuracy"]),
            spread(row["accuracy"], percent),
            spread(row["eval_kl"], short),
            percent(row["kept_share"]),
            f"{row['steps']:.0f}",
            f"{row['tokens']:,.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in figures(groups)
    ]
    several = any(len(group.runs) > 1 for group in groups)
    note = "Bands: 95 % intervals of the mean over seeds (Student's t)." if several else "One run each: no bands."
    return {
        "title": "Runs side by side",
        "about": [["runs", ", ".join(runs)]],
        "axes": AXES,
        "note": note,
        "beside": None,
        "tiles": [],
        "tables": [
            {"caption": "At the end: accuracy on held-out prompts, KL in nats a token", "head": head, "rows": rows}
        ],
        "panels": [panel for panel in panels if panel],
    }


def report(run: Run, summary: dict, tokens: bool = False) -> dict:
    """What the page of one run shows; `summary` is what --json prints, `tokens` whether inspect.html is beside it."""
    group = Group(run.name, [run])
    panels = [_panel(column, [group.curve(column)]) for column in CURVES]
    shares = [
        group.curve(f"q{q}") | {"label": f"Q{q} {QUADRANTS[q]}", "colour": QUADRANT_COLOURS[q]} for q in (3, 1, 2, 4)
    ]
    title = "Tokens by quadrant, share of all"
    panels.append({"title": title, "kind": "area", "share": True, "series": shares} if shares[0]["y"] else None)
    panels.append(_histograms(run))
    tiles = [_tile("KL(student ‖ teacher), nats a token", short, summary["start_kl"], summary["end_kl"])]
    if summary["end_accuracy"] is not None:
        tiles.insert(
            0,
            _tile(
                f"{scored(summary)}, {decoding(summary)}", percent, summary["start_accuracy"], summary["end_accuracy"]
            ),
        )
    tiles += [
        {"label": "tokens kept", "value": percent(summary["kept_share"])},
        {"label": "time", "value": f"{summary['seconds']:.0f} s"},
        {"label": "largest memory of the process", "value": mib(summary["peak_mib"])},
    ]
    about = {name: summary[name] for name in ("rule", "keep", "divergence", "seed", "steps", "skipped_steps")}
    return {
        "title": f"{run.name}: the run",
        "about": [[name.replace("_", " "), str(value)] for name, value in about.items()],
        "axes": AXES,
        "note": "Tokens trained on are those that the rule kept; seconds leave evaluation out. Nats: natural-log units."
        + ("" if tokens else " The page of its tokens: tip-kernels inspect and this folder."),
        "beside": "inspect.html" if tokens else None,
        "tiles": tiles,
        "tables": [],
        "panels": [panel for panel in panels if panel],
    }


def scored(summary: dict) -> str:
    """What the mean score of a run is called: of its judge, over how many answers to a prompt."""
    judge, samples = summary.get("judge"), summary.get("eval_samples", 1)
    name = "accuracy" if judge in (None, "exact", "boxed") else f"mean {judge}"
    return name if samples == 1 else f"{name}, mean@{samples}"


def decoding(summary: dict) -> str:
    """How a run's answers were drawn."""
    temperature = summary.get("eval_temperature")
    return f"temperature {temperature:g}" if temperature else "greedy decoding"


def _tile(label: str, form, before: float | None, value: float | None) -> dict:
    return {"label": label, "before": form(before), "value": form(value)}


def _panel(column: str, curves: list[dict]) -> dict | None:
    title, share = CURVES[column]
    series: list[dict] = [
        curve | {"colour": OKABE_ITO[i % len(OKABE_ITO)]} for i, curve in enumerate(curves) if curve["y"]
    ]
    for curve in series:  # an interval does not leave the values that there can be: shares end at 0 and 1
        least = 0.0 if min(curve["y"]) >= 0 else -math.inf
        curve |= {n: [min(max(v, least), 1.0 if share else math.inf) for v in curve[n]] for n in ("low", "high")}
    return {"title": title, "kind": "line", "share": share, "series": series} if series else None


def _histograms(run: Run) -> dict | None:
    """Entropy of the greedy answers' tokens before and after, as shares of the tokens."""
    found = [row["entropy_histogram"] for row in run.rows if row.get("entropy_histogram")]
    if not found:
        return None
    series = []
    for label, entry, colour in (("before", found[0], OKABE_ITO[4]), ("after", found[-1], OKABE_ITO[0])):
        counts, total = entry["counts"], sum(entry["counts"]) or 1
        width = entry["top"] / len(counts)
        x = [(i + 0.5) * width for i in range(len(counts))]
        series.append({"label": label, "colour": colour, "x": x, "y": [count / total for count in counts]})
    title = "Entropy of the student on held-out prompts, nats"
    return {"title": title, "note": "Share of tokens, logarithmic.", "kind": "bars", "share": True, "series": series}


def spread(ends: dict | None, form) -> str:
    """A mean, and how far its interval reaches to either side, where there is one."""
    if ends is None:
        return "–"
    reach = ends["high"] - ends["mean"]
    return form(ends["mean"]) + (f" ± {form(reach)}" if reach else "")


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} MiB"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def print_table(table: dict) -> None:
    """The table in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=table["caption"], title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(table["head"]):
        shown.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for row in table["rows"]:
        shown.add_row(*(Text(str(cell)) for cell in row))
    Console().print(shown)


def draw_report(folder: Path, run: Run) -> None:
    """curves.png: accuracy and loss against each axis; tokens.png: quadrants, kept mass, entropies."""
    content = {p["title"]: p for p in (_own_panel(run, column) for column in ("accuracy", "eval_kl", "loss")) if p}
    if CURVES["accuracy"][0] in content:
        content.pop(CURVES["eval_kl"][0], None)
    figure, grid = _figure(len(content), len(AXES))
    for axes, panel in zip(grid, content.values(), strict=True):
        for one, axis in zip(axes, AXES, strict=True):
            _draw_lines(one, panel, axis)
    _save(figure, folder / "curves.png")
    figure, [[left, middle, right]] = _figure(1, 3)
    _draw_quadrants(left, run)
    if panel := _own_panel(run, "kept_mass"):
        _draw_lines(middle, panel, "steps")
    if panel := _histograms(run):
        _draw_histograms(right, panel)
    _save(figure, folder / "tokens.png")


def _draw_quadrants(axes, run: Run) -> None:
    order = (3, 1, 2, 4)
    shares = [Group(run.name, [run]).curve(f"q{q}") for q in order]
    if shares[0]["y"]:
        colours, labels = [QUADRANT_COLOURS[q] for q in order], [f"Q{q} {QUADRANTS[q]}" for q in order]
        percents = [[100 * y for y in curve["y"]] for curve in shares]
        axes.stackplot(shares[0]["x"]["steps"], *percents, colors=colours, labels=labels)
        axes.legend(fontsize=7, loc="upper right", framealpha=0.9)
    axes.set(title="Tokens by quadrant, %", xlabel=AXES["steps"], ylim=(0, 100))


def _draw_histograms(axes, panel: dict) -> None:
    for series, move in zip(panel["series"], (-0.5, 0.5), strict=True):
        width = series["x"][0]
        places = [x + move * width * 0.9 for x in series["x"]]
        axes.bar(places, series["y"], width * 0.9, color=series["colour"], label=series["label"])
    axes.set(title="Entropy of the student, held-out", xlabel="nats", ylabel="share of tokens", yscale="log")
    axes.legend(fontsize=8)


def _own_panel(run: Run, column: str) -> dict | None:
    return _panel(column, [Group(run.name, [run]).curve(column)])


def draw_comparison(path: Path, groups: list[Group]) -> None:
    """The page's panels against steps, as a PNG."""
    panels = [panel for c in CURVES if (panel := _panel(c, [group.curve(c) for group in groups]))]
    figure, grid = _figure(-(-len(panels) // 2), 2)
    places = [axes for row in grid for axes in row]
    for axes, panel in zip(places, panels, strict=False):
        _draw_lines(axes, panel, "steps")
    for axes in places[len(panels) :]:
        axes.axis("off")
    if len(groups) > 1:
        handles, labels = places[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, path)


def _figure(rows: int, columns: int):
    from matplotlib.figure import Figure  # not pyplot: it keeps figures, and looks for a display

    figure = Figure(figsize=(4.3 * columns, 2.9 * rows), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_lines(axes, panel: dict, axis: str) -> None:
    for series in panel["series"]:
        scale = 100 if panel["share"] else 1
        x, y, low, high = series["x"][axis], *([scale * v for v in series[name]] for name in ("y", "low", "high"))
        axes.plot(x, y, color=series["colour"], label=series["label"], marker="o" if len(x) < 15 else None, ms=3)
        if tuple(low) != tuple(high):
            axes.fill_between(x, low, high, color=series["colour"], alpha=0.2, lw=0)
    axes.set_title(panel["title"] + (", %" if panel["share"] else ""), fontsize=8)
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"argument --output: expected a file that can be written, got {error}") from None
