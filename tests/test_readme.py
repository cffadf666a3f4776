"""The README's code runs as it stands, its before and after are the same loss, and its loops train the same student."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import tip_kernels as tip

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, flags=re.S | re.M))
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.S) for name, text in SECTIONS.items()}
MODELS = ("With transformers", "Any loop")  # sections whose code is about models; elsewhere it is about tensors
RUN_ELSEWHERE = {"With TRL", "Past one device"}  # by tests/test_hooks_trl.py and tests/_ranks.py


def tensors() -> dict[str, object]:
    torch.manual_seed(0)
    names = {"tip": tip, "mask": torch.rand(2, 20) < 0.8}
    for model, width in (("s", 8), ("t", 12)):
        names[f"hidden_{model}"] = torch.randn(2, 20, width)
        names[f"head_{model}"] = torch.randn(50, width)
    names["hidden_s"].requires_grad_()
    names["head_s"].requires_grad_()
    names["student"] = tip.Head(names["hidden_s"], names["head_s"])
    names["teacher"] = tip.Head(names["hidden_t"], names["head_t"])
    for side in ("student", "teacher"):
        names[f"{side}_logits"] = names[f"hidden_{side[0]}"].detach() @ names[f"head_{side[0]}"].detach().T
    names["response_mask"] = names["mask"].long()
    return names


def models() -> dict[str, object]:
    """Two tiny models and four batches of two rows, the same on every call."""
    transformers = pytest.importorskip("transformers")
    names = {"tip": tip}
    for seed, (name, layers) in enumerate({"student": 1, "teacher": 2}.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes)
        names[name] = transformers.LlamaForCausalLM(config).eval()
    dataset = []
    for length in (9, 7, 8, 9, 5, 9, 9, 6):
        tokens = torch.randint(0, 50, (9,))
        attention = (torch.arange(9) < length).long()
        labels = tokens.masked_fill((attention == 0) | (torch.arange(9) < 3), -100)
        dataset.append({"input_ids": tokens, "attention_mask": attention, "labels": labels})
    names["dataset"] = dataset
    names["loader"] = torch.utils.data.DataLoader(dataset, batch_size=2)
    names["batch"] = next(iter(names["loader"]))
    return names


@pytest.mark.parametrize("section", [name for name in BLOCKS if name not in (*MODELS, *RUN_ELSEWHERE)])
def test_every_python_block_about_tensors_runs(section):
    for block in BLOCKS[section]:
        names = tensors()
        exec(block, names)
        assert names["mask"].flatten()[names["ids"]].all() if "ids" in names else names["hidden_s"].grad.any()


def test_every_section_has_the_code_it_is_tested_for():
    counts = {name: len(BLOCKS[name]) for name in ("Before and after", "Measure, select, learn", "With verl", *MODELS)}
    assert list(counts.values()) == [2, 1, 1, 1, 4]


def test_after_is_before_where_every_token_is_kept():
    before, after = tensors(), tensors()
    exec(BLOCKS["Before and after"][0], before)
    exec(BLOCKS["Before and after"][1].replace("tip.SoftOr(0.2)", "tip.KeepAll()"), after)
    torch.testing.assert_close(after["out"].loss, before["loss"])
    torch.testing.assert_close(after["head_s"].grad, before["head_s"].grad, rtol=1e-4, atol=1e-6)


def test_the_block_about_transformers_gives_every_weight_a_gradient():
    names = models()
    exec(BLOCKS["With transformers"][0], names)
    assert all(weight.grad is not None and weight.grad.any() for weight in names["student"].parameters())


@pytest.mark.filterwarnings("ignore")  # what the frameworks say about a run this small
@pytest.mark.parametrize("framework", ["accelerate", "lightning"])
def test_every_loop_trains_the_student_that_the_plain_one_does(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    plain, *others = BLOCKS["Any loop"]
    (block,) = [other for other in others if f"import {framework}" in other or f"from {framework}" in other]
    names, other = models(), models()
    start = copy.deepcopy(names["student"].state_dict())
    exec(plain, names)
    exec(block, other)
    for (name, weight), again in zip(names["student"].state_dict().items(), other["student"].parameters(), strict=True):
        assert (weight - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(again.detach(), weight, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_brings_the_student_closer_to_the_teacher(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = models()
    (block,) = [block for block in BLOCKS["Any loop"] if "transformers.Trainer" in block]
    options = 'num_train_epochs=10, learning_rate=1e-2, gradient_accumulation_steps=2, report_to="none"'
    before = out_of(names)
    exec(block.replace('"runs/trainer"', f'"runs/trainer", {options}'), names)
    assert out_of(names) < 0.5 * before


def out_of(names: dict[str, object]) -> float:
    from tip_kernels.hooks.transformers import distill_batch

    with torch.no_grad():
        batches = torch.utils.data.DataLoader(names["dataset"], batch_size=8)
        return distill_batch(names["student"], names["teacher"], next(iter(batches)), select=tip.KeepAll()).loss.item()


def test_every_public_name_is_in_the_readme_or_is_what_a_call_returns():
    returned = {"Distilled", "Divergence", "Kept", "Plan", "Rule", "TokenStats"}
    missing = [name for name in tip.__all__ if name not in returned and name not in README]
    assert not missing
