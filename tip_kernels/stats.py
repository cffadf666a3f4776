"""MEASURE: the statistics of every row in one pass over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tip_kernels._checks import expect, flag, flat_rows, is_int, row_temperature, workspace_bytes
from tip_kernels.backends.eager.online import Blend
from tip_kernels.measure.sweep import (
    LABEL_FIELDS,
    MARGIN_FIELDS,
    PRIVATE_FIELDS,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    TOP_FIELDS,
    check_label_range,
    measure,
)
from tip_kernels.sources.rows import Head, Rows, pair_of, rows_of
from tip_kernels.sources.topk import TopK, TopKRows, check_request


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per-row statistics of a student's and a teacher's next-token distributions.

    Every public field is a flat (N,) tensor in row order b*T + t, fp32 and in nats unless said, or None where it was
    not asked for. A row whose logits hold a NaN, a +inf, or nothing but -inf is NaN in every statistic that reads it.
    """

    lse_s: Tensor | None = None  # log of the sum of exponentials of the student's logits / temperature
    lse_t: Tensor | None = None  # the same of the teacher
    entropy_s: Tensor | None = None
    entropy_t: Tensor | None = None
    kl_fwd: Tensor | None = None  # KL(teacher || student), clamped at 0; +inf where the student bans a teacher token
    kl_rev: Tensor | None = None  # KL(student || teacher), clamped at 0
    hellinger_sq: Tensor | None = None  # 1 - sum sqrt(p_s p_t), in [0, 1], no unit
    margin_s: Tensor | None = None  # top-1 minus top-2 logit / temperature; +inf with fewer than two finite logits
    margin_t: Tensor | None = None
    agree: Tensor | None = None  # bool: both models have the same argmax (the lower id wins a tie)
    logp_s: Tensor | None = None  # log-probability of the label; NaN where the label is -100
    logp_t: Tensor | None = None
    mass_t_on_top_s: Tensor | None = None  # teacher probability on the student's top_k tokens, in [0, 1]
    rank_t_of_argmax_s: Tensor | None = (
        None  # int64: the student's argmax in the teacher's top_k, 0 first; top_k if absent
    )
    _shift_s: Tensor | None = field(default=None, repr=False)  # (N,) near the largest logit / temperature
    _shift_t: Tensor | None = field(default=None, repr=False)
    _logsum_s: Tensor | None = field(default=None, repr=False)  # (N,) lse - shift, formed before it is rounded into lse
    _logsum_t: Tensor | None = field(default=None, repr=False)
    _listed: Tensor | None = field(default=None, repr=False)  # (N, K) student's logits of a TopK's tokens, less shift_s
    _shift_rest: Tensor | None = field(default=None, repr=False)  # (N,) shift and logsum of all other tokens
    _logsum_rest: Tensor | None = field(default=None, repr=False)
    _temperature: float | Tensor = field(default=1.0, repr=False)
    _vocab: int = field(default=0, repr=False)
    _batch_shape: tuple[int, ...] = field(default=(), repr=False)  # (N,) or (B, T)
    _labels: Tensor | None = field(default=None, repr=False)  # (N,) int64
    _top_k: int = field(default=0, repr=False)  # of the top-k statistics
    _listed_ids: Tensor | None = field(default=None, repr=False)  # (N, K) of the TopK it was measured against
    _partial: bool = field(default=False, repr=False)  # some rows were left out and are NaN
    _blends: dict[Blend, Tensor] = field(default_factory=dict, repr=False)  # ln sum p_t^a p_s^b, each (N,)

    def _get(self, name: str | Blend) -> Tensor | None:
        """A measured value by the name that `measure` gives it, or None."""
        if isinstance(name, Blend):
            return self._blends.get(name)
        return getattr(self, f"_{name}" if name in PRIVATE_FIELDS else name)


