"""Rewrites the tables of README.md and bench/README.md from the committed results; `--check` only compares.

    python -m bench tables [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FILES = (ROOT / "README.md", ROOT / "bench" / "README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def step() -> str:
    found = _result("cpu_step")
    rows = (
        [
            row["step"],
            f"{row['units']:.2f}",
            f"{row['over_ours_at_0.2']:.2f}",
            f"{row['transient_mib']:.0f} MiB",
            f"{row['planned_ms'] / row['time_ms']:.2f}" if row["planned_ms"] else "",
        ]
        for row in found["rows"]
    )
    caption = (
        f"N = {found['tokens']}, H = {found['hidden']}, V = {found['vocab']:,}, fp32, {found['threads']} CPU thread, "
        f"reverse KL, torch {found['torch']}; a unit took {found['unit_ms']:.0f} ms\n\n"
    )
    head = ("step", "units", "time over ours at Soft-OR 0.2", "memory above inputs and gradients", "planned / measured")
    return caption + markdown(head, rows)


def gain() -> str:
    """The same run in the words of a first reader."""
    shown = {
        "ours, Soft-OR 0.2": "**tip-kernels**, 20 % of the tokens",
        "ours, all tokens": "**tip-kernels**, all tokens",
        "dense torch.compile": "whole logits, torch.compile",
        "dense eager": "whole logits, eager",
        "Liger, all tokens": "Liger 0.8.5",
        "TRL, all tokens": "TRL 1.16",
    }
    found = _result("cpu_step")
    rows = {row["step"]: row for row in found["rows"]}
    table = (
        [
            name,
            f"{rows[step]['time_ms'] / 1000:.1f} s",
            f"{rows[step]['over_ours_at_0.2']:.1f} x",
            f"{rows[step]['transient_mib']:,.0f} MiB",
        ]
        for step, name in shown.items()
    )
    caption = (
        f"One reverse-KL step of {found['tokens']:,} tokens, forward and backward (hidden width {found['hidden']}, "
        f"vocabulary {found['vocab']:,}, fp32, {found['threads']} thread of a shared two-core CPU, torch "
        f"{found['torch']}):\n\n"
    )
    return caption + markdown(("loss", "time", "relative", "memory above inputs and gradients"), table)


def targets() -> str:
    rows = (
        [
            v["target"],
            f"{v['value']:.2f}",
            f"at {'most' if v['at_most'] else 'least'} {v['bound']:g}",
            "yes" if v["met"] else "**no**",
        ]
        for v in _result("cpu_step")["targets"]
    )
    return markdown(("figure", "measured", "target", "met"), rows)


def precision() -> str:
    found = _result("cpu_precision")["rows"]
    kinds = [name for name in found[0] if name.startswith("kl_")]
    rows = ([row["step"], row["dtype"], *(f"{row[kind]:.1e}" for kind in kinds)] for row in found)
    return markdown(("step", "leaves", *(f"KL {kind[3:]}" for kind in kinds)), rows)


def scale() -> str:
    rows = (
        [
            curve["axis"],
            str(curve["sweeps"]),
            f"{curve['rows'][0]['n']} x {curve['rows'][0]['v']} to {curve['rows'][-1]['n']} x {curve['rows'][-1]['v']}",
            f"{curve['exponent']:.2f}",
            f"{max(r['transient_mib'] for r in curve['rows']):.1f} MiB",
        ]
        for curve in _result("cpu_scale")["curves"]
    )
    return markdown(("axis", "sweeps", "N x V", "exponent of time", "most memory above inputs and gradients"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "gain": gain,
    "step": step,
    "targets": targets,
    "precision": precision,
    "scale": scale,
}


def rewritten(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """The text with each marked table as `tables` have it."""
    return BLOCK.sub(lambda m: f"{m[1]}{tables[m[2]]()}{m[3]}", text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table differs")
    args = parser.parse_args(argv)
    stale = [path for path in FILES if rewritten(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs from' if args.check else 'rewritten from'} bench/results")
        if not args.check:
            path.write_text(rewritten(path.read_text()))
    return int(args.check and bool(stale))
