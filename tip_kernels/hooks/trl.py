"""TRL's DistillationTrainer, learning from the tokens that a rule keeps.

    from trl import DistillationConfig, DistillationTrainer                              # before
    from tip_kernels.hooks.trl import TIPDistillationConfig, TIPDistillationTrainer      # after

Generation, wrappers (DDP, FSDP, ZeRO, PEFT) and images stay TRL's: the stock `_compute_loss` runs with another
divergence function. What a model's logits are is seen by running it (see hooks/transformers.py), not read off its
config: once when the trainer is made, so that what cannot work is refused there, and again in every step.

Selection is per micro-batch and rank, or with `tip_statistics="step"` over the whole optimizer step: all its
micro-batches are then measured before the first is learned from. Quotas are per rollout.

The loss of an optimizer step is the sum over the kept tokens of all its micro-batches and ranks, divided by how many
those are. A quota rule's count follows from the masks, which are known for the whole step before its first forward, so
`num_items_in_batch` becomes that count. Where the data decide (thresholds, a row whose divergence is NaN
or infinite), micro-batches are divided by the count known beforehand, and when the last backward of the step is done,
before clipping, gradients and reported loss are multiplied by (that count) / (tokens kept). DeepSpeed steps inside
backward, so there rules whose count is unknown are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

from tip_kernels import _versions

_versions.check("torch", "triton", "transformers", "trl")

import torch
from accelerate import DistributedType
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportPrivateImportUsage]  (loaded when asked)
from trl.trainer.utils import maybe_gather_lm_head_ctx

from tip_kernels._checks import expect, finite_number, refuse
from tip_kernels.distillation import registry as names
from tip_kernels.distillation.distill import distill
from tip_kernels.distillation.options import Execution
from tip_kernels.distillation.step_selection import StepSelection
from tip_kernels.hooks.transformers import read, renamed
from tip_kernels.learn.divergences import JSD, Divergence
from tip_kernels.learn.gated import check_needs, readers_of
from tip_kernels.select.adakd import AdaptiveFocus, TopHellinger, adakd
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rule import KeepAll, QuotaRule, Rule, Threshold
from tip_kernels.select.tip import Overconfident, SampleEntropy, TopEntropy
from tip_kernels.sources.from_models import head
from tip_kernels.sources.pair import Head
from tip_kernels.stats import LABEL_FIELDS, TokenStats

RULES = (*names.RULES, "threshold", "adakd")
LOSS_CALL = "_chunked_divergence_loss"  # what the stock _compute_loss calls, and what is put in its place
FOCUS = "AdaptiveFocus"  # its key in the trainer's state, and so in every checkpoint


def _setting(default: Any, text: str, **argparse_options: Any) -> Any:
    return field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class TIPDistillationConfig(DistillationConfig):
    """DistillationConfig with what is kept and how it is weighed.

    `temperature` and `beta` keep TRL's meaning. With tip_rule "all" and nothing else set, training is the stock
    trainer's.

    Args:
        tip_*: Which tokens, how many and by what loss: every field has its help text, as of a command line.
        **kwargs: DistillationConfig's own.

    Raises:
        ValueError: Naming the field.
    """

    tip_rule: str = _setting(
        "soft_or",
        "Which tokens the student learns from: all; soft_or (uncertain or divergent), entropy, divergence, hellinger: "
        "the largest of that; overconfident: divergent at a low entropy; sample_entropy, random: drawn; threshold: "
        "by tip_threshold_*; adakd: the share kept falls with the loss, the hardest first, each with a temperature of "
        "its own.",
        choices=RULES,
    )
    # Read from the command line as text: a fraction and a whole number mean different things.
    tip_keep: float | str | None = _setting(
        0.2,
        "How much is kept: a fraction of each rollout's tokens (0.2; 1.0 is all), or a number of tokens (64; 1 is one "
        "token). Not read by all, threshold and adakd. The mean over fewer tokens has a larger gradient, which "
        "max_grad_norm clips: watch tip/grad_norm.",
    )
    tip_scope: str = _setting(
        "rollout",
        "What tip_keep is a share of: each rollout, or the batch (one device's micro-batch).",
        choices=("rollout", "batch"),
    )
    tip_statistics: str = _setting(
        "micro_batch",
        "Among which tokens a rule ranks and normalizes, and AdaKD takes its median: those of a device's micro_batch, "
        "or of the optimizer step: all its micro-batches on all devices (a threshold's quantiles: on each device). "
        "The price of step: one more forward of student and teacher for every micro-batch, without a graph.",
        choices=("micro_batch", "step"),
    )
    tip_divergence: str | None = _setting(
        None,
        f"The loss on a kept token: {', '.join(names.DIVERGENCES)}; with parameters as in jsd:0.1. Default: as beta "
        "says.",
    )
    tip_entropy_below: float | str | None = _setting(
        None, "overconfident: only tokens of an entropy below this, in nats, or quantile:0.5 of the batch's tokens."
    )
    tip_divergence_above: float | str | None = _setting(
        None, "overconfident: only tokens of a KL(teacher || student) above this, in nats, or quantile:0.9."
    )
    tip_min_rows: int = _setting(1, "The least number of tokens kept of a rollout (or batch); 0 is the papers' floor.")
    tip_alpha: float = _setting(1.0, "sample_entropy: drawn in proportion to entropy^alpha hellinger_sq^gamma.")
    tip_gamma: float = _setting(0.0, "sample_entropy: see tip_alpha.")
    tip_loss_temperature: float | None = _setting(
        None, "Divides both models' logits in loss and statistics. Default: temperature, which is also the rollouts'."
    )
    tip_threshold_by: str = _setting(
        "kl_rev", "threshold: the statistic: kl_rev, kl_fwd, hellinger_sq, entropy_s, entropy_t."
    )
    tip_threshold_above: float | str | None = _setting(
        None, "threshold: keeps tokens above this, in nats, or quantile:0.9."
    )
    tip_threshold_below: float | str | None = _setting(
        None, "threshold: keeps tokens below this, in nats, or quantile:0.9."
    )
    tip_adakd_strength: float = _setting(0.5, "adakd: how far temperatures spread; 0 leaves them at temperature.")
    tip_adakd_beta: float = _setting(0.99, "adakd: how much of the average loss stays at each optimizer step.")
    tip_adakd_tolerance: float = _setting(0.05, "adakd: how far the average loss may drift before the share moves.")
    tip_adakd_step: float = _setting(0.05, "adakd: by how much the share moves.")
    tip_adakd_floor: float = _setting(0.1, "adakd: the smallest share.")
    tip_adakd_warmup: int = _setting(
        0, "adakd: optimizer steps before the share moves; 5 percent of the run in the paper."
    )
    tip_adakd_median_of: str = _setting(
        "valid",
        "adakd: the median difficulty is that of all valid tokens (the paper) or of the kept ones (its code).",
        choices=("valid", "kept"),
    )
    tip_adakd_reanchor: str = _setting(
        "paper",
        "adakd: the average loss to compare with moves as in the paper, or also while the share is at its floor or 1, "
        "as in its code.",
        choices=("paper", "release"),
    )
    tip_quadrants: bool = _setting(
        True,
        "Log tip/q1_frac to tip/q4_frac. They need the teacher's statistics of every token, which entropy and "
        "sample_entropy can otherwise leave out.",
    )
    tip_workspace_mib: float = _setting(256.0, "MiB that the loss may use for tiles of logits.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tip_divergence is not None and self.beta != 1.0:
            raise ValueError(
                f"beta: expected its default 1.0 beside tip_divergence={self.tip_divergence!r}, which takes its place, "
                f"got {self.beta!r}"
            )
        if self.tip_loss_temperature is not None:
            self._made("tip_loss_temperature", partial(finite_number, "it", self.tip_loss_temperature, positive=True))
        if self.tip_adakd_median_of not in ("valid", "kept"):
            raise ValueError(f"tip_adakd_median_of: expected 'valid' or 'kept', got {self.tip_adakd_median_of!r}")
        for make in (self.make_focus, self.make_divergence, partial(self.make_rule, 1.0)):
            make()  # raises where a field is wrong

    def make_rule(self, adakd_keep: float) -> Rule:
        """The rule of one optimizer step; `adakd_keep` is AdaKD's share of it."""
        if self.tip_scope not in ("rollout", "batch"):
            raise ValueError(f"tip_scope: expected 'rollout' or 'batch', got {self.tip_scope!r}")
        if self.tip_statistics not in ("micro_batch", "step"):
            raise ValueError(f"tip_statistics: expected 'micro_batch' or 'step', got {self.tip_statistics!r}")
        scope = "global" if self.tip_statistics == "step" else self.tip_scope
        if self.tip_rule == "adakd":
            return self._made(
                "tip_min_rows", partial(TopHellinger, adakd_keep, scope=scope, min_rows=self.tip_min_rows)
            )
        if self.tip_rule == "threshold":
            cuts = [self._read(f"tip_threshold_{side}", names.cut_of, optional=True) for side in ("above", "below")]
            if cuts == [None, None]:
                raise ValueError("tip_threshold_above: expected a bound here or in tip_threshold_below, got None")
            return self._made("tip_threshold_by", partial(Threshold, self.tip_threshold_by, *cuts))
        if self.tip_rule not in names.RULES:
            raise ValueError(f"tip_rule: expected one of {', '.join(RULES)}, got {self.tip_rule!r}")
        rule = names.RULES[self.tip_rule](self._read("tip_keep", names.keep_of), None)
        if isinstance(rule, Overconfident):
            cuts = {
                name: self._read(f"tip_{name}", names.cut_of, optional=True)
                for name in ("entropy_below", "divergence_above")
            }
            rule = replace(rule, **cuts)
        if isinstance(rule, SampleEntropy):
            powers = {"alpha": self.tip_alpha, "gamma": self.tip_gamma}
            rule = self._made("tip_alpha or tip_gamma", partial(replace, rule, **powers))
        if not isinstance(rule, QuotaRule):
            return rule
        return self._made("tip_min_rows", partial(replace, rule, scope=scope, min_rows=self.tip_min_rows))

    def make_divergence(self) -> Divergence:
        """The loss on a kept token."""
        if self.tip_divergence is None:
            return JSD(self.beta)  # which TRL has checked
        return self._read("tip_divergence", names.divergence_of)

    def make_focus(self) -> AdaptiveFocus | None:
        """AdaKD's share of kept tokens, or None without it."""
        if self.tip_rule != "adakd":
            return None
        settings = ("beta", "tolerance", "step", "floor", "warmup", "reanchor")
        return self._made(
            "tip_adakd_*", partial(AdaptiveFocus, **{name: getattr(self, f"tip_adakd_{name}") for name in settings})
        )

    def _read(self, name: str, reader: Any, *, optional: bool = False) -> Any:
        value = getattr(self, name)
        return None if optional and value is None else self._made(name, partial(reader, value))

    def _made(self, name: str, make: Any) -> Any:
        try:
            return make()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


