"""Rollouts of a student, measured against its teacher as the run would measure them: a TokenTable from two models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tip_kernels.inspect.tokens import TokenTable, table_of
from tip_kernels.measure.token_stats import token_stats
from tip_kernels.opd.data import text_of
from tip_kernels.opd.train import Loop, response_head

TOP_K = 5
WHOLE: dict[float | None, bool] = {0.0: False, 1.0: True}  # scores that say right or wrong; others are in between


@torch.no_grad()
def observe(loop: Loop, prompts: int, group: str | None, said: Callable[[int], None]) -> TokenTable:
    """The loop's student answers its first `prompts` held-out prompts at the run's temperature; `said` hears progress.

    What is kept is what the loop's rule would keep of these rollouts, a batch of the run's size at a time.
    """
    settings, task, tokenizer = loop.settings, loop.task, loop.pair.tokenizer
    tables = []
    for first in range(0, prompts, settings.batch):
        encoded = loop.held_out[first : min(first + settings.batch, prompts)]
        rollouts = loop.complete(encoded, loop.seed(f"inspect {first}"), longest=loop.eval_max_new_tokens)
        student = response_head(loop.pair.student, rollouts)
        teacher = loop.teacher(rollouts)
        labels = torch.where(rollouts.mask, rollouts.completions, -100)
        stats = token_stats(student, teacher, labels=labels, workspace_mib=settings.workspace_mib)
        kept = loop.choice(rollouts.mask)["select"](stats, rollouts.mask)
        indices = range(first, first + len(encoded))
        scores = loop.judge(rollouts, indices) if task.judge else [None] * len(encoded)
        facts = [
            {"prompt": text_of(task.held_out[i]), "group": group, "right": WHOLE.get(score), "ended": bool(ended)}
            for i, score, ended in zip(indices, scores, rollouts.ended, strict=True)
        ]
        tables.append(
            table_of(
                stats,
                rollouts.completions,
                tokenizer,
                row_mask=rollouts.mask,
                kept=kept,
                student=student,
                teacher=teacher,
                top_k=TOP_K,
                rollouts=[{name: value for name, value in fact.items() if value is not None} for fact in facts],
                workspace_mib=settings.workspace_mib,
            )
        )
        said(first + len(encoded))
    return TokenTable.join(tables)
