"""TRL's DistillationTrainer beside TIPDistillationTrainer: accuracy, the loss curve, the time of the loss call.

    python -m bench trl [--steps N --batch B --seeds S --tokens N --repeats R --json FILE --only curve accuracy time]

On a CPU, one thread, offline: the packaged models on the addition task, and the loss call alone at SmolLM2's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

from bench._meter import peak_transient_mib
from bench._peers import Problem
from tip_kernels.opd.rollout import sample
from tip_kernels.opd.settings import PACKAGED
from tip_kernels.opd.task import Task, load_task

VOCAB, HIDDEN = 49_152, 576  # SmolLM2-135M
KEEP = 0.2
RULES = {"TRL, all tokens": None, "Soft-OR 0.2": "soft_or", "random 0.2": "random"}


def load(role: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(PACKAGED / role, dtype=torch.float32)


def stubborn_teacher() -> Any:
    """The packaged teacher with its head's rows in another order and four times as sure: some 30 nats away."""
    teacher = load("teacher")
    head = teacher.get_output_embeddings()
    order = torch.randperm(head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    head.weight = torch.nn.Parameter(4 * head.weight.detach()[order])
    return teacher


def trainer(
    rule: str | None, teacher: Any, task: Task, folder: str, *, steps: int, batch: int, seed: int = 0, **others: Any
) -> Any:
    """The stock trainer where rule is None; otherwise ours, which keeps KEEP of each rollout's tokens by that rule."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DistillationConfig, DistillationTrainer

    from tip_kernels.hooks.trl import TIPDistillationConfig, TIPDistillationTrainer

    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch // 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": task.max_new_tokens,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "adam_beta2": 0.95,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        **others,
    }
    kind, config = DistillationTrainer, DistillationConfig
    if rule is not None:
        kind, config = TIPDistillationTrainer, TIPDistillationConfig
        settings |= {"tip_rule": rule, "tip_keep": KEEP}
    made = kind(
        model=load("student"),
        teacher_model=teacher,
        args=config(**settings),
        train_dataset=Dataset.from_dict({"prompt": task.draw(random.Random(seed), steps * batch)}),
        processing_class=AutoTokenizer.from_pretrained(PACKAGED / "student", padding_side="left"),
    )
    made.remove_callback(PrinterCallback)
    return made


def accuracy(model: Any, tokenizer: Any, task: Task) -> float:
    """The share of the held-out prompts that greedy completions answer rightly."""
    model.eval()
    prompts = tokenizer(task.held_out)["input_ids"]
    stops = (tokenizer.eos_token_id,)
    done = sample(
        model, prompts, max_new_tokens=task.max_new_tokens, stop_ids=stops, pad_id=tokenizer.pad_token_id, temperature=0
    )
    right = 0
    for i in range(len(prompts)):
        text = tokenizer.decode(done.completions[i][done.mask[i]], skip_special_tokens=True)
        right += task.judge(i, text, bool(done.ended[i]))
    return right / len(prompts)


def share_rollouts(run: Any, rollouts: dict[int, tuple]) -> None:
    """What one run generates at a step, all others that share `rollouts` take over, and the random state after it."""
    generate = run._generate_single_turn

    def take(*asked: Any) -> Any:
        step = run.state.global_step
        if step not in rollouts:
            rollouts[step] = generate(*asked), torch.get_rng_state()
        done, state = rollouts[step]
        torch.set_rng_state(state)
        return done

    run._generate_single_turn = take


def curve(task: Task, teacher: Any, steps: int, batch: int) -> dict[str, Any]:
    """How far losses and gradient norms of tip_rule "all" are from the stock trainer's on the same rollouts.

    The yardstick is the stock trainer beside itself, its first weights moved by one rounding: training amplifies it.
    """
    rollouts: dict[int, tuple] = {}
    rows = []
    for rule, nudge in ((None, 0.0), ("all", 0.0), (None, 2.0**-24)):
        with tempfile.TemporaryDirectory() as folder:
            descent = {"optim": "sgd", "learning_rate": 0.02}  # AdamW makes a full step of a gradient that is rounding
            run = trainer(rule, teacher, task, folder, steps=steps, batch=batch, **descent)
            generator = torch.Generator().manual_seed(0)
            for weight in run.model.parameters():
                weight.data.mul_(1 + nudge * torch.randn(weight.shape, generator=generator))
            share_rollouts(run, rollouts)
            run.train()
        rows.append([row for row in run.state.log_history if "loss" in row])
    stock = rows[0]

    def gaps(other: list[dict]) -> dict[str, float]:
        return {
            name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(stock, other, strict=True))
            for name in ("loss", "grad_norm", "entropy")
        }

    ends = {"first_loss": stock[0]["loss"], "last_loss": stock[-1]["loss"]}
    return ends | {"ours": gaps(rows[1]), "stock, weights moved by one rounding": gaps(rows[2])}


def learn(task: Task, rule: str | None, steps: int, batch: int, seed: int) -> dict[str, float]:
    """Accuracy before and after a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(rule, load("teacher"), task, folder, steps=steps, batch=batch, seed=seed)
        began = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - began
    kept = [row["tip/kept_frac"] for row in run.state.log_history if "tip/kept_frac" in row]
    return {
        "accuracy": accuracy(run.model, run.processing_class, task),
        "kept_frac": statistics.mean(kept) if kept else 1.0,
        "seconds": seconds,
    }


def loss_calls(task: Task, rollouts: int, tokens: int) -> tuple[dict[str, Any], Problem]:
    """The two trainers' loss calls, forward and backward, on the same hidden states at SmolLM2's head."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    p = Problem.random(rollouts * tokens, HIDDEN, VOCAB)
    mask = torch.ones(rollouts, tokens, dtype=torch.int64)
    count = torch.tensor(float(mask.sum()))
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer("soft_or", load("teacher"), task, folder, steps=1, batch=2)
    ours.model.train()
    ours._select = ours.make_rule()

    def step(call: Any) -> float:
        p.clear()
        hidden_s, hidden_t = p.hidden_s.view(rollouts, tokens, -1), p.hidden_t.view(rollouts, tokens, -1)
        loss, _, _ = call(hidden_s, hidden_t, p.weight_s, p.weight_t, mask, 1.0, num_items_in_batch=count)
        loss.backward()
        return loss.item()

    inputs = {"completion_ids": mask}
    calls = {
        "TRL, all tokens": lambda: step(_chunked_divergence_loss),
        "Soft-OR 0.2": lambda: step(lambda *a, **k: ours._kept_loss(inputs, *a, **k)),
    }
    return calls, p


def main(argv: list[str]) -> int:
    parts = ("curve", "accuracy", "time")
    parser = argparse.ArgumentParser(prog="python -m bench trl", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each of the 4 rollouts of the loss call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = load_task("addition", 512)
    found: dict[str, Any] = {"device": "cpu", "threads": 1, "torch": torch.__version__}

    if "curve" in args.only:
        found["curve"] = {}
        print('tip_rule "all" beside the stock trainer, 20 steps: largest relative gaps')
        for name, teacher in (("packaged teacher", load("teacher")), ("stubborn teacher", stubborn_teacher())):
            row = found["curve"][name] = curve(task, teacher, 20, 32)
            print(f"  {name}, loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}")
            for run in ("ours", "stock, weights moved by one rounding"):
                print(f"    {run:<36} " + ", ".join(f"{key} {gap:.1e}" for key, gap in row[run].items()))
    if "accuracy" in args.only:
        print(f"addition, {len(task.held_out)} held-out prompts, {args.steps} steps of {args.batch} rollouts")
        tokenizer = trainer(
            None, load("teacher"), task, tempfile.gettempdir(), steps=1, batch=2, seed=0
        ).processing_class
        found["accuracy"] = {"before": accuracy(load("student"), tokenizer, task)}
        print(f"  {'before':<18} accuracy {found['accuracy']['before']:.3f}")
        for name, rule in RULES.items():
            runs = [learn(task, rule, args.steps, args.batch, seed) for seed in range(args.seeds)]
            found["accuracy"][name] = runs
            after = " ".join(f"{run['accuracy']:.3f}" for run in runs)
            seconds = statistics.mean(run["seconds"] for run in runs)
            print(f"  {name:<18} accuracy {after}   kept {runs[0]['kept_frac']:.2f}   {seconds:.0f} s a run")
    if "time" in args.only:
        calls, problem = loss_calls(task, 4, args.tokens)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.repeats):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
        stock = min(times["TRL, all tokens"])
        found["time"] = {}
        print(f"the loss call, forward and backward: {4 * args.tokens} tokens, H {HIDDEN}, V {VOCAB}, fp32")
        for name, call in calls.items():
            problem.clear()
            peak = peak_transient_mib(call)[0] - problem.gradients_mib()
            found["time"][name] = {
                "seconds": min(times[name]),
                "faster": stock / min(times[name]),
                "transient_mib": peak,
            }
            print(
                f"  {name:<18} {min(times[name]):.2f} s (median {statistics.median(times[name]):.2f}),"
                f" {stock / min(times[name]):.2f}x, {peak:.0f} MiB above inputs and gradients"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
