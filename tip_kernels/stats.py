"""TokenStats, the record that measuring leaves and rules read, and the names of all that can be measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

IGNORE_LABEL = -100  # of a row without a label

STUDENT_FIELDS = frozenset({"lse_s", "entropy_s"})
TEACHER_FIELDS = frozenset({"lse_t", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"})
MARGIN_FIELDS = frozenset({"margin_s", "margin_t", "agree"})
LABEL_FIELDS = frozenset({"logp_s", "logp_t"})
TOP_FIELDS = frozenset({"mass_t_on_top_s", "rank_t_of_argmax_s"})
# What a loss is made from: near a row's largest logit / temperature, and lse - shift, formed before it is rounded
NORMALIZER_FIELDS = frozenset({"shift_s", "shift_t", "logsum_s", "logsum_t"})
# Beside a TopK: the student's logits of its K tokens less shift_s, (N, K), and the same pair of all other tokens
LISTED_FIELDS = frozenset({"topk_logits", "shift_rest", "logsum_rest"})
BEYOND_TOPK = TOP_FIELDS | {"margin_t", "agree", "lse_t"}  # what a TopK does not tell of its teacher
PRIVATE_FIELDS = NORMALIZER_FIELDS | LISTED_FIELDS


class Blend(NamedTuple):
    """Asks for ln sum p_t^a p_s^b, which Renyi and alpha-beta divergences are made of."""

    a: float
    b: float


Fields = dict[str | Blend, Tensor]  # what was measured, (N, ...) each


class _Statistic:
    """A statistic of TokenStats, which is read as an attribute; what to pass to measure it is said where it is not."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, stats: TokenStats | None, owner: type | None = None) -> Tensor:
        if stats is None:
            raise AttributeError(self.name)
        value = stats._measured.get(self.name)
        if value is None:
            raise AttributeError(f"{self.name} was not measured: pass {self.how}")
        return value


class TokenStats:
    """Per-row statistics of a student's and a teacher's next-token distributions.

    Every statistic is a flat (N,) tensor in row order b*T + t, fp32 and in nats unless said. Reading one that was not
    measured raises an AttributeError that says what to pass for it. A row whose logits hold a NaN, a +inf, or nothing
    but -inf is NaN in every statistic that reads it.

    Args:
        **statistics: Statistics by name, (N,) each; None is as good as leaving one out.

    Attributes:
        lse_s: Log of the sum of exponentials of the student's logits / temperature.
        lse_t: The teacher's.
        entropy_s: Entropy of the student.
        entropy_t: Entropy of the teacher.
        kl_fwd: KL(teacher || student), clamped at 0; +inf where the student bans a token that the teacher allows.
        kl_rev: KL(student || teacher), likewise.
        hellinger_sq: 1 - sum sqrt(p_s p_t), in [0, 1], no unit.
        margin_s: Top-1 minus top-2 logit / temperature of the student; +inf with fewer than two finite logits.
        margin_t: The teacher's.
        agree: bool, both models have the same argmax (the lower id wins a tie).
        logp_s: Log-probability of the label under the student; NaN where there is none (-100).
        logp_t: Under the teacher.
        mass_t_on_top_s: Teacher probability on the student's top_k tokens, in [0, 1].
        rank_t_of_argmax_s: int64, the student's argmax in the teacher's top_k, 0 first; top_k if absent.

    Raises:
        TypeError: Naming a statistic that there is none of.
    """

    lse_s = _Statistic("a student")
    lse_t = _Statistic("a teacher with logits")
    entropy_s = _Statistic("a student")
    entropy_t = _Statistic("a teacher")
    kl_fwd = _Statistic("a teacher")
    kl_rev = _Statistic("a teacher")
    hellinger_sq = _Statistic("a teacher")
    margin_s = _Statistic("margins=True")
    margin_t = _Statistic("a teacher and margins=True")
    agree = _Statistic("a teacher and margins=True")
    logp_s = _Statistic("labels")
    logp_t = _Statistic("a teacher and labels")
    mass_t_on_top_s = _Statistic("a teacher and top_k=k")
    rank_t_of_argmax_s = _Statistic("a teacher and top_k=k")

    def __init__(
        self,
        *,
        _measured: Mapping[str | Blend, Tensor] | None = None,
        _temperature: float | Tensor = 1.0,
        _vocab: int = 0,
        _batch_shape: tuple[int, ...] = (),
        _labels: Tensor | None = None,
        _top_k: int = 0,
        _topk_ids: Tensor | None = None,
        _partial: bool = False,
        **statistics: Tensor | None,
    ) -> None:
        """Of statistics by name, (N,) each; None is as good as leaving one out."""
        for name in statistics:
            if name not in STATISTICS:
                raise TypeError(f"TokenStats: expected statistics by name ({', '.join(STATISTICS)}), got {name!r}")
        self._measured: Fields = {**(_measured or {})}
        self._measured.update({name: value for name, value in statistics.items() if value is not None})
        self._temperature = _temperature  # at which they were measured
        self._vocab = _vocab
        self._batch_shape = _batch_shape  # (N,) or (B, T)
        self._labels = _labels  # (N,) int64
        self._top_k = _top_k  # of the top-k statistics
        self._topk_ids = _topk_ids  # (N, K) of the TopK that the student was measured against
        self._partial = _partial  # some rows were left out and are NaN

    def __repr__(self) -> str:
        names = [name for name in STATISTICS if name in self._measured]
        rows = f" of {self._measured[names[0]].shape[0]} rows" if names else ""
        return f"TokenStats({', '.join(names)}){rows}"

    def _get(self, name: str | Blend) -> Tensor | None:
        """A statistic, a blend or a private field (PRIVATE_FIELDS), or None where it was not measured."""
        return self._measured.get(name)


_HOW = {name: value.how for name, value in vars(TokenStats).items() if isinstance(value, _Statistic)}
STATISTICS = tuple(_HOW)  # the names of all


def how_to_measure(name: str) -> str:
    """What to pass to token_stats for a statistic, in words."""
    return f"pass {_HOW[name]}"


def check_label_range(labels: Tensor, vocab: int) -> None:
    """Refuses labels (N,) that are no token, on a CPU; elsewhere looking at them would have to wait."""
    if labels.device.type == "cpu" and labels.numel():
        ok = bool((((labels >= 0) & (labels < vocab)) | (labels == IGNORE_LABEL)).all())
        if not ok:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(
                f"labels: expected values from 0 to {vocab - 1}, or {IGNORE_LABEL} for none, got {low} to {high}"
            )


def blends_of(want: frozenset[str | Blend]) -> frozenset[Blend]:
    return frozenset(name for name in want if isinstance(name, Blend))
