"""What every public operation promises, over one table of all of them: OPS."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tip_kernels as tip
from tests._cases import INF, NAN, distill, leaf, normal
from tip_kernels.distillation import one_sweep

Inputs = dict[str, Tensor]
N, V, WIDTH_S, WIDTH_T, K = 8, 60, 12, 20, 4
TRITON = "triton" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAVES = ("student", "hidden_s", "weight_s", "bias_s")


def inputs(n: int = N, vocab: int = V, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Everything that an operation may read; each takes what it wants."""
    teacher = 3 * normal(n, vocab, seed=seed + 2)
    top = teacher.log_softmax(-1).topk(min(K, vocab))
    tensors = {
        "student": 3 * normal(n, vocab, seed=seed + 1),
        "teacher": teacher,
        "hidden_s": normal(n, WIDTH_S, seed=seed + 3),
        "weight_s": normal(vocab, WIDTH_S, seed=seed + 4),
        "bias_s": normal(vocab, seed=seed + 5),
        "hidden_t": normal(n, WIDTH_T, seed=seed + 6),
        "weight_t": normal(vocab, WIDTH_T, seed=seed + 7),
    }
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors |= {"ids": top.indices, "logp": top.values, "labels": torch.arange(n) * 7 % vocab}
    tensors |= {"row_mask": torch.arange(n) % 5 != 3, "rollout_ids": torch.arange(n) // 4}
    tensors |= {"row_weights": torch.linspace(0.5, 2.0, n), "temperature": torch.linspace(0.7, 2.0, n)}
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def learning(x: Inputs) -> Inputs:
    return {name: leaf(value) if name in LEAVES else value.clone() for name, value in x.items()}


@dataclass(frozen=True)
class Op:
    """call        the operation on some of the inputs; returns what is to be compared
    reads       the sources it reads
    learns      whether it has a gradient
    row_wise    a row's result depends on that row alone
    adds_up     its result is a sum over rollouts, so that two halves of a batch make the whole
    """

    call: Callable[[Inputs], object]
    reads: tuple[str, ...]
    learns: bool = False
    row_wise: bool = False
    adds_up: bool = False
    backend: str | None = None

    def __call__(self, x: Inputs) -> list[Tensor]:
        """The tensors among the results, one after the other."""
        where = contextlib.nullcontext() if self.backend is None else tip.backend(self.backend)
        with where, np.errstate(all="ignore"):
            return tensors_of(self.call(x))

    def gradients(self, x: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Its results, and the gradients of the sum of the first in the leaves it reads."""
        out = self(x)
        leaves = [x[name] for name in self.reads if name in LEAVES]
        with np.errstate(all="ignore"):
            grads = torch.autograd.grad(out[0].sum(), leaves)
        return [o.detach() for o in out], [g.to_dense() if g.is_sparse else g for g in grads]


def tensors_of(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tip.TokenStats):
        return list(result._measured.values())
    if is_dataclass(result):
        result = [getattr(result, f.name) for f in fields(result)]
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in tensors_of(part)]
    return []


def head_s(x: Inputs, **options) -> tip.Head:
    return tip.Head(x["hidden_s"], x["weight_s"], x["bias_s"], **options)


def head_t(x: Inputs) -> tip.Head:
    return tip.Head(x["hidden_t"], x["weight_t"])


def pair(kind: str, x: Inputs) -> tuple:
    """The sources of a kind: logits, heads, or a list beside a head or logits."""
    return {
        "logits": lambda: (x["student"], x["teacher"]),
        "heads": lambda: (head_s(x, softcap=30.0), head_t(x)),
        "list": lambda: (x["student"], tip.TopK(x["ids"], x["logp"])),
        "head and list": lambda: (head_s(x), tip.TopK(x["ids"], x["logp"])),
    }[kind]()


READS = {
    "logits": ("student", "teacher"),
    "heads": ("hidden_s", "weight_s", "bias_s", "hidden_t", "weight_t"),
    "list": ("student",),
    "head and list": ("hidden_s", "weight_s", "bias_s"),
}


def options_of(x: Inputs, *names: str) -> dict[str, Tensor]:
    return {name: x[name] for name in names}


def ops_of_torch() -> Iterator[tuple[str, Op]]:
    def op(name: str, kind: str, call: Callable, **promises) -> tuple[str, Op]:
        return f"{name}, {kind}", Op(lambda x: call(x, *pair(kind, x)), READS[kind], **promises)

    for kind in READS:
        listed = "list" in kind
        yield op("token_stats", kind, lambda x, s, t: tip.token_stats(s, t), row_wise=True)
        yield op("ReverseKL", kind, lambda x, s, t: tip.divergence_loss(s, t), learns=True, row_wise=True, adds_up=True)
        yield op(
            "a weighted JSD",
            kind,
            lambda x, s, t: tip.divergence_loss(
                s, t, divergence=2.0 * tip.JSD(0.3), row_weights=x["row_weights"], stats=tip.token_stats(s, t)
            ),
            learns=True,
            row_wise=True,
            adds_up=True,
        )
        for rule in (tip.KeepAll(), tip.SoftOr(0.5), tip.TopEntropy(2), tip.Threshold("kl_rev", above=0.1)):
            yield op(
                f"distill by {type(rule).__name__}",
                kind,
                lambda x, s, t, rule=rule: distill(s, t, select=rule, normalizer=7.0),
                learns=True,
            )
        yield op(
            "distill with everything",
            kind,
            lambda x, s, t, listed=listed: distill(
                s,
                t,
                select=tip.TopDivergence(2),
                divergence=tip.Jeffreys(),
                ce_weight=0.3,
                full_stats=True,
                normalizer=7.0,
                **options_of(x, "labels", "row_mask", "rollout_ids", "row_weights"),
                **({} if listed else {"temperature": x["temperature"], "temperature_sq": True}),
            ),
            learns=True,
            adds_up=True,
        )
        if not listed:
            yield op(
                "token_stats with everything",
                kind,
                lambda x, s, t: tip.token_stats(s, t, margins=True, top_k=3, **options_of(x, "labels", "temperature")),
                row_wise=True,
            )
            yield op(
                "distill by adakd",
                kind,
                lambda x, s, t: distill(s, t, **tip.adakd(0.5, row_mask=x["row_mask"])),
                learns=True,
            )
            for method in ("logit_diff", "kl_div", "loss_contribution", "hellinger", "soft_or", "teachability"):
                yield op(
                    f"token_importance by {method}",
                    kind,
                    lambda x, s, t, method=method: tip.token_importance(
                        student=s, teacher=t, labels=x["labels"], method=method
                    ),
                    row_wise=method not in ("soft_or", "teachability"),
                )
    for sweeps in (1, 2):
        for rule in (tip.KeepAll(), tip.SoftOr(0.4), tip.TopEntropy(0.4)):
            yield op(
                f"distill in {sweeps}, {type(rule).__name__}",
                "heads",
                lambda x, s, t, rule=rule, sweeps=sweeps: distill(
                    s, t, select=rule, sweeps=sweeps, divergence=tip.ToDi()
                ),
                learns=True,
            )
    for mode in ("compact", "inplace"):
        yield op(
            f"a {mode} gradient",
            "logits",
            lambda x, s, t, mode=mode: tip.divergence_loss(s if mode == "compact" else s * 1, t, grad_logits=mode),
            learns=True,
        )
    yield "quadrants", Op(lambda x: tip.quadrants(tip.token_stats(*pair("logits", x))), READS["logits"], row_wise=True)
    yield (
        "difficulty_temperature",
        Op(lambda x: tip.difficulty_temperature(tip.token_stats(*pair("logits", x))), READS["logits"]),
    )


def ops() -> dict[str, Op]:
    every = dict(ops_of_torch())
    if TRITON:  # without a GPU by the interpreter, which is slow: few
        for name in ("token_stats, logits", "a weighted JSD, logits", "distill by SoftOr, heads"):
            every[f"{name}, triton"] = replace(every[name], backend="triton")
    return every


OPS = ops()
every_op = pytest.mark.parametrize("op", OPS)
every_loss = pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.learns])


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch) -> None:
    monkeypatch.setattr(one_sweep, "ROWS", {"cpu": (1, 3)})


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal in their bits, NaN for NaN."""
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) for x, y in zip(a, b, strict=True)
    )


