"""Heads of transformers models: the backbone runs, the logits never exist.

A model's own forward is called with its output layer taken out. What reaches that layer is the hidden state; what goes
on in its place is a few rows of probes, numbers of known size, and what the forward makes of those is what it makes of
any logit. Scale and softcap are read off that, so no list of architectures is needed, and a forward that does anything
else to its logits is found out on the call in which it does. Wrappers (PEFT, DDP, accelerate) see an ordinary call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tip_kernels._checks import FLOATS, expect
from tip_kernels.distillation.distill import Distilled, distill
from tip_kernels.distillation.options import Execution
from tip_kernels.learn.divergences import ReverseKL
from tip_kernels.select.rule import SoftOr
from tip_kernels.sources.pair import Head
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import LABEL_FIELDS

IGNORE = -100  # no label, as in transformers
TOLERANCE = 1e-5  # relative: what float32 in a model's forward may round
NOT_INPUTS = ("labels", "completion_mask")  # entries of a batch that are not the model's


def head_of(
    model: nn.Module, *, vocab_size: int | None = None, logits_to_keep: int | slice | Tensor = 0, **inputs: Any
) -> Head:
    """The hidden states of a causal language model and its output layer, without its logits.

        softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) = model(**inputs).logits

    Gradients flow through the Head to the whole model. Where autocast is active inside the model's forward alone, the
    head's products are taken in its weight's dtype. Does not synchronise.

    Args:
        model: A transformers model with a linear output layer, perhaps wrapped by PEFT, DDP or accelerate. Mode,
            autocast, gradient checkpointing and tied embeddings are as they are found.
        vocab_size: Use the first vocab_size tokens alone, where padding differs between models.
        logits_to_keep: Positions of the Head: the last n (0 is all), a slice, or an int64 tensor (n,).
        **inputs: What model.forward takes (input_ids, attention_mask, position_ids, ...), without labels.

    Returns:
        A Head with hidden (B, T, H); row t predicts token t + 1.

    Raises:
        ValueError: With the reason where the model's logits are not the formula's: several output layers, adapters on
            it (unless disabled or merged), quantised or sharded weights of it, a learnable scale, tokens that are
            masked; and for a model that is compiled as a whole.
    """
    expect(isinstance(model, nn.Module), "model", "a transformers causal language model", model)
    if inputs.get("labels") is not None:
        raise ValueError("labels: expected none, since head_of takes no loss: tip_kernels.distill does, got some")
    plain = _unwrapped(model)
    kind = type(plain).__name__
    output = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    expect(
        isinstance(output, nn.Module), "model", f"a model with get_output_embeddings(), which {kind} has not", output
    )
    traced = bool(getattr(model, "find_unused_parameters", False))
    with _taken_out(output, kind, traced) as calls:
        trouble, logits = None, None
        try:
            logits = getattr(_without_cache(model, inputs), "logits", None)
        except (RuntimeError, IndexError, ValueError) as error:
            if not calls or isinstance(error, torch.OutOfMemoryError):
                raise  # the backbone's own
            trouble = error
    if len(calls) != 1:
        layers = ", ".join(type(layer).__name__ for layer, _ in calls) or "none"
        raise ValueError(f"model: expected a forward that calls one linear output layer once, got {kind} with {layers}")
    if trouble is not None:
        raise _more_than_the_formula(kind, str(trouble).partition("\n")[0]) from trouble
    ((layer, hidden),) = calls
    scale, softcap = _transform(kind, logits, layer.weight.shape[0], traced)
    if hidden.dtype != layer.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(layer.weight.dtype)
    expect(hidden.dim() == 3, "model", f"a {kind} whose output layer reads (B, T, H)", hidden)
    hidden = _positions(hidden, logits_to_keep)
    return Head(hidden, layer.weight, layer.bias, scale=scale, softcap=softcap, vocab_size=vocab_size)


def _without_cache(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """What the forward returns; it keeps no keys and values unless `inputs` say so, where it knows that wish."""
    try:
        return model(**({"use_cache": False} | inputs))
    except TypeError as error:
        if "use_cache" in inputs or "use_cache" not in str(error):
            raise
    return model(**inputs)


def distill_batch(
    student: nn.Module,
    teacher: nn.Module | Head | TopK | Tensor,
    batch: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    **options: Any,
) -> Distilled:
    """tip_kernels.distill on a batch as transformers' data collators make it; the loss of one forward of each model.

    A token is a row where it and the token before it are attended to: no row predicts from padding. Synchronises once
    on a GPU, to leave masked rows out of every product.

    Args:
        student: A model as head_of takes it.
        teacher: Another one, run without gradients in the mode it is in; or a source of rows (B, T - 1).
        batch: input_ids (B, T) and what else the models' forwards take; labels (B, T), -100 where nothing is learned,
            or completion_mask (B, T), 1 on the tokens to learn; with both, both must allow a token.
        vocab_size: Slices both models' vocabularies, where their padding differs.
        num_items_in_batch: As Trainer.compute_loss gets it: the tokens with a label in all micro-batches of the step.
            The loss is then the mean over kept tokens times this batch's share of those tokens.
        **options: Of tip_kernels.distill: select, divergence, temperature, ...; its rows are (B, T - 1), row t
            predicting token t + 1; row_mask and labels are made here.

    Returns:
        What tip_kernels.distill returns: loss, stats, kept and plan.

    Raises:
        ValueError: Naming the argument.
    """
    mask, labels = _rows(batch)
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    rows = head_of(student, vocab_size=vocab_size, logits_to_keep=slice(None, -1), **inputs)
    ok = rows.hidden.shape[:2] == mask.shape
    expect(ok, "student", f"hidden states of {tuple(mask.shape)} rows, one a token but the last", rows.hidden)
    if isinstance(teacher, nn.Module):
        with torch.no_grad():
            teacher = head_of(teacher, vocab_size=vocab_size, logits_to_keep=slice(None, -1), **inputs)
    reads = (options.get("divergence") or ReverseKL()).needs | (options.get("select") or SoftOr(0.5)).needs
    if options.get("ce_weight") or reads & LABEL_FIELDS:
        expect(labels is not None, "batch", "labels or input_ids, since the loss reads tokens", tuple(batch))
        options["labels"] = torch.where(mask, labels, IGNORE)
    execution = options.pop("execution", Execution())
    if execution.backward and isinstance(student, nn.parallel.DistributedDataParallel):
        raise ValueError("backward: expected False with DDP, which has to see every gradient, got True")
    if num_items_in_batch is None:
        return distill(rows, teacher, row_mask=mask.cpu(), execution=execution, **options)
    expect(options.get("normalizer", "kept") == "kept", "normalizer", "'kept' beside num_items_in_batch", options)
    share = (mask.sum() / num_items_in_batch).float()
    if execution.backward:
        execution = replace(execution, grad_scale=share * execution.grad_scale)
    out = distill(rows, teacher, row_mask=mask.cpu(), execution=execution, **options)
    return out._replace(loss=out.loss * share)


def _rows(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(B, T - 1) bool, whether a row is learned, and the token that it predicts."""
    labels, completion = batch.get("labels"), batch.get("completion_mask")
    chosen = [] if labels is None else [labels != IGNORE]
    chosen += [] if completion is None else [completion.bool()]
    expect(bool(chosen), "batch", "labels or completion_mask, (B, T)", tuple(batch))
    mask = chosen[0] & chosen[-1]
    expect(mask.dim() == 2, "batch", "labels and completion_mask of shape (B, T)", mask)
    mask, attention = mask[:, 1:], batch.get("attention_mask")
    if attention is not None and attention.dim() == 2:
        mask = mask & attention[:, 1:].bool() & attention[:, :-1].bool()
    tokens = batch.get("input_ids") if labels is None else labels
    return mask, None if tokens is None else tokens[:, 1:]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, PEFT and the like."""
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model: expected a model that is not compiled as a whole, since its output layer is taken out of its"
                f" forward: compile its backbone or its layers instead, got {type(model).__name__}"
            )
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            if getattr(model, "static_graph", False):
                raise ValueError(
                    "model: expected DDP without static_graph, which watches the logits, got static_graph=True"
                )
            model = model.module
        else:
            return model


@contextmanager
def _taken_out(output: nn.Module, kind: str, traced: bool) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
    """Inside, the linear layers of `output` return probes; yields those that were called, with what they were given."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [layer for layer in output.modules() if isinstance(layer, nn.Linear)]
    before = [vars(layer).get("forward") for layer in layers]

    def stand_in(layer: nn.Linear):
        def forward(hidden: Tensor) -> Tensor:
            weight = layer.weight
            plain = type(layer).forward is nn.Linear.forward and type(weight) in (Tensor, nn.Parameter)
            if not plain or weight.dim() != 2 or weight.dtype not in FLOATS:
                what = f"{type(layer).__name__} with {type(weight).__name__} of {weight.dtype} {tuple(weight.shape)}"
                raise ValueError(
                    f"model: expected a plain nn.Linear output layer, whole and not quantised, got {what} in {kind}"
                )
            calls.append((layer, hidden))
            probes = _probes(layer.weight.shape[0])
            return _Attached.apply(probes, hidden, layer.weight, layer.bias) if traced else probes

        return forward

    try:
        for layer in layers:
            layer.forward = stand_in(layer)
        yield calls
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