def token_stats(
    student: Tensor | Head,
    teacher: Tensor | Head | TopK | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    margins: bool = False,
    top_k: int = 0,
    workspace_mib: float = 256,
) -> TokenStats:
    """Measures every row in one pass over the vocabulary, without materialising a softmax (or, of a Head, the logits).

        lse = log sum exp z                        entropy = lse - sum p z              z = logits / temperature
        kl_fwd = sum p_t (log p_t - log p_s)       kl_rev = sum p_s (log p_s - log p_t)
        hellinger_sq = 1 - sum sqrt(p_t p_s)

    student, teacher  logits (N, V) or (B, T, V), or a Head; float32, bfloat16 or float16, each its own. The teacher may
                      be a TopK, whose docstring says what the statistics then mean
    labels            int64 (N,) or (B, T): the token that each row predicts (already shifted), -100 for none; adds logp
    temperature       a positive float, or a float tensor (N,) or (B, T); divides both models' logits
    margins           adds margin_s, margin_t and agree
    top_k             k of the top-k statistics mass_t_on_top_s and rank_t_of_argmax_s, which need a teacher; 0 is none
    workspace_mib     MiB that the pass may use beyond its inputs and (N,) results

    Returns a TokenStats of (N,) fp32 fields, also under autocast. KLs are clamped at 0; their noise floor is about
    1e-7 nats. A logit at or below -2^100 counts as -inf, a banned token: legal in either model, and a KL is +inf
    exactly where its second model bans a token that its first allows. No gradient flows. Does not synchronise; labels
    and temperatures are range-checked on a CPU, on CUDA a bad one makes its row NaN.

    Raises ValueError naming the argument. Method: online softmax with recentred moments (backends/eager).
    """
    rows_s, rows_t = (rows_of(student, "student"), None) if teacher is None else pair_of(student, teacher)
    expect(is_int(top_k) and top_k >= 0, "top_k", "an int of at least 0", top_k)
    expect(top_k == 0 or teacher is not None, "top_k", "0 without a teacher", top_k)
    flag("margins", margins)
    if isinstance(rows_t, TopKRows):
        check_request(temperature, margins=margins, top_k=top_k)
    temperature = row_temperature(temperature, rows_s.batch_shape, rows_s.device)
    want = STUDENT_FIELDS | (TEACHER_FIELDS if teacher is not None else frozenset())
    want |= MARGIN_FIELDS if margins else frozenset()
    want |= TOP_FIELDS if top_k else frozenset()
    want |= LABEL_FIELDS if labels is not None else frozenset()
    labels = check_labels(labels, rows_s)
    workspace = workspace_bytes(workspace_mib)
    measured = measure(rows_s, rows_t, want, labels=labels, temperature=temperature, top_k=top_k, workspace=workspace)
    return stats_record(measured, rows_s, temperature, labels, top_k, listed_ids=getattr(rows_t, "ids", None))


def check_labels(labels: Tensor | None, rows: Rows) -> Tensor | None:
    """Labels flattened to (N,), int64; their range is checked on a CPU."""
    if labels is None:
        return None
    labels = flat_rows("labels", labels, rows.batch_shape, (torch.int64,), rows.device)
    if not torch.compiler.is_compiling():  # the compiled op looks at them when it runs
        check_label_range(labels, rows.vocab)
    return labels.clone()  # the statistics keep it, the caller may change it


def stats_record(
    measured: dict[str | Blend, Tensor],
    rows: Rows,
    temperature: float | Tensor,
    labels: Tensor | None = None,
    top_k: int = 0,
    listed_ids: Tensor | None = None,
    partial: bool = False,
) -> TokenStats:
    """A TokenStats from measured (N,) tensors."""
    blends = {name: value for name, value in measured.items() if isinstance(name, Blend)}
    named = {f"_{k}" if k in PRIVATE_FIELDS else k: v for k, v in measured.items() if k not in blends}
    return TokenStats(
        **named,
        _temperature=temperature,
        _vocab=rows.vocab,
        _batch_shape=rows.batch_shape,
        _labels=labels,
        _top_k=top_k,
        _listed_ids=listed_ids,
        _partial=partial,
        _blends=blends,
    )