def close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-4, atol: float = 2e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


# The same result


@every_op
def test_twice_is_the_same_bits(op):
    one, two = (OPS[op].gradients(learning(inputs())) if OPS[op].learns else (OPS[op](inputs()), []) for _ in range(2))
    assert same(one[0], two[0]) and same(one[1], two[1])


@every_op
def test_deterministic_mode_is_the_same_bits_and_nothing_reads_what_it_did_not_write(op):
    """In this mode torch.empty is full of NaN."""
    run = OPS[op].gradients if OPS[op].learns else lambda x: (OPS[op](x), [])
    plain = run(learning(inputs()))
    try:
        torch.use_deterministic_algorithms(True)
        strict = run(learning(inputs()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(plain[0], strict[0]) and same(plain[1], strict[1])


@pytest.mark.parametrize("fault", [3.0, NAN, INF])
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.row_wise])
def test_a_row_ignores_its_neighbours(op, fault):
    x, y = inputs(), inputs()
    for name in ("student", "teacher", "hidden_s", "hidden_t"):
        y[name][2::3] = fault
    rows = torch.ones(N, dtype=torch.bool)
    rows[2::3] = False
    for a, b in zip(OPS[op](x), OPS[op](y), strict=True):
        if a.dim() and a.shape[0] == N:
            assert same([a[rows]], [b[rows]])


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.adds_up])
def test_gradients_of_two_halves_add_up_to_those_of_the_whole(op):
    whole = learning(inputs())
    result, grads = OPS[op].gradients(whole)
    rows = {name: x.shape[0] == N and "weight_" not in name and "bias" not in name for name, x in whole.items()}
    parts = learning(inputs())
    totals = []
    for half in (slice(0, 4), slice(4, 8)):
        out = OPS[op]({name: x[half] if rows[name] else x for name, x in parts.items()})
        with np.errstate(all="ignore"):
            out[0].sum().backward()
        totals.append(out[0].detach().sum())
    close([sum(totals)], [result[0].sum()], atol=1e-5)
    close([parts[name].grad for name in OPS[op].reads if name in LEAVES], grads)


