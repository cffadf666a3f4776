"""Heads of transformers models, tiny random ones made from their configs, against the models' own logits."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import tip_kernels as tip
from bench._meter import peak_transient_mib
from tests._cases import SMALL_MAMBA
from tip_kernels.hooks.transformers import distill_batch, head_of

transformers = pytest.importorskip("transformers")

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
MODELS = {  # settings strong enough that a loss without them is another one
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 3.7},
    "cohere2": {"logit_scale": 0.02},
    "mistral": {},
    "phi": {},
    "phi3": {},
    "falcon_h1": {"lm_head_multiplier": 4.9, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16} | SMALL_MAMBA,
    "nanochat": {"final_logit_softcapping": 1.2},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 48},
    "bloom": {"n_head": 2},
    "olmo2": {},
    "smollm3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "stablelm": {},
}
TRANSFORMED = ["gemma2", "gemma3_text", "granite", "cohere", "cohere2", "phi", "falcon_h1", "nanochat"]


def tiny(name="llama", *, seed=0, spread=0.5, **options):
    """A model of random weights whose logits are a few units apart."""
    config = transformers.AutoConfig.for_model(name.split()[0], **(SIZES | MODELS.get(name, {}) | options))
    config._experts_implementation = "eager"  # the others have no float64
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, spread)
        for layer in [model.get_output_embeddings()]:
            if layer.bias is not None:
                layer.bias.normal_(0, 2.0)
    return model.eval()


def batch_of(rows=3, length=9, seed=1):
    """A right-padded batch."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.ones(rows, length, dtype=torch.int64)
    attention[1, -3:] = 0
    tokens = torch.randint(3, V, (rows, length), generator=generator)
    return {"input_ids": tokens.masked_fill(attention == 0, 0), "attention_mask": attention}


def logits_of(head):
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z[..., : head.vocab_size]


def jeffreys(logits_s, logits_t):
    log_s, log_t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    return ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(-1).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: None if w.grad is None else w.grad.double().clone() for n, w in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_through_head_of_are_those_of_the_models_own_logits(name):
    model, inputs = tiny(name), batch_of()
    teacher = 3 * torch.randn(3, 9, V, generator=torch.Generator().manual_seed(5))
    exact = copy.deepcopy(model).double()
    truth = jeffreys(exact(**inputs).logits, teacher.double())
    truths = gradients(exact, truth)
    dense = jeffreys(model(**inputs).logits, teacher)
    denses = gradients(model, dense)
    ours = tip.distill(head_of(model, **inputs), teacher, select=tip.KeepAll(), divergence=tip.Jeffreys()).loss
    got = gradients(model, ours)
    assert truth > 0.5
    assert abs(ours.item() - truth) <= max(3 * abs(dense.item() - truth), 3e-6 * truth)
    largest = max(g.norm() for g in truths.values() if g is not None)
    for weight, g in truths.items():
        assert (g is None) == (got[weight] is None), weight
        if g is not None:
            error, dense_error = ((x[weight] - g).norm() for x in (got, denses))
            assert error <= 3 * dense_error + 2e-6 * g.norm() + 1e-7 * largest, weight


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_head_without_its_scale_softcap_or_bias_would_be_another_loss(name):
    model, inputs = tiny(name), batch_of()
    teacher = 3 * torch.randn(3, 9, V, generator=torch.Generator().manual_seed(5))
    head = head_of(model, **inputs)
    own = jeffreys(model(**inputs).logits, teacher).item()
    assert jeffreys(logits_of(head), teacher).item() == pytest.approx(own, rel=1e-5)
    without = dataclasses.replace(head, scale=1.0, softcap=None, bias=None)
    assert abs(jeffreys(logits_of(without), teacher).item() / own - 1) > 0.1


def test_scale_and_softcap_are_the_configs_numbers():
    assert (head_of(tiny("gemma2"), **batch_of()).scale, head_of(tiny("gemma2"), **batch_of()).softcap) == (1.0, 2.5)
    assert head_of(tiny("cohere"), **batch_of()).scale == 3.7
    assert head_of(tiny("granite"), **batch_of()).scale == pytest.approx(1 / 0.3, rel=1e-11)
    model = tiny("cohere")
    head_of(model, **batch_of())
    model.logit_scale = 0.5
    assert head_of(model, **batch_of()).scale == 0.5  # read off every call, never remembered


