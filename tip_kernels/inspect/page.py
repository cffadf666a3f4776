"""Pages: one self-contained HTML file each, in which nothing points outside.

Templates are Jinja2's, with everything escaped; data goes in as JSON that no parser runs; charts are drawn by Chart.js
(MIT; static/chart.umd.min.js is npm's chart.js 4.6.1 as published, its licence beside it). The text "http" is nowhere
in a page: where a token holds it, its JSON says \\u0068ttp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from torch import Tensor

from tip_kernels.inspect.tokens import STATISTICS, TokenTable, Top
from tip_kernels.inspect.usage import UsageError

QUADRANTS = {1: "uncertain and wrong", 2: "uncertain, agrees", 3: "overconfident and wrong", 4: "solved"}
_STATIC = Path(__file__).parent / "static"


def inspect_page(
    table: TokenTable,
    title: str,
    entropy: float = 0.3,
    divergence: float = 0.1,
    *,
    guide: Sequence[tuple[str, str]] = (),
    beside: str | None = None,
) -> str:
    """The page of a table's rollouts.

    Args:
        table: What is shown.
        title: Of the page.
        entropy: The quadrants' cut in nats, as in `tip.quadrants`.
        divergence: Likewise.
        guide: Terms and what they mean here, beside those that every page explains: the task, the rule's score.
        beside: The page of the run's curves, in the same folder.
    """
    cuts = {"entropy": entropy, "divergence": divergence}
    content = _tokens(table, title, cuts)
    return _render("inspect", title, content | {"guide": [*guide, *_guide(table, cuts)], "beside": beside})


def _guide(table: TokenTable, cuts: dict[str, float]) -> list[tuple[str, str]]:
    """What is on the page, for somebody who has read no paper."""
    found = [("A card", "one answer (rollout), token by token, as the student sampled it.")]
    if {"entropy_s", "kl_rev"} <= table.statistics.keys():
        entropy, divergence = (f"{cuts[name]:g} nats" for name in ("entropy", "divergence"))
        found += [
            ("Across", "the student's entropy: how uncertain it was which token comes next. 0 is certain."),
            (
                "Up",
                "KL(student ‖ teacher): how far its distribution of the next token is from the teacher's. 0 is equal.",
            ),
            ("Color", f"the quadrant: uncertain is an entropy above {entropy}, wrong a KL above {divergence}."),
        ]
    if table.kept is not None:
        found.append(("Underlined", "kept: the rule chose this token, the student learns from it."))
    return [*found, ("Nats", "the unit of both: natural logarithms; 0.69 nats are one bit.")]


def curves_page(title: str, content: dict) -> str:
    """The page of a run's report or of runs compared; `content` as `curves.report` and `curves.comparison` make it."""
    return _render("curves", title, content)


def write(path: Path, html: str) -> None:
    """Write a page; UsageError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"argument --output: expected a file that can be written, got {error}") from None


def _render(name: str, title: str, content: dict) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        finalize=_inert,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.html").render(
        title=title,
        page=content,
        quadrants=QUADRANTS,
        data=Markup(as_json(content)),
        style=Markup(_static("page.css")),
        scripts=[Markup(text) for text in (_chart_js(), _static("theme.js"), _static(f"{name}.js"))],
    )


def _inert(value: object) -> object:
    """Escaped as usual, and so that no text of a user's reads as an address in the source."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub("(?i)h(?=ttp)", lambda found: f"&#{ord(found[0])};", escape(value)))


@cache
def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


@cache
def _chart_js() -> str:
    """Chart.js without the addresses in its two licence comments and without the name of its source map."""
    text = _static("chart.umd.min.js")
    return re.sub(r"https?://", "", text).replace("//# sourceMappingURL=chart.umd.min.js.map", "").strip()


def as_json(content: object) -> str:
    """JSON that may stand in an HTML script element: none of it is markup, nothing in it reads as an address."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return re.sub(r"(?i)[<>&]|h(?=ttp)", lambda found: f"\\u{ord(found[0]):04x}", text)


def _tokens(table: TokenTable, title: str, cuts: dict[str, float]) -> dict:
    strings = list(table.strings)
    places = {text: i for i, text in enumerate(strings)}
    for piece in table.text:
        if piece not in places:
            places[piece] = len(strings)
            strings.append(piece)
    ends = table.rollout.bincount(minlength=len(table.rollouts)).cumsum(0).tolist()
    rollouts = [
        {"first": first, "end": end} | facts
        for first, end, facts in zip([0, *ends[:-1]], ends, table.rollouts, strict=True)
    ]
    return {
        "title": title,
        "about": [[name, str(value)] for name, value in table.about.items()],
        "cuts": cuts,
        "strings": strings,
        "text": [places[piece] for piece in table.text],
        "statistics": [
            {"name": name, "label": STATISTICS.get(name, name), "values": _numbers(values)}
            for name, values in table.statistics.items()
        ],
        "quadrant": "".join(map(str, table.quadrants(**cuts).tolist())),
        "kept": None if table.kept is None else "".join("1" if kept else "0" for kept in table.kept.tolist()),
        "top_s": _top(table.top_s),
        "top_t": _top(table.top_t),
        "rollouts": [rollout for rollout in rollouts if rollout["end"] > rollout["first"]],
    }


def _top(top: Top | None) -> dict | None:
    if top is None:
        return None
    return {"k": top.p.shape[1], "places": top.places.flatten().tolist(), "p": _numbers(top.p.flatten(), 3)}


def _numbers(values: Tensor, digits: int = 4) -> list[float | str | None]:
    """To that many digits; null for NaN and a word for infinity, which JSON lacks."""
    return [_number(value, digits) for value in values.tolist()]


def _number(value: float, digits: int) -> float | str | None:
    if math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return None if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
