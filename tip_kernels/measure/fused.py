"""Measuring by one kernel, without tiles: of logits where they lie, or of hidden states and heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tip_kernels._checks import not_none
from tip_kernels.backends.eager.online import label_field
from tip_kernels.sources.pair import HeadRows, Pair, Rows
from tip_kernels.stats import MARGIN_FIELDS, TOP_FIELDS, Blend, Fields, blends_of


def kernel_for(pair: Pair, want: frozenset[str | Blend], n_rows: int) -> Callable[..., Fields] | None:
    """The kernel that measures whole rows at once, called as (sources, want, rows, labels, temperature, workspace).

    None where tiles have to be walked.
    """
    if blends_of(want) or want & TOP_FIELDS or (want & MARGIN_FIELDS and pair.shard):
        return None
    if all(source.in_place is not None for source in pair.sources):
        return measure_logits
    return measure_hidden if not pair.shard and _is_fused(pair.sources, want, n_rows) else None


def measure_logits(
    sources: list[Rows],
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    workspace: int,
) -> Fields:
    """One kernel over logits in memory; chosen rows are gathered block by block."""
    from tip_kernels.backends.triton.row_stats import row_stats

    margins, matrices = bool(want & MARGIN_FIELDS), [not_none(source.in_place) for source in sources]
    out: Fields
    if rows is None:
        out = {**row_stats(*matrices, margins=margins, temperature=temperature)}
    else:
        block = max(1, workspace // sum(matrix.shape[1] * matrix.element_size() for matrix in matrices))
        done = []
        for r0 in range(0, max(rows.numel(), 1), block):
            ids = rows[r0 : r0 + block]
            tau = temperature[r0 : r0 + block] if isinstance(temperature, Tensor) else temperature
            done.append(row_stats(*(m.index_select(0, ids) for m in matrices), margins=margins, temperature=tau))
        out = {name: torch.cat([d[name] for d in done]) for name in done[0]}
    if labels is not None:
        inside = (labels >= 0) & (labels < sources[0].vocab)
        place = labels.clamp(0, sources[0].vocab - 1)
        for model, matrix in zip("st", matrices, strict=False):
            z = matrix[torch.arange(place.numel(), device=place.device) if rows is None else rows, place].float()
            out |= label_field(model, torch.where(inside, z, torch.nan), temperature, out)
    return out


def _is_fused(sources: list[Rows], want: frozenset[str | Blend], n_rows: int) -> bool:
    """Whether one kernel takes the products and their fold: where it can, and where that pays."""
    heads = [source for source in sources if isinstance(source, HeadRows)]
    if want & MARGIN_FIELDS or len(heads) < len(sources):
        return False
    from tip_kernels.backends.triton import linear_stats

    whole = all(head.hidden.dtype == head.weight.dtype == head.dtype for head in heads)  # no autocast
    fits = all(linear_stats.describable(x) for head in heads for x in (head.hidden, head.weight))
    width = max(head.width for head in heads)
    return whole and fits and linear_stats.fused_pays(n_rows, width, heads[0].dtype)


def measure_hidden(
    sources: list[HeadRows],
    want: frozenset[str | Blend],
    rows: Tensor | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    workspace: int,
) -> Fields:
    """One kernel over hidden states and heads, in blocks of rows whose hidden states and sums fit the workspace."""
    from tip_kernels.backends.triton.linear_stats import linear_part, linear_stats

    n_rows, vocab = sources[0].n_rows if rows is None else rows.numel(), sources[0].vocab
    settings: dict[str, object] = {}
    for model, source in zip("st", sources, strict=False):
        bias = None if source.bias is None else source.bias[:vocab].to(source.dtype).contiguous()
        settings |= {f"bias_{model}": bias, f"scale_{model}": source.scale, f"softcap_{model}": source.softcap}
    parts = -(-vocab // linear_part(n_rows, vocab))
    block = max(1, workspace // (44 * parts + 8 * sum(source.width for source in sources)))
    done = []
    for r0 in range(0, max(n_rows, 1), block):
        part = slice(r0, min(r0 + block, n_rows))
        ids = part if rows is None else rows[part]
        tau = temperature[part] if isinstance(temperature, Tensor) else temperature
        hidden = [source.hidden[ids] for source in sources]
        pairs = [x for h, source in zip(hidden, sources, strict=True) for x in (h, source.weight[:vocab])]
        out = linear_stats(*pairs, temperature=tau, **settings)
        if labels is not None:
            for model, source, h in zip("st", sources, hidden, strict=False):
                out |= label_field(model, _label_logits(source, h, labels[part]), tau, out)
        done.append(out)
    return {name: torch.cat([d[name] for d in done]) for name in done[0]}


def _label_logits(source: HeadRows, hidden: Tensor, labels: Tensor) -> Tensor:
    """Each row's logit of its label (R,), NaN for none."""
    inside = (labels >= 0) & (labels < source.vocab)
    place = labels.clamp(0, source.vocab - 1)
    z = (hidden.float() * source.weight[place].float()).sum(1)
    if source.bias is not None:
        z += source.bias[place].to(source.dtype).float()
    z *= source.scale
    z = z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)
    return torch.where(inside, z, torch.nan)
