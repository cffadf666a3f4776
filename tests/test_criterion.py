"""ce_rows="all": the divergence on kept rows and the label loss on all of them, as AdaKD's and ToDi's scripts train."""

from __future__ import annotations

import pytest
import torch

import reference as ref
import tip_kernels as tip
from tests._cases import leaf, normal, relative_error

N, V, H = 60, 50, 8


def batch() -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of both models, labels of which every seventh is none, and a mask."""
    labels = torch.arange(N) * 13 % V
    labels[::7] = -100
    mask = torch.arange(N) % 5 != 1
    return normal(N, H, seed=1), normal(V, H, seed=2), normal(N, H, seed=3), normal(V, H, seed=4), labels, mask


def expected(z_s, z_t, labels, mask, loss_of_kept, weight):
    """(1 - w) the divergence's loss + w CE over the labelled rows of the mask, by R41's terms."""
    labels = torch.where(mask, labels, -100)
    labelled = labels != -100
    ce = torch.nn.functional.cross_entropy(z_s[labelled], labels[labelled])
    return (1 - weight) * loss_of_kept + weight * ce


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("masked_on", ["nothing", "cpu"])
@pytest.mark.parametrize("keep", [0.75, 0.25])
def test_todis_whole_criterion(weight, masked_on, keep):
    hidden_s, head_s, hidden_t, head_t, labels, mask = batch()
    mask = torch.ones_like(mask) if masked_on == "nothing" else mask
    hidden, weight_s = leaf(hidden_s), leaf(head_s)
    out = tip.distill(
        tip.Head(hidden, weight_s), tip.Head(hidden_t, head_t), select=tip.TopHellinger(keep), divergence=tip.ToDi(),
        labels=labels, ce_weight=weight, ce_rows="all", row_mask=None if masked_on == "nothing" else mask,
    )  # fmt: skip
    out.loss.backward()
    h, w = leaf(hidden_s.double()), leaf(head_s.double())
    z_s, z_t = h @ w.T, hidden_t.double() @ head_t.double().T
    truth = ref.whole_criterion(z_s, z_t, torch.where(mask, labels, -100), ref.todi, out.kept.mask, ce_weight=weight)
    truth.backward()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert relative_error(hidden.grad, h.grad) <= 1e-5 and relative_error(weight_s.grad, w.grad) <= 1e-5
    assert 0 < out.kept.mask.sum() < (mask & (labels != -100)).sum()


@pytest.mark.parametrize("keep", [0.75, 0.25])
def test_adakds_whole_criterion(keep):
    hidden_s, head_s, hidden_t, head_t, labels, mask = batch()
    hidden = leaf(hidden_s)
    out = tip.distill(
        tip.Head(hidden, head_s), tip.Head(hidden_t, head_t), divergence=tip.ReverseKL(), labels=labels,
        ce_weight=0.5, ce_rows="all", **tip.adakd(keep, row_mask=mask),
    )  # fmt: skip
    out.loss.backward()
    h = leaf(hidden_s.double())
    z_s, z_t = h @ head_s.double().T, hidden_t.double() @ head_t.double().T
    truth = expected(z_s, z_t, labels, mask, ref.adakd_loss(z_s, z_t, ref.reverse_kl, keep=keep, row_mask=mask), 0.5)
    truth.backward()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert relative_error(hidden.grad, h.grad) <= 1e-5


def test_without_a_label_loss_the_rows_of_one_do_not_matter():
    hidden_s, head_s, hidden_t, head_t, labels, mask = batch()
    losses = [
        tip.distill(
            tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t), labels=labels, row_mask=mask, ce_rows=rows
        ).loss
        for rows in ("kept", "all")
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ce_rows": "some"}, "^ce_rows: expected 'kept' or 'all'"),
        ({"labels": None}, "^labels: expected int64 labels"),
        ({"normalizer": 3.0}, "^normalizer: expected 'kept' or 'all' beside ce_rows='all'"),
        ({"execution": tip.Execution(backward=True)}, "^execution: expected backward=False"),
        ({"ce_weight": 2.0}, r"^ce_weight: expected a number in \[0, 1\]"),
    ],
)
def test_what_does_not_go_with_the_label_loss_of_all_rows_is_refused(settings, message):
    hidden_s, head_s, hidden_t, head_t, labels, _ = batch()
    whole = {"labels": labels, "ce_weight": 0.5, "ce_rows": "all"} | settings
    with pytest.raises(ValueError, match=message):
        tip.distill(tip.Head(hidden_s, head_s), tip.Head(hidden_t, head_t), **whole)
