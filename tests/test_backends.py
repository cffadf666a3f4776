"""Both backends give the same statistics, losses and gradients, for every divergence and kind of source."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

import tip_kernels as tip
from tests._cases import check_stats, distill, head_case, labels_for, normal
from tip_kernels.backends import choice
from tip_kernels.backends.triton import _launch, linear_stats
from tip_kernels.learn import gradient_sweep as sweeps
from tip_kernels.measure.sweep import measure
from tip_kernels.sources.pair import Pair, rows_of
from tip_kernels.stats import STATISTICS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILY = [
    tip.ForwardKL(),
    tip.ReverseKL(),
    tip.Jeffreys(),
    tip.JSD(0.3),
    tip.SkewForwardKL(),
    tip.SkewReverseKL(),
    tip.SkewReverseKL(detach_mixture=True),
    tip.TVD(),
    tip.HellingerSq(),
    tip.Renyi(0.5),
    tip.Renyi(2.0),
    tip.AlphaBeta(),
    tip.ToDi(),
    tip.ToDi(0.5),
    tip.SampledReverseKL(2.0),
    0.5 * tip.ForwardKL() + 2.0 * tip.JSD(),
    tip.ReverseKL().clipped(1.0),
]
N, V, H = 6, 301, 16


def problem(source: str) -> tuple[list[torch.Tensor], object, object]:
    """(leaves, student, teacher) of a source, not too far apart."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    near = [hidden + 0.2 * torch.randn(N, H), weight + 0.1 * torch.randn(V, H)]
    if source == "logits":
        leaves = [(near[0] @ near[1].T).to(DEVICE).requires_grad_()]
        return leaves, leaves[0], (hidden @ weight.T).to(DEVICE)
    leaves = [x.to(DEVICE).requires_grad_() for x in near]
    softcap = 8.0 if source == "capped head" else None
    return leaves, tip.Head(*leaves, softcap=softcap), tip.Head(hidden.to(DEVICE), weight.to(DEVICE), scale=0.9)


def learn(backend: str, source: str, divergence: tip.Divergence, **settings) -> tuple[torch.Tensor, ...]:
    leaves, student, teacher = problem(source)
    labels = torch.arange(N, device=DEVICE) * 50
    with tip.backend(backend):
        out = distill(student, teacher, select=tip.SoftOr(4), divergence=divergence, labels=labels, **settings)
        grads = torch.autograd.grad(out.loss, leaves)
    return out.loss.detach(), *grads


@pytest.mark.parametrize(
    ("device", "name"),
    [("cuda", "triton"), ("xpu", "triton"), ("cpu", "eager"), ("mps", "eager"), ("npu", "eager"), ("meta", "eager")],
)
def test_triton_is_chosen_on_the_gpus_that_it_compiles_for(monkeypatch, device, name):
    """By the device's type alone, which a stand-in has, too: torch knows npu only with its vendor's package."""
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", True)
    assert choice.backend_for(SimpleNamespace(type=device)) == name
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", False)
    assert choice.backend_for(SimpleNamespace(type=device)) == "eager"


@pytest.mark.parametrize("device", ["cpu", "mps", "npu"])
def test_triton_is_refused_where_it_cannot_run(monkeypatch, device):
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with tip.backend("triton"), pytest.raises(ValueError, match=f"with tensors on the {device}, which needs"):
        choice.backend_for(SimpleNamespace(type=device))


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    entered = []
    for name in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "device_of", lambda x, name=name: entered.append(name))
    for is_xpu in (True, False):
        _launch.on_device(SimpleNamespace(is_xpu=is_xpu))
    assert entered == ["xpu", "cuda"]


@pytest.mark.parametrize("source", ["logits", "head", "capped head"])
@pytest.mark.parametrize("divergence", FAMILY, ids=str)
def test_backends_agree_on_loss_and_gradients(divergence, source):
    for ours, eager in zip(learn("triton", source, divergence), learn("eager", source, divergence), strict=True):
        assert torch.linalg.norm(ours - eager) <= 2e-5 * torch.linalg.norm(eager) + 1e-6


@pytest.mark.parametrize("source", ["logits", "head"])
def test_backends_agree_with_a_label_loss_and_row_temperatures(source):
    settings = {"ce_weight": 0.3, "temperature": torch.linspace(0.5, 2.0, N, device=DEVICE), "temperature_sq": True}
    runs = (learn(backend, source, tip.JSD(), **settings) for backend in ("triton", "eager"))
    for ours, eager in zip(*runs, strict=True):
        assert torch.linalg.norm(ours - eager) <= 2e-5 * torch.linalg.norm(eager) + 1e-6