# What it touches


@every_op
def test_no_input_is_written(op):
    if "inplace" in op:
        pytest.skip("is asked to")
    x = learning(inputs())
    before, versions = {k: v.detach().clone() for k, v in x.items()}, {k: v._version for k, v in x.items()}
    OPS[op].gradients(x) if OPS[op].learns else OPS[op](x)
    assert {k: v._version for k, v in x.items()} == versions
    assert all(torch.equal(v, before[k]) and v.grad is None for k, v in x.items())


@every_op
def test_results_do_not_alias_inputs(op):
    x = learning(inputs())
    out = OPS[op](x)
    kept = [o.detach().clone() for o in out]
    with torch.no_grad():
        for value in x.values():
            value.zero_()
    assert same([o.detach() for o in out], kept)


@every_op
def test_nothing_waits_for_the_device(op, monkeypatch):
    """On tensors without values, which stand in for a GPU's, to look at one is an error."""
    if "Threshold" in op or "compact" in op:
        pytest.skip("keeps as many rows as it finds; a sparse gradient has no form without values")
    if "distill" in op and ("list" in op or "rollout_ids" in op or "everything" in op or "in 1" in op):
        pytest.skip("counts rollouts once before, or runs on a CPU alone; lists are gathered by their rows")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    x = {name: value.to("meta").requires_grad_(name in LEAVES) for name, value in inputs().items()}
    OPS[op].gradients(x) if OPS[op].learns else OPS[op](x)


