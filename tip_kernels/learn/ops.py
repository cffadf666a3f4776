"""What torch.compile sees of the sweeps: four opaque ops in place of thousands of nodes, one for each tile.

    tip_kernels::measure              the statistics of rows
    tip_kernels::sweep_sums           the row sums of class-B divergences
    tip_kernels::attach_gradient      values as they are; its backward is
    tip_kernels::sweep_gradient       the gradients of the student's source

Inside, the sweeps run as they do without torch.compile, on the backend that the graph was made for. What they read
travels as a list of tensors and numbers: sources as their leaves, per-row tensors by name. N rows, S kept rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tip_kernels._checks import expect, row_temperature
from tip_kernels.backends.eager import row_grad
from tip_kernels.backends.eager.online import Blend
from tip_kernels.learn.gradient_sweep import TWICE, CrossEntropy, GradientSweep, Sweep
from tip_kernels.measure.sweep import NORMALISER_FIELDS, TOP_FIELDS, check_label_range, measure
from tip_kernels.sources.rows import Head, HeadRows, LogitRows, Rows

SUMS = {  # what a class-B sweep gives, in order
    "jsd": ("kl_s", "kl_t"),
    "skew_forward_kl": ("value", "mean_share"),
    "skew_reverse_kl": ("value", "mean_share"),
    "tvd": ("value", "mean_sign"),
    "todi": ("value", "sum_g"),
}


def _packed(rows: Rows | None) -> tuple[list[Tensor], list[float], torch.dtype]:
    """(leaves, [scale, softcap or 0], dtype of the products) of a source."""
    if rows is None:
        return [], [1.0, 0.0], torch.float32
    if rows.shard is not None:
        raise ValueError("vocab_group: expected None under torch.compile, whose ops hold no process group")
    dtype = rows.dtype if isinstance(rows, HeadRows) else rows.leaves[0].dtype
    return list(rows.leaves), [float(rows.scale), float(rows.softcap or 0.0)], dtype


def _unpacked(leaves: Sequence[Tensor], settings: Sequence[float], vocab: int, dtype: torch.dtype) -> Rows | None:
    """The source that `_packed` took apart."""
    if not leaves:
        return None
    if len(leaves) == 1:
        return LogitRows(leaves[0])
    cast = any(leaf.dtype != dtype for leaf in leaves[:2])  # an autocast was active
    with torch.autocast(leaves[0].device.type, dtype=dtype if cast else None, enabled=cast):
        return HeadRows(Head(*leaves, scale=settings[0], softcap=settings[1] or None, vocab_size=vocab))


def _pair(
    student: Sequence[Tensor], teacher: Sequence[Tensor], settings: Sequence[float], vocab: int,
    dtype_s: torch.dtype, dtype_t: torch.dtype,
) -> tuple[Rows, Rows | None]:  # fmt: skip
    return _unpacked(student, settings[:2], vocab, dtype_s), _unpacked(teacher, settings[2:], vocab, dtype_t)


def _sources(student: Rows, teacher: Rows | None) -> tuple[object, ...]:
    """The arguments that every op begins with."""
    (leaves_s, settings_s, dtype_s), (leaves_t, settings_t, dtype_t) = _packed(student), _packed(teacher)
    return leaves_s, leaves_t, settings_s + settings_t, student.vocab, dtype_s, dtype_t


# ---- measure


def measured(
    student: Rows,
    teacher: Rows | None,
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    top_k: int,
    workspace: int,
) -> dict[str | Blend, Tensor]:
    """`measure` as one op."""
    names = sorted(name for name in want | NORMALISER_FIELDS if isinstance(name, str))
    if teacher is None:
        names = [name for name in names if name.endswith("_s") and name not in TOP_FIELDS]
    blends = [name for name in want if isinstance(name, Blend)]
    tau = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    numbers = [power for blend in blends for power in blend]
    sources = _sources(student, teacher)
    out = _measure(*sources, " ".join(names), numbers, rows, labels, *tau, top_k, workspace)
    fields: dict[str | Blend, Tensor] = dict(zip([*names, *blends], out.unbind(0), strict=True))
    if "agree" in fields:
        fields["agree"] = fields["agree"] > 0.5
    if "rank_t_of_argmax_s" in fields:
        fields["rank_t_of_argmax_s"] = fields["rank_t_of_argmax_s"].long()
    return fields


@torch.library.custom_op("tip_kernels::measure", mutates_args=())
def _measure(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    settings: Sequence[float],
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
    student, teacher = _pair(student, teacher, settings, vocab, dtype_s, dtype_t)
    fields = [*names.split(), *map(Blend, blends[::2], blends[1::2])]
    if labels is not None:
        check_label_range(labels, vocab)
    if temperatures is not None:
        temperature = row_temperature(temperatures, (student.n_rows,), student.device)
    out = measure(
        student, teacher, frozenset(fields), rows=rows, labels=labels,
        temperature=temperature, top_k=top_k, workspace=workspace,
    )  # fmt: skip
    return torch.stack([out[field].float() for field in fields])


@_measure.register_fake
def _(student, teacher, settings, vocab, dtype_s, dtype_t, names, blends, rows, *rest):
    n_rows = math.prod(student[0].shape[:-1]) if rows is None else rows.shape[0]
    return student[0].new_empty(len(names.split()) + len(blends) // 2, n_rows, dtype=torch.float32)


# ---- sweeps over kept rows


def _terms(terms: Sequence[row_grad.Term]) -> tuple[str, list[float]]:
    """("NAME:COUNT ...", the weight and COUNT parameters of each term, one after the other)."""
    numbers: list[float] = []
    for term in terms:
        numbers += [float(term.weight), *map(float, term.params)]
    return " ".join([f"{term.name}:{len(term.params)}" for term in terms]), numbers


def _terms_of(names: str, numbers: Sequence[float]) -> list[row_grad.Term]:
    terms, numbers = [], list(numbers)
    for entry in names.split():
        name, count = entry.split(":")
        weight, *params = numbers[: 1 + int(count)]
        del numbers[: 1 + int(count)]
        terms.append(row_grad.Term(weight, name, tuple(params), {}))
    return terms


def _sweep_rows(sweep: Sweep) -> tuple[dict[str, Tensor], float]:
    """The per-row tensors of a sweep by name, and its temperature where that is a number."""
    rows = {"ids": sweep.ids, **sweep.normalisers}
    if isinstance(sweep.temperature, Tensor):
        return rows | {"temperature": sweep.temperature}, 1.0
    return rows, sweep.temperature


def _sweep_of(rows: dict[str, Tensor], temperature: float, workspace: int, backend: str) -> Sweep:
    normalisers = {name: rows[name] for name in NORMALISER_FIELDS}
    return Sweep(rows["ids"], normalisers, rows.get("temperature", temperature), workspace, backend)


def row_sums(sweep: Sweep, student: Rows, teacher: Rows, terms: list[row_grad.Term]) -> list[dict[str, Tensor]]:
    """The row sums of each term as one op."""
    rows, temperature = _sweep_rows(sweep)
    arguments = (list(rows.values()), " ".join(rows), temperature, *_terms(terms), sweep.workspace, sweep.backend)
    with torch.no_grad():
        sums = _sweep_sums(*_sources(student, teacher), *arguments)
    return [{name: sums[2 * i + j] for j, name in enumerate(SUMS[term.name])} for i, term in enumerate(terms)]


@torch.library.custom_op("tip_kernels::sweep_sums", mutates_args=())
def _sweep_sums(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    settings: Sequence[float],
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
    """(2 terms, S) fp32, in the order of SUMS."""
    student, teacher = _pair(student, teacher, settings, vocab, dtype_s, dtype_t)
    sweep = _sweep_of(dict(zip(row_names.split(), rows, strict=True)), temperature, workspace, backend)
    asked = _terms_of(terms, numbers)
    sums = sweep.sums_of(student, teacher, asked)
    return torch.stack([sums[i][name] for i, term in enumerate(asked) for name in SUMS[term.name]])


@_sweep_sums.register_fake
def _(student, teacher, settings, vocab, dtype_s, dtype_t, rows, row_names, temperature, terms, *rest):
    return rows[0].new_empty(2 * len(terms.split()), rows[0].shape[0], dtype=torch.float32)


def attach_gradient(values: Tensor, gradient: GradientSweep, student: Rows, teacher: Rows) -> Tensor:
    """values (S,), whose backward is the sweep `gradient`."""
    mode = gradient.grad_logits
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
        values, *_sources(student, teacher), list(rows.values()), " ".join(rows), temperature,
        *_terms(gradient.terms), 0.0 if ce is None else ce.weight, gradient.clipped, sweep.workspace, sweep.backend,
    )  # fmt: skip


@torch.library.custom_op("tip_kernels::attach_gradient", mutates_args=())
def _attach_gradient(
    values: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    settings: Sequence[float],
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
    settings: Sequence[float],
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
    student, teacher = _pair(student, teacher, settings, vocab, dtype_s, dtype_t)
    rows = dict(zip(row_names.split(), rows, strict=True))

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}

    gradient = GradientSweep(
        _sweep_of(rows, temperature, workspace, backend),
        "dense",
        [term._replace(rows=part(f"{i}.")) for i, term in enumerate(_terms_of(terms, numbers))],
        rows["factor"],
        rows["finite"],
        rows.get("labels"),
        CrossEntropy(ce_weight, part("ce.")) if "ce.logp_s" in rows else None,
        clipped,
    )
    with torch.autocast(upstream.device.type, enabled=False):
        grads = gradient.run(student, teacher, upstream, tuple(need))
    return [grad.contiguous() for grad, needed in zip(grads, need, strict=True) if needed]


@_sweep_gradient.register_fake
def _(upstream, need, student, *rest):
    return [leaf.new_empty(leaf.shape) for leaf, needed in zip(student, need, strict=True) if needed]


def _save(ctx, inputs, output) -> None:
    _, student, teacher, settings, vocab, dtype_s, dtype_t, rows, *rest = inputs
    ctx.save_for_backward(*student, *teacher, *rows)
    ctx.counts, ctx.middle, ctx.rest = (len(student), len(teacher)), (settings, vocab, dtype_s, dtype_t), rest


def _backward(ctx, upstream):
    n_s, n_t = ctx.counts
    saved, need = list(ctx.saved_tensors), list(ctx.needs_input_grad[1])
    student, teacher, rows = saved[:n_s], saved[n_s : n_s + n_t], saved[n_s + n_t :]
    grads = iter(_sweep_gradient(upstream, need, student, teacher, *ctx.middle, rows, *ctx.rest))
    nothing = (None,) * (len(ctx.middle) + len(ctx.rest))
    of_student = [next(grads) if needed else None for needed in need]
    return None, of_student, [None] * n_t, *nothing[:4], [None] * len(rows), *nothing[4:]


def _is_constant(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output)


def _refuse(ctx, *upstream):
    raise RuntimeError(TWICE)


_attach_gradient.register_autograd(_backward, setup_context=_save)
_sweep_gradient.register_autograd(_refuse)
_measure.register_autograd(_refuse, setup_context=_is_constant)
_sweep_sums.register_autograd(_refuse, setup_context=_is_constant)
