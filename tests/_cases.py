"""Inputs that the tests of measuring and learning share, and the bound that they hold results to.

The bound is three-way: truth is the reference in float64, "eager" the reference in float32 on the same inputs. The
worst error of ours over a case may be twice the worst of eager's, or an absolute floor, whichever is larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference as ref
import tip_kernels as tip

INF, NAN = math.inf, math.nan
STATISTIC_FLOOR = 2e-6
# Of fp32, relative: a value of 100 cannot be given to 2e-6, so the floor grows by two steps of the value.
ULP = 2.0**-22
# A Mamba's plain torch form makes a tensor of chunk x chunk x state a row and head: by default, 17 GB a backward.
SMALL_MAMBA = {"mamba_chunk_size": 16, "mamba_d_state": 16}
EVERY_FIELD = {"margins": True, "top_k": 5}
PAIR_FIELDS = ("kl_fwd", "kl_rev", "hellinger_sq")

Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(x: Tensor) -> Tensor:
    """A copy of x that wants a gradient."""
    return x.detach().clone().requires_grad_()


def labels_for(n_rows: int, vocab: int) -> Tensor:
    """Labels all over the vocabulary; every fifth row has none."""
    labels = torch.arange(n_rows) * 7919 % vocab
    labels[::5] = -100
    return labels


# Pairs of logits: name -> (rows, vocabulary) -> student and teacher, fp32


def flat(n: int, v: int) -> Pair:
    return 0.01 * normal(n, v, seed=1), 0.01 * normal(n, v, seed=2)


def ordinary(n: int, v: int) -> Pair:
    return 3 * normal(n, v, seed=3), 3 * normal(n, v, seed=4)


def peaked(n: int, v: int) -> Pair:
    """One token has all but 1e-13 of the mass; every other row's models disagree about which."""
    s, t = normal(n, v, seed=5), normal(n, v, seed=6)
    rows = torch.arange(n)
    s[rows, rows % v] += 30
    t[rows, (rows + rows % 2) % v] += 30
    return s, t


def near_equal(n: int, v: int, kl: float = 1e-4) -> Pair:
    s = 3 * normal(n, v, seed=7)
    return s, s + math.sqrt(2 * kl) * normal(n, v, seed=8)


def shifted_apart(n: int, v: int) -> Pair:
    s, t = ordinary(n, v)
    return s + 120, t - 120


def shifted_near_equal(n: int, v: int) -> Pair:
    s, t = near_equal(n, v)
    return s - 120, t + 120


def banned_in_both(n: int, v: int) -> Pair:
    ban = normal(n, v, seed=9) < -1
    return tuple(z.masked_fill(ban, -INF) for z in ordinary(n, v))


def banned_in_student(n: int, v: int) -> Pair:
    """The teacher's logits at the banned tokens run from -5 to -80, so their probability underflows in some rows."""
    s, t = ordinary(n, v)
    ban = normal(n, v, seed=10) < -1
    ban[:, 0] = True
    return s.masked_fill(ban, -INF), torch.where(ban, torch.linspace(-5, -80, n)[:, None], t)


def banned_in_teacher(n: int, v: int) -> Pair:
    t, s = banned_in_student(n, v)
    return s, t