# Autograd


@every_loss
def test_a_retained_graph_runs_again(op):
    if "inplace" in op:
        pytest.skip("its gradient takes the logits' place")
    x = learning(inputs())
    out = OPS[op](x)
    leaves = [x[name] for name in OPS[op].reads if name in LEAVES]
    with np.errstate(all="ignore"):
        first = torch.autograd.grad(out[0].sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(out[0].sum(), leaves)
    close([g.to_dense() for g in again], [g.to_dense() for g in first])


@every_loss
def test_a_second_derivative_is_refused(op):
    x = learning(inputs())
    leaves = [x[name] for name in OPS[op].reads if name in LEAVES]
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"twice|modified by an inplace|sparse"):
        grads = torch.autograd.grad(OPS[op](x)[0].sum(), leaves, create_graph=True)
        torch.autograd.grad(grads[0].square().sum(), leaves[0])


@pytest.mark.parametrize("op", [name for name in OPS if "in 1" not in name])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_the_same_result_and_no_graph(op, mode):
    expected = OPS[op](inputs())
    with mode():
        out = OPS[op](learning(inputs()))
    assert not any(o.requires_grad for o in out)
    close(out, expected)


@every_op
def test_autocast_leaves_results_fp32_and_logits_alone(op):
    x = learning(inputs())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = OPS[op](x)
    assert all(o.dtype == torch.float32 for o in out if o.is_floating_point())
    if "hidden_s" not in OPS[op].reads and "inplace" not in op:
        assert same([o.detach() for o in out], OPS[op](inputs()))
    if OPS[op].learns:
        leaves = [x[name] for name in OPS[op].reads if name in LEAVES]
        with np.errstate(all="ignore"):
            assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out[0].sum(), leaves))


# Few rows


@every_op
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row_are_legal(op, rows):
    out, grads = OPS[op].gradients(learning(inputs(rows))) if OPS[op].learns else (OPS[op](inputs(rows)), [])
    assert out and all(g.isfinite().all() for g in grads)
    if rows == 0:
        assert not any(g.any() for g in grads)


@every_loss
def test_everything_masked_and_nothing_kept_is_zero_with_a_graph(op):
    if "everything" not in op:
        pytest.skip("takes no mask")
    x = learning(inputs())
    x["row_mask"] = torch.zeros_like(x["row_mask"])
    out, grads = OPS[op].gradients(x)
    assert out[0] == 0 and not any(g.any() for g in grads)


# State


def stateful() -> dict[str, object]:
    x = inputs()
    stats = tip.token_stats(x["student"], x["teacher"], labels=x["labels"], margins=True)
    focus = tip.AdaptiveFocus(beta=0.5)
    focus.update(2.0), focus.update(1.0)
    rules = [tip.KeepAll(), tip.Threshold(above=("quantile", 0.5)), tip.SoftOr(0.5), tip.TopEntropy(3, scope="batch")]
    rules += [tip.SampleEntropy(0.5, gamma=1.0), tip.RandomRows(2), tip.Overconfident(0.5), tip.TopMargin(0.5)]
    rules += [tip.EntropyGap(0.5), tip.Teachability(), tip.GreedyAgreement(), tip.PositionPrefix(2)]
    divergences = [tip.ReverseKL(), 0.5 * tip.ForwardKL() + tip.JSD(0.2), tip.Renyi(0.5).clipped(3.0), tip.ToDi()]
    made = {repr(one): one for one in [*rules, *divergences]}
    sieve = tip.GradFilter(1e-3)
    out = distill(head_s(x), head_t(x), grad_filter=sieve)
    kept = tip.SoftOr(0.5)(stats)
    return made | {
        "stats": stats,
        "kept": kept,
        "plan": out.plan,
        "focus": focus,
        "filter": sieve,
        "head": head_s(x, scale=2.0),
        "list": tip.TopK(x["ids"], x["logp"], "ignore"),
    }


