"""Token importance by the names that users know: one score per token, in the shape of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tip_kernels._checks import expect, flat_rows, not_none
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.select.papers import Teachability
from tip_kernels.select.rule import SoftOr
from tip_kernels.sources.pair import Head, rows_of
from tip_kernels.stats import TokenStats

_READS: dict[str, tuple[str, ...]] = {
    "logit_diff": ("teacher",),
    "kl_div": ("student", "teacher"),
    "loss_contribution": ("teacher", "labels"),
    "entropy": ("student",),
    "reverse_kl": ("student", "teacher"),
    "hellinger": ("student", "teacher"),
    "soft_or": ("student", "teacher"),
    "teachability": ("student", "teacher"),
}
# The statistics of the teacher alone end in _s, too. Methods that rank rows against each other are scored by rules.
_SCORES: dict[str, Callable[[TokenStats], Tensor]] = {
    "logit_diff": lambda stats: stats.margin_s,
    "kl_div": lambda stats: stats.kl_fwd,
    "loss_contribution": lambda stats: -stats.logp_s,
    "entropy": lambda stats: stats.entropy_s,
    "reverse_kl": lambda stats: stats.kl_rev,
    "hellinger": lambda stats: stats.hellinger_sq.sqrt(),
}


@torch.no_grad()
def token_importance(
    *,
    student: Tensor | Head | None = None,
    teacher: Tensor | Head | None = None,
    labels: Tensor | None = None,
    method: str = "logit_diff",
    row_mask: Tensor | None = None,
    normalize: str = "rank",
    top_k: int = 16,
    workspace_mib: float = 256,
) -> Tensor:
    """How much each token matters, by one of eight measures; larger is more important.

    | method            | score                                                                | reads            |
    |-------------------|----------------------------------------------------------------------|------------------|
    | logit_diff        | the teacher's largest minus its second-largest logit                 | teacher          |
    | kl_div            | KL(teacher || student), nats                                         | student, teacher |
    | loss_contribution | -log p_t[label], the teacher's cross-entropy on the label, nats      | teacher, labels  |
    | entropy           | -sum p_s log p_s, the student's entropy, nats                        | student          |
    | reverse_kl        | KL(student || teacher), nats                                         | student, teacher |
    | hellinger         | sqrt(1 - sum sqrt(p_s p_t)), the Hellinger distance, in [0, 1]       | student, teacher |
    | soft_or           | h + d - h d of normalised student entropy and reverse KL, in [0, 1]  | student, teacher |
    | teachability      | normalised kl_div times normalised teacher mass on the student's     | student, teacher |
    |                   | top_k tokens, in [0, 1]                                              |                  |

    No gradient flows. Does not synchronise. Sources: entropy, reverse_kl and soft_or are TIP's (arXiv 2604.14084),
    hellinger is AdaKD's difficulty (arXiv 2510.11615), teachability is TA-OPD's (arXiv 2605.26844).

    Args:
        student: Logits (N, V) or (B, T, V), or a Head; ignored, and may be None, where the method does not read it.
        teacher: The same.
        labels: int64 (N,) or (B, T), -100 for none: the token that each row predicts (already shifted).
        method: One of the table's names.
        row_mask: bool (N,) or (B, T), True for rows that count: soft_or and teachability normalise over them.
        normalize: Of soft_or: "rank" or, as in the paper, "minmax"; SoftOr tells the difference.
        top_k: Of teachability, an int of at least 1.
        workspace_mib: MiB that may be used beyond inputs and result, at least 1.

    Returns:
        fp32 (N,) or (B, T), NaN where the row is masked, has a NaN, a +inf or nothing but -inf in it, or needs a label
        and has none. (torch.topk takes a NaN for the largest: to choose rows, use the selection rules.)

    Raises:
        ValueError: Naming the argument, also for a source that the method reads and that is None.
    """
    expect(isinstance(method, str) and method in _READS, "method", f"one of {', '.join(_READS)}", method)
    reads, given = _READS[method], {"student": student, "teacher": teacher, "labels": labels}
    for name in reads:
        form = "int64 labels of the rows" if name == "labels" else "logits or a tip_kernels.Head"
        expect(given[name] is not None, name, f"{form}, since method {method!r} reads it", given[name])
    rules = {"soft_or": SoftOr(1.0, normalize), "teachability": Teachability(1.0, top_k=top_k)}
    if "student" in reads:
        lists = top_k if method == "teachability" else 0
        given_teacher = teacher if "teacher" in reads else None
        stats = token_stats(not_none(student), given_teacher, top_k=lists, workspace_mib=workspace_mib)
    else:
        rows_of(teacher, "teacher")  # in an error, token_stats would call it the student
        margins = method == "logit_diff"
        read_labels = None if margins else labels
        stats = token_stats(not_none(teacher), labels=read_labels, margins=margins, workspace_mib=workspace_mib)
    if method in rules:
        scores = rules[method](stats, row_mask).scores
        scores = torch.where(scores.isneginf(), torch.nan, scores)
    else:
        scores = _SCORES[method](stats)
        if row_mask is not None:
            mask = flat_rows("row_mask", row_mask, stats._batch_shape, (torch.bool,), scores.device)
            scores = torch.where(mask, scores, torch.nan)
    return scores.view(stats._batch_shape)