class Llama(transformers.LlamaForCausalLM):
    """A model whose forward does something of its own to its logits."""

    def after(self, logits):
        return logits

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.after(out.logits)
        return out


def changed(after=None, **parts):
    config = transformers.LlamaConfig(**SIZES)
    kind = type("Llama", (Llama,), {"after": after} if after else {})
    model = kind(config)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, V), nn.Linear(32, V)

    def forward(self, x):
        return self.a(x) + self.b(x)


def quantised():
    layer = nn.Linear(32, V)
    layer.weight = nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED = {
    "a token that is masked": (lambda: changed(lambda m, z: z.index_fill(-1, torch.tensor([7]), -1e9)), "for token 7"),
    "a token's own bias": (lambda: changed(lambda m, z: z + 0.01 * (torch.arange(z.shape[-1]) == 40)), "for token 40"),
    "log-probabilities": (lambda: changed(lambda m, z: z.log_softmax(-1)), "something else"),
    "a scale below 0": (lambda: changed(lambda m, z: -z), "something else"),
    "a clamp": (lambda: changed(lambda m, z: z.clamp(-5, 5)), "something else"),
    "a learnable scale": (
        lambda: changed(lambda m, z: z * m.own, own=nn.Parameter(torch.ones(()))),
        "a learnable scale",
    ),
    "an unknown product": (lambda: changed(lambda m, z: z @ torch.eye(V + 1)), "something else to them: mat1"),
    "two layers": (lambda: changed(lm_head=Twice()), "one linear output layer once, got Llama with Linear, Linear"),
    "another kind of layer": (lambda: changed(lm_head=Scaled(32, V)), "a plain nn.Linear .*got Scaled"),
    "an 8-bit layer": (
        lambda: changed(lm_head=quantised()),
        "a plain nn.Linear .*got Linear with Parameter of torch.int8",
    ),
    "no output layer": (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), "get_output_embeddings"),
}


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_head_cannot_describe_is_refused_with_the_reason(make, reason):
    model = make()
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        head_of(model, **batch_of())
    if model.get_output_embeddings() is not None:
        assert "forward" not in vars(model.get_output_embeddings())


def test_other_transforms_of_the_formula_are_taken_without_being_named():
    model = changed(lambda m, z: 4 * torch.tanh((0.7 * z).float() / 4))
    head = head_of(model, **batch_of())
    assert head.scale == pytest.approx(0.7, rel=1e-6) and head.softcap == pytest.approx(4, rel=1e-6)
    torch.testing.assert_close(logits_of(head), model(**batch_of()).logits)


def test_what_is_no_model_or_no_input_is_named():
    with pytest.raises(ValueError, match=r"model: expected .*got NoneType"):
        head_of(None)
    with pytest.raises(ValueError, match="labels: expected none"):
        head_of(tiny(), **batch_of(), labels=batch_of()["input_ids"])
    with pytest.raises(ValueError, match="logits_to_keep: expected an int of at least 0"):
        head_of(tiny(), **batch_of(), logits_to_keep=-1)


def test_a_failure_of_the_backbone_is_its_own_and_leaves_the_model_as_it_was():
    model = tiny()
    own = model(**batch_of()).logits
    with pytest.raises(IndexError):
        head_of(model, input_ids=torch.full((1, 2), V + 5))
    assert "forward" not in vars(model.lm_head) and torch.equal(model(**batch_of()).logits, own)


@pytest.mark.parametrize("keep", [0, 3, torch.tensor([1, 4])], ids=["all", "last", "listed"])
def test_positions_are_kept_as_transformers_keeps_them(keep):
    model, inputs = tiny(), batch_of()
    own = model(**inputs, logits_to_keep=keep).logits
    torch.testing.assert_close(logits_of(head_of(model, **inputs, logits_to_keep=keep)), own)
    torch.testing.assert_close(
        logits_of(head_of(model, **inputs, logits_to_keep=slice(2, -1))), model(**inputs).logits[:, 2:-1]
    )


