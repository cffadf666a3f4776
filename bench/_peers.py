"""One distillation step on hidden states, by this package and by what people would use instead.

Each step takes a Problem, leaves gradients in hidden_s.grad and weight_s.grad, and returns the loss. Reverse KL,
mean over the tokens that it learns from. A peer that is not installed is said, never faked.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    def random(
        cls,
        n: int,
        h: int,
        v: int,
        *,
        dtype: torch.dtype = torch.float32,
        noise: float = 0.3,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """A student near its teacher: the same head and hidden states but for noise, logits with deviation about 2."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(n, h, device=device), torch.randn(v, h, device=device).mul_(2 / h**0.5)
        student = hidden + noise * torch.randn(n, h, device=device)
        tensors = [x.to(dtype) for x in (student, weight, hidden, weight)]
        tensors[1] = tensors[1].clone()
        return cls(tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3])

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, without gradients yet."""
        tensors = [x.detach().to(dtype).clone() for x in (self.hidden_s, self.weight_s, self.hidden_t, self.weight_t)]
        return Problem(tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:])

    def clear(self) -> None:
        self.hidden_s.grad = self.weight_s.grad = None

    def gradients_mib(self) -> float:
        return sum(t.numel() * t.element_size() for t in (self.hidden_s, self.weight_s)) / 2**20


def ours(rule: tip.Rule, workspace_mib: float = 256, sweeps: int | None = None) -> Step:
    def step(p: Problem) -> Tensor:
        student, teacher = tip.Head(p.hidden_s, p.weight_s), tip.Head(p.hidden_t, p.weight_t)
        how = tip.Execution(sweeps=sweeps)
        out = tip.distill(student, teacher, select=rule, workspace_mib=workspace_mib, execution=how)
        out.loss.backward()
        return out.loss.detach()

    return step


def reverse_kl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor) -> Tensor:
    wide = torch.promote_types(hidden_s.dtype, torch.float32)
    logp_s = (hidden_s @ weight_s.t()).to(wide).log_softmax(-1)
    logp_t = (hidden_t @ weight_t.t()).to(wide).log_softmax(-1)
    return (logp_s.exp() * (logp_s - logp_t)).sum(-1).mean()


def dense(p: Problem) -> Tensor:
    """Plain autograd through both whole softmaxes."""
    loss = reverse_kl(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t)
    loss.backward()
    return loss.detach()


def compiled_dense() -> Step:
    """The same through torch.compile."""
    function = torch.compile(reverse_kl, dynamic=False)

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


def known_rows(p: Problem, keep: float) -> Tensor:
    """(N,) bool: as many rows as keep says, by chance."""
    n = p.hidden_s.shape[0]
    return (torch.randperm(n, generator=torch.Generator().manual_seed(1)) < int(keep * n)).to(p.hidden_s.device)


def ours_known(keep: float) -> Step:
    """A mask known beforehand."""

    def step(p: Problem) -> Tensor:
        student, teacher = tip.Head(p.hidden_s, p.weight_s), tip.Head(p.hidden_t, p.weight_t)
        out = tip.distill(student, teacher, select=tip.KeepAll(), row_mask=known_rows(p, keep).cpu())
        out.loss.backward()
        return out.loss.detach()

    return step


def unsloth(keep: float = 1.0) -> Step:
    """unsloth-zoo's fused reverse KL, of all tokens or of a mask known beforehand; its file alone is loaded."""
    found = importlib.util.find_spec("unsloth_zoo")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'unsloth_zoo'", name="unsloth_zoo")
    file = Path(found.submodule_search_locations[0]) / "fused_losses" / "fused_linear.py"
    spec = importlib.util.spec_from_file_location("unsloth_fused_linear", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)

    def step(p: Problem) -> Tensor:
        mask = None if keep == 1 else known_rows(p, keep)
        loss = module.fused_linear_jsd(p.hidden_s, p.weight_s, p.hidden_t, p.weight_t, mask=mask, beta=1.0)
        loss.backward()
        return loss.detach()

    return step


def labels_of(p: Problem) -> Tensor:
    return torch.arange(p.hidden_s.shape[0], device=p.hidden_s.device) * 7919 % p.weight_s.shape[0]


