"""What an answer is worth: judges by name, each of a completion and its reference, from 0 (wrong) to 1 (right)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd import boxed

Score = Callable[[str, Any], float]  # (completion, reference); what it raises is a wrong answer, and counted


class GymEntry(NamedTuple):
    """The reference of a reasoning-gym prompt: a question with what its data set scores answers by."""

    dataset: Any
    entry: dict[str, Any]

    @property
    def answer(self) -> str | None:
        """The answer that the data set states; some state none."""
        stated = self.entry.get("answer")
        return None if stated is None else str(stated)


def answered(completion: str, reference: str) -> float:
    """The completion, or what follows its last `>`, is the answer, blanks at the ends aside."""
    completion = completion.strip()
    return float(reference.strip() in (completion, completion.rsplit(">", 1)[-1].strip()))


def exact(completion: str, reference: str) -> float:
    """The completion is the answer, blanks at the ends aside."""
    return float(completion.strip() == reference.strip())


def reasoning_gym(completion: str, reference: GymEntry) -> float:
    """The data set's own score, of which some are parts of 1."""
    return reference.dataset.score_answer(completion.strip(), reference.entry)


def solved(completion: str, reference: GymEntry) -> float:
    """1 where the data set's own score is."""
    return float(reasoning_gym(completion, reference) >= 1.0)


def rouge_l(completion: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed words (ROUGE-L, by rouge-score)."""
    return _rouge().score(reference, completion)["rougeL"].fmeasure


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    return RougeScorer(["rougeL"], use_stemmer=True)


def _has_words(reference: str) -> bool:
    """Whether ROUGE sees anything: its words are of a-z and digits."""
    from rouge_score.tokenize import tokenize  # pyright: ignore[reportMissingImports]

    return bool(tokenize(reference, None))


@dataclass(frozen=True)
class Judge:
    """A score and what it takes."""

    score: Score
    module: str | None = None  # that must be installed,
    package: str = ""  # what that is called,
    extra: str = ""  # and what brings it
    reads: Callable[[Any], bool] = lambda reference: True  # whether it can judge by a reference


JUDGES = {
    "exact": Judge(exact),
    "boxed": Judge(boxed.score, "math_verify", "math-verify", "judges", boxed.reads),
    "reasoning_gym": Judge(reasoning_gym, "reasoning_gym", "reasoning-gym", "tasks"),
    "rouge_l": Judge(rouge_l, "rouge_score", "rouge-score", "judges", _has_words),
}


ANSWERED, SOLVED = Judge(answered), Judge(solved)  # of files and of reasoning-gym, where none is named


def judge_of(name: str) -> Judge:
    """The judge called `name`; UsageError where there is none, or not what it needs."""
    if name not in JUDGES:
        raise UsageError(f"argument --judge: expected one of {', '.join(JUDGES)}, got {name!r}")
    judge = JUDGES[name]
    if judge.module and importlib.util.find_spec(judge.module) is None:
        raise UsageError(f"argument --judge: {name} needs {judge.package}: {install(judge.extra)}")
    return judge


def standard_error(scores: Sequence[float], prompts: Sequence[Hashable]) -> float | None:
    """Of the mean of scores, those of one prompt (its samples, repeated rows) being one cluster; None of one prompt.

    With as many scores of each of n prompts it is the sample deviation of their means over sqrt(n). Source: Miller,
    "Adding Error Bars to Evals" (arXiv 2411.00640), clustered standard errors, with the correction C / (C - 1).
    """
    mean, residuals = math.fsum(scores) / len(scores), dict[Hashable, float]()
    for score, prompt in zip(scores, prompts, strict=True):
        residuals[prompt] = residuals.get(prompt, 0.0) + score - mean
    clusters = len(residuals)
    if clusters < 2:
        return None
    return math.sqrt(clusters / (clusters - 1) * math.fsum(r * r for r in residuals.values())) / len(scores)