class _Attached(torch.autograd.Function):
    """Probes that are in the graph of the hidden states, where DDP looks for the parameters that a step uses."""

    @staticmethod
    def forward(ctx: Any, probes: Tensor, *watched: Tensor | None) -> Tensor:
        return probes.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


_SMALL = 2.0 ** torch.arange(-3, 4, dtype=torch.float64)
_WIDE = 2.0 ** torch.arange(-30, 41, dtype=torch.float64)


def _probes(vocab: int) -> Tensor:
    """(1, R, V) float64 on the CPU: a row of small numbers of both signs, in which what happens to single tokens would
    show, and as many rows as it takes to hold every power of _WIDE and 0."""
    small, wide = torch.cat([_SMALL, -_SMALL]), torch.cat([_WIDE, -_WIDE, torch.zeros(1, dtype=torch.float64)])
    size = math.ceil(wide.numel() / vocab) * vocab
    return torch.cat([_repeated(small, vocab), _repeated(wide, size)]).view(1, -1, vocab)


def _repeated(pattern: Tensor, size: int) -> Tensor:
    return pattern.repeat(math.ceil(size / pattern.numel()))[:size]


def _transform(kind: str, logits: Tensor | None, vocab: int, traced: bool) -> tuple[float, float | None]:
    """Scale and softcap of a forward that made `logits` of the probes."""
    probes = _probes(vocab)
    if not isinstance(logits, Tensor) or logits.shape != probes.shape:
        got = "no logits" if logits is None else f"logits of another shape, {tuple(getattr(logits, 'shape', ()))}"
        raise _more_than_the_formula(kind, got)
    if logits.requires_grad and not traced:
        raise _more_than_the_formula(kind, "a learnable scale or bias after the output layer")
    made = logits.detach().to("cpu", torch.float64)
    wide = made[0, 1:].flatten()[: _WIDE.numel()]  # what became of the powers of two, ascending
    if torch.isclose(wide[-1], 2 * wide[-2], rtol=TOLERANCE, atol=0):
        scale, softcap = wide[_WIDE == 1].item(), None
        expected = scale * probes
    else:
        softcap = wide[-1].item()
        half = (wide / softcap - 0.5).abs().nan_to_num(math.inf).argmin()  # where atanh is well conditioned
        scale = (softcap * torch.atanh(wide[half] / softcap) / _WIDE[half]).item()
        expected = softcap * torch.tanh(scale / softcap * probes) if softcap else torch.full_like(probes, math.nan)
    wrong = ~torch.isclose(made, expected, rtol=TOLERANCE, atol=0)
    if wrong.any() or not 0 < scale < math.inf or not (softcap is None or 0 < softcap < math.inf):
        at = wrong.nonzero()[0] if wrong.any() else torch.tensor([0, 0, 0])
        z, token = tuple(at), int(at[2])
        raise _more_than_the_formula(kind, f"a logit of {probes[z]:.6g} for token {token} becomes {made[z]:.6g}")
    # 12 digits: as the config has them, without the rounding of the way here
    return float(f"{scale:.12g}"), None if softcap is None else float(f"{softcap:.12g}")


def _more_than_the_formula(kind: str, got: str) -> ValueError:
    form = "softcap * tanh(scale * (hidden W^T + bias) / softcap)"
    return ValueError(f"model: expected logits {form}, got {kind}, whose forward does something else to them: {got}")


def _positions(hidden: Tensor, keep: int | slice | Tensor) -> Tensor:
    """Positions of (B, T, H) as transformers' logits_to_keep means them."""
    if isinstance(keep, slice):
        return hidden[:, keep]
    if isinstance(keep, Tensor):
        expect(keep.dim() == 1 and keep.dtype == torch.int64, "logits_to_keep", "an int64 tensor (n,)", keep)
        return hidden[:, keep]
    ok = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0
    expect(ok, "logits_to_keep", "an int of at least 0, a slice or an int64 tensor (n,)", keep)
    return hidden[:, -keep:] if keep else hidden
