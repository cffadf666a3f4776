"""The verl hook: on a stand-in with verl's names and calling order, and on verl itself where it is installed."""

import dataclasses
import importlib
import sys
import types
import warnings

import pytest
import torch

import tip_kernels as tip
from tests._cases import distill
from tip_kernels.hooks import verl as hook

B, L, V, K = 3, 7, 40, 6
PROMPTS, RESPONSES = (2, 4, 3), (7, 3, 5)


def nested(parts):
    return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)


def batch(whole_teacher=False, seed=0):
    """Packed student logits (1, tokens, V) and a micro-batch: prompts, responses, masks, and the teacher's rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    student = 2 * torch.randn(1, sum(lengths), V, generator=generator)
    teacher = [2 * torch.randn(n, V, generator=generator) for n in lengths]
    listed = [t.log_softmax(-1).topk(K) for t in teacher]
    mask = [torch.ones(r, dtype=torch.int64) for r in RESPONSES]
    mask[0][2] = 0  # a tool's token
    for sequence, (ids, logp) in enumerate((x.indices, x.values) for x in listed):  # verl pads the rows of no response
        unused = [lengths[sequence] - 1, *([PROMPTS[0] + 1] if sequence == 0 else [])]
        ids[unused], logp[unused] = 0, 0.0
    data = {
        "prompts": nested(torch.zeros(p, dtype=torch.int64) for p in PROMPTS),
        "responses": nested(torch.zeros(r, dtype=torch.int64) for r in RESPONSES),
        "response_mask": nested(mask),
        "teacher_logprobs": nested(x.values for x in listed),
        "teacher_ids": nested(x.indices.int() for x in listed),
    }
    if whole_teacher:
        data["teacher_logits"] = nested(teacher)
    data |= {"dp_size": 1, "batch_num_tokens": sum(int(m.sum()) for m in mask), "global_batch_size": B}
    return student.requires_grad_(), data, torch.cat(teacher)


def response_rows():
    """(row that predicts it, response) of each trainable token, counted by hand."""
    rows, start = [], 0
    for response, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        rows += [(start + p - 1 + i, response) for i in range(r) if (response, i) != (0, 2)]
        start += p + r
    return rows


def stand_in():
    """Modules of verl's names with what the hook and this file use of them."""
    padding = types.ModuleType("padding")

    def no_padding_2_padding(values, data):
        values = values.values() if values.is_nested else values
        starts = data["prompts"].offsets() + data["responses"].offsets()
        prompts, responses = data["prompts"].offsets().diff(), data["responses"].offsets().diff()
        out = values.new_zeros(len(prompts), int(responses.max()))
        for i, (start, p, r) in enumerate(zip(starts[:-1], prompts, responses, strict=True)):
            out[i, :r] = values[start + p - 1 : start + p - 1 + r]
        return out

    padding.no_padding_2_padding = no_padding_2_padding
    ulysses = types.ModuleType("ulysses")
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
    losses = types.ModuleType("losses")
    losses.DISTILLATION_LOSS_REGISTRY, losses.asked = {}, []

    @dataclasses.dataclass
    class DistillationLossSettings:
        names: list
        use_topk: bool = False
        use_estimator: bool = False

    def register_distillation_loss(settings):
        def decorator(loss):
            for name in settings.names:
                if name in losses.DISTILLATION_LOSS_REGISTRY:
                    raise ValueError(f"{name} is already registered")
                losses.DISTILLATION_LOSS_REGISTRY[name] = loss
            return loss

        return decorator

    def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
        losses.asked.append(distillation_config.distillation_loss.loss_mode)
        return {"distillation_losses": student_logits.sum(-1)}

    def distillation_ppo_loss(config, distillation_config, model_output=None, data=None, dp_group=None, **logits):
        if logits:
            return losses.compute_topk_loss(config, distillation_config, data, logits["student_logits"], "thd")
        settings = distillation_config.distillation_loss
        rows, metrics = losses.DISTILLATION_LOSS_REGISTRY[settings.loss_mode](
            config=config, distillation_config=distillation_config, model_output=model_output, data=data
        )
        mask = data["response_mask"].to_padded_tensor(0)
        if settings.loss_max_clamp is not None:
            rows = rows.clamp(-settings.loss_max_clamp, settings.loss_max_clamp)
        return (rows * mask).sum() / data["batch_num_tokens"], metrics

    losses.DistillationLossSettings = DistillationLossSettings
    losses.register_distillation_loss = register_distillation_loss
    losses.compute_topk_loss, losses.distillation_ppo_loss = compute_topk_loss, distillation_ppo_loss
    return {
        "verl.trainer.distillation.losses": losses,
        "verl.workers.utils.padding": padding,
        "verl.utils.ulysses": ulysses,
    }


