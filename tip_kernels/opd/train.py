"""The loop: sample from the student, measure, select, learn from the kept rows, look again.

Nothing random outlives a step: prompts, rollouts and random rules draw from generators seeded by (seed, purpose, step).
The state of a run is therefore its weights, its optimizer and its counters, AdaKD's focus among them, and a resumed run
repeats an unbroken one bit for bit.

Of several processes each has its share of a step's prompts and draws rollouts of its own. The loss is the mean over the
tokens that all of them kept, the log's numbers are of all, and the weights stay the same bits on every one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import not_none
from tip_kernels.distillation.distill import Distilled, distill
from tip_kernels.distillation.options import Execution
from tip_kernels.distillation.registry import divergence_of
from tip_kernels.distillation.step_selection import StepSelection
from tip_kernels.inspect.usage import UsageError
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.opd.data import key_of
from tip_kernels.opd.judges import standard_error
from tip_kernels.opd.pair import Pair, Side
from tip_kernels.opd.ranks import Ranks
from tip_kernels.opd.rollout import Rollouts, sample
from tip_kernels.opd.settings import Settings
from tip_kernels.opd.task import Task
from tip_kernels.select.adakd import adakd
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rule import Kept, spans_ranks
from tip_kernels.sources.from_models import likeliest
from tip_kernels.sources.pair import Head
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import TokenStats

CLIP = 1.0  # largest gradient norm
BINS = 40  # of the entropy histogram
SMALL = (
    10_000_000  # parameters: below, a second thread gains little when cores are free and loses much when they are not
)


@dataclass
class Counters:
    """How far a run has come; JSON-able."""

    step: int = 0
    skipped: int = 0
    rows: int = 0  # response tokens seen
    kept: int = 0
    seconds: float = 0.0
    start_accuracy: float | None = None
    start_accuracy_se: float | None = None
    start_kl: float | None = None
    end_accuracy: float | None = None
    end_accuracy_se: float | None = None
    end_kl: float | None = None
    judge_errors: int = 0  # answers of the last evaluation that the task's own judge raised an error on
    focus: dict | None = None  # state_dict of AdaKD's focus after its last loss


class Loop:
    """A run between two steps. `step()` trains once, `evaluate()` looks; both return what the log gets."""

    def __init__(self, settings: Settings, pair: Pair, task: Task, device: torch.device, ranks: Ranks | None = None):
        self.settings, self.pair, self.task, self.device = settings, pair, task, device
        self.ranks = ranks or Ranks()
        if settings.batch < self.ranks.count:
            raise UsageError(
                f"argument --batch: expected a prompt for each of {self.ranks.count} processes, got {settings.batch}"
            )
        self.counters = Counters()
        sizes = [weight.numel() for side in (pair.teacher, pair.student) for weight in side.model.parameters()]
        if settings.threads or sum(sizes) < SMALL:
            torch.set_num_threads(settings.threads or 1)
        self.student = pair.student  # what learns; with several processes their gradients are averaged
        if self.ranks.count > 1:
            self.student = replace(pair.student, model=torch.nn.parallel.DistributedDataParallel(pair.student.model))
        self.weights = [weight for weight in pair.student.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        self.divergence, self.focus = divergence_of(settings.divergence), settings.make_focus()
        tokens = pair.teacher.tokens
        if settings.teacher_topk and settings.teacher_topk > tokens:
            raise UsageError(
                f"argument --teacher-topk: expected at most the vocabulary's {tokens}, got {settings.teacher_topk}"
            )
        self.held_out = pair.encode(task.held_out, settings.chat)
        listed = pair.encode(task.listed, settings.chat)  # an unusable prompt is an error now, not in mid-run
        if task.eval_max_new_tokens is None:
            self.max_new_tokens = self._room(self.held_out + listed, task.max_new_tokens)
            self.eval_max_new_tokens = self.max_new_tokens
        else:
            trained_on = listed or pair.encode(task.draw(random.Random(0), 1), settings.chat)
            self.max_new_tokens = self._room(trained_on, task.max_new_tokens)
            self.eval_max_new_tokens = self._room(self.held_out, task.eval_max_new_tokens)

    def _room(self, prompts: list[list[int]], usual: int) -> int:
        """The longest completion: as asked, or the task's usual one as far as the models' positions reach."""
        prompt = max(map(len, prompts))
        asked, room = self.settings.max_new_tokens, self.pair.longest - prompt
        if room < (asked or 1):
            raise UsageError(
                f"argument --max-new-tokens: expected at most {room}, as the models have {self.pair.longest} positions"
                f" and the longest prompt has {prompt} tokens, got {asked or usual}"
            )
        return asked or min(usual, room)

    def _seed(self, purpose: str) -> int:
        return random.Random(f"{self.settings.seed} {purpose} {self.counters.step}").getrandbits(63)

    def seed(self, purpose: str) -> int:
        """What this process draws from for a purpose of this step."""
        return self._seed(f"{purpose} {self.ranks.rank}" if self.ranks.rank else purpose)

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed(purpose))

    def complete(
        self,
        prompts: list[list[int]],
        seed: int | None = None,
        each: int = 1,
        *,
        longest: int | None = None,
        temperature: float | None = None,
    ) -> Rollouts:
        """The student's completions: greedy ones, or with a seed `each` of every prompt as the settings draw them.

        At another `temperature` they are drawn among all tokens.
        """
        settings = self.settings
        drawn: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if temperature is not None:
            drawn = {"temperature": temperature}
        try:
            return sample(
                self.pair.student.model,
                prompts,
                max_new_tokens=longest or self.max_new_tokens,
                stop_ids=self.pair.stop_ids,
                pad_id=self.pair.pad_id,
                vocab_size=self.pair.student.vocab_size,
                rollouts_per_prompt=each,
                seed=seed,
                **({"temperature": 0} if seed is None else drawn),
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            self._expect_numbers(math.nan, student_is_sound=False)
            raise

    def rollouts(self) -> Rollouts:
        """The student's completions of this step's prompts."""
        drawn = self.task.draw(random.Random(self._seed("prompts")), self.settings.batch)
        prompts = self.pair.encode(drawn[self.ranks.rank :: self.ranks.count], self.settings.chat)
        return self.complete(prompts, self.seed("rollouts"), self.settings.rollouts_per_prompt)

    def distil(self, rollouts: Rollouts) -> Distilled:
        """Both models over the rollouts, the choice of tokens, and the loss on them."""
        return distill(
            response_head(self.student, rollouts),
            self.teacher(rollouts),
            divergence=self.divergence,
            labels=self.labels(rollouts),
            workspace_mib=self.settings.workspace_mib,
            execution=Execution(full_stats=True),  # the log shows every token's quadrant, whatever the rule reads
            **self.choice(rollouts.mask),
        )

    def step(self) -> dict:
        """One rollout batch and, unless nothing is kept, one optimizer step."""
        began, counters = time.perf_counter(), self.counters
        rollouts = self.rollouts()
        ratio = {"keep": self.focus.keep} if self.focus else {}
        size, most = self.settings.micro_batch, -(-self.settings.batch // self.ranks.count)
        if size is None or size >= most * self.settings.rollouts_per_prompt:  # of the process that has most
            sums, loss, norm = self._learn_whole(rollouts)
        else:
            sums, loss, norm = self._learn_parts(rollouts.parts(size), rollouts)
        rows, kept = int(sums.rows), int(sums.kept)
        if self.focus and norm is not None:
            self.focus.update(loss)
            counters.focus = self.focus.state_dict()
        counters.step += 1
        counters.rows += rows
        counters.kept += kept
        counters.skipped += norm is None
        seconds = time.perf_counter() - began
        counters.seconds += seconds
        row = {"step": counters.step, "loss": loss if kept else None, "rows": rows, "kept": kept}
        row |= ratio | {"kept_share": kept / rows, "kept_mass": sums.kept_kl / (sums.finite_kl or math.nan)}
        row |= {"entropy": sums.entropy / rows, "kl_rev": sums.kl / rows}
        row |= {f"q{i}": count / rows for i, count in enumerate(sums.quadrants, start=1)}
        return row | {"grad_norm": norm, "ended": sums.ended / sums.rollouts, "seconds": seconds}

    def _learn_whole(self, rollouts: Rollouts) -> tuple[Sums, float, float | None]:
        """One forward of all rollouts: the step's sums, its loss, and the gradient norm, None if nothing is learned."""
        out = self.distil(rollouts)
        local = Sums.of(out.stats, out.kept, _used(out), out.loss.item(), rollouts)
        sums = Sums(*self.ranks.total(list(local)))
        self._expect_numbers(sums.kl, math.isfinite(sums.entropy))
        loss, part = sums.loss, 1.0
        if not spans_ranks(self.choice(rollouts.mask)["select"]):  # then the normaliser was this process's own
            loss, part = sums.weighted_loss / max(sums.used, 1), local.used / max(sums.used, 1)
        norm = self._learn([out.loss * (self.ranks.count * part)]) if sums.kept else None  # gradients are averaged
        return sums, loss, norm

    def _learn_parts(self, parts: list[Rollouts], rollouts: Rollouts) -> tuple[Sums, float, float | None]:
        """The same in micro-batches: all are measured, tokens chosen over the step, and each is learned from."""
        choice = self.choice(rollouts.mask)
        settings = {name: choice[name] for name in ("temperature", "temperature_sq") if name in choice}
        step = StepSelection(choice["select"], full_stats=True, **settings)
        ids = choice.get("rollout_ids")
        ids = [None] * len(parts) if ids is None else ids.split([len(part.mask) for part in parts])
        teachers = [self.teacher(part) for part in parts]
        for part, teacher, own in zip(parts, teachers, ids, strict=True):
            student = self.no_graph_head(part)
            step.measure(
                student, teacher, row_mask=part.mask, rollout_ids=own, workspace_mib=self.settings.workspace_mib
            )
        chosen = step.parts()
        sums = Sums(*self.ranks.total(list(Sums.of(step.stats, step.kept, 0, 0.0, rollouts))))
        self._expect_numbers(sums.kl, math.isfinite(sums.entropy))
        kept, used = int(sums.kept), 0.0
        outs: list[Distilled] = []

        def losses() -> Iterator[Tensor]:
            for part, teacher, own in zip(parts, teachers, chosen, strict=True):
                own["normalizer"] = kept
                out = distill(
                    response_head(self.student, part),
                    teacher,
                    divergence=self.divergence,
                    labels=self.labels(part),
                    workspace_mib=self.settings.workspace_mib,
                    **own,
                )
                outs.append(out._replace(loss=out.loss.detach()))
                yield out.loss * self.ranks.count

        def correction() -> float:  # for kept tokens of no finite loss
            nonlocal used
            used = self.ranks.total([sum(map(_used, outs))])[0]
            return kept / used if used else 1.0

        norm = self._learn(losses(), len(parts), correction) if kept else None
        loss = self.ranks.total([sum(out.loss.item() for out in outs)])[0]
        return sums, loss * kept / max(used, 1.0), norm

    @torch.no_grad()
    def no_graph_head(self, rollouts: Rollouts) -> Head:
        """The student over the rollouts, to be measured alone."""
        return response_head(self.pair.student, rollouts)

    @torch.no_grad()
    def teacher(self, rollouts: Rollouts) -> Head | TopK:
        """The teacher at every place of the completions: its head, or its likeliest tokens alone."""
        side, settings = self.pair.teacher, self.settings
        head = response_head(side, rollouts)
        if settings.teacher_topk is None:
            return head
        return likeliest(head, settings.teacher_topk, settings.workspace_mib)

    def choice(self, mask: Tensor) -> dict:
        """What distill keeps and how it weighs it: AdaKD's arguments, or a rule with a plain mean over kept tokens."""
        ids, scope = None, self.settings.scope
        if scope == "global":  # one quota a rollout, whose ids no other process has
            ids = torch.arange(len(mask), device=mask.device) + (self.ranks.rank << 40)
            ids = ids.unsqueeze(1).expand(mask.shape)
        if self.focus:
            median_scope = "global" if scope == "global" else "batch"
            how = {"base": self.settings.loss_temperature, "median_of": self.settings.median_of or "valid"}
            how["min_rows"] = self.settings.min_rows
            return {**adakd(self.focus, row_mask=mask, rollout_ids=ids, scope=scope, median_scope=median_scope, **how)}
        rule = self.settings.make_rule(self.generator("rule"))
        at = {"temperature": self.settings.loss_temperature}
        return {"select": rule, "row_mask": mask, "rollout_ids": ids, "normalizer": "kept"} | at

    def labels(self, rollouts: Rollouts) -> Tensor | None:
        """(B, L) the sampled tokens, where the divergence reads them: place i holds the one that row i predicts."""
        if not self.settings.samples_tokens:
            return None
        return torch.where(rollouts.mask, rollouts.completions, -100)

    def _learn(
        self, losses: Iterable[Tensor], count: int = 1, correction: Callable[[], float] = lambda: 1.0
    ) -> float | None:
        """The gradient norm before clipping, of the sum of so many losses, each made when the one before is learned.

        None, and no step, where the gradient is not finite. `correction` multiplies the gradients.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.counters.step)
        self.optimizer.zero_grad(set_to_none=True)
        made = iter(losses)
        for place in range(count):
            with nullcontext() if place == count - 1 else self.ranks.apart(self.student.model):
                next(made).backward()
        factor = correction()
        for weight in self.weights if factor != 1.0 else ():
            if weight.grad is not None:
                weight.grad.mul_(factor)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP).item()
        if not math.isfinite(norm):
            return None
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Accuracy on the held-out prompts, and the mean KL(student || teacher) per token along those answers.

        Answers are greedy, or settings.eval_samples of each prompt. Accuracy is the mean of all scores, with its
        standard error over prompts, and None where the task knows no answers; an answer that its judge raises an error
        on is wrong, and how many there were is told where there were any. The histogram counts those tokens by the
        student's entropy, in BINS equal bins from 0 to `top`, the entropy of a uniform student.
        """
        began, nats, rows, each = time.perf_counter(), 0.0, 0, self.settings.eval_samples
        top = math.log(self.pair.student.tokens)
        self.task.errors.clear()
        counts = torch.zeros(BINS, dtype=torch.int64)
        scores = [0.0] * len(self.held_out)  # of each prompt, all of its samples
        mine = range(self.ranks.rank, len(self.held_out), self.ranks.count)
        chunk = max(4 * self.settings.batch // each, 1)
        for first in range(0, len(mine), chunk):
            indices = mine[first : first + chunk]
            rollouts = self.answers(indices)
            heads = [response_head(side, rollouts) for side in (self.pair.student, self.pair.teacher)]
            student, teacher = (replace(head, hidden=head.hidden[rollouts.mask]) for head in heads)
            stats = token_stats(student, teacher, workspace_mib=self.settings.workspace_mib)
            nats += stats.kl_rev.double().sum().item()
            rows += len(student.hidden)
            counts += _histogram(stats.entropy_s, top)
            if self.task.judge:
                of = [index for index in indices for _ in range(each)]
                for index, score in zip(of, self.judge(rollouts, of), strict=True):
                    scores[index] += score
        here = [nats, rows, self.task.errors.total(), *counts.tolist(), *scores]
        nats, rows, raised, *others = self.ranks.total(here)
        tally, scores = others[:BINS], others[BINS:]
        self._expect_numbers(nats, sum(tally) == rows)
        counters = self.counters
        counters.judge_errors = int(raised)
        counters.end_kl = nats / rows
        if self.task.judge:
            counters.end_accuracy = sum(scores) / (len(scores) * each)
            means = [score / each for score in scores]
            counters.end_accuracy_se = standard_error(means, [key_of(prompt) for prompt in self.task.held_out])
        if counters.step == 0:
            counters.start_accuracy, counters.start_kl = counters.end_accuracy, counters.end_kl
            counters.start_accuracy_se = counters.end_accuracy_se
        counters.seconds += time.perf_counter() - began
        row: dict[str, Any] = {"accuracy": counters.end_accuracy}
        row |= {"accuracy_se": counters.end_accuracy_se} if self.task.judge else {}
        row |= {"eval_kl": counters.end_kl}
        row["entropy_histogram"] = {"top": top, "counts": [int(count) for count in tally]}
        return row | ({"judge_errors": counters.judge_errors} if counters.judge_errors else {})

    def answers(self, indices: Sequence[int]) -> Rollouts:
        """Completions of these held-out prompts, as they are evaluated."""
        settings, prompts, longest = self.settings, [self.held_out[i] for i in indices], self.eval_max_new_tokens
        if not settings.eval_temperature:
            return self.complete(prompts, longest=longest)
        seed = self.seed(f"evaluation {indices[0]}")
        return self.complete(
            prompts, seed, settings.eval_samples, longest=longest, temperature=settings.eval_temperature
        )

    def judge(self, rollouts: Rollouts, indices: Sequence[int]) -> list[float]:
        """Where from 0, wrong, to 1, right, the completions of these held-out prompts are."""
        verdicts: list[float] = []
        assert self.task.judge
        whole = zip(indices, rollouts.completions, rollouts.mask, rollouts.ended, strict=True)
        for index, completion, mask, ended in whole:
            text = str(self.pair.tokenizer.decode(completion[mask], skip_special_tokens=True))
            verdicts.append(not_none(self.task.judge)(index, text, bool(ended)))
        return verdicts

    def _expect_numbers(self, kl: float, student_is_sound: bool) -> None:
        """UsageError where a sum of KLs is NaN, which all processes then have: a model gave NaN for some token."""
        if math.isnan(kl):
            role, hint = (
                ("teacher", "") if student_is_sound else ("student", " (a smaller --lr?)" * bool(self.counters.step))
            )
            raise UsageError(
                f"argument --{role}: expected a model of finite logits, got NaN after {self.counters.step} steps{hint}"
            )

    def train(self, after_step: Callable[[dict], bool]) -> None:
        """Step until settings.steps, or until `after_step` (which gets the log's row) says to stop."""
        while self.counters.step < self.settings.steps:
            row = self.step()
            if self.counters.step % self.settings.eval_every == 0 or self.counters.step == self.settings.steps:
                row |= self.evaluate()
            if not after_step(row):
                return


def response_head(side: Side, rollouts: Rollouts) -> Head:
    """The head over hidden states (B, L, H), each the one that predicts the completion's token at its place."""
    return side.head(rollouts.tokens[:, :-1], rollouts.attention[:, :-1], first=rollouts.prompt_width - 1)


class Sums(NamedTuple):
    """What a step adds up, over the tokens of the completions and over all processes; entropies and KLs in nats.

    With a teacher of K tokens the KL is between what it lists and the remaining mass as one bucket: a lower bound.
    """

    rows: float
    kept: float
    used: float  # kept, with a finite loss
    loss: float
    weighted_loss: float  # loss * used
    entropy: float
    kl: float  # KL(student || teacher)
    finite_kl: float  # without the tokens where it is infinite or unknown
    kept_kl: float  # of the kept ones among these
    ended: float
    rollouts: float
    q1: float
    q2: float
    q3: float
    q4: float

    @property
    def quadrants(self) -> tuple[float, ...]:
        return self[-4:]

    @classmethod
    def of(cls, stats: TokenStats, kept: Kept, used: int, loss: float, rollouts: Rollouts) -> Sums:
        rows = rollouts.mask.flatten()
        finite_kl, kept_kl = _kl_sums(stats, kept, rollouts.mask)
        counts = torch.bincount(quadrants(stats, row_mask=rows)[rows].long(), minlength=5)
        return cls(
            int(rows.sum()),
            int(kept.mask.sum()),
            used,
            loss,
            loss * used,
            stats.entropy_s[rows].double().sum().item(),
            stats.kl_rev[rows].double().sum().item(),
            finite_kl,
            kept_kl,
            int(rollouts.ended.sum()),
            rollouts.ended.numel(),
            *counts.tolist()[1:],
        )


def _used(out: Distilled) -> int:
    """How many kept tokens have a finite loss."""
    return int(out.plan.kept_rows - out.plan.dropped_rows)


def _kl_sums(stats: TokenStats, kept: Kept, mask: Tensor) -> tuple[float, float]:
    """KL(student || teacher) over the tokens and over the kept ones; where it is infinite or unknown it is left out."""
    kl = stats.kl_rev.double()
    kl = torch.where(mask.flatten() & kl.isfinite(), kl, 0.0)
    return kl.sum().item(), kl[kept.mask].sum().item()


def _histogram(entropy: Tensor, top: float) -> Tensor:
    """(BINS,) int64 on the CPU: how many rows are in each bin; NaN rows in none."""
    bins = (entropy[~entropy.isnan()] * (BINS / top)).long().clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS).cpu()
