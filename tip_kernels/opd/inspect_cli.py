"""`tip-kernels inspect` and `tip-kernels compare` from their arguments to their exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tip_kernels.inspect.usage import Parser, UsageError, install, pick_device
from tip_kernels.opd.options import keep_of, positive, whole

NEEDED = ("transformers", "tokenizers", "safetensors", "rich", "jinja2", "matplotlib")
INSPECT = """\
Draws rollouts token by token: which are uncertain, which confidently wrong, which the rule keeps. FILE is the folder
of a run of `tip-kernels opd`, whose student answers held-out prompts as it was before the run and as it is now; or
statistics that tip_kernels.inspect.save_statistics wrote (.safetensors, .parquet). Without FILE, --teacher and
--student name a pair of checkpoints. The page is one HTML file that asks for nothing else."""
COMPARE = """\
Draws several runs of `tip-kernels opd` beside each other. Runs whose settings differ in nothing but the seed are one
curve, with a band: the 95 % interval of their mean."""


def inspect_parser() -> Parser:
    """Options that were not typed are absent."""
    p = Parser(prog="tip-kernels inspect", description=INSPECT, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("files", nargs="*", metavar="FILE", help="folders of runs, or files of statistics")
    p.add_argument("--output", metavar="PAGE", help="the page (default inspect.html in the run's folder, else here)")
    p.add_argument(
        "--save", metavar="STATISTICS", help="write what was measured, too: a name in .safetensors, .parquet"
    )
    g = p.add_argument_group("a pair of checkpoints, instead of FILE")
    g.add_argument("--teacher", metavar="FOLDER", help="checkpoint folder (transformers, safetensors)")
    g.add_argument("--student", metavar="FOLDER", help="checkpoint folder of the same vocabulary")
    g.add_argument("--task", metavar="TASK", help="prompts, as in tip-kernels opd (default addition)")
    g.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    g = p.add_argument_group("what is shown")
    g.add_argument("--prompts", type=whole(1), metavar="N", help="held-out prompts to answer (default 100)")
    g.add_argument("--rule", metavar="RULE", help="mark what this rule keeps (default: the run's, else soft_or)")
    g.add_argument("--keep", type=keep_of, metavar="KEEP", help="its fraction, or number of tokens")
    g.add_argument("--temperature", type=positive, metavar="T", help="of the rollouts (default: the run's, else 1)")
    g.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="longest rollout (default: the run's)")
    g.add_argument("--seed", type=whole(0), metavar="N", help="of the rollouts (default: the run's, else 0)")
    g.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--entropy", type=positive, metavar="NATS", help="the quadrants' line between sure and unsure (0.3)")
    g.add_argument("--divergence", type=positive, metavar="NATS", help="and between right and wrong (0.1)")
    g.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    g.add_argument("--quiet", action="store_true", help="say nothing else")
    return p


def compare_parser() -> Parser:
    p = Parser(prog="tip-kernels compare", description=COMPARE, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    p.add_argument("--output", metavar="PAGE", help="the page; a PNG of the same name goes beside it (compare.html)")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    p.add_argument("--quiet", action="store_true", help="no table")
    return p


MODEL_OPTIONS = ("prompts", "rule", "keep", "temperature", "max_new_tokens", "seed", "device")


def inspect(options: dict) -> int:
    """One page; returns the exit code."""
    from tip_kernels.inspect import page
    from tip_kernels.opd.disk import writing

    files = [Path(name) for name in options.get("files", [])]
    _check(options, files)
    say = (lambda line: None) if options.get("quiet") else (lambda line: print(line, file=sys.stderr, flush=True))
    table = _table(options, files, say)
    if "save" in options:
        with writing(save := Path(options["save"]), "--save"):
            table.save(save)
        say(f"statistics in {options['save']}")
    title = " and ".join(dict.fromkeys(map(_name, files))) or "{student} beside {teacher}".format(**table.about)
    cuts = {name: options[name] for name in ("entropy", "divergence") if name in options}
    table.about |= {"rollouts": f"{len(table.rollouts):,}", "tokens": f"{len(table.text):,}"}
    output = Path(options.get("output", _default_page(files)))
    beside = _report_beside(output, files)
    content = page.inspect_page(table, f"{title}: which tokens matter", **cuts, guide=_guide(table), beside=beside)
    page.write(output, content)
    if beside and output.name == "inspect.html":
        _link_back(files[0])
    say(f"page in {output}")
    if options.get("json"):
        print(json.dumps({"output": str(output)} | _counts(table, cuts)), flush=True)
    return 0


def _check(options: dict, files: list[Path]) -> None:
    """UsageError where options do not go together, before anything is loaded."""
    from tip_kernels.inspect.tokens import SUFFIXES

    pair = [name for name in ("teacher", "student", "task", "chat") if name in options]
    if files and pair:
        raise UsageError(f"argument --{pair[0]}: expected none beside a FILE, got {options[pair[0]]!r}")
    if not files and not {"teacher", "student"} <= options.keys():
        raise UsageError("argument FILE: expected a run, a file of statistics, or --teacher and --student, got nothing")
    runs = [path for path in files if path.is_dir()]
    if files and not runs and (wrong := [n for n in MODEL_OPTIONS if n in options]):
        option = wrong[0].replace("_", "-")
        raise UsageError(f"argument --{option}: expected none where FILE holds statistics, got {options[wrong[0]]!r}")
    if (save := Path(options.get("save", "x.parquet"))).suffix not in SUFFIXES:  # would not be read again
        raise UsageError(f"argument --save: expected a name in .safetensors or .parquet, got {str(save)!r}")


def _table(options: dict, files: list[Path], say: Callable[[str], None]):
    """What the files hold, or the pair's rollouts, as one table."""
    from tip_kernels.inspect.tokens import TokenTable

    if not files:
        return _of_pair(options, say)
    tables = [
        _of_run(path, options, files, say) if path.is_dir() else _labelled(TokenTable.load(path), path, files)
        for path in files
    ]
    return TokenTable.join(tables)


