"""Rows of a file of prompts: text, JSONL or Parquet. Strict, because what is read here is trained on and judged."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tip_kernels.inspect.objects import parse_object, read_text
from tip_kernels.inspect.usage import UsageError, install

COLUMNS = ("prompt", "answer")
Prompt = str | list[dict[str, str]]  # text, or messages {"role": text, "content": text}


class Row(NamedTuple):
    """A prompt and, where it is known, its answer."""

    prompt: Prompt
    answer: str | None = None


def key_of(prompt: Prompt) -> str:
    """The same for prompts that are one and the same; a user's message alone is its text."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def text_of(prompt: Prompt) -> str:
    """A prompt to be looked at."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def read_rows(path: Path, argument: str) -> list[Row]:
    """Every row of the file, repeated ones too. UsageError, which names `argument` and the row, for anything else."""
    where = f"argument {argument}: {path}"
    kind = path.suffix.lower()
    if kind == ".parquet":
        entries: Iterator[tuple[str, dict[str, Any]]] = _parquet(path, where)
    elif kind in (".jsonl", ".json"):
        entries = _jsonl(read_text(path, argument), where)
    else:
        lines = read_text(path, argument).split("\n")  # splitlines would cut at form feeds, too
        return [Row(line) for line in lines if line.strip()]
    rows = [_row(entry, place) for place, entry in entries]
    known = sum(row.answer is not None for row in rows)
    if 0 < known < len(rows):
        raise UsageError(
            f"{where}: expected an answer in every row or in none, got {known} answers in {len(rows)} rows"
        )
    return rows


def _jsonl(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            entry = parse_object(line)
        except ValueError as error:
            wanted = 'expected {"prompt": text} or {"prompt": text, "answer": text} in each line'
            raise UsageError(f"{place}: {wanted}, got {error}") from None
        yield place, entry


def _parquet(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{where} needs pyarrow: {install('data')}") from None
    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise UsageError(f"{where}: expected a Parquet file, got {' '.join(str(error).split())[:200]}") from None
    _check_keys(table.column_names, where)
    for number, entry in enumerate(table.to_pylist(), start=1):
        yield f"{where}, row {number}", entry


def _check_keys(keys: Collection[str], where: str) -> None:
    if "prompt" not in keys:
        raise UsageError(f"{where}: expected 'prompt', got {', '.join(map(repr, keys)) or 'nothing'}")
    if unknown := [key for key in keys if key not in COLUMNS]:
        raise UsageError(f"{where}: expected 'prompt' and perhaps 'answer', got {unknown[0]!r}")


def _row(entry: dict[str, Any], where: str) -> Row:
    _check_keys(entry, where)
    prompt, answer = entry["prompt"], entry.get("answer")
    if not isinstance(prompt, str):
        _check_messages(prompt, where)
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise UsageError(f"{where}: expected an answer of text or a number, got {str(answer)[:80]!r}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UsageError(f"{where}: expected an answer of text or a finite number, got {answer}")
    return Row(prompt, None if answer is None else str(answer))


def _check_messages(turns: Any, where: str) -> None:
    """Messages of a role and a content, the last of which wants an answer."""
    wanted = 'expected a prompt of text or of messages {"role": text, "content": text}'
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{where}: {wanted}, got {json.dumps(turns, default=str)[:80]}")
    for turn in turns:
        sound = isinstance(turn, dict) and turn.keys() == {"role", "content"}
        if not sound or not all(isinstance(part, str) for part in turn.values()):
            raise UsageError(f"{where}: {wanted}, got a message {json.dumps(turn, default=str)[:80]}")
    if turns[-1]["role"] == "assistant":
        raise UsageError(f"{where}: expected messages that the assistant is to answer, got its own as the last")
