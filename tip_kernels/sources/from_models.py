"""Sources made of what trainers and engines hold: a head whose weight is sharded, the likeliest tokens of a head."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, renamed
from tip_kernels.distributed.shards import whole
from tip_kernels.sources.pair import Head, rows_of
from tip_kernels.sources.topk import TopK


def head(
    model: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Head:
    """A Head. A weight that is sharded (a DTensor) is gathered, and cast to the hidden states' dtype.

    A weight or bias that holds no floats (a quantized one) would be cast to another head; it is refused, as an
    argument of the model.
    """
    for name, x in (("weight", weight), ("bias", bias)):
        ok = (x is None and name == "bias") or (isinstance(x, Tensor) and x.dtype in FLOATS)
        expect(ok, f"{model}_{name}", "a float32, bfloat16 or float16 tensor", x)
    expect(isinstance(hidden, Tensor), f"{model}_hidden", "a tensor (N, H) or (B, T, H)", hidden)
    weight, bias = whole(weight), whole(bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    own = {name: f"{model}_{name}" for name in ("hidden", "weight", "bias")}
    own |= {"scale": f"{model}_logit_scale", "softcap": f"{model}_final_logit_softcapping"}
    with renamed(**own):
        return Head(hidden, weight, bias, scale=scale, softcap=softcap)


@torch.no_grad()
def likeliest(head: Head, k: int, workspace_mib: float) -> TopK:
    """The k likeliest tokens of each row with their log-probabilities: what a serving engine would return.

    Logits and log-probabilities of some rows at a time, within `workspace_mib`, at least one row.
    """
    rows = rows_of(head, "teacher")
    block = max(1, int(workspace_mib * 2**20) // (8 * rows.vocab))
    ids = torch.empty(rows.n_rows, k, dtype=torch.int64, device=rows.device)
    logp = torch.empty(rows.n_rows, k, device=rows.device)
    for first in range(0, rows.n_rows, block):
        part = slice(first, min(first + block, rows.n_rows))
        logits = torch.empty(part.stop - first, rows.vocab, device=rows.device)
        torch.topk(rows.block(part).tile(0, rows.vocab, logits).log_softmax(-1), k, out=(logp[part], ids[part]))
    return TopK(ids.view(*rows.batch_shape, k), logp.view(*rows.batch_shape, k))
