"""A teacher of which only K tokens of a row are known, as a serving engine returns them.

A row becomes K + 1 outcomes: its listed tokens, and one that stands for all the rest. For the student their logits are
z_1 .. z_K and the log of the sum of exp z over the rest; so a divergence on outcomes is a divergence on logits, with a
vocabulary of K + 1, and its gradient g goes to the vocabulary as

    dz_k = g_k   for a listed token           dz_v = g_rest exp(z_v) / sum over the rest of exp z   for any other

which needs the student's projection alone. N rows, R rows of a block, C columns of a tile, K listed tokens.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tip_kernels._checks import FLOATS, expect, is_int
from tip_kernels.sources.engines import sequences_of

ABSENT = -1  # the id of an entry that is none
LEAST_REST = 2.0**-24  # 1 less a sum of probabilities in fp32 knows no better
NO_REST = 2.0**-17  # a sum over fp32 log-probabilities of about -10 may be off by as much
TOO_MUCH = 1.05  # a sum of probabilities above it is no rounding of log-probabilities, even in bfloat16
TAILS = ("bucket", "ignore", "renormalize")


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher given by the log-probabilities of K tokens of each row; the teacher's own top K or the student's.

    With S the listed tokens, t = exp(logp), s the student's probabilities, and t_rest, s_rest = 1 - their sums over S:

        bucket       KL(t||s) = sum_S t log(t/s) + t_rest log(t_rest/s_rest): the rest is one token more. A lower bound
                     of the divergence over the whole vocabulary
        ignore       KL(t||s) = sum_S t log(t/s): the sum stops at S. It may be negative; nothing holds the rest down
                     but the student's normalisation (verl's forward_kl_topk)
        renormalize  the divergence of t / sum_S t and s / sum_S s, which says nothing about the rest (arXiv 2603.25562)

    and so for the other divergences; "ignore" knows ForwardKL, ReverseKL, Jeffreys, HellingerSq and their sums.

    Accepted as the teacher of token_stats, divergence_loss and distill, at temperature 1 and with no divergence that
    reads labels. kl_fwd, kl_rev, hellinger_sq and entropy_t are those of the outcomes; logp_t is known for a listed
    label only and NaN otherwise; there is no lse_t. t_rest is at least 2^-24; it is 0 where all tokens are listed, and
    where the student bans the rest and t_rest is below 2^-17, which rounding alone may leave. A row without any entry,
    or with a NaN in a listed logp, is a NaN row of the teacher; a KL is +inf where its second distribution bans (-inf)
    an outcome that its first allows. Loss and gradient take the student's projection only, in tiled torch on every
    backend; a few (N, K) tensors come beside the workspace.

    Values are checked on a CPU, where rows are used: what a masked row holds is no matter. On CUDA an id outside the
    vocabulary makes its row NaN. Does not synchronise.

    Args:
        ids: (N, K) or (B, T, K) int64; -1 marks an absent entry, whose logp is not read. No id twice in a row.
        logp: The same shape, float32, bfloat16 or float16: log-probabilities over the whole vocabulary, temperature 1.
        tail: "bucket", "ignore" or "renormalize".

    Raises:
        ValueError: Naming the argument.
    """

    ids: Tensor
    logp: Tensor
    tail: str = "bucket"

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            raise ValueError("teacher: expected logits or a Head under torch.compile, got a TopK")
        ids, logp = self.ids, self.logp
        ok = isinstance(ids, Tensor) and ids.dim() in (2, 3) and ids.dtype == torch.int64
        expect(ok, "ids", "an int64 tensor of shape (N, K) or (B, T, K)", ids)
        expect(ids.shape[-1] > 0, "ids", "at least one entry a row", ids)
        ok = isinstance(logp, Tensor) and logp.shape == ids.shape and logp.dtype in FLOATS
        expect(ok, "logp", f"a float32, bfloat16 or float16 tensor of ids' shape {tuple(ids.shape)}", logp)
        expect(logp.device == ids.device, "logp", f"a tensor on ids' device {ids.device}", logp)
        if self.tail == "renormalise":
            warnings.warn("tip_kernels.TopK: tail 'renormalise' is spelled 'renormalize'", FutureWarning, stacklevel=3)
            object.__setattr__(self, "tail", "renormalize")
        ok = isinstance(self.tail, str) and self.tail in TAILS
        expect(ok, "tail", "'bucket', 'ignore' or 'renormalize'", self.tail)

    @classmethod
    def from_prompt_logprobs(
        cls, prompt_logprobs: Any, k: int, *, tail: str = "bucket", device: torch.device | str = "cpu"
    ) -> TopK:
        """The teacher that a serving engine's `prompt_logprobs` describe, K = k, in rows of a model's logits.

        Entry i + 1 of the list, which tells of token i + 1, becomes row i, whose logits predict that token. Entry 0,
        empty in every engine, has no such row; the last row has no entries. Masking rows is left to row_mask.

        Args:
            prompt_logprobs: What vLLM or SGLang returned for a sequence of T tokens, or a list of B such: see
                engines.py.
            k: Entries a row; fewer are padded with id -1. Of more, the k most probable are kept: vLLM adds the prompt's
                own token where it is not among those asked for, which takes k + 1.
            tail: Of the TopK.
            device: Where its tensors go.

        Returns:
            A TopK of shape (T, k), or (B, longest T, k).

        Raises:
            ValueError: Naming the argument.
        """
        ok = is_int(k) and k >= 1
        expect(ok, "k", "an int of at least 1", k)
        sequences, batched = sequences_of(prompt_logprobs)
        steps = max((len(sequence) for sequence in sequences), default=0)
        ids = torch.full((len(sequences), steps, k), ABSENT, dtype=torch.int64)
        logp = torch.full((len(sequences), steps, k), -math.inf)
        for b, sequence in enumerate(sequences):
            for row, entries in enumerate(sequence[1:]):
                found = sorted(entries.items(), key=lambda entry: -entry[1])[:k]
                if found:
                    ids[b, row, : len(found)] = torch.tensor([entry[0] for entry in found])
                    logp[b, row, : len(found)] = torch.tensor([entry[1] for entry in found])
        if not batched:
            ids, logp = ids[0], logp[0]
        return cls(ids.to(device), logp.to(device), tail)