def test_no_logits_are_made():
    model = tiny("gemma2", vocab_size=151_936)
    inputs = {"input_ids": torch.randint(3, V, (4, 64))}
    logits_mib = 4 * 64 * 151_936 * 4 / 2**20
    with torch.no_grad():
        assert peak_transient_mib(lambda: model(**inputs))[0] > logits_mib
        assert peak_transient_mib(lambda: head_of(model, **inputs))[0] < 0.15 * logits_mib


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_is_drawn_as_in_the_models_own_forward(mode):
    model = getattr(tiny("gpt2", resid_pdrop=0.5), mode)()
    torch.manual_seed(3)
    own = model(**batch_of()).logits
    torch.manual_seed(3)
    torch.testing.assert_close(logits_of(head_of(model, **batch_of())), own)
    assert torch.equal(logits_of(head_of(model, **batch_of())), own) == (mode == "eval")
    assert model.training == (mode == "train")


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient():
    model, teacher = tiny().train(), torch.randn(3, 9, V)
    plain = gradients(model, tip.distill(head_of(model, **batch_of()), teacher).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, tip.distill(head_of(model, **batch_of()), teacher).loss)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_under_autocast_logits_are_the_models_within_bfloat16():
    model = tiny("phi")
    own = model(**batch_of()).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs, head = model(**batch_of()).logits, head_of(model, **batch_of())
        ours = tip.token_stats(head, own).kl_rev
        dense = tip.token_stats(theirs, own).kl_rev
        loss = tip.distill(head, own, select=tip.KeepAll()).loss
    assert 0 < ours.max() < 2 * dense.max() < 0.1
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


def test_autocast_inside_the_forward_as_accelerate_puts_it_there_is_used():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one of another test in this process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(tiny("llama"))
    own = model(**batch_of()).logits
    head = head_of(model, **batch_of())
    exact = tiny("llama")(**batch_of()).logits
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    gap = (logits_of(head) - exact).abs().max()
    assert 0 < gap < 2 * (own - exact).abs().max() and head.hidden.dtype == torch.float32


def test_half_precision_models_give_heads_of_their_dtype():
    model = tiny("granite").to(torch.bfloat16)
    head = head_of(model, **batch_of())
    assert head.hidden.dtype == head.weight.dtype == torch.bfloat16 and head.scale == pytest.approx(1 / 0.3)


