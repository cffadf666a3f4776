"""A real language model on a CPU: a few steps of the main job on SmolLM2-135M, and what one of them holds in memory.

    python -m bench smollm2 [--steps N --batch B --max-new-tokens L --keep r --threads T --json FILE]

All 30 layers teach the first 15, V = 49,152. The steps are those of `tip-kernels opd --model smollm2`. On the next
step's completions, with the weights as they then are, the same work is done once with our loss and once with the dense
one (whole logits of both models over the completions, reverse KL of all tokens), forwards and backward included.
Peaks come from the allocator's records, above weights and optimizer; "loss alone" is from given hidden states.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import tip_kernels as tip
from bench._meter import peak_transient_mib

SMALL_MIB = 16  # a workspace in which the kept rows' logits are made twice instead of held


def main(argv: list[str]) -> int:
    from tip_kernels.inspect.usage import UsageError
    from tip_kernels.opd import smollm2
    from tip_kernels.opd.settings import MODELS, Settings

    preset = MODELS["smollm2"]
    parser = argparse.ArgumentParser(prog="python -m bench smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=preset["steps"])
    parser.add_argument("--batch", type=int, default=preset["batch"])
    parser.add_argument("--max-new-tokens", type=int, default=preset["max_new_tokens"])
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = vars(parser.parse_args(argv))
    file = args.pop("json")
    try:
        smollm2.file()
    except UsageError as error:
        print(error)
        return 2
    result = measure(Settings(**(preset | args)))
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(settings) -> dict:
    """Steps, then one more measured twice; prints as it goes."""
    from tip_kernels.opd.pair import load_pair
    from tip_kernels.opd.task import load_task
    from tip_kernels.opd.train import Loop, response_head

    device = torch.device("cpu")
    pair = load_pair(settings.teacher, settings.student, device)
    loop = Loop(settings, pair, load_task(settings.task, settings.eval_prompts), device)
    size = f"{settings.batch} prompts a step, {loop.max_new_tokens} tokens each"
    print(f"{settings.task}, {size}, fp32, V={pair.teacher.tokens}, {settings.threads} thread(s)")
    rows = []
    for _ in range(settings.steps):
        row = loop.step()
        rows.append({name: row[name] for name in ("step", "rows", "kept", "loss", "kl_rev", "entropy", "seconds")})
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    rollouts = loop.rollouts()
    mask = rollouts.mask

    def heads() -> tuple[tip.Head, tip.Head]:
        student = response_head(pair.student, rollouts)
        with torch.no_grad():
            return student, response_head(pair.teacher, rollouts)

    given = heads()
    hidden = [head.hidden.detach() for head in given]

    def given_heads() -> tuple[tip.Head, tip.Head]:
        states = hidden[0].requires_grad_(), hidden[1]
        return tuple(dataclasses.replace(head, hidden=h) for head, h in zip(given, states, strict=True))

    def ours(student: tip.Head, teacher: tip.Head, workspace_mib: float = settings.workspace_mib) -> Tensor:
        rule = tip.SoftOr(settings.keep)
        return tip.distill(student, teacher, select=rule, row_mask=mask, workspace_mib=workspace_mib).loss

    def small(student: tip.Head, teacher: tip.Head) -> Tensor:
        return ours(student, teacher, workspace_mib=SMALL_MIB)

    def dense(student: tip.Head, teacher: tip.Head) -> Tensor:
        log_s = torch.log_softmax(student.hidden @ student.weight.T, -1)
        with torch.no_grad():
            log_t = torch.log_softmax(teacher.hidden @ teacher.weight.T, -1)
        return (log_s.exp() * (log_s - log_t)).sum(-1)[mask].mean()

    losses = {f"ours, workspace {mib:g} MiB": f for mib, f in ((settings.workspace_mib, ours), (SMALL_MIB, small))}
    losses["dense, all tokens"] = dense
    peaks = []
    for where, sources in (("whole step", heads), ("loss alone", given_heads)):
        for name, loss in losses.items():
            found = taken(lambda s=sources, f=loss: f(*s()).backward(), loop, hidden[0])
            peaks.append({"what": where, "loss": name} | found)
            print(
                f"{where}, {name:<23} peak {found['peak_mib']:5.0f} MiB, leaves {found['gradients_mib']:.0f} MiB of"
                f" gradients, {found['seconds']:.2f} s",
                flush=True,
            )
    setting = {"device": "cpu", "threads": settings.threads, "torch": torch.__version__, "rows": int(mask.sum())}
    return {**setting, "vocab": pair.teacher.tokens, "steps": rows, "peaks": peaks}


def taken(run: Callable[[], object], loop, hidden: Tensor) -> dict:
    """Peak and gradients of `run` above what is held before it, and its time."""

    def clear() -> None:
        loop.optimizer.zero_grad(set_to_none=True)
        hidden.grad = None

    seconds = []
    for _ in range(2):
        clear()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    clear()
    peak, gradients = peak_transient_mib(run)
    clear()
    return {"peak_mib": peak, "gradients_mib": gradients, "seconds": min(seconds)}
