"""Does choosing tokens help, and which choice? On-policy distillation of tiny models, every rule with its controls.

    python -m bench evidence [--jobs N]     does the runs that results/evidence.jsonl lacks, then the table: to begin
                                            anew, move that file away
    python -m bench evidence --table        the table and the figure alone, from results/evidence.jsonl
    python -m bench evidence --fresh        three cells again, with students that no run has seen

The question, the measures, the cells and what would count as an answer are in evidence.md, written before the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tip_kernels as tip
from bench import _evidence_models as models
from bench import _evidence_table as table
from bench._evidence_table import Cell
from bench.tables import RESULTS
from tip_kernels.distillation import registry as names
from tip_kernels.opd.settings import Settings
from tip_kernels.opd.train import Loop
from tip_kernels.select.adakd import adakd
from tip_kernels.select.rule import QuotaRule

RUNS = RESULTS / "evidence.jsonl"
SEEDS = range(1, 6)
FRESH_SEEDS = range(11, 14)
STEPS = 50
LOOKS = (5, 10, 15, 20, 30, 40, 50)
BATCH = {"sorting": 256}  # completions of 7 tokens
ADDITIONS = 64  # completions of 35 to 55 tokens

RULES = names.RULES | {
    "full": names.RULES["all"],
    "soft_or_rank": names.RULES["soft_or"],
    "overconfident": lambda keep, generator: tip.Overconfident(keep, entropy_below=0.3, divergence_above=0.1),
    "overconfident_quantile": lambda keep, generator: tip.Overconfident(
        keep, entropy_below=("quantile", 0.8), divergence_above=("quantile", 0.8)
    ),
    "teachability": lambda keep, generator: tip.Teachability(keep, top_k=4),
}
ADAKD = ("adakd_focus", "adakd_temperature", "adakd_both")


def cells() -> Iterator[Cell]:
    """The subset of the product that is run (evidence.md says why)."""

    def of(task: str, listed: str, *rest, **other) -> Iterator[Cell]:
        return (Cell.of(task, name, *rest, **other) for name in listed.split())

    main = "addition_21"
    yield from of(main, "full", 1.0)
    pairs = "entropy entropy/sample soft_or_rank soft_or_rank/sample soft_or_minmax soft_or_minmax/sample"
    pairs += " divergence divergence/sample"
    yield from of(main, f"random {pairs}", 0.5)
    more = "hellinger hellinger/sample teachability teachability/sample overconfident"
    more += " overconfident_quantile overconfident_quantile/sample"
    yield from of(main, f"random {pairs} {more}", 0.2)
    tops = "entropy soft_or_rank overconfident overconfident_quantile divergence hellinger teachability"
    draws = "overconfident_quantile/sample divergence/sample"
    yield from of(main, f"random {tops} {draws} entropy/sample soft_or_minmax soft_or_rank/sample", 0.1)
    yield from of(main, f"random {tops} {draws}", 0.05)
    for divergence in ("forward_kl", "jsd", "jeffreys", "todi"):
        yield from of(main, "full", 1.0, divergence)
        yield from of(main, "soft_or_rank", 0.2, divergence)
    yield from of(main, "full", 1.0, lr=3e-4)
    yield from of(main, "random soft_or_rank", 0.2, lr=3e-4)
    yield from of(main, "overconfident", 0.1, lr=3e-4)
    yield from of(main, "adakd_focus adakd_temperature adakd_both", 1.0)

    for task in ("addition_5", "addition_40"):
        yield from of(task, "full", 1.0)
        yield from of(task, "random entropy entropy/sample", 0.5)
        yield from of(
            task, "random entropy entropy/sample soft_or_rank soft_or_rank/sample soft_or_minmax divergence", 0.2
        )

    yield from of("sorting", "full", 1.0)
    yield from of("sorting", "random entropy", 0.5)
    yield from of("sorting", "random entropy entropy/sample soft_or_rank soft_or_rank/sample divergence", 0.2)
    yield from of("sorting", "random divergence overconfident_quantile", 0.1)
    for divergence in ("forward_kl", "todi"):
        yield from of("sorting", "full", 1.0, divergence)


@dataclass(frozen=True)
class Sampled(QuotaRule):
    """Draws the rows that another rule would rank: without replacement, p proportional to its score (Gumbel top-k)."""

    of: QuotaRule = field(kw_only=True)
    generator: torch.Generator = field(kw_only=True)

    @property
    def needs(self) -> frozenset[str]:
        return self.of.needs

    @property
    def top_k(self) -> int:
        return getattr(self.of, "top_k", 0)

    def _scores(self, values, population):
        score = self.of._scores(values, population).double().clamp(min=1e-30)  # a score of 0 is drawn last
        noise = torch.empty_like(score).exponential_(generator=self.generator).log()
        return score.log() - noise

    def _eligible(self, values, population):
        return self.of._eligible(values, population)


class Run(Loop):
    """The main job's loop, with a cell's way of choosing tokens."""

    def __init__(self, cell: Cell, seed: int, folder: Path):
        adaptive = cell.rule in ("adakd_focus", "adakd_both")
        settings = Settings(
            divergence=cell.divergence,
            lr=cell.lr,
            preset="adakd" if adaptive else None,
            steps=STEPS,
            batch=BATCH.get(cell.task, ADDITIONS),
            eval_prompts=models.EVAL_PROMPTS,
            seed=seed,
            threads=1,
        )
        device = torch.device("cpu")
        task = models.LANGUAGES[cell.task]().task
        super().__init__(settings, models.pair_of(folder, cell.task, seed, device), task, device)
        self.cell = cell

    def accuracy(self) -> float:
        """Of the likeliest completions of the held-out prompts, without the teacher."""
        indices = range(len(self.held_out))
        return sum(self.judge(self.complete(self.held_out), indices)) / len(indices)

    def choice(self, mask):
        if self.cell.rule in ADAKD:
            strength = 0.0 if self.cell.rule == "adakd_focus" else 0.5
            return adakd(self.focus or 1.0, row_mask=mask, strength=strength)
        return {"select": self._rule(), "row_mask": mask, "normalizer": "kept"}

    def _rule(self) -> tip.Rule:
        generator = self.generator("rule")
        rule = RULES[self.cell.rule](self.cell.keep, generator)
        return Sampled(self.cell.keep, of=rule, generator=generator) if self.cell.mode == "sample" else rule


def run(cell: Cell, seed: int, folder: Path) -> dict:
    """One run: what a line of results/evidence.jsonl holds."""
    loop = Run(cell, seed, folder)
    looks, rows, seconds = [], [], 0.0
    while loop.counters.step < STEPS:
        began = time.process_time()
        rows.append(loop.step())
        seconds += time.process_time() - began
        if loop.counters.step in LOOKS:
            look = {"step": loop.counters.step, "tokens": loop.counters.kept, "seconds": round(seconds, 2)}
            looks.append(look | {"accuracy": loop.accuracy()})
    first = rows[:10]  # when runs are most alike
    return {
        **cell._asdict(),
        "seed": seed,
        "looks": looks,
        "kl": round(loop.evaluate()["eval_kl"], 6),
        "kept_share": round(loop.counters.kept / loop.counters.rows, 6),
        "skipped": loop.counters.skipped,
        "kept_mass": _mean(row["kept_mass"] for row in first),
        "grad_norm": _mean(row["grad_norm"] for row in first),
        "quadrants": [_mean(row[f"q{i}"] for row in first) for i in (1, 2, 3, 4)],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the finite ones."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return round(sum(values) / len(values), 6) if values else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--models", type=Path, default=Path("runs/evidence"), help="where trained models are kept")
    parser.add_argument("--table", action="store_true", help="make the table and the figure, run nothing")
    parser.add_argument("--fresh", action="store_true", help="three cells again, with students that no run has seen")
    args = parser.parse_args(argv)
    if args.table:
        table.write(_records())
        return 0
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        if args.fresh:
            return _fresh(pool, args.models)
        wanted = [(cell, seed) for cell in cells() for seed in SEEDS]
        records = _records()
        done = {_key(record) for record in records}
        left = [(cell, seed) for seed in SEEDS for cell in cells() if (*cell, seed) not in done]
        if left:
            setup = _setup(_train(pool, args.models, models.LANGUAGES, SEEDS))
            if not records:
                table.SETUP.write_text(json.dumps(setup, indent=1) + "\n")
            elif _checksums(setup) != _checksums(json.loads(table.SETUP.read_text())):
                print(f"{RUNS} has runs of other models than those in {args.models}: move it away to begin anew")
                return 2
        _write(records)  # whole lines only
        with RUNS.open("a") as file:
            for record in _all(pool, run, [(cell, seed, args.models) for cell, seed in left]):
                file.write(json.dumps(record) + "\n")
                file.flush()
    order = {(*cell, seed): place for place, (cell, seed) in enumerate(wanted)}
    records = sorted((record for record in _records() if _key(record) in order), key=lambda r: order[_key(r)])
    _write(records)
    table.write(records)
    return 0


def _all(pool: ProcessPoolExecutor, function, arguments: list[tuple]) -> Iterator[dict]:
    """What the calls return, in the order in which they end; says how far it has come."""
    began = time.perf_counter()
    calls = [pool.submit(function, *each) for each in arguments]
    if not calls:
        return
    for count, call in enumerate(as_completed(calls), start=1):
        yield call.result()
        print(f"\r{count} of {len(calls)}, {time.perf_counter() - began:.0f} s", end="", flush=True)
    print()


def _records() -> list[dict]:
    """The finished runs; a line that was cut short by an interruption is run again."""
    records = []
    for line in RUNS.read_text().splitlines() if RUNS.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{RUNS.name}: left out a line that was cut short")
    return records


def _write(records: list[dict]) -> None:
    RUNS.write_text("".join(json.dumps(record) + "\n" for record in records))


def _key(record: dict) -> tuple:
    return (*Cell.in_record(record), record["seed"])


def _train(pool: ProcessPoolExecutor, folder: Path, tasks: Iterable[str], seeds: Iterable[int]) -> list[dict]:
    """Trains what is not there yet; returns every model's record."""
    wanted = [(task, "teacher", 0) for task in tasks]
    wanted += [(task, "student", seed) for task in tasks for seed in seeds]
    places = {each: models.folder_of(folder, *each) / "record.json" for each in wanted}
    missing = [(*each, place.parent) for each, place in places.items() if not place.exists()]
    for _ in _all(pool, models.train, missing):
        pass
    return [json.loads(place.read_text()) for place in places.values()]


def _setup(trained: list[dict]) -> dict:
    import transformers

    return {
        "steps": STEPS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "models": trained,
    }


def _checksums(setup: dict) -> dict[tuple, str]:
    return {(model["task"], model["side"], model["seed"]): model["sha256"] for model in setup["models"]}


def _fresh(pool: ProcessPoolExecutor, folder: Path) -> int:
    """Three cells again: with the first student, which repeats its line, and with new ones, inside the intervals."""
    chosen = [
        Cell.of("addition_21", "full"),
        Cell.of("addition_21", "soft_or_rank", 0.2),
        Cell.of("addition_21", "random", 0.2),
    ]
    seeds = [SEEDS[0], *FRESH_SEEDS]
    _train(pool, folder, ["addition_21"], seeds)
    new = list(_all(pool, run, [(cell, seed, folder) for cell in chosen for seed in seeds]))
    return table.compare(_records(), new, again=SEEDS[0])
