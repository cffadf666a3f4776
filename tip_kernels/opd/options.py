"""The options of `tip-kernels opd`, and how each is read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from tip_kernels.distillation import registry as names
from tip_kernels.distillation.registry import CLASSES, DIVERGENCES, RULES
from tip_kernels.inspect.usage import Parser
from tip_kernels.opd.judges import JUDGES
from tip_kernels.opd.settings import MODELS, PRESETS, Settings

Value = TypeVar("Value")
DESCRIPTION = """\
On-policy distillation: the student answers prompts, the teacher scores every token, a rule picks the tokens that
matter, and the student learns from those only. Without options a packaged student that adds wrongly learns from a
packaged teacher, in about a minute on two CPU cores."""


def keep_of(text: str) -> float | int:
    """'0.2' is a fraction of a rollout's tokens, '64' a number of them."""
    return _argument(names.keep_of, text)


def cut(text: str) -> str:
    """'0.3' in nats or 'quantile:0.5'; it stays text, which is what a run stores."""
    _argument(names.cut_of, text)
    return text


def divergence(text: str) -> str:
    """'todi', or with parameters 'todi:2'; it stays text, which is what a run stores."""
    _argument(names.divergence_of, text)
    return text


def _argument(read: Callable[[str], Value], text: str) -> Value:
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(least: int):
    """A parser of whole numbers of at least `least`."""

    def parse(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def least_zero(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def parser() -> Parser:
    """The options. Those that were not typed are absent from the result: --resume must tell them from defaults."""
    p = Parser(prog="tip-kernels opd", description=DESCRIPTION, argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def option(group, name: str, kind, text: str, metavar: str | None = None, choices=None) -> None:
        default = getattr(Settings, name[2:].replace("-", "_"), None)
        shown = text if default is None else f"{text} (default {default})"
        group.add_argument(name, type=kind, help=shown, metavar=metavar, choices=choices)

    g = p.add_argument_group("what learns what from whom")
    text = "smollm2: a real language model, all 30 layers teach the first 15, with settings for 5 steps on one CPU core"
    option(g, "--model", str, text, choices=tuple(MODELS))
    option(g, "--teacher", str, "checkpoint folder (transformers, safetensors), or smollm2", "FOLDER")
    text = "checkpoint folder of the same vocabulary, which is not written to, or smollm2:15 for so many layers"
    option(g, "--student", str, text, "FOLDER")
    files = "a file of prompts (text: one a line; .jsonl, .parquet: prompt, which may be messages, and maybe answer)"
    option(g, "--task", str, f"addition, {files}, or reasoning_gym:NAME", "TASK")
    text = "learn from the teacher's N likeliest tokens at each place, as engines list them, the others as one bucket"
    option(g, "--teacher-topk", whole(1), text, "N")
    g.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")

    g = p.add_argument_group("what is kept")
    named = ", ".join(f"{name} ({kind})" for name, kind in CLASSES.items())
    text = f"which tokens the student learns from: {named}; the package's other rules are for loops in Python"
    g.add_argument("--rule", choices=tuple(RULES), metavar="NAME", help=f"{text} (default {Settings.rule})")
    text = "fraction of each rollout's tokens (0.2; 1.0 is every token), or a number of them (64; 1 is one token)"
    option(g, "--keep", keep_of, text, "KEEP")
    text = "what --keep is a share of: each rollout, a process's batch, or global: each rollout, among the rollouts of "
    text += "all processes, which ranks and normalized values are then of"
    option(g, "--scope", str, text, choices=("rollout", "batch", "global"))
    text = "the least number of tokens kept of a rollout; 0 lets a short one keep none, as the papers' floor does"
    option(g, "--min-rows", whole(0), text, "N")
    text = "with --rule sample_entropy: drawn in proportion to entropy^alpha hellinger_sq^gamma (default 1 and 0)"
    option(g, "--alpha", least_zero, text, "POWER")
    option(g, "--gamma", least_zero, "see --alpha", "POWER")
    text = "with --rule overconfident: only tokens of an entropy below this, in nats, or quantile:0.5 of the batch's"
    option(g, "--entropy-below", cut, text, "NATS")
    text = "with --rule overconfident: only tokens of a KL(teacher || student) above this, likewise"
    option(g, "--divergence-above", cut, text, "NATS")
    text = f"the loss on a kept token: {', '.join(DIVERGENCES)}; with parameters as in jsd:0.1 or alpha_beta:0.2,0.7"
    option(g, "--divergence", divergence, text, "NAME[:NUMBERS]")
    text = "divides both models' logits in loss and statistics; that of the rollouts is --temperature"
    option(g, "--loss-temperature", positive, text, "T")
    text = "adakd: the share of tokens kept falls with the loss, the hardest first, each with a temperature of its own"
    option(g, "--preset", str, f"instead of --rule and --keep; {text}", choices=PRESETS)

    text = "with --preset adakd: the median difficulty is that of all valid tokens (paper) or of the kept (its code)"
    option(g, "--median-of", str, text, choices=("valid", "kept"))
    text = "with --preset adakd: the loss to compare with moves as in the paper, or also at the smallest and largest "
    option(g, "--reanchor", str, text + "share, as in the released code", choices=("paper", "release"))

    g = p.add_argument_group("training")
    option(g, "--steps", whole(1), "optimizer steps, a rollout batch each", "N")
    option(g, "--batch", whole(1), "prompts a step, of all processes together", "N")
    text = "rollouts a forward pass, to bound memory; tokens are still chosen over the whole step, at the price of a "
    text += "second forward of the student; default: all of a process"
    option(g, "--micro-batch", whole(1), text, "N")
    option(g, "--lr", positive, "learning rate of AdamW", "RATE")
    option(g, "--warmup", whole(0), "steps over which the learning rate rises to --lr", "N")
    text = "constant, or after that down to 0 at the last of --steps, as half a cosine"
    option(g, "--schedule", str, text, choices=("constant", "cosine"))
    option(g, "--weight-decay", least_zero, "of AdamW, decoupled, on every weight", "RATE")
    option(g, "--rollouts-per-prompt", whole(1), "completions of each prompt that a step learns from", "N")
    option(g, "--temperature", positive, "of the rollouts; 1 is on-policy", "T")
    option(g, "--top-p", share, "draw each token among the likeliest that have this probability together", "P")
    option(g, "--top-k", whole(0), "draw each token among the N likeliest; 0 is all", "N")
    option(g, "--max-new-tokens", whole(1), "longest completion; default: the task's (addition 48, else 256)", "N")
    option(g, "--seed", whole(0), "of prompts, rollouts and random rules", "N")
    option(g, "--device", str, "auto, cpu, cuda, cuda:1, mps", "DEVICE")
    option(
        g, "--threads", whole(1), "CPU threads; default: 1 for models under 10M parameters, else torch's choice", "N"
    )
    text = "with several processes, how long one waits for another before it gives up (default 600)"
    g.add_argument("--timeout", type=positive, metavar="SECONDS", help=text)
    option(g, "--workspace-mib", positive, "memory that measuring and learning may use for logits", "MIB")

    g = p.add_argument_group("evaluation and output")
    text = "judge on this task, as --task names them, whose prompts are then not trained on; default: held-out prompts "
    option(g, "--eval-task", str, text + "of --task", "TASK")
    text = "exact; boxed: the last \\boxed{} as mathematics (math-verify); rouge_l (rouge-score); reasoning_gym: parts "
    text += "of 1, too; default: the task's own, which of a file takes what follows the last > as well"
    option(g, "--judge", str, text, choices=tuple(JUDGES))
    text = "prompts to judge on; default 512, or a fifth of a shorter list, and all of a file that --eval-task names"
    option(g, "--eval-prompts", whole(1), text, "N")
    option(g, "--eval-samples", whole(1), "answers to each, whose mean score counts (mean@N)", "N")
    option(g, "--eval-temperature", least_zero, "of these answers, drawn among all tokens; 0 is greedy", "T")
    option(g, "--eval-every", whole(1), "steps between evaluations, each followed by a checkpoint", "N")
    g.add_argument("--output", metavar="FOLDER", help="where the run goes: log, checkpoint, student (default runs/opd)")
    g.add_argument("--resume", action="store_true", help="continue the run in --output from its last checkpoint")
    g.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    g.add_argument(
        "--no-report", action="store_true", help="write no report.html, curves.png and tokens.png at the end"
    )
    text = "log to this library, too, which must be installed: tensorboard (into --output), trackio or wandb"
    g.add_argument("--tracker", choices=("tensorboard", "trackio", "wandb"), help=text)
    g.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    g.add_argument("--quiet", action="store_true", help="no progress and no table")
    text = "train the packaged models anew instead, into --output (default runs/opd-models), from --seed"
    g.add_argument("--retrain", action="store_true", help=text)
    return p
