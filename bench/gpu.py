"""The GPU's tests, sanitizers and speeds beside the peers'.

    python -m bench gpu --first                  under five minutes: is it right, and how fast where it matters most?
    python -m bench gpu --only STAGE ...         the rest, in calls of at most five minutes: see CALLS below
    python -m bench gpu                          all of it

with [--quick] [--tune] [--dry-run] [--json FILE]. Stages, each in processes of its own with a time limit; one that
fails is reported and the next goes on:

    selftest   every kernel on small shapes against float64 (bench/_small.py)
    tests      the tests that use a GPU, all of them, whatever fails
    sanitizer  compute-sanitizer memcheck and racecheck over every kernel on small shapes
    ceilings   the rate of a large copy (bytes read plus written) and of the vendor's bf16 product
    logits     statistics from logits, N = 8192 and N = 32        hidden   the same from hidden states
    distill    one step, keep 0.2 and 1.0, against TRL, Liger, dense eager and torch.compile
    memory     peak of a step above inputs and gradients          update   a whole update of a Qwen3-shaped student
    tune       settings of the two kernels that read logits (only with --tune or --only tune; changes no code)

--first is selftest, ceilings, and of logits, hidden, distill and memory one row each, against TRL and Liger.

Times are medians of interleaved repeats with a cold second-level cache; a result that is wrong gets no time. What is
measured is added to bench/results/<device>.json: a row of the table replaces the one that was there, whole, so that all
of its times are of one run. --quick takes a quarter of the rows and writes only to --json. --dry-run runs everything on
a CPU on tiny shapes and measures nothing.

Exit code: 0; 1 if tests, a sanitizer or a stage failed or a result of ours is wrong; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Seconds of each stage.
SECONDS = {
    "selftest": 70,
    "tests": 290,
    "sanitizer": 200,
    "ceilings": 20,
    "logits": 40,
    "hidden": 45,
    "distill": 80,
    "memory": 25,
    "update": 45,
    "tune": 170,
}
TIMED = tuple(SECONDS)[3:]
FIRST = ("selftest", "ceilings", "logits", "hidden", "distill", "memory")
# What fits a loan of a GPU: calls of at most five minutes, by their arguments.
CALLS = {
    "--first": FIRST,
    "--only tests": ("tests",),
    "--only sanitizer": ("sanitizer",),
    "--only logits hidden distill": ("ceilings", "logits", "hidden", "distill"),
    "--only memory update": ("ceilings", "memory", "update"),
    "--only tune": ("ceilings", "tune"),
}
# Tests that run differently on a GPU.
TESTS = [f"tests/test_{name}.py" for name in ("kernels", "backends", "compiled", "contracts", "costs", "stats")]
# What to reach on an H100 or H200: row -> text
TARGETS = {
    "statistics from logits": "90 % of the copy rate (stretch 95)",
    "statistics from logits, few rows, cold cache": "60 % of the copy rate (stretch 75)",
    "statistics from hidden states": "85 % of the matmul rate (stretch 92)",
    "distill, keep 0.2": "2.4x TRL (stretch 3), 2x Liger (3)",
    "distill, keep 1.0": "1.4x TRL (stretch 1.6), 1.1x Liger (1.3)",
    "memory of a step, keep 0.2": "256 MiB (stretch 128)",
    "update of a Qwen3-shaped student, keep 0.2": "faster and smaller than TRL",
}


@dataclass(frozen=True)
class Ran:
    code: int | None  # None: stopped at the time limit
    output: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def status(self) -> str:
        result = "passed" if self.ok else "stopped at its time limit" if self.code is None else f"failed ({self.code})"
        return f"{result}, {self.seconds:.0f} s"


def child(command: list[object], seconds: float, environment: dict[str, str]) -> Ran:
    """Runs a command from the repository's root; at its time limit the command and its own children are ended."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = "\n".join(line for line in log.read().splitlines() if not line.startswith("USDT:"))
    return Ran(code, output, time.monotonic() - start)


def last_lines(text: str, count: int) -> str:
    return "\n".join(f"    {line.strip()}" for line in text.splitlines()[-count:])


# ---- stages that pass or fail


def run_selftest(seconds: float, environment: dict[str, str], *, dry_run: bool) -> dict:
    ran = child([sys.executable, "-m", "bench._small", *(["--dry-run"] if dry_run else [])], seconds, environment)
    print(f"every kernel on small shapes: {ran.status}\n{last_lines(ran.output, 40)}", flush=True)
    return {"ok": ran.ok, "status": ran.status}