@pytest.fixture(params=["stand-in", "installed"])
def verl(request, monkeypatch):
    """verl.trainer.distillation.losses, its registry put back afterwards."""
    name = "verl.trainer.distillation.losses"
    if request.param == "installed":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = pytest.importorskip(name, exc_type=ImportError)
        monkeypatch.setattr(losses, "compute_topk_loss", losses.compute_topk_loss)
        for registry in ("DISTILLATION_LOSS_REGISTRY", "DISTILLATION_SETTINGS_REGISTRY"):
            monkeypatch.setattr(losses, registry, dict(getattr(losses, registry)))
        return losses
    for module, content in stand_in().items():
        parts = module.split(".")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
        monkeypatch.setitem(sys.modules, module, content)
    return sys.modules[name]


def configs(verl, loss_mode="tip", loss_max_clamp=None, strategy="fsdp"):
    if verl.__name__ == "losses":
        settings = types.SimpleNamespace(loss_mode=loss_mode, loss_max_clamp=loss_max_clamp)
        return types.SimpleNamespace(strategy=strategy), types.SimpleNamespace(distillation_loss=settings)
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    settings = DistillationLossConfig(
        loss_mode=loss_mode, loss_max_clamp=loss_max_clamp, use_policy_gradient=False, use_task_rewards=False
    )
    actor = ActorConfig(strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return actor, DistillationConfig(distillation_loss=settings)


def as_verl_has_it(verl, data):
    if verl.__name__ == "losses":
        return data
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    plain = {name: value for name, value in data.items() if isinstance(value, torch.Tensor)}
    out = TensorDict(plain, batch_size=[B])
    for name, value in data.items():
        if name not in plain:
            tensordict_utils.assign_non_tensor_data(out, name, value)
    return out


def through_verl(verl, student, data, **options):
    """Loss and metrics by verl's own function, called as its engine does: with logits, then with what came of them."""
    actor, distillation = configs(verl, **options)
    data = as_verl_has_it(verl, data)
    found = verl.distillation_ppo_loss(actor, distillation, data=data, student_logits=student)
    assert all(value.shape == student.shape[:2] for value in found.values())
    offsets = torch.tensor([0, *(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))]).cumsum(0)
    output = {name: torch.nested.nested_tensor_from_jagged(value[0], offsets) for name, value in found.items()}
    return verl.distillation_ppo_loss(actor, distillation, output, data)


def by_hand(student, teacher, rule, divergence):
    rows, rollouts = (torch.tensor(column) for column in zip(*response_rows(), strict=True))
    z = student.detach()[0, rows].requires_grad_()
    teacher = teacher[rows] if isinstance(teacher, torch.Tensor) else tip.TopK(teacher.ids[rows], teacher.logp[rows])
    out = distill(z, teacher, select=rule, divergence=divergence, rollout_ids=rollouts, full_stats=True)
    out.loss.backward()
    return out, torch.zeros_like(student).index_add_(1, rows, z.grad.unsqueeze(0)), rows


@pytest.mark.parametrize("whole", [False, True], ids=["listed", "whole"])
@pytest.mark.parametrize("rule", [tip.SoftOr(0.4), tip.KeepAll(), tip.TopEntropy(2)], ids=lambda r: type(r).__name__)
def test_the_loss_through_verl_is_the_mean_over_the_kept_response_tokens(verl, rule, whole):
    student, data, teacher = batch(whole)
    hook.register("tip", select=rule, divergence=tip.Jeffreys() if whole else tip.ReverseKL())
    if not whole:
        listed = teacher.log_softmax(-1).topk(K)
        teacher = tip.TopK(listed.indices, listed.values)
    loss, metrics = through_verl(verl, student, data)
    loss.backward()
    truth, gradient, rows = by_hand(student, teacher, rule, tip.Jeffreys() if whole else tip.ReverseKL())
    assert loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-4, atol=1e-7)
    left = torch.ones(student.shape[1], dtype=torch.bool).index_fill_(0, rows[truth.kept.row_ids], False)
    assert not student.grad[0, left].any() and student.grad[0, ~left].any(-1).all()
    assert metrics["distillation/tip/kept_frac"] == pytest.approx(truth.kept.mask.float().mean().item())
    assert metrics["distillation/tip/kl_rev"] == pytest.approx(truth.stats.kl_rev.mean().item(), rel=1e-4)
    assert sum(metrics[f"distillation/tip/q{i}_frac"] for i in (1, 2, 3, 4)) == pytest.approx(1)