def ours_labels() -> Step:
    """The cross-entropy of labels alone, which is forward KL from a teacher that is sure of them."""

    def step(p: Problem) -> Tensor:
        student, teacher = tip.Head(p.hidden_s, p.weight_s), tip.Head(p.hidden_t, p.weight_t)
        out = tip.distill(student, teacher, select=tip.KeepAll(), labels=labels_of(p), ce_weight=1.0)
        out.loss.backward()
        return out.loss.detach()

    return step


def linear_cross_entropy() -> Step:
    """torch's own, in chunks."""
    from torch.nn.functional import linear_cross_entropy

    def step(p: Problem) -> Tensor:
        loss = linear_cross_entropy(p.hidden_s, p.weight_s, labels_of(p))
        loss.backward()
        return loss.detach()

    return step


Stats = dict[str, Tensor]


def dense_stats(z_s: Tensor, z_t: Tensor) -> Stats:
    """The statistics of both models' rows by plain torch, through whole fp32 softmaxes; logits (N, V)."""
    lse_s, lse_t = z_s.float().logsumexp(-1), z_t.float().logsumexp(-1)
    logp_s, logp_t = z_s.float() - lse_s[:, None], z_t.float() - lse_t[:, None]
    p_s, p_t = logp_s.exp(), logp_t.exp()
    return {
        "lse_s": lse_s,
        "lse_t": lse_t,
        "entropy_s": -(p_s * logp_s).sum(-1),
        "entropy_t": -(p_t * logp_t).sum(-1),
        "kl_fwd": (p_t * (logp_t - logp_s)).sum(-1),
        "kl_rev": (p_s * (logp_s - logp_t)).sum(-1),
        "hellinger_sq": 1 - (p_s * p_t).sqrt().sum(-1),
    }


def dense_stats_of_hidden(p: Problem) -> Stats:
    return dense_stats(p.hidden_s @ p.weight_s.t(), p.hidden_t @ p.weight_t.t())


def trl_stats() -> Callable[[Problem], Stats]:
    """What TRL's chunked divergence measures in its forward: the reverse KL and the student's entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def measure(p: Problem) -> Stats:
        kl_rev, entropy = ChunkedDivergenceFunction.apply(
            p.hidden_s, p.weight_s, None, p.hidden_t, p.weight_t, None, 1.0
        )
        return {"kl_rev": kl_rev, "entropy_s": entropy}

    return measure


class Update:
    """A whole update of a Qwen3-shaped student with random weights; the teacher's hidden states are given.

    run(step): zero the gradients, forward, the step's loss and backward, one AdamW step.
    """

    def __init__(
        self, batch: int, time: int, *, small: bool, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import Qwen3Config, Qwen3Model

        if small:
            shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
            shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        else:  # Qwen3-0.6B
            shape = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
            shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        torch.manual_seed(0)
        with torch.device(device):
            config = Qwen3Config(**shape, initializer_range=0.06, use_cache=False, pad_token_id=0)
            self.model = Qwen3Model(config).to(dtype)
            self.ids = torch.randint(shape["vocab_size"], (batch, time))
        self.weight = self.model.get_input_embeddings().weight  # tied to the head
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        with torch.no_grad():
            hidden = self.hidden()
            self.hidden_t = hidden + 0.3 * torch.randn_like(hidden)
            self.weight_t = self.weight.detach().clone()

    def hidden(self) -> Tensor:
        """(B T, H)"""
        return self.model(input_ids=self.ids).last_hidden_state.flatten(0, 1)

    def run(self, step: Step) -> Tensor:
        self.clear()
        loss = step(Problem(self.hidden(), self.weight, self.hidden_t, self.weight_t))
        self.optimizer.step()
        return loss

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def problem(self) -> Problem:
        """The loss alone, on the student as it is now."""
        with torch.no_grad():
            hidden = self.hidden()
        weight = self.weight.detach().clone()
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), self.hidden_t, self.weight_t)


def available(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that can be made, and why the others cannot."""
    steps, missing = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return steps, missing
