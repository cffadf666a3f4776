"""JSON objects that come from files: strict, because what is read here is drawn, compared or trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tip_kernels.inspect.usage import UsageError


def parse_object(text: str) -> dict:
    """A JSON object of finite numbers; ValueError of any other text, of NaN and infinities, which Python would read."""

    def number(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{word}, which is no finite number")
        return value

    try:
        content = json.loads(text, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"{text.strip()[:40]!r}, which is no object")
    return content


def read_text(path: Path, argument: str) -> str:
    """The UTF-8 text of a file; UsageError where it cannot be read or is something else."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"argument {argument}: expected UTF-8 text in {path}, got: {reason}") from None


def read_object(path: Path, argument: str) -> dict:
    """The JSON object in a file; UsageError where it holds anything else."""
    try:
        return parse_object(read_text(path, argument))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"argument {argument}: expected a JSON object in {path}, got: {error}") from None