def check_request(temperature: object, *, margins: bool = False, top_k: int = 0) -> None:
    """Refuses what cannot be asked of a TopK."""
    ok = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 1
    expect(ok, "temperature", "1.0, at which the teacher's TopK gives its log-probabilities", temperature)
    expect(not margins, "margins", "False, since the teacher is a TopK and has no margin of its own", margins)
    expect(top_k == 0, "top_k", "0, since the teacher is a TopK", top_k)


class TopKRows:
    """The rows of a TopK. They have no logits: nothing is swept, and no gradient flows to them."""

    width, leaves = 0, ()

    def __init__(self, topk: TopK) -> None:
        self.batch_shape = tuple(topk.ids.shape[:-1])
        self.n_rows, self.device, self.tail = math.prod(self.batch_shape), topk.ids.device, topk.tail
        self.ids = topk.ids.reshape(-1, topk.ids.shape[-1]).clone()  # statistics keep them, the caller may change his
        self.logp = topk.logp.detach().reshape(self.ids.shape)

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> TopKRows:
        return self

    def check_values(self, vocab: int, rows: Tensor | None) -> None:
        """Whether the given rows (all unless given) list tokens of the student's, once each; on a CPU only."""
        if self.device.type != "cpu" or not self.ids.numel():
            return
        ids, logp = (self.ids, self.logp) if rows is None else (self.ids[rows], self.logp[rows])
        outside = ids[(ids < ABSENT) | (ids >= vocab)]
        if outside.numel():
            form = f"token ids below the student's vocabulary of {vocab} entries, or -1 for an absent entry"
            expect(False, "teacher", f"a TopK of {form}", int(outside[0]))
        ordered = ids.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT)
        if bool(twice.any()):
            raise ValueError(
                f"teacher: expected a TopK with no id twice in a row, got {int(ordered[:, 1:][twice][0])} twice"
            )
        total = logp.float().masked_fill(ids == ABSENT, -math.inf).exp().sum(-1)
        if bool((total > TOO_MUCH).any()):
            most = float(total.nan_to_num(0.0, posinf=math.inf).max())
            raise ValueError(
                f"teacher: expected a TopK of log-probabilities, of sum at most 1 in a row, got a sum of {most:.3g}"
            )

    def log_outcomes(self, rows: Tensor | slice, vocab: int, no_rest: Tensor) -> Tensor:
        """log t of some rows: (R, K + 1) with a bucket for the rest, else (R, K); fp32, NaN in rows without an entry.

        no_rest tells where the student leaves nothing to the rest, (R,) bool.
        """
        ids, logp = self.ids[rows], self.logp[rows].float()
        listed = ids != ABSENT
        logp = logp.masked_fill(~listed, -torch.inf)
        if self.tail == "bucket":
            # 1 - t_max is exact to a rounding of itself, so that little of a small rest is lost
            fine = logp.double()
            top, place = fine.max(1, keepdim=True)
            rest = (-top.expm1() - fine.exp().scatter(1, place, 0.0).sum(1, keepdim=True)).squeeze(1).float()
            none = (listed.sum(1) == vocab) | (no_rest & (rest <= NO_REST))
            rest = rest.clamp(min=LEAST_REST).log().masked_fill(none, -torch.inf)
            logp = torch.cat([logp, rest.unsqueeze(1)], 1)
        return logp.masked_fill(~listed.any(1, keepdim=True), torch.nan)

    def label_logp(self, rows: Tensor | slice, labels: Tensor) -> Tensor:
        """(R,) log-probability of each label, NaN where it is not listed or there is none."""
        hit = (self.ids[rows] == labels.unsqueeze(1)) & (labels >= 0).unsqueeze(1)
        logp = torch.where(hit, self.logp[rows].float(), 0.0).sum(1)
        return logp.masked_fill(~hit.any(1), torch.nan)
