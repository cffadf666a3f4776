"""Measuring as torch.compile sees it: one opaque op in place of thousands of nodes, some for each tile.

    tip_kernels::measure              the statistics of rows

Inside, the sweep runs as it does without torch.compile, on the backend that the graph was made for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from tip_kernels.measure import sweep
from tip_kernels.sources.packing import packed, unpacked
from tip_kernels.sources.pair import Pair, row_temperature
from tip_kernels.stats import NORMALIZER_FIELDS, TOP_FIELDS, Blend, Fields, check_label_range


def measure(
    pair: Pair,
    want: frozenset[str | Blend],
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    workspace: int,
    record: Sequence[Tensor | None] | None = None,
) -> Fields:
    """`sweep.measure` in a graph of torch.compile: one op, but beside a TopK."""
    if pair.topk is not None:
        return sweep.measure(
            pair, want, rows=rows, labels=labels, temperature=temperature, top_k=top_k, workspace=workspace,
            record=record,
        )  # fmt: skip
    names = sorted(name for name in want | NORMALIZER_FIELDS if isinstance(name, str))
    if pair.teacher is None:
        names = [name for name in names if name.endswith("_s") and name not in TOP_FIELDS]
    blends = [name for name in want if isinstance(name, Blend)]
    tau = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    numbers = [power for blend in blends for power in blend]
    out = _measure(*packed(pair), " ".join(names), numbers, rows, labels, *tau, top_k, workspace)
    fields: Fields = dict(zip([*names, *blends], out.unbind(0), strict=True))
    if "agree" in fields:
        fields["agree"] = fields["agree"] > 0.5
    if "rank_t_of_argmax_s" in fields:
        fields["rank_t_of_argmax_s"] = fields["rank_t_of_argmax_s"].long()
    return fields


@torch.library.custom_op("tip_kernels::measure", mutates_args=())
def _measure(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    numbers: Sequence[float],
    vocab: int,
    dtype_s: torch.dtype,
    dtype_t: torch.dtype,
    names: str,
    blends: Sequence[float],
    rows: Tensor | None,
    labels: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    top_k: int,
    workspace: int,
) -> Tensor:
    """(fields and blends, rows) fp32."""
    pair = unpacked(student, teacher, numbers, vocab, dtype_s, dtype_t)
    fields = [*names.split(), *map(Blend, blends[::2], blends[1::2])]
    if labels is not None:
        check_label_range(labels, vocab)
    tau = temperature
    if temperatures is not None:
        tau = row_temperature(temperatures, (pair.n_rows,), pair.device)
    out = sweep.measure(
        pair, frozenset(fields), rows=rows, labels=labels, temperature=tau, top_k=top_k, workspace=workspace
    )
    return torch.stack([out[field].float() for field in fields])


@_measure.register_fake
def _(student, teacher, numbers, vocab, dtype_s, dtype_t, names, blends, rows, *rest):
    n_rows = math.prod(student[0].shape[:-1]) if rows is None else rows.shape[0]
    return student[0].new_empty(len(names.split()) + len(blends) // 2, n_rows, dtype=torch.float32)


def is_constant(ctx, inputs, output) -> None:
    """What an op saves whose output has no gradient."""
    ctx.mark_non_differentiable(output)


def refuse_backward(ctx, *upstream) -> NoReturn:
    raise RuntimeError(sweep.NO_DOUBLE_BACKWARD)


_measure.register_autograd(refuse_backward, setup_context=is_constant)
