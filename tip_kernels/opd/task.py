"""What is trained on: the built-in addition, a file of prompts, or a reasoning-gym data set.

A task gives prompts and, where it knows the answers, a judge. Held-out prompts are disjoint from what training draws
and are chosen by a fixed seed, so every run of a task is judged on the same prompts.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tip_kernels._checks import not_none
from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd import addition

SPLIT_SEED = 20260414
GYM_SIZE = 4096
NONSENSE = ("?", "qwxz", "I do not know.")  # answers to nothing, tried on so many held-out prompts:
NONSENSE_PROMPTS = 64


@dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts to be judged on, and the judge."""

    name: str
    held_out: list[str]
    draw: Callable[[random.Random, int], list[str]]  # (generator, count) -> training prompts
    judge: (
        Callable[[int, str, bool], bool] | None
    )  # (index into held_out, completion, it ended by itself) -> it is right
    max_new_tokens: int
    listed: tuple[str, ...] = ()  # every training prompt, where there is a list of them
    errors: Counter[str] = field(default_factory=Counter)  # what judging raised, by type: each a wrong answer

    def nonsense_right(self) -> float:
        """The share of answers to nothing that are right all the same, of a judge that reads them about 0."""
        if self.judge is None:
            return 0.0
        asked = range(min(NONSENSE_PROMPTS, len(self.held_out)))
        verdicts = [self.judge(i, text, True) for i in asked for text in NONSENSE]
        return sum(verdicts) / len(verdicts)


def load_task(name: str, eval_prompts: int | None) -> Task:
    """The task called `name`: "addition", "reasoning_gym:NAME", or the path of a text or JSONL file.

    `eval_prompts` is how many prompts are held out; None is 512, or a fifth of a shorter list.
    """
    if name == "addition":
        return _addition(512 if eval_prompts is None else eval_prompts)
    if name.startswith("reasoning_gym:"):
        return _reasoning_gym(name, eval_prompts)
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"argument --task: expected addition, reasoning_gym:NAME, or the path of a text or JSONL file, got {name!r}"
        )
    entries = _read_jsonl(path) if path.suffix in (".jsonl", ".json") else _read_lines(path)
    answers = dict(entries)
    known = sum(answer is not None for answer in answers.values())
    if 0 < known < len(answers):
        raise UsageError(f"argument --task: {path}: expected an answer in every row or in none, got {known} answers")
    known_answers = {prompt: answer for prompt, answer in answers.items() if answer is not None}
    judge = (lambda prompt, completion: _agrees(known_answers[prompt], completion)) if known else None
    return _from_list(name, list(answers), eval_prompts, judge)


def _addition(count: int) -> Task:
    if count > addition.HELD_OUT:
        raise UsageError(f"argument --eval-prompts: expected at most {addition.HELD_OUT} for addition, got {count}")
    pairs = addition.held_out_pairs()
    kept_out = frozenset(pairs)
    held_out = [addition.prompt_of(*pair) for pair in pairs[:count]]

    def draw(rng: random.Random, wanted: int) -> list[str]:
        return [addition.prompt_of(*pair) for pair in addition.training_pairs(rng, wanted, kept_out)]

    def judge(index: int, completion: str, ended: bool) -> bool:
        return ended and addition.is_right(held_out[index], completion + addition.END)

    return Task("addition", held_out, draw, judge, max_new_tokens=48)


def _from_list(name: str, prompts: list[str], count: int | None, right: Callable[[str, str], bool] | None) -> Task:
    """Split distinct prompts into held-out and training; `right(prompt, completion)` judges."""
    if len(prompts) < 2:
        raise UsageError(f"argument --task: expected at least two different prompts in {name}, got {len(prompts)}")
    count = min(512, max(1, len(prompts) // 5)) if count is None else count
    if count >= len(prompts):
        raise UsageError(
            f"argument --eval-prompts: expected fewer than the {len(prompts)} different prompts of {name}, got {count}"
        )
    order = random.Random(SPLIT_SEED).sample(prompts, len(prompts))
    held_out, training = order[:count], order[count:]

    def draw(rng: random.Random, wanted: int) -> list[str]:
        rounds, rest = divmod(wanted, len(training))
        return training * rounds + rng.sample(training, rest)

    def judge(index: int, completion: str, ended: bool) -> bool:
        return not_none(right)(held_out[index], completion)

    return Task(name, held_out, draw, judge if right else None, max_new_tokens=256, listed=tuple(training))


def _agrees(answer: str, completion: str) -> bool:
    """The completion, or what follows its last `>`, is the answer, blanks at the ends aside."""
    completion = completion.strip()
    return answer.strip() in (completion, completion.rsplit(">", 1)[-1].strip())


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"argument --task: expected UTF-8 text in {path}, got {error}") from None


def _read_lines(path: Path) -> list[tuple[str, None]]:
    return [(line, None) for line in _text_of(path).splitlines() if line.strip()]


def _read_jsonl(path: Path) -> list[tuple[str, str | None]]:
    expected = 'expected {"prompt": text} or {"prompt": text, "answer": text} in each line'
    entries = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"argument --task: {path}, line {number}: {expected}, got {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UsageError(f"argument --task: {path}, line {number}: {expected}, got {line[:80]!r}")
        answer = row.get("answer")
        entries.append((row["prompt"], None if answer is None else str(answer)))
    return entries


def _reasoning_gym(name: str, count: int | None) -> Task:
    try:
        import reasoning_gym
    except ImportError:
        raise UsageError(f"argument --task: {name} needs reasoning-gym: {install('tasks')}") from None
    try:
        dataset = reasoning_gym.create_dataset(name.split(":", 1)[1], size=GYM_SIZE, seed=SPLIT_SEED)
    except Exception as error:  # ValueError where there is none of the name; some need settings, and assert them
        raise UsageError(f"argument --task: expected a reasoning-gym data set, got {name!r} ({error})") from None
    entries = {entry["question"]: entry for entry in dataset}
    errors: Counter[str] = Counter()

    def right(prompt: str, completion: str) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a parser that met an answer of another form
                return dataset.score_answer(completion.strip(), entries[prompt]) >= 1.0
        except Exception as error:  # several data sets raise on an ordinary wrong answer
            errors[type(error).__name__] += 1
            return False

    return replace(_from_list(name, list(entries), count, right), errors=errors)
