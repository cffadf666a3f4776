"""TIPDistillationTrainer beside the stock trainer, and beside a dense float64 optimizer step.

Rollouts are written beforehand; `python -m bench trl` samples them. Run as a script by torchrun, this file takes one
optimizer step on two ranks.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("transformers")

import transformers
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from trl import DistillationConfig, DistillationTrainer, TrlParser

import tip_kernels as tip
from tests._trl import SGD, TOKENIZER, load, made, rollouts_of, stubborn, trained, weights_of
from tip_kernels.hooks import trl as hook
from tip_kernels.hooks.trl import TIPDistillationConfig, TIPDistillationTrainer
from tip_kernels.opd.settings import PACKAGED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()


def step_of(trainer, before):
    """One vector: how far a step of SGD at rate 1 moved the weights, which is the gradient."""
    after = weights_of(trainer)
    return torch.cat([(before[name] - after[name]).flatten() for name in before])


# ---- the stock trainer's training, where every token is kept ----


@pytest.mark.parametrize("teacher", ["packaged", "stubborn"])
@pytest.mark.parametrize(("beta", "steps"), [(1.0, 20), (0.0, 5), (0.3, 5)])
def test_rule_all_has_the_stock_trainers_losses_and_weights(tmp_path, teacher, beta, steps):
    settings = {"max_steps": steps, "prompts": 16, "beta": beta} | SGD | {"learning_rate": 0.01, "max_grad_norm": 1.0}
    runs = []
    for kind, rule in ((DistillationTrainer, {}), (TIPDistillationTrainer, {"tip_rule": "all"})):
        model = stubborn() if teacher == "stubborn" else load("teacher")
        runs.append(trained(tmp_path, kind, teacher=model, **settings, **rule))
    (stock, stock_rows), (ours, our_rows) = runs
    assert len(our_rows) == steps and our_rows[-1]["loss"] != our_rows[0]["loss"]
    for a, b in zip(stock_rows, our_rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=2e-7)  # rows: lse of 15 nats in fp32
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["entropy"] == pytest.approx(a["entropy"], rel=1e-5)
    start = torch.cat([w.detach().double().flatten() for w in load("student").parameters()])
    ends = [torch.cat([w.flatten() for w in weights_of(run).values()]) for run in (stock, ours)]
    assert (ends[0] - ends[1]).norm() <= 1e-4 * (ends[0] - start).norm()


SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 15,
    "bos_token_id": None,
}
HEADS = {  # what stands between a head's product and the logits
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 2.5},
    "phi": {},  # a bias
}


def tiny(name, seed):
    config = transformers.AutoConfig.for_model(name, **(SIZES | HEADS[name]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    return model


def micro_batch(tool_mask=True):
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 6:], mask[2, 9:] = 0, 0
    inputs = {
        "prompt_ids": torch.randint(1, 24, (3, 4), generator=generator),
        "prompt_mask": torch.ones(3, 4, dtype=torch.int64),
        "completion_ids": torch.randint(1, 24, (3, 11), generator=generator).masked_fill(mask == 0, 0),
        "completion_mask": mask,
    }
    if tool_mask:
        inputs["tool_mask"] = torch.ones_like(mask)
        inputs["tool_mask"][0, 3:7] = 0
    return inputs


def loss_call(trainer, inputs, num_items=7.0):
    """The loss call's results, and the gradient."""
    trainer.model.zero_grad()
    trainer.model.train()
    if isinstance(trainer, TIPDistillationTrainer):
        trainer._select = trainer.make_rule()
    loss, entropy_sum, n_valid = trainer._compute_loss(trainer.model, inputs, num_items)
    loss.backward()
    gradient = torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])
    return loss.item(), entropy_sum.item(), int(n_valid), gradient


@pytest.mark.parametrize("name", HEADS)
def test_loss_call_honours_scale_softcap_bias_temperature_and_tool_mask(tmp_path, name):
    results = []
    for kind, rule in ((DistillationTrainer, {}), (TIPDistillationTrainer, {"tip_rule": "all"})):
        trainer = made(tmp_path, kind, student=tiny(name, 0), teacher=tiny(name, 1), temperature=0.7, **rule)
        results.append(loss_call(trainer, micro_batch()))
    stock, ours = results
    assert ours[2] == stock[2] == 11 - 4 + 6 + 9
    assert ours[:2] == pytest.approx(stock[:2], rel=1e-5)
    assert (ours[3] - stock[3]).norm() <= 2e-5 * stock[3].norm()


@pytest.mark.parametrize("rule", hook.RULES)
@pytest.mark.parametrize("quadrants", [True, False])
def test_entropy_sum_and_n_valid_are_the_stock_ones_under_every_rule(tmp_path, rule, quadrants):
    models = {"student": tiny("llama", 0), "teacher": tiny("llama", 1)}
    _, entropy_sum, n_valid, _ = loss_call(made(tmp_path, DistillationTrainer, **models), micro_batch())
    trainer = made(tmp_path, tip_rule=rule, tip_keep=0.3, tip_threshold_above=2.0, tip_quadrants=quadrants, **models)
    ours = loss_call(trainer, micro_batch())
    assert ours[1] == pytest.approx(entropy_sum, rel=1e-5)
    assert ours[2] == n_valid
    assert 0 < trainer._sums[0][1] < n_valid or rule in ("all", "adakd")