def run_tests(seconds: float, environment: dict[str, str], *, quick: bool, dry_run: bool) -> dict:
    """All of TESTS; each is named as it fails, so that a stop at the time limit hides none."""
    command = [sys.executable, "-m", "pytest", *(TESTS[:2] if quick else TESTS), "-v", "--tb=short"]
    if dry_run:
        command[3:] = ["--version"]
    if importlib.util.find_spec("xdist") and not dry_run:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    ran = child(command, seconds, environment)
    failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", ran.output)))
    print(f"tests: {ran.status} ({' '.join(command[2:])})\n{last_lines(ran.output, 1 if ran.ok else 40)}", flush=True)
    return {"ok": ran.ok, "status": ran.status, "failed": failed, "last_line": ran.output.strip().splitlines()[-1:]}


def run_sanitizer(seconds: float, environment: dict[str, str], *, dry_run: bool) -> dict:
    """memcheck and racecheck, where the tool is."""
    script = [sys.executable, "-m", "bench._small", *(["--dry-run"] if dry_run else [])]
    places = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
    tool = None if dry_run else next(filter(None, map(shutil.which, places)), None)
    if tool is None:
        print(f"compute-sanitizer: {'not run' if dry_run else 'not installed'}", flush=True)
        return {"ok": True, "present": False, "runs": {}}
    # Every allocation its own, so that a read past the end of one is seen.
    environment = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", "9", "--target-processes", "application-only"]
    checks = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(checks)) as pool:
        commands = ([tool, "--tool", check, *options, *script] for check in checks)
        runs = dict(zip(checks, pool.map(lambda command: child(command, seconds, environment), commands), strict=True))
    for check in checks:
        detail = last_lines(runs[check].output, 1 if runs[check].ok else 25)
        print(f"compute-sanitizer {check}: {runs[check].status}\n{detail}", flush=True)
    states = {name: ran.status for name, ran in runs.items()}
    return {"ok": all(ran.ok for ran in runs.values()), "present": True, "runs": states}


# ---- timed stages


@dataclass
class Found:
    about: dict[str, str]
    ceilings: dict[str, float]
    rows: list[dict]
    failed: list[str]


def run_timed(stages: list[str], seconds: float, environment: dict[str, str], flags: list[str], found: Found) -> None:
    """One child over the stages; adds what it wrote to found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "bench._gpu_rows", *stages, "--out", out, "--seconds", seconds, *flags]
        ran = child([*command, "--ceilings", json.dumps(found.ceilings)], seconds, environment)
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for line in lines:
        found.about |= line.get("about", {})
        found.ceilings |= line.get("ceilings", {})
        found.failed += [line["failed"]] if "failed" in line else []
        found.rows += [line] if "row" in line else []
    print(f"{', '.join(stages)}: {ran.status}", flush=True)
    if not ran.ok:
        if not any("failed" in line for line in lines):
            found.failed.append(f"{', '.join(stages)}: {ran.status}")
        print(last_lines(ran.output, 25), flush=True)


# ---- report


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds to each row its time over that of the first of ours in the same row of the table."""
    ours: dict[str, float] = {}
    for row in rows:
        if row["who"].startswith("ours") and "time_ms" in row:
            ours.setdefault(row["row"], row["time_ms"])
    return [
        row | {"x_ours": row["time_ms"] / ours[row["row"]]} if "time_ms" in row and row["row"] in ours else row
        for row in rows
    ]


def table(rows: list[dict], *, dry_run: bool) -> str:
    def cell(row: dict, key: str, form: str) -> str:
        hidden = dry_run and key != "error"  # a dry run measures nothing
        return form.format(row[key]) if key in row and not hidden else "-"

    lines, title = [], None
    for row in rows:
        if row["row"] != title:
            title = row["row"]
            lines.append(f"{title}   [target: {TARGETS[title]}]" if title in TARGETS else title)
            lines.append(f"  {'':48} {'time ms':>9} {'x ours':>7} {'share':>14} {'peak MiB':>10} {'error':>8}")
        share = cell(row, "share_pct", "{:.1f} %")
        share += f" {row['ceiling']}" if share != "-" else ""
        lines.append(
            f"  {row['who']:48} {cell(row, 'time_ms', '{:.3f}'):>9} {cell(row, 'x_ours', '{:.2f}'):>7} {share:>14} "
            f"{cell(row, 'peak_mib', '{:.1f}'):>10} {cell(row, 'error', '{:.1e}'):>8}  {row.get('note', '')}".rstrip()
        )
    return "\n".join(lines)


