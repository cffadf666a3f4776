"""Liger-Kernel's fused linear JSD losses, by this package.

    from liger_kernel.transformers import LigerFusedLinearJSD            # before
    from tip_kernels.compat.liger import LigerFusedLinearJSD             # after

Argument names, their order, defaults and meanings are Liger's (0.8.5). What differs:

- Ignored rows are left out of every projection. Liger projects them and multiplies by 0.
- Softmaxes are taken of fp32 projections. Liger's uncompiled chunked loss takes them in the inputs' dtype, which for
  bfloat16 and nearly equal models is off by a factor.
- The gradient of the head is accumulated in fp32, and only where the head requires one.
- Nothing but the loss is computed under `torch.no_grad`.
- Vocabularies that differ are an error: Liger fills the student's up with logits of 0, which take probability.
- A row whose divergence is infinite (a banned token) is left out of the sum with a warning. Liger's loss is then inf or
  NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels._checks import expect, finite_number, is_int, renamed
from tip_kernels.compat._calls import counted, jsd
from tip_kernels.distillation.distill import distill
from tip_kernels.select.rule import KeepAll
from tip_kernels.sources.from_models import head

INPUTS = {"student_hidden": "student_input", "teacher_hidden": "teacher_input"}
IGNORED = -100  # distill's own mark of a row without a label


class LigerFusedLinearJSD(torch.nn.Module):
    """The generalised Jensen-Shannon divergence of two heads, averaged over the rows that are not ignored.

        loss = 1/n sum_i beta KL(t_i || m_i) + (1 - beta) KL(s_i || m_i),   m = beta t + (1 - beta) s
        beta = 0 is KL(t || s), beta = 1 is KL(s || t)

    After Liger-Kernel's LigerFusedLinearJSD.

    Args:
        jsd_beta: In [0, 1].
        ignore_index: Rows whose label this is are left out, of every projection as well.
        temperature: Above 0, divides both models' logits.
        accum_dtype: None or torch.float32: gradients are accumulated in fp32 whatever the weights' dtype.

    Raises:
        ValueError: Naming the argument.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ok = accum_dtype in (None, torch.float32)
        expect(ok, "accum_dtype", "None or torch.float32, since gradients are accumulated in fp32", accum_dtype)
        expect(is_int(ignore_index), "ignore_index", "an int", ignore_index)
        self.divergence = jsd("jsd_beta", jsd_beta)
        self.jsd_beta, self.ignore_index, self.accum_dtype = jsd_beta, ignore_index, accum_dtype
        self.temperature = finite_number("temperature", temperature, positive=True)

    @renamed(**INPUTS)
    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss. Synchronises where the labels are on a GPU.

        Args:
            student_input: (BT, H), or (B, T, H) with labels (B, T).
            student_weight: (V, H).
            teacher_input: (BT, H'), or (B, T, H').
            teacher_weight: (V, H').
            shift_labels: int64 (BT,) or (B, T), read only to be compared with ignore_index; None: every row counts.

        Returns:
            () fp32.

        Raises:
            ValueError: Naming the argument.
        """
        student = head("student", student_input, student_weight)
        teacher = head("teacher", teacher_input, teacher_weight)
        mask, count = counted("shift_labels", shift_labels, self.ignore_index, student_input.shape[:-1])
        return distill(
            student,
            teacher,
            select=KeepAll(),
            divergence=self.divergence,
            row_mask=mask,
            temperature=self.temperature,
            normalizer=max(count, 1),
        ).loss


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """The same divergence mixed with the cross-entropy of the labels, averaged over the rows that are not ignored.

        loss = weight_hard_loss * 1/n sum_i CE(s_i, label_i)  +  weight_soft_loss * 1/n sum_i JSD_i

    The label loss is taken at temperature 1, the divergence at `temperature`; there is no factor of temperature
    squared. After Liger-Kernel's chunked_loss.LigerFusedLinearJSDLoss.

    Args:
        weight_hard_loss: At least 0, of the cross-entropy.
        weight_soft_loss: At least 0, of the divergence.
        beta: In [0, 1], as jsd_beta of LigerFusedLinearJSD.
        ignore_index: Rows whose label this is are left out, of every projection as well.
        temperature: Above 0, divides both models' logits.
        compiled: How Liger does its work; the result does not depend on it: not read.
        chunk_size: The same.
        return_soft_hard_loss: Returns (loss, soft, hard), the last two without their weights and without gradient, as
            Liger's are; costs a second measurement.

    Raises:
        ValueError: Naming the argument.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (("weight_hard_loss", weight_hard_loss), ("weight_soft_loss", weight_soft_loss)):
            expect(finite_number(name, weight) >= 0, name, "a number of at least 0", weight)
        expect(is_int(ignore_index), "ignore_index", "an int", ignore_index)
        self.divergence = jsd("beta", beta)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index = beta, ignore_index
        self.temperature = finite_number("temperature", temperature, positive=True)
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    @renamed(**INPUTS, labels="true_labels")
    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss. Synchronises where the labels are on a GPU.

        Args:
            student_input: (N, H) or (B, T, H).
            student_weight: (V, H).
            teacher_input: (N, H') or (B, T, H').
            teacher_weight: (V, H').
            true_labels: int64 (N,) or (B, T), the token that each row predicts.
            student_bias: (V,) or None.
            teacher_bias: (V,) or None.

        Returns:
            () fp32, or three of them with return_soft_hard_loss.

        Raises:
            ValueError: Naming the argument.
        """
        student = head("student", student_input, student_weight, student_bias)
        teacher = head("teacher", teacher_input, teacher_weight, teacher_bias)
        expect(true_labels is not None, "true_labels", "labels, one a row", true_labels)
        mask, count = counted("true_labels", true_labels, self.ignore_index, student_input.shape[:-1])
        labels = true_labels.masked_fill(true_labels == self.ignore_index, IGNORED)

        def mean(ce_weight: float) -> Tensor:
            return distill(
                student,
                teacher,
                select=KeepAll(),
                divergence=self.divergence,
                row_mask=mask,
                labels=labels if ce_weight else None,
                ce_weight=ce_weight,
                temperature=self.temperature,
                normalizer=max(count, 1),
            ).loss

        total = self.weight_hard_loss + self.weight_soft_loss
        loss = total * mean(self.weight_hard_loss / total if total else 0.0)
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            return loss, mean(0.0), mean(1.0)