def banned_tiles(n: int, v: int) -> Pair:
    """The student bans the first half of the vocabulary, the teacher the last third: whole tiles of banned tokens."""
    s, t = ordinary(n, v)
    s[:, : v // 2] = -INF
    t[:, -(v // 3) :] = -INF
    return s, t


PAIRS: dict[str, Callable[[int, int], Pair]] = {
    f.__name__: f
    for f in (
        flat,
        ordinary,
        peaked,
        near_equal,
        shifted_apart,
        shifted_near_equal,
        banned_in_both,
        banned_in_student,
        banned_in_teacher,
        banned_tiles,
    )
}


@dataclass
class HeadCase:
    """Hidden states and a head, fp32 values that their dtype represents, and the logits that they stand for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def to(self, dtype: torch.dtype) -> HeadCase:
        bias = None if self.bias is None else self.bias.to(dtype)
        return HeadCase(self.hidden.to(dtype), self.weight.to(dtype), bias, self.scale, self.softcap, self.vocab_size)

    @property
    def head(self) -> tip.Head:
        return tip.Head(
            self.hidden, self.weight, self.bias, scale=self.scale, softcap=self.softcap, vocab_size=self.vocab_size
        )

    def leaves(self) -> HeadCase:
        bias = None if self.bias is None else leaf(self.bias)
        return HeadCase(leaf(self.hidden), leaf(self.weight), bias, self.scale, self.softcap, self.vocab_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def logits(self, temperature: float | Tensor = 1.0) -> Tensor:
        """R1 in the dtype of the case."""
        v = self.vocab_size
        bias = None if self.bias is None else self.bias[:v]
        hidden = self.hidden.flatten(0, -2)
        return ref.logits(
            hidden, self.weight[:v], bias, scale=self.scale, softcap=self.softcap, temperature=temperature
        )


def head_case(n: int, v: int, width: int, seed: int, spread: float = 2.0, **options) -> HeadCase:
    """A head whose logits have a standard deviation of about `spread`."""
    return HeadCase(normal(n, width, seed=seed), spread * width**-0.5 * normal(v, width, seed=seed + 1), **options)


def no_worse(ours: Tensor, eager: Tensor, truth: Tensor, what: str, floor: float = STATISTIC_FLOOR) -> None:
    """Asserts that ours is NaN and infinite where truth is, and elsewhere no worse than the bound."""
    assert ours.shape == truth.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    finite = truth.isfinite()
    same = torch.equal(
        ours.double().masked_fill(finite, 0).nan_to_num(nan=7e77), truth.masked_fill(finite, 0).nan_to_num(nan=7e77)
    )
    assert same, f"{what}: not finite in other places, {ours.tolist()} instead of {truth.tolist()}"
    ours_error, eager_error = ((x.double() - truth).abs()[finite] for x in (ours, eager))
    # Where fp32 eager overflows or meets a NaN it says nothing about what is attainable.
    eager_worst = eager_error.nan_to_num(0.0, posinf=0.0).amax().item() if eager_error.numel() else 0.0
    allowed = (floor + ULP * truth[finite].abs()).clamp(min=2 * eager_worst)
    worst = (ours_error / allowed).nan_to_num(nan=INF).amax().item() if ours_error.numel() else 0.0
    assert worst <= 1, (
        f"{what}: error {ours_error.max():.2e}, {worst:.1f} times the bound; eager fp32 {eager_worst:.2e}, "
        f"values up to {truth[finite].abs().max():.3g}"
    )


def check_stats(
    stats: tip.TokenStats, z_s: Pair, z_t: Pair | None = None, fields: tuple[str, ...] = (), **asked
) -> None:
    """Holds every field of stats (or the given ones) to the bound; z_s and z_t are (float64, float32) logits."""
    truth, eager = (ref.token_stats(z_s[i], None if z_t is None else z_t[i], **asked) for i in (0, 1))
    failures = []
    for name in fields or truth:
        ours = stats._get(name)
        if truth[name] is None:
            assert ours is None, f"{name} was not asked for"
        elif truth[name].dtype in (torch.bool, torch.int64):
            assert ours.dtype == truth[name].dtype
            assert torch.equal(ours, truth[name]), f"{name}: {ours.tolist()} instead of {truth[name].tolist()}"
        else:
            assert ours.dtype == torch.float32
            try:
                no_worse(ours, eager[name], truth[name], name)
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


def relative_error(x: Tensor, truth: Tensor) -> float:
    distance, size = (x.double() - truth).norm().item(), truth.norm().item()
    return distance / size if size else (0.0 if distance == 0 else INF)


def check_gradient(
    ours: Tensor, eager: Tensor, truth: Tensor, what: str, *, largest_logit: float = 0.0, row_weight: float = 0.0
) -> None:
    """Asserts a relative error of at most 1e-5 or twice eager fp32's, or else an absolute one below the floor.

    The floor, 1e-7 max(1, largest |logit|) row_weight, is one of gradients with respect to logits: for other leaves
    leave row_weight at 0.
    """
    assert ours is not None, f"{what}: no gradient"
    assert ours.shape == truth.shape
    assert ours.isfinite().all(), f"{what}: not finite"
    relative, eager_relative = relative_error(ours, truth), relative_error(eager, truth)
    worst = (ours.double() - truth).abs().amax().item() if truth.numel() else 0.0
    floor = 1e-7 * max(1.0, largest_logit) * row_weight
    assert relative <= max(1e-5, 2 * eager_relative) or worst <= floor, (
        f"{what}: relative error {relative:.2e}, eager fp32 {eager_relative:.2e}; "
        f"largest error {worst:.2e}, floor {floor:.2e}"
    )


HEADS = {
    "plain": {},
    "bias": {"bias": normal(1300, seed=40)},
    "bias that bans": {"bias": torch.where(torch.arange(1300) % 7 == 3, -INF, 0.0)},
    "scale": {"scale": 0.125, "spread": 20.0},
    "softcap": {"softcap": 5.0, "spread": 4.0},
    "scale, softcap and bias": {"scale": 1.5, "softcap": 9.0, "bias": normal(1300, seed=40)},
    "vocab_size": {"vocab_size": 1100, "bias": normal(1300, seed=40)},
}


HOW = ("sweeps", "full_stats", "grad_filter", "backward", "grad_scale")


def distill(student, teacher, **options):
    """tip.distill, with the settings of its Execution among the options."""
    how = {name: options.pop(name) for name in HOW if name in options}
    return tip.distill(student, teacher, **({"execution": tip.Execution(**how)} if how else {}), **options)


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        if name == "_linear_pointwise":  # oneDNN's, of a and of b transposed
            self.macs += args[0].shape[0] * args[0].shape[1] * args[1].shape[0]
        assert name not in ("bmm", "baddbmm", "matmul", "linear"), name
        return func(*args, **(kwargs or {}))
