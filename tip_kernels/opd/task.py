"""What is trained on and judged: the built-in addition, a file of prompts, or a reasoning-gym data set.

A task gives prompts and, where it knows the answers, a judge. Held-out prompts are disjoint from what training draws
and are chosen by a fixed seed, so every run of a task is judged on the same prompts.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd import addition
from tip_kernels.opd.data import Prompt, Row, key_of, read_rows
from tip_kernels.opd.judges import ANSWERED, SOLVED, GymEntry, Judge, judge_of

if TYPE_CHECKING:
    from tip_kernels.opd.settings import Settings

SPLIT_SEED = 20260414
GYM, GYM_SIZE = "reasoning_gym:", 4096
ADDITION_TOKENS, LISTED_TOKENS = 48, 256  # longest completions
NONSENSE = ("?", "qwxz", "I do not know.")  # answers to nothing, tried on so many held-out prompts:
NONSENSE_PROMPTS = 64


@dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts to be judged on, and the judge."""

    name: str
    held_out: list[Prompt]
    draw: Callable[[random.Random, int], list[Prompt]]  # (generator, count) -> training prompts
    judge: (
        Callable[[int, str, bool], float] | None
    )  # (index into held_out, completion, it ended by itself) -> from 0 to 1, where it is right
    max_new_tokens: int
    listed: tuple[Prompt, ...] = ()  # every training prompt, where there is a list of them
    errors: Counter[str] = field(default_factory=Counter)  # what judging raised, by type: each a wrong answer
    eval_name: str | None = None  # of the task that held_out and judge are of, where it is another one,
    eval_max_new_tokens: int | None = None  # and the longest completion there
    both: int = 0  # rows that are not trained on, since their prompts are in held_out

    @property
    def judged_on(self) -> str:
        """The name of what held_out is of."""
        return self.eval_name or self.name

    def said(self) -> str:
        """What is looked at, and what that takes from training."""
        both = f" ({self.both} rows of {self.name} are among them and not trained on)" if self.both else ""
        return f"{self.judged_on}: {len(self.held_out)} held-out prompts{both}"

    def nonsense_right(self) -> float:
        """The share of answers to nothing that are right all the same, of a judge that reads them about 0."""
        if self.judge is None:
            return 0.0
        asked = range(min(NONSENSE_PROMPTS, len(self.held_out)))
        verdicts = [self.judge(i, text, True) for i in asked for text in NONSENSE]
        return sum(verdicts) / len(verdicts)


def task_of(settings: Settings) -> Task:
    """What a run trains on and is judged on."""
    count, judge = settings.eval_prompts, settings.judge
    if settings.eval_task is None:
        return load_task(settings.task, count, judge)
    looked = _whole(settings.eval_task, count, judge)
    seen = frozenset(map(key_of, looked.held_out))
    if settings.task == "addition":
        return replace(looked, name="addition", draw=_draw_additions(seen), max_new_tokens=ADDITION_TOKENS)
    prompts = _listed(settings.task, "--task").prompts
    training = [prompt for prompt in prompts if key_of(prompt) not in seen]
    if not training:
        raise UsageError(
            f"argument --eval-task: expected other prompts than those of {settings.task}, got all {len(prompts)}"
        )
    changes = {"draw": _draw_from(training), "listed": tuple(training), "both": len(prompts) - len(training)}
    return replace(looked, name=settings.task, max_new_tokens=LISTED_TOKENS, **changes)


