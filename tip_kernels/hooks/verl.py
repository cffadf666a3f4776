"""verl: token selection for workers that hold whole logits, and a loss for its distillation registry.

    VERL_USE_EXTERNAL_MODULES=my_losses                   # my_losses.py calls tip_kernels.hooks.verl.register("tip")
    distillation.distillation_loss.loss_mode=tip
    distillation.distillation_loss.use_policy_gradient=False
    distillation.distillation_loss.loss_max_clamp=null    # bound rows by divergence.clipped(10.0) instead

verl calls a top-k distillation loss twice: with the student's packed logits (1, tokens, V), where a number per token is
wanted, and later with those numbers, to add up the response's. Written for verl 0.9.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tip_kernels._checks import expect, renamed
from tip_kernels.distillation.distill import Distilled, distill
from tip_kernels.distillation.options import Execution
from tip_kernels.learn.divergence_loss import divergence_loss
from tip_kernels.learn.divergences import Divergence, ReverseKL
from tip_kernels.learn.gated import Gated, check_needs, readers_of
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rule import Rule, SoftOr
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import IGNORE_LABEL, LABEL_FIELDS

Weigher = Callable[..., Tensor]  # of (stats, row_mask, rollout_ids)


@renamed(row_mask="response_mask", student="student_logits", teacher="teacher_logits")
def select_rows(
    student_logits: Tensor, teacher_logits: Tensor | TopK, response_mask: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens of a batch to learn from, without gradients.

    Synchronises, where a GPU's number of rows is read. Method: TIP (arXiv 2604.14084).

    Args:
        student_logits: (B, L, V) or (N, V), each row the logits that predict the response's token at its place.
        teacher_logits: The same shape, or a TopK of a serving engine.
        response_mask: (B, L) or (N,), bool or 0 and 1 as verl has it: trainable tokens.
        **options: Of tip_kernels.distill: select (SoftOr(0.5) unless given), divergence, rollout_ids, temperature, ...

    Returns:
        ids (S,) int64, ascending into the flattened b * L + l order, and info: () fp32 means over response tokens,
        ready to be logged. tip/kept_frac is their share; tip/entropy, tip/kl_fwd, tip/kl_rev in nats; tip/q1_frac to
        tip/q4_frac the shares of the quadrants; tip/divergence_kept the mean divergence of kept tokens.

    Raises:
        ValueError: Naming the argument.
    """
    expect(isinstance(response_mask, Tensor), "response_mask", "a tensor (B, L) or (N,)", response_mask)
    mask = response_mask.bool()
    with torch.no_grad():
        out = distill(
            student_logits, teacher_logits, row_mask=mask.cpu(), execution=Execution(full_stats=True), **options
        )
    return out.kept.row_ids, _info(out, mask.flatten())


def _info(out: Distilled, mask: Tensor) -> dict[str, Tensor]:
    stats, count = out.stats, mask.sum().clamp_min(1)
    part = quadrants(stats, row_mask=mask)
    info = {"tip/kept_frac": out.kept.mask.sum() / count, "tip/divergence_kept": out.loss.detach()}
    for name, value in {"entropy": stats.entropy_s, "kl_fwd": stats.kl_fwd, "kl_rev": stats.kl_rev}.items():
        info[f"tip/{name}"] = torch.where(mask, value, 0.0).sum() / count
    return info | {f"tip/q{i}_frac": (part == i).sum() / count for i in (1, 2, 3, 4)}