def contents(value: object) -> list[object]:
    if isinstance(value, Tensor):
        return [value.shape, value.dtype, value.nan_to_num(7e7).tolist()]
    if isinstance(value, tip.TokenStats):
        return [type(value), contents(vars(value))]
    if is_dataclass(value):
        return [type(value), *(contents(getattr(value, f.name)) for f in fields(value))]
    if isinstance(value, tip.AdaptiveFocus):
        return [repr(value), sorted(value.state_dict().items())]
    if isinstance(value, (tuple, list)):
        return [contents(x) for x in value]
    if isinstance(value, dict):
        return [contents(x) for x in value.items()]
    return [value]


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "copy"])
def test_whatever_has_state_survives_a_copy(way):
    for name, value in stateful().items():
        other = {
            "pickle": lambda value=value: pickle.loads(pickle.dumps(value)),
            "deepcopy": lambda value=value: copy.deepcopy(value),
            "copy": lambda value=value: copy.copy(value),
        }[way]()
        assert contents(other) == contents(value), name


def test_a_copied_rule_with_a_generator_draws_as_the_first_would_have():
    stats = tip.token_stats(*pair("logits", inputs()))
    rule = tip.RandomRows(3, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(rule)
    assert other.generator is not rule.generator
    assert torch.equal(rule(stats).mask, other(stats).mask)


def test_a_focus_goes_on_from_its_state_dict_after_a_journey_through_json():
    one, two = (tip.AdaptiveFocus(beta=0.3, tolerance=0.2, step=0.3) for _ in range(2))
    for loss in (3.0, 2.0, 2.4):
        one.update(loss)
    state = one.state_dict()
    assert len(set(state.values())) == len(state)  # none stands for another
    two.load_state_dict(json.loads(json.dumps(state)))
    assert [one.update(x) for x in (1.9, 1.2, 4.0, 0.5)] == [two.update(x) for x in (1.9, 1.2, 4.0, 0.5)]
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize("kind", ["logits", "heads", "list"])
def test_two_threads_with_other_shapes_do_not_disturb_each_other(kind):
    """Nothing is kept between calls that one of them could find changed."""
    names = [f"distill by SoftOr, {kind}", f"ReverseKL, {kind}", f"distill with everything, {kind}"]
    batches = [inputs(8, 60), inputs(16, 1100, seed=20)]
    expected = [[OPS[name].gradients(learning(x)) for name in names] for x in batches]
    wrong: list[object] = []

    def work(x: Inputs, truth: list) -> None:
        try:
            for _ in range(6):
                for name, (out, grads) in zip(names, truth, strict=True):
                    again = OPS[name].gradients(learning(x))
                    if not (same(again[0], out) and same(again[1], grads)):
                        wrong.append(name)
        except Exception as failure:
            wrong.append(failure)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Large: what lies between the rows is never touched


def far_apart(rows: int, width: int) -> Tensor:
    """Zeros (rows, width) in rows 2^30 + 8 elements apart, of which no other page is ever touched."""
    stride = 2**30 + 8
    return torch.empty((rows - 1) * stride + width, dtype=torch.float16).as_strided((rows, width), (stride, 1)).zero_()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no untouched pages")
@pytest.mark.parametrize("backend", ["eager", *([TRITON] if TRITON else [])])
@pytest.mark.parametrize("divergence", [tip.ReverseKL(), tip.JSD()], ids=str)
def test_rows_past_two_to_the_31_elements_measure_and_learn_as_near_ones(backend, divergence):
    near = [3 * normal(3, 1300, seed=seed) for seed in (1, 2)]
    near = [z.half() for z in near]
    far = [far_apart(3, 1300).copy_(z) for z in near]
    results = []
    with tip.backend(backend), np.errstate(all="ignore"):
        for s, t in (near, far):
            s = s.detach().requires_grad_()
            loss = tip.divergence_loss(s, t, divergence=divergence)
            stats = tip.token_stats(s, t, margins=True, top_k=3)
            results.append([*tensors_of(stats), loss.detach(), *torch.autograd.grad(loss.sum(), s)])
    assert far[0].stride(0) * 2 > 2**31 and same(*results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no untouched pages")
def test_a_head_whose_hidden_states_lie_past_two_to_the_31_elements():
    x = inputs(3)
    far = far_apart(3, WIDTH_S).copy_(x["hidden_s"])
    weight = x["weight_s"].half()
    results = []
    for hidden in (far.clone(memory_format=torch.contiguous_format), far):
        hidden, w = hidden.detach(), weight.clone().requires_grad_()
        out = distill(tip.Head(hidden, w), x["teacher"], select=tip.KeepAll())
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, w)])
    assert same(*results)