def test_tokens_of_tools_are_never_kept(tmp_path):
    inputs = micro_batch()
    models = {"student": tiny("llama", 0), "teacher": tiny("llama", 1)}
    whole = made(tmp_path, tip_rule="divergence", tip_keep=1.0, **models)
    by_hand = made(tmp_path, tip_rule="all", **models)
    for trainer in (whole, by_hand):
        loss_call(trainer, inputs)
    assert torch.equal(whole._sums[0][:2], torch.tensor([22.0, 22.0], dtype=torch.float64))
    torch.testing.assert_close(whole._sums[0], by_hand._sums[0])


def test_lora_trains_its_adapters_alone_and_as_the_stock_trainer_does(tmp_path):
    peft = pytest.importorskip("peft")
    ends = []
    for kind, rule in ((DistillationTrainer, {}), (TIPDistillationTrainer, {"tip_rule": "all"})):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer, _ = trained(tmp_path, kind, peft_config=config, max_steps=3, **SGD, **rule)
        assert not trainer.model.get_output_embeddings().weight.requires_grad
        ends.append({n: w for n, w in weights_of(trainer).items() if "lora_B" in n})
    assert ends[0] and all(w.norm() > 0 for w in ends[0].values())
    for name, weight in ends[0].items():
        assert (ends[1][name] - weight).norm() <= 1e-4 * weight.norm()


def test_bfloat16_autocast_stays_as_near_to_float32_as_the_stock_trainer(tmp_path):
    losses = {}
    for bf16 in (False, True):
        for kind, rule in ((DistillationTrainer, {}), (TIPDistillationTrainer, {"tip_rule": "all"})):
            losses[kind, bf16] = trained(tmp_path, kind, bf16=bf16, **SGD, **rule)[1][0]["loss"]
    exact = losses[DistillationTrainer, False]
    allowed = 2 * abs(losses[DistillationTrainer, True] - exact) + 1e-5
    assert abs(losses[TIPDistillationTrainer, True] - exact) <= allowed


# ---- selection: the step is the mean over every kept token of every micro-batch ----


def dense_step(trainer, batches, chosen):
    """The gradient and loss of sum over kept tokens / their count, in float64, from whole logits."""
    student, teacher = (copy.deepcopy(model).double() for model in (load("student"), load("teacher")))
    total, count = 0.0, 0
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        log_s, log_t = (
            model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1].log_softmax(-1)
            for model in (student, teacher)
        )
        kl_rev = (log_s.exp() * (log_s - log_t)).sum(-1)
        entropy = -(log_s.exp() * log_s).sum(-1)
        kl_fwd = (log_t.exp() * (log_t - log_s)).sum(-1)
        kept = chosen(batch["completion_mask"] != 0, kl_rev.detach(), kl_fwd.detach(), entropy.detach())
        total, count = total + kl_rev[kept].sum(), count + int(kept.sum())
    loss = total / max(count, 1)
    loss.backward()
    return loss.item(), count, torch.cat([w.grad.flatten() for w in student.parameters()])


def largest(mask, kl_rev, kl_fwd, entropy):
    kept = torch.zeros_like(mask)
    for row in range(len(mask)):
        quota = max(1, int(0.3 * int(mask[row].sum()) + 1e-6))
        kept[row, kl_rev[row].masked_fill(~mask[row], -1).topk(quota).indices] = True
    return kept