class Wrapper(nn.Module):
    """What DataParallel and the like look like."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrappers_are_called_and_looked_through():
    model = tiny("cohere")
    head = head_of(Wrapper(Wrapper(model)), **batch_of())
    assert head.weight is model.lm_head.weight and head.scale == 3.7
    assert head_of(nn.DataParallel(model), **batch_of()).weight is model.lm_head.weight


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_reduces_the_gradients_of_a_head(unused, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, teacher = tiny("llama tied").train(), torch.randn(3, 9, V)
        plain = gradients(model, tip.distill(head_of(model, **batch_of()), teacher).loss)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        reduced = []

        def noted(state, bucket):
            reduced.append(bucket.buffer().numel())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, noted)
        for _ in range(2):
            again = gradients(model, tip.distill(head_of(wrapped, **batch_of()), teacher).loss)
        assert sum(reduced) == 2 * sum(w.numel() for w in model.parameters())
        assert all(torch.allclose(plain[name], again[name]) for name in plain)
        tokens = batch_of() | {"labels": batch_of()["input_ids"]}
        with pytest.raises(ValueError, match="backward: expected False with DDP"):
            distill_batch(wrapped, model, tokens, execution=tip.Execution(backward=True))
        static = nn.parallel.DistributedDataParallel(model, static_graph=True)
        with pytest.raises(ValueError, match="static_graph"):
            head_of(static, **batch_of())
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_compiled_as_a_whole_is_refused_and_a_compiled_backbone_is_not():
    model = tiny()
    with pytest.raises(ValueError, match="not compiled as a whole"):
        head_of(torch.compile(model, backend="eager"), **batch_of())
    own = model(**batch_of()).logits
    model.model.compile(backend="eager")
    torch.testing.assert_close(logits_of(head_of(model, **batch_of())), own)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="not compiled as a whole"):
        head_of(model, **batch_of())


pefts_own = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, **({"target_modules": ["q_proj", "v_proj"]} | options))
    return peft.get_peft_model(model, config)


@pefts_own
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapters", "and a head of their own"])
def test_adapters_learn_through_a_head_as_through_logits(saved):
    torch.manual_seed(0)
    model, inputs = lora(tiny("granite"), modules_to_save=saved), batch_of()
    teacher = 3 * torch.randn(3, 9, V)
    dense = gradients(model, jeffreys(model(**inputs).logits, teacher))
    ours = tip.distill(head_of(model, **inputs), teacher, select=tip.KeepAll(), divergence=tip.Jeffreys()).loss
    got = gradients(model, ours)
    learnt = {name for name, g in got.items() if g is not None}
    assert learnt == {name for name, g in dense.items() if g is not None}
    assert all("lora" in name or "modules_to_save" in name for name in learnt) and len(learnt) >= 8
    assert any("lm_head" in name for name in learnt) == bool(saved)
    for name in learnt:
        torch.testing.assert_close(got[name], dense[name], rtol=1e-4, atol=1e-6)


@pefts_own
def test_adapters_on_the_output_layer_are_refused_unless_they_are_off():
    model = lora(tiny("llama"), target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        ValueError, match="one linear output layer once, got LlamaForCausalLM with Linear, Linear, Linear"
    ):
        head_of(model, **batch_of())
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(head_of(model, **batch_of())), model(**batch_of()).logits)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(head_of(model, **batch_of())), model(**batch_of()).logits)


WRAPPED = {  # adapters whose head is one product, that of a weight which is there only while the layer runs
    "a parameter of the head": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    "rows of single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7, 40]}},
}


@pefts_own
@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
@pytest.mark.parametrize("options", WRAPPED.values(), ids=WRAPPED)
def test_a_head_is_read_where_its_forward_reads_it(options):
    """The weight that the layer has outside of its forward is another one."""
    torch.manual_seed(0)
    model, inputs = lora(tiny("granite"), **options), batch_of()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name or "token_adapter" in name:
                weight.normal_(0, 0.4)
    teacher = 3 * torch.randn(3, 9, V)
    truth = jeffreys(model(**inputs).logits, teacher)
    dense = gradients(model, truth)
    ours = tip.distill(head_of(model, **inputs), teacher, select=tip.KeepAll(), divergence=tip.Jeffreys()).loss
    got = gradients(model, ours)
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    learnt = {name for name, g in dense.items() if g is not None and g.any()}
    assert any("lm_head" in name for name in learnt)
    for name in learnt:
        assert (got[name] - dense[name]).norm() <= 1e-5 * dense[name].norm(), name


@pefts_own
def test_refusals_of_adapters_say_so():
    with pytest.raises(ValueError, match=r"student: .*LlamaForCausalLM with Linear, Linear, Linear: an adapter on it"):
        student = lora(tiny("llama"), target_modules=["lm_head"])
        distill_batch(student, tiny(), batch_of() | {"labels": batch_of()["input_ids"]})
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"teacher: .*an adapter of virtual tokens"):
        distill_batch(tiny(), prompted, batch_of() | {"labels": batch_of()["input_ids"]})


def test_what_wraps_an_output_layer_is_run():
    """A forward put in its place, as hooks put one there, is part of the model."""
    model = tiny("gemma2")
    run = model.lm_head.forward
    model.lm_head.forward = lambda x: run(x / 2)
    torch.testing.assert_close(logits_of(head_of(model, **batch_of())), model(**batch_of()).logits)
    assert vars(model.lm_head)["forward"] is not run
    model.lm_head.compile(backend="eager")
    with pytest.raises(ValueError, match="an output layer that is not compiled"):
        head_of(model, **batch_of())


def test_a_quantised_products_own_function_is_refused():
    """4-bit layers multiply inside an autograd Function, whose gradient is their own."""

    class Quantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx, upstream):
            raise NotImplementedError

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = nn.Parameter(torch.randn(V, 32))

        def forward(self, x):
            return Quantised.apply(x, self.packed)

    with pytest.raises(ValueError, match="not quantised, got Layer"):
        head_of(changed(lm_head=Layer()), **batch_of())


def test_an_offloaded_head_is_taken_through_its_hook_unless_it_is_to_learn(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    teacher, student = tiny("cohere", seed=3), tiny("llama")
    batch = batch_of() | {"labels": batch_of()["input_ids"]}
    truth = distill_batch(student, teacher, batch).loss
    accelerate.cpu_offload(teacher, execution_device="cpu")
    assert teacher.lm_head.weight.is_meta
    assert torch.equal(distill_batch(student, teacher, batch).loss, truth)
    accelerate.disk_offload(student, str(tmp_path), execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(distill_batch(student, teacher, batch).loss, truth)
    with pytest.raises(
        ValueError, match=r"student: expected an output layer whose weight stays, got Llama.* offloads it"
    ):
        distill_batch(student, teacher, batch)
    split = accelerate.dispatch_model(
        tiny("cohere", seed=3), {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path / "b")
    )
    assert torch.equal(distill_batch(tiny("llama"), split, batch).loss, truth)


# distill_batch


def pair_and_batch():
    student, teacher = tiny("qwen3", seed=1), tiny("gemma2", seed=2)
    batch = batch_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :3] = -100
    return student, teacher, batch


def own_loss(student, teacher, batch):
    """Reverse KL over the labelled tokens, from whole logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_s = student(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_t = teacher(**inputs).logits[:, :-1].log_softmax(-1)
    rows = (log_s.exp() * (log_s - log_t)).sum(-1)
    return rows[batch["labels"][:, 1:] != -100]


def test_distill_batch_is_the_mean_over_labelled_tokens():
    student, teacher, batch = pair_and_batch()
    truth = own_loss(student, teacher, batch)
    dense = gradients(student, truth.mean())
    out = distill_batch(student, teacher, batch, select=tip.KeepAll())
    got = gradients(student, out.loss)
    assert out.loss.item() == pytest.approx(truth.mean().item(), rel=1e-5)
    assert out.plan.kept_rows == truth.numel() == 6 + 3 + 6
    for name, g in dense.items():
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_labels_and_a_completion_mask_mean_the_same_tokens_and_both_must_allow_one():
    student, teacher, batch = pair_and_batch()
    with_labels = distill_batch(student, teacher, batch)
    labels = batch.pop("labels")
    batch["completion_mask"] = (labels != -100).long()
    with_mask = distill_batch(student, teacher, batch)
    assert torch.equal(with_labels.loss, with_mask.loss) and torch.equal(with_labels.kept.mask, with_mask.kept.mask)
    batch["labels"] = labels.clone()
    batch["labels"][:, -2:] = -100
    batch["completion_mask"][:, 3] = 0
    both = distill_batch(student, teacher, batch, select=tip.KeepAll()).kept.mask.view(3, 8)
    assert torch.equal(both, ((batch["labels"] != -100) & batch["completion_mask"].bool())[:, 1:])
    assert both.sum(1).tolist() == [3, 2, 3]  # each forbids tokens that the other allows
    del batch["labels"], batch["completion_mask"]
    with pytest.raises(ValueError, match="batch: expected labels or completion_mask"):
        distill_batch(student, teacher, batch)


def test_left_padding_gives_the_same_rows_the_same_losses():
    student, teacher, batch = pair_and_batch()
    widths = batch["attention_mask"].sum(1)
    rolled = {n: torch.stack([x.roll(int(9 - w)) for x, w in zip(v, widths, strict=True)]) for n, v in batch.items()}
    rolled["position_ids"] = (rolled["attention_mask"].cumsum(1) - 1).clamp_min(0)
    right = distill_batch(student, teacher, batch, select=tip.KeepAll())
    left = distill_batch(student, teacher, rolled, select=tip.KeepAll())
    torch.testing.assert_close(left.loss, right.loss)
    every = {
        "input_ids": rolled["input_ids"],
        "attention_mask": rolled["attention_mask"],
        "labels": rolled["input_ids"],
    }
    kept = distill_batch(student, teacher, every, select=tip.KeepAll()).kept.mask.view(3, 8)
    assert kept.sum(1).tolist() == [8, 5, 8]  # the first token is predicted from padding: no row


def test_labels_are_given_where_the_loss_reads_them():
    student, teacher, batch = pair_and_batch()
    out = distill_batch(student, teacher, batch, select=tip.KeepAll(), ce_weight=1.0)
    assert out.loss.item() == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    sampled = distill_batch(student, teacher, batch, select=tip.KeepAll(), divergence=tip.SampledReverseKL())
    assert sampled.loss.isfinite() and hasattr(sampled.stats, "logp_s")
    assert not hasattr(distill_batch(student, teacher, batch).stats, "logp_s")


@pytest.mark.parametrize("at_once", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(at_once):
    student, teacher, batch = pair_and_batch()
    whole = gradients(student, distill_batch(student, teacher, batch, select=tip.KeepAll()).loss)
    items = (batch["labels"] != -100).sum()
    student.zero_grad()
    for rows in (slice(0, 1), slice(1, 3)):
        micro = {name: value[rows] for name, value in batch.items()}
        options = {"select": tip.KeepAll(), "num_items_in_batch": items, "execution": tip.Execution(backward=at_once)}
        loss = distill_batch(student, teacher, micro, **options).loss
        assert loss.requires_grad != at_once
        if not at_once:
            loss.backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad.double(), whole[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="normalizer: expected 'kept' beside num_items_in_batch"):
        distill_batch(student, teacher, batch, num_items_in_batch=items, normalizer="all")


def test_a_teacher_may_be_what_a_serving_engine_returned():
    student, teacher, batch = pair_and_batch()
    with torch.no_grad():
        logp = teacher(**{n: v for n, v in batch.items() if n != "labels"}).logits[:, :-1].log_softmax(-1)
    listed = logp.topk(V)
    out = distill_batch(student, tip.TopK(listed.indices, listed.values), batch, select=tip.KeepAll())
    assert out.loss.item() == pytest.approx(own_loss(student, teacher, batch).mean().item(), rel=1e-4)


def test_a_top_k_teacher_of_every_position_loses_its_last_row():
    student, batch = tiny(seed=1), batch_of()
    logp = torch.randn(*batch["input_ids"].shape, V).log_softmax(-1).topk(5)
    whole, cut = (tip.TopK(logp.indices[:, part], logp.values[:, part]) for part in (slice(None), slice(None, -1)))
    batch |= {"labels": batch["input_ids"]}
    losses = [distill_batch(student, teacher, batch, select=tip.KeepAll()).loss for teacher in (whole, cut)]
    assert losses[0] == losses[1]


def test_a_row_mask_narrows_what_the_batch_says_and_adakd_passes():
    student, teacher, batch = tiny(seed=1), tiny(seed=2), batch_of()
    batch |= {"labels": batch["input_ids"].masked_fill(torch.arange(9) < 3, -100)}
    narrower = torch.arange(8).expand(3, 8) % 2 == 0
    out = distill_batch(student, teacher, batch, select=tip.KeepAll(), row_mask=narrower)
    every = distill_batch(student, teacher, batch, select=tip.KeepAll()).kept.mask.view(3, 8)
    assert torch.equal(out.kept.mask.view(3, 8), every & narrower)
    mask = batch["labels"][:, 1:] != -100
    adakd = distill_batch(student, teacher, batch, **tip.adakd(0.5, row_mask=mask))
    assert 0 < int(adakd.plan.kept_rows) <= int(mask.sum()) // 2
    for wrong in (narrower[:, :-1], narrower.long(), True):
        with pytest.raises(ValueError, match="row_mask: expected a bool tensor"):
            distill_batch(student, teacher, batch, row_mask=wrong)


def test_a_batch_without_a_learned_token_gives_a_zero_that_is_in_the_graph():
    student, teacher, batch = pair_and_batch()
    batch["labels"].fill_(-100)
    loss = distill_batch(student, teacher, batch).loss
    assert loss.item() == 0
    assert all(g is None or not g.any() for g in gradients(student, loss).values())


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_own_loss_is_added_by_the_models_coefficient(name, at_once):
    student, teacher, batch = pair_and_batch()
    student = tiny(name, output_router_logits=True, router_aux_loss_coef=0.3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    exact = copy.deepcopy(student).double()
    router = 0.3 * exact(**inputs).aux_loss
    truth = own_loss(exact, teacher.double(), batch).mean() + router
    truths = gradients(exact, truth)
    student.zero_grad()
    out = distill_batch(
        student, teacher.float(), batch, select=tip.KeepAll(), execution=tip.Execution(backward=at_once)
    )
    if not at_once:
        out.loss.backward()
    assert router > 0.2 and out.router_loss.item() == pytest.approx(router.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for weight, g in truths.items():
        if g is not None:
            got = dict(student.named_parameters())[weight].grad.double()
            assert (got - g).norm() <= 1e-4 * g.norm() + 1e-6, weight
    micro = distill_batch(student, teacher, batch, select=tip.KeepAll(), num_items_in_batch=2 * 15)
    assert micro.loss.item() == pytest.approx(truth.item() / 2, rel=1e-5)
    assert distill_batch(tiny(name), teacher, batch).router_loss is None
    with pytest.warns(RuntimeWarning, match="aux_loss"):
        head_of(student, **inputs)
    with torch.no_grad():
        head_of(student, **inputs)


def test_entries_of_a_batch_that_are_no_tensors_are_named():
    student, teacher, batch = pair_and_batch()
    for name in ("labels", "input_ids", "attention_mask"):
        with pytest.raises(ValueError, match=rf"{name}: expected a tensor \(B, T\), .*got list"):
            distill_batch(student, teacher, batch | {name: batch[name].tolist()})
    with pytest.raises(ValueError, match="completion_mask: expected a tensor"):
        distill_batch(student, teacher, batch | {"completion_mask": batch["labels"].tolist()})


def test_images_that_a_text_model_leaves_unread_are_warned_of():
    student, teacher, batch = pair_and_batch()
    with pytest.warns(RuntimeWarning, match="no input 'pixel_values', which it leaves unread") as said:
        distill_batch(student, teacher, batch | {"pixel_values": torch.zeros(3, 3, 8, 8)})
    assert {str(w.message).split()[1] for w in said} == {"Qwen3ForCausalLM", "Gemma2ForCausalLM"}


# Qwen2.5 pads its vocabulary to 151,936 rows in small models and to 152,064 in large ones


def test_vocabularies_of_qwen2_5_are_sliced_to_the_shared_one_or_refused():
    small, large = (
        tiny("qwen2", vocab_size=v, hidden_size=8, head_dim=4, num_hidden_layers=1) for v in (151_936, 152_064)
    )
    tokens = torch.randint(0, 151_643, (1, 5))
    batch = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(ValueError, match=r"vocabulary of 151936 entries, got 152064; .*vocab_size=151936"):
        distill_batch(small, large, batch)
    with pytest.raises(ValueError, match=r"got 151936; .*vocab_size=151936"):
        tip.distill(head_of(large, input_ids=tokens), head_of(small, input_ids=tokens))
    out = distill_batch(small, large, batch, vocab_size=151_936, select=tip.KeepAll())
    log_s, log_t = (m(input_ids=tokens).logits[:, :-1, :151_936].log_softmax(-1) for m in (small, large))
    truth = (log_s.exp() * (log_s - log_t)).sum(-1).mean()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-4) and truth > 0.05
    out.loss.backward()
    back = distill_batch(large, small, batch, vocab_size=151_936, select=tip.KeepAll())
    back.loss.backward()
    assert large.lm_head.weight.grad.shape[0] == 152_064 and not large.lm_head.weight.grad[151_936:].any()
    with pytest.raises(ValueError, match=r"vocab_size: expected an int from 1 to weight's 151936 rows, got int 152064"):
        distill_batch(small, large, batch, vocab_size=152_064)
