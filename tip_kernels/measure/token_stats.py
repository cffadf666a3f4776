"""MEASURE: the statistics of every row in one pass over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels._checks import flag
from tip_kernels.measure import ops, sweep
from tip_kernels.sources.pair import Head, Request
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import (
    LABEL_FIELDS,
    MARGIN_FIELDS,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    TOP_FIELDS,
    Blend,
    TokenStats,
)


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
    """Measures every row in one pass over the vocabulary, without materializing a softmax (or, of a Head, the logits).

        lse = log sum exp z                        entropy = lse - sum p z              z = logits / temperature
        kl_fwd = sum p_t (log p_t - log p_s)       kl_rev = sum p_s (log p_s - log p_t)
        hellinger_sq = 1 - sum sqrt(p_t p_s)

    No gradient flows. Does not synchronize. KLs are clamped at 0; their noise floor is about 1e-7 nats. A logit at or
    below -2^100 counts as -inf, a banned token: legal in either model, and a KL is +inf exactly where its second model
    bans a token that its first allows. Labels and temperatures are range-checked on a CPU; on CUDA a bad one makes its
    row NaN. Method: online softmax with recentered moments (reference/README.md).

    Args:
        student: Logits (N, V) or (B, T, V), or a Head; float32, bfloat16 or float16.
        teacher: Likewise, in a dtype of its own, or a TopK, whose docstring says what the statistics then mean.
        labels: int64 (N,) or (B, T): the token that each row predicts (already shifted), -100 for none; adds logp.
        temperature: A positive float, or a float tensor (N,) or (B, T); divides both models' logits.
        margins: Adds margin_s, margin_t and agree.
        top_k: k of the top-k statistics mass_t_on_top_s and rank_t_of_argmax_s, which need a teacher; 0 is none.
        workspace_mib: MiB that the pass may use beyond its inputs and (N,) results.

    Returns:
        A TokenStats of (N,) fp32 fields in nats, also under autocast.

    Raises:
        ValueError: Naming the argument.
    """
    flag("margins", margins)
    request = Request.checked(
        student, teacher, labels=labels, temperature=temperature, workspace_mib=workspace_mib, top_k=top_k,
        margins=margins, alone=True,
    )  # fmt: skip
    want: frozenset[str | Blend] = STUDENT_FIELDS
    for fields, wanted in (
        (TEACHER_FIELDS, teacher is not None),
        (MARGIN_FIELDS, margins),
        (TOP_FIELDS, top_k > 0),
        (LABEL_FIELDS, labels is not None),
    ):
        want = want | fields if wanted else want
    measure = ops.measure if torch.compiler.is_compiling() else sweep.measure
    measured = measure(
        request.pair, want, labels=request.labels, temperature=request.temperature, top_k=top_k,
        workspace=request.workspace,
    )  # fmt: skip
    pair = request.pair
    return TokenStats(
        _measured=measured, _temperature=request.temperature, _vocab=pair.vocab,
        _batch_shape=pair.student.batch_shape, _labels=request.labels, _top_k=top_k,
        _topk_ids=None if pair.topk is None else pair.topk.ids,
    )  # fmt: skip