CHOICES = {
    "quota": ({"tip_rule": "divergence", "tip_keep": 0.3}, largest),
    "threshold": (
        {"tip_rule": "threshold", "tip_threshold_above": 0.05},
        lambda mask, kl_rev, kl_fwd, entropy: mask & (kl_rev > 0.05),
    ),
    "overconfident": (
        {"tip_rule": "overconfident", "tip_keep": 1.0, "tip_entropy_below": 0.4, "tip_divergence_above": 0.02},
        lambda mask, kl_rev, kl_fwd, entropy: mask & (entropy < 0.4) & (kl_fwd > 0.02),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_accumulated_step_is_the_mean_over_all_kept_tokens(tmp_path, case):
    settings, chosen = CHOICES[case]
    trainer = made(tmp_path, gradient_accumulation_steps=4, **SGD, **settings)
    before = weights_of(trainer)
    trainer.train()
    batches = trainer._buffered_inputs
    loss, count, gradient = dense_step(trainer, batches, chosen)
    counts = [int(b["completion_mask"].sum()) for b in batches]
    assert len(set(counts)) > 1 and 0 < count < 0.6 * sum(counts)
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["tip/divergence_kept"] == pytest.approx(loss, rel=1e-5)
    assert row["tip/kept_frac"] == pytest.approx(count / sum(counts))
    assert row["tip/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert (step_of(trainer, before) - gradient).norm() <= 1e-4 * gradient.norm()


LOSSES = {  # the trainer's arguments, and a token's loss and weight of (kl_rev, kl_fwd, entropy of the student, place)
    "weighed": (
        {"row_weights": tip.weights.PositionDecay(4.0)},
        lambda kl_rev, kl_fwd, entropy, place: (kl_rev, 0.5 ** (place / 4)),
    ),
    "gated": (
        {"divergence": tip.Gated({tip.ReverseKL(): 0.5, tip.ForwardKL(): lambda stats, *_: stats.entropy_s > 0.1})},
        lambda kl_rev, kl_fwd, entropy, place: (0.5 * kl_rev + (entropy > 0.1) * kl_fwd, torch.ones_like(entropy)),
    ),
    "both": (
        {
            "divergence": tip.Gated({tip.ForwardKL(): tip.weights.PositionDecay(4.0)}),
            "row_weights": lambda stats, row_mask, rollout_ids: stats.kl_rev,
        },
        lambda kl_rev, kl_fwd, entropy, place: (0.5 ** (place / 4) * kl_fwd, kl_rev),
    ),
}


@pytest.mark.parametrize("statistics", ["micro_batch", "step"])
@pytest.mark.parametrize("case", LOSSES)
def test_weighed_and_gated_steps_are_the_weighted_mean_over_all_kept_tokens(tmp_path, case, statistics):
    given, formula = LOSSES[case]
    settings = {"tip_rule": "divergence", "tip_keep": 0.3, "tip_statistics": statistics}
    trainer = made(tmp_path, gradient_accumulation_steps=4, loss=given, **SGD, **settings)
    before = weights_of(trainer)
    trainer.train()
    student, teacher = (copy.deepcopy(model).double() for model in (load("student"), load("teacher")))
    total, weight, kept_rows, trainable = 0.0, 0.0, 0, 0
    for batch in trainer._buffered_inputs:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        mask = batch["completion_mask"] != 0
        log_s, log_t = (
            model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1].log_softmax(-1)
            for model in (student, teacher)
        )
        kl_rev, kl_fwd = (log_s.exp() * (log_s - log_t)).sum(-1), (log_t.exp() * (log_t - log_s)).sum(-1)
        entropy = -(log_s.exp() * log_s).sum(-1).detach()
        kept = largest(mask, kl_rev.detach(), kl_fwd.detach(), entropy)
        losses, w = formula(kl_rev, kl_fwd, entropy, mask.cumsum(1) - 1)
        total, weight = total + (w.detach() * losses)[kept].sum(), weight + w.detach()[kept].sum()
        kept_rows, trainable = kept_rows + int(kept.sum()), trainable + int(mask.sum())
    (total / weight).backward()
    gradient = torch.cat([x.grad.flatten() for x in student.parameters()])
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx((total / weight).item(), rel=1e-5)
    assert row["tip/divergence_kept"] == pytest.approx((total / weight).item(), rel=1e-5)
    assert row["tip/kept_frac"] == pytest.approx(kept_rows / trainable)
    assert (step_of(trainer, before) - gradient).norm() <= 1e-4 * gradient.norm()


def test_weights_that_read_the_sampled_tokens_get_them_and_evaluation_is_not_weighed(tmp_path):
    seen = []

    def weigh(stats, row_mask, rollout_ids):
        seen.append(stats)
        return tip.weights.PrefixDecay()(stats, row_mask, rollout_ids)

    weigh.needs = {"logp_s", "logp_t"}
    plain, weighed = made(tmp_path, tip_rule="all"), made(tmp_path, tip_rule="all", loss={"row_weights": weigh})
    right = plain.evaluate()["eval_loss"]
    assert weighed.evaluate()["eval_loss"] == pytest.approx(right) and not seen
    weighed.train()
    ids = weighed._buffered_inputs[0]["completion_ids"]
    mask = weighed._buffered_inputs[0]["completion_mask"] != 0
    assert torch.equal(seen[0]._labels, ids.masked_fill(~mask, -100).flatten())


def test_what_is_no_loss_and_no_weight_is_refused(tmp_path):
    for loss, message in (
        ({"row_weights": torch.ones(3)}, "^row_weights: expected a callable of statistics or None"),
        ({"divergence": "jsd"}, "^divergence: expected a Divergence such as"),
    ):
        with pytest.raises(ValueError, match=message):
            made(tmp_path, loss=loss)
    with pytest.raises(ValueError, match=r"^divergence: expected None beside tip_divergence and beta"):
        made(tmp_path, loss={"divergence": tip.JSD()}, tip_divergence="jsd")


def test_count_of_a_quota_rule_is_known_before_the_first_forward(tmp_path):
    for scope in ("rollout", "batch"):
        trainer = made(tmp_path, tip_rule="soft_or", tip_keep=0.3, tip_scope=scope, gradient_accumulation_steps=4)
        factors = []
        finish = trainer._finish_step
        trainer._finish_step = lambda model, finish=finish, factors=factors: (
            factors.append(finish(model)) or factors[-1]
        )
        trainer.train()
        kept = trainer.state.log_history[0]["tip/kept_frac"] * sum(
            int(b["completion_mask"].sum()) for b in trainer._buffered_inputs
        )
        assert float(trainer._buffered_inputs[0]["num_items_in_batch"]) == pytest.approx(kept)
        assert factors == [1.0]


@pytest.mark.parametrize("rule", [r for r in hook.RULES if r != "threshold"])
@pytest.mark.parametrize("keep", [0.3, 5])
def test_count_from_the_mask_is_what_the_rule_keeps(tmp_path, rule, keep):
    chosen = made(tmp_path, tip_rule=rule, tip_keep=keep).make_rule()
    assert hook.count_is_known(chosen)
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9, 12)
    mask = torch.rand(4, 9) < 0.6
    mask[2] = False
    kept = chosen(tip.token_stats(*logits), mask).mask
    assert hook.count_kept(chosen, mask) == kept.sum()


def test_rules_that_look_at_the_data_say_that_their_count_is_unknown():
    assert not hook.count_is_known(tip.Threshold(above=0.1))
    assert not hook.count_is_known(tip.Overconfident(0.2, entropy_below=0.3))
    assert not hook.count_is_known(tip.Overconfident(0.2, divergence_above=0.1))


def test_step_without_a_kept_token_changes_nothing_and_the_next_one_learns(tmp_path):
    trainer = made(tmp_path, tip_rule="threshold", tip_threshold_above=0.05, max_steps=3, weight_decay=0.1)
    usual = trainer.make_rule()
    rules = iter([usual, tip.Threshold(above=1e9), usual])
    trainer.make_rule = lambda: next(rules)
    seen = []
    finish = trainer._finish_step

    def watched(model):
        seen.append(weights_of(trainer))
        return finish(model)

    trainer._finish_step = watched
    trainer.train()
    after = weights_of(trainer)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["tip/kept_frac"] > 0 for row in rows] == [True, False, True]
    assert rows[1]["loss"] == 0 and rows[1]["tip/grad_norm"] == 0 and "tip/divergence_kept" not in rows[1]
    moved = [max((a[n] - b[n]).abs().max() for n in a) for a, b in zip(seen, [*seen[1:], after], strict=True)]
    assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0  # momentum and weight decay included


