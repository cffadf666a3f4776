"""The README's code runs as it stands, and its before and after are the same loss."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import tip_kernels as tip

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def setting() -> dict[str, object]:
    torch.manual_seed(0)
    names = {"tip": tip, "mask": torch.rand(2, 20) < 0.8}
    for model, width in (("s", 8), ("t", 12)):
        names[f"hidden_{model}"] = torch.randn(2, 20, width)
        names[f"head_{model}"] = torch.randn(50, width)
    names["hidden_s"].requires_grad_()
    names["head_s"].requires_grad_()
    names["student"] = tip.Head(names["hidden_s"], names["head_s"])
    names["teacher"] = tip.Head(names["hidden_t"], names["head_t"])
    return names


def test_every_python_block_runs():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        names = setting()
        exec(block, names)
        assert names["hidden_s"].grad.abs().sum() > 0


def test_after_is_before_where_every_token_is_kept():
    before, after = setting(), setting()
    exec(BLOCKS[0], before)
    exec(BLOCKS[1].replace("tip.SoftOr(0.2)", "tip.KeepAll()"), after)
    torch.testing.assert_close(after["out"].loss, before["loss"])
    torch.testing.assert_close(after["head_s"].grad, before["head_s"].grad, rtol=1e-4, atol=1e-6)


def test_every_public_name_is_in_the_readme_or_is_what_a_call_returns():
    returned = {"Distilled", "Divergence", "Kept", "Plan", "Rule", "TokenStats"}
    missing = [name for name in tip.__all__ if name not in returned and name not in README]
    assert not missing