@pytest.mark.skipif(torch.cuda.is_available() or not TRITON, reason="a GPU has no untouched pages; needs Triton")
def test_hidden_states_and_weights_past_two_to_the_31_elements_measure_on_chip_as_near_ones():
    from tip_kernels.backends.triton.linear_stats import linear_stats

    near = [normal(3, 32, seed=seed).half() for seed in (1, 2, 3, 4)]  # both models' hidden states and heads
    far = [far_apart(3, 32).copy_(x) for x in near]
    with np.errstate(all="ignore"):
        one, two = linear_stats(*near), linear_stats(*far)
    assert same(list(one.values()), list(two.values()))


def large_shape() -> tuple[int, int]:
    """131,072 rows by 152,064 on a GPU with room for one bf16 matrix of that shape and its gradient."""
    if DEVICE == "cpu":
        return 300, 1300
    if torch.cuda.mem_get_info()[0] < 85e9:
        pytest.skip("needs 85 GB on the GPU")
    return 131_072, 152_064


def test_a_large_batch_of_one_row_is_that_row():
    """One matrix real, the other expanded: every row has the bits of the first, whichever tile it is in."""
    rows, vocab = large_shape()
    row_s, row_t = (3 * normal(1, vocab, seed=seed).to(DEVICE, torch.bfloat16) for seed in (1, 2))
    student = row_s.expand(rows, vocab).contiguous().requires_grad_()
    teacher = row_t.expand(rows, vocab)
    stats = tip.token_stats(student, teacher)
    for name in ("lse_s", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"):
        value = getattr(stats, name)
        assert value.isfinite().all() and (value == value[0]).all(), name
    close([tip.token_stats(row_s, row_t).kl_rev], [stats.kl_rev[-1:]])
    out = distill(student, teacher, select=tip.PositionPrefix(7, scope="batch"))
    out.loss.backward()
    assert student.grad[7:].count_nonzero() == 0 and (student.grad[:7] == student.grad[0]).all()


def test_more_rows_than_a_second_grid_axis_holds():
    """65,535 is the most that the other axes of a CUDA grid take; grids have one axis."""
    rows = 70_000
    s, t = torch.zeros(rows, 3, device=DEVICE), torch.zeros(rows, 3, device=DEVICE)
    s[-1, 0] = t[-2, 1] = 2.0
    loss = tip.divergence_loss(s.requires_grad_(), t)
    loss.sum().backward()
    assert loss[:-2].count_nonzero() == 0 and (loss[-2:] > 0.1).all()
    assert s.grad[:-2].count_nonzero() == 0 and s.grad[-2:].abs().amin() > 0


@pytest.mark.skipif(TRITON is None, reason="needs Triton")
def test_every_grid_has_one_axis(monkeypatch):
    """So that rows are bounded by 2^31 programs, not by 65,535."""
    from tip_kernels.backends.triton import row_stats

    seen = []
    kind = type(next(value for value in vars(row_stats).values() if hasattr(value, "run")))
    launch = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, grid: (seen.append(grid), launch(self, grid))[1])
    for name in ("distill by SoftOr, heads", "a weighted JSD, logits"):
        OPS[f"{name}, triton"].gradients(learning(inputs()))
    assert len(seen) >= 6 and all(isinstance(grid, tuple) and len(grid) == 1 for grid in seen)


