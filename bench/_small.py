"""Every kernel once on small shapes, held to the float64 reference: what a sanitizer is run over.

    python -m bench._small [--dry-run]

Inputs are made on the CPU, so that almost nothing but the kernels runs on the device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import reference as ref
from reference import divergences
from tip_kernels.backends.triton.row_grad import Label, Term, row_grad
from tip_kernels.backends.triton.row_stats import row_stats
from tip_kernels.backends.triton.row_sums import row_sums

N, H = 5, 64
VOCABS = (9008, 9001)  # two parts, the second ragged; rows with and without 16-byte loads
VOCABS_DRY = (301,)  # the interpreter is slow
TOLERANCE = 1e-4

Move = Callable[[Tensor], Tensor]


def _pair(dtype: torch.dtype, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (3 * torch.randn(N, vocab, generator=generator) for _ in range(2))
    z_s[1, 7], z_t[2, 9] = -torch.inf, -torch.inf
    return z_s.to(dtype), z_t.to(dtype)


def _error(ours: Tensor, truth: Tensor) -> float:
    """Largest error relative to max(1, |truth|); infinite where one is finite and the other is not."""
    ours, truth = ours.double().cpu(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(ours.nan_to_num(nan=7e77)[~finite], truth.nan_to_num(nan=7e77)[~finite]):
        return torch.inf
    difference = ((ours - truth).abs() / truth.abs().clamp(min=1))[finite]
    return difference.nan_to_num(nan=torch.inf).amax().item()


def _stats_error(ours: dict[str, Tensor], z_s: Tensor, z_t: Tensor | None, **asked) -> float:
    truth = ref.token_stats(z_s.double(), None if z_t is None else z_t.double(), **asked)
    return max(_error(ours[name], value) for name, value in truth.items() if value is not None and name in ours)


def _fold(dtype: torch.dtype, move: Move, vocab: int, *, teacher: bool = True, **settings) -> float:
    z_s, z_t = _pair(dtype, vocab)
    z_t = z_t if teacher else None
    moved = {name: move(x) if isinstance(x, Tensor) else x for name, x in settings.items()}
    ours = row_stats(move(z_s), None if z_t is None else move(z_t), **moved)
    scale, cap = settings.pop("scale_s", 1.0), settings.pop("softcap_s", None)
    tau = settings.pop("temperature", 1.0)
    z_s, z_t = z_s.double() * scale, None if z_t is None else z_t.double()
    z_s = z_s if cap is None else cap * torch.tanh(z_s / cap)
    tau = tau.double()[:, None] if isinstance(tau, Tensor) else tau
    return _stats_error(ours, z_s / tau, None if z_t is None else z_t / tau, **settings)


def _rows(move: Move, z_s: Tensor, z_t: Tensor) -> dict[str, Tensor]:
    """Row scalars for the gradients, from the reference."""
    l_s, l_t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    stats = row_stats(move(z_s), move(z_t))
    a, b = 0.5, 0.5
    sum_g = (((a + b) * l_s).exp() - (a * l_t + b * l_s).exp()).sum(-1) / a
    return stats | {
        "log_blend": move(torch.logsumexp(0.5 * l_t + 0.5 * l_s, -1).float()),
        "sum_g": move(sum_g.float()),
    }


def _grad(
    kind: str,
    dtype: torch.dtype,
    move: Move,
    vocab: int,
    *,
    scatter: bool = False,
    label: bool = False,
    balance: bool = False,
) -> float:
    z_s, z_t = (z.masked_fill(z.isneginf(), -30) for z in _pair(dtype, vocab))
    if balance:  # rows that are sure of a token
        z_s[:3, 7] = 25.0
    params = {"renyi": (0.5,), "alpha_beta": (0.5, 0.5)}.get(kind, ())
    term = Term(1.0, kind, params, _rows(move, z_s, z_t))
    stats = row_stats(move(z_s), move(z_t))
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    ids = torch.arange(N).flip(0) if scatter else None
    at = ids if scatter else slice(None)
    labels_at = torch.arange(N) * (vocab // N)
    labels = Label(move(labels_at), move(torch.ones(N))) if label else None
    if scatter:
        stats = {name: value[move(ids)] for name, value in stats.items()}
        term = term._replace(rows={name: value[move(ids)] for name, value in term.rows.items()})
    out = move(torch.full_like(z_s, 5.0)) if scatter else None
    ours = row_grad(
        move(z_s), move(z_t), move(upstream), stats, [term],
        label=labels, row_ids=None if ids is None else move(ids), out=out, scatter=scatter,
        balance=balance,
    )  # fmt: skip
    leaf = z_s.double().requires_grad_()
    value = getattr(divergences, kind)(leaf, z_t.double(), *params)
    (value[at] * upstream.double()).sum().backward()
    truth = leaf.grad
    if label:
        truth[torch.arange(N), labels_at] += 1.0
    return _error(ours, truth) * (1 if dtype == torch.float32 else 2.0**-7)  # the output's own rounding


def _sums(kind: str, params: tuple[float, ...], move: Move, vocab: int) -> float:
    z_s, z_t = (z.masked_fill(z.isneginf(), -30) for z in _pair(torch.bfloat16, vocab))
    sums = row_sums(move(z_s), move(z_t), row_stats(move(z_s), move(z_t)), [Term(1.0, kind, params)])[0]
    value = sums["value"] if "value" in sums else params[0] * sums["kl_t"] + (1 - params[0]) * sums["kl_s"]
    reference = params[:1] if kind.startswith("skew") else params
    return _error(value, getattr(divergences, kind)(z_s.double(), z_t.double(), *reference))


def _linear(dtype: torch.dtype, move: Move, vocab: int, *, teacher: bool = True, bias: bool = False) -> float:
    from tip_kernels.backends.triton.linear_stats import linear_stats

    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(rows, width, generator=generator) for width in (H, 2 * H) for rows in (N, vocab)]
    wide = [(x * (3 * x.shape[1] ** -0.5 if i % 2 else 1)).to(dtype) for i, x in enumerate(wide)]
    biases = [torch.randn(vocab, generator=generator).to(dtype) if bias else None for _ in range(2)]
    given = wide if teacher else wide[:2]
    ours = linear_stats(
        *map(move, given), bias_s=biases[0] if not bias else move(biases[0]),
        bias_t=move(biases[1]) if bias and teacher else None,
    )  # fmt: skip
    z_s, z_t = (
        ref.logits(*(x.double() for x in wide[i : i + 2]), None if b is None else b.double())
        for i, b in ((0, biases[0]), (2, biases[1]))
    )
    return _stats_error(ours, z_s, z_t if teacher else None)


def cases(dry_run: bool = False) -> dict[str, Callable[[Move, int], float]]:
    """Name -> function of (how to move tensors, vocabulary) that calls a launcher and returns its error.

    A name begins with the kernels that are launched.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    fold, add = "fold_kernel finish_kernel", "sums_kernel add_parts_kernel"
    found = {
        f"{fold}: pair bf16": partial(_fold, bf16),
        f"{fold}: pair fp32 margins": partial(_fold, fp32, margins=True),
        f"{fold}: student": partial(_fold, bf16, teacher=False),
        f"{fold}: row temperature": partial(_fold, fp16, temperature=torch.linspace(0.5, 2, N)),
        f"{fold}: scale and softcap": partial(_fold, bf16, teacher=False, scale_s=0.5, softcap_s=20.0),
        "grad_kernel: forward_kl": partial(_grad, "forward_kl", fp32),
        "grad_kernel: reverse_kl bf16": partial(_grad, "reverse_kl", bf16),
        "grad_kernel entry_kernel: reverse_kl, sure": partial(_grad, "reverse_kl", fp32, balance=True),
        "grad_kernel: scattered hellinger_sq": partial(_grad, "hellinger_sq", fp32, scatter=True),
        "grad_kernel: renyi with labels": partial(_grad, "renyi", fp32, label=True),
        "grad_kernel: alpha_beta": partial(_grad, "alpha_beta", fp32),
        f"{add}: jsd": partial(_sums, "jsd", (0.3,)),
        f"{add}: tvd": partial(_sums, "tvd", ()),
        f"{add}: todi": partial(_sums, "todi", (1.0,)),
        f"{add}: skew_forward_kl": partial(_sums, "skew_forward_kl", (0.1,)),
        f"{add}: skew_reverse_kl": partial(_sums, "skew_reverse_kl", (0.1, 0.0)),
    }
    dtype = fp16 if dry_run else bf16  # the interpreter multiplies the raw bits of bf16
    found |= {
        "linear_kernel finish_kernel: pair": partial(_linear, dtype),
        "linear_kernel finish_kernel: student, bias": partial(_linear, dtype, teacher=False, bias=True),
    }
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench._small", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, through Triton's interpreter")
    dry_run = parser.parse_args(argv).dry_run
    device = "cpu" if dry_run else "cuda"
    wrong = 0
    for vocab in VOCABS_DRY if dry_run else VOCABS:
        for name, case in cases(dry_run).items():
            error = case(lambda x: x.to(device), vocab)
            ok = error <= TOLERANCE
            wrong += not ok
            print(f"  {f'{name}, V={vocab}':60} error {error:.1e}{'' if ok else '  WRONG'}", flush=True)
    if not dry_run:
        torch.cuda.synchronize()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
