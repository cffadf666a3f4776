"""The addition scratchpad: three-digit sums written out column by column, one character a token.

    864+394=  ->  4+4+0=08bde;6+9+0=15ffb;8+3+1=12gcb;>1258$

A line is `x+y+carry=` with the column's sum in two digits, three random filler letters and `;`, least significant
column first; the number read off the lines follows `>`, and `$` ends the text. Every kind of token is in it: columns
both models know (Q4), fillers nobody can know (Q2), and the columns in which the packaged student was taught to slip:

    both digits >= 6     it forgets the ten, 99 times in 100            (sure and wrong: Q3)
    x <= 3 and y >= 7    it is one short, every other time              (unsure and wrong: Q1)

The hundredth is there because a student that has never written the ten gives it a probability near 1e-4, and the
gradient of reverse KL, which carries the student's own probability, then takes hundreds of steps to find it.
"""

from __future__ import annotations

import random
import re

TRACE = (
    "864+394= is answered 4+4+0=08bde;6+9+0=15ffb;8+3+1=12gcb;>1258$: a column a line, the ones first, digit + digit "
    "+ carry = sum in two places, three letters at random that nobody can know, and at last the answer between > and $."
)
FILLERS = "abcdefgh"
CHARACTERS = "0123456789+=;>$" + FILLERS
END = "$"
HELD_OUT = 4096  # prompts that no training ever sees; a run is evaluated on the first few of them
HELD_OUT_SEED = 20260414
LONGEST = 42  # characters of the longest completion

_PROMPT = re.compile(r"(\d{3})\+(\d{3})=")
_LINE = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)([a-h]{3});")


def prompt_of(a: int, b: int) -> str:
    """`a+b=` for two numbers of three digits."""
    return f"{a}+{b}="


def operands(prompt: str) -> tuple[int, int]:
    """The two numbers of a prompt; ValueError where it is none."""
    found = _PROMPT.fullmatch(prompt)
    if not found:
        raise ValueError(f"prompt: expected like '864+394=', got {prompt!r}")
    return int(found[1]), int(found[2])


def is_prompt(text: str) -> bool:
    """Whether `operands` reads it."""
    return _PROMPT.fullmatch(text) is not None


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digit pairs, least significant first."""
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(3)]


def write(
    a: int, b: int, rng: random.Random, slip=None, fillers: tuple[int, int, int] = (3, 3, 3)
) -> tuple[str, list[bool]]:
    """The completion of `a+b=`, and for each character whether it follows from what stands before it.

    `slip(x, y, total, rng)` returns the total that is written for a column: the true one by default. Carries and the
    answer follow what was written, as they do when a model reads its own text. A slipped total's two digits are False.
    `fillers` is how many letters each line has.
    """
    text, sound, carry, answer = "", [], 0, 0
    for place, (x, y) in enumerate(columns(a, b)):
        total = x + y + carry
        written = slip(x, y, total, rng) if slip else total
        filler = "".join(rng.choices(FILLERS, k=fillers[place]))
        text += f"{x}+{y}+{carry}={written:02d}{filler};"
        sound += [True] * 6 + [written == total] * 2 + [True] * (len(filler) + 1)
        carry = written // 10
        answer += (written if place == 2 else written % 10) * 10**place
    tail = f">{answer}{END}"
    return text + tail, sound + [True] * len(tail)


def students_slip(x: int, y: int, total: int, rng: random.Random) -> int:
    """What the packaged student was taught to write."""
    if x >= 6 and y >= 6 and rng.random() < 0.99:
        return total - 10
    if x <= 3 and y >= 7 and rng.random() < 0.5:
        return total - 1
    return total


def any_slip(x: int, y: int, total: int, rng: random.Random) -> int:
    """One column in six is off: the teacher must stay right about what follows a student's slip."""
    if rng.random() >= 1 / 6:
        return total
    return rng.choice([wrong for wrong in (total - 10, total - 1, total + 1) if 1 <= wrong <= 19])


def lines_of(completion: str) -> list[tuple[int, int, int, int, str]]:
    """The (x, y, carry, total, fillers) of each well-formed line, in the order written."""
    return [(int(x), int(y), int(c), int(s), f) for x, y, c, s, f in _LINE.findall(completion)]


def is_right(prompt: str, completion: str) -> bool:
    """Whether the number between the last `>` and `$` is the sum; how it was reached does not count."""
    found = re.search(r">(\d+)\$$", completion)
    return bool(found) and int(found[1]) == sum(operands(prompt)) and not found[1].startswith("0")


def held_out_pairs() -> list[tuple[int, int]]:
    """The HELD_OUT pairs that are kept from every training, in a fixed order."""
    rng = random.Random(HELD_OUT_SEED)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < HELD_OUT:
        pairs[rng.randint(100, 999), rng.randint(100, 999)] = None
    return list(pairs)


def training_pairs(rng: random.Random, count: int, held_out: frozenset[tuple[int, int]]) -> list[tuple[int, int]]:
    """`count` pairs drawn evenly from those that are not held out."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        pair = rng.randint(100, 999), rng.randint(100, 999)
        if pair not in held_out:
            pairs.append(pair)
    return pairs