def test_token_of_infinite_divergence_leaves_the_mean_and_its_count(tmp_path):
    student, teacher = tiny("phi", 0), tiny("phi", 1)
    teacher.get_output_embeddings().bias.data[5] = -torch.inf  # every token's KL(student || teacher) is infinite
    with pytest.warns(RuntimeWarning, match="infinite loss or weight"):
        trainer, rows = trained(tmp_path, student=student, teacher=teacher, tip_rule="all", **SGD)
    assert rows[0]["tip/kept_frac"] == 0 and rows[0]["loss"] == 0
    assert torch.cat([w.flatten() for w in trainer.model.parameters()]).isfinite().all()


RANKS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | SGD


def test_two_ranks_take_the_step_of_one_and_a_sharded_head_has_their_mean_gradient(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run([*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt")
    for case, (settings, _) in CHOICES.items():
        trainer = made(tmp_path, **(RANKS | {"per_device_train_batch_size": 4}), **settings)
        before = weights_of(trainer)
        trainer.train()
        counts, gradient, row = two[case]
        assert counts[0] != counts[1]
        one = step_of(trainer, before)
        assert (gradient - one).norm() <= 1e-4 * one.norm()
        for name in ("loss", "tip/kept_frac", "tip/q4_frac", "tip/divergence_kept", "tip/grad_norm"):
            assert row[name] == pytest.approx(trainer.state.log_history[0][name], rel=2e-5)
    for unit in ("with the rest", "of its own"):  # TRL leaves out the mean where the head is an FSDP2 unit of its own
        assert max(two[f"head {unit}"].values()) <= 1e-6


def on_two_ranks(folder):
    """For each choice: tokens kept by each rank, gradient, logs; for FSDP2: how far gradients are from DDP's."""
    results = {}
    for case, (settings, _) in CHOICES.items():
        trainer = made(folder, **RANKS, ddp_backend="gloo", **settings)
        before = weights_of(trainer)
        kept = []
        log_sums = trainer._log_sums

        def watched(mode, trainer=trainer, kept=kept, log_sums=log_sums):
            kept.append(trainer.accelerator.gather(torch.stack(trainer._sums).sum(0)[1:2]))
            return log_sums(mode)

        trainer._log_sums = watched
        trainer.train()
        results[case] = kept[0].tolist(), step_of(trainer, before), trainer.state.log_history[0]
    for unit in ("with the rest", "of its own"):
        results[f"head {unit}"] = sharded_gaps(folder, own_unit=unit == "of its own")
    if trainer.accelerator.is_main_process:
        torch.save(results, Path(folder) / "two.pt")
    trainer.accelerator.end_training()


def sharded_gaps(folder, own_unit):
    trainer = made(folder, ddp_backend="gloo", tip_rule="divergence", tip_keep=0.3)
    trainer._select = trainer.make_rule()
    trainer.teacher_model = tiny("llama", 1)
    inputs = micro_batch()
    inputs["completion_ids"] = (inputs["completion_ids"] + 3 * trainer.accelerator.process_index) % 23
    plain, sharded = tiny("llama", 0), tiny("llama", 0)
    for unit in (*sharded.model.layers, *([sharded.lm_head] if own_unit else []), sharded):
        fully_shard(unit)
    for model in (plain, sharded):
        trainer.model = model.train()
        loss, *_ = trainer._forward_redirection(model, model, trainer._compute_loss, model, inputs, 7.0)
        loss.backward()
    gaps = {}
    for (name, weight), shard in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        mean = trainer.accelerator.reduce(weight.grad, "mean")
        gaps[name] = ((shard.grad.full_tensor() - mean).norm() / mean.norm()).item()
    return gaps


# ---- AdaKD ----

ADAKD = {
    "tip_rule": "adakd",
    "tip_adakd_step": 0.4,
    "tip_adakd_tolerance": 0.0,
    "tip_adakd_beta": 0.0,
    "tip_adakd_floor": 0.2,
}


def first_step(folder, monkeypatch, **settings):
    """Of a trainer's first step: the tokens kept of each rollout, the gradient, and what it logged."""
    trainer = made(folder, prompts=16, **SGD | {"learning_rate": 0.01}, **settings)
    if trainer.focus:
        trainer.focus.keep = 0.3
    kept, gradient, distill, learn, finish = {}, [], tip.distill, trainer._learn, trainer._finish_step
    outs = []

    def watched(student, teacher, mask, inputs, temperature):
        result = learn(student, teacher, mask, inputs, temperature)
        for prompt, completion, row, chosen in zip(
            inputs["prompt_ids"], inputs["completion_ids"], mask, outs[-1].kept.mask.view(mask.shape), strict=True
        ):
            kept[tuple(prompt[prompt != 0].tolist()), tuple(completion[row].tolist())] = chosen[row].tolist()
        return result

    def finished(model):
        factor = finish(model)
        gradient.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
        return factor

    trainer._learn, trainer._finish_step = watched, finished
    with monkeypatch.context() as patched:
        patched.setattr(hook, "distill", lambda *args, **named: outs.append(distill(*args, **named)) or outs[-1])
        trainer.train()
    return kept, gradient[0], trainer.state.log_history[0]


STEPS = {
    "soft_or": {"tip_rule": "soft_or"},
    "overconfident, without quadrants": {"tip_rule": "overconfident", "tip_quadrants": False},
    "entropy of the batch": {"tip_rule": "entropy", "tip_scope": "batch", "tip_keep": 60},
    "threshold": {"tip_rule": "threshold", "tip_threshold_above": "quantile:0.8"},
    "adakd": {"tip_rule": "adakd", "temperature": 2.0},
    "adakd as released": {
        "tip_rule": "adakd",
        "tip_scope": "batch",
        "tip_adakd_median_of": "kept",
        "tip_adakd_reanchor": "release",
        "tip_loss_temperature": 2.0,
    },
    "cuts": {"tip_rule": "overconfident", "tip_keep": 0.5, "tip_entropy_below": "quantile:0.7", "temperature": 2.0},
}


@pytest.mark.parametrize("case", STEPS)
def test_statistics_of_the_step_are_those_of_one_big_batch(tmp_path, monkeypatch, case):
    def run(size, statistics):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        return first_step(tmp_path, monkeypatch, tip_statistics=statistics, **sizes, **STEPS[case])

    kept, gradient, row = run(16, "micro_batch")
    assert len(kept) == 16 and 0 < row["tip/kept_frac"] < 1
    for size in (16, 4, 1):
        ours, changed, logged = run(size, "step")
        assert ours == kept
        assert (changed - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max())
        for name in {name for name in row if name in ("loss", "grad_norm") or name.startswith("tip/")}:
            assert logged[name] == pytest.approx(row[name], rel=1e-5, abs=1e-7), name
    if case in ("soft_or", "entropy of the batch"):
        assert run(4, "micro_batch")[0] != kept


def test_adakd_learns_as_distill_with_its_arguments_and_moves_its_share(tmp_path):
    trainer = made(tmp_path, **SGD | {"learning_rate": 0.01}, **ADAKD, max_steps=6)
    learn, sums = trainer._learn, []

    def watched(student, teacher, mask, ids, temperature):
        share = trainer.focus.keep
        out = tip.distill(student, teacher, **tip.adakd(share, row_mask=mask, base=temperature))
        result = learn(student, teacher, mask, ids, temperature)
        sums.append((share, result[1], out))
        return result

    trainer._learn = watched
    trainer.train()
    shares = [row["tip/keep"] for row in trainer.state.log_history if "loss" in row]
    assert len(set(shares)) > 2 and min(shares) >= 0.2
    assert len(sums) == 12
    for share, ours, out in sums:
        assert ours[1] == out.plan.kept_rows and (share == 1) == (ours[1] == ours[0])
        assert ours[2].item() == pytest.approx(out.loss.item() * ours[1].item(), rel=1e-5)


def test_adakds_share_goes_on_from_a_checkpoint(tmp_path):
    settings = SGD | {"learning_rate": 0.01, "max_steps": 4, "save_strategy": "steps", "save_steps": 2} | ADAKD
    settings["shuffle_dataset"] = False  # the sampler draws anew on a resume
    unbroken, _ = trained(tmp_path / "a", **settings)
    resumed = made(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert unbroken.focus.state_dict() == pytest.approx(resumed.focus.state_dict(), rel=1e-5)
    assert resumed.focus.state_dict()["seen"] == 4
    assert resumed.focus.keep != 1.0


# ---- heads of sharded models ----


def test_zero3s_heads_are_read_while_they_are_gathered_alone(tmp_path, monkeypatch):
    """A stand-in for ZeRO-3: outside the context that gathers it, a head holds nothing."""
    trainer = made(tmp_path, tip_rule="divergence", tip_keep=0.3)
    trainer._select = trainer.make_rule()
    trainer.model.train()
    torch.manual_seed(0)
    hidden_s, hidden_t = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 12)
    heads = [torch.nn.Parameter(torch.randn(20, width)) for width in (8, 12)]
    mask = torch.ones(2, 5, dtype=torch.int64)

    def gradients():
        loss, *_ = trainer._kept_loss({"completion_ids": mask}, hidden_s, hidden_t, *heads, mask, 1.0, 3.0)
        return loss.detach(), *torch.autograd.grad(loss, [hidden_s, heads[0]])

    whole = gradients()
    full = {id(head): head.data for head in heads}

    @contextmanager
    def gather(*parameters):
        for parameter in (p for p in parameters if p is not None):
            parameter.data = full[id(parameter)]
        yield
        for parameter in (p for p in parameters if p is not None):
            parameter.data = torch.empty(0)

    monkeypatch.setattr(hook, "maybe_gather_lm_head_ctx", gather)
    monkeypatch.setattr(hook, "is_deepspeed_zero3_enabled", lambda: True)
    for head in heads:
        head.data = torch.empty(0)
    for ours, truth in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, truth)
    with torch.no_grad():
        loss, *_ = trainer._kept_loss({"completion_ids": mask}, hidden_s, hidden_t, *heads, mask, 1.0, 3.0)
    torch.testing.assert_close(loss, whole[0])


def test_deepspeed_is_refused_where_the_count_is_unknown(tmp_path, monkeypatch):
    prepared = DistillationTrainer.__init__

    def with_deepspeed(self, *args, **named):
        prepared(self, *args, **named)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(DistillationTrainer, "__init__", with_deepspeed)
    with pytest.raises(ValueError, match=r"tip_rule: .*DeepSpeed.*'overconfident'"):
        made(tmp_path, tip_rule="overconfident", tip_entropy_below=0.3)
    made(tmp_path, tip_rule="overconfident")
    made(tmp_path, tip_rule="soft_or")


# ---- models as they are, not as their configs say ----


def mpt(seed, **options):
    """A model whose forward does not read logit_scale."""
    sizes = {"vocab_size": 24, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes, **options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    return model


class Divided(transformers.LlamaForCausalLM):
    """A forward that divides hidden states, where some models divide logits, and by no name that anyone knows."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 3,))


def divided(seed):
    model = tiny("llama", seed)
    other = Divided(model.config)
    other.load_state_dict(model.state_dict())
    return other


def own_mean(student, teacher, inputs):
    """Mean reverse KL over the trainable tokens from both models' own logits, in float64."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    log_s, log_t = (
        model.double()(input_ids=ids, attention_mask=attention).logits[:, 3:-1].log_softmax(-1)
        for model in (copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval())
    )
    rows = (log_s.exp() * (log_s - log_t)).sum(-1)
    return rows[(inputs["completion_mask"] * inputs["tool_mask"]) != 0].mean().item()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (lambda: mpt(0, logit_scale=0.3), lambda: mpt(1, logit_scale=0.3)),
        (lambda: tiny("llama", 0), lambda: mpt(1, logit_scale="inv_sqrt_d_model")),
        (lambda: divided(0), lambda: tiny("llama", 1)),
        (lambda: tiny("gemma2", 0), lambda: divided(1)),
    ],
    ids=["MPT", "MPT beside Llama", "divided student", "divided teacher"],
)
def test_the_loss_is_that_of_the_models_own_logits_whatever_their_configs_say(tmp_path, student, teacher):
    models = {"student": student(), "teacher": teacher()}
    truth = own_mean(models["student"], models["teacher"], micro_batch())
    loss, *_ = loss_call(made(tmp_path, tip_rule="all", **models), micro_batch(), 22.0)
    assert loss == pytest.approx(truth, rel=1e-5)


