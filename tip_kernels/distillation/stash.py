"""One sweep with a quota over many blocks: rows are learned from before the rule has seen all.

    stash   d(logits) of rows that the quota will probably keep, (C, V) fp32, C = SLACK times the quota

After each block the rule ranks the rows seen so far, and d(logits) of those above a looser quota is stashed. When all
are measured the rule decides exactly, the few kept rows that were not stashed are projected again, and one pair of
products takes the stash in. A rule that reads the student alone stashes its logits instead, and the teacher is
projected for kept rows only.

N rows, S kept rows, r rows of the block in memory, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tip_kernels._checks import is_int
from tip_kernels.backends.choice import backend_for
from tip_kernels.distillation.one_sweep import RowBlocks, without_graph
from tip_kernels.distillation.precomputed import PrecomputedGradients
from tip_kernels.distillation.strategy import Learned, Step
from tip_kernels.select.rule import Kept, QuotaRule, spans_ranks
from tip_kernels.workspace import SLACK, Layout, parts_of, stash_slots


class StashedRows:
    """One sweep over all rows, with a stash for the choice of a quota rule."""

    name = "one sweep"

    def fits(self, step: Step) -> bool:
        adaptive = step.temperature_of is not None
        return step.sweeps != 2 and not adaptive and not step.knows_rows and self._layout(step) is not None

    def run(self, step: Step) -> Learned:
        blocks = StashingBlocks(step, step.objective, self._layout(step))
        kept = blocks.stash_likely_rows()
        made = blocks.finish_from_stash(kept)
        ids = kept.row_ids
        real = torch.ones_like(ids, dtype=torch.bool)
        return Learned(blocks.stats(partial=not step.with_teacher), kept, ids, real, blocks.losses[ids], made)

    @staticmethod
    def _layout(step: Step) -> Layout | None:
        """The layout for measuring all rows with a stash for the rule's choice, or None where that is not to be had.

        Ranking by block reads counts on the host, which is free on a CPU alone; a random rule would draw more than
        once, and ranks would have to choose together as often as the one with most rows.
        """
        batch, rule, device = step.batch, step.select, step.batch.pair.device
        if device.type != "cpu" or backend_for(device) != "eager" or not isinstance(rule, QuotaRule) or not rule.needs:
            return None
        if hasattr(rule, "generator") or spans_ranks(rule):
            return None
        n_rows = batch.n_rows if batch.trainable is None else batch.trainable.numel()
        return step.layout(n_rows, stash_slots(n_rows, rule.capacity(batch.n_rows, batch.n_rollouts)))


class StashingBlocks(RowBlocks):
    """Row blocks whose likely rows are kept in a stash: d(logits), or the student's logits without a teacher."""

    @without_graph
    def stash_likely_rows(self) -> Kept:
        """Measures every row and stashes those that a looser quota keeps among the rows seen so far."""
        step, batch, temperature = self.step, self.batch, self.objective.temperature
        with_teacher, likely_rule = step.with_teacher, loosened(step.select)
        want = step.want | (step.late - step.objective.divergence.needs)
        self.stash = Stash(self.layout.slots, self.pair.vocab, batch.n_rows)
        candidates = torch.arange(batch.n_rows) if batch.trainable is None else batch.trainable
        for part in parts_of(candidates.numel(), self.layout.rows) or [slice(0, 0)]:
            rows = candidates[part]
            z_s, z_t = self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            record = [z_s, z_t] if with_teacher else [z_s]
            self.note(batch.measure(rows, want, temperature, with_teacher, record, self.layout.tiles), rows)
            likely = likely_rule(self.stats(), batch.row_mask, batch.rollout_ids).mask
            self.stash.release(likely)
            local = likely[rows].nonzero().squeeze(1)
            slots = self.stash.take(rows[local])
            local = local[: slots.numel()]
            if with_teacher:
                self.dlogits(rows, local, z_s, z_t, out=self.stash.rows, places=slots)
            else:
                self.stash.rows.index_copy_(0, slots, z_s[local])
        return step.choose(self.stats())

    @without_graph
    def finish_from_stash(self, kept: Kept) -> PrecomputedGradients:
        """Completes the stash with the kept rows that it missed, and takes it into the gradients."""
        stash, ids, step = self.stash, kept.row_ids, self.step
        stash.release(kept.mask)
        missed = stash.compact(ids)
        for part in parts_of(missed.numel(), self.layout.rows):
            rows = missed[part]
            slots, z_s, z_t = stash.take(rows), self.z_s[: rows.numel()], self.z_t[: rows.numel()]
            self.project(self.student, rows, z_s)
            if step.with_teacher:
                self.project(self.teacher, rows, z_t)
                self.dlogits(rows, torch.arange(rows.numel()), z_s, z_t, out=stash.rows, places=slots)
            else:
                stash.rows.index_copy_(0, slots, z_s)
        held = stash.owner[: ids.numel()]
        if not step.with_teacher:
            self._learn_from_logits(held)
        weights = step.weights(ids, torch.ones_like(ids, dtype=torch.bool), kept)
        weights = weights * self.losses[ids].isfinite()
        total = self.batch.normalizer(step.normalizer, weights)
        share = torch.zeros(self.batch.n_rows).index_copy_(0, ids, weights / total * step.grad_scale)[held]
        gradients = self.gradients(held, 1, step.options.weight_into)
        dlogits = stash.rows[: ids.numel()].mul_(share.unsqueeze(1))
        self.add_to(gradients, slice(0, ids.numel()), dlogits, share, (share == 0).unsqueeze(1))
        self.batch.count(ids, sum(self.need[:2]))
        return self.precomputed(ids, gradients, total)

    def _learn_from_logits(self, held: Tensor) -> None:
        """Puts d(logits) in the place of the student's logits that the stash holds of the rows held (S,)."""
        for part in parts_of(held.numel(), self.layout.rows):
            rows, z_s = held[part], self.stash.rows[part]
            z_t = self.z_t[: rows.numel()]
            self.measure_late(rows, z_s, z_t, self.step.late)
            self.dlogits(rows, torch.arange(rows.numel()), z_s, z_t, out=z_s, places=None)