@pytest.mark.parametrize("divergence", [tip.SampledReverseKL(), tip.ReverseKL() + tip.SampledReverseKL(2.0)], ids=str)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_labels_keep_the_kernel_over_whole_rows(monkeypatch, divergence, ce_weight):
    """Where the label loss stands alone tiles take its gradient, since a divergence must not matter to it then."""
    monkeypatch.setattr(sweeps.GradientSweep, "dlogits_tile", lambda *args: pytest.fail("took tiles"))
    settings = {"ce_weight": ce_weight, "temperature": torch.linspace(0.5, 2.0, N, device=DEVICE)}
    if ce_weight == 1.0:
        with pytest.raises(pytest.fail.Exception):
            learn("triton", "logits", divergence, **settings)
        return
    ours = learn("triton", "logits", divergence, **settings)
    monkeypatch.undo()
    for a, b in zip(ours, learn("eager", "logits", divergence, **settings), strict=True):
        assert torch.linalg.norm(a - b) <= 2e-5 * torch.linalg.norm(b) + 1e-6


@pytest.mark.parametrize("mode", ["dense", "compact", "inplace"])
def test_backends_agree_on_every_form_of_a_logit_gradient(mode):
    grads = []
    for backend in ("triton", "eager"):
        leaves, _, teacher = problem("logits")
        logits = leaves[0].detach().clone().requires_grad_()
        with tip.backend(backend):
            stats = tip.token_stats(logits.detach(), teacher)
            kept = tip.TopEntropy(3)(stats)
            tip.divergence_loss(logits, teacher, kept=kept, stats=stats, grad_logits=mode).sum().backward()
        grads.append(logits.grad.to_dense() if mode == "compact" else logits.grad)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-7)


def test_equal_fp32_logits_give_the_same_bits_from_a_head_as_from_logits():
    torch.manual_seed(2)
    hidden, weight_s, weight_t = (torch.randn(n, H, device=DEVICE) for n in (N, 9001, 9001))
    with tip.backend("triton"):
        heads = tip.token_stats(tip.Head(hidden, weight_s), tip.Head(hidden, weight_t))
        # The products a Head takes: columns in multiples of what one program of the fold reads.
        tiles = [torch.cat([hidden @ w[:8192].T, hidden @ w[8192:].T], 1) for w in (weight_s, weight_t)]
        logits = tip.token_stats(*tiles)
    for field in ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        assert torch.equal(getattr(heads, field), getattr(logits, field)), field


# ---- hidden states: one kernel for products and fold

FUSED_CASES = {
    "plain": {},
    "bias": {"bias": normal(700, seed=40)},
    "bias that bans": {"bias": torch.where(torch.arange(700) % 7 == 3, -torch.inf, 0.0)},
    "scale, softcap and bias": {"scale": 1.5, "softcap": 9.0, "bias": normal(700, seed=41)},
    "vocab_size": {"vocab_size": 613, "bias": normal(700, seed=42)},
}