WEIGHED = {
    "by position": (tip.weights.PositionDecay(2.0), tip.ReverseKL()),
    "by entropy": (tip.weights.TeacherConfidence(), tip.ReverseKL()),
    "gated": (None, tip.Gated({tip.ReverseKL(): 0.5, tip.JSD(): tip.weights.PositionDecay(2.0)})),
    "both": (
        lambda stats, row_mask, rollout_ids: stats.kl_rev * row_mask,
        tip.Gated({tip.ReverseKL(): tip.weights.TeacherConfidence(), tip.ForwardKL(): 0.25}),
    ),
    "sampled": (tip.weights.PrefixDecay(2.0), tip.SampledReverseKL()),
}


@pytest.mark.parametrize("case", WEIGHED)
@pytest.mark.parametrize("normalizer", ["kept", "all"])
def test_weights_and_gates_are_those_of_the_response_tokens(verl, normalizer, case):
    student, data, teacher = batch(whole_teacher=True)
    rows, rollouts = (torch.tensor(column) for column in zip(*response_rows(), strict=True))
    tokens = torch.arange(student.shape[1]) * 7 % V
    offsets = data["prompts"].offsets() + data["responses"].offsets()
    data["input_ids"] = torch.nested.nested_tensor_from_jagged(tokens, offsets)
    weigh, divergence = WEIGHED[case]
    hook.register("tip", select=tip.SoftOr(0.6), divergence=divergence, normalizer=normalizer, row_weights=weigh)
    loss, _ = through_verl(verl, student, data)
    loss.backward()
    z = student.detach()[0, rows].requires_grad_()
    on = {"divergence": divergence, "rollout_ids": rollouts, "labels": tokens[rows + 1], "row_weights": weigh}
    mask = torch.ones(len(rows), dtype=torch.bool)
    out = tip.distill(z, teacher[rows], select=tip.SoftOr(0.6), normalizer=normalizer, row_mask=mask, **on)
    out.loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    gradient = torch.zeros_like(student).index_add_(1, rows, z.grad.unsqueeze(0))
    torch.testing.assert_close(student.grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_rules_own_weights_and_an_infinite_row_count_as_in_distill(verl):
    student, data, teacher = batch(whole_teacher=True)
    row, _ = response_rows()[1]
    data["teacher_logits"].values()[row, 3] = -torch.inf
    teacher[row, 3] = -torch.inf
    rule = tip.EntropyGap(0.9, weighted=True)
    hook.register("tip", select=rule)
    with pytest.warns(RuntimeWarning, match="infinite loss or weight"):
        loss, _ = through_verl(verl, student, data)
    with pytest.warns(RuntimeWarning, match="infinite loss or weight"):
        truth, _, _ = by_hand(student, teacher, rule, tip.ReverseKL())
    assert int(truth.plan.dropped_rows) == 1 and loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)


def test_row_weights_that_are_none_are_refused(verl):
    with pytest.raises(ValueError, match=r"^row_weights: expected a callable of statistics or None"):
        hook.register("tip", row_weights=torch.ones(3))
    weigh = tip.weights.PrefixDecay()
    hook.register("tip", row_weights=weigh)
    student, data, _ = batch(whole_teacher=True)
    with pytest.raises(ValueError, match=r"^input_ids: expected the packed tokens in the batch"):
        through_verl(verl, student, data)