def load_task(name: str, eval_prompts: int | None, judge: str | None = None) -> Task:
    """The task called `name`: "addition", "reasoning_gym:NAME", or the path of a text, JSONL or Parquet file.

    `eval_prompts` is how many different prompts are held out, each with all its rows; None is 512, or a fifth of a
    shorter list. `judge` is a name of judges.JUDGES; None is the task's own.
    """
    if name == "addition":
        return _addition(eval_prompts, judge)
    found = _listed(name, "--task", judge)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(found.prompts):
        groups.setdefault(key_of(prompt), []).append(i)
    if len(groups) < 2:
        raise UsageError(f"argument --task: expected at least two different prompts in {name}, got {len(groups)}")
    count = min(512, max(1, len(groups) // 5)) if eval_prompts is None else eval_prompts
    if count >= len(groups):
        raise UsageError(
            f"argument --eval-prompts: expected fewer than the {len(groups)} different prompts of {name}, got {count}"
        )
    order = [groups[key] for key in random.Random(SPLIT_SEED).sample(list(groups), len(groups))]
    once = None if found.references else 1  # what is not judged is looked at once
    held_out = [i for rows in order[:count] for i in rows[:once]]
    training = [i for rows in order[count:] for i in rows]
    listed = [found.prompts[i] for i in training]
    task = _judged(name, found, held_out)
    return replace(task, draw=_draw_from(listed), listed=tuple(listed))


def _whole(name: str, count: int | None, judge: str | None) -> Task:
    """A task to be judged on alone: `count` of its prompts; None is every row of a file, else 512."""
    if name == "addition":
        task = _addition(count, judge)
    else:
        found = _listed(name, "--eval-task", judge)
        rows = len(found.prompts)
        if count is None:
            count = min(512, rows) if name.startswith(GYM) else rows
        if not rows:
            raise UsageError(f"argument --eval-task: expected at least one prompt in {name}, got none")
        if count > rows:
            raise UsageError(f"argument --eval-prompts: expected at most the {rows} prompts of {name}, got {count}")
        chosen = range(rows) if count == rows else random.Random(SPLIT_SEED).sample(range(rows), count)
        task = _judged(name, found, chosen)
    return replace(task, eval_name=name, eval_max_new_tokens=task.max_new_tokens)


def _addition(count: int | None, judge: str | None) -> Task:
    count = 512 if count is None else count
    if count > addition.HELD_OUT:
        raise UsageError(f"argument --eval-prompts: expected at most {addition.HELD_OUT} for addition, got {count}")
    if judge is not None:
        raise UsageError(f"argument --judge: expected none beside addition, which has its own, got {judge!r}")
    held_out = [addition.prompt_of(*pair) for pair in addition.held_out_pairs()[:count]]

    def right(index: int, completion: str, ended: bool) -> bool:
        return ended and addition.is_right(held_out[index], completion + addition.END)

    return Task("addition", [*held_out], _draw_additions(), right, max_new_tokens=ADDITION_TOKENS)


def _draw_additions(seen: Collection[str] = ()) -> Callable[[random.Random, int], list[Prompt]]:
    """Additions that are neither held out nor in `seen`."""
    kept_out = frozenset(addition.held_out_pairs()) | {
        addition.operands(key) for key in seen if addition.is_prompt(key)
    }

    def draw(rng: random.Random, wanted: int) -> list[Prompt]:
        return [addition.prompt_of(*pair) for pair in addition.training_pairs(rng, wanted, kept_out)]

    return draw


def _draw_from(training: list[Prompt]) -> Callable[[random.Random, int], list[Prompt]]:
    def draw(rng: random.Random, wanted: int) -> list[Prompt]:
        rounds, rest = divmod(wanted, len(training))
        return training * rounds + rng.sample(training, rest)

    return draw


class _Listed(NamedTuple):
    """Rows of a file or of reasoning-gym."""

    prompts: list[Prompt]
    references: Sequence[Any]  # of each prompt; empty where they are unknown
    judge: Judge | None


def _listed(name: str, argument: str, judge: str | None = None) -> _Listed:
    """The rows of the task called `name`, and how they are judged, which is looked at first."""
    named = None if judge is None else judge_of(judge)
    if name.startswith(GYM):
        gym = _reasoning_gym(name, argument)
        if judge in (None, "reasoning_gym"):
            return _Listed([one.entry["question"] for one in gym], gym, named or SOLVED)
        rows = [Row(one.entry["question"], one.answer) for one in gym]
    else:
        rows = _rows(name, argument)
        if judge == "reasoning_gym":
            raise UsageError(f"argument --judge: expected reasoning_gym beside {GYM}NAME alone, got it beside {name}")
    answers = [row.answer for row in rows]
    if named and None in answers:
        raise UsageError(f"argument --judge: expected an answer in every row of {name}, since {judge} reads it")
    if answers[:1] == [None]:  # all are known, or none is
        return _Listed([row.prompt for row in rows], [], None)
    return _Listed([row.prompt for row in rows], answers, named or ANSWERED)


def _rows(name: str, argument: str) -> list[Row]:
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"argument {argument}: expected addition, reasoning_gym:NAME, or the path of a text, JSONL or Parquet file,"
            f" got {name!r}"
        )
    return read_rows(path, argument)


def _judged(name: str, found: _Listed, chosen: Sequence[int]) -> Task:
    """A task of the chosen rows to be judged on, and nothing to train on yet."""
    prompts = [found.prompts[i] for i in chosen]
    references = [found.references[i] for i in chosen if found.references]
    by, errors = found.judge, Counter[str]()
    if by is None:
        return Task(name, prompts, _draw_from(prompts), None, LISTED_TOKENS)
    for reference in references:
        if not by.reads(reference):
            raise UsageError(f"argument --judge: {name}: expected answers that the judge can read, got {reference!r}")

    def judge(index: int, completion: str, ended: bool) -> float:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a parser that met an answer of another form
                value = float(by.score(completion, references[index]))
            if not 0 <= value <= 1:
                raise ValueError(f"expected a score from 0 to 1, got {value}")
            return value
        except Exception as error:  # several data sets raise on an ordinary wrong answer
            errors[type(error).__name__] += 1
            return 0.0

    return Task(name, prompts, _draw_from(prompts), judge, LISTED_TOKENS, errors=errors)


def _reasoning_gym(name: str, argument: str) -> list[GymEntry]:
    """Different questions of a data set."""
    try:
        import reasoning_gym
    except ImportError:
        raise UsageError(f"argument {argument}: {name} needs reasoning-gym: {install('tasks')}") from None
    try:
        dataset = reasoning_gym.create_dataset(name.removeprefix(GYM), size=GYM_SIZE, seed=SPLIT_SEED)
    except Exception as error:  # ValueError where there is none of the name; some need settings, and assert them
        raise UsageError(f"argument {argument}: expected a reasoning-gym data set, got {name!r} ({error})") from None
    return [GymEntry(dataset, entry) for entry in {entry["question"]: entry for entry in dataset}.values()]