# Faults


EVERY_RULE = [
    tip.KeepAll(),
    tip.Threshold("kl_rev", above=("quantile", 0.0)),
    tip.PositionPrefix(N),
    tip.GreedyAgreement(),
    *(rule(1.0) for rule in (tip.SoftOr, tip.TopEntropy, tip.TopDivergence, tip.SampleEntropy, tip.RandomRows)),
    *(rule(1.0) for rule in (tip.Overconfident, tip.TopMargin, tip.EntropyGap, tip.Teachability)),
]


@pytest.mark.parametrize("fault", [NAN, INF])
@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_a_broken_row_is_not_kept_or_else_dropped_and_nothing_is_learned_from_it(rule, fault):
    """A rule that reads nothing of the broken model cannot know; the loss does."""
    for broken in ("student", "teacher"):
        x = learning(inputs())
        with torch.no_grad():
            x[broken][2, 7] = fault
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = distill(x["student"], x["teacher"], select=rule)
        out.loss.backward()
        dropped = int(out.plan.dropped_rows)
        assert dropped == int(out.kept.mask[2]) == len(said) and out.loss.isfinite()
        assert x["student"].grad.isfinite().all() and not x["student"].grad[2].any()
        assert out.kept.mask.sum() == dropped or x["student"].grad.any()


class RunsOut(TorchDispatchMode):
    """Memory that runs out at the k-th allocation or product."""

    NAMES = ("empty", "empty_like", "new_empty", "zeros", "full", "mm", "addmm_", "addmm", "cat", "clone")

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("out of memory, by this test")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "op", [name for name, op in OPS.items() if op.learns and op.backend is None and "inplace" not in name]
)
def test_running_out_of_memory_changes_nothing_and_the_next_call_works(op):
    expected = OPS[op].gradients(learning(inputs()))
    x = learning(inputs())
    leaves = [x[name] for name in OPS[op].reads if name in LEAVES]
    for one in leaves:
        one.grad = torch.ones_like(one)
    before, grads = [one.detach().clone() for one in x.values()], [one.grad.clone() for one in leaves]
    failed, after = 0, 0
    while True:
        try:
            with RunsOut(after):
                OPS[op].gradients(x)
            break
        except torch.OutOfMemoryError:
            failed, after = failed + 1, after + 1 + after // 6
        assert all(torch.equal(a, b) for a, b in zip(x.values(), before, strict=True))
        assert all(torch.equal(one.grad, g) for one, g in zip(leaves, grads, strict=True))
    assert failed > 4
    again = OPS[op].gradients(x)
    assert same(again[0], expected[0]) and same(again[1], expected[1])


class Holds(TorchDispatchMode):
    """A device that holds nothing new of more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func._schema.returns[0].alias_info is None and out.nbytes > self.limit:
            raise torch.OutOfMemoryError("out of memory, by this test")
        return out


@pytest.mark.parametrize("kind", ["heads", "head and list"])
def test_what_runs_out_of_memory_fits_in_a_smaller_workspace(kind):
    x = learning(inputs(256, 4096))
    leaves = [x[name] for name in READS[kind] if name in LEAVES]

    def step(workspace_mib: float) -> list[Tensor]:
        out = distill(*pair(kind, x), select=tip.SoftOr(0.2), workspace_mib=workspace_mib, sweeps=2)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]

    expected = step(256)
    with Holds(2**19):
        with pytest.raises(torch.OutOfMemoryError):
            step(256)
        assert all(one.grad is None for one in leaves)
        found = step(1)
    close(found, expected, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; elsewhere tensors without values stand in for one")
@every_op
def test_nothing_waits_for_the_gpu(op):
    if "Threshold" in op or "compact" in op or "rollout" in op or "everything" in op:
        pytest.skip("looks at counts, by its docstring")
    x = learning(inputs())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[op].gradients(x) if OPS[op].learns else OPS[op](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
