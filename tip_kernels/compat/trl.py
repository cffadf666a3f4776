"""TRL's divergence functions, by this package.

    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction      # before
    from tip_kernels.compat.trl import ChunkedDivergenceFunction              # after

Argument names, their order, defaults and meanings are TRL's (1.16); `beta` is 0 for KL(teacher || student), 1 for
KL(student || teacher), between them the generalised Jensen-Shannon divergence. What differs:

- Rows that do not count are left out of every projection where a mask says so, and rows whose upstream gradient is 0
  out of the backward, on any device.
- Banned tokens (-inf) that both models ban are no NaN.
- The gradient of a head that is a DTensor is the mean over the ranks, as of FSDP2's other weights.
- Under ZeRO-3, TRL's own function gathers the head itself; here the caller does (`tip_kernels.hooks.trl` does both).
  An ungathered weight is refused for its shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number, renamed
from tip_kernels.compat._calls import counted, jsd
from tip_kernels.distillation.distill import distill
from tip_kernels.learn.divergence_loss import divergence_loss
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.select.rule import KeepAll
from tip_kernels.sources.from_models import head

IGNORED = -100


class ChunkedDivergenceFunction:
    """`apply` gives the divergence of each row, differentiable in the student, and the student's entropy."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The divergence and the student's entropy of every row, without their (N, V) logits.

            z = softcap tanh(scale (hidden @ weight.T + bias) / softcap) / temperature

        Does not synchronise in the forward. After TRL's ChunkedDivergenceFunction.

        Args:
            student_hidden: (N, H).
            student_weight: (V, H).
            student_bias: (V,) or None.
            teacher_hidden: (N, H').
            teacher_weight: (V, H').
            teacher_bias: (V,) or None.
            beta: In [0, 1], as above.
            temperature: Above 0, divides both models' logits after scale and softcap.
            student_logit_scale: Above 0.
            student_final_logit_softcapping: Above 0, or None.
            teacher_logit_scale: Above 0.
            teacher_final_logit_softcapping: Above 0, or None.

        Returns:
            The divergence, differentiable in the student, and the student's entropy, without a gradient; both (N,) fp32
            in nats. A row whose divergence is infinite keeps it.

        Raises:
            ValueError: Naming the argument.
        """
        student = head(
            "student",
            student_hidden,
            student_weight,
            student_bias,
            student_logit_scale,
            student_final_logit_softcapping,
        )
        teacher = head(
            "teacher",
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )
        stats = token_stats(student, teacher, temperature=temperature)
        rows = divergence_loss(student, teacher, divergence=jsd("beta", beta), stats=stats, temperature=temperature)
        return rows, stats.entropy_s


@renamed(student="student_logits", teacher="teacher_logits")
def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """GKD's loss on whole logits, without their softmaxes and mixtures: for GKDTrainer.generalized_jsd_loss.

        GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    A row whose divergence is infinite is left out of the sum with a warning. Synchronises where labels are on a GPU.
    After TRL's GKDTrainer.generalized_jsd_loss.

    Args:
        student_logits: (B, T, V) or (N, V), already shifted.
        teacher_logits: The same shape.
        labels: int64 (B, T) or (N,); rows with -100 are left out. None: every row counts.
        beta: In [0, 1], as above.
        temperature: Above 0, divides both models' logits.
        reduction: "batchmean": over the rows that count (without labels: over B), "sum", or "mean": over rows times V,
            as torch.mean of the elements is. "none" is refused: its result is the (N, V) matrix that this avoids.
        num_items_in_batch: What the sum is divided by, in place of `reduction`.

    Returns:
        () fp32; TRL's comes in the logits' dtype. Nothing to count gives a 0 that is connected to the graph.

    Raises:
        ValueError: Naming the argument.
    """
    known = reduction in ("batchmean", "sum", "mean")
    expect(known, "reduction", "'batchmean', 'sum' or 'mean' ('none' is a whole (N, V) matrix)", reduction)
    finite_number("temperature", temperature, positive=True)
    mask, count = counted("labels", labels, IGNORED, student_logits.shape[:-1])
    total = distill(
        student_logits,
        teacher_logits,
        select=KeepAll(),
        divergence=jsd("beta", beta),
        row_mask=mask,
        temperature=temperature,
        normalizer=1,
    ).loss
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch, device=total.device)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / max(count * student_logits.shape[-1], 1)
    return total / max(count if labels is not None else student_logits.shape[0], 1)
