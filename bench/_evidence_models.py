"""The tasks of the evidence runs, and the teachers and students trained for them from nothing.

addition_5, _21, _40   the addition scratchpad (tip_kernels/opd/addition.py) whose lines have so many filler letters
                       that they are 5.7, 21 and 40 % of a completion's tokens. Students were taught to slip: sure
                       and wrong, and unsure and wrong
sorting                six letters of sixteen are to be put in order: `kcdbma>abcdkm$`. No letter is uncertain to the
                       teacher, and the students' errors are their own: they stopped reading early
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

from tip_kernels.opd import addition, retrain
from tip_kernels.opd.addition import END
from tip_kernels.opd.pair import Pair, load_pair
from tip_kernels.opd.retrain import Draw, Recipe, Transcript
from tip_kernels.opd.task import Task, load_task

EVAL_PROMPTS = 512
LETTERS = "abcdefghijklmnop"
WORD = 6
POSITIONS = 64  # of the models
HELD_OUT_SEED = 20260414


@dataclass(frozen=True)
class Language:
    """What a teacher and its students read, and the task they are then put to."""

    characters: str
    teacher_reads: Draw
    student_reads: Draw
    task: Task
    teacher: Recipe = retrain.TEACHER
    student: Recipe = retrain.STUDENT


def _addition(fillers: tuple[int, int, int], name: str) -> Language:
    task = load_task("addition", EVAL_PROMPTS)
    longest = addition.LONGEST - 9 + sum(fillers)
    room = POSITIONS - len(task.held_out[0])
    return Language(
        addition.CHARACTERS,
        retrain.additions(addition.any_slip, unread=True, fillers=fillers),
        retrain.additions(addition.students_slip, unread=False, fillers=fillers),
        replace(task, name=name, max_new_tokens=min(longest + 6, room)),
    )


def _sorting() -> Language:
    rng = random.Random(HELD_OUT_SEED)
    held_out = [_letters(rng) for _ in range(EVAL_PROMPTS)]
    kept_out = frozenset(held_out)

    def draw(rng: random.Random, count: int) -> list[str]:
        prompts: list[str] = []
        while len(prompts) < count:
            prompt = _letters(rng)
            if prompt not in kept_out:
                prompts.append(prompt)
        return prompts

    def read(rng: random.Random, count: int) -> list[Transcript]:
        return [Transcript(prompt, _sorted(prompt) + END, [True] * (WORD + 1)) for prompt in draw(rng, count)]

    def judge(index: int, completion: str, ended: bool) -> bool:
        return ended and completion == _sorted(held_out[index])

    task = Task("sorting", held_out, draw, judge, max_new_tokens=WORD + 4)
    return Language(LETTERS + ">" + END, read, read, task, student=replace(retrain.STUDENT, steps=70))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=WORD)) + ">"


def _sorted(prompt: str) -> str:
    return "".join(sorted(prompt.removesuffix(">")))


LANGUAGES: dict[str, Callable[[], Language]] = {
    "addition_21": partial(_addition, (3, 3, 3), "addition_21"),
    "addition_5": partial(_addition, (1, 0, 1), "addition_5"),
    "addition_40": partial(_addition, (7, 8, 7), "addition_40"),
    "sorting": _sorting,
}


def train(name: str, side: str, seed: int, folder: Path) -> dict:
    """Trains one model into `folder` and returns what is written to its record.json."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    language = LANGUAGES[name]()
    tokenizer = retrain.character_tokenizer(language.characters)
    recipe = language.teacher if side == "teacher" else language.student
    reads = language.teacher_reads if side == "teacher" else language.student_reads
    model = retrain.read(recipe, tokenizer, seed, reads, report=lambda line: None)
    model = model.eval().half().float()  # as it will be loaded
    record = {
        "task": name,
        "side": side,
        "seed": seed,
        "accuracy": retrain.greedy_accuracy(model, tokenizer, language.task),
        "recipe": asdict(recipe),
    }
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "record.json").write_text(json.dumps(record))
    return record


def folder_of(models: Path, name: str, side: str, seed: int) -> Path:
    return models / f"{name}-{side}-{seed}"


def pair_of(models: Path, name: str, seed: int, device: torch.device) -> Pair:
    """The task's teacher, which all students share, and the student of this seed."""
    return load_pair(folder_of(models, name, "teacher", 0), folder_of(models, name, "student", seed), device)