def on_cpu(stats: tip.TokenStats) -> tip.TokenStats:
    return tip.TokenStats(**{name: value.cpu() for name in STATISTICS if (value := stats._get(name)) is not None})


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """Heads measured by the fused kernel wherever it can; the rows of each of its calls."""
    calls, was = [], linear_stats.linear_stats
    monkeypatch.setattr(linear_stats, "fused_pays", lambda *args: True)
    monkeypatch.setattr(linear_stats, "linear_stats", lambda *a, **k: (calls.append(len(a[0])), was(*a, **k))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_statistics_of_heads_are_no_worse_than_eager_fp32(fused, name, dtype):
    """Hidden widths that differ, a temperature a row, labels, all rows and chosen ones, both models and one."""
    options = FUSED_CASES[name]
    cases = [head_case(20, 700, width, seed, **options).to(dtype) for width, seed in ((40, 1), (64, 3))]
    student, teacher = (case.to(DEVICE).head for case in cases)
    tau, labels = torch.linspace(0.5, 2.0, 20), labels_for(20, 600)
    truth = [[case.to(d).logits(tau.to(d)) for d in (torch.float64, torch.float32)] for case in cases]
    with tip.backend("triton"):
        on = {"labels": labels.to(DEVICE), "temperature": tau.to(DEVICE)}
        both, alone = tip.token_stats(student, teacher, **on), tip.token_stats(student, **on)
        mask = torch.arange(20) % 3 == 1
        out = distill(student, teacher, select=tip.KeepAll(), row_mask=mask, full_stats=True, sweeps=2, **on)
    assert fused == [20, 20, 7]
    check_stats(on_cpu(both), *truth, labels=labels)
    check_stats(on_cpu(alone), truth[0], labels=labels)
    for field in ("lse_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        chosen, every = getattr(out.stats, field).cpu(), getattr(both, field).cpu()
        torch.testing.assert_close(chosen[mask], every[mask], rtol=1e-6, atol=2e-6)
        assert chosen[~mask].isnan().all()


def test_fused_measuring_keeps_to_its_workspace(fused):
    student, teacher = (head_case(200, 700, 40, seed).to(torch.float16) for seed in (1, 3))
    with tip.backend("triton"):
        pair = Pair(*(rows_of(case.head, "student") for case in (student, teacher)))
        whole, small = (measure(pair, frozenset({"kl_rev"}), workspace=size) for size in (2**24, 2**16))
    assert fused[0] == 200 and len(fused) > 3 and max(fused[1:]) < 100
    torch.testing.assert_close(whole["kl_rev"], small["kl_rev"], rtol=1e-6, atol=2e-6)


def test_what_the_fused_kernel_cannot_take_goes_to_a_library_product(fused):
    odd = head_case(6, 300, 9, 1).to(torch.float16)  # rows that do not start at multiples of 16 bytes
    case = head_case(6, 300, 16, 1)
    with tip.backend("triton"):
        tip.token_stats(odd.head)
        tip.token_stats(case.head, margins=True)
        tip.token_stats(case.head, case.logits())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tip.token_stats(case.head)
    assert fused == []


def test_the_table_of_the_fused_kernel(monkeypatch):
    """It prefers the kernel only where the products are short for each logit, on a GPU with bulk copies."""
    asked = [(4096, 1024), (4096, 2048), (256, 4096), (257, 4096)]
    for found, expected in (
        (("cuda", 90), [1, 0, 1, 0]),
        (("cuda", 80), [0] * 4),
        (("hip", 0), [0] * 4),
        (("", 0), [0] * 4),
    ):
        monkeypatch.setattr(linear_stats, "target", lambda found=found: found)
        assert [linear_stats.fused_pays(*shape, torch.bfloat16) for shape in asked] == [bool(x) for x in expected], (
            found
        )
        assert not linear_stats.fused_pays(8, 64, torch.float32)


# ---- waiting for the device

DEVICE_RULES = [
    tip.KeepAll(),
    tip.SoftOr(0.5),
    tip.TopEntropy(3, scope="batch"),
    tip.Overconfident(0.2),
    tip.RandomRows(0.3),
    tip.SampleEntropy(0.3, gamma=1.0, unbiased=True),
]


def on_meta(monkeypatch: pytest.MonkeyPatch, source: str, **settings) -> None:
    """A whole step on tensors without values, which stand in for a GPU's: to look at one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = {"bool": torch.bool, "int64": torch.int64, "float32": torch.float32}
    settings = {name: empty(24, dtype=rows[x]) if x in rows else x for name, x in settings.items()}
    if source == "logits":
        leaves = [empty(24, 9000).requires_grad_()]
        student, teacher = leaves[0], empty(24, 9000)
    else:
        leaves = [empty(24, 64).requires_grad_(), empty(9000, 64).requires_grad_()]
        student, teacher = tip.Head(*leaves, softcap=30.0), tip.Head(empty(24, 128), empty(9000, 128))
    distill(student, teacher, **settings).loss.backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("source", ["logits", "head"])
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_distill_with_a_fixed_count_waits_for_nothing(monkeypatch, backend, source):
    """No .item(), nonzero or copy to the host from the first measurement to the end of backward."""
    labels = {"labels": "int64", "row_mask": "bool", "row_weights": "float32"}
    cases = [
        *({"select": rule} for rule in DEVICE_RULES),
        {"divergence": tip.JSD(), "ce_weight": 0.3, "temperature": "float32", "temperature_sq": True, **labels},
        {"divergence": tip.SampledReverseKL(2.0), "select": tip.TopEntropy(0.5), **labels},
        {"divergence": tip.Renyi(0.5), "normalizer": "all", "full_stats": True, "select": tip.TopEntropy(0.5)},
        tip.adakd(tip.AdaptiveFocus()),
    ]
    with tip.backend(backend):
        for case in cases:
            on_meta(monkeypatch, source, **case)


@pytest.mark.parametrize("wait", ["rollout_ids", "row_ids"])
def test_a_wait_would_be_seen(monkeypatch, wait):
    """What does look at values, by its docstring, is an error on such tensors."""

    class Looks(tip.TopEntropy):
        def __call__(self, *args, **kwargs):
            kept = super().__call__(*args, **kwargs)
            return kept if wait == "rollout_ids" else (kept.row_ids, kept)[1]

    settings = {"rollout_ids": "int64"} if wait == "rollout_ids" else {}
    with tip.backend("triton"), pytest.raises((NotImplementedError, RuntimeError)):
        on_meta(monkeypatch, "head", select=Looks(0.5), **settings)
