"""Import swaps: the peers' calls with the peers' arguments give the peers' values where the peers are right."""

from __future__ import annotations

import functools
import inspect
import re
import warnings

import pytest
import torch

from tip_kernels.compat import liger, trl

N, V, H_S, H_T = 14, 90, 12, 16


def problem(dtype=torch.float32, *, noise=None, bias=False, rows=(N,)):
    """Hidden states and heads of both models, the student's with gradient; `noise`: a student that near its teacher."""
    torch.manual_seed(0)
    hidden_t, weight_t = torch.randn(*rows, H_T), torch.randn(V, H_T)
    hidden_s, weight_s = torch.randn(*rows, H_S), torch.randn(V, H_S)
    if noise is not None:
        hidden_s, weight_s = hidden_t + noise * torch.randn(*rows, H_T), weight_t.clone()
    names = {"hidden_s": hidden_s, "weight_s": weight_s, "hidden_t": hidden_t, "weight_t": weight_t}
    if bias:
        names |= {"bias_s": torch.randn(V), "bias_t": torch.randn(V)}
    return {name: x.to(dtype).requires_grad_(name.endswith("_s")) for name, x in names.items()}


def labels_of(rows=(N,), ignore=-100):
    torch.manual_seed(1)
    labels = torch.randint(0, V, rows)
    labels.view(-1)[::3] = ignore
    return labels


def gradients(p, loss):
    leaves = [x for x in p.values() if x.requires_grad]
    return torch.autograd.grad(loss, leaves)


def close(ours, peers, rel=2e-5):
    for a, b in zip(ours, peers, strict=True):
        assert (a - b).norm() <= rel * b.norm()


def dense_jsd(p, beta, labels=None, temperature=1.0, ignore=-100):
    """The mean over rows that count, in float64: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s."""
    z_s, z_t = (p[f"hidden_{m}"].double() @ p[f"weight_{m}"].double().T for m in "st")
    s, t = ((z / temperature).log_softmax(-1) for z in (z_s, z_t))
    if beta in (0, 1):
        rows = (t.exp() * (t - s)).sum(-1) if beta == 0 else (s.exp() * (s - t)).sum(-1)
    else:
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        rows = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    return rows.mean() if labels is None else rows[labels != ignore].mean()


@pytest.fixture
def projected(monkeypatch):
    """Rows of hidden states that were projected, each as often as it was against the whole vocabulary."""
    from tip_kernels.sources import pair as sources

    seen = []
    tile = sources.HeadBlock.tile

    def counting(self, v0, v1, out, weight=None):
        seen.append(self.n_rows * (v1 - v0) / V)
        return tile(self, v0, v1, out, weight)

    monkeypatch.setattr(sources.HeadBlock, "tile", counting)
    return seen


# ---- Liger ----


def peers_liger():
    pytest.importorskip("liger_kernel")
    from liger_kernel import chunked_loss, transformers

    return chunked_loss, transformers


@pytest.mark.parametrize(
    ("ours", "peer"),
    [("LigerFusedLinearJSD", 1), ("LigerFusedLinearJSDLoss", 0)],
)
def test_constructors_and_calls_have_ligers_arguments(ours, peer):
    peer = getattr(peers_liger()[peer], ours)
    ours = getattr(liger, ours)
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(peer, method)).parameters.values()
        mine = inspect.signature(getattr(ours, method)).parameters.values()
        assert [x.name for x in mine] == [x.name for x in theirs]
        assert all(x.default == y.default for x, y in zip(mine, theirs, strict=True) if y.default is not y.empty)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("hard", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (2.0, 3.0)])
