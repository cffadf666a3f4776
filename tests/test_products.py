"""Products of fp32 matrices by torch.mm and by oneDNN: the same sums in the same precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests._cases import normal
from tip_kernels.backends import products

ROOT = Path(__file__).parents[1]
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (64, 24, 9000), (9000, 24, 96), (70, 4500, 48)], ids=str)
def test_onednn_gives_a_product_and_adds_one_with_the_precision_of_torch_mm(shape, layout):
    m, k, n = shape
    a = normal(k, m, seed=1).t() if layout[0] == "t" else normal(m, k, seed=1)
    b = normal(n, k, seed=2).t() if layout[1] == "t" else normal(k, n, seed=2)
    truth, out, start = a.double() @ b.double(), torch.full((m, n), torch.nan), normal(m, n, seed=3)
    bound = 4 * torch.finfo(torch.float32).eps * a.double().abs() @ b.double().abs()
    assert products._mm(a, b, out=out) is out
    assert ((out - truth).abs() <= bound).all()
    added = start.clone()
    products._addmm_(added, a, b)
    assert ((added - (start.double() + truth)).abs() <= bound + 4e-7 * start.abs()).all()
    rms, of_torch = ((x - truth).norm() for x in (out, torch.mm(a, b)))
    assert rms <= 2 * of_torch + 1e-12 * truth.norm()


@needs_onednn
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_an_empty_product_is_left_to_torch(shape):
    m, k, n = shape
    out = torch.ones(m, n)
    products._addmm_(out, torch.ones(m, k), torch.ones(k, n))
    assert torch.equal(out, torch.ones(m, n))
    assert not products._mm(torch.ones(m, k), torch.ones(k, n), out=out).any()


@needs_onednn
def test_onednn_takes_parts_of_a_wide_result_and_of_a_long_sum(monkeypatch):
    a, b = normal(6, 50, seed=1), normal(50, 40, seed=2)
    whole = products._mm(a, b, out=torch.empty(6, 40))
    monkeypatch.setattr(products, "BLOCK", 12)
    monkeypatch.setattr(products, "DEPTH", 7)
    for x, y, expected in ((a, b, whole), (b.t(), a.t(), whole.t())):
        parts = products._mm(x, y, out=torch.empty(expected.shape))
        torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-5)


def test_the_library_follows_the_cpus_maker_unless_the_environment_chooses(monkeypatch):
    monkeypatch.delenv(products.ENVIRONMENT, raising=False)
    for amd in (True, False):
        monkeypatch.setattr(products, "_is_amd", lambda amd=amd: amd)
        both = ONEDNN and torch.backends.mkl.is_available()
        assert products.chosen() == ("onednn" if amd and both else "torch")
        for name in products.NAMES[: 1 + ONEDNN]:
            monkeypatch.setenv(products.ENVIRONMENT, name)
            assert products.chosen() == name
        monkeypatch.delenv(products.ENVIRONMENT)
    monkeypatch.setenv(products.ENVIRONMENT, "abacus")
    with pytest.raises(ValueError, match="TIP_KERNELS_PRODUCTS: expected 'torch' or 'onednn', got 'abacus'"):
        products.chosen()


STEP = """
import torch, tip_kernels as tip
from tests._cases import Products, head_case
student, teacher = head_case(48, 300, 24, seed=1).leaves(), head_case(48, 300, 40, seed=5)
with Products() as counted:
    out = tip.distill(student.head, teacher.head, select=tip.SoftOr(0.5))
    out.loss.backward()
print(out.plan.products, counted.macs, float(out.loss), float(student.weight.grad.double().norm()))
"""


@needs_onednn
def test_a_step_takes_as_many_products_and_gives_the_same_numbers_by_either_library():
    said = {}
    for name in products.NAMES:
        environment = os.environ | {"PYTHONPATH": str(ROOT), products.ENVIRONMENT: name}
        done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        library, *said[name] = done.stdout.split()
        assert library == name
    macs, loss, norm = zip(*(map(float, said[name]) for name in products.NAMES), strict=True)
    assert macs[0] == macs[1] > 0
    assert loss[0] == pytest.approx(loss[1], rel=1e-5) and norm[0] == pytest.approx(norm[1], rel=1e-5)