def _counts(table, cuts: dict[str, float]) -> dict[str, int | None]:
    """What --json says of a table; cuts are the quadrants' lines."""
    counts = table.quadrants(**cuts).long().bincount(minlength=5).tolist()
    found = {"rollouts": len(table.rollouts), "tokens": len(table.text)}
    found |= {"kept": None if table.kept is None else int(table.kept.sum())}
    return found | {f"q{q}": counts[q] for q in (1, 2, 3, 4)}


def _report_beside(output: Path, files: list[Path]) -> str | None:
    """The name of the run's own page, where the one of its tokens is written beside it."""
    report = files[0] / "report.html" if len(files) == 1 and files[0].is_dir() else None
    there = report is not None and report.is_file() and output.resolve().parent == report.resolve().parent
    return "report.html" if there else None


def _link_back(run: Path) -> None:
    """Writes the run's page anew, which finds that of its tokens beside it."""
    from tip_kernels.inspect.objects import read_object
    from tip_kernels.opd.report import write_report

    if (run / "summary.json").is_file():
        write_report(run, read_object(run / "summary.json", "FILE"))


def _guide(table) -> list[tuple[str, str]]:
    """What the task's answers and the rule's score mean, where the table says which they are."""
    from tip_kernels.distillation.registry import SCORES
    from tip_kernels.opd.addition import TRACE

    found = [("The task", TRACE)] if table.about.get("task") == "addition" else []
    rule = table.about.get("rule", "").partition(",")[0]
    score = SCORES.get(rule, SCORES["hellinger"] if rule == "adakd" else None)
    return found + ([("Score", f"what {rule} ranks by: {score}.")] if score else [])


def _default_page(files: list[Path]) -> Path:
    return files[0] / "inspect.html" if len(files) == 1 and files[0].is_dir() else Path("inspect.html")


def _name(path: Path) -> str:
    return path.resolve().stem if path.is_file() else path.resolve().name


def _short(name: str) -> str:
    """A page may be passed on: of a path it says the last part."""
    return Path(name).name if Path(name).exists() else name


def _labelled(table, path: Path, files: list[Path]):
    """Of several files, each rollout says which it is from."""
    if len(files) > 1:
        table.rollouts = [
            r | {"group": f"{_name(path)}, {r['group']}" if "group" in r else _name(path)} for r in table.rollouts
        ]
    return table