def test_chunked_loss_and_gradients_are_ligers(beta, hard):
    chunked = peers_liger()[0]
    p, labels = problem(bias=True), labels_of()
    arguments = (p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels, p["bias_s"], p["bias_t"])
    results = []
    for kind in (liger.LigerFusedLinearJSDLoss, chunked.LigerFusedLinearJSDLoss):
        function = kind(*hard, beta=beta, temperature=1.7, compiled=False, chunk_size=5)
        loss = function(*arguments)
        results.append((loss.item(), gradients(p, 3 * loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close(results[0][1], results[1][1])


@pytest.mark.parametrize("ignore", [7, -1], ids=["a token", "no token"])
def test_soft_and_hard_losses_come_apart_as_ligers(ignore):
    chunked = peers_liger()[0]
    p, labels = problem(), labels_of(ignore=ignore)
    arguments = (p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels)
    kinds = (liger.LigerFusedLinearJSDLoss, chunked.LigerFusedLinearJSDLoss)
    settings = {"ignore_index": ignore, "temperature": 2.0, "compiled": False, "return_soft_hard_loss": True}
    ours, peers = (kind(0.25, 0.5, **settings)(*arguments) for kind in kinds)
    assert [x.item() for x in ours] == pytest.approx([x.item() for x in peers], rel=1e-5)
    assert ours[0].requires_grad and not ours[1].requires_grad and not ours[2].requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_fused_loss_and_gradients_are_those_of_the_formula(beta, labelled):
    p, labels = problem(), labels_of() if labelled else None
    function = liger.LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)
    loss = function(p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels)
    truth = dense_jsd(p, beta, labels, 2.0)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    close(gradients(p, loss), gradients(p, truth))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, inside the interpreter
def test_fused_loss_is_ligers_own_kernels():
    if torch.cuda.is_available():
        pytest.skip("compared through the interpreter")
    transformers = peers_liger()[1]
    p, labels = problem(), labels_of()
    arguments = (p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels)
    results = []
    for kind in (liger.LigerFusedLinearJSD, transformers.LigerFusedLinearJSD):
        loss = kind(jsd_beta=0.3, temperature=2.0)(*arguments)
        results.append((loss.item(), gradients(p, loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close(results[0][1], results[1][1])


def test_ligers_documented_example_runs_with_the_import_swapped():
    transformers = peers_liger()[1]
    example = re.search(r"```python\n(.*?)```", transformers.LigerFusedLinearJSD.__doc__, flags=re.S)[1]
    lines = [line.strip().removeprefix(">>>").strip() for line in example.splitlines()]
    first = lines[: next(i for i, line in enumerate(lines) if line.startswith("# Example with labels"))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = {"torch": torch, "LigerFusedLinearJSD": liger.LigerFusedLinearJSD}
    exec("\n".join(first).replace('device="cuda"', f'device="{device}"'), names)
    assert names["output"].item() > 0
    assert names["student_input"].grad.norm() > 0 and names["student_lin"].weight.grad.norm() > 0


def test_softmaxes_are_taken_in_float32_where_ligers_are_not():
    chunked = peers_liger()[0]
    p, labels = problem(torch.bfloat16, noise=0.02), torch.zeros(N, dtype=torch.int64)
    truth = dense_jsd(p, 1.0).item()
    arguments = (p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels)
    kinds = (liger.LigerFusedLinearJSDLoss, chunked.LigerFusedLinearJSDLoss)
    ours, peers = (kind(0.0, 1.0, 1.0, compiled=False)(*arguments).item() for kind in kinds)
    assert ours == pytest.approx(truth, rel=1e-3)
    assert abs(peers - truth) > 0.1 * truth  # or the note in compat/liger.py is out of date


@pytest.mark.parametrize("kind", ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss"])
def test_ignored_rows_are_projected_by_neither_model(kind, projected):
    p, labels = problem(), labels_of()
    function = getattr(liger, kind)()
    arguments = (p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"])
    function(*arguments, torch.zeros_like(labels)).backward()
    whole = sum(projected)
    projected.clear()
    function(*arguments, labels).backward()
    assert sum(projected) == pytest.approx(whole * int((labels != -100).sum()) / N)


@pytest.mark.parametrize("kind", ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss"])
def test_nothing_but_ignored_rows_is_a_zero_with_a_gradient(kind):
    p = problem()
    loss = getattr(liger, kind)()(p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], torch.full((N,), -100))
    assert loss.item() == 0
    assert all(grad.abs().sum() == 0 for grad in gradients(p, loss))


def test_batches_of_rollouts_are_read_as_rows():
    p, flat = problem(rows=(2, 7)), problem()
    labels = labels_of((2, 7))
    for kind in (liger.LigerFusedLinearJSD, liger.LigerFusedLinearJSDLoss):
        loss = kind()(p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"], labels)
        same = kind()(flat["hidden_s"], flat["weight_s"], flat["hidden_t"], flat["weight_t"], labels.view(-1))
        assert loss.item() == pytest.approx(same.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: liger.LigerFusedLinearJSD(jsd_beta=1.1), r"jsd_beta: expected a number in \[0, 1\], got float 1\.1"),
        (lambda: liger.LigerFusedLinearJSD(temperature=0), "temperature: expected a finite number above 0"),
        (
            lambda: liger.LigerFusedLinearJSD(accum_dtype=torch.bfloat16),
            "accum_dtype: expected None or torch.float32, s",
        ),
        (lambda: liger.LigerFusedLinearJSD(ignore_index=None), "ignore_index: expected an int"),
        (lambda: liger.LigerFusedLinearJSDLoss(beta=-1), r"beta: expected a number in \[0, 1\]"),
        (
            lambda: liger.LigerFusedLinearJSDLoss(weight_soft_loss=-1),
            "weight_soft_loss: expected a number of at least 0",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float64], ids=str)
@pytest.mark.parametrize("argument", ["student_weight", "teacher_weight", "student_bias", "teacher_bias"])
@pytest.mark.parametrize("call", ["fused", "chunked", "trl"])
def test_what_holds_no_floats_is_refused_before_it_is_cast(call, argument, dtype):
    hidden, weight, bias = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20)
    given = {"student_weight": weight, "teacher_weight": weight, "student_bias": bias, "teacher_bias": bias}
    given[argument] = given[argument].mul(5).to(dtype)
    if call == "fused":
        if "bias" in argument:
            pytest.skip("Liger's takes no bias")
        call = functools.partial(liger.LigerFusedLinearJSD(), hidden, given["student_weight"], hidden)
        arguments = {"teacher_weight": given["teacher_weight"]}
    elif call == "chunked":
        call = functools.partial(liger.LigerFusedLinearJSDLoss(), hidden, teacher_input=hidden)
        arguments = given | {"true_labels": torch.zeros(3).long()}
    else:
        call = trl.ChunkedDivergenceFunction.apply
        sides = [(hidden, given[f"{model}_weight"], given[f"{model}_bias"]) for model in ("student", "teacher")]
        call, arguments = functools.partial(call, *sides[0], *sides[1], 0.5), {}
    with pytest.raises(ValueError, match=f"^{argument}: expected a float32, bfloat16 or float16 tensor, got"):
        call(**arguments)


@pytest.mark.parametrize("call", ["fused", "chunked", "gkd", "trl"])
def test_what_does_not_fit_is_refused_by_the_peer_s_own_name(call):
    p, wrong = problem(), torch.zeros(3).long()
    four = p["hidden_s"], p["weight_s"], p["hidden_t"], p["weight_t"]
    logits = p["hidden_s"] @ p["weight_s"].T
    heads = (four[0], four[1], None, four[2], four[3], None)
    cases = {
        "fused": ("shift_labels", lambda: liger.LigerFusedLinearJSD()(*four, wrong)),
        "chunked": ("true_labels", lambda: liger.LigerFusedLinearJSDLoss()(*four, wrong)),
        "gkd": ("labels", lambda: trl.generalized_jsd_loss(logits, logits, wrong)),
        "trl": ("student_logit_scale", lambda: trl.ChunkedDivergenceFunction.apply(*heads, 0.5, 1.0, -1.0)),
    }
    name, make = cases[call]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()
    if call in ("fused", "chunked"):
        kind = liger.LigerFusedLinearJSD if call == "fused" else liger.LigerFusedLinearJSDLoss
        with pytest.raises(ValueError, match=r"^student_input: expected"):
            kind()(four[0].double(), *four[1:], torch.zeros(four[0].shape[:-1]).long())


def test_vocabularies_that_differ_are_refused_where_liger_fills_them_up():
    p = problem()
    with pytest.raises(ValueError, match=r"teacher: expected the student's vocabulary of 80 entries, got 90"):
        liger.LigerFusedLinearJSD()(p["hidden_s"], p["weight_s"][:80], p["hidden_t"], p["weight_t"])


# ---- TRL ----


@pytest.fixture
def peers_trl():
    pytest.importorskip("trl")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction


def test_apply_has_trls_arguments(peers_trl):
    theirs = list(inspect.signature(peers_trl.forward).parameters.values())[1:]  # without ctx
    mine = list(inspect.signature(trl.ChunkedDivergenceFunction.apply).parameters.values())
    assert [(x.name, x.default) for x in mine] == [(x.name, x.default) for x in theirs]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("transforms", [(1.0, 1.0, None, 1.0, None), (0.7, 1.3, 4.0, 0.6, 5.0)])
def test_rows_entropies_and_gradients_are_trls(peers_trl, beta, transforms):
    p = problem(bias=True)
    results = []
    for function in (trl.ChunkedDivergenceFunction, peers_trl):
        arguments = (p["hidden_s"], p["weight_s"], p["bias_s"], p["hidden_t"], p["weight_t"], p["bias_t"])
        rows, entropy = function.apply(*arguments, beta, *transforms)
        assert rows.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
        results.append((rows.detach(), entropy, *gradients(p, (rows * torch.arange(N)).sum())))
    close(*results)


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_stock_trainer_trains_the_same_with_the_function_swapped(peers_trl, monkeypatch, tmp_path):
    from trl import DistillationTrainer
    from trl.trainer import distillation_trainer

    from tests._trl import SGD, trained

    _, stock = trained(tmp_path, DistillationTrainer, max_steps=3, **SGD | {"learning_rate": 0.01})
    monkeypatch.setattr(distillation_trainer, "ChunkedDivergenceFunction", trl.ChunkedDivergenceFunction)
    _, ours = trained(tmp_path, DistillationTrainer, max_steps=3, **SGD | {"learning_rate": 0.01})
    for a, b in zip(stock, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=2e-7)
        assert b["entropy"] == pytest.approx(a["entropy"], rel=1e-5)


def test_rows_without_an_upstream_gradient_are_left_out_of_the_backward(projected):
    p = problem()
    rows, _ = trl.ChunkedDivergenceFunction.apply(
        p["hidden_s"], p["weight_s"], None, p["hidden_t"], p["weight_t"], None, 1.0
    )
    forward = sum(projected)
    rows[:5].sum().backward()
    assert forward == pytest.approx(2 * N)
    assert sum(projected) - forward == pytest.approx(2 * 5)


# ---- GKD's dense seam ----


def peers_gkd():
    pytest.importorskip("trl")
    with warnings.catch_warnings():  # the first import warns that it is experimental
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def logits_pair(shape=(2, 7, V), dtype=torch.float32):
    torch.manual_seed(2)
    # GKD's own call: one position of every rollout cut off, so that rows of the batch do not follow each other
    long = (shape[0], shape[1] + 1, V) if len(shape) == 3 else shape
    student = (3 * torch.randn(long)).to(dtype).requires_grad_()
    return student, (3 * torch.randn(long)).to(dtype)


def test_generalized_jsd_loss_has_trls_arguments():
    theirs = inspect.signature(peers_gkd()).parameters.values()
    mine = inspect.signature(trl.generalized_jsd_loss).parameters.values()
    assert [(x.name, x.default) for x in mine] == [(x.name, x.default) for x in theirs]


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
def test_dense_loss_and_gradient_are_gkds(beta, reduction, labelled, items):
    labels = labels_of((2, 7)) if labelled else None
    results = []
    for function in (trl.generalized_jsd_loss, peers_gkd()):
        student, teacher = logits_pair()
        loss = function(student[:, :-1], teacher[:, :-1], labels, beta, 1.3, reduction, items)
        results.append((loss.item(), torch.autograd.grad(loss, student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close(results[0][1], results[1][1])


def test_dense_loss_in_bfloat16_is_nearer_the_truth_than_gkds():
    student, teacher = logits_pair(dtype=torch.bfloat16)
    exact = functools.partial(peers_gkd(), student.double(), teacher.double(), beta=1)().item()
    gaps = [abs(f(student, teacher, beta=1).item() - exact) for f in (trl.generalized_jsd_loss, peers_gkd())]
    assert gaps[0] <= 1e-5 * exact < gaps[1]


def test_dense_loss_of_nothing_is_a_zero_with_a_gradient():
    for reduction in ("batchmean", "sum", "mean"):
        student, teacher = logits_pair()
        labels = torch.full((2, 8), -100)
        loss = trl.generalized_jsd_loss(student, teacher, labels, reduction=reduction)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].abs().sum() == 0


def test_unreduced_dense_loss_is_refused():
    student, teacher = logits_pair()
    with pytest.raises(ValueError, match=r"reduction: expected 'batchmean', 'sum' or 'mean' .*got str 'none'"):
        trl.generalized_jsd_loss(student, teacher, reduction="none")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gkd_trainer_trains_the_same_with_its_loss_swapped(monkeypatch, tmp_path):
    pytest.importorskip("trl")
    import transformers
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from tests._trl import TOKENIZER, load, rollouts_of

    class Rows:  # GKD's inputs without a chat template, which the packaged tokenizer has not
        def __call__(self, examples):
            ids = torch.tensor([example["input_ids"] for example in examples])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < 8, -100)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    _, completions = rollouts_of(8)
    rows = [[*prompt, *ids][:13] for prompt, ids in completions.items()]
    losses = []
    for swapped in (False, True):
        if swapped:
            monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(trl.generalized_jsd_loss))
        trainer = GKDTrainer(
            load("student"),
            load("teacher"),
            GKDConfig(
                str(tmp_path),
                lmbda=0.0,
                beta=0.3,
                max_steps=3,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                optim="sgd",
                learning_rate=0.01,
            ),
            data_collator=Rows(),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=TOKENIZER,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=2e-7)