@dataclass(frozen=True)
class SelectedTokens:
    """A distillation loss in verl's form; `register` makes and registers one.

    Args:
        select: The rule; its quota is that of each response in the micro-batch.
        divergence: The loss on a kept token.
        normalizer: "kept" or "all", as `register` says.
        workspace_mib: MiB that measuring and learning may each use beyond inputs and results.
        row_weights: What weighs the tokens, as `register` says, or None.
    """

    select: Rule
    divergence: Divergence
    normalizer: str
    workspace_mib: float
    row_weights: Weigher | None = None

    def of_logits(self, config: Any, distillation_config: Any, data: Any, student_logits: Tensor) -> dict[str, Tensor]:
        """Per packed token (1, tokens): the loss, 0 where it was not kept, and what the metrics are made of."""
        _check(config, distillation_config, self.normalizer)
        logits = student_logits[0]
        rows, mask, rollouts = _response_rows(data, logits.shape[0], logits.device)
        teacher = _teacher(data)
        with torch.no_grad():
            out = distill(
                logits,
                teacher,
                select=self.select,
                divergence=self.divergence,
                row_mask=mask.cpu(),
                rollout_ids=rollouts,
                labels=None if not self._reads_labels else _sampled(data, mask),
                row_weights=self.row_weights,
                workspace_mib=self.workspace_mib,
                execution=Execution(full_stats=True),
            )
            divergence = self.divergence
            if isinstance(divergence, Gated):
                divergence = divergence.at(out.stats, mask, rollouts)
            weights = out.kept.mask.float() if out.kept._weights is None else out.kept._weights
            if self.row_weights is not None:
                weights = weights * self.row_weights(out.stats, mask, rollouts)
        kept = out.kept
        losses = divergence_loss(
            logits, teacher, divergence=divergence, kept=kept, stats=out.stats, workspace_mib=self.workspace_mib
        )
        losses = losses * weights[kept.row_ids]
        losses = torch.where(losses.detach().isfinite(), losses, 0.0)  # as distill drops such rows
        if self.normalizer == "kept":  # verl divides by all response tokens
            losses = losses * (rows.numel() / torch.where(out.plan.weight > 0, out.plan.weight, 1.0))
        stats = {"tip_entropy": out.stats.entropy_s, "tip_kl_rev": out.stats.kl_rev}
        stats |= {"tip_kept": kept.mask.float(), "tip_quadrant": quadrants(out.stats, row_mask=mask).float()}
        found = {
            "distillation_losses": torch.zeros(len(logits), device=logits.device).index_add(0, kept.row_ids, losses)
        }
        found |= {name: torch.where(mask, value, 0.0) for name, value in stats.items()}
        return {name: value.unsqueeze(0) for name, value in found.items()}

    @property
    def _reads_labels(self) -> bool:
        readers = (*readers_of(self.divergence), *([] if self.row_weights is None else [self.row_weights]))
        needs = self.select.needs.union(self.divergence.needs, *(getattr(reader, "needs", ()) for reader in readers))
        return bool(needs & LABEL_FIELDS)

    def __call__(
        self, config: Any, distillation_config: Any, model_output: dict, data: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """(B, L) losses and the metrics of the micro-batch."""
        padded = _padding().no_padding_2_padding
        mask = _dense(data["response_mask"]).bool()
        kept, quadrant, entropy, kl = (
            padded(model_output[f"tip_{name}"], data)[mask] for name in ("kept", "quadrant", "entropy", "kl_rev")
        )
        metrics = {"kept_frac": kept, "entropy": entropy, "kl_rev": kl}
        metrics |= {f"q{i}_frac": (quadrant == i).float() for i in (1, 2, 3, 4)}
        means = {f"distillation/tip/{name}": value.mean().item() for name, value in metrics.items()}
        return padded(model_output["distillation_losses"], data), means


def register(
    name: str = "tip",
    *,
    select: Rule | None = None,
    divergence: Divergence | None = None,
    normalizer: str = "kept",
    workspace_mib: float = 256,
    row_weights: Weigher | None = None,
) -> SelectedTokens:
    """Adds a distillation loss to verl's registry, for `distillation.distillation_loss.loss_mode=NAME`.

    verl's registry is asked only after the logits are gone and its `compute_topk_loss` knows one loss; so that one is
    wrapped to send this loss's logits here, and no other's. The loss refuses Megatron (a vocabulary in shards) and
    Ulysses sequence parallelism (responses in shards).

    Args:
        name: The name in verl's registry.
        select: SoftOr(0.5) unless given; its quota is that of each response in the micro-batch.
        divergence: ReverseKL() unless given, to the teacher's `topk` tokens and the remaining mass as one bucket; or,
            where a worker puts teacher_logits (nested (B, T, V)) in the batch, to all of its distribution.
        normalizer: "kept": a kept token's loss is scaled by response tokens / kept tokens of the micro-batch, so that
            verl's mean over tokens is one over kept tokens; needs loss_max_clamp=null, since verl clamps after it.
            "all": no scaling.
        workspace_mib: MiB that measuring and learning may each use beyond inputs and results, at least 1.
        row_weights: A callable `(stats, row_mask, rollout_ids) -> (N,)` such as those of tip_kernels.weights, of each
            micro-batch; "kept" is then scaled by response tokens / the sum of the weights of kept tokens. What reads
            log-probabilities takes the batch's input_ids for the sampled tokens.

    Returns:
        The loss that was registered.

    Raises:
        ImportError: Without verl.
        ValueError: Naming the argument, and for a name that is taken.
    """
    select, divergence = select or SoftOr(0.5), divergence or ReverseKL()
    expect(isinstance(select, Rule), "select", "a selection rule such as tip_kernels.SoftOr(0.5)", select)
    expect(isinstance(divergence, Divergence), "divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    expect(normalizer in ("kept", "all"), "normalizer", "'kept' or 'all'", normalizer)
    if row_weights is not None:
        expect(callable(row_weights), "row_weights", "a callable of statistics or None", row_weights)
        check_needs("row_weights", row_weights)
    try:
        losses: Any = importlib.import_module("verl.trainer.distillation.losses")
    except ImportError as error:
        raise ImportError(f"tip_kernels.hooks.verl.register needs verl 0.9 or later: {error}") from error
    loss = SelectedTokens(select, divergence, normalizer, workspace_mib, row_weights)
    losses.register_distillation_loss(losses.DistillationLossSettings(names=[name], use_topk=True))(loss)
    others = losses.compute_topk_loss

    @functools.wraps(others)
    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> dict[str, Tensor]:
        if distillation_config.distillation_loss.loss_mode == name:
            return loss.of_logits(config, distillation_config, data, student_logits)
        return others(config, distillation_config, data, student_logits, data_format)

    losses.compute_topk_loss = compute_topk_loss
    return loss


def _padding() -> ModuleType:
    return importlib.import_module("verl.workers.utils.padding")


def _dense(mask: Tensor) -> Tensor:
    return mask.to_padded_tensor(0) if mask.is_nested else mask


def _check(config: Any, distillation_config: Any, normalizer: str) -> None:
    if config.strategy == "megatron":
        raise ValueError("strategy: expected fsdp, fsdp2 or veomni, whose workers hold whole logits, got megatron")
    shards = importlib.import_module("verl.utils.ulysses").get_ulysses_sequence_parallel_world_size()
    if shards > 1:
        raise ValueError(
            f"ulysses_sequence_parallel_size: expected 1, since a response is ranked as a whole, got {shards}"
        )
    clamp = distillation_config.distillation_loss.loss_max_clamp
    if normalizer == "kept" and clamp is not None:
        raise ValueError(
            "loss_max_clamp: expected null beside normalizer='kept', since verl would clamp losses that are scaled:"
            f" give register a divergence.clipped({clamp:g}) instead, got {clamp}"
        )


def _response_rows(data: Any, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Packed ids of the rows that predict trainable tokens, their mask (tokens,), and each row's response."""
    places = _padding().no_padding_2_padding(torch.arange(count, device=device), data)  # (B, L), verl's own shift
    trainable = _dense(data["response_mask"]).bool().to(device)
    rows = places[trainable]
    mask = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, rows, True)
    response = torch.arange(len(places), device=device).unsqueeze(1).expand_as(places)[trainable]
    return rows, mask, torch.zeros(count, dtype=torch.int64, device=device).index_copy(0, rows, response)


def _sampled(data: Any, mask: Tensor) -> Tensor:
    """(tokens,) the token that each row of the mask predicts, -100 in others."""
    tokens = data.get("input_ids", None)
    if tokens is None:
        raise ValueError("input_ids: expected the packed tokens in the batch, since sampled tokens are read, got None")
    following = tokens.values().to(mask.device).long().roll(-1)  # a response's last token predicts nothing of its own
    return following.masked_fill(~mask, IGNORE_LABEL)


def _teacher(data: Any) -> Tensor | TopK:
    """Rows of the worker's teacher, packed as the student's are."""
    logits = data.get("teacher_logits", None)
    if logits is not None:
        return logits.values()
    return TopK(data["teacher_ids"].values().long(), data["teacher_logprobs"].values())