def with_adapter(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))


def quantised(seed):
    model = tiny("llama", seed)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.mul(40).to(torch.int8), requires_grad=False)
    return model


def offloaded(seed):
    return pytest.importorskip("accelerate").cpu_offload(tiny("llama", seed), execution_device="cpu")


REFUSED = {
    "an adapter on the teacher's head": (
        {"teacher": lambda: with_adapter(tiny("llama", 1), target_modules=["lm_head"])},
        "^teacher_model: .*LlamaForCausalLM.*an adapter on it",
    ),
    "trained rows of the teacher's head": (
        {"teacher": lambda: with_adapter(tiny("llama", 1), trainable_token_indices={"lm_head": [3, 5]})},
        "^teacher_model: .*PeftModel with TrainableTokens.*an adapter on it",
    ),
    "trained rows of the student's head": (
        {"student": lambda: with_adapter(tiny("llama", 0), trainable_token_indices={"lm_head": [3, 5]})},
        "^model: .*PeftModel with TrainableTokens.*an adapter on it",
    ),
    "a quantised teacher head": (
        {"teacher": lambda: quantised(1)},
        "^teacher_model: .*not quantised, got Linear.*int8",
    ),
    "a quantised student head": ({"student": lambda: quantised(0)}, "^model: .*not quantised, got Linear.*int8"),
    "an offloaded teacher": ({"teacher": lambda: offloaded(1)}, "^teacher_model: .*in memory, got Llama.*offloaded"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(("models", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_are_no_head_are_refused_when_the_trainer_is_made(tmp_path, models, message):
    sound = {"student": lambda: tiny("llama", 0), "teacher": lambda: tiny("llama", 1)}
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **{name: make() for name, make in (sound | models).items()})


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_adapters_that_change_the_heads_product_alone_are_taken(tmp_path):
    teacher = with_adapter(tiny("llama", 1), target_modules=["q_proj"], target_parameters=["lm_head.weight"])
    truth = own_mean(tiny("llama", 0), teacher, micro_batch())
    trainer = made(tmp_path, student=tiny("llama", 0), teacher=teacher, tip_rule="all")
    assert loss_call(trainer, micro_batch(), 22.0)[0] == pytest.approx(truth, rel=1e-5)


def test_a_missing_teacher_is_named(tmp_path):
    settings = TIPDistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="teacher_model: expected a transformers model or its name, got None"):
        TIPDistillationTrainer(load("student"), args=settings)


def test_probing_leaves_modes_as_they_are(tmp_path):
    student = tiny("llama", 0).train()
    student.lm_head.eval()
    trainer = made(tmp_path, student=student, teacher=tiny("llama", 1))
    assert trainer.model.training and not trainer.model.lm_head.training
    assert "forward" not in vars(trainer.model.lm_head)


def experts(seed, **options):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.2}
    config = transformers.AutoConfig.for_model("qwen3_moe", **SIZES | moe | options)
    config._experts_implementation = "eager"  # the others have no float64
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    return model


def test_experts_own_loss_is_added_by_the_models_coefficient_and_logged(tmp_path):
    student, teacher, inputs = experts(0, output_router_logits=True), tiny("llama", 1), micro_batch()
    exact = copy.deepcopy(student).double().eval()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    router = (0.2 * exact(input_ids=ids, attention_mask=attention).aux_loss).item()
    truth = own_mean(student, teacher, inputs)
    trainer = made(tmp_path, student=student, teacher=teacher, tip_rule="all", gradient_accumulation_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    loss, *_, gradient = loss_call(trainer, inputs, 22.0)
    assert router > 0.1 and loss == pytest.approx(truth + router, rel=1e-5)
    plain = made(tmp_path, student=experts(0), teacher=teacher, tip_rule="all")
    assert loss_call(plain, inputs, 22.0)[0] == pytest.approx(truth, rel=1e-5)
    assert (gradient - loss_call(plain, inputs, 22.0)[3]).norm() > 0.01 * gradient.norm()
    trainer._log_sums("train")
    assert trainer._metrics["train"]["tip/router_loss"] == [pytest.approx(router, rel=1e-5)]
    with pytest.raises(ValueError, match="tip_rule: expected a rule whose count is known beforehand, or tip_stat"):
        made(tmp_path, student=student, teacher=teacher, tip_rule="threshold", tip_threshold_above=0.1)


# ---- evaluation, settings, errors ----


def test_evaluation_is_over_every_token_as_the_stock_trainers(tmp_path):
    stock = made(tmp_path, DistillationTrainer).evaluate()
    ours = made(tmp_path, tip_rule="divergence", tip_keep=0.1).evaluate()
    assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5)
    assert ours["eval_entropy"] == pytest.approx(stock["eval_entropy"], rel=1e-5)
    assert ours["eval_tip/kept_frac"] == 1
    assert sum(ours[f"eval_tip/q{i}_frac"] for i in (1, 2, 3, 4)) == pytest.approx(1)


def test_sampled_divergence_reads_the_completions_tokens(tmp_path):
    inputs = micro_batch()
    student, teacher = tiny("llama", 0), tiny("llama", 1)
    trainer = made(tmp_path, student=student, teacher=teacher, tip_rule="all", tip_divergence="sampled_reverse_kl")
    trainer._select = trainer.make_rule()
    trainer.model.train()
    loss, *_ = trainer._compute_loss(student, inputs, 22.0)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    valid = (inputs["completion_mask"] * inputs["tool_mask"]) != 0
    with torch.no_grad():
        logp_s, logp_t = (
            model(ids).logits[:, 3:-1].log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
            for model in (student, teacher)
        )
    assert loss.item() == pytest.approx((logp_s - logp_t)[valid].mean().item(), rel=1e-4)


def test_settings_come_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ntip_rule: overconfident\ntip_keep: 64\n"
        "tip_divergence: 'jsd:0.1'\ntip_entropy_below: quantile:0.5\n"
    )
    (args,) = TrlParser(TIPDistillationConfig).parse_args_and_config(["--config", str(file)])
    assert args.make_rule(1.0) == tip.Overconfident(64, entropy_below=("quantile", 0.5))
    assert args.make_divergence() == tip.JSD(0.1)
    line = ["--config", str(file), "--tip_rule", "soft_or", "--tip-keep", "0.5", "--tip_scope", "batch"]
    (args,) = TrlParser(TIPDistillationConfig).parse_args_and_config([*line, "--no_tip_quadrants"])
    assert args.make_rule(1.0) == tip.SoftOr(0.5, scope="batch")
    assert args.tip_quadrants is False
    (args,) = TrlParser(TIPDistillationConfig).parse_args_and_config([*line[:4], "--tip_keep", "7"])
    assert args.make_rule(1.0) == tip.SoftOr(7)