def _of_run(folder: Path, options: dict, files: list[Path], say: Callable[[str], None]):
    """The table of a run: its student before and after, each with rollouts of its own."""
    from tip_kernels.inspect.tokens import TokenTable
    from tip_kernels.opd import checkpoint
    from tip_kernels.opd.origin import origin_of
    from tip_kernels.opd.task import task_of

    if not (folder / "run.json").is_file():
        raise UsageError(f"argument FILE: expected the folder of a run, got {str(folder)!r} without run.json")
    settings = checkpoint.resumed_settings(folder, {}, "FILE")
    newest = checkpoint.latest(folder, "FILE")
    origin = origin_of(settings, task_of(settings))
    focus = checkpoint.check(newest, origin, "FILE").focus
    tables = [
        _observe(settings, options, None, "before training", say),
        _observe(settings, options, newest, "after training", say, focus),
    ]
    return _labelled(TokenTable.join(tables), folder, files)


def _of_pair(options: dict, say: Callable[[str], None]):
    """The table of two checkpoints and a task's prompts."""
    from tip_kernels.opd.settings import Settings

    given = {name: options[name] for name in ("teacher", "student", "task", "chat") if name in options}
    return _observe(Settings(**given), options, None, None, say)


def _observe(
    settings,
    options: dict,
    student: Path | None,
    group: str | None,
    say: Callable[[str], None],
    focus: dict | None = None,
):
    """Rollouts by the settings' student, or by a later state of it, under the options' changes to the settings."""
    from tip_kernels.distillation.registry import RULES
    from tip_kernels.opd.observe import observe
    from tip_kernels.opd.origin import source_of
    from tip_kernels.opd.pair import load_pair
    from tip_kernels.opd.task import task_of
    from tip_kernels.opd.train import Loop

    changes = {name: options[name] for name in MODEL_OPTIONS if name in options and name != "prompts"}
    if changes.get("rule", "all") not in RULES:
        raise UsageError(f"argument --rule: expected one of {', '.join(RULES)}, got {changes['rule']!r}")
    if {"rule", "keep"} & changes.keys():
        changes["preset"] = None
    settings = replace(settings, **changes)
    device = pick_device(settings.device)
    task = task_of(settings)
    pair = load_pair(source_of(settings, "teacher"), source_of(settings, "student"), device, student)
    loop = Loop(settings, pair, task, device)
    if loop.focus and focus:
        loop.focus.load_state_dict(focus)
    prompts = min(options.get("prompts", 100), len(task.held_out))
    table = observe(loop, prompts, group, lambda done: say(f"{group or 'rollouts'}: {done} of {prompts}"))
    teacher = f"{_short(settings.teacher)}, top {settings.teacher_topk}" if settings.teacher_topk else None
    table.about = {
        "task": _short(settings.eval_task or settings.task),
        "rule": settings.preset or f"{settings.rule}, keep {settings.keep:g}",
        "temperature": f"{settings.temperature:g}",
        "student": _short(settings.student),
        "teacher": teacher or _short(settings.teacher),
    }
    return table


def compare(options: dict) -> int:
    """Several runs on one page; returns the exit code."""
    from tip_kernels.inspect import curves, page

    runs = [curves.Run.load(Path(name)) for name in options["runs"]]
    groups = curves.grouped(runs)
    output = Path(options.get("output", "compare.html"))
    content = curves.comparison(groups)
    page.write(output, page.curves_page(content["title"], content))
    curves.draw_comparison(output.with_suffix(".png"), groups)
    if not options.get("quiet"):
        curves.print_table(content["tables"][0])
        print(f"page in {output}, picture in {output.with_suffix('.png')}", file=sys.stderr, flush=True)
    if options.get("json"):
        print(json.dumps({"output": str(output), "groups": curves.figures(groups)}), flush=True)
    return 0


def main(command: str, argv: list[str]) -> int:
    """Exit code of `tip-kernels inspect` or `compare`: 0 done, 2 bad arguments, 130 interrupted."""
    parser, run = {"inspect": (inspect_parser, inspect), "compare": (compare_parser, compare)}[command]
    options = None
    try:
        options = vars(parser().parse_args(argv))
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise UsageError(f"needs {', '.join(missing)}: {install('opd')}")
        return run(options)
    except UsageError as error:
        print(f"tip-kernels {command}: error: {error.beside(options)}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file that no one looked at more closely
        print(f"tip-kernels {command}: error: expected files that can be used, got {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tip-kernels {command}: interrupted", file=sys.stderr)
        return 130