class TIPDistillationTrainer(DistillationTrainer):
    """DistillationTrainer with the loss on the tokens that `args.tip_rule` keeps.

    Evaluation is over every token, so that runs with different rules can be compared. Beside TRL's metrics, each
    averaged over the steps between two logs:

        tip/kept_frac           kept tokens / trainable tokens, of all micro-batches and ranks
        tip/q1_frac ... q4_frac the quadrants' shares of the trainable tokens
        tip/divergence_kept     mean loss of a kept token; nothing where no token was kept
        tip/grad_norm           before clipping
        tip/keep                AdaKD's share
        tip/router_loss         of a student's experts, which its forward returns with output_router_logits: times the
                                model's own coefficient it is added to the loss, micro-batches and ranks averaged

    An optimizer step for which no token was kept changes nothing (under fp16, what the optimizer makes of zeros).
    Subclasses may override `make_rule` to return any rule.

    Args:
        model: The student, as DistillationTrainer takes it.
        teacher_model: The teacher, likewise.
        args: A TIPDistillationConfig; one of its defaults unless given.
        *rest: The stock trainer's.
        divergence: The loss on a kept token, such as a Gated; as args say unless given.
        row_weights: A callable `(stats, row_mask, rollout_ids) -> (N,)` such as those of tip_kernels.weights; the loss
            of a step is then divided by the sum of the weights of its kept tokens. Evaluation is not weighed. It sees,
            as a divergence's gates do, one micro-batch at a time, whatever tip_statistics says.
        **named: The stock trainer's.

    Raises:
        ValueError: Naming the argument.
        RuntimeError: With a TRL whose trainer works in another way.
    """

    # What transformers' Trainer and TRL declare wider.
    args: TIPDistillationConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: torch.nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher_model: torch.nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
    model_wrapped: torch.nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
    _buffered_inputs: list[dict[str, Any]]  # pyright: ignore[reportIncompatibleVariableOverride]
    _tag_names: list[str] = [*DistillationTrainer._tag_names, "tip"]  # noqa: RUF012  (TRL reads a list)

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TIPDistillationConfig | None = None,
        *rest,
        divergence: Divergence | None = None,
        row_weights: Callable[..., Tensor] | None = None,
        **named,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = TIPDistillationConfig(f"{name.split('/')[-1]}-Distillation")
        if not isinstance(args, TIPDistillationConfig):
            raise ValueError(f"args: expected a TIPDistillationConfig, got {type(args).__name__}")
        if LOSS_CALL not in DistillationTrainer._compute_loss.__code__.co_names:
            raise RuntimeError(
                f"tip_kernels.hooks.trl is for TRL 1.16, whose trainer calls {LOSS_CALL}; this one does not"
            )
        self.focus = args.make_focus()
        self._divergence, self._row_weights = _checked_loss(args, divergence, row_weights), row_weights
        self._select: Rule | None = None  # of the current optimizer step
        self._sums: list[Tensor] = []  # of its micro-batches, on the device
        self._losses: list[Tensor] = []
        self._measuring: StepSelection | None = None  # while micro-batches are measured, and nothing is learned
        self._measured = 0  # rollouts so far
        self._heads: list[Head] = []  # of the student and the teacher, in one loss call
        self._router: Tensor | None = None  # the student's experts' own loss in it
        self._routers: list[Tensor] = []  # of the micro-batches
        if teacher_model is None:
            raise ValueError("teacher_model: expected a transformers model or its name, got None")
        for name, given in (("model", model), ("teacher_model", teacher_model)):
            if isinstance(given, torch.nn.Module):
                _check_place(name, given)
        super().__init__(model, teacher_model, args, *rest, **named)
        self._probe()
        self._check_divisor()

    def _check_divisor(self) -> None:
        """Refuses losses whose divisor is known too late for what steps or adds gradients before."""
        args, row_weights = self.args, self._row_weights
        divisor_is_known = args.tip_statistics == "step" or count_is_known(self.make_rule())
        if row_weights is not None and (self.is_deepspeed_enabled or self._router is not None):
            raise ValueError(
                "row_weights: expected None with DeepSpeed, which steps inside backward, and with a student whose "
                "experts have a loss of their own, since the sum of weights is known after it, "
                f"got {type(row_weights).__name__}"
            )
        if self.is_deepspeed_enabled and not divisor_is_known:
            raise ValueError(
                f"tip_rule: expected a rule whose count is known beforehand, since DeepSpeed steps inside backward, "
                f"got {args.tip_rule!r}"
            )
        if self._router is not None and not divisor_is_known:
            raise ValueError(
                "tip_rule: expected a rule whose count is known beforehand, or tip_statistics='step', since gradients "
                f"of the student's experts' own loss cannot be scaled apart, got {args.tip_rule!r}"
            )

    def _probe(self) -> None:
        """Reads both models once, on two tokens, and refuses what is no Head or not where TRL looks for it."""
        for name, model in (("model", self.model), ("teacher_model", self.teacher_model)):
            if name == "model" and is_deepspeed_zero3_enabled():
                continue  # not prepared yet: the first step reads it
            plain = self.accelerator.unwrap_model(model)
            place = plain.get_input_embeddings().weight.device
            ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu" if place.type == "meta" else place)
            modes = {module: module.training for module in model.modules()}
            model.eval()
            self._heads = [] if name == "model" else self._heads[:1]
            try:
                with torch.set_grad_enabled(name == "model"):
                    call = self._get_last_hidden_state
                    self._forward_redirection(model, plain, call, plain, ids, torch.ones_like(ids), 1)
            finally:
                for module, mode in modes.items():
                    module.training = mode
        self._heads = []

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **images):
        name = "teacher_model" if self._heads else "model"
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | images
        inputs = {name: value for name, value in inputs.items() if value is not None}
        rows = slice(-logits_to_keep - 1, -1)
        # TRL calls this inside of the model's forward, whose hooks have run, and without what is put around that
        forward = partial(type(unwrapped_model).forward, unwrapped_model)
        try:
            found, router = read(unwrapped_model, forward, None, rows, inputs)
        except ValueError as error:
            raise ValueError(renamed(error, name)) from error
        if not self._heads:
            self._router = router
        self._heads.append(found)
        return found.hidden

    def make_rule(self) -> Rule:
        """The rule of the next optimizer step."""
        return self.args.make_rule(self.focus.keep if self.focus else 1.0)

    def _prepare_inputs(self, generation_batch):
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not buffered:  # the micro-batches of a new optimizer step
            if self.focus and self.focus.state_dict()["seen"] == 0 and FOCUS in self._saved:
                self.focus.load_state_dict(self._saved[FOCUS])
            self._select = self.make_rule()
            if self.args.tip_statistics == "step":
                self._choose()
            elif count_is_known(self._select):
                masks = [_loss_mask(batch) for batch in self._buffered_inputs]
                count = torch.stack([count_kept(self._select, mask) for mask in masks]).sum()
                count = self._gathered(count).sum()
                for batch in self._buffered_inputs:
                    batch["num_items_in_batch"] = count
        return inputs

    def _choose(self) -> None:
        """Measures every micro-batch of the step, chooses among all, and leaves each what it is to learn from."""
        temperature = self.args.tip_loss_temperature or self.temperature
        choice: dict[str, Any] = {"select": self._select, "temperature": temperature}
        if self.focus:
            choice = self._adakd(temperature, scope="global", median_scope="global")
        choice = {name: choice[name] for name in ("select", "temperature", "temperature_sq") if name in choice}
        step = StepSelection(**choice, full_stats=not choice["select"].needs >= self._logged)
        self._measuring, self._measured = step, 0
        model = self.model_wrapped
        student = self.accelerator.unwrap_model(model)
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                for batch in self._buffered_inputs:
                    self._forward_redirection(model, student, self._compute_loss, student, batch, None)
        finally:
            self._measuring = None
        parts = step.parts()
        count = self._gathered(step.kept.mask.sum()).sum()
        sizes = [part["select"].kept.mask.numel() for part in parts]
        columns = [getattr(step.stats, name).split(sizes) for name in sorted(self._logged)]
        for batch, part, *values in zip(self._buffered_inputs, parts, *columns, strict=True):
            stats = TokenStats(**dict(zip(sorted(self._logged), values, strict=True)))
            batch |= {"num_items_in_batch": count, "tip_part": part, "tip_stats": stats}

    @property
    def _saved(self) -> dict[str, Any]:
        """The states that the trainer's own holds, and so every checkpoint."""
        return self.state.stateful_callbacks  # pyright: ignore[reportReturnType]  (a list only until it is made)

    def _gathered(self, x: Tensor) -> Tensor:
        found = self.accelerator.gather(x)
        assert isinstance(found, Tensor)
        return found

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        found = self.accelerator.reduce(x, how)
        assert isinstance(found, Tensor)
        return found

    @property
    def _logged(self) -> frozenset[str]:
        """The statistics of every token that the log reads."""
        return frozenset({"entropy_s", "kl_rev"} if self.args.tip_quadrants else {"entropy_s"})

    def _adakd(self, temperature: float, **how: Any) -> dict[str, Any]:
        assert self.focus is not None
        how |= {"strength": self.args.tip_adakd_strength, "median_of": self.args.tip_adakd_median_of}
        return {**adakd(self.focus, base=temperature, min_rows=self.args.tip_min_rows, **how)}

    def _measure(self, step: StepSelection, student: Head, teacher: Head, mask: Tensor) -> None:
        ids = None
        if self.args.tip_scope == "rollout":  # a number that no other rollout of the step has, on any device
            first = (self.accelerator.process_index << 40) + self._measured
            ids = (torch.arange(len(mask), device=mask.device) + first).unsqueeze(1).expand(mask.shape)
        self._measured += len(mask)
        workspace = self.args.tip_workspace_mib
        step.measure(student, teacher, row_mask=mask.cpu(), rollout_ids=ids, workspace_mib=workspace)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # The stock method as it is, but for the one name: whatever it knows of models is TRL's to keep up with.
        stock = DistillationTrainer._compute_loss
        scope = {**stock.__globals__, LOSS_CALL: partial(self._kept_loss, inputs)}
        compute = FunctionType(stock.__code__, scope, stock.__name__, stock.__defaults__, stock.__closure__)
        self._heads = []
        try:
            return compute(self, unwrapped_student, inputs, num_items_in_batch)
        finally:
            self._heads = []

    def _kept_loss(
        self,
        inputs: dict[str, Any],
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | float | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In place of TRL's function: the loss, the sum of entropies, how many tokens are trainable."""
        mask, temperature = completion_mask != 0, self.args.tip_loss_temperature or temperature
        weights_s, scales_s = (
            (student_lm_head_weight, student_lm_head_bias),
            (student_logit_scale, student_final_logit_softcapping),
        )
        weights_t, scales_t = (
            (teacher_lm_head_weight, teacher_lm_head_bias),
            (teacher_logit_scale, teacher_final_logit_softcapping),
        )
        if self._heads:  # what the forwards did, whatever the configs say
            scales_s, scales_t = ((found.scale, found.softcap) for found in self._heads)
            if not is_deepspeed_zero3_enabled():  # whose weights are in the parameters alone, while they are gathered
                weights_s, weights_t = ((found.weight, found.bias) for found in self._heads)

        def learn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            student = head("student_lm_head", hidden, weight, bias, *scales_s)
            teacher = head("teacher_lm_head", teacher_hidden_states, *weights_t, *scales_t)
            if self._measuring is not None:
                self._measure(self._measuring, student, teacher, mask)
                return hidden.new_zeros(()), hidden.new_zeros(9, dtype=torch.float64)
            return self._learn(student, teacher, mask, inputs, temperature)

        leaves = student_hidden_states, *weights_s
        at_once = torch.is_grad_enabled() and is_deepspeed_zero3_enabled()
        with (
            # which takes any tensor, and None
            maybe_gather_lm_head_ctx(*weights_s),  # pyright: ignore[reportArgumentType]
            maybe_gather_lm_head_ctx(*weights_t),  # pyright: ignore[reportArgumentType]
        ):
            total, sums = _AtOnce.apply(learn, *leaves) if at_once else learn(*leaves)
        count_trainable, count_kept = sums[:2]
        if self._measuring is None:
            self._sums.append(sums[:8])
        entropy_sum = sums[8]
        divisor = count_kept.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = (total / divisor).float()
        if self._heads and self._router is not None and self._measuring is None:
            self._routers.append(self._router.detach().double())
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self._router.to(loss.device).float() / steps
        return loss, entropy_sum, count_trainable.long()

    def _learn(
        self, student: Head, teacher: Head, mask: Tensor, inputs: dict[str, Any], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of the kept tokens' losses, with its gradient, and (9,) float64 sums over the trainable tokens: one
        each, kept, that loss, the four quadrants, what the kept weigh, the student's entropy."""
        rows = mask.cpu()  # there, rows that are masked are left out of every sweep
        choice: dict[str, Any] = {"select": self._select, "row_mask": rows, "temperature": temperature}
        stats = inputs.get("tip_stats")  # of every token, where the step has been measured
        if not self.model.training:
            choice["select"] = KeepAll()
        elif stats is not None:
            choice = inputs["tip_part"]
        elif self.focus:
            choice = self._adakd(temperature, row_mask=rows, scope=self.args.tip_scope)
        weigh = self._row_weights if self.model.training else None
        choice = {**choice, "normalizer": 1, "row_weights": weigh}
        shows_quadrants = self.args.tip_quadrants
        labels = inputs["completion_ids"].to(mask.device).masked_fill(~mask, -100) if self._reads_labels else None
        out = distill(
            student,
            teacher,
            **choice,
            divergence=self._divergence,
            labels=labels,
            workspace_mib=self.args.tip_workspace_mib,
            execution=Execution(full_stats=stats is None and not choice["select"].needs >= self._logged),
        )
        stats = stats or out.stats
        with torch.no_grad():
            flat = mask.flatten()
            kept = out.plan.kept_rows - out.plan.dropped_rows
            quadrant = quadrants(stats, row_mask=flat) if shows_quadrants else torch.zeros_like(flat)
            shares = [(quadrant == i).sum() for i in (1, 2, 3, 4)]
            entropies = torch.where(flat, stats.entropy_s, 0.0).sum()
            weight = kept if weigh is None else out.plan.weight
            sums = [flat.sum(), kept, out.loss.detach(), *shares, weight, entropies]
            return out.loss, torch.stack([value.double() for value in sums])

    @property
    def _reads_labels(self) -> bool:
        readers = [*readers_of(self._divergence), *([] if self._row_weights is None else [self._row_weights])]
        needs = self._divergence.needs.union(*(getattr(reader, "needs", ()) for reader in readers))
        return bool(needs & LABEL_FIELDS)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if not self.accelerator.sync_gradients:
            return loss
        reported = torch.stack(self._losses).sum()
        factor = self._finish_step(model)
        self._losses = []
        return loss + (factor - 1) * reported

    def _finish_step(self, model: torch.nn.Module) -> float:
        """Makes the gradients those of the mean over the tokens kept in this step, and returns what that took."""
        _, _, total, *_, kept = self._log_sums("train")  # of weighed tokens what they weigh
        divided_by = max(float(self._buffered_inputs[0]["num_items_in_batch"]), 1.0)
        if self.focus and kept:
            self.focus.update(total / kept)
            self._saved[FOCUS] = self.focus.state_dict()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it has stepped already
            return 1.0
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        if not kept and self.accelerator.scaler is None:  # a scaler demands gradients
            for weight in weights:
                weight.grad = None  # a gradient of 0 would still let momentum and weight decay move the weight
        if not kept or kept == divided_by:
            return 1.0
        for weight in weights:
            assert weight.grad is not None
            weight.grad.mul_(divided_by / kept)
        return divided_by / kept

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            self._log_sums("eval")
        return result

    def _log_sums(self, mode: str) -> list[float]:
        """Logs what the micro-batches of a step summed up over all ranks, and returns it. Synchronises."""
        sums = self._reduced(torch.stack(self._sums).sum(0), "sum").tolist()
        self._sums = []
        trainable, kept, total, *quadrants, weight = sums
        metrics = {"kept_frac": kept / max(trainable, 1)}
        if self.args.tip_quadrants:
            metrics |= {f"q{i}_frac": count / max(trainable, 1) for i, count in enumerate(quadrants, start=1)}
        if weight:
            metrics["divergence_kept"] = total / weight
        if self.focus and mode == "train":
            metrics["keep"] = self.focus.keep
        if self._routers:
            metrics["router_loss"] = self._reduced(torch.stack(self._routers).mean(), "mean").item()
            self._routers = []
        for name, value in metrics.items():
            self._metrics[mode][f"tip/{name}"].append(value)
        return sums

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self._metrics["train"]["tip/grad_norm"].append(float(norm))
        return norm


def _checked_loss(args: TIPDistillationConfig, divergence: Divergence | None, row_weights: Any) -> Divergence:
    """The divergence, and a ValueError for what is none or what are no weights."""
    if row_weights is not None:
        expect(callable(row_weights), "row_weights", "a callable of statistics or None", row_weights)
        check_needs("row_weights", row_weights)
    if divergence is None:
        return args.make_divergence()
    if not isinstance(divergence, Divergence):
        refuse("divergence", "a Divergence such as tip_kernels.ReverseKL()", divergence)
    ok = args.tip_divergence is None and args.beta == 1.0
    expect(ok, "divergence", "None beside tip_divergence and beta, whose place it takes", divergence)
    return divergence


def _check_place(name: str, model: Any) -> None:
    """Refuses an output layer without a weight and a bias that TRL can look at between forwards."""
    output = model.get_output_embeddings()
    weight, kind = getattr(output, "weight", None), f"{type(model).__name__} with {type(output).__name__}"
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(f"{name}: expected an output layer in memory, got {kind}, which is offloaded: load the model")
    if not isinstance(weight, Tensor) or not hasattr(output, "bias"):
        raise ValueError(
            f"{name}: expected an output layer with a weight and a bias, got {kind}: an adapter on it is to be merged"
        )


def count_is_known(rule: Rule) -> bool:
    """Whether masks alone say how many rows the rule keeps, NaN rows aside."""
    return isinstance(rule, KeepAll) or (isinstance(rule, QuotaRule) and rule.fills_quota)


def count_kept(rule: Rule, mask: Tensor) -> Tensor:
    """() int64: how many rows of a (B, T) mask such a rule keeps."""
    if isinstance(rule, KeepAll):
        return mask.sum()
    assert isinstance(rule, QuotaRule)
    same_quota = TopEntropy(rule.keep, scope=rule.scope, min_rows=rule.min_rows)
    level = TokenStats(entropy_s=torch.zeros(mask.numel(), device=mask.device), _batch_shape=tuple(mask.shape))
    return same_quota(level, mask).mask.sum()


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T) bool, True for the tokens that TRL trains on."""
    mask = inputs["completion_mask"] != 0
    return mask & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else mask


class _AtOnce(torch.autograd.Function):
    """A loss whose gradient is taken in the forward, where ZeRO-3 has the heads gathered; in backward they are not."""

    @staticmethod
    def forward(ctx, learn, *leaves: Tensor | None):
        needed = ctx.needs_input_grad[1:]
        own = [
            leaf if leaf is None else leaf.detach().requires_grad_(need)
            for leaf, need in zip(leaves, needed, strict=True)
        ]
        with torch.enable_grad():
            total, sums = learn(*own)
        wanted = [leaf for leaf, need in zip(own, needed, strict=True) if need and leaf is not None]
        ctx.save_for_backward(*(torch.autograd.grad(total, wanted) if wanted else ()))
        ctx.mark_non_differentiable(sums)
        return total.detach(), sums

    @staticmethod
    def backward(ctx, *upstream):
        grads = iter(ctx.saved_tensors)
        return None, *(next(grads) * upstream[0] if need else None for need in ctx.needs_input_grad[1:])
