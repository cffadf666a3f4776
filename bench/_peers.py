"""One distillation step on hidden states, by this package and by what people would use instead.

Each step takes a Problem, leaves gradients in hidden_s.grad and weight_s.grad, and returns the loss. Reverse KL,
mean over the tokens that it learns from. A peer that is not installed is said, never faked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tip_kernels as tip

Step = Callable[["Problem"], Tensor]


@dataclass
class Problem:
    """Hidden states (N, H) and heads (V, H) of both models; the student's are leaves."""

    hidden_s: Tensor
    weight_s: Tensor
    hidden_t: Tensor
    weight_t: Tensor

    @classmethod
    def random(cls, n: int, h: int, v: int, *, dtype: torch.dtype = torch.float32, noise: float = 0.3) -> Problem:
        """A student near its teacher: the same head and hidden states but for noise, logits with deviation about 2."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5
        tensors = [hidden + noise * torch.randn(n, h), weight.clone(), hidden, weight]
        tensors = [tensor.to(dtype) for tensor in tensors]
        return cls(tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3])

    def clear(self) -> None:
        self.hidden_s.grad = self.weight_s.grad = None

    def gradients_mib(self) -> float:
        return sum(t.numel() * t.element_size() for t in (self.hidden_s, self.weight_s)) / 2**20


def ours(rule: tip.Rule, workspace_mib: float = 256) -> Step:
    def step(p: Problem) -> Tensor:
        student, teacher = tip.Head(p.hidden_s, p.weight_s), tip.Head(p.hidden_t, p.weight_t)
        out = tip.distill(student, teacher, select=rule, workspace_mib=workspace_mib)
        out.loss.backward()
        return out.loss.detach()

    return step


def _reverse_kl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor) -> Tensor:
    logp_s = (hidden_s @ weight_s.t()).float().log_softmax(-1)
    logp_t = (hidden_t @ weight_t.t()).float().log_softmax(-1)
    return (logp_s.exp() * (logp_s - logp_t)).sum(-1).mean()


def dense(p: Problem) -> Tensor:
    """Plain autograd through both whole softmaxes."""
    loss = _reverse_kl(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t)
    loss.backward()
    return loss.detach()


def compiled_dense() -> Step:
    """The same through torch.compile."""
    function = torch.compile(_reverse_kl, dynamic=False)

    def step(p: Problem) -> Tensor:
        loss = function(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t)
        loss.backward()
        return loss.detach()

    return step


def trl_all() -> Step:
    """TRL's chunked divergence over all tokens."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step(p: Problem) -> Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(p.hidden_s, p.weight_s, None, p.hidden_t, p.weight_t, None, 1.0)
        loss = rows.mean()
        loss.backward()
        return loss.detach()

    return step


def trl_twice(keep: float) -> Step:
    """TRL called to score, then again on the gathered rows of largest divergence: selection without this package."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step(p: Problem) -> Tensor:
        apply = ChunkedDivergenceFunction.apply
        with torch.no_grad():
            scores, _ = apply(p.hidden_s, p.weight_s, None, p.hidden_t, p.weight_t, None, 1.0)
        ids = scores.topk(int(keep * scores.numel())).indices
        rows, _ = apply(p.hidden_s[ids], p.weight_s, None, p.hidden_t[ids], p.weight_t, None, 1.0)
        loss = rows.mean()
        loss.backward()
        return loss.detach()

    return step


def liger(chunk_size: int = 256) -> Step:
    """Liger's compiled chunked JSD at beta = 1 (reverse KL), without its label loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True, chunk_size=chunk_size
    )

    def step(p: Problem) -> Tensor:
        labels = torch.zeros(p.hidden_s.shape[0], dtype=torch.int64, device=p.hidden_s.device)
        loss = function(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t, labels)
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward()
        return loss.detach()

    return step


def available(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that can be made, and why the others cannot."""
    steps, missing = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return steps, missing
