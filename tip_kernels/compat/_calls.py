"""What the swapped calls share: heads from whatever a trainer hands over, and a loss on the rows that count."""

from __future__ import annotations

import torch
from torch import Tensor

import tip_kernels as tip
from tip_kernels._checks import FLOATS, expect, finite_number, renamed


def head(
    model: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tip.Head:
    """A Head. A weight that is sharded (a DTensor) is gathered, and cast to the hidden states' dtype.

    A weight or bias that holds no floats (a quantized one) would be cast to another head; it is refused, as an
    argument of the model.
    """
    for name, x in (("weight", weight), ("bias", bias)):
        ok = (x is None and name == "bias") or (isinstance(x, Tensor) and x.dtype in FLOATS)
        expect(ok, f"{model}_{name}", "a float32, bfloat16 or float16 tensor", x)
    expect(isinstance(hidden, Tensor), f"{model}_hidden", "a tensor (N, H) or (B, T, H)", hidden)
    weight, bias = _gathered(weight), _gathered(bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    own = {name: f"{model}_{name}" for name in ("hidden", "weight", "bias")}
    own |= {"scale": f"{model}_logit_scale", "softcap": f"{model}_final_logit_softcapping"}
    with renamed(**own):
        return tip.Head(hidden, weight, bias, scale=scale, softcap=softcap)


def _gathered(x: Tensor | None) -> Tensor | None:
    """The whole of a DTensor. Its gradient is the mean over the ranks, whose rows differ (FSDP) or not (TP)."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def jsd(name: str, beta: float) -> tip.JSD:
    """The divergence that TRL and Liger call beta: 0 is KL(teacher || student), 1 KL(student || teacher)."""
    expect(0 <= finite_number(name, beta) <= 1, name, "a number in [0, 1]", beta)
    return tip.JSD(float(beta))


def counted(name: str, labels: Tensor | None, ignored: int, shape: torch.Size) -> tuple[Tensor | None, int]:
    """Which rows have a label, on the CPU, where distill leaves the others out of every sweep, and how many.

    Synchronises. None and all rows without labels.
    """
    if labels is None:
        return None, shape.numel()
    ok = isinstance(labels, Tensor) and labels.shape in (shape, (shape.numel(),))
    expect(ok, name, f"labels of shape {tuple(shape)}", labels)
    mask = (labels != ignored).cpu()
    return mask, int(mask.sum())