def merged(before: dict, now: dict) -> dict:
    """What was there with what has been measured now; a row of the table comes whole from one run."""
    titles = {row["row"] for row in now["rows"]}
    kept = [row for row in before.get("rows", []) if row["row"] not in titles]
    failed = [line for line in before.get("failed", []) if line.split(":")[0].split(", ")[0] not in now["stages"]]
    return {
        **before,
        **now,
        "ceilings": before.get("ceilings", {}) | now["ceilings"],
        "stages": before.get("stages", {}) | now["stages"],
        "failed": failed + now["failed"],
        "rows": kept + now["rows"],
    }


def write(report: dict, file: Path) -> None:
    """Adds a report to what the file holds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(merged(before, report), indent=1) + "\n")
    print(f"written: {file}")


def chosen(args: argparse.Namespace) -> list[str]:
    """The stages to run, in their order."""
    if args.first:
        names = {*FIRST}
    elif args.only:
        names = {*args.only}
    else:
        names = {"tune"} if args.tune else {*SECONDS} - (set() if args.dry_run else {"tune"})
    if names & set(TIMED):
        names.add("ceilings")
    return [name for name in SECONDS if name in names]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--first", action="store_true", help=f"{', '.join(FIRST)}: one row each, under five minutes")
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="STAGE", help=", ".join(SECONDS))
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, fewer tests")
    parser.add_argument("--tune", action="store_true", help="the ceilings and tune stages alone")
    parser.add_argument("--dry-run", action="store_true", help="the whole harness on a CPU, on tiny shapes")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args(argv)

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("python -m bench gpu: no GPU found; --dry-run tries the harness on a CPU", file=sys.stderr)
        return 2
    stages = chosen(args)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = [flag for flag in ("--first", "--quick", "--dry-run") if getattr(args, flag[2:].replace("-", "_"))]
    if args.dry_run:
        print("dry run: tiny shapes on a CPU, nothing is measured")
        environment |= {"TRITON_INTERPRET": "1", "TIP_KERNELS_BACKEND": "triton", "TORCHDYNAMO_DISABLE": "1"}
        environment |= {"OMP_NUM_THREADS": "1"}

    start = time.monotonic()
    found = Found({}, {}, [], [])
    passes = passed_stages(stages, environment, args)
    timed = [name for name in stages if name in TIMED]
    for group in [timed] if args.dry_run and timed else [[name] for name in timed]:
        run_timed(group, limit(group, args), environment, flags, found)

    rows = with_ratios(found.rows)
    wrong = [f"{row['row']}: {row['who']}" for row in rows if row["who"].startswith("ours") and _bad(row)]
    bad = [name for name, result in passes.items() if not result["ok"]]
    seconds = round(time.monotonic() - start)
    about = found.about | {"quick": args.quick, "dry_run": args.dry_run}
    report = {**about, "ceilings": found.ceilings, **passes, "failed": found.failed, "rows": rows}
    report["stages"] = dict.fromkeys(
        stages, f"{'--first ' if args.first else ''}{seconds} s with the others of its call"
    )
    print()
    print(f"{'dry run: ' if args.dry_run else ''}{about | {'seconds': seconds}}")
    if found.ceilings:
        copy, matmul = found.ceilings["copy"], found.ceilings["matmul"]
        print(f"ceilings: copy {copy / 1e9:.0f} GB/s (read plus written), matmul {matmul / 1e12:.0f} TFLOP/s")
    print(table(rows, dry_run=args.dry_run))
    for line in [*bad, *found.failed, *wrong]:
        print(f"FAILED: {line}")
    if not args.dry_run:
        device = re.sub(r"[^a-z0-9]+", "-", about.get("device", torch.cuda.get_device_name()).lower()).strip("-")
        if not args.quick:
            write(report, RESULTS / f"{device}{'-tune' if stages == ['ceilings', 'tune'] else ''}.json")
        if args.json:
            write(report, args.json)
    return int(bool(bad or found.failed or wrong))


def limit(stages: list[str], args: argparse.Namespace) -> int:
    """Seconds that stages may take together; a dry run is of no hurry."""
    return sum(SECONDS[name] for name in stages) * (10 if args.dry_run else 1)


def passed_stages(stages: list[str], environment: dict[str, str], args: argparse.Namespace) -> dict[str, dict]:
    """Results of the stages that pass or fail."""
    runs = {
        "selftest": lambda seconds: run_selftest(seconds, environment, dry_run=args.dry_run),
        "tests": lambda seconds: run_tests(seconds, environment, quick=args.quick, dry_run=args.dry_run),
        "sanitizer": lambda seconds: run_sanitizer(seconds, environment, dry_run=args.dry_run),
    }
    return {name: run(limit([name], args)) for name, run in runs.items() if name in stages}


def _bad(row: dict) -> bool:
    return row.get("note", "").startswith(("wrong", "failed", "out of memory"))