def test_help_text_names_every_setting():
    text = TrlParser(TIPDistillationConfig).format_help()
    own = [name for name in TIPDistillationConfig.__dataclass_fields__ if name.startswith("tip_")]
    assert len(own) > 10
    for name in own:
        assert f"--{name}" in text
        assert TIPDistillationConfig.__dataclass_fields__[name].metadata["help"].endswith(".")


@pytest.mark.parametrize("rule", hook.RULES)
def test_every_rule_trains(tmp_path, rule):
    _, rows = trained(tmp_path, tip_rule=rule, tip_keep=0.3, tip_threshold_above="quantile:0.7", max_steps=2)
    assert 0 < rows[0]["loss"] < 20 and 0 < rows[0]["tip/kept_frac"] <= 1
    assert sum(rows[0][f"tip/q{i}_frac"] for i in (1, 2, 3, 4)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tip_rule": "best"}, r"tip_rule: expected one of all, .*adakd, got 'best'"),
        ({"tip_keep": 0}, r"tip_keep: expected a fraction in \(0, 1\] or a whole number .*, got 0"),
        ({"tip_keep": "much"}, r"tip_keep: .*got 'much'"),
        ({"tip_scope": "world"}, r"tip_scope: expected 'rollout' or 'batch', got 'world'"),
        ({"tip_divergence": "kl"}, r"tip_divergence: expected one of reverse_kl, .*got 'kl'"),
        ({"tip_divergence": "todi", "beta": 0.5}, r"beta: expected its default 1.0 beside tip_divergence='todi'"),
        ({"tip_rule": "threshold"}, r"tip_threshold_above: expected a bound"),
        ({"tip_rule": "threshold", "tip_threshold_above": 0.1, "tip_threshold_by": "kl"}, r"tip_threshold_by: .*'kl'"),
        ({"tip_min_rows": -1}, r"tip_min_rows: min_rows: expected an int of at least 0, got .*-1"),
        ({"tip_rule": "sample_entropy", "tip_gamma": -1.0}, r"tip_gamma: gamma: expected .* got .*-1"),
        ({"tip_loss_temperature": 0.0}, r"tip_loss_temperature: .*expected a finite number above 0, got .*0"),
        ({"tip_rule": "adakd", "tip_adakd_median_of": "all"}, r"tip_adakd_median_of: expected 'valid' or 'kept'"),
        ({"tip_rule": "adakd", "tip_adakd_reanchor": "code"}, r"reanchor: expected 'paper' or 'release', got .*'code'"),
        ({"tip_statistics": "rank"}, r"tip_statistics: expected 'micro_batch' or 'step', got 'rank'"),
        ({"tip_rule": "overconfident", "tip_entropy_below": "quantile:2"}, r"tip_entropy_below: .*'quantile:2'"),
        ({"tip_rule": "adakd", "tip_adakd_floor": 0.0}, r"tip_adakd_\*: floor: "),
    ],
)
def test_bad_settings_are_refused_by_their_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TIPDistillationConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_stock_config_and_another_trl_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="args: expected a TIPDistillationConfig, got DistillationConfig"):
        TIPDistillationTrainer(load("student"), load("teacher"), DistillationConfig(str(tmp_path), bf16=False))

    def other(self, unwrapped_student, inputs, num_items_in_batch):
        return None

    monkeypatch.setattr(DistillationTrainer, "_compute_loss", other)
    with pytest.raises(RuntimeError, match=r"for TRL 1\.16"):
        made(tmp_path)


