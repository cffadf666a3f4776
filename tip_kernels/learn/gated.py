"""A sum of divergences whose coefficients are of each row, learned in one gradient sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, finite_number, flat_rows, refuse
from tip_kernels.learn.divergences import Divergence, ForwardKL, Gate, ReverseKL
from tip_kernels.select.weights import Indicator
from tip_kernels.stats import STATISTICS, STUDENT_FIELDS, TEACHER_FIELDS, Blend, TokenStats

GATES = (*FLOATS, torch.bool)


@dataclass(frozen=True, eq=False)
class Gated(Divergence):
    """sum over the gates of gate_i * divergence_i, gate_i a number of each row; R42.

        tip.Gated({tip.ReverseKL(): 1.0, tip.ForwardKL(): lambda stats, *_: stats.entropy_t > 0.8})

    No gradient flows through a gate. Where a gate is 0 its divergence is left out, even one that is infinite or NaN; a
    row with a gate that is NaN or infinite has no finite loss, and `distill` drops and counts it if it is kept. The
    gates are computed once for the batch, in which they may compare rows: `distill` takes one sweep where they read no
    statistics, else two. A new number in the same place does not compile anything again.

    Args:
        gates: {divergence: gate}, at least one. A gate is a number of at least 0; a float or bool tensor (), (N,) or
            (B, T); or a callable `(stats, row_mask, rollout_ids) -> (N,)` without a graph, such as those of
            tip_kernels.weights: what its `needs` name is measured of all rows (without that attribute: both lse,
            entropies and KLs, hellinger_sq and what labels add), at 1.0 where the temperature is a callable.
            A divergence is any but a clipped one or another Gated.
        max_per_row: Caps the sum in each row, in nats above 0; None for no cap. `clipped` sets it.

    Raises:
        ValueError: Naming the argument; for what a callable returns, when it is called.
    """

    gates: Mapping[Divergence, Gate]
    max_per_row: float | None = None
    needs: frozenset[str | Blend] = field(init=False, repr=False)
    term_gates: tuple[Gate, ...] = field(init=False, repr=False)
    _terms: tuple[tuple[float, Divergence], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ok = isinstance(self.gates, Mapping) and len(self.gates) > 0
        expect(ok, "gates", "a dict {divergence: gate} of at least one", self.gates)
        terms: list[tuple[float, Divergence]] = []
        gates: list[Gate] = []
        for divergence, gate in self.gates.items():
            if not isinstance(divergence, Divergence):
                refuse("gates", "divergences such as tip_kernels.ReverseKL() as keys", divergence)
            plain = divergence.max_per_row is None and not divergence.term_gates
            expect(plain, "gates", "divergences that are not clipped and hold no gates", divergence)
            terms += divergence.terms
            gates += [_checked_gate(gate)] * len(divergence.terms)
        object.__setattr__(self, "_terms", tuple(terms))
        object.__setattr__(self, "term_gates", tuple(gates))
        object.__setattr__(self, "needs", frozenset().union(*(term.needs for _, term in terms)))
        if self.max_per_row is not None:
            finite_number("max_per_row", self.max_per_row, positive=True)

    @classmethod
    def eopd(cls, threshold: float = 0.8, weight: float = 1.0) -> Gated:
        """KL(s||t), and weight * KL(t||s) where the teacher's entropy is above the threshold.

        Source: entropy-aware OPD (arXiv 2603.07079). Its code estimates the first by the sampled token alone, clipped,
        and sums the second over the teacher's 16 likeliest tokens; here both are of the whole distributions.

        Args:
            threshold: Entropy of the teacher, in nats.
            weight: Above 0: of the forward KL.

        Raises:
            ValueError: Naming the argument.
        """
        unsure = Indicator("entropy_t", above=finite_number("threshold", threshold))
        return cls({ReverseKL(): 1.0, finite_number("weight", weight, positive=True) * ForwardKL(): unsure})

    @property
    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        return self._terms

    def at(self, stats: TokenStats, row_mask: Tensor | None = None, rollout_ids: Tensor | None = None) -> Gated:
        """The same with what its gates make of statistics: for divergence_loss, where rows are masked or of rollouts.

        Args:
            stats: TokenStats with every field that the gates need, (N,) each.
            row_mask: bool (N,) or (B, T), True for trainable tokens.
            rollout_ids: int64 (N,) or (B, T), the rollout of each row.

        Raises:
            ValueError: As a gate of statistics does.
        """
        with torch.no_grad():
            made = {d: gate(stats, row_mask, rollout_ids) if callable(gate) else gate for d, gate in self.gates.items()}
        return Gated(made, self.max_per_row)

    def clipped(self, max_per_row: float) -> Gated:
        return Gated(self.gates, finite_number("max_per_row", max_per_row, positive=True))


def _checked_gate(gate: Gate) -> Gate:
    """A number as a tensor, which torch.compile takes for an input; anything else as it is."""
    if callable(gate):
        check_needs("gates", gate)
        return gate
    if isinstance(gate, Tensor):
        expect(gate.dtype in GATES, "gates", "float or bool tensors", gate)
        return gate
    number = finite_number("gates", gate)
    expect(number >= 0, "gates", "numbers of at least 0", gate)
    return torch.tensor(number)


def check_needs(name: str, reader: object) -> None:
    """Refuses a callable of statistics whose `needs` are none."""
    needs = getattr(reader, "needs", frozenset())
    known = isinstance(needs, (set, frozenset)) and needs <= set(STATISTICS)
    if not known:
        refuse(name, f"a callable whose needs are a set of statistics ({', '.join(STATISTICS)})", needs)


def readers_of(divergence: Divergence) -> tuple[Callable[..., Tensor], ...]:
    """The gates that are callables of statistics, each once."""
    readers: list[Callable[..., Tensor]] = []
    for gate in divergence.term_gates:
        if callable(gate) and not any(gate is reader for reader in readers):
            readers.append(gate)
    return tuple(readers)


def statistics_read(reader: object) -> frozenset[str]:
    """The statistics that a callable reads, where it says so; else all of a sweep without labels and lists."""
    return frozenset(getattr(reader, "needs", STUDENT_FIELDS | TEACHER_FIELDS))


def gates_of(
    divergence: Divergence,
    stats: TokenStats,
    row_mask: Tensor | None,
    rollout_ids: Tensor | None,
    batch_shape: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """What multiplies each term of the divergence, (N,) fp32 each; () where nothing does."""
    found: list[tuple[Gate, Tensor]] = []
    with torch.no_grad():
        for gate in divergence.term_gates:
            rows = next((rows for known, rows in found if known is gate), None)
            if rows is None:
                given = gate(stats, row_mask, rollout_ids) if callable(gate) else gate
                rows = _gate_of_rows(given, batch_shape, device)
            found.append((gate, rows))
    return tuple([rows for _, rows in found])


def _gate_of_rows(gate: Any, batch_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) fp32."""
    if isinstance(gate, Tensor) and gate.dim() == 0 and gate.dtype in GATES:
        return torch.ones(math.prod(batch_shape), device=device) * gate
    return flat_rows("gates", gate, batch_shape, GATES, device).float()
