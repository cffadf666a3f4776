"""What the ranks of a distillation step send each other, before it is run.

R = D P ranks: D data-parallel ones with N / D rows each, times P vocabulary-parallel ones with V / P columns each. Of r
ranks each sends, and receives

    all-gather of b bytes from every rank    (r - 1) b           in a ring of r - 1 hops
    all-reduce of b bytes                    2 (r - 1) / r b     in a tree of 2 log2 r hops, or a ring

The payloads are those that the package hands to torch.distributed: the words of a state are counted by folding one
entry. A head that DDP or FSDP2 keeps over the D ranks is theirs to send: its gradient all-reduced, or gathered and its
gradient reduce-scattered, which takes the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tip_kernels.backends.eager.online import Fold
from tip_kernels.learn.divergences import ReverseKL
from tip_kernels.select.rule import SoftOr
from tip_kernels.select.tip import TopEntropy
from tip_kernels.sources.pair import PART, tile_shape
from tip_kernels.stats import Blend


@dataclass(frozen=True)
class Collective:
    """All calls of one kind that a step makes."""

    name: str
    op: str  # "all-gather" or "all-reduce"
    ranks: int  # of its group
    calls: int
    payload: int  # bytes that a rank hands over, all calls together

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives."""
        return self.payload * (self.ranks - 1) * (1 if self.op == "all-gather" else 2 / self.ranks)

    @property
    def hops(self) -> int:
        """Messages that wait for the one before, all calls together."""
        return self.calls * (self.ranks - 1 if self.op == "all-gather" else 2 * math.ceil(math.log2(self.ranks)))


def state_words(want: frozenset[str | Blend], columns: int, kind: str) -> int:
    """fp32 numbers of a row that a rank with so many columns sends to merge the wanted statistics."""
    models = 2 if want - {"entropy_s"} else 1
    if kind != "cpu":
        return (11 if models == 2 else 3) * math.ceil(columns / PART)
    fold = Fold(1, 1, models, want, torch.device("cpu"))
    return len(fold(torch.zeros(1, 1), torch.zeros(1, 1) if models == 2 else None, 1.0))


def collectives(
    tokens: int,
    vocab: int,
    hidden_s: int,
    hidden_t: int,
    keep: float,
    *,
    data_parallel: int,
    vocab_parallel: int,
    kind: str = "cuda",
    entropy_rule: bool = False,
    weight_bytes: int = 2,
    workspace_mib: float = 256,
) -> list[Collective]:
    """The collectives of one step of `distill` with reverse KL by two sweeps, and of its backward.

    tokens         N of all ranks; the kept rows are taken to be spread evenly
    entropy_rule   TopEntropy, else SoftOr; of scope "global" over the data-parallel ranks
    weight_bytes   of an entry of the student's head, for the wrapper's collective of it
    The other arguments are those of `costs`; both models' heads are cut over the vocab_parallel ranks.
    """
    rule, loss = (TopEntropy if entropy_rule else SoftOr)(keep), ReverseKL()
    rows, columns = math.ceil(tokens / data_parallel), math.ceil(vocab / vocab_parallel)
    kept = math.ceil(max(1, int(keep * tokens + 1e-6)) / data_parallel)
    want = rule.needs if entropy_rule else rule.needs | loss.needs
    measured: list[tuple[int, frozenset[str | Blend]]] = [(rows, want)]
    if entropy_rule:
        measured.append((kept, loss.needs))

    def blocks(n_rows: int, models: int) -> int:
        width, workspace = sum((hidden_s, hidden_t)[:models]), int(workspace_mib * 2**20)
        return math.ceil(n_rows / tile_shape(n_rows, columns, width, kind, workspace, buffers=6)[0])

    found = []
    if vocab_parallel > 1:
        calls = [blocks(n, 2 if fields - {"entropy_s"} else 1) for n, fields in measured]
        states = sum(4 * n * state_words(fields, columns, kind) for n, fields in measured)
        found += [
            Collective("shards", "all-gather", vocab_parallel, 2, 2 * 8 * 8),
            Collective("states", "all-gather", vocab_parallel, sum(calls), states),
            Collective("sure entries", "all-reduce", vocab_parallel, 1, 4 * kept),
            Collective("d(hidden)", "all-reduce", vocab_parallel, 1, 4 * kept * hidden_s),
        ]
    if data_parallel > 1:
        found += [
            Collective("row counts", "all-gather", data_parallel, 1, 3 * 8),
            Collective("scores", "all-gather", data_parallel, 1, 4 * rows * (len(rule.needs) + 1)),
            Collective("normaliser", "all-reduce", data_parallel, 1, 8),
            Collective("head (DDP, FSDP2)", "all-reduce", data_parallel, 1, weight_bytes * columns * hidden_s),
        ]
    return found