def test_without_scaling_the_loss_is_that_of_the_kept_over_all_tokens_and_may_be_clamped(verl):
    student, data, teacher = batch(whole_teacher=True)
    hook.register("tip", select=tip.SoftOr(0.4), normalizer="all")
    loss, _ = through_verl(verl, student, data)
    truth, _, rows = by_hand(student, teacher, tip.SoftOr(0.4), tip.ReverseKL())
    kept = int(truth.plan.kept_rows)
    assert 0 < kept < len(rows) and loss.item() == pytest.approx(truth.loss.item() * kept / len(rows), rel=1e-5)
    clamped, _ = through_verl(verl, student, data, loss_max_clamp=0.5)
    assert 0 < clamped < loss


def test_nothing_kept_is_a_zero_that_is_in_the_graph(verl):
    student, data, _ = batch(whole_teacher=True)
    hook.register("tip", select=tip.Threshold("kl_rev", above=1e9))
    loss, metrics = through_verl(verl, student, data)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any() and metrics["distillation/tip/kept_frac"] == 0


def test_what_cannot_be_done_faithfully_is_refused(verl, monkeypatch):
    student, data, _ = batch()
    hook.register("tip")
    with pytest.raises(ValueError, match="loss_max_clamp: expected null"):
        through_verl(verl, student, data, loss_max_clamp=10.0)
    with pytest.raises(ValueError, match=r"strategy: expected fsdp.*got megatron"):
        through_verl(verl, student, data, strategy="megatron")
    ulysses = importlib.import_module("verl.utils.ulysses")
    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size: expected 1"):
        through_verl(verl, student, data)
    with pytest.raises(ValueError, match="already registered"):
        hook.register("tip")
    with pytest.raises(ValueError, match="normalizer: expected 'kept' or 'all'"):
        hook.register("other", normalizer="mean")


def test_other_losses_of_verl_get_their_logits_as_before(verl):
    student, data, _ = batch()
    before = verl.compute_topk_loss
    hook.register("tip")
    hook.register("tip_entropy", select=tip.TopEntropy(1))
    actor, distillation = configs(verl, loss_mode="forward_kl_topk")
    data = as_verl_has_it(verl, data)
    ours = verl.distillation_ppo_loss(actor, distillation, data=data, student_logits=student)
    theirs = before(actor, distillation, data, student, "thd")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (
        verl.distillation_ppo_loss(*configs(verl, loss_mode=name), data=data, student_logits=student)["tip_kept"].sum()
        for name in ("tip", "tip_entropy")
    )
    assert first == 3 + 1 + 2 and second == B


def test_without_verl_registering_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.trainer.distillation.losses", None)
    with pytest.raises(ImportError, match=r"register needs verl 0\.9 or later"):
        hook.register()


def test_select_rows_are_those_that_distill_keeps_and_info_their_means():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(B, L, V, generator=generator) for _ in range(2))
    mask = (torch.rand(B, L, generator=generator) < 0.7).long()
    ids, info = hook.select_rows(student, teacher, mask, select=tip.SoftOr(0.3))
    out = distill(student, teacher, select=tip.SoftOr(0.3), row_mask=mask.bool(), full_stats=True)
    assert torch.equal(ids, out.kept.row_ids) and mask.flatten()[ids].all() and ids.dtype == torch.int64
    rows = mask.flatten().bool()
    assert info["tip/kept_frac"] == pytest.approx(len(ids) / int(mask.sum()))
    assert info["tip/divergence_kept"] == pytest.approx(out.stats.kl_rev[ids].mean().item(), rel=1e-5)
    for name, value in {"entropy": out.stats.entropy_s, "kl_fwd": out.stats.kl_fwd, "kl_rev": out.stats.kl_rev}.items():
        assert info[f"tip/{name}"] == pytest.approx(value[rows].mean().item(), rel=1e-5)
    part = tip.quadrants(out.stats, row_mask=mask.bool())
    assert all(info[f"tip/q{i}_frac"] == pytest.approx((part[rows] == i).float().mean().item()) for i in (1, 2, 3, 4))
    assert all(value.shape == () and not value.requires_grad for value in info.values())
    flat, _ = hook.select_rows(student.view(-1, V), teacher.view(-1, V), mask.view(-1), select=tip.SoftOr(6))
    assert len(flat) == 6
    with pytest.raises(ValueError, match=r"^response_mask: expected a tensor"):
        hook.select_rows(student, teacher, None)
    with pytest.raises(ValueError, match=r"^response_mask: expected a bool tensor"):
        hook.select_rows(student, teacher, mask[:, :-1])
