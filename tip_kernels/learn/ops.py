"""Learning as torch.compile sees it: three opaque ops in place of thousands of nodes, some for each tile.

    tip_kernels::sweep_sums           the row sums of two-pass divergences
    tip_kernels::attach_gradient      values as they are; its backward is
    tip_kernels::sweep_gradient       the gradients of the student's source

Inside, the sweeps run as they do without torch.compile, on the backend that the graph was made for. What they read
travels as a list of tensors and numbers: sources as their leaves, per-row tensors by name. S kept rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tip_kernels._checks import expect, not_none
from tip_kernels.learn import divergences as family
from tip_kernels.learn.divergences import Divergence, Term
from tip_kernels.learn.gradient_sweep import (
    CrossEntropy,
    GradientSweep,
    GradOptions,
    Objective,
    RowsToLearn,
    RowSweep,
    differentiated,
)
from tip_kernels.measure.ops import is_constant, refuse_backward
from tip_kernels.sources.packing import packed, unpacked
from tip_kernels.sources.pair import Pair
from tip_kernels.stats import NORMALIZER_FIELDS

KNOWN = {
    kind.kernel: kind for kind in vars(family).values() if isinstance(kind, type) and getattr(kind, "kernel", None)
}


def _terms(terms: Sequence[tuple[float, Divergence]]) -> tuple[str, list[float]]:
    """("NAME:COUNT ...", the weight and COUNT parameters of each term, one after the other)."""
    names, numbers = [], []
    for weight, divergence in terms:
        if divergence.kernel not in KNOWN:
            raise ValueError(
                "divergence: expected one of tip_kernels' under torch.compile, whose ops hold names and numbers, got "
                f"{type(divergence).__name__}, made elsewhere"
            )
        names.append(f"{divergence.kernel}:{len(divergence.params)}")
        numbers += [float(weight), *map(float, divergence.params)]
    return " ".join(names), numbers


def _terms_of(names: str, numbers: Sequence[float]) -> list[tuple[float, Divergence]]:
    terms, numbers = [], list(numbers)
    for entry in names.split():
        name, count = entry.split(":")
        weight, *params = numbers[: 1 + int(count)]
        del numbers[: 1 + int(count)]
        terms.append((weight, KNOWN[name].of_params(*params)))
    return terms


def _sweep_rows(sweep: RowSweep) -> tuple[dict[str, Tensor], float]:
    """The per-row tensors of a sweep by name, and its temperature where that is a number."""
    rows = {"ids": sweep.ids, **sweep.normalizers}
    if isinstance(sweep.temperature, Tensor):
        return rows | {"temperature": sweep.temperature}, 1.0
    return rows, sweep.temperature


def _sweep_of(rows: dict[str, Tensor], temperature: float, workspace: int, backend: str) -> RowSweep:
    normalizers = {name: rows[name] for name in NORMALIZER_FIELDS}
    return RowSweep(rows["ids"], normalizers, rows.get("temperature", temperature), workspace, backend)


def differentiable(pair: Pair, objective: Objective, rows: RowsToLearn, options: GradOptions) -> Tensor:
    """The (S,) loss of rows whose statistics are known, with its backward attached, in a graph of torch.compile."""
    return attach_gradient(*differentiated(pair, objective, rows, options, swept_sums), pair)


def swept_sums(sweep: RowSweep, pair: Pair, divergences: list[Divergence]) -> list[dict[str, Tensor]]:
    """The row sums of two-pass divergences, each {name: (S,)}, by one sweep that is one op."""
    rows, temperature = _sweep_rows(sweep)
    terms = _terms([(1.0, divergence) for divergence in divergences])
    arguments = (list(rows.values()), " ".join(rows), temperature, *terms, sweep.workspace, sweep.backend)
    with torch.no_grad():
        sums = iter(_sweep_sums(*packed(pair), *arguments).unbind(0))
    return [{name: next(sums) for name in divergence.sums} for divergence in divergences]


@torch.library.custom_op("tip_kernels::sweep_sums", mutates_args=())
def _sweep_sums(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    head_numbers: Sequence[float],
    vocab: int,
    dtype_s: torch.dtype,
    dtype_t: torch.dtype,
    rows: Sequence[Tensor],
    row_names: str,
    temperature: float,
    terms: str,
    numbers: Sequence[float],
    workspace: int,
    backend: str,
) -> Tensor:
    """(sums of all terms, S) fp32, in the order of Divergence.sums."""
    pair = unpacked(student, teacher, head_numbers, vocab, dtype_s, dtype_t)
    sweep = _sweep_of(dict(zip(row_names.split(), rows, strict=True)), temperature, workspace, backend)
    divergences = [divergence for _, divergence in _terms_of(terms, numbers)]
    sums = sweep.sums_of(pair, divergences)
    return torch.stack(
        [named[name] for named, divergence in zip(sums, divergences, strict=True) for name in divergence.sums]
    )


@_sweep_sums.register_fake
def _(student, teacher, head_numbers, vocab, dtype_s, dtype_t, rows, row_names, temperature, terms, *rest):
    n_sums = sum(len(KNOWN[entry.split(":")[0]].sums) for entry in terms.split())
    return rows[0].new_empty(n_sums, rows[0].shape[0], dtype=torch.float32)


def attach_gradient(values: Tensor, gradient: GradientSweep, pair: Pair) -> Tensor:
    """values (S,), whose backward is the sweep `gradient`."""
    mode = gradient.options.layout
    expect(mode == "dense", "grad_logits", "'dense' under torch.compile", mode)
    sweep, ce = gradient.sweep, gradient.ce
    rows, temperature = _sweep_rows(sweep)
    rows = rows | {"factor": gradient.factor, "finite": gradient.finite}
    if gradient.labels is not None:
        rows["labels"] = gradient.labels
    if ce is not None:
        rows |= {f"ce.{name}": value for name, value in ce.at_rows.items()}
    for i, term in enumerate(gradient.terms):
        rows |= {f"{i}.{name}": value for name, value in term.rows.items()}
    return _attach_gradient(
        values, *packed(pair), list(rows.values()), " ".join(rows), temperature,
        *_terms([term[:2] for term in gradient.terms]), 0.0 if ce is None else ce.weight, gradient.clipped,
        sweep.workspace, sweep.backend,
    )  # fmt: skip


@torch.library.custom_op("tip_kernels::attach_gradient", mutates_args=())
def _attach_gradient(
    values: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    head_numbers: Sequence[float],
    vocab: int,
    dtype_s: torch.dtype,
    dtype_t: torch.dtype,
    rows: Sequence[Tensor],
    row_names: str,
    temperature: float,
    terms: str,
    numbers: Sequence[float],
    ce_weight: float,
    clipped: bool,
    workspace: int,
    backend: str,
) -> Tensor:
    return values.clone()


@_attach_gradient.register_fake
def _(values, *rest):
    return torch.empty_like(values)


@torch.library.custom_op("tip_kernels::sweep_gradient", mutates_args=())
def _sweep_gradient(
    upstream: Tensor,
    need: Sequence[bool],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    head_numbers: Sequence[float],
    vocab: int,
    dtype_s: torch.dtype,
    dtype_t: torch.dtype,
    rows: Sequence[Tensor],
    row_names: str,
    temperature: float,
    terms: str,
    numbers: Sequence[float],
    ce_weight: float,
    clipped: bool,
    workspace: int,
    backend: str,
) -> list[Tensor]:
    """The gradients of those leaves of the student that need one; upstream is (S,)."""
    pair = unpacked(student, teacher, head_numbers, vocab, dtype_s, dtype_t)
    named = dict(zip(row_names.split(), rows, strict=True))

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    gradient = GradientSweep(
        _sweep_of(named, temperature, workspace, backend),
        GradOptions(workspace),
        [Term(*term, part(f"{i}.")) for i, term in enumerate(_terms_of(terms, numbers))],
        named["factor"],
        named["finite"],
        named.get("labels"),
        CrossEntropy(ce_weight, part("ce.")) if "ce.logp_s" in named else None,
        clipped,
    )
    with torch.autocast(upstream.device.type, enabled=False):
        grads = gradient.run(pair, upstream, tuple(need))
    return [not_none(grad).contiguous() for grad, needed in zip(grads, need, strict=True) if needed]


@_sweep_gradient.register_fake
def _(upstream, need, student, *rest):
    return [leaf.new_empty(leaf.shape) for leaf, needed in zip(student, need, strict=True) if needed]


def _save(ctx, inputs, output) -> None:
    _, student, teacher, head_numbers, vocab, dtype_s, dtype_t, rows, *rest = inputs
    ctx.save_for_backward(*student, *teacher, *rows)
    ctx.counts, ctx.middle, ctx.rest = (len(student), len(teacher)), (head_numbers, vocab, dtype_s, dtype_t), rest


def _backward(ctx, upstream):
    n_s, n_t = ctx.counts
    saved, need = list(ctx.saved_tensors), list(ctx.needs_input_grad[1])
    student, teacher, rows = saved[:n_s], saved[n_s : n_s + n_t], saved[n_s + n_t :]
    grads = iter(_sweep_gradient(upstream, need, student, teacher, *ctx.middle, rows, *ctx.rest))
    nothing = (None,) * (len(ctx.middle) + len(ctx.rest))
    of_student = [next(grads) if needed else None for needed in need]
    return None, of_student, [None] * n_t, *nothing[:4], [None] * len(rows), *nothing[4:]


_attach_gradient.register_autograd(_backward, setup_context=_save)
_sweep_gradient.register_autograd(refuse_backward)
_sweep_sums.register_autograd(refuse_backward, setup_context=is_constant)
