"""What serving engines say of a prompt's tokens, in one form.

    vLLM, engine   a list over positions of None or {token id: an object with .logprob}
    vLLM, HTTP     the same as JSON: {"token id": {"logprob": ...}}, with -9999.0 in place of -inf
    vLLM, flat     start_indices, end_indices, token_ids, logprobs of all positions, the prompt's own token first, which
                   stands there twice where it is among the likeliest; an object or a dict of them
    SGLang         `input_top_logprobs`: a list over positions of None or [(logprob, token id, text), ...]
                   `input_token_logprobs`: a list over positions of one (logprob, token id, text)

The first position has no log-probabilities in any of them: nothing comes before it. That tells a sequence from a list
of sequences, and completions, whose first position has some, from prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from tip_kernels._checks import describe

Entries = dict[int, float]  # token id: log-probability
FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")
VLLM_MINUS_INFINITY = -9999.0  # JSON knows no infinity
FORM = (
    "prompt_logprobs as vLLM or SGLang return them: over positions None, {token id: log-probability} or "
    "[(log-probability, token id, text), ...]; or a list of such lists"
)


def sequences_of(prompt_logprobs: Any) -> tuple[list[list[Entries]], bool]:
    """The entries of every position of every sequence, and whether there were several sequences."""
    if _is_sequence(prompt_logprobs):
        return [_positions(prompt_logprobs)], False
    if not _is_list(prompt_logprobs):
        _refuse(prompt_logprobs)
    for index, sequence in enumerate(prompt_logprobs):
        if not _is_sequence(sequence):
            first = "whose first position is None" if index == 0 else f"beside those before it, in place {index}"
            _refuse(sequence, first)
    return [_positions(sequence) for sequence in prompt_logprobs], True


def _is_sequence(value: Any) -> bool:
    """Whether value is all of one sequence: nothing is said of its first position."""
    if _flat(value) is not None:
        return True
    if not _is_list(value) or _is_triple(value):
        return False
    first = value[0] if len(value) else None
    return first is None or (isinstance(first, Mapping) and not first) or (_is_triple(first) and first[0] is None)


def _positions(sequence: Any) -> list[Entries]:
    flat = _flat(sequence)
    if flat is not None:
        pairs = list(zip(flat["token_ids"], flat["logprobs"], strict=True))
        bounds = zip(flat["start_indices"], flat["end_indices"], strict=True)
        positions = [_entries(pairs[start:end]) for start, end in bounds]
        if positions and positions[0]:
            _refuse(sequence, "whose first position is empty")
        return positions
    return [{}, *[_position(value) for value in sequence[1:]]] if len(sequence) else []


def _position(value: Any) -> Entries:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return _entries(value.items())
    if _is_triple(value):
        return _entries([(value[1], value[0])])
    if not _is_list(value) or not all(_is_triple(entry) for entry in value):
        _refuse(value)
    return _entries([(entry[1], entry[0]) for entry in value])


def _entries(pairs: Iterable[tuple[Any, Any]]) -> Entries:
    found: Entries = {}
    for token, value in pairs:
        value = value.get("logprob") if isinstance(value, Mapping) else getattr(value, "logprob", value)
        if value is None:
            _refuse((token, value))
        try:
            token, logp = int(token), float(value)
        except (TypeError, ValueError):
            _refuse((token, value))
        if token < 0:
            _refuse((token, value), "of token ids from 0")
        logp = -math.inf if logp == VLLM_MINUS_INFINITY else logp
        if found.setdefault(token, logp) != logp and not math.isnan(logp):
            raise ValueError(f"prompt_logprobs: expected one log-probability of token {token} at a position, got two")
    return found


def _flat(value: Any) -> Mapping[str, Sequence] | None:
    """The arrays of vLLM's flat form."""
    if isinstance(value, Mapping):
        return value if all(name in value for name in FLAT) else None
    return {name: getattr(value, name) for name in FLAT} if all(hasattr(value, name) for name in FLAT) else None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_triple(value: Any) -> bool:
    """Whether value is (log-probability or None, token id, text or None), or the first two of them."""
    if not _is_list(value) or len(value) not in (2, 3):
        return False
    logp, token = value[0], value[1]
    number = logp is None or (isinstance(logp, (int, float)) and not isinstance(logp, bool))
    return number and isinstance(token, int) and not isinstance(token, bool)


def _refuse(value: Any, which: str = "") -> NoReturn:
    raise ValueError(f"prompt_logprobs: expected {FORM}{', ' if which else ''}{which}, got {describe(value)}")
