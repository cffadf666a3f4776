"""README and the pages of docs/: their code runs as it stands, they are short, and what they link to exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tip_kernels as tip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES = {"README.md": README} | PAGES
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.S) for name, text in PAGES.items()}
RUN_ELSEWHERE = {"docs/guides/distributed.md"}  # by tests/_ranks.py


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [self.decode([i]) for i in ids]


def tensors() -> dict[str, object]:
    torch.manual_seed(0)
    names = {"tip": tip, "mask": torch.rand(2, 20) < 0.8, "labels": torch.randint(0, 50, (2, 20))}
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
    """Two tiny models and a batch of two rows, the same on every call."""
    transformers = pytest.importorskip("transformers")
    names = {"tip": tip, "tokenizer": Letters()}
    for seed, (name, layers) in enumerate({"student": 1, "teacher": 2}.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes)
        names[name] = transformers.LlamaForCausalLM(config).eval()
    tokens, places = torch.randint(0, 50, (2, 9)), torch.arange(9)
    attention = (places < torch.tensor([[9], [7]])).long()
    labels = tokens.masked_fill((attention == 0) | (places < 3), -100)
    return names | {"batch": {"input_ids": tokens, "attention_mask": attention, "labels": labels}}


def run_block(block: str, earlier: dict[str, object]) -> dict[str, object]:
    """A block after those above it on its page, with fresh tensors or models."""
    names = earlier | (models() if "hooks.transformers" in block else tensors())
    exec(block, names)
    return names


@pytest.mark.parametrize("page", [name for name in BLOCKS if BLOCKS[name] and name not in RUN_ELSEWHERE])
def test_every_python_block_runs_after_those_above_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.endswith("add-a-divergence.md") and not hasattr(tip.Divergence, "row_sums"):
        pytest.skip("divergences are not records yet")
    names = {"__name__": "page"}
    monkeypatch.setattr("tip_kernels.distillation.registry.RULES", dict(_rules()))
    for block in BLOCKS[page]:
        names = run_block(block, names)
        if ".backward()" in block:
            if isinstance(names["student"], torch.nn.Module):
                assert all(weight.grad is not None and weight.grad.any() for weight in names["student"].parameters())
            else:
                assert names["hidden_s"].grad.any()


def _rules():
    from tip_kernels.distillation import registry

    return registry.RULES


def test_after_is_before_where_every_token_is_kept():
    section = README.split("## Before and after")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    before, after = tensors(), tensors()
    exec(blocks[0], before)
    exec(blocks[1].replace("tip.SoftOr(0.2)", "tip.KeepAll()"), after)
    torch.testing.assert_close(after["out"].loss, before["loss"])
    torch.testing.assert_close(after["head_s"].grad, before["head_s"].grad, rtol=1e-4, atol=1e-6)


def test_a_rule_by_its_page_is_one_file_and_one_line(tmp_path, monkeypatch):
    """The page's first block in a file of its own, imported, and its second block, keep the tokens that it says."""
    file, line, *_ = BLOCKS["docs/developing/add-a-rule.md"]
    (tmp_path / "surprise.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    assert line.count("\n") == 1
    names = tensors()
    exec("from surprise import Surprise\n" + line, names)
    logp = names["student_logits"].log_softmax(-1).gather(-1, names["labels"][..., None])[..., 0]
    for row, mask, kept in zip(logp, names["mask"], names["out"].kept.mask.view(2, 20), strict=True):
        count = int(0.2 * int(mask.sum()) + 1e-6)
        least = row.masked_fill(~mask, torch.inf).argsort()[:count]
        assert kept.nonzero().flatten().tolist() == sorted(least.tolist())
    sys.modules.pop("surprise")


@pytest.mark.skipif(not hasattr(tip.Divergence, "row_sums"), reason="divergences are not records yet")
def test_the_divergence_of_its_page_has_the_gradient_of_autograd():
    (block,) = BLOCKS["docs/developing/add-a-divergence.md"]
    names = run_block(block, {"__name__": "page"})
    student = names["student_logits"].flatten(0, 1).requires_grad_()
    teacher = names["teacher_logits"].flatten(0, 1)
    losses = tip.divergence_loss(student, teacher, divergence=names["Brier"]())
    (ours,) = torch.autograd.grad(losses.sum(), student)
    wide = student.detach().double().requires_grad_()
    truth = (wide.softmax(-1) - teacher.double().softmax(-1)).square().sum(-1) / 2
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), torch.autograd.grad(truth.sum(), wide)[0], rtol=1e-4, atol=1e-6)


def test_saved_statistics_are_a_page_of_tokens(tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("safetensors")
    from tip_kernels.__main__ import main

    monkeypatch.chdir(tmp_path)
    block = next(block for block in BLOCKS["docs/guides/inspect.md"] if "save_statistics" in block)
    names = run_block(block, {})
    assert main(["inspect", "step_100.safetensors", "--quiet"]) == 0
    page = (tmp_path / "inspect.html").read_text()
    assert str(int(names["mask"].sum())) in page and "student entropy" in page


def test_the_readme_is_of_two_minutes():
    assert README.count("\n") <= 150 and len(README.split()) <= 1500


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_prose_is_over_200_characters(page):
    assert not [line for line in PAGES[page].splitlines() if len(line) > 200]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.S)
    for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#\s]+)#?([^)\s]*)\)", text):
        path = (ROOT / page).parent / target
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", head.split("{#")[0].strip().lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{target}#{anchor}"


def test_every_public_name_is_on_a_page_and_in_the_api():
    text, api = "\n".join(PAGES.values()), PAGES["docs/api.md"]
    assert not [name for name in tip.__all__ if name not in text or f"_public.{name}\n" not in api]


# mkdocstrings' last release for Python 3.10 breaks beside today's pymdown-extensions
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pages are built on Python 3.11 and later")
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("index.html")}
    assert {"index.html", "api/index.html", "findings/index.html", "developing/architecture/index.html"} <= pages
    assert "Measures all rows" in (tmp_path / "api" / "index.html").read_text()