# ---- the documented way in ----


def test_trls_own_example_runs_with_the_names_swapped(tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", DistillationTrainer.__doc__, flags=re.S)[1]
    code = "\n".join(line.strip().removeprefix(">>> ").removeprefix("... ") for line in example.splitlines())
    code = code.replace(
        "from trl import DistillationTrainer", "from tip_kernels.hooks.trl import TIPDistillationTrainer"
    )
    code = code.replace("= DistillationTrainer(", "= TIPDistillationTrainer(")
    for name, role in (("Qwen/Qwen2.5-0.5B-Instruct", "student"), ("Qwen/Qwen2.5-1.5B-Instruct", "teacher")):
        assert name in code
        code = code.replace(name, str(PACKAGED / role))
    texts, _ = rollouts_of(8)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict({"prompt": texts}))
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # the default is bf16
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert isinstance(names["trainer"], TIPDistillationTrainer)
    assert names["trainer"].state.global_step == 3  # the default's three epochs of one batch
    assert (tmp_path / "student-Distillation").is_dir()


def test_the_swap_of_the_page_runs(tmp_path):
    section = PAGE.split("## TRL")[1].split("\n## ")[0]
    block = re.search(r"```diff\n(.*?)```", section, flags=re.S)[1]
    code = "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))
    texts, _ = rollouts_of(8)
    names = {
        "model": load("student"),
        "teacher": load("teacher"),
        "dataset": Dataset.from_dict({"prompt": texts}),
        "tokenizer": TOKENIZER,
        "settings": {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 1,
            "save_strategy": "no",
        },
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 1 and names["trainer"].make_rule() == tip.SoftOr(0.2)


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])