def loosened(rule: QuotaRule) -> QuotaRule:
    """The same rule with a quota SLACK times as large."""
    return replace(rule, keep=math.ceil(SLACK * rule.keep) if is_int(rule.keep) else min(1.0, SLACK * rule.keep))


class Stash:
    """C rows of V numbers, and which row of the batch each holds. Lives on a CPU, where asking for a count is free."""

    def __init__(self, slots: int, vocab: int, n_rows: int) -> None:
        self.rows = torch.empty(slots, vocab)
        self.owner = torch.full((slots,), -1)  # the row that a slot holds
        self.slot = torch.full((n_rows,), -1)  # the slot of a row

    def release(self, others: Tensor) -> None:
        """Frees the slots of all rows but those of the mask others (N,)."""
        gone = (self.owner >= 0) & ~others[self.owner]
        self.slot[self.owner[gone]] = -1
        self.owner[gone] = -1

    def take(self, ids: Tensor) -> Tensor:
        """Free slots for as many of the rows ids as there is room for, (<= r,)."""
        free = (self.owner < 0).nonzero().squeeze(1)[: ids.numel()]
        ids = ids[: free.numel()]
        self.owner[free], self.slot[ids] = ids, free
        return free

    def compact(self, ids: Tensor) -> Tensor:
        """Moves the rows ids, so far as they are held, into the first slots; returns those that are not held."""
        held = self.slot[ids] >= 0
        outside = ids[held & (self.slot[ids] >= ids.numel())]
        sources = self.slot[outside]
        self.owner[sources] = -1
        targets = self.take(outside)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.rows[target] = self.rows[source]
        return ids[~held]
