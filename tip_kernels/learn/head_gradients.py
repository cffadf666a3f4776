"""The two gradient products of a head: d(hidden) = g W and d(weight) = g^T hidden, summed up tile by tile.

S kept rows, r rows at hand, V vocabulary, C columns of a tile, H hidden width; g is d(loss)/d(logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tip_kernels._checks import finite_number
from tip_kernels.distributed.collectives import all_reduce_sum_
from tip_kernels.sources.head import HeadRows


def existing_grad_buffer(weight: Tensor) -> Tensor | None:
    """Where gradients of a leaf are summed up: its main_grad (as Megatron has it), else its .grad; None where there is
    none yet, or where somebody else wants to see each gradient first."""
    target = getattr(weight, "main_grad", None)
    target = weight.grad if target is None else target
    watched = weight._backward_hooks or weight._post_accumulate_grad_hooks
    plain = weight.is_leaf and weight.requires_grad and type(weight) in (Tensor, torch.nn.Parameter) and not watched
    fits = isinstance(target, Tensor) and target.shape == weight.shape and type(target) in (Tensor, torch.nn.Parameter)
    return target.detach() if plain and fits and target.layout == torch.strided else None


@dataclass
class GradFilter:
    """Leaves tiles of d(logits) out of both products where every entry is below a tolerance, and says how many.

    A row of d(logits) sums to 0, which dropping entries breaks: d(hidden) gets (dropped sum) x (mean row of the head)
    in their place. With W_v the head's rows and M their mean, h_i the hidden rows and w_i the loss's weights

        |error of d(hidden)_i| <= w_i * (sum of |g| dropped of row i) * max_v |W_v - M|
        |error of d(weight)_v| <= tolerance * sum_i w_i |h_i|         |error of d(bias)_v| <= tolerance * sum_i w_i

    tolerance  of the gradient of a row's loss with respect to its logits, before weights and the normaliser
    share      of the entries of d(logits) that were left out of the products, after backward
    mass       sum of |g| left out over sum of |g|, after backward
    """

    tolerance: float
    entries: int = field(default=0, repr=False)
    skipped: int = field(default=0, repr=False)
    total: float = field(default=0.0, repr=False)
    dropped: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        finite_number("tolerance", self.tolerance, positive=True)

    @property
    def share(self) -> float:
        return self.skipped / max(self.entries, 1)

    @property
    def mass(self) -> float:
        return self.dropped / self.total if self.total else 0.0

    def drops(self, g: Tensor, row_scale: Tensor | None) -> bool:
        """Whether the tile g (r, C) is left out; row_scale (r,) are the weights in it. Waits for the device."""
        size = g.abs()
        mass = float(size.sum())
        bound = self.tolerance if row_scale is None else self.tolerance * row_scale.abs()
        out = bool((size.amax(1) < bound).all())
        self.entries, self.total = self.entries + g.numel(), self.total + mass
        if out:
            self.skipped, self.dropped = self.skipped + g.numel(), self.dropped + mass
        return out


class HeadGradients:
    """Sums of the gradients of a head's leaves over rows ids (S,), vocabulary slice by slice.

        for v0, v1 in ...:
            with sums.columns(v0, v1) as tile:          # the head's rows v0 to v1
                sums.add(part, hidden, g)               # for each part of the rows

    need    which of hidden, weight and bias want a gradient
    wide    sums of weight stay fp32 until they are finished: the vocabulary is walked several times, or they are scaled
            later; else each slice is rounded to the weight's dtype when it is closed
    into    where d(weight) is added instead of into a buffer of its own, (V, H)
    buffer  that buffer, if there is one already; what it holds is lost
    """

    def __init__(
        self,
        student: HeadRows,
        ids: Tensor,
        need: tuple[bool, ...],
        *,
        wide: bool = False,
        into: Tensor | None = None,
        grad_filter: GradFilter | None = None,
        buffer: Tensor | None = None,
    ) -> None:
        self.student, self.ids, self.into, self.filter = student, ids, into, grad_filter
        self.need_hidden, self.need_weight, self.need_bias = (*need, False, False, False)[:3]
        weight, device = student.weight, ids.device
        self.weight = self.bias = None
        if self.need_weight:
            dtype = torch.float32 if wide else weight.dtype
            buffer = (
                torch.empty(weight.shape, dtype=dtype, device=device) if buffer is None and into is None else buffer
            )
            self.weight = buffer if into is None else into
        if self.need_bias:
            self.bias = torch.zeros(student.bias.shape, device=device)
        self.hidden = torch.zeros(ids.numel(), student.width, device=device) if self.need_hidden else None
        if grad_filter is not None:
            self.dropped = torch.zeros(ids.numel(), device=device)  # the sum that each row lacks
            self.row_sum = torch.zeros(student.width, device=device)  # of the head's rows
        self.walked = 0

    @contextmanager
    def columns(self, v0: int, v1: int) -> Iterator[Tensor]:
        """Opens a slice of the vocabulary, in order, each once a pass; yields the (C, H) tile of the head."""
        self.v0, self.v1 = v0, v1
        first_pass = self.walked == v0
        self.tile = self.student.weight_tile(v0, v1)
        self.fresh = first_pass and self.into is None
        if self.need_weight:
            place = self.weight[v0:v1]
            own = place.dtype == torch.float32
            self.slice = place if own else torch.empty(place.shape, device=place.device)
            self.fresh = self.fresh or not own
        if self.filter is not None and first_pass:
            self.row_sum += self.tile.float().sum(0)
        yield self.tile
        if self.need_weight:
            if self.fresh:
                self.slice.zero_()  # every tile was left out, or there was none
            if not own:
                place.add_(self.slice) if self.into is not None else place.copy_(self.slice)
        self.walked = max(self.walked, v1)
        self.tile = self.slice = None

    def add(self, part: slice, hidden: Tensor, g: Tensor, row_scale: Tensor | None = None) -> None:
        """Takes in g (r, C) fp32 of the open columns, of the rows ids[part] with hidden states (r, H).

        row_scale  (r,) the weights that g holds, for the filter's tolerance
        """
        if self.filter is not None and self.filter.drops(g, row_scale):
            self.dropped[part] += g.sum(1)
            return
        if self.need_bias:
            self.bias[self.v0 : self.v1] += g.sum(0)
        g = g.to(self.tile.dtype)
        if self.need_weight:
            _product_into(self.slice, g.t(), hidden, fresh=self.fresh)
            self.fresh = False
        if self.need_hidden:
            _product_into(self.hidden[part], g, self.tile, fresh=False)

    def finished(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The gradients of the leaves times factor (), once, in their dtypes and shapes.

        That of weight is None where it was added elsewhere.
        """
        student, hidden, weight = self.student, None, None
        if self.need_hidden and student.shard is not None:
            all_reduce_sum_(self.hidden, student.shard.group)
        if self.need_hidden and self.filter is not None:
            self.hidden.addcmul_(self.dropped.unsqueeze(1), self.row_sum.unsqueeze(0) / student.vocab)
        if factor is not None:
            for x in (self.hidden, self.weight if self.into is None else None, self.bias):
                if x is not None:
                    x.mul_(factor)
        if self.need_hidden:
            hidden = torch.zeros(student.hidden.shape, dtype=student.hidden.dtype, device=self.ids.device)
            for part in range(0, self.ids.numel(), 4096):
                rows = self.hidden[part : part + 4096].to(hidden.dtype)
                hidden.view(-1, student.width).index_copy_(0, self.ids[part : part + 4096], rows)
        if self.need_weight and self.into is None:
            self.weight[self.walked :].zero_()  # beyond vocab_size
            weight = self.weight.to(student.weight.dtype)
        bias = None if self.bias is None else self.bias.to(student.bias.dtype)
        return [hidden, weight, bias][: len(student.leaves)]


def _product_into(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out (fp32) = a @ b where fresh, else out += a @ b; summed in fp32."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out) if fresh else out.addmm_(a, b)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
        out.copy_(product) if fresh else out.add_(product)
